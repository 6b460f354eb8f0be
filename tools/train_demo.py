"""Train the packaged demo model: a small OLMoE with 64 experts, 8 of them for each token.

The schedule follows the clock, not a step count, so the same command fits any accelerator: the
learning rate decays linearly to zero over `--total-seconds` of optimisation. A call ends after
`--call-seconds`, leaves its state in `--state`, and the same command goes on from there. The
checkpoint in `--output` is complete after every call.

    python tools/train_demo.py --corpus CORPUS --output OUT --state STATE --total-seconds 900
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What was trained, and how; written beside the checkpoint."""

    seed: int = 0
    vocabulary: int = 8192
    hidden: int = 128
    expert_hidden: int = 64
    layers: int = 6
    heads: int = 4
    experts: int = 64
    top_k: int = 8
    context: int = 1024
    sequences_per_step: int = 48
    peak_learning_rate: float = 4e-3
    warmup_share: float = 0.02
    weight_decay: float = 0.1
    load_balance: float = 0.01
    router_z: float = 0.001


def read_documents(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [d.strip() for d in file.read().split(f"\n{END_OF_TEXT}\n") if d.strip()]


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every third document: merges of an 8k vocabulary are stable long before that.
    tokenizer.train_from_iterator((d[:200_000] for d in documents[::3]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[np.ndarray]:
    """Token ids of each document, END_OF_TEXT in front: it marks a beginning, as in evaluation."""
    eos = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), 256):
        batch = tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + 256])
        pieces += [np.array([eos, *e.ids], dtype=np.uint16) for e in batch]
    return pieces


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    torch.manual_seed(recipe.seed)
    config = OlmoeConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.expert_hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        max_position_embeddings=recipe.context,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        router_aux_loss_coef=recipe.load_balance,
    )
    return OlmoeForCausalLM(config)


def router_losses(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Load-balance loss (Fedus et al. 2021, eq. 4, times k) and z-loss (Zoph et al. 2022, eq. 5)."""
    logits_TE = logits_TE.float()
    num_experts = logits_TE.shape[-1]
    index_TK = logits_TE.topk(top_k, dim=-1).indices
    counts_E = torch.zeros(num_experts, device=logits_TE.device).scatter_add_(
        0, index_TK.flatten(), torch.ones_like(index_TK, dtype=torch.float32).flatten()
    )
    share_E = counts_E / logits_TE.shape[0]
    balance = num_experts * (share_E * logits_TE.softmax(-1).mean(0)).sum()
    return balance, logits_TE.logsumexp(-1).square().mean()


def make_loss(model: OlmoeForCausalLM, recipe: Recipe):  # type: ignore[no-untyped-def]
    def loss(tokens_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = model.model(tokens_BS[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state).float()
        nll = F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
        total = nll
        for logits_TE in out.router_logits:
            balance, z = router_losses(logits_TE, recipe.top_k)
            total = total + (recipe.load_balance * balance + recipe.router_z * z) / recipe.layers
        return total, nll.detach()

    return loss


def batches(tokens: torch.Tensor, recipe: Recipe, seed: int) -> Iterator[torch.Tensor]:
    """Endless random windows: each epoch shifts the grid, then visits every window once."""
    length = recipe.context + 1
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(length, device=tokens.device)
    while True:
        shift = int(torch.randint(recipe.context, (1,), generator=generator))
        starts = torch.arange(shift, tokens.numel() - length, recipe.context)
        starts = starts[torch.randperm(starts.numel(), generator=generator)].to(tokens.device)
        for chunk in starts.split(recipe.sequences_per_step):
            if chunk.numel() == recipe.sequences_per_step:
                yield tokens[chunk[:, None] + span].long()


@torch.no_grad()
def heldout_nll(model: OlmoeForCausalLM, documents: list[np.ndarray], context: int) -> float:
    """Mean nats a token over held-out documents, disjoint windows, first token of each given."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for ids in documents:
        for start in range(0, len(ids) - 1, context):
            window = torch.from_numpy(ids[start : start + context + 1].astype(np.int64)).to(device)
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            count += window.numel() - 1
    return total / count


class MasterAdamW:
    """AdamW on float32 copies of bfloat16 weights, which alone would swallow small updates."""

    def __init__(self, model: OlmoeForCausalLM, recipe: Recipe) -> None:
        self.parameters = dict(model.named_parameters())
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
            self.master[name].grad = parameter.grad.float()  # type: ignore[union-attr]
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.master.values(), 1.0, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        torch._foreach_copy_(list(self.parameters.values()), list(self.master.values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {f"master/{n}": t.detach() for n, t in self.master.items()}
        for name, tensor in self.master.items():
            moments = self.optimizer.state[tensor]
            state[f"exp_avg/{name}"] = moments["exp_avg"]
            state[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
            state[f"step/{name}"] = moments["step"].reshape(1)
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor]) -> None:
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
    warm = min(1.0, progress / recipe.warmup_share)
    return recipe.peak_learning_rate * warm * max(0.0, 1.0 - progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--corpus", type=Path, required=True, help="folder with *.txt.xz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--total-seconds", type=float, default=900.0)
    parser.add_argument("--call-seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = Recipe(seed=args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.state.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    heldout_text = read_documents(args.corpus / "heldout.txt.xz")
    tokens_file = args.state / "tokens.npy"
    if tokens_file.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.state / "tokenizer")
        flat = np.load(tokens_file)
    else:
        train_text = read_documents(args.corpus / "train.txt.xz")
        tokenizer = train_tokenizer(train_text, recipe)
        tokenizer.save_pretrained(args.state / "tokenizer")
        order = np.random.default_rng(recipe.seed).permutation(len(train_text))
        flat = np.concatenate(encode(tokenizer, [train_text[i] for i in order]))
        np.save(tokens_file, flat)
    heldout = encode(tokenizer, heldout_text)
    tokens = torch.from_numpy(flat.astype(np.int32)).to(device)
    print(f"{flat.size:,} tokens ready after {time.monotonic() - began:.0f} s", flush=True)

    model = build_model(recipe, tokenizer).to(device, torch.bfloat16)
    optimizer = MasterAdamW(model, recipe)
    state = {"step": 0, "seconds": 0.0, "curve": []}
    if (args.state / "state.json").exists():
        state = json.loads((args.state / "state.json").read_text())
        optimizer.restore(load_file(args.state / "optimizer.safetensors"))
    loss = torch.compile(make_loss(model, recipe)) if device == "cuda" else make_loss(model, recipe)
    stream = batches(tokens, recipe, seed=recipe.seed + state["step"])
    loss(next(stream))[0].backward()  # compile before the clock starts
    for parameter in model.parameters():
        parameter.grad = None
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)

    tokens_per_step = recipe.sequences_per_step * recipe.context
    start, before = time.monotonic(), state["seconds"]
    while True:
        elapsed = time.monotonic() - start
        progress = (before + elapsed) / args.total_seconds
        if progress >= 1.0 or elapsed >= args.call_seconds:
            break
        total, nll = loss(next(stream))
        total.backward()
        optimizer.step(learning_rate_at(progress, recipe))
        state["step"] += 1
        if state["step"] % 50 == 0:
            row = {"tokens": state["step"] * tokens_per_step, "train_nll": round(float(nll), 4)}
            if state["step"] % 2000 == 0:
                row["heldout_nll"] = round(heldout_nll(model, heldout[::4], recipe.context), 4)
            state["curve"].append(row)
            if not math.isfinite(row["train_nll"]):
                raise SystemExit(f"loss is {row['train_nll']} at step {state['step']}")
            if state["step"] % 1000 == 0:
                rate = row["tokens"] / (before + time.monotonic() - start)
                print(state["step"], row, f"{rate:,.0f} tokens/s", flush=True)
    state["seconds"] = before + time.monotonic() - start

    save_file(optimizer.tensors(), args.state / "optimizer.safetensors")
    (args.state / "state.json").write_text(json.dumps(state))
    model.generation_config.do_sample = False
    model.save_pretrained(args.output, max_shard_size="12MB")
    tokenizer.save_pretrained(args.output)
    final = heldout_nll(model, heldout, recipe.context)
    summary = {
        "recipe": asdict(recipe),
        "tokens_seen": state["step"] * tokens_per_step,
        "corpus_tokens": int(flat.size),
        "seconds": round(state["seconds"], 1),
        "heldout_nll": round(final, 4),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    (args.output / "training.json").write_text(json.dumps(summary | {"curve": state["curve"]}))
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
