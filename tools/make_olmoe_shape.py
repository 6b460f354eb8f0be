"""Save a model of the full OLMoE-1B-7B shape with random weights and the demo's tokenizer.

For measuring speed and memory where the real checkpoint can't be downloaded: the shape is that of
allenai/OLMoE-1B-7B-0924, the text it writes is noise. About 14 GB on disk in bfloat16.

    python tools/make_olmoe_shape.py --output OLMOE_SHAPE
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from bh_routing.demo import demo_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16, help="fewer for a small trial")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    config = OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = OlmoeForCausalLM(config)
    # The embedding's row of the padding token must stay zero for save and load to agree.
    model.generation_config.do_sample = False
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.output}")


if __name__ == "__main__":
    main()
