"""Experts are removed from a checkpoint on disk: exactly, atomically, and in little memory."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig

from bh_routing.demo import demo_folder
from bh_routing.errors import ModelError, ResultsError
from bh_routing.models import find_routers, load_model
from bh_routing.models.expert_axes import Checkpoint, open_checkpoint
from bh_routing.models.prune import write_pruned
from tests.families.checkpoints import save_tiny
from tests.models.masking import without_experts

KEPT = {
    f"model.layers.{layer}.mlp": sorted((7 * i + layer) % 64 for i in range(48))
    for layer in range(6)
}
"""48 of the demo model's 64 experts, other ones in each layer."""


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("demo")


def all_but_last(checkpoint: Checkpoint, num_removed: int = 1) -> dict[str, Sequence[int]]:
    """Keep all experts but the last ones in every block."""
    blocks = {name.partition(".experts.")[0] for name in checkpoint.axes if ".experts." in name}
    return dict.fromkeys(sorted(blocks), range(checkpoint.num_experts - num_removed))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "config.json").read_text())
    change(document)
    (folder / "config.json").write_text(json.dumps(document))


def test_48_of_the_demo_models_64_experts_equal_the_masked_original(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_pruned(checkpoint, KEPT, {}, tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    original, _ = load_model("demo", device="cpu", dtype="float32")
    ids = tokenizer("The old man walked down to the river and", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = original(ids).logits
        with without_experts(original, checkpoint, KEPT):
            masked = original(ids).logits
        found = pruned(ids).logits
    assert pruned.config.num_experts == 48
    assert (plain - masked).abs().max() > 0.1
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-5)


def test_the_stored_bytes_of_every_tensor_stay_as_they_are(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_pruned(checkpoint, KEPT, {}, tmp_path / "pruned")
    before, after = (
        {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in
         load_file(file).items()}
        for folder in (checkpoint.folder, tmp_path / "pruned")
    )  # fmt: skip
    names, num_bytes = {*after}, sum(value.nbytes for value in after.values())
    for block, kept in KEPT.items():
        for number, expert in enumerate(kept):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                found = after.pop(f"{block}.experts.{number}.{matrix}.weight")
                assert torch.equal(found, before[f"{block}.experts.{expert}.{matrix}.weight"])
        gate = after.pop(f"{block}.gate.weight")
        assert torch.equal(gate, before[f"{block}.gate.weight"][list(kept)])
    assert after.keys() == {name for name in before if ".mlp." not in name}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names
    assert index["metadata"]["total_size"] == num_bytes


def test_the_other_files_are_copied_but_for_the_model_card(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_pruned(checkpoint, KEPT, {"README.md": b"# Pruned"}, tmp_path / "pruned")
    for name in ("tokenizer.json", "generation_config.json", "LICENSES.txt"):
        assert (tmp_path / "pruned" / name).read_bytes() == (demo_folder() / name).read_bytes()
    assert (tmp_path / "pruned" / "README.md").read_bytes() == b"# Pruned"
    assert not (tmp_path / "pruned" / "evaluation.txt.xz").exists()


def test_code_of_a_checkpoint_is_never_copied(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "tiny")
    (folder / "tokenizer_tricks.py").write_text("raise SystemExit")
    checkpoint = open_checkpoint(str(folder))
    write_pruned(checkpoint, all_but_last(checkpoint), {}, tmp_path / "pruned")
    assert not list((tmp_path / "pruned").glob("*.py"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("olmoe", {"num_experts": 3, "num_experts_per_tok": 3}),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
        ("dbrx", {"ffn_config": {"moe_num_experts": 3, "moe_top_k": 3}}),
        ("qwen3_vl_moe", {"text_config": {"num_local_experts": 3, "num_experts_per_tok": 3}}),
        ("granitemoe", {"num_local_experts": 3, "num_experts_per_tok": 3}),
        # A token can reach 2 of 4 groups of 2 experts.
        ("deepseek_v3", {"n_routed_experts": 8, "num_experts_per_tok": 4}),
    ],
)
def test_the_config_states_fewer_experts_under_the_familys_own_names(
    family: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(save_tiny(family, tmp_path / "tiny", top_k=6)))
    kept = all_but_last(checkpoint, 8 if family == "deepseek_v3" else 13)
    write_pruned(checkpoint, kept, {}, tmp_path / "pruned")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("tiny", "pruned")
    )
    for name, value in expected.items():
        if isinstance(value, dict):
            before[name] |= value
        else:
            before[name] = value
    assert after == before
    model, _ = load_model(str(tmp_path / "pruned"), device="cpu")
    assert find_routers(model).num_experts == 16 - (8 if family == "deepseek_v3" else 13)


@pytest.mark.parametrize("infinity", [{"__float__": "Infinity"}, math.inf])
def test_a_config_keeps_numbers_that_are_not_finite(infinity: Any, tmp_path: Path) -> None:
    folder = save_tiny("granitemoehybrid", tmp_path / "tiny")
    edit_config(folder, lambda c: c.update(time_step_limit=[0.0, infinity]))
    checkpoint = open_checkpoint(str(folder))
    write_pruned(checkpoint, all_but_last(checkpoint), {}, tmp_path / "pruned")
    after = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert after["time_step_limit"] == [0.0, infinity]


def test_tensors_that_transformers_does_not_load_are_left_out_and_named(tmp_path: Path) -> None:
    folder = save_tiny("deepseek_v3", tmp_path / "tiny")
    # Multi-token prediction: a layer after the last one.
    extra = "model.layers.61.mlp.experts.0.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, extra: torch.ones(2, 2)}, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.not_loaded == [extra]
    write_pruned(checkpoint, all_but_last(checkpoint, 4), {}, tmp_path / "pruned")
    assert extra not in load_file(tmp_path / "pruned" / "model.safetensors")


@pytest.mark.parametrize("exists_as", ["folder", "file", "link"])
def test_nothing_that_exists_is_overwritten(
    exists_as: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    output = tmp_path / "taken"
    if exists_as == "folder":
        output.mkdir()
    elif exists_as == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match="taken exists, and a checkpoint is never written over"):
        write_pruned(checkpoint, KEPT, {}, output)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_cannot_be_made_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=r"can't be written .*nothing was left"):
        write_pruned(checkpoint, KEPT, {}, tmp_path / "file" / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("method", "shown"),
    [("fp8", "quantised by fp8"), ("gptq", "quantised by gptq"), ("bitsandbytes", "bitsandbytes")],
)
def test_a_quantised_checkpoint_is_rejected(method: str, shown: str, tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "tiny")
    edit_config(folder, lambda c: c.update(quantization_config={"quant_method": method}))
    with pytest.raises(ModelError, match=rf"{shown}.*prune the checkpoint in bfloat16"):
        open_checkpoint(str(folder))


def change_names(folder: Path, names: Mapping[str, str]) -> None:
    """Rename the tensors of a checkpoint of one file."""
    weights = load_file(folder / "model.safetensors")
    save_file(
        {names.get(name, name): w for name, w in weights.items()}, folder / "model.safetensors"
    )


def test_a_layout_that_is_not_understood_is_rejected(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "tiny")
    last = "model.layers.0.mlp.experts.15.up_proj.weight"
    change_names(folder, {last: last.replace("15", "16")})
    with pytest.raises(ModelError, match="neither with an axis of 16 experts nor once for each"):
        open_checkpoint(str(folder))
    change_names(folder, {"model.layers.1.mlp.gate.weight": "model.layers.1.mlp.door.weight"})
    with pytest.raises(
        ModelError, match=r"no stored tensor holds the weight model\.layers\.1\.mlp\.gate"
    ):
        open_checkpoint(str(folder))


def test_a_checkpoint_in_another_format_is_rejected(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"can't be read as a safetensors file .*No such file"):
        open_checkpoint(str(folder))
    (folder / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ModelError, match="can't be read as a safetensors file"):
        open_checkpoint(str(folder))


def test_a_truncated_file_is_rejected_and_nothing_is_left(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "tiny")
    file = folder / "model.safetensors"
    checkpoint = open_checkpoint(str(folder))
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ModelError, match="ends too early"):
        write_pruned(checkpoint, all_but_last(checkpoint), {}, tmp_path / "pruned")
    with pytest.raises(ModelError, match="can't be read as a safetensors file"):
        open_checkpoint(str(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def kill_at(step: int, write: Callable[[], None]) -> bool:
    """Run `write` in a child that kills itself at its n-th fsync; whether it came that far."""
    child = os.fork()
    if child == 0:
        calls = iter(range(step))
        sync = os.fsync

        def fatal(descriptor: int) -> None:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(descriptor)

        setattr(os, "fsync", fatal)  # noqa: B010
        try:
            write()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint_or_none(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    write_pruned(checkpoint, KEPT, {"README.md": b""}, tmp_path / "expected")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    step, seen = 0, set()
    while kill_at(
        step, lambda: write_pruned(checkpoint, KEPT, {"README.md": b""}, tmp_path / "new")
    ):
        seen.add((tmp_path / "new").exists())
        if (tmp_path / "new").exists():
            found = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
            assert found == expected
            break
        # What is left can't be mistaken for a checkpoint: config.json is written last.
        for left in tmp_path.glob(".new.*.tmp"):
            assert not (left / "config.json").exists() or step >= len(expected) - 1
        step += 1
    assert step >= len(expected)
    assert seen == {False, True}


MEASURE = """
import sys
from pathlib import Path
from bh_routing.models.expert_axes import open_checkpoint
from bh_routing.models.prune import write_pruned

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

checkpoint = open_checkpoint(sys.argv[1])
kept = {f"model.layers.{layer}.mlp": range(12) for layer in range(4)}
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in memory
before = peak_bytes()
write_pruned(checkpoint, kept, {}, Path(sys.argv[2]))
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("is_fused", [False, True])
def test_writing_takes_less_memory_than_a_shard(is_fused: bool, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    config = OlmoeConfig(
        vocab_size=96, hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
        num_attention_heads=4, num_experts=16, dtype="bfloat16",
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="110MB", save_original_format=not is_fused)
    del model
    assert max(file.stat().st_size for file in folder.glob("*.safetensors")) > 90e6
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "pruned")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    # A block of 16 MiB is in memory at a time.
    assert int(done.stdout) < 40e6
