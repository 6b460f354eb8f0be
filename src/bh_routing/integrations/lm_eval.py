"""lm-evaluation-harness under a routing rule, as a model named `bh_routing`.

    import lm_eval
    import bh_routing.integrations.lm_eval

    arguments = {"pretrained": "demo", "method": "bh", "alpha": 0.05}
    lm_eval.simple_evaluate("bh_routing", arguments, tasks=[...])

lm-eval's own Hugging Face model makes requests, batches and scores; only the forward passes run
inside `route`. Scores of the model's own top-k are therefore unchanged.

The package has three small tasks that need no network; `tools/make_lm_eval_tasks.py` makes their
data from the demo's held-out evaluation text.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.errors import InputError
from bh_routing.kernels.router import fused_router
from bh_routing.models.load import LoadedModel, load_model
from bh_routing.models.routers import model_fingerprint
from bh_routing.models.routing import bind_rule, install
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule, rule_to_config

CLOZE_FILE = "cloze.jsonl"
CHOICE_FILE = "choice.jsonl"
ROLLING_FILE = "rolling.jsonl"


def task_folder() -> Path:
    """Return the folder of the packaged tasks, for lm-eval's include path."""
    return Path(__file__).parent / "tasks"


def read_items(*, file: str, **_: object) -> dict[str, datasets.Dataset]:
    """Read one file of items; the tasks' YAML files name this function as their data set.

    lm-eval's own `data_files` are relative to the working directory, so an installed package can't
    name its files there. The data set stays in memory, outside the data-set cache.

    Args:
        file: the name of a file in `task_folder()`.
        _: ignored; lm-eval passes the task's metadata and the model's arguments.
    Returns:
        The items, as the split `test`.
    """
    lines = (task_folder() / file).read_text("utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """Experts kept over units, the pairs of token and layer, without padding."""

    tokens: int = 0
    """Tokens of all forward passes; lm-eval reads a shared context once per choice."""
    units: int = 0
    experts_sum: int = 0

    @property
    def mean_experts(self) -> float:
        """Experts per token and layer; NaN if nothing was run."""
        return self.experts_sum / self.units if self.units else float("nan")


@register_model("bh_routing")
class RoutedModel(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """lm-eval's Hugging Face model, with all forward passes under one rule."""

    def __init__(
        self,
        pretrained: str | LoadedModel = "demo",
        *,
        rule: Rule | None = None,
        calibration: str | Path | Calibration | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        # lm-eval passes model arguments as keywords; the rule's own are in the catalog.
        **config: Any,
    ) -> None:
        """Load the model, bind the rule and hand both to lm-eval.

        Args:
            pretrained: `demo`, a folder, a Hugging Face id, or a loaded model.
            rule: the rule, as an alternative to `config`.
            calibration: a calibration or its file; None: calibrate on the packaged text if the
                rule needs it.
            device: auto, cuda or cpu.
            dtype: auto, bfloat16, float16 or float32.
            batch_size: as in lm-eval.
            max_batch_size: as in lm-eval.
            max_length: longest input in tokens; None: the model's own.
            add_bos_token: as in lm-eval.
            prefix_token_id: as in lm-eval.
            config: a configuration of the rule, such as `method="bh", alpha=0.05`.
        Raises:
            InputError: model, rule or calibration can't be loaded, or don't fit each other.
        """
        if rule is not None and config:
            raise InputError(f"give a rule or its keys, not both; got both, with {sorted(config)}")
        rule = make_rule(config) if rule is None else rule
        if isinstance(pretrained, str):
            pretrained = load_model(pretrained, device=device or "auto", dtype=dtype)  # type: ignore[arg-type]  # checked there
        check_end_token(pretrained.tokenizer)
        calibration = find_calibration(pretrained, rule, calibration)
        with _without_hints():
            super().__init__(
                pretrained=pretrained.model,
                # A copy: lm-eval sets a padding token.
                tokenizer=copy.deepcopy(pretrained.tokenizer),
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                max_length=max_length,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
            )
        self._bound = bind_rule(self.model, rule, calibration, fused_router)
        self._calibration = calibration
        self._unread_rows: list[Tensor] = []
        self.expert_use = ExpertUse()
        """Since the construction of the model; assign a new `ExpertUse` to reset it."""

    def get_model_info(self) -> dict[str, Any]:
        """Return lm-eval's record of the model, with the rule and its use in `bh_routing`."""
        calibration = self._calibration
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": "",
            "model_sha": "",
            "bh_routing": {
                "rule": rule_to_config(self._bound.rule),
                "model_fingerprint": model_fingerprint(self.model),
                "calibration_fingerprint": calibration.fingerprint if calibration else None,
                "mean_experts": self.expert_use.mean_experts,
                "tokens": self.expert_use.tokens,
            },
        }

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        with install(self.model, self._bound) as trace, self._with_mask(inps) as lengths:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
        # Padding is known only when lm-eval splits the rows, with one call per row.
        self._unread_rows = list(trace.expert_counts.split(lengths))
        return logits

    @contextmanager
    def _with_mask(self, inps: Tensor) -> Iterator[list[int]]:
        """Pass the model an attention mask if the rule decides on several tokens jointly.

        lm-eval pads on the right with zeros, without a mask. Zeros at the end of a sequence count
        as padding too, at any batch size. Yields each row's number of tokens in the trace.
        """
        if self._bound.rule.unit == "token":
            yield [inps.shape[1]] * len(inps)
            return
        mask = (inps != 0).flip(-1).cumsum(-1).flip(-1).clamp_max(1)

        def add_mask(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        hook = self.model.register_forward_pre_hook(add_mask, with_kwargs=True)
        try:
            yield mask.sum(-1).tolist()
        finally:
            hook.remove()

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        counts_SL = self._unread_rows.pop(0)
        self._count(counts_SL[:inplen])
        selected: Tensor = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        return selected

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        with install(self.model, self._bound) as trace:
            output: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask = generation_kwargs.get("attention_mask")
        real_BS = torch.ones_like(context) if mask is None else mask
        self._count_generation(trace, real_BS.bool().cpu(), output[:, context.shape[1] :].cpu())
        return output

    def _count_generation(self, trace: ExpertTrace, real_BS: Tensor, generated_BN: Tensor) -> None:
        """Count the prompts, and each row's fed-back tokens until its end-of-text token.

        A row that has met its stop string continues until the last row of the batch has; its tokens
        count, since they are run.
        """
        is_fed_BN = ~torch.isin(generated_BN, self._end_tokens()).cumsum(1).bool()
        # The trace is ordered by step: the prompts without padding, then one token per row.
        is_real = torch.cat([real_BS[real_BS], is_fed_BN[:, :-1].T.flatten()])
        if len(is_real) != sum(trace.forward_tokens):
            raise InputError(
                "experts can't be counted in a generation of several beams or sequences a prompt; "
                "set num_beams and num_return_sequences to 1"
            )
        self._count(trace.expert_counts[is_real])

    def _end_tokens(self) -> Tensor:
        end = self.model.generation_config.eos_token_id
        ids = [self.eot_token_id, *(end if isinstance(end, list) else [end])]
        return torch.tensor([token for token in ids if token is not None])

    def _count(self, counts_TL: Tensor) -> None:
        use = self.expert_use
        self.expert_use = ExpertUse(
            tokens=use.tokens + len(counts_TL),
            units=use.units + counts_TL.numel(),
            experts_sum=use.experts_sum + int(counts_TL.sum()),
        )


def check_end_token(tokenizer: Any) -> None:
    """Raise InputError if the tokenizer lacks the token with which lm-eval pads and ends texts."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-text token, by which lm-eval pads and ends texts; set "
            "eos_token in the model's tokenizer_config.json, or tokenizer.eos_token"
        )


@contextmanager
def _without_hints() -> Iterator[None]:
    """Suppress two warnings about loaded models and `accelerate`."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("`pretrained` model kwarg", "Passed an already"))

    logger = logging.getLogger(HFLM.__module__)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def find_calibration(
    loaded: LoadedModel, rule: Rule, given: str | Path | Calibration | None
) -> Calibration | None:
    """Return the calibration that `rule` needs; None if it needs none.

    Args:
        loaded: the model.
        rule: the rule.
        given: a calibration or its file; None: fit one on the packaged text.
    Raises:
        CalibrationError: the file can't be read.
    """
    if rule.required_null is None:
        return None
    if given is None:
        texts = packaged_documents("calibration")
        return calibrate(loaded.model, loaded.tokenizer, texts, rules=[rule])
    return given if isinstance(given, Calibration) else Calibration.load(Path(given))
