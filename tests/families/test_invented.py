"""A family that nobody has heard of works without a change, if it follows the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import CausalLMOutput

from tests.families.checks import CHECKS, Check, Subject
from tests.families.zoo import VOCABULARY


class MeadowConfig(PreTrainedConfig):
    model_type = "meadow"
    hidden_size: int = 32
    num_hidden_layers: int = 2
    vocab_size: int = VOCABULARY
    num_flowers: int = 12
    flowers_per_token: int = 4


@use_experts_implementation
class MeadowExperts(nn.Module):
    def __init__(self, config: MeadowConfig) -> None:
        super().__init__()
        self.num_experts = config.num_flowers
        self.gate_up_proj = nn.Parameter(torch.randn(config.num_flowers, 32, 32) / 4)
        self.down_proj = nn.Parameter(torch.randn(config.num_flowers, 32, 16) / 4)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        mixed_TH = torch.zeros_like(hidden_TH)
        for expert in index_TK.unique().tolist():
            token_S, slot_S = (index_TK == expert).nonzero(as_tuple=True)
            gate_SF, up_SF = (hidden_TH[token_S] @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
            output_SH = (self.act_fn(gate_SF) * up_SF) @ self.down_proj[expert].T
            mixed_TH.index_add_(0, token_S, output_SH * weights_TK[token_S, slot_S, None])
        return mixed_TH


class MeadowRouter(nn.Module):
    """Sigmoid scores, a bias for the selection only, normalised weights on a scale of 1.5."""

    season: Tensor

    def __init__(self, config: MeadowConfig) -> None:
        super().__init__()
        self.blooming = config.flowers_per_token
        self.weight = nn.Parameter(torch.randn(config.num_flowers, config.hidden_size) / 3)
        self.register_buffer("season", torch.randn(config.num_flowers) / 10)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = hidden_TH @ self.weight.T
        scores_TE = logits_TE.sigmoid()
        index_TK = (scores_TE + self.season).topk(self.blooming, sorted=False).indices
        weights_TK = scores_TE.gather(-1, index_TK)
        return logits_TE, 1.5 * weights_TK / weights_TK.sum(-1, keepdim=True), index_TK


class MeadowLayer(nn.Module):
    def __init__(self, config: MeadowConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size)
        self.router = MeadowRouter(config)
        self.experts = MeadowExperts(config)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        normed_TH = self.norm(hidden_BSH).flatten(0, 1)
        _, weights_TK, index_TK = self.router(normed_TH)
        mixed_TH: Tensor = self.experts(normed_TH, index_TK, weights_TK)
        return hidden_BSH + mixed_TH.view_as(hidden_BSH)


class MeadowForCausalLM(PreTrainedModel):
    config_class = MeadowConfig

    def __init__(self, config: MeadowConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MeadowLayer(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """What the modules drew for themselves stays."""

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        hidden_BSH = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH)
        return CausalLMOutput(logits=self.lm_head(hidden_BSH))


def meadow(top_k: int = 4) -> Any:
    torch.manual_seed(0)
    model: Any = MeadowForCausalLM(MeadowConfig(flowers_per_token=top_k))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_an_invented_family_works_without_a_change(check: Check) -> None:
    check(Subject(model=meadow(), with_top_k=meadow))
