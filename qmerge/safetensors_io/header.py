"""The header of a safetensors file, read strictly: anything that the specification forbids is an error.

The safetensors library accepts a duplicate key when the last one covers the buffer, and a leading space; both are errors
here, before any tensor is read. Specification: https://github.com/huggingface/safetensors#format

    8 bytes         length of the header, little endian
    header          JSON: tensor name → dtype, shape, data_offsets (from the end of the header); __metadata__
    data            the tensors, without gaps
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.errors import InputError
from qmerge.safetensors_io.disk import file_size
from qmerge.safetensors_io.strict_json import LONE_SURROGATE, strict_json
from qmerge.types import BITS, TensorInfo, TensorSpec

LENGTH_BYTES = 8
"""Bytes before the header, which hold its length."""

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

MOST_AXES = 64
"""Axes of a tensor; torch's own limit in many of its operations."""

LARGEST_SIZE = 2**63 - 1
"""Elements, and bytes: no file system has larger files."""

LFS_POINTER = b"version https://git-lfs"


def read_header(
    path: Path, error: type[InputError], *, nbytes: int | None = None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (by name) and metadata of one file; only the header is read.

    Args:
        nbytes: size of the whole file, where ``path`` has its header alone.

    Raises:
        error: the file is missing, truncated, or not a safetensors file, or its header breaks the specification.
    """
    try:
        if nbytes is None:
            nbytes = file_size(path, error)
        with path.open("rb") as file:
            start = file.read(LENGTH_BYTES)
            length = _header_length(path, start, nbytes, error)
            text = file.read(length)
    except OSError as cause:
        raise error(f"{path.name}: cannot be read: {cause.strerror} ({path})") from cause
    return _HeaderParser(path, error, LENGTH_BYTES + length, nbytes).parse(text)


def _header_length(path: Path, start: bytes, file_size: int, error: type[InputError]) -> int:
    """Length of the header in bytes, from the first bytes of the file."""
    if start == LFS_POINTER[:LENGTH_BYTES]:
        raise error(f"{path.name}: this is a git-lfs pointer, not the file. Run `git lfs pull` or `hf download`.")
    length = -1
    if len(start) == LENGTH_BYTES:
        (length,) = struct.unpack("<Q", start)
    if not 2 <= length <= min(LARGEST_HEADER, file_size - LENGTH_BYTES):  # the shortest header is {}
        raise error(
            f"{path.name}: not a whole safetensors file: {file_size} bytes, and its first 8 bytes announce a header of "
            f"{length}. Download it again."
        )
    return length


@dataclass(frozen=True)
class _HeaderParser:
    """Checks the header of one file. ``data_start``: position of the first tensor's bytes in the file."""

    path: Path
    error: type[InputError]
    data_start: int
    file_size: int

    def parse(self, text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Tensors by name, and metadata."""
        # json.loads would accept leading white space, which the specification does not allow.
        if not text.startswith(b"{"):
            raise self._invalid(f"the safetensors header must begin with '{{', found {text[:8]!r}")
        entries = strict_json(text, f"{self.path.name}: header", self.error)
        metadata = entries.pop("__metadata__", {})
        if metadata is None:  # mlx writes null where it has none
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._invalid("__metadata__ must map names to texts")
        for name in entries:
            if LONE_SURROGATE.search(name):
                raise self._invalid(f"the tensor name {name!a} is not Unicode text")
        tensors = {name: self._tensor(name, entry) for name, entry in entries.items()}
        self._check_data_is_covered(tensors)
        return tensors, metadata

    def _tensor(self, name: str, entry: Any) -> TensorInfo:
        try:
            dtype = entry["dtype"]
            shape = entry["shape"]
            begin, end = entry["data_offsets"]
            is_valid = isinstance(dtype, str) and _is_shape(shape) and _is_size(begin) and _is_size(end)
        except (TypeError, KeyError, ValueError):
            is_valid = False
        if not is_valid:
            raise self._invalid(f"tensor {name!r} needs dtype, shape and data_offsets, found {str(entry)[:80]}")
        if dtype not in BITS:
            raise self._invalid(f"tensor {name!r} has the unknown dtype {dtype!r}")
        # In bits: elements of 4 or 6 bits need not fill whole bytes.
        if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
            raise self._invalid(
                f"tensor {name!r} of shape {list(shape)} and dtype {dtype} takes {math.prod(shape) * BITS[dtype] // 8} bytes, "
                f"but its data_offsets span {end - begin}"
            )
        return TensorInfo(dtype, tuple(shape), name=name, file=self.path, offset=self.data_start + begin)

    def _check_data_is_covered(self, tensors: Mapping[str, TensorInfo]) -> None:
        """The tensors must follow one another without gaps, up to the end of the file."""
        # Empty tensors first, where offsets are equal: they take no bytes.
        position = self.data_start
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != position:
                raise self._invalid(
                    f"tensor {tensor.name!r} starts at byte {tensor.offset}, expected {position}: tensors overlap or leave a "
                    f"hole. Download it again."
                )
            position += tensor.nbytes
        if position != self.file_size:
            raise self._invalid(
                f"the tensors end at byte {position}, the file at {self.file_size}: truncated or padded. Download it again."
            )

    def _invalid(self, problem: str) -> InputError:
        return self.error(f"{self.path.name}: {problem}")


def _is_size(value: Any) -> bool:
    is_number = isinstance(value, int) and not isinstance(value, bool)  # True is an int in Python
    return is_number and 0 <= value <= LARGEST_SIZE


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MOST_AXES or not all(map(_is_size, value)):
        return False
    return math.prod(value) <= LARGEST_SIZE


def build_header(layout: Mapping[str, tuple[TensorSpec, int]], length: int | None = None) -> bytes:
    """The length bytes and the header of a file.

    Args:
        layout: name → dtype and shape, and the offset from the end of the header.
        length: pad the header with spaces to this many bytes, as the specification allows; None: to a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (spec, offset) in sorted(layout.items(), key=lambda item: item[1][1]):
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    if length is None:
        length = math.ceil(len(text) / 8) * 8  # the data begin at a multiple of 8, as the library aligns them
    if len(text) > length:
        raise AssertionError(f"the header has {len(text)} bytes, but {length} were reserved for it")
    return struct.pack("<Q", length) + text.ljust(length)
