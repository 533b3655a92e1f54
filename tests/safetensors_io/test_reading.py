"""Files that change, vanish or end while they are read, and file systems that cannot reserve space."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qmerge.errors import CheckpointError
from qmerge.safetensors_io.disk import hash_range, read_range, reserve
from qmerge.safetensors_io.header import build_header, read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorSpec


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(64.0)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "bytes").write_bytes(b"0123456789")
    opened = os.open(tmp_path / "bytes", os.O_RDWR)
    yield opened
    os.close(opened)


def test_a_file_that_ends_inside_a_tensor(file: Path) -> None:
    info = read_header(file, CheckpointError)[0]["a"]
    with Reader() as reader:
        assert torch.equal(reader.tensor(info), torch.arange(64.0))
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"x.safetensors: ends inside tensor 'a': the file was changed"):
            reader.tensor(info)


def test_a_file_that_is_gone(file: Path) -> None:
    info = read_header(file, CheckpointError)[0]["a"]
    file.unlink()
    with Reader() as reader, pytest.raises(CheckpointError, match=r"x.safetensors: cannot be read: No such file"):
        reader.tensor(info)


def test_a_disk_that_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    info = read_header(file, CheckpointError)[0]["a"]
    monkeypatch.setattr(os, "preadv", fails)
    with Reader() as reader, pytest.raises(CheckpointError, match=r"x.safetensors: cannot be read: Input/output error"):
        reader.tensor(info)


def test_a_header_that_cannot_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(CheckpointError, match=r"x.safetensors: cannot be read: Permission denied"):
        read_header(file, CheckpointError)


def test_a_range_past_the_end(descriptor: int) -> None:
    assert read_range(descriptor, 7, 100) == b"789"
    assert hash_range(descriptor, 7, 100) == hashlib.sha256(b"789").hexdigest()


@pytest.mark.parametrize("size", [4, 30])
def test_space_that_cannot_be_reserved(descriptor: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is set, and what a resumed file holds already is not cut off."""

    def unsupported(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    reserve(descriptor, size)
    assert os.fstat(descriptor).st_size == max(size, 10)
    assert read_range(descriptor, 0, 10) == b"0123456789"


def test_a_disk_without_room_is_not_taken_for_that(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        reserve(descriptor, 30)
    assert os.fstat(descriptor).st_size == 10


def test_a_header_that_outgrows_its_place() -> None:
    layout = {"a": (TensorSpec("F32", (4,)), 0)}
    needed = len(build_header(layout)) - 8
    assert len(build_header(layout, needed + 8)) == needed + 16
    with pytest.raises(AssertionError, match="were reserved for it"):
        build_header(layout, 8)
