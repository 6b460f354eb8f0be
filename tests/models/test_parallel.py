"""Models that transformers cuts across processes are routed as whole ones are.

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
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import bh_routing as bhr
from bh_routing.demo import demo_folder
from bh_routing.engine.texts import packaged_documents
from bh_routing.models import describe_model

torch.distributed.init_process_group("gloo")
RULES = [bhr.TopK(4), bhr.TopK(12), bhr.TopP(0.5), bhr.BenjaminiHochberg(alpha=0.05, max_k=8)]
RULES += [bhr.BenjaminiHochbergDrop(alpha=0.3)]
KINDS = {"tensor": {"tp_plan": "auto"}, "expert": {"tp_plan": "auto", "ep_size": 2}}

def load(**options):
    loaded = AutoModelForCausalLM.from_pretrained(
        str(demo_folder()), dtype=torch.float32, **options
    )
    return loaded.eval().requires_grad_(False)

whole, tokenizer = bhr.load_model("demo", device="cpu")
texts = [document.text for document in packaged_documents("calibration")]
ASKED = {"nulls": ("background", "needed_by_loss"), "max_tokens": 6_000}
calibration = bhr.calibrate(whole, tokenizer, texts, **ASKED)
ids = torch.randint(0, 8000, (2, 40), generator=torch.Generator().manual_seed(0))
for kind, options in KINDS.items():
    cut = load(distributed_config=DistributedConfig(**options))
    local = dict(cut.named_parameters())["model.layers.0.mlp.experts.down_proj"].to_local()
    assert local.numel() == 64 * 128 * 64 // 2, local.shape
    assert describe_model(cut).fingerprint == describe_model(whole).fingerprint
    same = bhr.calibrate(cut, tokenizer, texts, **ASKED)
    scores, expected = (
        made.table("background", 5).sorted_scores_N for made in (same, calibration)
    )
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    for rule in RULES:
        found = []
        for model in (whole, cut):
            with torch.no_grad(), bhr.route(model, rule, calibration) as trace:
                logits = model(ids).logits
                written = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
            found.append((logits, written, trace.expert_counts))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(found[0][1], found[1][1])
        assert torch.equal(found[0][2], found[1][2])
        mean = found[0][2].float().mean()
        assert rule.method == "top_k" or 1 < mean < 8, (rule, mean)
    print(f"routed: {kind};", flush=True)
"""


@pytest.mark.full
def test_models_cut_across_processes_are_routed_as_whole_ones_are(tmp_path: Path) -> None:
    script = tmp_path / "cut.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    for kind in ("tensor", "expert"):
        assert done.stdout.count(f"routed: {kind};") == 2, done.stdout + done.stderr[-3000:]
