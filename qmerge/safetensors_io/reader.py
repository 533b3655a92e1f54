"""Tensors from safetensors files by plain reads: a whole tensor, or some rows, so that memory holds only these.

Files are not mapped into memory: mapped pages count as resident memory, and a file that is truncated while it is mapped
kills the process.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.types import TORCH_DTYPES, TensorInfo


class Reader:
    """Opens each file once and reads ranges of it. Threads may share one. As a context manager, it closes its files."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._remote: dict[Path, tuple[Callable[[int, int], bytes], int]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def add_remote(self, file: Path, read: Callable[[int, int], bytes], nbytes: int) -> None:
        """Read a file elsewhere, of which ``file`` has the header alone.

        Args:
            read: start and stop in the whole file → bytes.
            nbytes: size of the whole file.
        """
        self._remote[file] = (read, nbytes)

    def remote_size(self, file: Path) -> int | None:
        """Size of a whole file that is elsewhere; None for a file that is here."""
        return self._remote[file][1] if file in self._remote else None

    def bytes(self, info: TensorInfo, start: int, stop: int) -> bytearray:
        """Bytes ``start`` … ``stop`` of a tensor.

        Raises:
            CheckpointError: the file cannot be read, or ends before them: it has changed since its header was read.
        """
        if info.file in self._remote:
            read, _ = self._remote[info.file]
            return bytearray(read(info.offset + start, info.offset + stop))
        buffer = bytearray(stop - start)
        view = memoryview(buffer)
        done = 0
        while done < len(buffer):  # a read may return less than was asked for
            try:
                count = os.preadv(self._descriptor(info.file), [view[done:]], info.offset + start + done)
            except OSError as cause:
                raise _unreadable(info.file, cause) from cause
            if count == 0:
                raise CheckpointError(
                    f"{info.file.name}: ends inside tensor {info.name!r}: the file was changed while it was read"
                )
            done += count
        return buffer

    def tensor(self, info: TensorInfo) -> Tensor:
        """The whole tensor, in its own dtype and shape."""
        return self.elements(info, 0, math.prod(info.shape)).view(info.shape)

    def elements(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Elements ``start`` … ``stop`` of the flattened tensor, 1-D, in its own dtype."""
        dtype = TORCH_DTYPES[info.dtype]
        if start == stop:  # torch.frombuffer refuses an empty buffer
            return torch.empty(0, dtype=dtype)
        raw = self.bytes(info, start * dtype.itemsize, stop * dtype.itemsize)
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(file, os.O_RDONLY)
                except OSError as cause:
                    raise _unreadable(file, cause) from cause
            return self._descriptors[file]


def _unreadable(file: Path, cause: OSError) -> CheckpointError:
    return CheckpointError(f"{file}: cannot be read: {cause.strerror}")


class MemoryReader(Reader):
    """A reader of tensors that are in no file.

    Args:
        read: tensor name → its bytes.
    """

    def __init__(self, read: Callable[[str], bytes]) -> None:
        super().__init__()
        self._read = read

    def bytes(self, info: TensorInfo, start: int, stop: int) -> bytearray:
        return bytearray(self._read(info.name)[start:stop])
