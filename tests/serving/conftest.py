"""Real servers of the demo model, one per configuration, in the environment of `make serving`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.models.load import LoadedModel, read_config
from bh_routing.nulls.calibration import Calibration
from bh_routing.serving.config import VARIABLE
from bh_routing.serving.launch import servable_checkpoint

if find_spec("vllm") is None:
    # `make test-serving` has an environment with vLLM.
    here = Path(__file__).parent
    collect_ignore = [
        path.name
        for path in here.glob("test_*.py")
        if path.stem not in ("test_config", "test_layer")
    ]

START_SEC: Final = 900
"""A machine with other load takes minutes to import vLLM in each of its three processes."""
OPTIONS: Final = (
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"),
    "--enforce-eager",
)
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(**more: str) -> dict[str, str]:
    """This process's variables without a configuration, and those of a small server."""
    kept = {name: text for name, text in os.environ.items() if name != VARIABLE}
    return {**kept, **ENVIRONMENT, **more}


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def complete(self, ids: list[int], max_tokens: int = 24, **more: Any) -> list[int]:
        """Continue a prompt greedily, and return the new tokens."""
        body = {
            "model": "demo", "prompt": ids, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, **more,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            found: list[int] = json.load(answer)["choices"][0]["token_ids"]
            return found

    def complete_all(self, prompts: list[list[int]], max_tokens: int = 24) -> list[list[int]]:
        """Continue prompts at the same time."""
        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(lambda ids: self.complete(ids, max_tokens), prompts))

    def metrics(self) -> dict[str, float]:
        """Values of our metrics, by name without labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line[:11] == "bh_routing_"]
        return {line.split("{")[0].split()[0]: float(line.rsplit(maxsplit=1)[1]) for line in lines}


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start a server in a process group of its own."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environment(**variables), stdout=file, stderr=file, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a server and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SEC
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            server.get("/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the server didn't start:\n{server.log.read_text()[-4_000:]}")


Serve = Callable[..., Server]


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start servers by `bh-routing serve`; all of them stop at the end of the session."""
    running: list[Server] = []

    def begin(*arguments: str, options: tuple[str, ...] = OPTIONS, **variables: str) -> Server:
        folder, port = tmp_path_factory.mktemp("server"), free_port()
        own = [sys.executable, "-m", "bh_routing", "serve", *arguments]
        command = [*own, "--port", str(port), *options]
        cache = str(tmp_path_factory.getbasetemp() / "cache")
        process = start(command, folder / "log", XDG_CACHE_HOME=cache, **variables)
        server = Server(process, port, folder / "log")
        running.append(server)
        wait_until_ready(server)
        return server

    yield begin
    for server in running:
        stop(server.process)


@pytest.fixture(scope="session")
def served_calibration(demo: LoadedModel) -> Calibration:
    """The demo model calibrated for every rule of these tests."""
    nulls = ("background", "needed", "needed_by_loss", "needed_steps")
    texts = [document.text for document in packaged_documents("calibration")]
    return calibrate(demo.model, demo.tokenizer, texts, nulls=nulls)


@pytest.fixture(scope="session")
def calibration_file(
    served_calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return served_calibration.save(tmp_path_factory.mktemp("calibration") / "demo.safetensors")


PROMPTS: Final = (
    "The old man walked down to the",
    "In the beginning there was",
    "She opened the letter and",
    "The king said to his daughter that",
    "It is well known that the",
    "On the third day of the voyage",
    "A function returns",
    "The experiment shows that",
)


@pytest.fixture(scope="session")
def prompts(demo: LoadedModel) -> list[list[int]]:
    return [demo.tokenizer(text)["input_ids"] for text in PROMPTS]


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def continue_alone(model: Any, ids: list[int], max_tokens: int = 24) -> list[int]:
    """Continue a prompt greedily with transformers."""
    output = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False,
    )  # fmt: skip
    found: list[int] = output[0, len(ids) :].tolist()
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untied copy of the demo model, as `bh-routing serve demo` writes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return servable_checkpoint("demo", read_config("demo"))
