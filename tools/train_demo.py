"""Train the packaged demo model: a small OLMoE with 64 experts, 8 per token.

The schedule follows the clock, not a step count, so the same command fits any accelerator: the
learning rate decays linearly to zero over `--total-seconds` of optimisation. A call ends after
`--call-seconds` and saves its state in `--state`; the same command resumes from there. The
checkpoint in `--output` is complete after every call.

    python tools/train_demo.py --corpus CORPUS --output OUT --state STATE --total-seconds 900
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

# Tokens (B, S) -> the loss to minimise and its language-model part, in nats per token.
Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Architecture and training settings, saved with the checkpoint."""

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
    """The documents of one file, which a line END_OF_TEXT separates."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [d.strip() for d in file.read().split(f"\n{END_OF_TEXT}\n") if d.strip()]


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of the recipe's vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every third document is enough: merges of an 8k vocabulary are stable long before that.
    tokenizer.train_from_iterator((d[:200_000] for d in documents[::3]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[np.ndarray]:
    """Tokenize each document, with END_OF_TEXT prepended as in evaluation."""
    eos = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    for start in range(0, len(documents), 256):
        batch = tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + 256])
        pieces += [np.array([eos, *e.ids], dtype=np.uint16) for e in batch]
    return pieces


def load_tokens(
    corpus: Path, state: Path, recipe: Recipe
) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Return the tokenizer and the concatenated training tokens, cached in `state`."""
    tokens_file = state / "tokens.npy"
    if tokens_file.exists():
        return PreTrainedTokenizerFast.from_pretrained(state / "tokenizer"), np.load(tokens_file)
    documents = read_documents(corpus / "train.txt.xz")
    tokenizer = train_tokenizer(documents, recipe)
    tokenizer.save_pretrained(state / "tokenizer")
    order = np.random.default_rng(recipe.seed).permutation(len(documents))
    flat = np.concatenate(encode(tokenizer, [documents[i] for i in order]))
    np.save(tokens_file, flat)
    return tokenizer, flat


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """Build a bfloat16 model with float32 rotary frequencies, as `from_pretrained` does."""
    torch.manual_seed(recipe.seed)
    # A name without a mask function: no mask tensor is built, so SDPA can run its causal flash
    # kernel under torch.compile too.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
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
    model: OlmoeForCausalLM = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa_causal"
    )
    return model


def router_losses(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Load-balance loss (Fedus et al. 2021, eq. 4, times k), z-loss (Zoph et al. 2022, eq. 5)."""
    logits_TE = logits_TE.float()
    num_experts = logits_TE.shape[-1]
    index_TK = logits_TE.topk(top_k, dim=-1).indices
    counts_E = torch.zeros(num_experts, device=logits_TE.device).scatter_add_(
        0, index_TK.flatten(), torch.ones_like(index_TK, dtype=torch.float32).flatten()
    )
    fraction_E = counts_E / logits_TE.shape[0]
    balance = num_experts * (fraction_E * logits_TE.softmax(-1).mean(0)).sum()
    return balance, logits_TE.logsumexp(-1).square().mean()


def make_loss(model: OlmoeForCausalLM, recipe: Recipe) -> Loss:
    """Return the loss: cross-entropy plus the routers' two losses, averaged over layers."""

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


def compile_or_keep(loss: Loss, example_BS: torch.Tensor) -> Loss:
    """Return the compiled loss, or the loss itself with a message if compilation fails."""
    compiled = torch.compile(loss)
    try:
        torch.autograd.backward(compiled(example_BS)[0])
    except RuntimeError as error:  # base of dynamo's and inductor's errors
        print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return loss
    return compiled


def batches(tokens: torch.Tensor, recipe: Recipe, seed: int) -> Iterator[torch.Tensor]:
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


@torch.no_grad()
def heldout_nll(model: OlmoeForCausalLM, documents: list[np.ndarray], context: int) -> float:
    """Return mean nats per token over held-out documents without first tokens, in windows."""
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
    """AdamW on float32 copies of bfloat16 weights, in which small updates would be lost."""

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
    """Return the learning rate: linear warm-up, then linear decay to zero at progress 1."""
    warm = min(1.0, progress / recipe.warmup_share)
    return recipe.peak_learning_rate * warm * max(0.0, 1.0 - progress)


class Trainer:
    """Training loop with state that persists between calls."""

    def __init__(
        self,
        recipe: Recipe,
        model: OlmoeForCausalLM,
        tokens: torch.Tensor,
        heldout: list[np.ndarray],
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

    def run(self, total_seconds: float, call_seconds: float) -> None:
        """Optimise until the schedule or the call ends; compilation time isn't counted."""
        stream = batches(self.tokens, self.recipe, seed=self.recipe.seed + self.step)
        loss = make_loss(self.model, self.recipe)
        if self.tokens.is_cuda:
            loss = compile_or_keep(loss, next(stream))
            self.model.zero_grad()
        start, before = time.monotonic(), self.seconds
        while True:
            elapsed = time.monotonic() - start
            progress = (before + elapsed) / total_seconds
            if progress >= 1.0 or elapsed >= call_seconds:
                break
            total, nll = loss(next(stream))
            torch.autograd.backward(total)
            self.optimizer.step(learning_rate_at(progress, self.recipe))
            self.step += 1
            if self.step % 50 == 0:
                self.seconds = before + time.monotonic() - start
                self.record(float(nll))
        self.seconds = before + time.monotonic() - start

    def record(self, train_nll: float) -> None:
        if not math.isfinite(train_nll):
            raise SystemExit(f"loss is {train_nll} at step {self.step}")
        row = {"tokens": self.step * self.tokens_per_step, "train_nll": round(train_nll, 4)}
        if self.step % 1000 == 0:
            nll = heldout_nll(self.model, self.heldout[::4], self.recipe.context)
            row["heldout_nll"] = round(nll, 4)
            print(self.step, row, f"{row['tokens'] / self.seconds:,.0f} tokens/s", flush=True)
        self.curve.append(row)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the checkpoint and its training record."""
        self.model.save_pretrained(folder, max_shard_size="12MB")
        tokenizer.save_pretrained(folder)
        on_cuda = self.tokens.is_cuda
        summary = {
            "recipe": asdict(self.recipe),
            "steps": self.step,
            "tokens_seen": self.step * self.tokens_per_step,
            "corpus_tokens": self.tokens.numel(),
            "seconds": round(self.seconds, 1),
            "heldout_nll": round(heldout_nll(self.model, self.heldout, self.recipe.context), 4),
            "device": torch.cuda.get_device_name() if on_cuda else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        print(json.dumps(summary), flush=True)
        (folder / "training.json").write_text(json.dumps(summary | {"curve": self.curve}))


def main() -> None:
    """Train for one call, as described in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with *.txt.xz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--total-seconds", type=float, default=900.0)
    parser.add_argument("--call-seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = Recipe(seed=args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.state.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    tokenizer, flat = load_tokens(args.corpus, args.state, recipe)
    heldout = encode(tokenizer, read_documents(args.corpus / "heldout.txt.xz"))
    print(f"{flat.size:,} tokens ready after {time.monotonic() - began:.0f} s", flush=True)
    tokens = torch.from_numpy(flat.astype(np.int32)).to(device)
    model = build_model(recipe, tokenizer)
    model.to(device)  # type: ignore[arg-type]  # its wrapper hides the types of Module.to
    trainer = Trainer(recipe, model, tokens, heldout)
    if (args.state / "progress.json").exists():
        trainer.restore(args.state)
    trainer.run(args.total_seconds, args.call_seconds)
    trainer.save(args.state)
    trainer.export(args.output, tokenizer)
    print(f"done after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
