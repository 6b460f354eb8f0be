"""The training of the demo and of its relatives, at a size that trains in seconds."""

from __future__ import annotations

import json
import lzma
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bh_routing.demo import demo_folder
from bh_routing.models.load import load_model
from bh_routing.models.routers import find_routers
from tools.demo_corpus import (
    END_OF_TEXT,
    HELDOUT,
    Tokens,
    load_tokens,
    packaged_tokenizer,
    text_of,
    write_pieces,
)
from tools.demo_recipes import (
    PRESETS,
    Recipe,
    build_model,
    configure,
    correct_biases,
    correction_biases,
    count_load,
    make_loss,
)
from tools.train_demo import Trainer, heldout_nll, is_stalled

FAMILIES = ["demo", "renormalised", "sigmoid"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return packaged_tokenizer()


def tiny(preset: str) -> Recipe:
    return replace(
        PRESETS[preset], hidden=32, expert_hidden=16, layers=2, heads=2, experts=8, top_k=2,
        context=16, sequences_per_step=4, evaluate_every=50,
    )  # fmt: skip


def random_tokens(number: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(2, 100, number).astype(np.uint16)


def trainer_of(preset: str, tokenizer: PreTrainedTokenizerFast) -> Trainer:
    recipe = tiny(preset)
    tokens = torch.from_numpy(random_tokens(2_000).astype(np.int32))
    return Trainer(recipe, build_model(recipe, tokenizer), tokens, [random_tokens(40, seed=1)])


def test_the_demo_preset_configures_the_packaged_model(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    packaged = json.loads((demo_folder() / "config.json").read_text("utf-8"))
    ours = configure(PRESETS["demo"], tokenizer).to_dict()
    made_by_saving = {"architectures", "dtype", "transformers_version"}
    assert {n: ours[n] for n in packaged if n not in made_by_saving} == {
        n: value for n, value in packaged.items() if n not in made_by_saving
    }


def test_the_larger_preset_has_ten_times_the_parameters_in_multiples_of_64(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    recipe = PRESETS["larger"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configure(recipe, tokenizer))
    assert 100e6 < sum(p.numel() for p in model.parameters()) < 105e6
    assert recipe.hidden % 64 == recipe.expert_hidden % 64 == 0
    assert recipe.hidden == 64 * recipe.heads


@pytest.mark.parametrize("preset", FAMILIES)
def test_the_loss_counts_the_experts_that_the_routers_select(
    preset: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = tiny(preset)
    model = build_model(recipe, tokenizer)
    generator = torch.Generator().manual_seed(0)
    for bias_E in correction_biases(model).values():
        bias_E += 0.3 * torch.rand(bias_E.shape, generator=generator)
    selected: list[torch.Tensor] = []
    for site in find_routers(model).sites:
        site.module.register_forward_hook(lambda *call: selected.append(call[2][2]))
    tokens_BS = torch.from_numpy(random_tokens(4 * 17).astype(np.int64)).view(4, 17)
    _, _, loads_LE = make_loss(model, recipe)(tokens_BS)
    expected = [index_TK.flatten().bincount(minlength=8).tolist() for index_TK in selected]
    assert loads_LE.tolist() == expected
    assert bool(correction_biases(model)) == (preset == "sigmoid")


def test_the_correction_bias_evens_the_load_out() -> None:
    scores_TE = torch.rand(512, 8, generator=torch.Generator().manual_seed(0))
    scores_TE[:, 0] += 0.2
    bias_E = torch.zeros(8)
    before_E = count_load(scores_TE, top_k=2)
    for _ in range(500):
        correct_biases([bias_E], count_load(scores_TE + bias_E, top_k=2)[None], rate=1e-3)
    after_E = count_load(scores_TE + bias_E, top_k=2)
    assert before_E.max() / before_E.mean() > 1.3
    assert after_E.max() / after_E.mean() < 1.05


@pytest.mark.parametrize("preset", FAMILIES)
def test_a_trained_model_is_exported_with_its_record_and_routes(
    preset: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = trainer_of(preset, tokenizer)
    first = trainer.evaluate()
    trainer.run(total_seconds=2.0, deadline=time.monotonic() + 60)
    trainer.export(tmp_path, tokenizer)
    record = json.loads((tmp_path / "training.json").read_text("utf-8"))
    assert record["steps"] == trainer.step > 0
    assert record["heldout_nll"] < first
    model, _ = load_model(str(tmp_path), device="cpu", dtype="float32")
    facts = find_routers(model).sites[0].facts
    assert facts.normalises == (preset != "demo")
    assert facts.scoring == ("sigmoid" if preset == "sigmoid" else "softmax")
    trained, loaded = (list(correction_biases(m).values()) for m in (trainer.model, model))
    assert len(trained) == len(loaded)
    for bias_E, loaded_E in zip(trained, loaded, strict=True):
        # A bfloat16 bias above 0.25 doesn't change by 0.001.
        assert bias_E.dtype == loaded_E.dtype == torch.float32
        assert bias_E.abs().max() > 0
        assert torch.equal(bias_E, loaded_E)


def test_a_resumed_training_has_every_tensor_of_the_interrupted_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    interrupted = trainer_of("sigmoid", tokenizer)
    interrupted.run(total_seconds=100.0, deadline=time.monotonic() + 1.0)
    interrupted.save(tmp_path)
    resumed = trainer_of("sigmoid", tokenizer)
    resumed.restore(tmp_path)
    assert resumed.step == interrupted.step > 0
    assert resumed.seconds == interrupted.seconds < 30
    for name, tensor in interrupted.optimizer.tensors().items():
        assert torch.equal(resumed.optimizer.tensors()[name], tensor), name
    for name, tensor in interrupted.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_call_that_is_over_trains_no_step(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = trainer_of("demo", tokenizer)
    trainer.run(total_seconds=100.0, deadline=time.monotonic())
    assert trainer.step == 0


@torch.no_grad()
def test_the_heldout_loss_in_batches_is_that_of_single_windows(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = build_model(tiny("demo"), tokenizer).float()
    documents = [random_tokens(n, seed=n) for n in (40, 7, 2, 1)]
    total, count = 0.0, 0
    for ids in documents:
        for start in range(0, len(ids) - 1, 16):
            window = torch.from_numpy(ids[start : start + 17].astype(np.int64))
            logits = model(window[None, :-1]).logits[0]
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            count += window.numel() - 1
    assert count == 39 + 6 + 1
    found = heldout_nll(model, documents, context=16, batch=3)
    assert found == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "patience", "stalled"),
    [
        ([3.0, 2.0, 2.1, 2.1], 2, True),
        ([3.0, 2.0, 2.1, 1.9], 2, False),
        ([3.0, 2.0, 2.1], 2, False),
        ([3.0, 2.0, 2.1, 2.1], None, False),
        ([], 1, False),
    ],
)
def test_training_ends_once_the_heldout_loss_no_longer_falls(
    losses: list[float], patience: int | None, stalled: bool
) -> None:
    curve: list[dict[str, float]] = [{"tokens": 1.0, "train_nll": 9.0}]
    curve += [{"tokens": 2.0, "train_nll": 1.0, "heldout_nll": loss} for loss in losses]
    assert is_stalled(curve, patience) is stalled


def write_text(path: Path, documents: list[str]) -> None:
    text = "".join(f"{document}\n{END_OF_TEXT}\n" for document in documents)
    path.write_bytes(lzma.compress(text.encode()))


def test_books_that_quote_heldout_text_are_left_out(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(40)]
    write_text(tmp_path / HELDOUT, [" ".join(words)])
    quoting = "He said: " + ", ".join(words[5:18]).upper() + "!"
    almost = " ".join(words[5:17]) + " and " + " ".join(words[17:29])
    write_text(tmp_path / "more-1.txt.xz", [quoting, almost, "Something else."])
    assert text_of(tmp_path, "more") == [almost, "Something else."]


def test_a_document_continues_in_the_next_file_of_its_name(tmp_path: Path) -> None:
    write_text(tmp_path / HELDOUT, ["held out"])
    (tmp_path / "more-1.txt.xz").write_bytes(lzma.compress(b"One be"))
    write_text(tmp_path / "more-2.txt.xz", ["gins here.", "Two."])
    assert text_of(tmp_path, "more") == ["One begins here.", "Two."]


@pytest.mark.parametrize("names", [("train",), ("train", "more")])
def test_pieces_contain_the_tokens_of_the_text(
    names: tuple[str, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    parts: dict[str, Any] = {"train": random_tokens(1_001), "more": random_tokens(500, seed=1)}
    for name, tokens in parts.items():
        write_pieces(tokens, tmp_path, name, number=2)
    expected = np.concatenate([parts[name] for name in names])
    assert np.array_equal(load_tokens(tmp_path, names, seed=0), expected)


def test_text_is_tokenized_where_there_are_no_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_text(tmp_path / "train.txt.xz", ["The old man", "and the sea"])
    tokens = load_tokens(tmp_path, ("train",), seed=0)
    texts = str(tokenizer.decode(tokens.tolist())).split(END_OF_TEXT)
    assert sorted(texts) == ["", "The old man", "and the sea"]
