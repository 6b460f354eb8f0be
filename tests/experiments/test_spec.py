from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bh_routing.errors import InputError
from bh_routing.experiments.configurations import (
    SIZE_LIMIT_BYTES,
    add_config_file,
    load_yaml,
    make_rules,
    parse_rule,
    read_config_file,
    select_prompts,
)
from bh_routing.experiments.defaults import ROUTING_CONFIGS, TEST_PROMPTS
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.results.files import render_json
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg

CUSTOM = {
    "method": "bh",
    "alpha": 0.03,
    "temperature": 1.5,
    "min_k": 2,
    "max_k": 10,
    "description": "between two and ten",
}


def test_the_defaults_are_five_configurations_on_twelve_prompts() -> None:
    spec = make_spec(RunSpec)
    assert list(spec.configs) == ["topk_8", "bh_strict", "bh_moderate", "bh_loose", "bh_adaptive"]
    assert [config.get("alpha") for config in spec.configs.values()] == [
        None,
        0.01,
        0.05,
        0.1,
        0.05,
    ]
    categories = [prompt.category for prompt in spec.prompts]
    assert {name: categories.count(name) for name in categories} == {
        "simple": 3,
        "medium": 3,
        "complex": 3,
        "domain-specific": 3,
    }


def test_the_custom_configuration_of_the_readme_is_valid() -> None:
    assert (
        make_spec(RunSpec, configs={"my_custom_config": CUSTOM}).configs["my_custom_config"]
        == CUSTOM
    )


BH = {"method": "bh", "alpha": 0.05}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"configs": {"x": BH | {"alpha": 1.5}}}, ["configuration 'x'", "1.5", "(0, 1)"]),
        ({"configs": {"x": BH | {"alpha": float("nan")}}}, ["configuration 'x'", "nan"]),
        ({"configs": {"x": BH | {"alpha": "much"}}}, ["configuration 'x'", "much"]),
        ({"configs": {"x": BH | {"min_k": 4, "max_k": 2}}}, ["min_k", "4", "2"]),
        ({"configs": {"x": BH | {"min_k": 0}}}, ["min_k", "0"]),
        ({"configs": {"x": BH | {"max_kk": 3}}}, ["max_kk", "max_k"]),
        ({"configs": {"x": {"alpha": 0.05}}}, ["configuration 'x'", "method"]),
        ({"configs": {"x": {"method": "bhh"}}}, ["bhh", "did you mean 'bh'"]),
        ({"configs": {"x": BH | {"null": "gausian"}}}, ["did you mean 'gaussian'"]),
        ({"configs": {"x": BH | {"description": 3}}}, ["description", "3"]),
        ({"configs": {"../x": BH}}, ["'../x'", "rename"]),
        ({"configs": {}}, ["no configuration"]),
        ({"configs": {"x": 3}}, ["configs.x", "dictionary", "3"]),
        ({"prompts": []}, ["no prompt"]),
        ({"prompts": [{"text": "  "}]}, ["prompt 1 text", "empty"]),
        ({"prompts": [{"category": "simple"}]}, ["prompt 1 has no 'text'"]),
        ({"prompts": [{"text": "a", "categry": "b"}]}, ["categry", "did you mean 'category'"]),
        ({"prompts": [{"text": 3}]}, ["prompt 1 text", "string", "3"]),
        ({"prompts": [{"text": "a"}, {"text": "a"}]}, ["prompt 2 repeats", "prompt 1"]),
        ({"prompts": [{"text": "\ud800"}]}, ["prompt 1 text", "Unicode"]),
        ({"max_tokens": 0}, ["max_tokens", "greater than or equal to 1", "0"]),
        ({"checkpoint_interval": 0}, ["checkpoint_interval", "0"]),
        ({"device": "tpu"}, ["device", "'auto', 'cuda' or 'cpu'", "'tpu'"]),
        ({"executor": "slurm"}, ["executor", "'local'", "'slurm'"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"calibration": "a", "calibration_texts": ["b"]}, ["exclude each other"]),
        ({"max_token": 5}, ["max_token", "did you mean 'max_tokens'"]),
    ],
)
def test_a_mistake_is_named_in_one_sentence(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        make_rules(make_spec(RunSpec, **values).configs)
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text
    assert "pydantic" not in text and "validation error" not in text


def test_prompts_are_chosen_by_number_range_and_category() -> None:
    chosen = select_prompts(TEST_PROMPTS, ["12", "2-3", "medium"])
    assert chosen == [*TEST_PROMPTS[1:6], TEST_PROMPTS[11]]


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("0", "run from 1 to 12, got 0"),
        ("13", "run from 1 to 12, got 13"),
        ("3-2", "got 3-2"),
        ("simpel", "did you mean 'simple'"),
        ("-1", "unknown category"),
    ],
)
def test_a_prompt_that_is_not_there_is_refused(item: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        select_prompts(TEST_PROMPTS, [item])


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_adds_to_the_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "configs:\n  mine: {method: bh, alpha: 0.03, max_k: 10, description: 'a: b'}\n"
        "prompts:\n  - {text: 'Hello, you', category: mine}\n",
    )
    configs, prompts = add_config_file(path, ROUTING_CONFIGS, TEST_PROMPTS)
    assert list(configs) == [*ROUTING_CONFIGS, "mine"]
    assert prompts[12] == {"text": "Hello, you", "category": "mine", "description": ""}
    assert "mine" not in ROUTING_CONFIGS and len(TEST_PROMPTS) == 12


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("configs:\n  a: {method: bh}\n  b: {}\n  a: {method: topk}\n", ["'a' twice", "line 4"]),
        ("configs: {a: {method: bh, alpha: 0.1, alpha: 0.2}}", ["'alpha' twice"]),
        ("configs: {topk_8: {method: topk, k: 8}}", ["'topk_8'", "exists already"]),
        ("config: {}", ["'config'", "did you mean 'configs'"]),
        ("prompts: [{text: ''}]", ["prompt 1 text", "empty"]),
        ("prompts: [{txt: a}]", ["prompt 1", "'txt'"]),
        ("prompts: {text: a}", ["prompts", "list"]),
        ("", ["empty"]),
        ("[]", ["mapping"]),
        ("configs: {", ["isn't valid YAML"]),
        ("configs: &a {b: *a}", ["alias"]),
        ("a: !!python/object/apply:os.system ['true']", ["isn't valid YAML"]),
        ("configs: " + "[" * 3000, ["isn't valid YAML"]),
        ("#" * (SIZE_LIMIT_BYTES + 1), ["larger than"]),
        ("a: \x00", ["isn't valid YAML"]),
    ],
)
def test_a_bad_file_is_refused_with_one_sentence(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        add_config_file(path, ROUTING_CONFIGS, TEST_PROMPTS)
    message = str(caught.value)
    assert str(path) in message
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="configuration file"):
            add_config_file(path, {}, [])


NUMBERS = {
    "1e-2": 0.01, "1E-2": 0.01, ".5e1": 5.0, "+1.5": 1.5, "5.": 5.0, "0x1F": 31, "0o17": 15,
    "-7": -7, "true": True, "False": False, "~": None, "null": None,
}  # fmt: skip
TEXTS = ["on", "off", "yes", "no", "010", "1_000", "1:30", "2026-01-31", "1e", "0b11", "nul", "="]


@pytest.mark.parametrize(("text", "value"), [*NUMBERS.items(), *((text, text) for text in TEXTS)])
def test_a_plain_word_means_the_same_in_a_file_and_on_the_command_line(
    text: str, value: object
) -> None:
    read = load_yaml(f"a: {text}")["a"]
    _, config = parse_rule(f"bh:alpha={text}")
    assert (read, config["alpha"]) == (value, value)
    assert type(read) is type(config["alpha"]) is type(value)


@pytest.mark.parametrize("key", ["null", "on", "no", "123", "2026-01-31", "1e-2", "~", "true"])
def test_a_key_is_a_text_whatever_it_looks_like(key: str) -> None:
    assert load_yaml(f"{key}: {{{key}: 1}}") == {key: {key: 1}}


def test_a_null_distribution_and_a_small_alpha_can_be_written_plainly(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("configs:\n  2026: {method: bh, alpha: 1e-2, null: gaussian, description: no}")
    (mine,) = make_rules(read_config_file(path).configs)
    assert (mine.name, mine.description) == ("2026", "no")
    assert mine.rule == BenjaminiHochberg(alpha=0.01, null="gaussian")
    (named,) = make_rules(dict([parse_rule("bh:alpha=1e-2,null=gaussian")]))
    assert named.rule == mine.rule


@pytest.mark.parametrize("max_k", ["", ", max_k: null", ", max_k: ~"])
@pytest.mark.parametrize("rule", ["bh, alpha: 0.05", "higher_criticism, threshold: 2.0"])
def test_without_max_k_or_with_null_a_configuration_keeps_the_models_own_k(
    max_k: str, rule: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"configs:\n  mine: {{method: {rule}{max_k}}}\n")
    (mine,) = make_rules(read_config_file(path).configs)
    assert [mine.rule.num_candidates(k) for k in (8, 2, 1)] == [8, 2, 1]


def test_a_configuration_of_a_sweep_is_read_back_however_small_its_alpha(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_bytes(render_json({"configs": {"a": {"method": "bh", "alpha": 1.5e-07}}}))
    assert b"1.5e-07" in path.read_bytes()
    assert read_config_file(path).configs["a"]["alpha"] == 1.5e-07


@pytest.mark.parametrize("line", ['{k: 1, "k": 2}', "{null: a, null: b}", "{1: a, 1: b}"])
def test_a_key_given_twice_is_an_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"configs: {{a: {line}}}")
    with pytest.raises(InputError, match="twice"):
        read_config_file(path)


@pytest.mark.parametrize(
    "rule", ["bh:alpha=0.1,alpha=0.2", "bh:null=pooled,null=softmax", "bh:method=x"]
)
def test_a_field_given_twice_in_a_rule_is_an_error(rule: str) -> None:
    with pytest.raises(InputError, match="twice; remove one"):
        parse_rule(rule)
