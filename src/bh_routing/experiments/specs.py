"""Specs of runs: typed data, validated before any work starts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from bh_routing.errors import InputError, unknown_name
from bh_routing.experiments import defaults
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import get_rule, make_rule, rule_to_config
from bh_routing.rules.fixed import TopK

_SHOWN = 60


def describe_error(
    error: ValidationError,
    model: type[BaseModel],
    items: Mapping[str, type[BaseModel]] | None = None,
) -> str:
    """Describe the most informative of pydantic's errors in one sentence.

    Args:
        error: pydantic's exception.
        model: the validated model.
        items: field -> model of its items, for fields that are lists of models.
    """
    found = error.errors(include_url=False)
    # A misspelt key is unknown and leaves another one missing: the former explains both.
    detail = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    location = list(detail["loc"])
    owner = model
    where = ""
    if len(location) >= 2 and isinstance(location[1], int):
        owner = (items or {}).get(str(location[0]), model)
        where = f"{str(location[0]).removesuffix('s')} {location[1] + 1}"
        location = location[2:]
    field = ".".join(str(part) for part in location)
    known = list(owner.model_fields)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        return (
            f"{where or 'the run'} has an unknown key {field!r}; known: {', '.join(known)}; {hint}"
        )
    if detail["type"] == "missing":
        return f"{where or 'the run'} has no {field!r}; add it"
    subject = " ".join(part for part in (where, field) if part)
    return f"{subject}: {_message(detail)}" if subject else _message(detail)


def _message(detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    message = detail["msg"].removeprefix("Input should be ")
    shown = repr(detail["input"])
    shown = shorten(shown)
    return f"must be {message}, got {shown}; change it"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+@-]{0,63}")


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


class NamedRule(NamedTuple):
    """A configuration with validated fields."""

    name: str
    description: str
    rule: Rule


class RunSpec(BaseModel):
    """All settings of a run; build it with `make_spec`, which explains errors in one sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)] = defaults.MODEL
    """`demo`, a folder with a checkpoint, or a Hugging Face id."""
    output: Path = Path(defaults.OUTPUT)
    """Folder of the results."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = defaults.MAX_TOKENS
    """Maximum number of tokens generated per experiment."""
    checkpoint_interval: Annotated[int, Field(ge=1)] = defaults.CHECKPOINT_INTERVAL
    """Finished experiments between two snapshots in checkpoints/."""
    resume: bool = True
    """Resume the folder's run; otherwise move it aside first."""
    device: Literal["auto", "cuda", "cpu"] = defaults.DEVICE
    """Device of the model; auto is CUDA if available."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = defaults.DTYPE
    """Data type of the parameters; auto is bfloat16 on CUDA and float32 on CPU."""
    configs: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: dict(defaults.ROUTING_CONFIGS)
    )
    """Name -> configuration; standard ones adapt to the model's own k once that is known."""
    only: list[str] | None = None
    """Names of the configurations to run; None: all that the model can run."""
    prompts: list[Prompt] = Field(
        default_factory=lambda: [Prompt(**prompt) for prompt in defaults.TEST_PROMPTS]
    )
    """Prompts; every configuration continues each."""
    budget: Annotated[float, Field(ge=1)] | None = None
    """Target mean experts per token of every rule but static top-k; None: as configured."""
    calibration: Path | None = None
    """File saved by `bh-routing calibrate`; None: calibrate if a rule needs it."""
    calibration_text: Path | None = None
    """Text to calibrate on; None: the packaged text."""
    chat_template: Literal["auto", "on", "off"] = defaults.CHAT_TEMPLATE
    """Whether to apply the tokenizer's chat template to prompts; auto: if it has one."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = defaults.SEED
    """Seed of all random draws; greedy generation makes none."""
    executor: Literal["local", "ray"] = defaults.EXECUTOR
    """Where experiments run and text is scored: in this process, or on Ray workers."""
    ray_address: str | None = None
    """Address of a Ray cluster, such as auto or host:6379; None: start Ray on this machine."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Number of Ray workers; None: as many as there is room for."""
    device_map: Literal["auto"] | None = None
    """Spread the model's layers over all GPUs; None: use one device."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Windows of text scored per forward pass; None: as many as memory bounds allow."""
    eval_text: Path | None = None
    """Text that quality is scored on; None: the packaged text."""
    no_eval: bool = False
    """Skip the scoring of quality."""
    eval_tokens: Annotated[int, Field(ge=1)] = defaults.EVAL_TOKENS
    """Maximum number of scored tokens."""
    token_traces: Annotated[int, Field(ge=0)] = defaults.TOKEN_TRACES
    """Prompts of each configuration whose tokens are traced for report.html; 0: none."""
    timing_rounds: Annotated[int, Field(ge=0)] = defaults.TIMING_ROUNDS
    """Rounds of interleaved timing of all configurations; 0: none."""

    @model_validator(mode="after")
    def _whole(self) -> RunSpec:
        if not self.configs or self.only == []:
            raise ValueError("no configuration is left to run; name at least one")
        if not self.prompts:
            raise ValueError("no prompt is left to run; give at least one")
        if self.calibration is not None and self.calibration_text is not None:
            raise ValueError("calibration and calibration_text exclude each other; give one")
        if self.executor != "ray" and (self.ray_address or self.workers):
            raise ValueError("ray_address and workers go with executor ray; add --executor ray")
        if self.executor == "ray" and self.device_map:
            raise ValueError(
                "device_map and executor ray exclude each other: a worker's model is on one GPU; "
                "leave one of them out"
            )
        first_use: dict[str, int] = {}
        for number, prompt in enumerate(self.prompts, start=1):
            if prompt.text in first_use:
                raise ValueError(
                    f"prompt {number} repeats the text of prompt {first_use[prompt.text]} "
                    f"({shorten(prompt.text)!r}); remove one"
                )
            first_use[prompt.text] = number
        return self


def make_spec(**values: Any) -> RunSpec:
    """Build a RunSpec.

    Args:
        values: fields of `RunSpec`; missing ones take their defaults.
    Raises:
        InputError: a value is invalid; the error describes it in one sentence.
    """
    try:
        spec = RunSpec(**values)
    except ValidationError as error:
        raise InputError(describe_error(error, RunSpec, {"prompts": Prompt})) from None
    make_rules(spec.configs, spec.budget)
    return spec


def make_rules(
    configs: Mapping[str, Mapping[str, Any]], budget: float | None = None
) -> list[NamedRule]:
    """Make a rule per configuration, in order.

    Args:
        configs: name -> configuration.
        budget: with a budget, a configuration may lack its rule's tuning parameter.
    Raises:
        InputError: a name or a field is invalid; the message starts with the configuration.
    """
    return [_make_rule(name, config, budget is not None) for name, config in configs.items()]


def _make_rule(name: str, config: Mapping[str, Any], may_lack_knob: bool) -> NamedRule:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"configuration name {shorten(str(name))!r} must be 1 to 64 letters, digits, or "
            "_ . + @ - and start with a letter or digit; rename it"
        )
    fields = dict(config)
    description = fields.pop("description", "")
    if not isinstance(description, str):
        raise InputError(
            f"configuration {name!r}: description must be a text, got {description!r}; quote it"
        )
    if "method" not in fields:
        raise InputError(f"configuration {name!r} has no method; add for example method: bh")
    try:
        return NamedRule(name, description, make_rule(_placeholder(fields, may_lack_knob) | fields))
    except InputError as error:
        raise InputError(f"configuration {name!r}: {error}") from error


def _placeholder(fields: Mapping[str, Any], may_lack_knob: bool) -> dict[str, Any]:
    knob = get_rule(fields).knob if may_lack_knob else None
    if knob is None or knob is TopK.knob:
        return {}
    return knob.fields(knob.scale.value_at(sum(knob.scale.ends(model_top_k=1)) / 2), num_layers=1)


def find_baseline(rules: Sequence[NamedRule], model_top_k: int) -> str | None:
    """Return the name of the baseline that other configurations are compared with.

    It is the model's own top-k, or else the first static top-k; None without either.
    """
    static = [named for named in rules if isinstance(named.rule, TopK)]
    own = [named for named in static if named.rule == TopK(model_top_k)]
    return next((named.name for named in [*own, *static]), None)


def resolved(spec: RunSpec, rules: Sequence[NamedRule]) -> dict[str, Any]:
    """Return the spec as plain JSON data, with all fields of each rule."""
    content = spec.model_dump(mode="json")
    content["configs"] = {
        named.name: {**rule_to_config(named.rule), "description": named.description}
        for named in rules
    }
    return content


def select_prompts(
    prompts: Sequence[Mapping[str, Any]], items: Iterable[str] | None
) -> list[dict[str, Any]]:
    """Select the prompts that `items` name, in the order of `prompts`; None selects all.

    Args:
        prompts: mappings with a `category`.
        items: each is a number (the first prompt is 1), a range such as 2-4, or a category.
    Raises:
        InputError: a number is out of range, or a name isn't a category.
    Example:
        >>> prompts = [{"text": t, "category": c} for t, c in ["ax", "by", "cx"]]
        >>> [p["text"] for p in select_prompts(prompts, ["1", "y"])]
        ['a', 'b']
    """
    if items is None:
        return [dict(prompt) for prompt in prompts]
    kept: set[int] = set()
    for item in items:
        kept.update(_prompt_numbers(prompts, item))
    return [dict(prompt) for number, prompt in enumerate(prompts, start=1) if number in kept]


def _prompt_numbers(prompts: Sequence[Mapping[str, Any]], item: str) -> list[int]:
    """Return the prompt numbers, from 1, that one item of `--prompts` denotes."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item)
    if match:
        first = int(match[1])
        last = int(match[2] or first)
        if not 1 <= first <= last <= len(prompts):
            raise InputError(
                f"prompt numbers run from 1 to {len(prompts)}, got {item}; for example 1,3-5"
            )
        return list(range(first, last + 1))
    categories = [str(prompt.get("category", "custom")) for prompt in prompts]
    if item not in categories:
        raise unknown_name("category of prompts", item, dict.fromkeys(categories))
    return [number for number, name in enumerate(categories, start=1) if name == item]


def shorten(text: str) -> str:
    """Truncate a text for a message."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
