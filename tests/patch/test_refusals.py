"""Blocks of a patch that were changed, and folders that cannot be in a patch."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from qmerge.errors import CheckpointError
from qmerge.patch import codec, file, folders
from qmerge.patch.codec import DEFLATE, HUFFMAN, PLANE_HEADER, SPARSE, STORED, DamagedError, pack, unpack


def plane(encoding: int, payload: bytes) -> bytes:
    return PLANE_HEADER.pack(encoding, len(payload)) + payload


def sparse(size: int, gaps: bytes, values: bytes) -> bytes:
    packed = codec._huffman(gaps)
    return struct.pack("<II", size, len(packed)) + packed + codec._huffman(values)


def test_control_planes_made_by_hand() -> None:
    assert unpack(b"\x01" + plane(STORED, b"abcd"), 4) == (b"abcd", 1)
    assert unpack(b"\x02" + plane(STORED, b"ac") + plane(STORED, b"bd"), 4) == (b"abcd", 2)
    assert unpack(b"\x01" + plane(SPARSE, sparse(4, b"\x02", b"x")), 4) == (b"\0\0x\0", 1)
    long = np.zeros(2000, np.uint8)
    long[[0, 255, 256, 766, 1999]] = 7  # gaps of 0, 254, 0, 509, 1232
    assert codec._unsparse(codec._sparse(long.tobytes()), 2000) == long.tobytes()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (b"\x01" + plane(STORED, b"abcd") + b"!", "bytes after the last byte plane"),
        (b"\x02" + plane(STORED, b"ac"), "a byte plane is missing"),
        (b"\x01" + plane(STORED, b"abcd")[:-1], "a byte plane of 4 bytes in encoding 0"),
        (b"\x01" + plane(99, b"abcd"), "a byte plane of 4 bytes in encoding 99"),
        (b"\x01" + plane(STORED, b"abc"), "a byte plane has another size"),
        (b"\x01" + plane(DEFLATE, codec._deflate(b"abcde")), "a DEFLATE stream has another size"),
        (b"\x01" + plane(HUFFMAN, codec._huffman(b"abcd") + b"!"), "a DEFLATE stream has another size"),
        (b"\x01" + plane(SPARSE, sparse(4, b"\x02\x00", b"x")), "more or fewer values than gaps"),
        (b"\x01" + plane(SPARSE, sparse(4, b"\x02", b"xy")), "more or fewer values than gaps"),
        (b"\x01" + plane(SPARSE, sparse(4, b"\x04", b"x")), "the gaps of a sparse plane are longer than it"),
    ],
)
def test_changed_blocks(block: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        unpack(block, 4)
    assert unpack(pack(b"abcd", 1), 4) == (b"abcd", 1)


def model(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in ("model.safetensors", *names):
        (folder / name).write_text(name)
    return folder


def test_files_that_cannot_be_in_a_patch(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    linked = model(tmp_path / "linked")
    (linked / "more").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="linked: more is a link to a folder; replace it with the folder"):
        folders.all_files(linked)
    with pytest.raises(CheckpointError, match=r"windows: .*: rename the file"):
        folders.all_files(model(tmp_path / "windows", "a\\b"))
    assert folders.all_files(model(tmp_path / "plain", "a")) == ["a", "model.safetensors"]


def test_a_base_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is not a folder: expected the base"):
        folders.check_file(tmp_path / "x.patch", {"the base": tmp_path / "nothing"})


def test_a_file_that_cannot_be_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(file, "hash_file", fails)
    with pytest.raises(CheckpointError, match="x: cannot be read: Input/output error"):
        file.hash_of(tmp_path / "x")


def test_more_tensors_than_a_header_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = len(file.header_of({}, {"a": 1}))
    monkeypatch.setattr(file, "LARGEST_HEADER", needed - 16)
    with pytest.raises(CheckpointError, match="the patch has 1 tensors and needs a header of"):
        file.header_of({}, {"a": 1})
