"""Write a safetensors file as a stream: its size is planned, tensors are written in any order, the header comes last.

The file has a temporary name until it is whole. The safetensors library cannot be used: it needs all tensors of a file in
memory, creates files with mode 0600, and does not sync them (0.8).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qmerge.errors import DiskError, listed
from qmerge.safetensors_io.disk import (
    PARTIAL,
    disk_errors,
    fsync_folder,
    hash_range,
    open_for_writing,
    read_range,
    reserve,
    write_range,
)
from qmerge.safetensors_io.header import LENGTH_BYTES, build_header
from qmerge.safetensors_io.threads import started_pool
from qmerge.types import BITS, TensorSpec

LONGEST_TEXT = 512
"""Bytes reserved for a tensor whose length is known only at the end (bitsandbytes' quant state, about 170)."""

LEAST_IN_THREAD = 2**16
"""Bytes from which on a thread hashes them."""


class PlacedTensor(NamedTuple):
    """dtype and shape of a tensor, and the offset of its bytes from the end of the header."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class FileLayout:
    """Where each tensor of a file will be.

    tensors        tensors of known size, in the order of their offsets
    texts          names of tensors that follow them, whose size is known only at the end; see ``LONGEST_TEXT``
    header_length  bytes reserved for the header, without its length bytes
    fixed_bytes    size of all ``tensors``
    """

    tensors: Mapping[str, PlacedTensor]
    texts: tuple[str, ...]
    header_length: int
    fixed_bytes: int

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec]) -> FileLayout:
        """The layout of a file with these tensors; a shape of (-1,) is a text.

        Tensors are sorted as the safetensors library sorts them, widest dtype first, then by name: so all are aligned.
        """
        texts = {name for name, spec in specs.items() if spec.shape == (-1,)}
        tensors: dict[str, PlacedTensor] = {}
        position = 0
        for name in sorted(specs.keys() - texts, key=lambda name: (-BITS[specs[name].dtype], name)):
            tensors[name] = PlacedTensor(specs[name], position)
            position += specs[name].nbytes
        # The longest header that may become necessary: with every text as long as it may get.
        longest = dict(tensors)
        for number, name in enumerate(sorted(texts)):
            longest[name] = PlacedTensor(TensorSpec("U8", (LONGEST_TEXT,)), position + LONGEST_TEXT * number)
        header_length = len(build_header(longest)) - LENGTH_BYTES
        return cls(tensors, tuple(sorted(texts)), header_length, fixed_bytes=position)

    def header(self, tensors: Mapping[str, PlacedTensor]) -> bytes:
        """Everything before the tensors; texts have their final length in ``tensors``."""
        return build_header(tensors, self.header_length)

    @property
    def data_start(self) -> int:
        """Position of the first tensor in the file."""
        return LENGTH_BYTES + self.header_length

    @property
    def most_bytes(self) -> int:
        """The largest size that the file may get."""
        return self.data_start + self.fixed_bytes + LONGEST_TEXT * len(self.texts)


class TensorSink(Protocol):
    """What a step writes its tensors to."""

    def append(self, name: str, tensor: Tensor) -> None:
        """Append values to a tensor, in order."""

    def append_bytes(self, name: str, data: memoryview | bytearray) -> None:
        """Append bytes to a tensor, in order."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values, in order."""
    if not tensor.numel():  # an empty tensor cannot be viewed as bytes
        return memoryview(b"")
    # A tensor of one value counts as contiguous whatever its strides are, and cannot be viewed as bytes then.
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


class StepSink(TensorSink):
    """The tensors of one step, which go to a shard. Each is written in order, and hashed in a thread.

    Args:
        names: all tensors of the step.

    Attributes:
        texts: name → content of those tensors whose size was not known before.
    """

    def __init__(self, shard: ShardWriter, names: tuple[str, ...]) -> None:
        self.texts: dict[str, str] = {}
        self._shard = shard
        self._fixed_names = [name for name in names if name not in shard.layout.texts]
        self._written = dict.fromkeys(self._fixed_names, 0)
        self._hashes = {name: hashlib.sha256() for name in self._fixed_names}
        self._hashed: Future[None] | None = None

    def append(self, name: str, tensor: Tensor) -> None:
        self.append_bytes(name, tensor_bytes(tensor))

    def append_bytes(self, name: str, data: memoryview | bytearray) -> None:
        if name in self._shard.layout.texts:
            self.texts[name] = bytes(data).decode()
            return
        self._shard.write(name, self._written[name], data)
        self._written[name] += len(data)
        self._wait_until_hashed()  # one part at a time: in order, and no more of them in memory
        if len(data) < LEAST_IN_THREAD:
            self._hashes[name].update(data)
        else:
            self._hashed = _hashing_threads().submit(self._hashes[name].update, data)

    def finish(self) -> dict[str, str]:
        """SHA-256, hexadecimal, of every tensor of known size.

        Raises:
            AssertionError: one of them is not complete, which is a bug.
        """
        self._wait_until_hashed()
        for name in self._fixed_names:
            expected = self._shard.layout.tensors[name].spec.nbytes
            assert self._written[name] == expected, f"{name}: {self._written[name]} of {expected} bytes written"
        hashes = {name: self._hashes[name].hexdigest() for name in self._fixed_names}
        self._shard.step_done(hashes, self.texts)
        return hashes

    def _wait_until_hashed(self) -> None:
        if self._hashed is not None:
            self._hashed.result()
            self._hashed = None


@cache
def _hashing_threads() -> ThreadPoolExecutor:
    return started_pool(os.cpu_count() or 1, "qmerge-hashing")


class ShardWriter:
    """One safetensors file that is being written; its name ends in ``.partial`` until ``publish``.

    Steps may write from several threads.

    Args:
        resume: continue the file that an earlier run left, if there is one.
    """

    def __init__(self, path: Path, layout: FileLayout, resume: bool = False) -> None:
        self.path = path
        self.layout = layout
        self.texts: dict[str, str] = {}
        self._hashes: dict[str, str] = {}
        self._partial = path.with_name(path.name + PARTIAL)
        self._lock = threading.Lock()
        self._descriptor = -1
        with disk_errors(path.parent):
            if resume and self.path.exists():  # a finished file is checked (and, if need be, written) like any other
                self.path.replace(self._partial)
            self._descriptor = open_for_writing(self._partial, keep=resume)
            reserve(self._descriptor, layout.most_bytes)

    def step(self, names: tuple[str, ...]) -> StepSink:
        """Where one step writes its tensors."""
        return StepSink(self, names)

    def write(self, name: str, start: int, data: memoryview | bytearray) -> None:
        """Write some bytes of a tensor, from its byte ``start`` on."""
        with disk_errors(self.path.parent):
            write_range(self._descriptor, self._position(name) + start, data)

    def read(self, name: str) -> bytes:
        """The bytes of a tensor that has been written."""
        if name in self.layout.texts:
            return self.texts[name].encode()
        return read_range(self._descriptor, self._position(name), self.layout.tensors[name].spec.nbytes)

    def step_done(self, hashes: Mapping[str, str], texts: Mapping[str, str]) -> None:
        """Keep what a step has written: ``finish`` writes the texts, and compares the hashes with what the disk gives back."""
        with self._lock:
            self._hashes.update(hashes)
            self.texts.update(texts)

    def fixed(self, names: tuple[str, ...]) -> set[str]:
        """Those of these tensors whose size was known before."""
        return {name for name in names if name in self.layout.tensors}

    def matches(self, hashes: Mapping[str, str]) -> bool:
        """Whether the bytes of these tensors, as they are on the disk now, have these hashes."""
        for name, expected in hashes.items():
            nbytes = self.layout.tensors[name].spec.nbytes
            if hash_range(self._descriptor, self._position(name), nbytes) != expected:
                return False
        return True

    def finish(self) -> dict[str, int | str]:
        """Write texts and header, sync, and read all of it back. The file keeps its temporary name: ``publish`` renames it.

        Returns:
            ``bytes``, the size, and ``sha256``, computed from the bytes that were read back.

        Raises:
            RoomError, DiskError: the file cannot be written, or the disk gives back other bytes than were written.
        """
        tensors = dict(self.layout.tensors)
        offset = self.layout.fixed_bytes
        with disk_errors(self.path.parent):
            for name in self.layout.texts:
                data = self.texts[name].encode()
                write_range(self._descriptor, self.layout.data_start + offset, data)
                tensors[name] = PlacedTensor(TensorSpec("U8", (len(data),)), offset)
                self._hashes[name] = hashlib.sha256(data).hexdigest()
                offset += len(data)
            size = self.layout.data_start + offset
            header = self.layout.header(tensors)
            write_range(self._descriptor, 0, header)
            os.ftruncate(self._descriptor, size)  # texts took less than was reserved
            os.fsync(self._descriptor)
            return {"bytes": size, "sha256": self._hash_read_back(header, tensors, size)}

    def _hash_read_back(self, header: bytes, tensors: Mapping[str, PlacedTensor], size: int) -> str:
        """SHA-256 of the whole file, after a comparison of every part with what was written."""
        whole = hashlib.sha256()
        found = hash_range(self._descriptor, 0, len(header), whole)
        damaged = [] if found == hashlib.sha256(header).hexdigest() else ["the header"]
        position = len(header)
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
            start = self.layout.data_start + tensor.offset
            hash_range(self._descriptor, position, start - position, whole)  # padding, in a GGUF file
            if hash_range(self._descriptor, start, tensor.spec.nbytes, whole) != self._hashes[name]:
                damaged.append(name)
            position = start + tensor.spec.nbytes
        hash_range(self._descriptor, position, size - position, whole)
        if damaged:
            raise DiskError(
                f"{self._partial}: the disk gives back other bytes than were written, in {listed(damaged)}. Check the disk, then "
                f"run again with --resume"
            )
        return whole.hexdigest()

    def publish(self) -> None:
        """Give the whole file its name. It stays open, so that ``read`` still works."""
        with disk_errors(self.path.parent):
            self._partial.replace(self.path)
            fsync_folder(self.path.parent)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _position(self, name: str) -> int:
        """Position in the file of a tensor's first byte."""
        return self.layout.data_start + self.layout.tensors[name].offset


class NullSink(TensorSink):
    """Discards everything: ``qmerge measure`` writes to it."""

    def append(self, name: str, tensor: Tensor) -> None:
        pass

    def append_bytes(self, name: str, data: memoryview | bytearray) -> None:
        pass


class MemorySink(TensorSink):
    """Keeps the tensors of a step in memory, so that they can be read back."""

    def __init__(self) -> None:
        self._data: dict[str, bytearray] = {}

    def append(self, name: str, tensor: Tensor) -> None:
        self.append_bytes(name, tensor_bytes(tensor))

    def append_bytes(self, name: str, data: memoryview | bytearray) -> None:
        self._data.setdefault(name, bytearray()).extend(data)

    def read(self, name: str) -> bytes:
        """The bytes of a tensor that has been written."""
        return bytes(self._data[name])
