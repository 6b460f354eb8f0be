"""Save a model of the full OLMoE-1B-7B shape with random weights and the demo's tokenizer.

For measuring speed and memory where the real checkpoint can't be downloaded: the shape is that of
allenai/OLMoE-1B-7B-0924, the generated text is noise. About 14 GB on disk in bfloat16.

    python tools/make_olmoe_shape.py --output OLMOE_SHAPE
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bh_routing.models.shapes import make_olmoe_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16, help="fewer for a small trial")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = make_olmoe_shape(
        device, torch.bfloat16, num_layers=args.layers, seed=args.seed
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.output}")


if __name__ == "__main__":
    main()
