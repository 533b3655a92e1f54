"""Streams a safetensors file out: room for the header is reserved, tensors go to planned places in any order, the
header is filled last, and the file gets its name only when it is whole.

The safetensors library needs all tensors of a file in memory, writes mode 0600, and does not sync (0.8).
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qmerge.errors import RoomError
from qmerge.safetensors_io.header import build_header, fsync_folder
from qmerge.types import BITS, TensorSpec

LONGEST_TEXT = 512
"""Bytes kept free for a tensor whose length is known only at the end (bitsandbytes' quant state, about 170)."""

PARTIAL = ".partial"


@dataclass(frozen=True)
class FileLayout:
    """Where each tensor of a file will lie: offsets from the end of the header; ``texts`` follow, in order.

    Sorted as the safetensors library sorts (widest dtype first, then by name), so that every tensor is aligned.
    """

    tensors: Mapping[str, tuple[TensorSpec, int]]
    texts: tuple[str, ...]
    header_length: int
    fixed_bytes: int

    @classmethod
    def of(cls, specs: Mapping[str, TensorSpec]) -> FileLayout:
        fixed = sorted(
            (name for name, spec in specs.items() if spec.shape != (-1,)), key=lambda n: (-BITS[specs[n].dtype], n)
        )
        texts = tuple(sorted(name for name, spec in specs.items() if spec.shape == (-1,)))
        tensors, position = {}, 0
        for name in fixed:
            tensors[name] = (specs[name], position)
            position += specs[name].nbytes
        longest = {
            name: (TensorSpec("U8", (LONGEST_TEXT,)), position + LONGEST_TEXT * i) for i, name in enumerate(texts)
        }
        length = len(build_header({**tensors, **longest})) - 8
        return cls(tensors, texts, length, position)

    @property
    def most_bytes(self) -> int:
        return 8 + self.header_length + self.fixed_bytes + LONGEST_TEXT * len(self.texts)


class TensorSink(Protocol):
    """What a step writes to."""

    def append(self, name: str, tensor: Tensor) -> None:
        """The next values of a tensor, in order."""

    def append_bytes(self, name: str, data: bytearray) -> None:
        """The next bytes of a tensor, in order."""


@dataclass
class StepSink:
    """The tensors of one step: each appended to in order, hashed on the way, complete at the end."""

    shard: ShardWriter
    names: tuple[str, ...]
    texts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._done = dict.fromkeys(self.names, 0)
        self._hashes = {name: hashlib.sha256() for name in self.names}

    def append(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            self.append_bytes(name, flat.view(torch.uint8).numpy().data)

    def append_bytes(self, name: str, data: memoryview | bytearray) -> None:
        if name in self.shard.layout.texts:
            self.texts[name] = bytes(data).decode()
            return
        self.shard.write(name, self._done[name], data)
        self._hashes[name].update(data)
        self._done[name] += len(data)

    def finish(self) -> dict[str, str]:
        """SHA-256 of every tensor; AssertionError when one is not complete (a bug)."""
        for name in self.names:
            if name not in self.shard.layout.texts:
                spec, _ = self.shard.layout.tensors[name]
                assert self._done[name] == spec.nbytes, f"{name}: {self._done[name]} of {spec.nbytes} bytes written"
        return {name: self._hashes[name].hexdigest() for name in self.names if name not in self.shard.layout.texts}


class ShardWriter:
    """One file being written, under ``NAME.partial`` until ``finish``. Steps may write from several threads."""

    def __init__(self, path: Path, layout: FileLayout, resume: bool = False) -> None:
        self.path, self.layout, self.texts = path, layout, dict[str, str]()
        self._partial = path.with_name(path.name + PARTIAL)
        if resume and self.path.exists():  # a finished file is checked (and, if need be, written) like any other
            self.path.replace(self._partial)
        flags = os.O_RDWR | os.O_NOFOLLOW | (0 if resume and self._partial.exists() else os.O_CREAT | os.O_EXCL)
        self._descriptor = os.open(self._partial, flags, 0o666)
        self._lock = threading.Lock()
        with no_room_is_an_error(path.parent):
            reserve(self._descriptor, layout.most_bytes)

    def step(self, names: tuple[str, ...]) -> StepSink:
        return StepSink(self, names)

    def write(self, name: str, start: int, data: memoryview | bytearray) -> None:
        _, offset = self.layout.tensors[name]
        position, view = 8 + self.layout.header_length + offset + start, memoryview(data)
        with no_room_is_an_error(self.path.parent):
            while len(view):
                count = os.pwrite(self._descriptor, view, position)
                position, view = position + count, view[count:]

    def read(self, name: str) -> bytes:
        """What has been written of a tensor."""
        if name in self.layout.texts:
            return self.texts[name].encode()
        spec, offset = self.layout.tensors[name]
        return read_range(self._descriptor, 8 + self.layout.header_length + offset, spec.nbytes)

    def add_texts(self, texts: Mapping[str, str]) -> None:
        with self._lock:
            self.texts.update(texts)

    def fixed(self, names: tuple[str, ...]) -> set[str]:
        """Those of these tensors that have a planned place (texts have none)."""
        return {name for name in names if name in self.layout.tensors}

    def matches(self, hashes: Mapping[str, str]) -> bool:
        """Whether the bytes of these tensors, as they lie on the disk now, have these hashes."""
        for name, expected in hashes.items():
            spec, offset = self.layout.tensors[name]
            if hash_range(self._descriptor, 8 + self.layout.header_length + offset, spec.nbytes) != expected:
                return False
        return True

    def finish(self) -> dict[str, int | str]:
        """Write texts and header, sync; returns size and SHA-256, computed from what was read back.

        The file keeps its temporary name: ``publish`` renames it.
        """
        tensors, position = dict(self.layout.tensors), self.layout.fixed_bytes
        start = 8 + self.layout.header_length
        with no_room_is_an_error(self.path.parent):
            for name in self.layout.texts:
                data = self.texts[name].encode()
                os.pwrite(self._descriptor, data, start + position)
                tensors[name] = (TensorSpec("U8", (len(data),)), position)
                position += len(data)
            os.pwrite(self._descriptor, build_header(tensors, self.layout.header_length), 0)
            os.ftruncate(self._descriptor, start + position)
            os.fsync(self._descriptor)
        return {"bytes": start + position, "sha256": hash_range(self._descriptor, 0, start + position)}

    def publish(self) -> None:
        """Give the whole file its name. It stays open to be read from."""
        self._partial.replace(self.path)
        fsync_folder(self.path.parent)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class NullSink:
    """Throws everything away: what ``qmerge measure`` writes to."""

    def append(self, name: str, tensor: Tensor) -> None:
        pass

    def append_bytes(self, name: str, data: bytearray) -> None:
        pass


class MemorySink:
    """Holds what a step writes, to be read back."""

    def __init__(self) -> None:
        self._data: dict[str, bytearray] = {}

    def append(self, name: str, tensor: Tensor) -> None:
        self.append_bytes(name, bytearray(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))

    def append_bytes(self, name: str, data: bytearray) -> None:
        self._data.setdefault(name, bytearray()).extend(data)

    def read(self, name: str) -> bytes:
        return bytes(self._data[name])


@contextmanager
def no_room_is_an_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RoomError(
                f"no room left in {folder}: {cause.strerror}. What is done stays; make room, then run again with --resume"
            ) from cause
        raise


def reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is found before the work; where the file system cannot, just set the size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as cause:
        if cause.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, max(size, os.fstat(descriptor).st_size))


def hash_range(descriptor: int, start: int, length: int, piece: int = 2**22) -> str:
    """SHA-256 of ``length`` bytes from ``start`` on (of fewer, when the file ends before)."""
    digest, position, stop = hashlib.sha256(), start, start + length
    while position < stop:
        data = os.pread(descriptor, min(piece, stop - position), position)
        if not data:
            break
        digest.update(data)
        position += len(data)
    return digest.hexdigest()


def read_range(descriptor: int, start: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        data += os.pread(descriptor, length - len(data), start + len(data))
    return data


def hash_file(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return hash_range(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """A small file, whole or not at all: temporary name, sync, rename."""
    partial = path.with_name(path.name + PARTIAL)
    with no_room_is_an_error(path.parent), partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)
