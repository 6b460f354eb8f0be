"""Architecture, settings and loss of the models that tools/train_demo.py trains.

Axes: T tokens, B batch, S sequence positions, E experts, K slots, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    MiniMaxM2Config,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Tokens (B, S) -> the loss to minimise, its language-model part in nats per token, and the number
# of tokens of each expert (L, E).
Loss = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
CORRECTION_BIAS = "e_score_correction_bias"


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
    family: Literal["olmoe", "minimax_m2"] = "olmoe"
    normalises: bool = False
    """Whether the weights of a token's experts sum to 1; `minimax_m2` always does so."""
    bias_rate: float = 0.0
    """Change of a correction bias per step (Wang et al. 2024, algorithm 1)."""
    texts: tuple[str, ...] = ("train",)
    evaluate_every: int = 1000
    """Steps between two evaluations on the held-out text."""
    patience: int | None = None
    """Evaluations without improvement that end the training; None: never."""


PRESETS: Mapping[str, Recipe] = {
    "demo": Recipe(),
    # 102 million parameters, 20 million of them used per token. The learning rate lies between the
    # demo's scaled by 1 / width (1.6e-3) and by its square root (2.5e-3). Few steps: a longer
    # share of them is warm-up.
    "larger": Recipe(
        hidden=320,
        expert_hidden=128,
        layers=12,
        heads=5,
        peak_learning_rate=2e-3,
        warmup_share=0.04,
        texts=("train", "more"),
        evaluate_every=250,
        patience=8,
    ),
    "renormalised": Recipe(normalises=True, evaluate_every=500, patience=8),
    # Balanced by the bias alone, at DeepSeek-V3's rate (2412.19437, 4.2).
    "sigmoid": Recipe(
        family="minimax_m2",
        normalises=True,
        load_balance=0.0,
        router_z=0.0,
        bias_rate=1e-3,
        evaluate_every=500,
        patience=8,
    ),
}


def configure(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Configure the recipe's family."""
    common: dict[str, Any] = {
        "vocab_size": recipe.vocabulary,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.expert_hidden,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_experts_per_tok": recipe.top_k,
        "tie_word_embeddings": True,
        "max_position_embeddings": recipe.context,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "router_aux_loss_coef": recipe.load_balance,
    }
    if recipe.family == "olmoe":
        return OlmoeConfig(num_experts=recipe.experts, norm_topk_prob=recipe.normalises, **common)
    return MiniMaxM2Config(
        num_local_experts=recipe.experts,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden // recipe.heads,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},  # as OLMoE's
        bos_token_id=None,
        **common,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Build a bfloat16 model with float32 rotary frequencies, as `from_pretrained` does."""
    torch.manual_seed(recipe.seed)
    # A name without a mask function: no mask tensor is built, so SDPA can run its causal flash
    # kernel under torch.compile too.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    model = AutoModelForCausalLM.from_config(
        configure(recipe, tokenizer), dtype=torch.bfloat16, attn_implementation="sdpa_causal"
    )
    for bias_E in correction_biases(model).values():
        # float32: a bfloat16 bias of 0.3 would not change by 1e-3.
        bias_E.data = bias_E.float()
    return model


def correction_biases(model: Any) -> dict[str, Tensor]:
    """The correction bias of each layer's router, by name; empty in a family without them."""
    return {n: b for n, b in model.named_buffers() if n.endswith(CORRECTION_BIAS)}


@torch.no_grad()
def correct_biases(biases: Sequence[Tensor], loads_LE: Tensor, rate: float) -> None:
    """Raise the bias of experts with less than the mean load, and lower that of the others."""
    signs_LE = (loads_LE.mean(-1, keepdim=True) - loads_LE).sign()
    for bias_E, sign_E in zip(biases, signs_LE, strict=True):
        bias_E += rate * sign_E


def count_load(scores_TE: Tensor, top_k: int) -> Tensor:
    """The number of tokens that select each expert, float32, shape (E,)."""
    index_TK = scores_TE.topk(top_k, dim=-1).indices
    return torch.zeros(scores_TE.shape[-1], device=scores_TE.device).scatter_add_(
        0, index_TK.flatten(), torch.ones_like(index_TK, dtype=torch.float32).flatten()
    )


def router_losses(logits_TE: Tensor, load_E: Tensor) -> tuple[Tensor, Tensor]:
    """Load-balance loss (Fedus et al. 2021, eq. 4, times k), z-loss (Zoph et al. 2022, eq. 5)."""
    num_tokens, num_experts = logits_TE.shape
    balance = num_experts * (load_E / num_tokens * logits_TE.softmax(-1).mean(0)).sum()
    return balance, logits_TE.logsumexp(-1).square().mean()


def make_loss(model: Any, recipe: Recipe) -> Loss:
    """Return the loss: cross-entropy plus the routers' two losses, averaged over layers."""
    biases = list(correction_biases(model).values())

    def loss(tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = model.model(tokens_BS[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state).float()
        nll = F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten())
        total = nll
        loads: list[Tensor] = []
        for layer, router_logits in enumerate(out.router_logits):
            logits_TE = router_logits.float()
            scores_TE = logits_TE.sigmoid() + biases[layer] if biases else logits_TE
            load_E = count_load(scores_TE, recipe.top_k)
            balance, z = router_losses(logits_TE, load_E)
            total = total + (recipe.load_balance * balance + recipe.router_z * z) / recipe.layers
            loads.append(load_E)
        return total, nll.detach(), torch.stack(loads)

    return loss
