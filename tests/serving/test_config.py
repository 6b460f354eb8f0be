"""Configurations of a server, and what is known before vLLM is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.cli.main import main
from bh_routing.errors import CalibrationError, InputError
from bh_routing.models.load import LoadedModel, load_model, read_config
from bh_routing.models.routers import find_routers
from bh_routing.models.sites import fingerprint_routers
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules import BenjaminiHochbergDrop, OpportunisticActivation, TopK
from bh_routing.serving.config import VARIABLE, check_fit, check_version, config_of
from bh_routing.serving.config import read_config as read_serving
from bh_routing.serving.launch import choose_rule, read_gates, servable_checkpoint


def gates_of(model: Any) -> list[tuple[torch.Tensor, None]]:
    weights = [site.linear_gate() for site in find_routers(model).sites]
    return [(weight, None) for weight in weights if weight is not None]


def fingerprint_of(model: Any) -> str:
    return fingerprint_routers(gates_of(model))


def test_a_calibration_knows_the_routers_in_any_dtype(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    half = load_model("demo", device="cpu", dtype="bfloat16")
    assert demo_calibration.router_fingerprint == fingerprint_of(demo.model)
    assert demo_calibration.router_fingerprint == fingerprint_of(half.model)


@pytest.mark.parametrize("layer", [0, 5])
def test_one_changed_router_changes_the_fingerprint(layer: int, demo: LoadedModel) -> None:
    gates = [(weight.clone(), None) for weight, _ in gates_of(demo.model)]
    before = fingerprint_routers(gates)
    gates[layer][0][3, 7] += 0.5
    assert fingerprint_routers(gates) != before
    assert fingerprint_routers([*gates[1:], gates[0]]) != before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("- 1", "must be a mapping with rule: and calibration:, got list"),
        ("", "got nothing; for example rule: {method: top_k, k: 4}"),
        ("# a comment", "got nothing; for example"),
        ("rule: {method: bh, alhpa: 0.1}", "unknown key of method 'bh' 'alhpa'"),
        ("rule: {method: top_k, k: 4}\nrules: 1", "it has an unknown key 'rules'"),
        ("calibration: x", "it has no 'rule'"),
        ("rule: {method: top_k, k: 0}", "k must be a whole number of at least 1, got 0"),
        ("rule: {method: bh}", "rule 'bh' needs a calibration with background"),
        ("rule: {method: bh}\ncalibration: x", "does not exist or is no file"),
        ("rule: {method: oracle_contribution, threshold: 1}", "the output of every candidate"),
        ("rule: {method: bh_drop, alpha: 0.1, scope: block}", "a server cuts prompts into chunks"),
        (
            "rule: {method: top_k, k: 4}\nprefill_rule: {method: top_k, k: 6}",
            "prefill_rule must decide per token, and the rule per decode step",
        ),
        ("rule: &a {method: top_k, k: 4}\nprefill_rule: *a", "uses a YAML alias"),
        ("rule: {", "isn't valid YAML"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_serving(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_calibration_is_looked_up_next_to_the_configuration(
    demo_calibration: Calibration, tmp_path: Path
) -> None:
    demo_calibration.save(tmp_path / "demo.safetensors")
    path = tmp_path / "serve.yaml"
    path.write_text("rule: {method: bh}\ncalibration: demo.safetensors")
    served = read_serving(path)
    assert served.calibration is not None
    assert served.calibration.fingerprint == demo_calibration.fingerprint


def test_rules_and_calibrations_have_digests_of_their_own(
    demo_calibration: Calibration, tmp_path: Path
) -> None:
    file = demo_calibration.save(tmp_path / "demo.safetensors")
    contents: list[dict[str, Any]] = [
        {"rule": {"method": "top_k", "k": 4}},
        {"rule": {"method": "top_k", "k": 5}},
        {"rule": {"method": "oea", "k0": 4}},
        {"rule": {"method": "oea", "k0": 4}, "prefill_rule": {"method": "top_k", "k": 4}},
        {"rule": {"method": "bh"}, "calibration": str(file)},
    ]
    assert len({read_serving(content).digest for content in contents}) == len(contents)
    assert read_serving(contents[0]).digest == read_serving(dict(contents[0])).digest


def test_without_a_configuration_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert config_of({}) is None
    path = tmp_path / "serve.yaml"
    path.write_text("rule: {method: top_k, k: 3}")
    monkeypatch.setenv(VARIABLE, str(path))
    served = config_of({})
    assert served is not None
    with pytest.raises(InputError, match="both name a configuration; give one"):
        config_of({"bh_routing": str(path)})


def test_the_demo_is_served_from_an_untied_copy_with_the_same_routers(
    demo: LoadedModel,
    demo_calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = servable_checkpoint("demo", read_config("demo"))
    assert folder == servable_checkpoint("demo", read_config("demo"))
    assert folder == servable_checkpoint(folder, read_config(folder))
    copy = load_model(folder, device="cpu").model
    ids = torch.tensor([[5, 6, 7]])
    assert copy.config.tie_word_embeddings is False
    assert torch.equal(copy(ids).logits, demo.model(ids).logits)
    assert fingerprint_routers(read_gates(Path(folder))) == demo_calibration.router_fingerprint


def test_a_copy_that_cannot_be_written_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()  # root may write into any folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"Not a directory.*; set XDG_CACHE_HOME to a folder"):
        servable_checkpoint("demo", read_config("demo"))


def test_an_unreadable_configuration_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Is a directory.*; set BH_ROUTING_CONFIG to a YAML file"):
        read_serving(tmp_path)
    with pytest.raises(InputError, match=r"No such file.*or unset it to serve without a rule"):
        read_serving(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda gates: [(weight * 1.25, None) for weight, _ in gates], "another checkpoint of the"),
        (lambda gates: gates[::-1], "another checkpoint of the same shape"),
        (lambda gates: gates[:5], "calibration covers 6 layers, the model has 5"),
    ],
    ids=["other weights", "other order", "fewer layers"],
)
def test_another_models_calibration_does_not_fit(
    change: Any, sentence: str, demo: LoadedModel, demo_calibration: Calibration, tmp_path: Path
) -> None:
    file = demo_calibration.save(tmp_path / "demo.safetensors")
    served = read_serving({"rule": {"method": "bh"}, "calibration": str(file)})
    gates = gates_of(demo.model)
    check_fit(served, gates, num_experts=64, model_top_k=8)
    with pytest.raises(CalibrationError, match=sentence):
        check_fit(served, change(gates), num_experts=64, model_top_k=8)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0"])
def test_an_untested_version_of_vllm_is_rejected(version: str) -> None:
    check_version("0.26.0")
    check_version("0.32.1+cpu")
    with pytest.raises(InputError, match=rf"vLLM {version} is outside .* run: pip install 'vllm"):
        check_version(version)


TWO_RULES = """
configs:
  bh_drop-block@5: {method: bh_drop, alpha: 0.31, description: bh_drop at 5 experts per token}
  oea@0.65: {method: oea, k0: 4, refill: 16}
"""


def test_a_rule_that_a_sweep_found_is_served_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(TWO_RULES)
    assert choose_rule(None, path, "oea@0.65").rule == OpportunisticActivation(4, refill=16)
    assert choose_rule(None, path, "bh_drop-block@5").rule == BenjaminiHochbergDrop(0.31)
    path.write_text("configs:\n  only: {method: top_k, k: 3}")
    assert choose_rule(None, path, None) == choose_rule(None, path, "only")
    assert choose_rule("top_k:k=3", None, None).rule == TopK(3)


@pytest.mark.parametrize(
    ("text", "content", "name", "sentence"),
    [
        (None, None, None, "a server runs one rule; give --rule"),
        ("top_k:k=3", TWO_RULES, "oea@0.65", "a server runs one rule; give --rule"),
        ("top_k:k=3", None, "oea@0.65", "a server runs one rule; give --rule"),
        (None, TWO_RULES, None, "choose it by --configs: bh_drop-block@5, oea@0.65"),
        (None, "configs: {}", None, "has 0 configurations, a server runs one"),
        (None, TWO_RULES, "oea@0.56", "did you mean 'oea@0.65'?"),
        (None, "configs:\n  a: {method: bh, alhpa: 1}", "a", "did you mean 'alpha'?"),
        (None, "configs: [", "a", "isn't valid YAML"),
    ],
)
def test_a_choice_of_no_rule_or_several_is_one_sentence(
    text: str | None, content: str | None, name: str | None, sentence: str, tmp_path: Path
) -> None:
    path = None
    if content is not None:
        path = tmp_path / "sweep.json"
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        choose_rule(text, path, name)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


STARTED = """
import sys
from bh_routing.serving.launch import Launch, start

start(Launch(command=sys.argv[1:], environment={}, configuration="rule: x", facts={}))
"""
SERVER = """
import os, signal, time

# As vLLM: a job in the background of a shell ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
print(open(os.environ["BH_ROUTING_CONFIG"]).read().strip())
print(os.environ["PROMETHEUS_MULTIPROC_DIR"], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_leaves_no_folder_however_it_ends(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "a path with spaces"
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-c", STARTED, sys.executable, "-c", SERVER],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"rule: x\n"
    assert Path(server.stdout.readline().decode().strip()).is_dir()
    # As Ctrl-C in a terminal: all processes of the group.
    os.killpg(server.pid, number)
    server.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(folder.iterdir()) == []


def test_a_server_that_does_not_start_leaves_no_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, "/nowhere/vllm"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.endswith("No such file or directory\n")
    deadline = time.monotonic() + 60
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


HAS_VLLM = find_spec("vllm") is not None


@pytest.mark.skipif(HAS_VLLM, reason="needs an environment without vLLM")
def test_serve_without_vllm_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "demo", "--rule", "top_k:k=4", "--port", "8000"]) == 2
    assert "vLLM isn't installed here; install bh-routing into vLLM's" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_VLLM, reason="needs an environment with vLLM")
def test_check_prints_the_command_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "sweep.json").write_text(TWO_RULES)
    chosen = ["--config", str(tmp_path / "sweep.json"), "--configs", "oea@0.65"]
    own = ["serve", "demo", *chosen, "--check"]
    assert main([*own, "--port", "8123", "--served-model-name", "mine"]) == 0
    text = capsys.readouterr().out
    assert "olmoe, 64 experts, top 8" in text
    assert "the model's own top k" in text
    assert "VLLM_PLUGINS=other,bh_routing" in text
    assert "# BH_ROUTING_CONFIG names a file with\nrule:\n  method: oea" in text
    assert list((tmp_path / "temporary").iterdir()) == []
    assert text.rstrip().endswith("--port 8123 --served-model-name mine")
    assert text.count("--served-model-name") == 1
    assert "--kv-cache-memory-bytes" in text
    assert main([*own, "--gpu-memory-utilization=0.5"]) == 0
    assert "--kv-cache-memory-bytes" not in capsys.readouterr().out
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert main(own) == 0
    assert "--kv-cache-memory-bytes" not in capsys.readouterr().out


@pytest.mark.skipif(not HAS_VLLM, reason="needs an environment with vLLM")
@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("top_k:k=65", "k must be at most the 64 experts of a layer, got 65"),
        ("oea:k0=9", "k0 must be at most 8"),
        ("bh:alpha=0.1,max_k=12", "keeps up to 12 experts per token, a served layer has places"),
        ("oea:k0=3,refill=7", "refill must be at least 8"),
        ("bh_drop:alpha=0.3", "'needed_by_loss', only of: background, pooled"),
    ],
)
def test_check_rejects_what_cannot_run(
    rule: str,
    sentence: str,
    demo_calibration: Calibration,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = demo_calibration.save(tmp_path / "demo.safetensors")
    given = ["--rule", rule, "--calibration", str(file), "--check"]
    assert main(["serve", "demo", *given]) == 2
    assert sentence in capsys.readouterr().err
