"""vLLM's engine in the test process: the plugin, scheduler and runner of a server, without HTTP."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bh_routing.serving.config import VARIABLE
from tests.serving.conftest import ENVIRONMENT


@contextmanager
def engine(config: Path | None, checkpoint: str, **options: Any) -> Iterator[Any]:
    """Yield a vLLM `LLM` of a checkpoint under a configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.delenv(VARIABLE, raising=False)
        if config is not None:
            patch.setenv(VARIABLE, str(config))
        # Read when vLLM is imported.
        from vllm import LLM

        settings = {
            "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 32,
            "disable_log_stats": True, **options,
        }  # fmt: skip
        llm = LLM(model=checkpoint, **settings)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
    assert VARIABLE not in os.environ or config is None


def complete(llm: Any, prompts: Sequence[list[int]], max_tokens: int = 24) -> list[list[int]]:
    """Continue prompts at the same time, greedily."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
