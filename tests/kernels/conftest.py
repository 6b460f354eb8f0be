"""Where the kernels' tests run."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel can run: interpreted on a CPU, compiled on a GPU."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not find_spec("triton") or is_interpreted != (request.param == "cpu"):
        pytest.skip("needs Triton: with TRITON_INTERPRET=1 on a CPU, without it on a GPU")
    return str(request.param)
