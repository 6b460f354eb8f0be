"""What every family must do under `route`: one function a claim, on a tiny model.

A check returns nothing, or raises: AssertionError where the claim is wrong, an InputError of the
package where the family is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from bh_routing.errors import InputError, ModelError
from bh_routing.models import find_routers, route
from bh_routing.rules import BenjaminiHochberg, TopK, TopP
from bh_routing.rules.base import Rule
from tests.families.zoo import VOCABULARY, tiny_model

IMPLEMENTATIONS: Final = ("eager", "batched_mm", "grouped_mm")
_PROMPT: Final = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
_NEW_TOKENS: Final = 3
_BH: Final = 0.3
_TOP_P: Final = 0.53


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A tiny model under test; a check leaves it as it found it."""

    model: Any
    with_top_k: Callable[[int], Any]
    """Builds the same model with another number of experts a token in its configuration."""
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    """The implementations of the experts to try, where the family can be switched."""

    @property
    def top_k(self) -> int:
        """The model's own number of experts a token."""
        return find_routers(self.model).model_top_k

    def each_implementation(self, *, but: str = "") -> Iterator[str]:
        """Switch the experts to one implementation after the other, and back at the end."""
        model = self.model
        if not model._can_set_experts_implementation():
            yield "own"
            return
        before = model.config._experts_implementation
        try:
            for name in self.implementations:
                if name != but:
                    model.set_experts_implementation(name)
                    yield name
        finally:
            model.set_experts_implementation(before)


Check = Callable[[Subject], None]


@cache
def family_subject(
    name: str,
    dtype: torch.dtype = torch.float32,
    implementations: tuple[str, ...] = IMPLEMENTATIONS,
) -> Subject:
    """Return the subject of a family of `zoo.family_names`; built once in a process."""
    return Subject(
        model=_family_model(name, dtype),
        with_top_k=lambda top_k: tiny_model(name, dtype, top_k),
        implementations=implementations,
    )


@cache
def _family_model(name: str, dtype: torch.dtype) -> Any:
    return tiny_model(name, dtype)


@torch.no_grad()
def prefill(model: Any) -> Tensor:
    """Return the logits of the prompt, or the last hidden state of a model without a head."""
    return _values(model(input_ids=_PROMPT, use_cache=False))


@torch.no_grad()
def generate(model: Any) -> Tensor:
    """Return the logits of a few tokens after the prompt, generated with a cache."""
    if model.can_generate():
        output = model.generate(
            input_ids=_PROMPT,
            attention_mask=torch.ones_like(_PROMPT),
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits)
    output = model(input_ids=_PROMPT, use_cache=True)
    values = [_values(output)[:, -1]]
    while (past := getattr(output, "past_key_values", None)) and len(values) < _NEW_TOKENS:
        output = model(input_ids=_PROMPT[:, :1], past_key_values=past, use_cache=True)
        values.append(_values(output)[:, -1])
    return torch.stack(values)


def _values(output: Any) -> Tensor:
    values: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return values


def keeping_everything_changes_nothing(subject: Subject) -> None:
    """Keeping all slots gives the untouched model's bits, and so does leaving the block."""
    model, everything = subject.model, TopK(subject.top_k)
    for implementation in subject.each_implementation():
        plain = prefill(model), generate(model)
        with route(model, everything) as trace:
            kept = prefill(model), generate(model)
        after = prefill(model), generate(model)
        assert trace.expert_counts.numel() > 0, "nothing was routed"
        for name, expected, routed, left in zip(
            ("prefill", "generation"), plain, kept, after, strict=True
        ):
            assert expected.isfinite().all(), f"{implementation}: {name} isn't finite"
            assert torch.equal(routed, expected), f"{implementation}: {name} differs inside"
            assert torch.equal(left, expected), f"{implementation}: {name} differs afterwards"


def a_second_route_is_refused(subject: Subject) -> None:
    """A model inside `route` can't be routed again, and stays routed as it was."""
    rule = TopK(1)
    with route(subject.model, rule) as trace:
        pruned = prefill(subject.model)
        _assert_refused(subject, rule, ModelError)
        assert torch.equal(prefill(subject.model), pruned)
    assert trace.expert_counts.unique().tolist() == [1]


def pruning_equals_the_familys_own_smaller_top_k(subject: Subject) -> None:
    """Keeping the best j of k slots is what the family itself computes with top-k set to j."""
    j = max(subject.top_k - 2, 1)
    own = subject.with_top_k(j)
    with route(subject.model, TopK(j)) as trace:
        pruned = prefill(subject.model)
    assert trace.expert_counts.unique().tolist() == [j]
    assert not torch.allclose(pruned, prefill(subject.model), atol=1e-3), "pruning did nothing"
    torch.testing.assert_close(pruned, prefill(own), rtol=1e-5, atol=1e-5)


def preserving_the_mass_is_the_convention_of_a_family_that_normalises(subject: Subject) -> None:
    """Where the weights' sum is a constant, shared experts or gains included, so it stays."""
    if not find_routers(subject.model).sites[0].facts.normalises:
        return
    logits = []
    for weights in ("model", "preserve_mass"):
        with route(subject.model, TopK(max(subject.top_k - 2, 1), weights=weights)):
            logits.append(prefill(subject.model))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def counts_vary_by_token(subject: Subject) -> None:
    """Benjamini-Hochberg and top-p keep more experts of some tokens than of others."""
    for rule in _varying_rules(subject):
        with route(subject.model, rule) as trace:
            prefill(subject.model)
        counts = trace.expert_counts
        assert 1 <= counts.min() < counts.max() <= subject.top_k, f"{rule}: {counts.unique()}"


def _varying_rules(subject: Subject) -> tuple[Rule, ...]:
    return (
        BenjaminiHochberg(alpha=_BH, max_k=subject.top_k, null="gaussian"),
        TopP(_TOP_P),
    )


def dropped_experts_are_never_read(subject: Subject) -> None:
    """NaN in every expert that no token kept changes nothing."""
    model = subject.model
    for implementation in subject.each_implementation():
        with route(model, TopK(1)) as trace:
            clean = prefill(model)
        with _poisoned(model, trace.utilization), route(model, TopK(1)):
            poisoned = prefill(model)
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned), f"{implementation}: a dropped expert was read"


@contextmanager
def _poisoned(model: Any, utilization_LE: Tensor) -> Iterator[None]:
    saved = []
    for site, used_E in zip(find_routers(model).sites, utilization_LE, strict=True):
        unused_E = used_E == 0
        assert unused_E.any(), f"{site.name}: every expert was used"
        for parameter in site.experts.parameters():
            if parameter.ndim < 2:
                continue  # a norm that all experts share
            saved.append((parameter, parameter.detach().clone()))
            # A row an expert, or as many as divide its experts; identity experts have none.
            num_experts = min(len(parameter), len(unused_E))
            rows_EX = parameter.data.view(num_experts, -1)
            rows_EX[unused_E[:num_experts]] = float("nan")
    try:
        yield
    finally:
        for parameter, values in saved:
            parameter.data.copy_(values)


def widening_adds_to_the_models_own(subject: Subject) -> None:
    """With more slots than the model's own, its own are among them, up to the family's limit."""
    model, k = subject.model, subject.top_k
    limit = _group_limit(model) or find_routers(model).num_experts
    kept = {}
    for number in (k, k + 2, limit):
        with route(model, TopK(number)) as trace:
            assert prefill(model).isfinite().all()
        assert trace.expert_counts.unique().tolist() == [number]
        # Only the first layer sees the same hidden states in all runs.
        kept[number] = [set(row) for row in trace.kept_index[:, 0].tolist()]
    for own, wide, widest in zip(*kept.values(), strict=True):
        assert own < wide <= widest, f"{own} isn't within {wide} within {widest}"
    _assert_refused(subject, TopK(limit + 1), InputError)


def _group_limit(model: Any) -> int | None:
    """The most experts of a router that looks only into the best of its groups, or None."""
    routers = find_routers(model)
    for site in routers.sites:
        places: tuple[Any, ...] = (site.module, site.block)
        for module in places:
            groups = getattr(module, "n_group", None) or getattr(module, "num_group", None) or 1
            if groups > 1:
                return int(module.topk_group) * (routers.num_experts // groups)
    return None


def _assert_refused(subject: Subject, rule: Rule, error: type[Exception]) -> None:
    try:
        with route(subject.model, rule):
            pass
    except error:
        return
    raise AssertionError(f"{rule} was not refused")


def compiled_prefill_counts_alike(subject: Subject) -> None:
    """A model compiled as one graph inside `route` keeps what the eager one keeps."""
    _compare_compiled(subject, backend="eager")


def inductor_prefill_counts_alike(subject: Subject) -> None:
    """The same through inductor, up to rounding."""
    _compare_compiled(subject, backend="inductor")


def _compare_compiled(subject: Subject, backend: str) -> None:
    model, rule = subject.model, TopP(_TOP_P)
    # The loop over experts depends on data: transformers itself can't compile it.
    for _ in subject.each_implementation(but="eager"):
        with route(model, rule) as eager_trace:
            eager = prefill(model)
        with _compiled(model, backend) as compiled, route(model, rule) as trace:
            values = prefill(compiled)
        torch.testing.assert_close(values, eager, rtol=1e-4, atol=1e-4)
        assert torch.equal(trace.kept_index, eager_trace.kept_index)


@contextmanager
def _compiled(model: Any, backend: str) -> Iterator[Any]:
    torch.compiler.reset()
    try:
        yield torch.compile(model, fullgraph=True, backend=backend)
    finally:
        torch.compiler.reset()


def a_rule_after_compilation_is_never_ignored(subject: Subject) -> None:
    """Routing a model that was compiled before works, or is refused."""
    model, rule = subject.model, TopK(1)
    for _ in subject.each_implementation(but="eager"):
        with route(model, rule):
            eager = prefill(model)
        with _compiled(model, "eager") as compiled:
            plain = prefill(compiled)
            try:
                with route(model, rule) as trace:
                    values = prefill(compiled)
            except ModelError:
                continue
            after = prefill(compiled)
        torch.testing.assert_close(values, eager, rtol=1e-4, atol=1e-4)
        assert trace.expert_counts.unique().tolist() == [1]
        assert torch.equal(plain, after)


CHECKS: Final[tuple[Check, ...]] = (
    keeping_everything_changes_nothing,
    a_second_route_is_refused,
    pruning_equals_the_familys_own_smaller_top_k,
    preserving_the_mass_is_the_convention_of_a_family_that_normalises,
    counts_vary_by_token,
    dropped_experts_are_never_read,
    widening_adds_to_the_models_own,
    compiled_prefill_counts_alike,
    a_rule_after_compilation_is_never_ignored,
)
