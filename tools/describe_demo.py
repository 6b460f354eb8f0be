"""Measure the packaged demo model for its model card: print Markdown, draw the loss curve.

Reads the folder's checkpoint, training record, text files and labels.

    python tools/describe_demo.py src/bh_routing/demo
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM
from transformers import PreTrainedTokenizerBase as TokenizerBase

# Legend: T tokens, E experts, L layers, K slots.
END_OF_TEXT = "<|endoftext|>"
PROMPTS = (
    "The old man opened the door and",
    "The cell membrane is made of",
    "This function returns a list of",
)
GROUPS = ("textbook", "fiction", "documentation", "calibration", "evaluation", "all")
SMOOTHED_ROWS = 20


class Document(NamedTuple):
    """One held-out document with its labels."""

    split: str
    domain: str
    text: str


class Routers:
    """Running sums over tokens of router statistics, for all layers."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self.top_k = top_k
        self.num_tokens = 0
        self.load_LE = torch.zeros(num_layers, num_experts)
        self.entropy_L = torch.zeros(num_layers)
        self.weights_LK = torch.zeros(num_layers, top_k)

    def add(self, router_logits: tuple[torch.Tensor, ...]) -> None:
        """Add the tokens of one forward pass."""
        for layer, logits_TE in enumerate(router_logits):
            probabilities_TE = logits_TE.float().softmax(-1)
            weights_TK, index_TK = probabilities_TE.topk(self.top_k)
            counts_E = index_TK.flatten().bincount(minlength=logits_TE.shape[-1])
            self.load_LE[layer] += counts_E
            self.entropy_L[layer] += torch.special.entr(probabilities_TE).sum()
            self.weights_LK[layer] += weights_TK.sum(0)
        self.num_tokens += router_logits[0].shape[0]

    def table(self) -> str:
        """Render one row per layer; a load of 1 is even, entropies are fractions of ln E."""
        num_experts = self.load_LE.shape[1]
        lines = [
            "| Layer | Dead experts | Load, min to max | Load entropy | Token entropy "
            f"| Mean sorted top-{self.top_k} weights | Their sum |",
            "| ---: | ---: | ---: | ---: | ---: | --- | ---: |",
        ]
        for layer, load_E in enumerate(self.load_LE):
            relative_E = load_E * num_experts / load_E.sum()
            load_entropy = float(torch.special.entr(load_E / load_E.sum()).sum())
            token_entropy = float(self.entropy_L[layer]) / self.num_tokens
            weights_K = (self.weights_LK[layer] / self.num_tokens).tolist()
            lines.append(
                f"| {layer} | {int((load_E == 0).sum())} "
                f"| {relative_E.min():.2f} to {relative_E.max():.2f} "
                f"| {load_entropy / math.log(num_experts):.3f} "
                f"| {token_entropy / math.log(num_experts):.3f} "
                f"| {', '.join(f'{w:.3f}' for w in weights_K)} | {sum(weights_K):.3f} |"
            )
        return "\n".join(lines)


def read_documents(folder: Path) -> list[Document]:
    """Read the documents of both text files, with the labels of `documents.json`."""
    texts = {}
    for split in ("calibration", "evaluation"):
        with lzma.open(folder / f"{split}.txt.xz", "rt", encoding="utf-8") as file:
            texts[split] = file.read().split(f"\n{END_OF_TEXT}\n")
    labels = json.loads((folder / "documents.json").read_text("utf-8"))
    return [Document(x["split"], x["domain"], texts[x["split"]][x["index"]]) for x in labels]


@torch.no_grad()
def score(
    model: OlmoeForCausalLM, tokenizer: TokenizerBase, documents: list[Document], routers: Routers
) -> str:
    """Render nats per token by domain and split, in disjoint windows; updates `routers`."""
    nats: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    context = model.config.max_position_embeddings
    for document in documents:
        ids_T = torch.tensor(tokenizer.encode(END_OF_TEXT + document.text, verbose=False))
        for start in range(0, len(ids_T) - 1, context):
            window_T = ids_T[start : start + context + 1]
            out = model(window_T[None, :-1], use_cache=False, output_router_logits=True)
            routers.add(out.router_logits)
            loss = float(F.cross_entropy(out.logits[0], window_T[1:], reduction="sum"))
            for group in (document.domain, document.split, "all"):
                nats[group] += loss
                count[group] += len(window_T) - 1
    rows = [f"| {g} | {count[g]:,} | {nats[g] / count[g]:.3f} |" for g in GROUPS]
    return "\n".join(["| Text | Tokens | NLL, nats a token |", "| --- | ---: | ---: |", *rows])


def continuations(model: OlmoeForCausalLM, tokenizer: TokenizerBase, num_tokens: int) -> str:
    """Render greedy continuations of the prompts, with the prompts in bold."""
    lines = []
    for prompt in PROMPTS:
        inputs = tokenizer(END_OF_TEXT + prompt, return_tensors="pt")
        output = model.generate(  # type: ignore[misc]  # its mix-in declares self twice
            **inputs, max_new_tokens=num_tokens, do_sample=False
        )
        new_text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        quoted = f"**{prompt}**{new_text}".split("\n")
        lines.append("\n".join(f"> {line}".rstrip() for line in quoted))
    return "\n\n".join(lines)


def draw_loss_curve(training: dict, path: Path) -> None:  # type: ignore[type-arg]
    """Draw the training loss (running mean) and the held-out loss (as measured) on one axis."""
    curve = training["curve"]
    tokens = np.array([row["tokens"] for row in curve]) / 1e9
    kernel = np.ones(SMOOTHED_ROWS) / SMOOTHED_ROWS
    train = np.convolve([row["train_nll"] for row in curve], kernel, mode="valid")
    heldout = [(r["tokens"] / 1e9, r["heldout_nll"]) for r in curve if "heldout_nll" in r]
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    axes.plot(
        tokens[SMOOTHED_ROWS - 1 :], train, color="#4477aa", label="train, mean of 1,000 steps"
    )
    axes.plot(
        *zip(*heldout, strict=True), "o-", ms=3, color="#cc6633", label="held out, 16 documents"
    )
    final = training["heldout_nll"]
    axes.plot(tokens[-1], final, "D", color="black", label=f"held out, all 63: {final:.3f}")
    axes.set(
        xlabel="training tokens (billions)",
        ylabel="negative log-likelihood (nats a token)",
        ylim=(2.7, 4.1),
        xlim=(0, None),
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Print the measured parts of the model card and write `loss_curve.png`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--new-tokens", type=int, default=40)
    args = parser.parse_args()
    draw_loss_curve(
        json.loads((args.folder / "training.json").read_text()), args.folder / "loss_curve.png"
    )
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    config = model.config
    routers = Routers(config.num_hidden_layers, config.num_experts, config.num_experts_per_tok)
    print(score(model, tokenizer, read_documents(args.folder), routers), end="\n\n")
    print(routers.table(), end="\n\n")
    print(continuations(model, tokenizer, args.new_tokens))


if __name__ == "__main__":
    main()
