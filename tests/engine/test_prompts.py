"""Prompts of instruct models go through the tokenizer's chat template, exactly once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bh_routing.cli.main import main
from bh_routing.demo import demo_folder
from bh_routing.engine.generate import (
    choose_chat_template,
    encode_prompt,
    generate_greedy,
    generate_routed,
)
from bh_routing.errors import InputError
from bh_routing.models import LoadedModel
from bh_routing.results.records import JOURNAL, REPORT_MD, RUN_JSON
from bh_routing.rules.fixed import TopK
from tests.cli.test_run import QUIET

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty(demo: LoadedModel) -> Any:
    """The demo's tokenizer with a template, and a BOS token that it adds to raw texts too."""
    tokenizer = copy.deepcopy(demo.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_prompt_is_one_user_message_with_one_bos_token(chatty: Any) -> None:
    ids = encode_prompt(chatty, "Hello")
    assert chatty.decode(ids) == f"{chatty.bos_token}<user>Hello<assistant>"
    assert ids.count(chatty.bos_token_id) == 1


def test_off_leaves_prompts_raw_and_the_tokenizer_as_it_was(chatty: Any, demo: LoadedModel) -> None:
    raw = choose_chat_template(chatty, "off")
    assert encode_prompt(raw, "Hello") == demo.tokenizer("Hello")["input_ids"]
    assert chatty.chat_template == TEMPLATE
    for mode in ("auto", "on"):
        assert choose_chat_template(chatty, mode) is chatty
    assert choose_chat_template(demo.tokenizer, "auto") is demo.tokenizer


def test_a_template_that_is_missing_or_takes_no_message_is_named(
    chatty: Any, demo: LoadedModel
) -> None:
    with pytest.raises(InputError, match="no chat template; choose auto or off"):
        choose_chat_template(demo.tokenizer, "on")
    chatty.chat_template = "{{ raise_exception('a system prompt is needed') }}"
    with pytest.raises(InputError, match=r"a system prompt is needed.*off"):
        encode_prompt(chatty, "Hello")


def test_the_engine_and_plain_generate_continue_the_same_message(
    chatty: Any, demo: LoadedModel
) -> None:
    ours, _ = generate_routed(demo.model, chatty, "Once upon a time", 6, TopK(k=8))
    plain = generate_greedy(demo.model, chatty, "Once upon a time", 6)
    assert ours.token_ids == plain.token_ids
    assert (
        ours.num_input_tokens
        == plain.num_input_tokens
        == len(encode_prompt(chatty, "Once upon a time"))
    )


def test_a_run_applies_records_and_never_mixes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in demo_folder().iterdir():
        if file.name == "tokenizer_config.json":
            content = json.loads(file.read_bytes()) | {"chat_template": TEMPLATE[15:]}
            (model / file.name).write_text(json.dumps(content))
        elif file.suffix in (".json", ".safetensors"):
            (model / file.name).symlink_to(file)
    command = ["run", "--model", str(model), "--device", "cpu", "--max-tokens", "2", "--no-eval",
               "--configs", "topk_8", "--prompts", "1", "--timing-rounds", "0"]  # fmt: skip
    lengths = {}
    for mode in ("auto", "off"):
        folder = tmp_path / mode
        assert main([*command, "--output", str(folder), "--chat-template", mode], QUIET) == 0
        line = json.loads((folder / JOURNAL).read_text().splitlines()[0])
        lengths[mode] = line["record"]["num_input_tokens"]
        document = json.loads((folder / RUN_JSON).read_text())
        assert document["spec"]["chat_template"] == mode
        assert (document["identity"]["chat_template"] is None) == (mode == "off")
    assert lengths["auto"] > lengths["off"]
    assert (
        main([*command, "--output", str(tmp_path / "auto"), "--chat-template", "off"], QUIET) == 2
    )
    assert "chat template (--chat-template)" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "auto")]) == 0
    assert "in the tokenizer's chat template" in (tmp_path / "auto" / REPORT_MD).read_text()
