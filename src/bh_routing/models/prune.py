"""Write a checkpoint without some of its experts, copying bytes without loading a tensor."""

from __future__ import annotations

import fnmatch
import json
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from bh_routing.errors import ModelError, ResultsError
from bh_routing.models.expert_axes import (
    CONFIG,
    COPIED,
    INDEX,
    WEIGHTS,
    Checkpoint,
    StoredTensor,
    render_config,
    with_experts,
)
from bh_routing.results.files import TEMPORARY_SUFFIX, render_json, sync_folder

_BLOCK_BYTES: Final = 1 << 24
"""Bytes in memory at a time."""


def write_pruned(
    checkpoint: Checkpoint,
    kept: Mapping[str, Sequence[int]],
    documents: Mapping[str, bytes],
    output: Path,
) -> None:
    """Write a checkpoint without the other experts; at any time the folder is whole or missing.

    Args:
        checkpoint: the original.
        kept: name of a block of experts -> its experts that stay, ascending, equally many.
        documents: content of further files, by name.
        output: the new folder; its parents are made.
    Raises:
        ResultsError: the folder exists, or can't be written.
        ModelError: a weight is in no block, or a file of the original is truncated.
    """
    reject_existing(output)
    (num_kept,) = {len(experts) for experts in kept.values()}
    config = with_experts(checkpoint.config, checkpoint.folder, checkpoint.num_experts, num_kept)
    entries = checkpoint.kept_by_weight(kept)
    folder = output.with_name(f".{output.name[:40]}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    try:
        folder.mkdir(parents=True)
        _write_weights(checkpoint, entries, folder)
        for path in sorted(checkpoint.folder.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in COPIED) and path.is_file():
                _write_file(folder / path.name, path.read_bytes())
        for name, content in documents.items():
            _write_file(folder / name, content)
        _write_file(folder / CONFIG, render_config(config))
        sync_folder(folder)
        reject_existing(output)
        folder.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise ResultsError(
            f"{output} can't be written ({error.strerror or error}); make room, get the right to "
            "write there, or choose another folder: nothing was left"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reject_existing(output: Path) -> None:
    """Raise ResultsError if the folder of a new checkpoint exists."""
    if os.path.lexists(output):
        raise ResultsError(
            f"{output} exists, and a checkpoint is never written over another; remove it or choose "
            "another folder"
        )


def _write_weights(
    checkpoint: Checkpoint, entries: Mapping[str, Sequence[int]], folder: Path
) -> None:
    by_file: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in checkpoint.tensors:
        if tensor.expert is None or tensor.expert in entries[tensor.weight]:
            by_file[tensor.file].append(tensor)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file, tensors in by_file.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            name, shape, num_bytes = _pruned(tensor, checkpoint, entries)
            place = [position, position + num_bytes]
            header[name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": place}
            weight_map[name] = file
            position += num_bytes
        total_bytes += position
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (checkpoint.folder / file).open("rb") as source, (folder / file).open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                for begin, length in _runs(tensor, checkpoint, entries):
                    _copy(source, target, begin, length)
            target.flush()
            os.fsync(target.fileno())
    if [*by_file] != [WEIGHTS]:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_file(folder / INDEX, render_json(index))


def _pruned(
    tensor: StoredTensor, checkpoint: Checkpoint, entries: Mapping[str, Sequence[int]]
) -> tuple[str, list[int], int]:
    """Return the name, shape and bytes of a tensor in the pruned checkpoint."""
    kept, shape = entries.get(tensor.weight), list(tensor.shape)
    if kept is None:
        return tensor.name, shape, tensor.num_bytes
    if tensor.expert is not None:
        return tensor.name_for(kept.index(tensor.expert)), shape, tensor.num_bytes
    axis, size = checkpoint.axes[tensor.weight]
    shape[axis] = shape[axis] // size * len(kept)
    return tensor.name, shape, tensor.num_bytes // size * len(kept)


def _runs(
    tensor: StoredTensor, checkpoint: Checkpoint, entries: Mapping[str, Sequence[int]]
) -> Iterator[tuple[int, int]]:
    """Yield position and length of the parts of a tensor that stay."""
    kept = entries.get(tensor.weight)
    if kept is None or tensor.expert is not None:
        yield tensor.begin, tensor.num_bytes
        return
    axis, size = checkpoint.axes[tensor.weight]
    outer = prod(tensor.shape[:axis])
    length = tensor.num_bytes // (outer * size)
    for row in range(outer):
        for entry in kept:
            yield tensor.begin + (row * size + entry) * length, length


def _copy(source: BinaryIO, target: BinaryIO, begin: int, length: int) -> None:
    source.seek(begin)
    while length:
        block = source.read(min(length, _BLOCK_BYTES))
        if not block:
            raise ModelError(f"{source.name} ends too early; get the checkpoint again")
        target.write(block)
        length -= len(block)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
