"""Find where a checkpoint on disk stores its experts, without loading a weight.

Two models without storage, one of them with fewer experts, differ in the shapes of exactly the
weights that have an expert axis; transformers' own renaming tells which stored tensors hold a
weight. So no family's names are written down here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from bh_routing.errors import ModelError
from bh_routing.models.load import auto_class, read_config, source_of
from bh_routing.models.outlook import TOP_K_FIELDS
from bh_routing.models.routers import Routers, method_of

COUNT_FIELDS: Final = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
"""Names under which configurations count their routed experts."""
COPIED: Final = (
    *("generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("chat_template.json", "*processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*"),
)
"""Files that a pruned checkpoint shares with the original."""
CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


class ExpertAxis(NamedTuple):
    """The axis of a weight along which its experts lie."""

    axis: int
    size: int
    """Entries, including classes of a router that are no routed expert: these come last."""


class StoredTensor(NamedTuple):
    """A tensor in a file of a checkpoint."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Position in the file of its first byte."""
    num_bytes: int
    weight: str = ""
    """The model's weight that it holds, or is part of."""
    number_at: int | None = None
    """Position among the parts of its name of an expert's number; None if it has none."""

    @property
    def expert(self) -> int | None:
        """The only expert that it belongs to, if there is one."""
        return None if self.number_at is None else int(self.name.split(".")[self.number_at])

    def name_for(self, expert: int) -> str:
        """Return its name with another expert's number."""
        parts = self.name.split(".")
        if self.number_at is not None:
            parts[self.number_at] = str(expert)
        return ".".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint from which experts can be removed."""

    folder: Path
    config: PretrainedConfig
    num_experts: int
    """Routed experts per layer."""
    axes: Mapping[str, ExpertAxis]
    """By weight of the model; all other weights are independent of the number of experts."""
    tensors: Sequence[StoredTensor]
    """The tensors that the model loads, in the order of the files."""
    not_loaded: Sequence[str]
    """Stored tensors that transformers doesn't load, and that a pruned checkpoint lacks."""

    def kept_by_weight(self, kept: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return the entries that stay of each weight with an expert axis.

        Args:
            kept: name of a block of experts -> its experts that stay, ascending.
        Raises:
            ModelError: a weight is in no block.
        """
        entries = {}
        for weight, axis in self.axes.items():
            block = next((block for block in kept if weight.startswith(f"{block}.")), None)
            if block is None:
                raise ModelError(
                    f"weight {weight} has experts that text doesn't reach, and config.json counts "
                    "them together with the others; such a model can't be pruned"
                )
            entries[weight] = [*kept[block], *range(self.num_experts, axis.size)]
        return entries


def open_checkpoint(name: str) -> Checkpoint:
    """Find where a checkpoint stores its experts, from its config.json and its files' headers.

    Args:
        name: `demo`, a folder with a checkpoint, or a Hugging Face id, which is downloaded.
    Raises:
        ModelError: the model can't be found, is quantised or of an unsupported family, or stores
            its experts in an unknown way.
    """
    config = read_config(name)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        raise ModelError(
            f"model {name!r} is quantised by {method_of(stored)}, and scales that experts share "
            "can't be divided; prune the checkpoint in bfloat16, float16 or float32 and quantise "
            "the result"
        )
    source, options = source_of(name)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = Path(
            snapshot_download(
                source,
                allow_patterns=[*COPIED, CONFIG, INDEX, "*.safetensors"],
                ignore_patterns=["*/*", "consolidated*"],  # weights in other formats
                local_files_only=options.get("local_files_only", False),
            )
        )
    model, shapes = _without_storage(config)
    num_experts, axes = _expert_axes(config, folder, shapes)
    tensors, not_loaded = _stored_tensors(folder, model, shapes, axes)
    return Checkpoint(
        folder=folder, config=config, num_experts=num_experts, axes=axes, tensors=tensors,
        not_loaded=not_loaded,
    )  # fmt: skip


def _without_storage(config: PretrainedConfig) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Build a model on the meta device, and return it with the shapes of its weights."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return model, {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _expert_axes(
    config: PretrainedConfig, folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, dict[str, ExpertAxis]]:
    """Return the number of routed experts, and the expert axis of every weight that has one."""
    text: Any = config.get_text_config()
    holders = [text, getattr(text, "ffn_config", None)]
    counts = {getattr(holder, field, None) for holder in holders for field in COUNT_FIELDS}
    removed = max(1, getattr(text, "n_group", None) or 1)
    for count in sorted(count for count in counts if isinstance(count, int) and count > removed):
        fewer = with_experts(config, folder, count, count - removed)
        smaller = _without_storage(_read_back(fewer))[1]
        axes: dict[str, ExpertAxis] = {}
        for name, shape in shapes.items():
            found = smaller.get(name, ())
            changed = [
                i for i, (old, new) in enumerate(zip(shape, found, strict=False)) if old > new
            ]
            if len(shape) != len(found) or len(changed) > 1:
                raise ModelError(
                    f"weight {name} of model type {config.model_type!r} has no single axis of "
                    "experts; such a model can't be pruned"
                )
            for axis in changed:
                # Several consecutive rows of a flattened axis belong to one expert.
                rows = (shape[axis] - found[axis]) // removed
                axes[name] = ExpertAxis(axis, shape[axis] // rows)
        if axes:
            return count, axes
    raise ModelError(
        f"config.json of model type {config.model_type!r} has no number of experts, the same for "
        f"all layers and modalities, under a known name ({', '.join(COUNT_FIELDS)}); such a model "
        "can't be pruned"
    )


def _read_back(document: Mapping[str, Any]) -> PretrainedConfig:
    """Read the content of a config.json as transformers reads the file."""
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_bytes(render_config(document))
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def render_config(document: Mapping[str, Any]) -> bytes:
    """Render a config.json; numbers that aren't finite stay as they are."""
    return f"{json.dumps(document, indent=2, ensure_ascii=False)}\n".encode()


def with_experts(config: PretrainedConfig, folder: Path, before: int, after: int) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json for another number of experts.

    Experts per token are reduced to the number that a token can then reach, if they exceed it.

    Args:
        config: the configuration as transformers reads it.
        folder: the checkpoint.
        before: number of experts that the configuration states.
        after: the new number.
    """
    document: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    text: Any = config.get_text_config()
    part = _part_of(config, text, document)
    reached = after
    if (groups := getattr(text, "n_group", None) or 1) > 1:
        reached = after // groups * text.topk_group
    holders = [(text, part)]
    if (inner := getattr(text, "ffn_config", None)) is not None:
        holders.append((inner, part.setdefault("ffn_config", {})))
    for holder, stated in holders:
        own = [n for n in COUNT_FIELDS if stated.get(n, getattr(holder, n, None)) == before]
        written = [name for name in own if name in stated]
        for name in written or [name for name in own if name not in holder.attribute_map]:
            stated[name] = after
        for name in TOP_K_FIELDS:
            if isinstance(top_k := stated.get(name), int):
                stated[name] = min(top_k, reached)
            elif isinstance(top_k, list):
                stated[name] = [min(k, reached) for k in top_k]
    return document


def _part_of(config: Any, text: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that describes the text model."""
    for name in () if text is config else config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and part.get_text_config() is text:
            return _part_of(part, text, document.setdefault(name, {}))
    return document


def _stored_tensors(
    folder: Path,
    model: Any,
    shapes: dict[str, tuple[int, ...]],
    axes: Mapping[str, ExpertAxis],
) -> tuple[list[StoredTensor], list[str]]:
    """Return the tensors of all weights, and the names of those of no weight."""
    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        files = sorted({*json.loads((folder / INDEX).read_bytes())["weight_map"].values()})
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    by_source: dict[tuple[str, str | None], list[StoredTensor]] = defaultdict(list)
    not_loaded: list[str] = []
    tensors = [tensor for file in files for tensor in _read_header(folder, file)]
    # In transformers' order: some renamings depend on the names that came before.
    for tensor in sorted(tensors, key=lambda tensor: dot_natural_key(tensor.name)):
        weight, pattern = rename_source_key(tensor.name, renamings, converters, prefix, shapes)
        if weight not in shapes and tensor.name in shapes:
            weight, pattern = rename_source_key(tensor.name, [], [], prefix, shapes)
        if weight in shapes:
            by_source[weight, pattern].append(tensor._replace(weight=weight))
        else:
            not_loaded.append(tensor.name)
    if missing := sorted(axes.keys() - {weight for weight, _ in by_source}):
        raise ModelError(
            f"no stored tensor holds the weight {missing[0]} by itself: it is missing, or stored "
            "together with experts of another modality; such a checkpoint can't be pruned"
        )
    found = [
        tensor
        for (weight, _), group in by_source.items()
        for tensor in (_with_numbers(group, axes[weight]) if weight in axes else group)
    ]
    return sorted(found, key=lambda tensor: (tensor.file, tensor.begin)), not_loaded


def _with_numbers(group: list[StoredTensor], axis: ExpertAxis) -> list[StoredTensor]:
    """Find where the names of a weight's tensors have the expert's number.

    Raises:
        ModelError: they are neither one tensor with an expert axis nor one for each expert.
    """
    first = group[0]
    if len(group) == 1 and [n for n in first.shape[axis.axis :][:1] if n % axis.size == 0]:
        return group
    parts = [tensor.name.split(".") for tensor in group]
    varying = [at for at, column in enumerate(zip(*parts, strict=False)) if len({*column}) > 1]
    if len(varying) == 1:
        (at,) = varying
        if sorted(part[at] for part in parts) == sorted(map(str, range(axis.size))):
            return [tensor._replace(number_at=at) for tensor in group]
    raise ModelError(
        f"tensor {first.name}, of shape {first.shape}, is stored neither with an axis of "
        f"{axis.size} experts nor once for each; such a checkpoint can't be pruned"
    )


def _read_header(folder: Path, file: str) -> list[StoredTensor]:
    """Read the names, types, shapes and positions of a file's tensors."""
    path = folder / file
    try:
        with safe_open(path, "np"), path.open("rb") as opened:  # checks that the file is whole
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} can't be read as a safetensors file ({error}), the format in which "
            "checkpoints are pruned; get the whole checkpoint in it"
        ) from error
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        found.append(StoredTensor(file, name, entry["dtype"], shape, begin, end - begin))
    return found


def check_routers(checkpoint: Checkpoint, routers: Routers, name: str) -> None:
    """Raise ModelError if a router chooses experts by something that isn't pruned with them."""
    if any(site.facts.by_token for site in routers.sites):
        raise ModelError(
            f"model {name!r} looks experts up by token id in a table, which would name removed "
            "ones; such a model can't be pruned"
        )
    checkpoint.kept_by_weight({block_of(site.name): () for site in routers.sites})


def block_of(router: str) -> str:
    """Return the name of the block that holds a router and its experts."""
    return router.rpartition(".")[0]
