"""Train the packaged demo model, a small OLMoE with 64 experts, 8 per token, or a relative of it.

The schedule follows the clock, not a step count, so the same command fits any accelerator: the
learning rate decays linearly to zero over `--total-seconds` of optimisation. A call ends
`--call-seconds` after its start and saves its state in `--state`; the same command resumes from
there. The checkpoint in `--output` is complete after every call.

    python -m tools.train_demo --corpus CORPUS --output OUT --state STATE --total-seconds 900

CORPUS holds text or the pieces of tools/demo_corpus.py. `--preset larger` has ten times as many
parameters, `renormalised` normalises the weights of a token's experts, and `sigmoid` has
MiniMax-M2's routers, which score by a sigmoid and select by score plus bias.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.demo_corpus import (
    HELDOUT,
    Tokens,
    encode,
    encode_shuffled,
    load_tokens,
    packaged_tokenizer,
    read_documents,
    text_of,
    train_tokenizer,
)
from tools.demo_recipes import (
    PRESETS,
    Loss,
    Recipe,
    build_model,
    correct_biases,
    correction_biases,
    make_loss,
)


def prepare_text(
    preset: str, corpus: Path, state: Path, recipe: Recipe
) -> tuple[PreTrainedTokenizerFast, Tokens]:
    """Return the tokenizer and the concatenated training tokens, cached in `state`.

    The demo trains its tokenizer; the other presets use the packaged one.
    """
    tokens_file = state / "tokens.npy"
    if tokens_file.exists():
        return PreTrainedTokenizerFast.from_pretrained(state / "tokenizer"), np.load(tokens_file)
    if preset == "demo":
        documents = text_of(corpus, "train")
        tokenizer = train_tokenizer(documents, recipe.vocabulary, recipe.context)
        flat = encode_shuffled(tokenizer, documents, recipe.seed)
    else:
        tokenizer = packaged_tokenizer()
        flat = load_tokens(corpus, recipe.texts, recipe.seed)
    tokenizer.save_pretrained(state / "tokenizer")
    np.save(tokens_file, flat)
    return tokenizer, flat


def compile_or_keep(loss: Loss, example_BS: Tensor) -> Loss:
    """Return the compiled loss, or the loss itself with a message if compilation fails."""
    compiled = torch.compile(loss)
    try:
        torch.autograd.backward(compiled(example_BS)[0])
    except RuntimeError as error:  # base of dynamo's and inductor's errors
        print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return loss
    return compiled


def batches(tokens: Tensor, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """Yield random windows endlessly: each epoch shifts the grid and visits every window once."""
    length = recipe.context + 1
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(length, device=tokens.device)
    while True:
        shift = int(torch.randint(recipe.context, (1,), generator=generator))
        starts = torch.arange(shift, tokens.numel() - length, recipe.context)
        starts = starts[torch.randperm(starts.numel(), generator=generator)].to(tokens.device)
        size = recipe.sequences_per_step
        for first in range(0, starts.numel() - size + 1, size):
            yield tokens[starts[first : first + size, None] + span].long()


def windows_of(documents: Sequence[Tokens], context: int) -> tuple[Tensor, Tensor]:
    """Cut documents into windows (W, S) of inputs and targets; targets after the end are -100."""
    rows = [d[i : i + context + 1] for d in documents for i in range(0, len(d) - 1, context)]
    inputs = torch.zeros(len(rows), context, dtype=torch.long)
    targets = torch.full_like(inputs, -100)
    for row, ids in enumerate(rows):
        window = torch.from_numpy(ids.astype(np.int64))
        inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = window[:-1], window[1:]
    return inputs, targets


@torch.no_grad()
def heldout_nll(model: Any, documents: Sequence[Tokens], context: int, batch: int) -> float:
    """Return mean nats per token over held-out documents without first tokens, in windows."""
    inputs, targets = (w.to(model.device) for w in windows_of(documents, context))
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for first in range(0, len(inputs), batch):
        logits = model(inputs[first : first + batch], use_cache=False).logits.float()
        expected = targets[first : first + batch].flatten()
        total += F.cross_entropy(logits.flatten(0, 1), expected, reduction="sum")
    return float(total) / int((targets >= 0).sum())


class MasterAdamW:
    """AdamW on float32 copies of bfloat16 weights, in which small updates would be lost."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.parameters = dict(model.named_parameters())
        self.biases = correction_biases(model)
        self.master = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        for tensor in self.master.values():
            tensor.requires_grad_(True)
        decay = [t for t in self.master.values() if t.ndim > 1]
        rest = [t for t in self.master.values() if t.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": recipe.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=recipe.peak_learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def step(self, learning_rate: float) -> None:
        for name, parameter in self.parameters.items():
            self.master[name].grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.master.values(), 1.0, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        torch._foreach_copy_(list(self.parameters.values()), list(self.master.values()))

    def tensors(self) -> dict[str, Tensor]:
        state = {f"master/{n}": t.detach() for n, t in self.master.items()}
        state |= {f"bias/{n}": t for n, t in self.biases.items()}
        for name, tensor in self.master.items():
            moments = self.optimizer.state[tensor]
            state[f"exp_avg/{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
            state[f"step/{name}"] = moments["step"].reshape(1)
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.biases.items():
            tensor.copy_(state[f"bias/{name}"])
        for name, tensor in self.master.items():
            tensor.copy_(state[f"master/{name}"])
            device = tensor.device
            self.optimizer.state[tensor] = {
                "step": state[f"step/{name}"].reshape(()).to(device),
                "exp_avg": state[f"exp_avg/{name}"].to(device),
                "exp_avg_sq": state[f"exp_avg_sq/{name}"].to(device),
            }
        self.write_back()


def learning_rate_at(progress: float, recipe: Recipe) -> float:
    """Return the learning rate: linear warm-up, then linear decay to zero at progress 1."""
    warm = min(1.0, progress / recipe.warmup_share)
    return recipe.peak_learning_rate * warm * max(0.0, 1.0 - progress)


def is_stalled(curve: Sequence[Mapping[str, float]], patience: int | None) -> bool:
    """Whether the last `patience` evaluations didn't improve on the best before them."""
    losses = [row["heldout_nll"] for row in curve if "heldout_nll" in row]
    return (
        patience is not None
        and bool(losses)
        and losses.index(min(losses)) < (len(losses) - patience)
    )


class Trainer:
    """Training loop with state that persists between calls."""

    def __init__(
        self, recipe: Recipe, model: Any, tokens: Tensor, heldout: Sequence[Tokens]
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.tokens = tokens
        self.heldout = heldout
        self.optimizer = MasterAdamW(model, recipe)
        self.tokens_per_step = recipe.sequences_per_step * recipe.context
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    def restore(self, folder: Path) -> None:
        saved = json.loads((folder / "progress.json").read_text())
        self.step, self.seconds, self.curve = saved["step"], saved["seconds"], saved["curve"]
        self.optimizer.restore(load_file(folder / "optimizer.safetensors"))

    def save(self, folder: Path) -> None:
        save_file(self.optimizer.tensors(), folder / "optimizer.safetensors")
        saved = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        (folder / "progress.json").write_text(json.dumps(saved))

    def run(self, total_seconds: float, deadline: float) -> None:
        """Optimise until the schedule, the call or progress ends; compilation time isn't counted.

        Args:
            total_seconds: length of the schedule.
            deadline: end of the call, on the clock of `time.monotonic`.
        """
        stream = batches(self.tokens, self.recipe, seed=self.recipe.seed + self.step)
        loss = make_loss(self.model, self.recipe)
        if self.tokens.is_cuda:
            loss = compile_or_keep(loss, next(stream))
            self.model.zero_grad()
        biases = list(self.optimizer.biases.values())
        start, before = time.monotonic(), self.seconds
        while not is_stalled(self.curve, self.recipe.patience):
            now = time.monotonic()
            progress = (before + now - start) / total_seconds
            if progress >= 1.0 or now >= deadline:
                break
            total, nll, loads_LE = loss(next(stream))
            torch.autograd.backward(total)
            self.optimizer.step(learning_rate_at(progress, self.recipe))
            correct_biases(biases, loads_LE, self.recipe.bias_rate) if biases else None
            self.step += 1
            if self.step % 50 == 0:
                self.seconds = before + time.monotonic() - start
                self.record(float(nll), loads_LE)
        self.seconds = before + time.monotonic() - start

    def record(self, train_nll: float, loads_LE: Tensor) -> None:
        if not math.isfinite(train_nll):
            raise SystemExit(f"loss is {train_nll} at step {self.step}")
        row = {
            "tokens": self.step * self.tokens_per_step,
            "train_nll": round(train_nll, 4),
            # Largest load of an expert relative to the mean, averaged over layers.
            "imbalance": round(float((loads_LE.amax(-1) / loads_LE.mean(-1)).mean()), 3),
        }
        if self.step % self.recipe.evaluate_every == 0:
            row["heldout_nll"] = round(self.evaluate(), 4)
            print(self.step, row, f"{row['tokens'] / self.seconds:,.0f} tokens/s", flush=True)
        self.curve.append(row)

    def evaluate(self) -> float:
        size = self.recipe.sequences_per_step
        return heldout_nll(self.model, self.heldout, self.recipe.context, size)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the checkpoint and its training record."""
        self.model.save_pretrained(folder, max_shard_size="12MB")
        tokenizer.save_pretrained(folder)
        on_cuda = self.tokens.is_cuda
        summary = {
            "recipe": asdict(self.recipe),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "tokens_seen": self.step * self.tokens_per_step,
            "corpus_tokens": self.tokens.numel(),
            "seconds": round(self.seconds, 1),
            "heldout_nll": round(self.evaluate(), 4),
            "stopped_early": is_stalled(self.curve, self.recipe.patience),
            "device": torch.cuda.get_device_name() if on_cuda else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(json.dumps(summary), flush=True)
        (folder / "training.json").write_text(json.dumps(summary | {"curve": self.curve}))


def main() -> None:
    """Train for one call, as described in the module's docstring."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with text or pieces")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--total-seconds", type=float, default=900.0)
    parser.add_argument("--call-seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = replace(PRESETS[args.preset], seed=args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.state.mkdir(parents=True, exist_ok=True)

    tokenizer, flat = prepare_text(args.preset, args.corpus, args.state, recipe)
    heldout = encode(tokenizer, read_documents(args.corpus / HELDOUT))
    print(f"{flat.size:,} tokens ready after {time.monotonic() - began:.0f} s", flush=True)
    tokens = torch.from_numpy(flat.astype(np.int32)).to(device)
    model = build_model(recipe, tokenizer).to(device)
    trainer = Trainer(recipe, model, tokens, heldout)
    if (args.state / "progress.json").exists():
        trainer.restore(args.state)
    trainer.run(args.total_seconds, began + args.call_seconds)
    trainer.save(args.state)
    trainer.export(args.output, tokenizer)
    print(f"done after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
