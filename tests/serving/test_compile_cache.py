"""Code that vLLM compiled for one rule lies in another folder than that of another rule.

vLLM 0.32 writes this cache on a CPU, but fails to read it: there, tokens alone would be right with
one folder for all rules.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bh_routing.models.load import LoadedModel
from bh_routing.models.routing import route
from bh_routing.rules.catalog import make_rule
from bh_routing.serving.config import VARIABLE
from tests.serving.conftest import continue_alone, environment, write_yaml

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1800)]

CODE = """
import json, sys
from vllm import LLM, SamplingParams
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
llm = LLM(sys.argv[1], dtype="float32", max_model_len=128, max_num_seqs=4)
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.parametrize(
    "counts", [(3, None), pytest.param((3, 5, None, 3), marks=pytest.mark.full)], ids=str
)
def test_a_start_after_a_change_of_rule_uses_the_cache_correctly(
    counts: tuple[int | None, ...],
    demo: LoadedModel,
    prompts: list[list[int]],
    checkpoint: str,
    tmp_path: Path,
) -> None:
    for number, count in enumerate(counts):
        variables = {"VLLM_CACHE_ROOT": str(tmp_path), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        rule = {"method": "top_k", "k": count or 8}
        if count is not None:
            config = write_yaml(tmp_path / f"{count}.yaml", {"rule": rule})
            variables[VARIABLE] = str(config)
        done = subprocess.run(
            [sys.executable, "-c", CODE, checkpoint, json.dumps(prompts[:2])],
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4_000:]
        line = next(each for each in done.stdout.splitlines() if each.startswith("TOKENS"))
        with route(demo.model, make_rule(rule)):
            wanted = [continue_alone(demo.model, ids, 16) for ids in prompts[:2]]
        assert json.loads(line.removeprefix("TOKENS")) == wanted
        folders = list((tmp_path / "torch_compile_cache" / "torch_aot_compile").iterdir())
        assert len(folders) == len(set(counts[: number + 1]))
