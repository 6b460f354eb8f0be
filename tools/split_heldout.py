"""Split the held-out documents into the demo's calibration and evaluation text.

The corpus doesn't record the source of a document, so the table below identifies it by the first
line; its counts are checked against the corpus's own list of sources. One third of each domain's
documents is for calibration, two thirds for evaluation.

    python tools/split_heldout.py --heldout heldout.txt.xz --sources SOURCES.md --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
CALIBRATION_SHARE = 1 / 3
GUTENBERG = "Project Gutenberg books, by way of rcdm-uga/Gutenberg_Text"

# Source, as named in the corpus's list -> beginnings of its held-out documents' first lines.
TITLES: dict[str, tuple[str, ...]] = {
    "openstax/osbooks-anatomy-physiology": (
        "The Endocrine Pancreas",
        "Diseases Associated with Depressed or Overactive Immune Responses",
    ),
    "openstax/osbooks-astronomy": ("Spacetime and Gravity",),
    "openstax/osbooks-college-algebra-bundle": ("Continuity",),
    "openstax/osbooks-college-physics-bundle": ("RL Circuits",),
    "openstax/osbooks-entrepreneurship": ("Conducting a Feasibility Analysis",),
    "openstax/osbooks-introduction-philosophy": ("Forms of Government",),
    "openstax/osbooks-introduction-political-science": (
        "Due Process and Judicial Fairness",
        "From the 1990s to the 2020s: Current Issues in IPE",
    ),
    "openstax/osbooks-introductory-statistics-bundle": ("Confidence Interval (Women's Heights)",),
    "openstax/osbooks-life-liberty-and-pursuit-happiness": (
        "Industry and Immigration in the Gilded Age",
    ),
    "openstax/osbooks-microbiology": ("Visualizing and Characterizing DNA, RNA, and Protein",),
    "openstax/osbooks-nursing-external-bundle": (
        "Theories and Models to Guide Program Planning",
        "Refugees",
    ),
    "openstax/osbooks-prealgebra-bundle": (
        "Solve Proportion and Similar Figure Applications",
        "Special Products",
    ),
    "openstax/osbooks-principles-economics-bundle": (
        "The Building Blocks of Neoclassical Analysis",
        "Shifts in Demand and Supply for Goods and Services",
        "The Benefits of Reducing Barriers to International Trade",
    ),
    "openstax/osbooks-principles-finance": ("Why It Matters",),
    "openstax/osbooks-principles-of-management-bundle": (
        "Substitutes for and Neutralizers of Leadership",
    ),
    "openstax/osbooks-psychology": ("Prosocial Behavior",),
    "openstax/osbooks-university-physics-bundle": (
        "Magnetic Fields and Lines",
        "Refraction",
        "Work, Heat, and Internal Energy",
    ),
    "openstax/osbooks-workplace-software-skills": ("Chapter Scenario",),
    "openstax/osbooks-world-history": (
        "Nationalism, Liberalism, Conservatism, and the Political Order",
        "Religion in the Roman Empire",
    ),
    GUTENBERG: (
        "The Gorgon's Head",
        "The Search After Hapiness",
        "Where Love is There God is Also",
        "Four Meetings",
        "The Countess of Saint Geran",
        "The Story of Peter Pan",
        "Amy Foster",
        "A Modest Proposal",
    ),
    "MicrosoftDocs/PowerShell-Docs": (
        "Sort-Object",
        "Disable-PSBreakpoint",
        "How to create and upload CAB files",
    ),
    "MicrosoftDocs/cpp-docs": (
        "Summary of declarations",
        "Windows Sockets: How Sockets with Archives Work",
        "Summary of Expressions",
    ),
    "PostgreSQL 15 documentation": ("CREATE FOREIGN TABLE", "LDAP Authentication", "dropdb"),
    "Python 3.11 documentation (python/cpython, Doc/)": (
        "zlib ---",
        "locale ---",
        "tracemalloc ---",
    ),
    "huggingface/course": (
        "Understanding the DeepSeek R1 Paper",
        "Unigram tokenization",
        "Normalization and pre-tokenization",
    ),
    "python/devguide": ("Running and writing tests", "Quick reference"),
    "python/peps": ("PEP 736:", "PEP 8101:", "PEP 552:"),
    "rust-lang/book": ("Putting It All Together: Futures, Tasks, and Threads", "Advanced Traits"),
    "rust-lang/reference": ("Attributes",),
    "rust-lang/rustc-dev-guide": (
        "Universal regions",
        "Two-phase borrows",
        "Trait solving (new)",
    ),
    "swcarpentry/python-novice-inflammation": ("Storing Multiple Values in Lists",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """Metadata of one document; `index` is its position in its split's file."""

    split: str
    index: int
    domain: str
    source: str
    title: str
    characters: int
    cluster: str


def read_documents(path: Path) -> list[str]:
    """Read the documents of one file, separated by lines END_OF_TEXT."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [d.strip() for d in file.read().split(f"\n{END_OF_TEXT}\n") if d.strip()]


def domain_of(source: str) -> str:
    """Return the domain: textbooks (OpenStax), narrative (Project Gutenberg) or technical."""
    if source.startswith("openstax/"):
        return "textbook"
    return "fiction" if source == GUTENBERG else "documentation"


def source_of(document: str) -> str:
    """Return the only source with a title that begins the document's first line."""
    first_line = document.partition("\n")[0]
    sources = [s for s, titles in TITLES.items() if first_line.startswith(titles)]
    if len(sources) != 1:
        raise SystemExit(f"{first_line!r} must begin like a title of one source, got {sources}")
    return sources[0]


def expected_counts(sources_file: Path) -> Counter[str]:
    """Return the number of held-out documents per source, from the corpus's own table."""
    counts: Counter[str] = Counter()
    for line in sources_file.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[5].isdigit() and not cells[0].startswith("**"):
            counts[cells[0]] = int(cells[5])
    return +counts


def split_documents(documents: list[str], seed: int) -> dict[str, list[str]]:
    """Draw one third of each domain for calibration; both parts mix the domains."""
    generator = random.Random(seed)
    parts: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for domain in ("textbook", "fiction", "documentation"):
        members = [d for d in documents if domain_of(source_of(d)) == domain]
        generator.shuffle(members)
        cut = round(len(members) * CALIBRATION_SHARE)
        parts["calibration"] += members[:cut]
        parts["evaluation"] += members[cut:]
    for part in parts.values():
        # Shuffled, so that a prefix of the text contains every domain.
        generator.shuffle(part)
    return parts


def label(document: str, split: str, index: int) -> Label:
    """Describe a document; it is one cluster, even if split later."""
    title = document.partition("\n")[0]
    source = source_of(document)
    return Label(
        split=split,
        index=index,
        domain=domain_of(source),
        source=source,
        title=title,
        characters=len(document),
        cluster=re.sub(r"[^a-z0-9]+", "-", title.lower())[:60].strip("-"),
    )


def main() -> None:
    """Check the labels, split, and write two text files and `documents.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--sources", type=Path, required=True, help="the corpus's SOURCES.md")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    documents = read_documents(args.heldout)
    found, expected = Counter(map(source_of, documents)), expected_counts(args.sources)
    if found != expected:
        raise SystemExit(f"too many: {found - expected}; missing: {expected - found}")
    labels = []
    for split, part in split_documents(documents, args.seed).items():
        text = "".join(f"{document}\n{END_OF_TEXT}\n" for document in part)
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (args.output / f"{split}.txt.xz").write_bytes(packed)
        labels += [label(document, split, index) for index, document in enumerate(part)]
        print(split, dict(Counter(entry.domain for entry in labels if entry.split == split)))
    if len({entry.cluster for entry in labels}) != len(labels):
        raise SystemExit("two documents have the same cluster; lengthen the names")
    rows = ",\n".join(json.dumps(asdict(entry)) for entry in labels)
    (args.output / "documents.json").write_text(f"[\n{rows}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
