"""Whatever a file or an option holds, it is taken, or refused by an error of our own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bh_routing.analysis.quality_row import read_quality
from bh_routing.analysis.results import load_results
from bh_routing.engine.texts import read_documents
from bh_routing.errors import BHRoutingError
from bh_routing.experiments import quality
from bh_routing.experiments.configurations import (
    add_config_file,
    make_rules,
    parse_rule,
    select_prompts,
)
from bh_routing.experiments.preparation import check_prompts
from bh_routing.experiments.quality import QualityLedger
from bh_routing.experiments.quality_text import QualityText
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.experiments.store import ResultStore
from bh_routing.experiments.token_traces import pack
from bh_routing.models.load import LoadedModel
from bh_routing.models.routers import describe_model
from bh_routing.nulls import Calibration, ReferenceTable
from bh_routing.report.charts.calibration import read_null_samples
from bh_routing.report.traces import read_traces
from bh_routing.results.records import (
    CHECKPOINT,
    JOURNAL,
    QUALITY_JOURNAL,
    RESULTS_CSV,
    RUN_JSON,
    TOKEN_TRACES,
    TokenTrace,
    line_checksum,
)
from tests.analysis.scored import scored_documents
from tests.experiments.chaos_driver import read_files
from tests.experiments.test_store import IDENTITY, PLAN, fill
from tests.nulls.test_calibration import make as make_calibration
from tests.rules.proposals import made_up_contributions

Files = dict[str, bytes]
Target = tuple[Callable[..., Any], tuple[Any, ...], Any]
"""What is checked, arguments that it takes, and a strategy for others."""
Mutation = tuple[Any, ...]

YAML: Final = b"""configs:
  mine: {method: bh, alpha: 0.03, max_k: 10, description: "ten at most"}
prompts:
  - {text: "Once upon a time", category: mine, description: "a tale"}
"""
WORDS: Final = (
    "configs|prompts|text|method|bh|alpha|a|0.1|1e400|-|:|{|}|[|]|,|&a |*a|!!bool |!!timestamp |"
    "!!int |!!python/object:os.system |<<|? |>|'|\"|#|%|2020-01-01|~|---\n|...\n|0x_|1:60|=|!!set |"
    "!!binary |.inf| |\n|\n  |\t|- |: |\u2028"
)
YAML_WORDS: Final = st.sampled_from(WORDS.split("|"))
JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
NOTHING: Final = ("none",)
PLACE: Final = st.floats(0, 1, exclude_max=True)
MUTATION: Final = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("whole"), st.binary(max_size=40)),
    st.tuples(st.just("nested"), st.sampled_from([b"[", b'{"a":'])),
    st.tuples(st.just("value"), PLACE, st.lists(st.integers(0, 30), max_size=5), JSON),
)


def mutate(content: bytes, mutation: Mutation, seed: str | None = None) -> bytes:
    """Damage bytes, or put another value somewhere into the JSON that they are."""
    kind, *values = mutation
    if kind == "none":
        return content
    if kind == "whole":
        return bytes(values[0])
    if kind == "nested":
        return bytes(values[0]) * 2_000
    at = int(values[0] * len(content))
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + bytes(values[1]) + content[at:]
    if kind == "flip" and content:
        return content[:at] + bytes([content[at] ^ 1 << values[1]]) + content[at + 1 :]
    if kind == "value":
        with suppress(ValueError):
            return put_value(content, *values, seed=seed)
    return content


def put_value(
    content: bytes, place: float, path: list[int], value: Any, *, seed: str | None
) -> bytes:
    """Replace a value in a JSON document, or in a line of several, whose checksums then fit."""
    lines = [json.loads(line) for line in content.splitlines()] if seed else [json.loads(content)]
    number = int(place * len(lines))
    lines[number] = replaced(lines[number], path, value)
    previous = seed or ""
    for line in lines:
        if seed and isinstance(line, dict) and line.pop("checksum", None) is not None:
            with suppress(ValueError):
                previous = line_checksum(previous, json.loads(json.dumps(line)))
            line["checksum"] = previous
    ends = "\n" if seed else ""
    return "".join(json.dumps(line) + ends for line in lines).encode()


def replaced(value: Any, path: list[int], new: Any) -> Any:
    """Return JSON data with another value at the end of a path of positions."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copy = value.copy()
    copy[key] = replaced(value[key], path[1:], new)
    return copy


def mutate_calibration(content: bytes, mutation: Mutation) -> bytes:
    """Damage a safetensors file; values are put into its header, and into the facts in there."""
    if mutation[0] != "value":
        return mutate(content, mutation)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    _, place, path, value = mutation
    if place < 0.5:
        facts = json.loads(header["__metadata__"]["facts"])
        header["__metadata__"]["facts"] = json.dumps(replaced(facts, path, value))
    else:
        header = replaced(header, path, value)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def put(folder: Path, files: Files) -> None:
    """Make a folder hold these files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: an fsync costs nothing there."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def yaml_target(folder: Path, demo: LoadedModel) -> Target:
    path = folder / "mine.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        configs, prompts = add_config_file(path, {}, [])
        make_rules(make_spec(RunSpec, configs=configs, prompts=prompts).configs)

    soup = st.lists(YAML_WORDS, max_size=25).map("".join)
    texts = st.one_of(soup, JSON.map(yaml.safe_dump), st.text(max_size=60))
    shaped = st.dictionaries(st.sampled_from(["configs", "prompts", "x"]), JSON).map(yaml.safe_dump)
    whole = st.one_of(texts, shaped).map(lambda text: text.encode(errors="surrogatepass"))
    damaged = MUTATION.map(lambda mutation: mutate(YAML, mutation)[:600])
    return check, (YAML,), st.tuples(whole | damaged)


def run_target(folder: Path, demo: LoadedModel) -> Target:
    results = folder / "run"
    fill(results, range(3))
    good = read_files(results)
    names = st.sampled_from([RUN_JSON, JOURNAL, RESULTS_CSV, CHECKPOINT])

    def check(name: str, mutation: Mutation) -> None:
        seed = IDENTITY.journal_seed() if name == JOURNAL else None
        put(results, good | {name: mutate(good[name], mutation, seed)})
        with suppress(BHRoutingError):
            load_results(results)
        with ResultStore(results, resume=True, checkpoint_interval=2) as store:
            store.begin(IDENTITY, {}, PLAN)

    return check, (RUN_JSON, NOTHING), st.tuples(names, MUTATION)


def quality_target(folder: Path, demo: LoadedModel) -> Target:
    results = folder / "quality"
    results.mkdir()
    text = QualityText(documents=(), sha256="0", max_tokens=None, window=8, stride=8)
    with QualityLedger(results, text, IDENTITY) as ledger:
        for record in scored_documents("bh", documents=3):
            ledger.add(f"key {record.document}", record)
        seed = quality._SEED
    path = results / QUALITY_JOURNAL
    good = path.read_bytes()

    def check(mutation: Mutation) -> None:
        path.write_bytes(mutate(good, mutation, seed))
        with suppress(BHRoutingError):
            read_quality(path)
        QualityLedger.resume(results, text, IDENTITY)

    return check, (NOTHING,), st.tuples(MUTATION)


def traces_target(folder: Path, demo: LoadedModel) -> Target:
    results = folder / "traces"
    results.mkdir()
    slots = np.zeros((2, 1, 2), dtype=int)
    planes = pack(slots, slots == 0, slots.astype(float), slots + 0.5)
    trace = TokenTrace(
        key="k", config_name="bh", prompt_text="a b", tokens=["a", "b"], num_prompt_tokens=2,
        layers=1, slots=2, model_top_k=2, planes=planes,
    )  # fmt: skip
    good = f"{json.dumps(asdict(trace))}\n".encode()
    path = results / TOKEN_TRACES

    def check(mutation: Mutation) -> None:
        path.write_bytes(mutate(good, mutation, "no checksums"))
        read_traces(results)

    return check, (NOTHING,), st.tuples(MUTATION)


def calibration_target(folder: Path, demo: LoadedModel) -> Target:
    path = folder / "calibration.safetensors"
    scores = torch.arange(40.0)
    make_calibration(
        tables={"pooled": tuple(ReferenceTable.from_scores(scores + i) for i in range(3))},
        observed={"pooled": tuple(scores.view(5, 8) + i for i in range(3))},
        num_layers=3,
        contributions=made_up_contributions(8, 2),
    ).save(path)
    good = path.read_bytes()

    def check(mutation: Mutation) -> None:
        path.write_bytes(mutate_calibration(good, mutation))
        with suppress(BHRoutingError):
            read_null_samples(path)
        Calibration.load(path)

    return check, (NOTHING,), st.tuples(MUTATION)


def prompts_target(folder: Path, demo: LoadedModel) -> Target:
    facts = describe_model(demo.model)

    def check(prompts: Any) -> None:
        spec = make_spec(
            RunSpec, model="demo", configs={"t": {"method": "topk", "k": 8}}, prompts=prompts
        )
        prompts = [prompt.text for prompt in spec.prompts]
        check_prompts(prompts, spec.max_tokens, demo.tokenizer, facts)

    prompt = st.fixed_dictionaries({"text": st.text()}, optional={"category": st.text()})
    return check, ([{"text": "a"}],), st.tuples(st.lists(prompt | JSON, max_size=3) | JSON)


def words_target(folder: Path, demo: LoadedModel) -> Target:
    prompts = [{"text": "a", "category": "x"}, {"text": "b", "category": "y"}]
    path = folder / "text.jsonl"
    path.write_bytes(b"")

    def check(words: str, content: bytes) -> None:
        for step in (
            lambda: make_rules(dict([parse_rule(words)])),
            lambda: select_prompts(prompts, words.split(",")),
            lambda: path.write_bytes(content) and read_documents([path]),
        ):
            with suppress(BHRoutingError):
                step()

    rule = st.lists(
        st.sampled_from(["bh", "bh_drop", ":", "alpha", "=", "0.1", ",", "max_k", "*a", "!!bool x"])
        | st.text(max_size=3)
    ).map("".join)
    line = b'{"text": "a", "name": "b", "cluster": 3}\n'
    damaged = MUTATION.map(lambda mutation: mutate(line, mutation, "-"))
    return check, ("bh:alpha=0.1", line), st.tuples(rule, damaged)


TARGETS: Final = {
    "yaml": (yaml_target, 0.3),
    "run": (run_target, 0.05),
    "quality": (quality_target, 0.1),
    "traces": (traces_target, 0.1),
    "calibration": (calibration_target, 0.2),
    "prompts": (prompts_target, 0.1),
    "words": (words_target, 0.15),
}


def make_feed(check: Callable[..., Any], strategy: Any, inputs: int) -> Any:
    """Return a hypothesis test that draws inputs and lets only our own errors go."""

    @settings(
        max_examples=inputs,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def feed(drawn: Any) -> None:
        with suppress(BHRoutingError):
            check(*drawn)

    return feed


@pytest.mark.parametrize(
    "inputs",
    [2_000, pytest.param(100_000, marks=[pytest.mark.full, pytest.mark.timeout(7200)])],
)
@pytest.mark.parametrize("name", TARGETS)
def test_only_our_own_errors_escape(
    name: str, inputs: int, folder: Path, demo: LoadedModel
) -> None:
    target, share = TARGETS[name]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        check, taken, strategy = target(Path(own), demo)
        check(*taken)
        make_feed(check, strategy, round(share * inputs))()
