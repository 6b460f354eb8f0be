"""Specs: all settings of a command as typed data; its options, help and defaults derive from them.

The docstring below a field is the help of its option (docs/adding-an-option.md). Nothing here
imports torch, so that `--help` is fast.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bh_routing.errors import InputError
from bh_routing.experiments import defaults
from bh_routing.experiments.spec_errors import describe_error, shorten


class Prompt(BaseModel):
    """A text to continue."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: str
    """Not empty."""
    category: str = "custom"
    """Group in reports, and a name that `--prompts` accepts."""
    description: str = ""
    """Purpose of the prompt, as a phrase."""

    @field_validator("text", "category")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty; write at least one word")
        return value

    @field_validator("text", "category", "description")
    @classmethod
    def _utf8(cls, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"must be valid Unicode; {error.reason}: remove it") from None
        return value


NO_OPTION: Final = "no option"
"""Marks a field that the command line doesn't set by an option of its own."""
COMMAS: Final = "separated by commas"
"""Marks a list that an option takes in one word; other lists' options may be repeated."""


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",") if part.strip()]


def _to_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Names = Annotated[list[str], BeforeValidator(_split), COMMAS]
Source = Annotated[str, BeforeValidator(_to_text)]
"""A file or a data set, as `read_documents` reads it."""
Count = Annotated[int, Field(ge=1)]
ChatTemplate = Literal["auto", "on", "off"]


DISTINCT_NEEDS_STEPS: Final = (
    'cost="distinct" and decode_batch need each other, since distinct experts are counted by '
    "decode step; give both, such as decode_batch=16, or neither"
)


class Choice(BaseModel):
    """The user's choice of configurations, of which `choose` makes a spec's fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    config: Path | None = None
    """YAML file with further configurations, and prompts for `run`."""
    configs: Names | None = None
    """Only these configurations, such as topk_8,bh_strict; lm-eval needs the model's own top-k
    among them."""
    rules: list[str] = []
    """A rule in one word, such as bh:alpha=0.02,max_k=6; may be given several times. Without
    --config and --configs only these are used."""


class PromptChoice(Choice):
    """The user's choice of configurations and prompts."""

    prompts: Names | None = None
    """Only these prompts: numbers from 1, ranges or categories: 1,4-6,simple."""


class ModelSpec(BaseModel):
    """A model, and the seed of work with it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: Annotated[str, Field(min_length=1)] = "allenai/OLMoE-1B-7B-0924"
    """`demo`, a folder with a checkpoint, or a Hugging Face id."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model; auto is CUDA if available."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the parameters; auto is bfloat16 on CUDA and float32 on a CPU."""
    device_map: Literal["auto"] | None = None
    """auto spreads a model larger than one GPU over all GPUs, with accelerate."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = defaults.SEED
    """Seed of all random draws."""


class CalibrateSpec(ModelSpec):
    """Settings of `calibrate`."""

    output: Path
    """File to write, such as model.safetensors."""
    calibration_texts: list[Source] = []
    """Text or JSONL file, or hf:NAME:SPLIT; may be given several times. Default: the packaged
    calibration text."""
    nulls: Names = ["background"]
    """Null distributions to fit, separated by commas; `needed_by_loss` is bh_drop's, `needed` its
    part that needs no gradients."""
    max_tokens: Count = defaults.CALIBRATION_TOKENS
    """Tokens of text to use; no rule takes a calibration from fewer than 5,000."""


class PruneSpec(ModelSpec):
    """Settings of `prune`."""

    model: Annotated[str, Field(min_length=1), NO_OPTION]
    """`demo`, a folder with a checkpoint, or a Hugging Face id."""
    output: Path
    """New folder for the pruned checkpoint."""
    keep: Annotated[int, Field(ge=2)] | None = None
    """Experts that stay in each layer; give this or alpha."""
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    """False discovery rate at which Benjamini-Hochberg over all experts rejects "this expert
    matters to the text"; the layer with the fewest rejections decides how many stay in each."""
    score: Literal["reap", "fisher_mass", "frequency", "random"] = "fisher_mass"
    """Score by which each layer's experts stay: mean weight times output norm, estimated loss
    without the expert, tokens routed to it, or a random order."""
    calibration_texts: list[Source] = []
    """Text or JSONL file, or hf:NAME:SPLIT, to score the experts on; may be given several times.
    Default: the packaged calibration text."""
    max_tokens: Count = defaults.CALIBRATION_TOKENS
    """Tokens of text to use, spread over the documents."""

    @model_validator(mode="after")
    def _one_number(self) -> PruneSpec:
        if (self.keep is None) == (self.alpha is None):
            raise ValueError(
                "keep says how many experts stay in each layer, alpha lets a test decide; give one "
                f"of them, got keep={self.keep}, alpha={self.alpha}"
            )
        return self


class CalibratedSpec(ModelSpec):
    """A model with its calibration."""

    calibration: Path | None = None
    """File made by `bh-routing calibrate`. Default: calibrate if a rule needs it."""
    calibration_texts: list[Source] = []
    """Text or JSONL file, or hf:NAME:SPLIT, to calibrate on; may be given several times. Default:
    the packaged calibration text."""

    @model_validator(mode="after")
    def _one_calibration(self) -> CalibratedSpec:
        if self.calibration is not None and self.calibration_texts:
            raise ValueError("calibration and calibration_texts exclude each other; give one")
        return self


class ConfiguredSpec(CalibratedSpec):
    """A calibrated model under several configurations."""

    configs: Annotated[dict[str, dict[str, Any]], NO_OPTION] = Field(
        default_factory=lambda: dict(defaults.ROUTING_CONFIGS)
    )
    """Name -> configuration; standard ones adapt to the model's own k once that is known."""
    only: Annotated[list[str] | None, NO_OPTION] = None
    """Names of the configurations to run; None: all that the model can run."""
    budget: Annotated[float, Field(ge=1)] | None = None
    """Target mean experts per token of every rule but static top-k; its tuning parameter (alpha of
    bh) is found on the calibration text."""

    @model_validator(mode="after")
    def _any_configuration(self) -> ConfiguredSpec:
        if not self.configs or self.only == []:
            raise ValueError("no configuration is left to run; name at least one")
        return self


class ScoredSpec(CalibratedSpec):
    """A calibrated model that is scored on text, in this process or by workers."""

    texts: list[Source] = []
    """Text or JSONL file, or hf:NAME:SPLIT, to score; may be given several times. Default: the
    packaged evaluation text."""
    tokens: Count | None = None
    """Most tokens scored, spread over the documents. Default: all."""
    batch_size: Count | None = None
    """Windows scored per forward pass. Default: as many as memory bounds allow. Experiments and
    their times stay at batch size 1."""
    decode_batch: Count | None = None
    """Score in emulated decode steps of this many sequences, each of another document: position t
    of all of them is one step. Rules that decide by step need it. Default: no steps."""
    executor: Literal["local", "ray"] = "local"
    """local is this process; ray is workers, here or on a cluster (docs/scaling.md)."""
    ray_address: str | None = None
    """Ray cluster, such as auto or host:6379. Default: start Ray here."""
    workers: Count | None = None
    """Ray workers. Default: as many as there is room for."""

    @model_validator(mode="after")
    def _one_place(self) -> ScoredSpec:
        if self.executor != "ray" and (self.ray_address or self.workers):
            raise ValueError('ray_address and workers go with executor="ray"; add it')
        if self.executor == "ray" and self.device_map:
            raise ValueError(
                'device_map="auto" and executor="ray" exclude each other: a worker has one GPU; '
                "leave one of them out"
            )
        if self.executor == "ray" and importlib.util.find_spec("ray") is None:
            raise ValueError(
                'executor="ray" needs Ray, which isn\'t installed; run: pip install '
                "'bh-routing[ray]', or use executor=\"local\""
            )
        return self


class WindowedSpec(ScoredSpec):
    """A calibrated model that is scored in windows of a chosen length."""

    window: Count | None = None
    """Input tokens per forward pass. Default: the model's context, at most 1,024."""
    stride: Count | None = None
    """Scored tokens of each window after a document's first. Default: the window (disjoint)."""


class RunSpec(ConfiguredSpec, ScoredSpec):
    """Settings of `run`."""

    output: Path = Path("results")
    """Folder of the results."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = defaults.MAX_TOKENS
    """Most tokens generated per experiment."""
    checkpoint_interval: Count = 5
    """Finished experiments between two snapshots in checkpoints/."""
    resume: bool = True
    """Resume the folder's earlier run, or move it aside and start a new one."""
    prompts: Annotated[list[Prompt], NO_OPTION] = Field(
        default_factory=lambda: [Prompt(**prompt) for prompt in defaults.TEST_PROMPTS]
    )
    """Prompts; every configuration continues each."""
    chat_template: ChatTemplate = "auto"
    """Whether to apply the tokenizer's chat template to prompts, as user messages; auto: if it has
    one."""
    no_eval: bool = False
    """Skip the scoring of quality."""
    tokens: Count | None = 3_000
    """Most tokens scored, spread over the documents."""
    token_traces: Annotated[int, Field(ge=0)] = 12
    """Prompts of each configuration whose tokens report.html shows one by one; 0: none."""
    timing_rounds: Annotated[int, Field(ge=0)] = 8
    """Rounds of interleaved timing of all configurations; 0: none."""

    @model_validator(mode="after")
    def _distinct_prompts(self) -> RunSpec:
        if not self.prompts:
            raise ValueError("no prompt is left to run; give at least one")
        first_use: dict[str, int] = {}
        for number, prompt in enumerate(self.prompts, start=1):
            if prompt.text in first_use:
                raise ValueError(
                    f"prompt {number} repeats the text of prompt {first_use[prompt.text]} "
                    f"({shorten(prompt.text)!r}); remove one"
                )
            first_use[prompt.text] = number
        return self


class EvaluateSpec(ConfiguredSpec, WindowedSpec):
    """Settings of `evaluate`."""

    margin: Annotated[float, Field(gt=0)] | None = None
    """Non-inferiority margin in nats per token. Default: ln 1.01."""
    output: Path | None = None
    """Folder for quality.csv, quality.json and every document's record, with which a stopped
    evaluation resumes."""


class SweepSpec(WindowedSpec):
    """Settings of `sweep`."""

    output: Path
    """Folder of the results; the same command resumes."""
    cost: Literal["experts", "distinct"] = "experts"
    """Cost that is made equal: experts is the mean experts per token; distinct is the mean distinct
    experts per decode step, and needs decode_batch."""
    budgets: list[Annotated[float, Field(gt=0)]] = []
    """Mean experts per token to compare at; may be given several times. Default: 6, 5, 4 and 3 of a
    model that uses 8, and the same fractions of another k. With cost distinct: fractions of the
    distinct experts that the model's own top-k reads, by default 0.75 and 0.65."""
    rules: list[str] = [
        "bh",
        "bh_drop:statistic=sensitivity",
        "bh_drop:scope=block,statistic=sensitivity",
        "contribution_threshold:statistic=sensitivity",
        "top_p",
        "per_layer_top_k",
        "min_p",
        "entropy",
        "random_k",
    ]
    """Rule without its tuning parameter, such as bh_drop:scope=block; may be given several times.
    Static top-k is always there. contribution_threshold is population BH too: at equal cost both
    make the same decisions. With cost distinct, the default is eight rules for decode steps."""
    command: Annotated[str | None, NO_OPTION] = None
    """The command line, for readers of the results."""

    @model_validator(mode="after")
    def _steps_have_a_cost(self) -> SweepSpec:
        if (self.cost == "distinct") != (self.decode_batch is not None):
            raise ValueError(DISTINCT_NEEDS_STEPS)
        return self


class LmEvalSpec(ConfiguredSpec):
    """Settings of `lm-eval`."""

    tasks: Names = list(defaults.LOCAL_TASKS)
    """Tasks, groups or tags of lm-eval, or YAML files, separated by commas."""
    include_paths: list[Path] = []
    """Folder with further tasks; may be given several times."""
    limit: Count | None = None
    """Items of each task, from its first. Default: all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in each prompt. Default: the task's own."""
    batch_size: Count = 8
    """Requests per forward pass."""
    chat_template: ChatTemplate = "auto"
    """Whether to apply the tokenizer's chat template to contexts, as user messages; auto: if it has
    one."""
    output: Path | None = None
    """Folder for every item's outcome and the comparisons."""


SpecT = TypeVar("SpecT", bound=ModelSpec)


def make_spec(kind: type[SpecT], **values: Any) -> SpecT:
    """Build a spec; its rules are checked where they are made.

    Args:
        kind: the class of the spec.
        values: its fields; missing ones take their defaults.
    Raises:
        InputError: a value is invalid; the error describes it in one sentence.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(describe_error(error, kind, {"prompts": Prompt})) from None
