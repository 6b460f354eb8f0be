"""Models cut across processes by transformers are refused in one sentence.

Two processes over gloo, started by torchrun: slow, since each imports torch and transformers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch.distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from bh_routing.demo import demo_folder
from bh_routing.errors import ModelError
from bh_routing.models import find_routers

torch.distributed.init_process_group("gloo")
config = DistributedConfig(tp_plan="auto", enable_expert_parallel=sys.argv[1] == "expert")
model = AutoModelForCausalLM.from_pretrained(str(demo_folder()), distributed_config=config)
try:
    find_routers(model)
except ModelError as error:
    print(f"refused: {error}")
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ["tensor", "expert"])
def test_a_model_cut_across_processes_is_refused(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "cut.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), kind],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.stdout.count("refused: the model's experts are cut across processes") == 2, (
        done.stdout + done.stderr[-2000:]
    )
