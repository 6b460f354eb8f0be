"""Time vLLM's decode steps with and without rules, on a GPU: one command, one table.

    python benchmarks/serving.py --output serving.json

Needs an environment with vLLM for CUDA and this package. The model has the shape of OLMoE-1B-7B
and random weights. For every batch size, rounds of all variants are timed by turns, each in a
process of its own: without the plugin (VLLM_PLUGINS empty), with the plugin inert, with BH at
a mean of 4 experts, and with Fisher mass at 65 % of the distinct experts of top-8.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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


def prepare(folder: Path) -> dict[str, Path]:
    """Write checkpoint, calibration and a configuration per rule; return them by name."""
    import torch
    import yaml

    from bh_routing.engine.calibrate import calibrate
    from bh_routing.engine.texts import packaged_documents
    from bh_routing.experiments.search import KnobSearch
    from bh_routing.experiments.settings import Goal
    from bh_routing.experiments.variants import variants_of
    from bh_routing.models.shapes import make_olmoe_shape
    from bh_routing.rules.catalog import make_rule, rule_to_config

    model, tokenizer = make_olmoe_shape(torch.device("cuda"), torch.bfloat16)
    checkpoint = folder / "olmoe-shape"
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    rules = {
        "bh": make_rule({"method": "bh", "alpha": 0.05}),
        "fisher_mass": make_rule({"method": "fisher_mass", "threshold": 0.01}),
    }
    texts = packaged_documents("calibration")
    calibration = calibrate(model, tokenizer, texts, rules=list(rules.values()))
    paths = {"checkpoint": checkpoint}
    saved = calibration.save(folder / "calibration.safetensors")
    for name, rule in rules.items():
        batch = 16 if rule.unit == "step" else None
        search = KnobSearch(
            model, tokenizer, texts, calibration, batch_size=None, decode_batch=batch
        )
        (variant,) = variants_of({name: rule})
        (setting,) = search.find([Goal(variant=variant, budget=BUDGETS[name])])
        found = setting.rule
        content = {"rule": rule_to_config(found), "calibration": str(saved)}
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(content))
    return paths


def time_variant(checkpoint: str, batch: int, tokens: int, rounds: int) -> list[float]:
    """Return milliseconds per decode step of each round, in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint, dtype="bfloat16", max_model_len=1024, max_num_seqs=max(batch, 1),
        moe_backend="triton", enable_prefix_caching=False,
    )  # fmt: skip
    prompts: Any = [
        {"prompt_token_ids": [100 + 7 * i + j for j in range(32)]} for i in range(batch)
    ]

    def seconds(length: int) -> float:
        greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(prompts, greedy, use_tqdm=False)
        return time.perf_counter() - start

    seconds(tokens)
    # The difference of two lengths has neither prefill nor start-up in it.
    return [
        1e3 * (seconds(tokens) - seconds(tokens // 2)) / (tokens - tokens // 2)
        for _ in range(rounds)
    ]


def run_variant(name: str, paths: dict[str, Path], arguments: list[str]) -> list[float]:
    """Time a variant in a new process."""
    environment = {k: v for k, v in os.environ.items() if k != "BH_ROUTING_CONFIG"}
    environment["VLLM_PLUGINS"] = "" if name == "absent" else "bh_routing"
    if name in paths:
        environment["BH_ROUTING_CONFIG"] = str(paths[name])
    command = [sys.executable, __file__, "--checkpoint", str(paths["checkpoint"]), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--checkpoint", help="time this checkpoint in this process, and print")
    given = parser.parse_args()
    batches = [int(size) for size in given.batches.split(",")]
    if given.checkpoint:
        print(json.dumps(time_variant(given.checkpoint, batches[0], given.tokens, given.rounds)))
        return
    import torch

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = prepare(Path(folder))
        torch.cuda.empty_cache()
        for batch in batches:
            times: dict[str, list[float]] = {name: [] for name in VARIANTS}
            for _ in range(given.turns):
                for name in VARIANTS:
                    sizes = ["--tokens", str(given.tokens), "--rounds", str(given.rounds)]
                    times[name] += run_variant(name, paths, ["--batches", str(batch), *sizes])
            for name, values in times.items():
                row = {"batch": batch, "variant": name, "ms": values}
                row["median_ms"] = statistics.median(values)
                row["speed_up"] = statistics.median(times["inert"]) / statistics.median(values)
                rows.append(row)
                print(f"{batch:>4} {name:<12} {row['median_ms']:7.3f} ms  {row['speed_up']:.3f} x")
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.node(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
    }
    given.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
