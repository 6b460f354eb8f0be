"""Time vLLM's decode steps with and without rules, on a GPU: one command, one table.

    python benchmarks/serving.py --output serving.json

Needs an environment with vLLM for CUDA and this package. The model has the shape of OLMoE-1B-7B
and random weights. All variants are loaded at the same time, each in a process of its own, and
timed by turns: without the plugin (VLLM_PLUGINS empty), with the plugin inert, with BH at a mean of
4 experts, and with Fisher mass at 65 % of the distinct experts of top-8. The difference of two
lengths is timed, so that neither prefill nor start-up counts. `--model demo` tries the script out
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VARIANTS = ("absent", "inert", "bh", "fisher_mass")
BUDGETS = {"bh": 4.0, "fisher_mass": 0.65}
MARK = "serving.py: "


def prepare(folder: Path, model_name: str | None) -> dict[str, str]:
    """Write checkpoint, calibration and a configuration per rule; return the paths by name."""
    import torch
    import yaml

    from bh_routing.engine.calibrate import calibrate
    from bh_routing.engine.texts import packaged_documents
    from bh_routing.experiments.search import KnobSearch
    from bh_routing.experiments.settings import Goal
    from bh_routing.experiments.variants import variants_of
    from bh_routing.models.load import load_model, read_config
    from bh_routing.models.shapes import make_olmoe_shape
    from bh_routing.rules.catalog import make_rule, rule_to_config
    from bh_routing.serving.launch import servable_checkpoint

    if model_name is None:
        model, tokenizer = make_olmoe_shape(torch.device("cuda"), torch.bfloat16)
        checkpoint = str(folder / "olmoe-shape")
        model.save_pretrained(checkpoint, max_shard_size="4GB")
        tokenizer.save_pretrained(checkpoint)
    else:
        model, tokenizer = load_model(model_name, device="cpu")
        checkpoint = servable_checkpoint(model_name, read_config(model_name))
    paths = {"checkpoint": checkpoint}
    rules = {
        "bh": make_rule({"method": "bh", "alpha": 0.05, "null": "gaussian"}),
        "fisher_mass": make_rule({"method": "fisher_mass", "threshold": 0.01}),
    }
    texts = packaged_documents("calibration")
    needs = [rules["fisher_mass"]]
    calibration = calibrate(model, tokenizer, texts, rules=needs, max_tokens=8_192)
    saved = calibration.save(folder / "calibration.safetensors")
    for name, rule in rules.items():
        batch = 16 if rule.unit == "step" else None
        search = KnobSearch(
            model, tokenizer, texts, calibration, num_tokens=2_048, decode_batch=batch
        )
        (variant,) = variants_of({name: rule})
        (setting,) = search.find([Goal(variant=variant, budget=BUDGETS[name])])
        content = {"rule": rule_to_config(setting.rule), "calibration": str(saved)}
        paths[name] = str(folder / f"{name}.yaml")
        Path(paths[name]).write_text(yaml.safe_dump(content))
        print(f"{name}: {content['rule']}", flush=True)
    return paths


def counts(_: Any) -> dict[str, float]:
    """Return the plugin's counters in a worker's process."""
    from prometheus_client import REGISTRY

    names = ("tokens", "experts", "steps", "distinct_experts")
    found = {n: REGISTRY.get_sample_value(f"bh_routing_sampled_{n}_total") for n in names}
    return {name: value or 0.0 for name, value in found.items()}


def work(checkpoint: str, batches: list[int], tokens: int) -> None:
    """Load the model, and answer each line of standard input, a batch size, by a line."""
    from vllm import LLM, SamplingParams

    on_cpu = "VLLM_CPU_KVCACHE_SPACE" in os.environ
    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True} if on_cpu else {
        "dtype": "bfloat16", "moe_backend": "triton", "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 4 << 30,
        "compilation_config": {"cudagraph_capture_sizes": batches},
    }  # fmt: skip
    llm = LLM(
        model=checkpoint, max_model_len=512, max_num_seqs=max(batches),
        max_num_batched_tokens=2_048, enable_prefix_caching=False, disable_log_stats=True,
        **settings,
    )  # fmt: skip

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    draw = random.Random(0)
    drawn = [[draw.randrange(2, vocabulary) for _ in range(32)] for _ in range(max(batches))]

    def seconds(batch: int, length: int) -> float:
        prompts: Any = [{"prompt_token_ids": ids} for ids in drawn[:batch]]
        greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, greedy, use_tqdm=False)
        return time.perf_counter() - start

    for batch in batches:
        seconds(batch, 8)
    print(MARK + "ready", flush=True)
    for line in sys.stdin:
        batch, before = int(line), llm.collective_rpc(counts)[0]
        longer, shorter = seconds(batch, tokens), seconds(batch, tokens // 4)
        now = llm.collective_rpc(counts)[0]
        grown = {name: now[name] - before[name] for name in now}
        ms = 1e3 * (longer - shorter) / (tokens - tokens // 4)
        print(MARK + json.dumps({"ms": ms, **grown}), flush=True)


def read(process: subprocess.Popen[str]) -> str:
    """Return a worker's next answer; its other lines are vLLM's log."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            return line.removeprefix(MARK).strip()
        sys.stderr.write(line)
    raise SystemExit("a worker ended; its output is above")


def begin(name: str, paths: dict[str, str], batches: str, tokens: int) -> subprocess.Popen[str]:
    """Start a variant's worker."""
    environment = {k: v for k, v in os.environ.items() if k != "BH_ROUTING_CONFIG"}
    environment |= {"VLLM_PLUGINS": "" if name == "absent" else "bh_routing"}
    environment |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_NO_USAGE_STATS": "1"}
    if name in paths:
        environment["BH_ROUTING_CONFIG"] = paths[name]
    command = [sys.executable, __file__, "--checkpoint", paths["checkpoint"]]
    command += ["--batches", batches, "--tokens", str(tokens)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(worker: subprocess.Popen[str], batch: int) -> dict[str, float]:
    """Time one round of a worker."""
    assert worker.stdin is not None
    print(batch, file=worker.stdin, flush=True)
    answer: dict[str, float] = json.loads(read(worker))
    return answer


def row_of(batch: int, name: str, found: list[dict[str, float]], inert: float) -> dict[str, Any]:
    """Return a line of the table; means of experts are over the sampled steps of all rounds."""
    total = {key: sum(each[key] for each in found) for key in found[0]}
    median = statistics.median(each["ms"] for each in found)
    return {
        "batch": batch,
        "variant": name,
        "ms": [each["ms"] for each in found],
        "median_ms": median,
        "speed_up": inert / median,
        "mean_experts": total["experts"] / total["tokens"] if total["tokens"] else None,
        "distinct_experts": total["distinct_experts"] / total["steps"] if total["steps"] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    parser.add_argument("--folder", help="where the checkpoint of 14 GB is written for the run")
    parser.add_argument("--model", help="time this model instead, on a CPU")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    given = parser.parse_args()
    batches = [int(size) for size in given.batches.split(",")]
    if given.checkpoint:
        work(given.checkpoint, batches, given.tokens)
        return
    import torch
    import vllm

    start, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        paths = prepare(Path(folder), given.model)
        torch.cuda.empty_cache()
        workers = {name: begin(name, paths, given.batches, given.tokens) for name in VARIANTS}
        for worker in workers.values():
            read(worker)
        print(f"ready after {time.perf_counter() - start:.0f} s", flush=True)
        shuffled = random.Random(0)
        for batch in batches:
            turns = [
                {name: ask(workers[name], batch) for name in shuffled.sample(VARIANTS, 4)}
                for _ in range(given.turns)
            ]
            inert = statistics.median(turn["inert"]["ms"] for turn in turns)
            for name in VARIANTS:
                rows.append(row_of(batch, name, [turn[name] for turn in turns], inert))
                print(
                    "{batch:>4} {variant:<12} {median_ms:7.3f} ms {speed_up:6.3f} x, experts "
                    "{mean_experts}, distinct {distinct_experts}".format_map(rows[-1]),
                    flush=True,
                )
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait(timeout=120)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "rows": rows,
    }
    given.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
