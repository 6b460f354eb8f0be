"""The norm of each slot's expert output, in every family."""

from __future__ import annotations

import pytest
import torch

from bh_routing.errors import ModelError
from bh_routing.models.capture import text_config
from bh_routing.models.experts import slot_output_norms
from bh_routing.models.routers import find_routers
from tests.families.zoo import family_names, tiny_model


@pytest.mark.parametrize("family", family_names())
def test_a_slots_norm_is_that_of_its_expert_alone(family: str) -> None:
    model = tiny_model(family)
    try:
        site = find_routers(model).sites[0]
    except ModelError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    hidden_size = text_config(model).hidden_size
    hidden_TH = torch.randn(3, hidden_size, generator=generator)
    index_TK = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 3, 0]])
    norms_TK = slot_output_norms(site.experts, hidden_TH, index_TK, torch.float32)
    for slot in range(3):
        weights_TK = torch.zeros(3, 3)
        weights_TK[:, slot] = 1.0
        alone = site.experts.forward(hidden_TH, index_TK, weights_TK)
        alone_T = alone.reshape(3, -1).norm(dim=-1)  # DBRX has an axis more
        torch.testing.assert_close(norms_TK[:, slot], alone_T, rtol=1e-4, atol=1e-6)
