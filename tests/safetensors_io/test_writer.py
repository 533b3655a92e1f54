"""The streaming writer against safetensors' own reader: any tensors, in any order of writing."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qmerge.errors import CheckpointError, DiskError, RoomError
from qmerge.safetensors_io.disk import write_file
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.writer import LEAST_IN_THREAD, LONGEST_TEXT, FileLayout, ShardWriter
from qmerge.types import BITS, SAFETENSORS_DTYPES, TensorSpec

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
# Any Unicode text, with quotes, backslashes and control characters; only __metadata__ is reserved.
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda n: n != "__metadata__"
)
TEXTS = st.dictionaries(NAMES, st.text(st.characters(exclude_categories=("Cs",)), max_size=100), max_size=3)
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found = {}
    for name in draw(st.lists(NAMES, max_size=8, unique=True)):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(SHAPES)
        count = int(torch.tensor(shape).prod()) if shape else 1
        raw = torch.tensor(
            list(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))), dtype=torch.uint8
        )
        found[name] = (
            (raw & 1).bool().view(shape)
            if dtype is torch.bool
            else raw.view(dtype).view(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
    return found  # fmt: skip


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit (NaN equals the same NaN)."""
    return one.dtype == two.dtype and one.shape == two.shape and raw(one) == raw(two)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) if tensor.numel() else b""


def layout_of(found: dict[str, torch.Tensor], texts: dict[str, str]) -> FileLayout:
    specs = {name: TensorSpec(SAFETENSORS_DTYPES[x.dtype], tuple(x.shape)) for name, x in found.items()}
    return FileLayout.of({**specs, **{name: TensorSpec("U8", (-1,)) for name in texts}})


def write(
    path: Path, found: dict[str, torch.Tensor], texts: dict[str, str], draw: st.DataObject | None = None
) -> dict[str, Any]:
    """Everything in a random order, each tensor in pieces, two of them interleaved."""
    names = list(draw.draw(st.permutations(list(found)))) if draw else list(found)
    writer = ShardWriter(path, layout_of(found, texts))
    for name in names:
        sink = writer.step((name,))
        flat = found[name].flatten()
        cut = draw.draw(st.integers(0, flat.numel())) if draw else 0
        sink.append(name, flat[:cut])
        sink.append_bytes(name, bytearray(raw(flat[cut:])))
        assert sink.finish()[name] == hashlib.sha256(raw(flat)).hexdigest()
    writer.step_done({}, texts)
    assert not path.exists(), "nothing has the final name yet"
    record = writer.finish()
    assert not path.exists(), "whole, but not yet published"
    writer.publish()
    return record


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert data[8:9] == b"{", "the specification wants the header to begin with a brace"
    text = data[8 : 8 + length].decode()
    assert text.rstrip(" ")[-1] == "}", "padded with spaces alone"
    return json.loads(text), length


@settings(max_examples=150)
@given(found=tensors(), texts=TEXTS, data=st.data())
def test_written_in_any_order_and_read_by_the_library(
    found: dict[str, torch.Tensor], texts: dict[str, str], data: st.DataObject
) -> None:
    texts = {name: text for name, text in texts.items() if name not in found}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        record = write(path, found, texts, data)
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == found.keys() | texts.keys()
            assert opened.metadata() == {"format": "pt"}
            for name, tensor in found.items():
                assert same(opened.get_tensor(name), tensor), name
            for name, text in texts.items():
                assert bytes(opened.get_tensor(name).tolist()).decode() == text
        content = path.read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        check_specification(path)
        assert list(Path(folder).iterdir()) == [path]


def check_specification(path: Path) -> None:
    """Header aligned, tensors aligned to their dtype, without holes or overlaps, up to the end of the file."""
    header, length = header_of(path)
    header.pop("__metadata__")
    assert (8 + length) % 8 == 0
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == position, name
        assert entry["dtype"] in BITS and (8 + length + begin) % max(1, BITS[entry["dtype"]] // 8) == 0, name
        position = end
    assert 8 + length + position == path.stat().st_size
    read_header(path, CheckpointError)


def test_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    found = {"a": torch.arange(10), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int8)}
    write(tmp_path / "one", found, {"t": "x", "s": "y"})
    write(tmp_path / "two", dict(reversed(found.items())), {"s": "y", "t": "x"})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_interleaved_steps(tmp_path: Path) -> None:
    """Several workers write to one file at once, each to its own tensors."""
    found = {name: torch.randn(100) for name in "abcd"}
    writer = ShardWriter(tmp_path / "model", layout_of(found, {}))
    sinks = {name: writer.step((name,)) for name in found}
    for start in range(0, 100, 10):
        for name, sink in sinks.items():
            sink.append(name, found[name][start : start + 10])
    for name, sink in sinks.items():
        assert sink.finish()[name] == hashlib.sha256(raw(found[name])).hexdigest()
    writer.finish()
    writer.publish()
    with safe_open(tmp_path / "model", "pt") as opened:
        assert all(same(opened.get_tensor(name), found[name]) for name in found)


@pytest.mark.parametrize("length", [0, 1, 8, LONGEST_TEXT])
def test_texts_up_to_the_longest(tmp_path: Path, length: int) -> None:
    write(tmp_path / "model", {"a": torch.ones(3)}, {"t": "x" * length, "u": "y"})
    with safe_open(tmp_path / "model", "pt") as opened:
        assert opened.get_tensor("t").shape == (length,) and bytes(opened.get_tensor("u").tolist()) == b"y"
    check_specification(tmp_path / "model")


def test_large_parts_are_hashed_in_order(tmp_path: Path) -> None:
    """Parts that a thread hashes, small ones between them, of two steps that write at the same time."""
    names, size = ("a", "b"), 5 * LEAST_IN_THREAD
    shard = ShardWriter(tmp_path / "x", FileLayout.of({name: TensorSpec("U8", (size,)) for name in names}))
    data = {name: os.urandom(size) for name in names}
    sinks = {name: shard.step((name,)) for name in names}
    edges = [0, LEAST_IN_THREAD, 2 * LEAST_IN_THREAD, 2 * LEAST_IN_THREAD + 7, 4 * LEAST_IN_THREAD, size]
    for start, stop in pairwise(edges):
        for name, sink in sinks.items():
            sink.append_bytes(name, bytearray(data[name][start:stop]))
    for name, sink in sinks.items():
        assert sink.finish() == {name: hashlib.sha256(data[name]).hexdigest()}
        assert shard.read(name) == data[name]
    shard.close()


def test_one_value_with_the_strides_of_a_larger_tensor(tmp_path: Path) -> None:
    """The scale of a weight with one row: contiguous, says torch, but not viewable as bytes."""
    value = torch.tensor([[1.5, 2.5]])[:, :1].as_strided((1, 1), (2, 2))
    assert value.is_contiguous() and value.flatten().stride() == (2,)
    writer = ShardWriter(tmp_path / "model", layout_of({"a": value}, {}))
    sink = writer.step(("a",))
    sink.append("a", value)
    sink.finish()
    writer.finish()
    writer.publish()
    with safe_open(tmp_path / "model", "pt") as file:
        assert file.get_tensor("a").tolist() == [[1.5]]


def test_a_tensor_that_is_not_complete_is_a_bug(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "model", layout_of({"a": torch.ones(4)}, {}))
    sink = writer.step(("a",))
    sink.append("a", torch.ones(3))
    with pytest.raises(AssertionError, match="12 of 16 bytes"):
        sink.finish()
    writer.close()
    assert not (tmp_path / "model").exists()


def test_a_tensor_that_is_too_long_is_a_bug(tmp_path: Path) -> None:
    """It must not overwrite the tensor after it."""
    writer = ShardWriter(tmp_path / "model", layout_of({"a": torch.ones(4), "b": torch.ones(4)}, {}))
    sink = writer.step(("a",))
    with pytest.raises(AssertionError):
        sink.append("a", torch.ones(5))
        sink.finish()
    writer.close()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_honours_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "model", {"a": torch.ones(3)}, {})
        write_file(tmp_path / "config.json", b"{}")
    finally:
        os.umask(before)
    for path in (tmp_path / "model", tmp_path / "config.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_at_the_temporary_name_is_not_followed(tmp_path: Path, resume: bool, dangling: bool) -> None:
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_text("mine")
    (tmp_path / "model.partial").symlink_to(victim)
    with pytest.raises(DiskError):
        ShardWriter(tmp_path / "model", layout_of({"a": torch.ones(3)}, {}), resume)
    assert victim.exists() != dangling and (dangling or victim.read_text() == "mine")


def test_a_link_at_the_final_name_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "model").symlink_to(victim)
    writer = ShardWriter(tmp_path / "model", layout_of({"a": torch.ones(1)}, {}))
    sink = writer.step(("a",))
    sink.append("a", torch.ones(1))
    sink.finish()
    writer.finish()
    writer.publish()
    assert victim.read_text() == "mine" and not (tmp_path / "model").is_symlink()


def test_an_older_temporary_file_is_not_taken_over_unasked(tmp_path: Path) -> None:
    (tmp_path / "model.partial").write_bytes(b"something")
    with pytest.raises(DiskError):
        ShardWriter(tmp_path / "model", layout_of({"a": torch.ones(3)}, {}))


def test_room_is_taken_first(tmp_path: Path) -> None:
    """A full disk is noticed before the work, not after it."""
    layout = layout_of({"a": torch.ones(1_000_000)}, {})
    writer = ShardWriter(tmp_path / "model", layout)
    assert (tmp_path / "model.partial").stat().st_size == layout.most_bytes >= 4_000_000
    writer.close()


def test_a_small_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_file(path, b"old")

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="Input/output"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"


@given(found=tensors())
def test_hashes_find_a_changed_byte(found: dict[str, torch.Tensor]) -> None:
    """--resume relies on this: equal bytes match, one changed bit does not."""
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder) / "model", layout_of(found, {}))
        hashes = {}
        for name, tensor in found.items():
            sink = writer.step((name,))
            sink.append(name, tensor)
            hashes.update(sink.finish())
        assert writer.matches(hashes)
        for name, tensor in found.items():
            if tensor.numel():
                first = raw(tensor)[0]
                writer.write(name, 0, bytes([first ^ 1]))
                assert not writer.matches({name: hashes[name]})
        writer.close()


# --- what the disk does ----------------------------------------------------------------------------------------------


def test_writes_that_take_less_than_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header and texts included: a write may stop anywhere."""
    found = {"a": torch.arange(300), "b": torch.ones(7)}
    whole = write(tmp_path / "whole", found, {"t": "text"})
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, memoryview(data)[: 1 + len(data) // 3], at))
    assert write(tmp_path / "short", found, {"t": "text"}) == whole
    write_file(tmp_path / "small", b"0123456789")
    assert (tmp_path / "short").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "small").read_bytes() == b"0123456789"


@pytest.mark.parametrize("place", ["header", "tensor", "text"])
def test_bytes_that_come_back_otherwise(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was meant to be written decides, not what is on the disk; the control is every other test."""
    path = tmp_path / "model"
    layout = layout_of({"a": torch.ones(4)}, {"t": "text"})
    writer = ShardWriter(path, layout)
    sink = writer.step(("a", "t"))
    sink.append("a", torch.ones(4))
    sink.append_bytes("t", bytearray(b"text"))
    sink.finish()
    at = {"header": 20, "tensor": layout.data_start + 5, "text": layout.data_start + layout.fixed_bytes + 1}[place]
    fsync = os.fsync

    def damaging(descriptor: int) -> None:
        fsync(descriptor)
        with (tmp_path / "model.partial").open("r+b") as file:
            file.seek(at)
            file.write(b"\xff")

    monkeypatch.setattr(os, "fsync", damaging)
    with pytest.raises(DiskError, match="other bytes than were written"):
        writer.finish()
    writer.close()
    assert not path.exists()


@pytest.mark.parametrize(
    ("number", "error"), [(28, RoomError), (122, RoomError), (5, DiskError), (13, DiskError), (30, DiskError)]
)
def test_every_error_of_the_disk_is_one_line(
    tmp_path: Path, number: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match=os.strerror(number)):
        write_file(tmp_path / "config.json", b"{}")


def test_a_small_file_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "config.json.partial").symlink_to(victim)
    write_file(tmp_path / "config.json", b"{}")
    assert victim.read_text() == "mine" and (tmp_path / "config.json").read_bytes() == b"{}"
