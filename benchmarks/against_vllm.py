"""Time our decode steps and vLLM's by turns, on the same weights, on one GPU.

    python -m benchmarks.against_vllm --checkpoint FOLDER [--output against_vllm.txt]

Needs this package and vLLM. The checkpoint is made if the folder doesn't exist, of OLMoE-1B-7B's
shape with random weights. Each side is a process that loads the model once and then times a batch
whenever it is asked, so rounds alternate while all are loaded: our engine with top-8, top-4 and BH
at a mean of 4 experts; vLLM with top-8; vLLM with top-4 in its configuration. Times are of 100
tokens per sequence after a prompt of 128, without prefill: in vLLM the difference between
`generate` of many tokens and of one, in our engine the events of its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, Final

PROMPT_TOKENS: Final = 128
OURS: Final = "ours"
VLLM_TOP_K: Final = {"vLLM, top-8": 8, "vLLM, top-4": 4}

Measure = Callable[[int], dict[str, float]]
"""Batch size -> milliseconds per decode step by contender."""


def random_prompts(batch: int, vocabulary: int) -> list[list[int]]:
    """Draw prompts; the same on both sides."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (batch, PROMPT_TOKENS)
    prompts: list[list[int]] = torch.randint(2, vocabulary, shape, generator=generator).tolist()
    return prompts


def our_side(checkpoint: str, tokens: int, device: str) -> Measure:
    """Load the model into our engine."""
    import torch

    from bh_routing.engine.decode import decode_greedily, engine_of
    from bh_routing.experiments.bench import rule_at_mean
    from bh_routing.models.load import load_model
    from bh_routing.rules import Rule, TopK

    model, _ = load_model(checkpoint, device=device)
    engine, rules = engine_of(model), {}
    top_k = model.config.num_experts_per_tok

    @torch.inference_mode()
    def measure(batch: int) -> dict[str, float]:
        prompts = random_prompts(batch, model.config.vocab_size)

        def mean_of(rule: Rule) -> float:
            traces = decode_greedily(model, prompts, rule, max_new_tokens=tokens).traces
            counts = [trace.expert_counts[PROMPT_TOKENS:].float().mean() for trace in traces]
            return float(torch.stack(counts).mean())

        if batch not in rules:
            bh = rule_at_mean(mean_of, top_k / 2, top_k)
            own, half = TopK(top_k), TopK(top_k // 2)
            rules[batch] = {f"top-{own.k}": own, f"top-{half.k}": half, f"BH at {half.k}": bh}
        found = {}
        for name, rule in rules[batch].items():
            bound = engine.bind(model, rule, None)
            session = engine.session(bound, batch, PROMPT_TOKENS + tokens, PROMPT_TOKENS)
            session.start(prompts)
            seconds = session.run(tokens - 1).seconds
            found[f"{OURS}, {name}"] = 1000 * seconds / (tokens - 1)
        return found

    return measure


def vllm_side(checkpoint: str, tokens: int, name: str, batches: list[int]) -> Measure:
    """Load the model into vLLM, with `name`'s experts per token."""
    from vllm import LLM, SamplingParams

    most = max(batches)
    llm = LLM(
        model=checkpoint,
        max_model_len=PROMPT_TOKENS + tokens,
        max_num_seqs=most,
        max_num_batched_tokens=most * (PROMPT_TOKENS + tokens),
        enable_prefix_caching=False,
        # Others use the GPU as well, so its free memory says nothing.
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=4 << 30,
        compilation_config={"cudagraph_capture_sizes": batches},
        hf_overrides={"num_experts_per_tok": VLLM_TOP_K[name]},
    )
    vocabulary = llm.get_tokenizer().vocab_size

    def seconds(prompts: Any, length: int) -> float:
        greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, greedy, use_tqdm=False)
        return time.perf_counter() - start

    def measure(batch: int) -> dict[str, float]:
        prompts: Any = [{"prompt_token_ids": ids} for ids in random_prompts(batch, vocabulary)]
        steps = seconds(prompts, tokens) - seconds(prompts, 1)
        return {name: 1000 * steps / (tokens - 1)}

    return measure


def serve(measure: Measure, out: Any) -> None:
    """Answer each line of stdin, a batch size, with a line of JSON."""
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(int(line))), file=out, flush=True)


@contextmanager
def side(name: str, given: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    """Start the process of one side."""
    command = [sys.executable, "-m", "benchmarks.against_vllm", "--side", name]
    command += ["--checkpoint", str(given.checkpoint), "--tokens", str(given.tokens)]
    command += ["--batches", given.batches, "--device", given.device]
    environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(process: subprocess.Popen[str], batch: int | None) -> Any:
    """Send a batch size unless None, and return the next answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    if batch is not None:
        process.stdin.write(f"{batch}\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith(("{", '"ready"')):
            return json.loads(line)
    raise SystemExit(f"{process.args} ended with exit code {process.wait()}")


def compare(given: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the table."""
    batches = [int(batch) for batch in given.batches.split(",")]
    # On a CPU the distribution has another name.
    names = ("torch", "transformers", packages_distributions()["vllm"][0])
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    yield f"{time.strftime('%Y-%m-%d')}, {given.machine}, {versions}, {given.rounds} rounds"
    yield "batch  contender       ms per step (fastest, slowest)   vLLM's top-8 over it"
    with ExitStack() as stack:
        sides = (OURS, *VLLM_TOP_K)
        processes = [stack.enter_context(side(name, given)) for name in sides]
        for process in processes:
            ask(process, None)
        for batch in batches:
            times: dict[str, list[float]] = {}
            for round_ in range(given.rounds + 1):
                for process in processes:
                    for name, milliseconds in ask(process, batch).items():
                        if round_:  # the first one warms up
                            times.setdefault(name, []).append(milliseconds)
            reference = statistics.median(times["vLLM, top-8"])
            for name, values in times.items():
                median = statistics.median(values)
                spread = f"({min(values):.3f}, {max(values):.3f})"
                yield f"{batch:5}  {name:14} {median:8.3f} {spread:22} {reference / median:8.2f}"


def main() -> None:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--machine", default="")
    parser.add_argument("--side", choices=(OURS, *VLLM_TOP_K), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is None:
        if not given.checkpoint.exists():
            # In a process of its own, which leaves the device's memory to the sides.
            command = [sys.executable, "tools/make_olmoe_shape.py", "--output", given.checkpoint]
            subprocess.run(command, check=True)
        lines = []
        for line in compare(given):
            print(line, flush=True)
            lines.append(line)
        if given.output:
            given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    # Libraries print to stdout: answers keep it to themselves.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    checkpoint = str(given.checkpoint)
    if given.side == OURS:
        serve(our_side(checkpoint, given.tokens, given.device), out)
    else:
        batches = [int(batch) for batch in given.batches.split(",")]
        serve(vllm_side(checkpoint, given.tokens, given.side, batches), out)


if __name__ == "__main__":
    main()
