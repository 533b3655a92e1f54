"""The header of a safetensors file, read strictly: what the specification forbids is an error here.

The safetensors library accepts a duplicate key when the last one covers the buffer, and a leading space; both are
refused here, before any tensor is read. Specification: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmerge.errors import InputError
from qmerge.types import BITS, TensorInfo, TensorSpec

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

LFS_POINTER = b"version https://git-lfs"


def read_header(path: Path, error: type[InputError]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (by name) and metadata of one file; nothing but the header is read.

    Raises:
        error: the file is missing, truncated, no safetensors file, or its header breaks the specification.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == LFS_POINTER[:8]:
                raise error(
                    f"{path.name}: this is a git-lfs pointer, not the file. Run `git lfs pull` or `hf download`."
                )
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise error(
                    f"{path.name}: not a whole safetensors file: {size} bytes, and its first 8 bytes announce a header of "
                    f"{length}. Download it again."
                )
            text = file.read(length)
    except OSError as cause:
        raise error(f"{path.name}: cannot be read: {cause.strerror} ({path})") from cause
    return _parse(path, text, size - 8 - length, 8 + length, error)


def _parse(
    path: Path, text: bytes, data_bytes: int, data_start: int, error: type[InputError]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if not text.startswith(b"{"):
        raise error(f"{path.name}: the safetensors header must begin with '{{', found {text[:8]!r}")
    entries = strict_json(text, f"{path.name}: header", error)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"{path.name}: __metadata__ must map names to texts")
    odd = next((name for name in entries if not _is_text(name)), None)
    if odd is not None:
        raise error(f"{path.name}: the tensor name {odd!a} is no Unicode text")
    tensors = {name: _tensor(path, name, entry, data_start, error) for name, entry in entries.items()}
    _check_covers(path, tensors, data_start, data_bytes, error)
    return tensors, metadata


def _is_text(name: str) -> bool:
    """Lone surrogates are valid JSON, but no text: they could not be written again."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _tensor(path: Path, name: str, entry: Any, data_start: int, error: type[InputError]) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise error(f"{path.name}: tensor {name!r} needs dtype, shape and data_offsets, found {str(entry)[:80]}")
    if dtype not in BITS:
        raise error(f"{path.name}: tensor {name!r} has the unknown dtype {dtype!r}")
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise error(
            f"{path.name}: tensor {name!r} of shape {list(shape)} and dtype {dtype} takes "
            f"{TensorSpec(dtype, shape).nbytes} bytes, but its data_offsets span {end - begin}"
        )
    return TensorInfo(dtype, shape, name, path, data_start + begin)


def _check_covers(
    path: Path, tensors: Mapping[str, TensorInfo], data_start: int, data_bytes: int, error: type[InputError]
) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            raise error(
                f"{path.name}: tensor {tensor.name!r} starts at byte {tensor.offset}, expected {position}: "
                f"tensors overlap or leave a hole"
            )
        position += tensor.nbytes
    if position != data_start + data_bytes:
        raise error(
            f"{path.name}: the tensors end at byte {position}, the file at {data_start + data_bytes}: "
            f"truncated or padded. Download it again."
        )


def strict_json(text: bytes, what: str, error: type[InputError]) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
        error: not JSON, not an object, or a key that stands twice.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f"{what}: {twice!r} stands there twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as cause:
        raise error(f"{what}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def build_header(layout: Mapping[str, tuple[TensorSpec, int]], length: int | None = None) -> bytes:
    """The 8 length bytes and the header for tensors at given offsets (counted from the end of the header).

    With ``length``, the header text is padded with spaces to that many bytes, as the specification allows.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (spec, offset) in sorted(layout.items(), key=lambda item: item[1][1]):
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = length if length is not None else -(-len(text) // 8) * 8
    if len(text) > padded:
        raise AssertionError(f"header of {len(text)} bytes in room for {padded}")
    return struct.pack("<Q", padded) + text.ljust(padded)


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut (POSIX wants the folder itself synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
