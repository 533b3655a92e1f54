"""Patches: each folder restores the other one byte for byte, or one line of error explains why not and nothing is left."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qmerge import run
from qmerge.checkpoint import folder as folder_module
from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.patch import apply_patch, codec, make_patch, unmerge
from qmerge.patch import file as patch_file
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.header import build_header
from qmerge.types import BITS, TensorSpec

from ..conftest import snapshot
from ..parity import bases

DEMO = Path(__file__).parent.parent.parent / "qmerge/demo"
DTYPES = ("U8", "I8", "I32", "BF16", "F16", "F32", "F64", "BOOL")
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def write(path: Path, tensors: Tensors, padding: int = 0) -> None:
    """A safetensors file with its tensors in this order (aligned or not); ``padding`` makes the header longer."""
    layout, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        layout[name] = (TensorSpec(dtype, shape), position)
        position += len(data)
    length = len(build_header(layout)) - 8 + padding
    path.write_bytes(build_header(layout, length) + b"".join(data for _, _, data in tensors.values()))


def folder_of(path: Path, shards: dict[str, Tensors], files: dict[str, bytes], padding: int = 0) -> Path:
    path.mkdir(parents=True)
    for name, tensors in shards.items():
        write(path / name, tensors, padding)
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    return path


def round_trip(base: Path, merged: Path, folder: Path) -> int:
    """Make a patch, apply it and unmerge; both results must be equal byte for byte. Returns the size of the patch."""
    summary = make_patch(base, merged, folder / "x.patch")
    apply_patch(base, folder / "x.patch", folder / "applied")
    unmerge(merged, folder / "x.patch", folder / "unmerged")
    assert snapshot(folder / "applied") == snapshot(merged)
    assert snapshot(folder / "unmerged") == snapshot(base)
    assert summary.nbytes == (folder / "x.patch").stat().st_size
    return summary.nbytes


# --- the codec -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=3000), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.floats(0, 1))
@example(b"\0\0\0\0\1\0\0\0\0\0\2\0\0", 1, False, 0.0)  # small, and the difference is nearly all zeros
def test_unpack_inverts_pack(data: bytes, width: int, text: bool, zeros: float) -> None:
    data = data[: len(data) // width * width]
    keep = np.random.default_rng(len(data)).random(len(data)) >= zeros
    data = (np.frombuffer(data, np.uint8) * keep).astype(np.uint8).tobytes()
    packed = codec.pack(data, width, text)
    assert codec.unpack(packed, len(data)) == (data, width)
    assert len(packed) <= codec.LARGEST_BLOCK
    with pytest.raises(codec.DamagedError):
        codec.unpack(packed, len(data) + width)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 100_000])
def test_gaps_of_every_length(gap: int) -> None:
    data = bytes(gap) + b"\x01" + bytes(gap) + b"\xff" + bytes(gap)
    assert codec._unsparse(codec._sparse(data), len(data)) == data


@given(st.binary(max_size=200), st.integers(0, 100))
def test_garbage_never_unpacks_to_more_than_was_announced(garbage: bytes, size: int) -> None:
    for unpack in codec.UNPACK.values():
        with contextlib.suppress(codec.DamagedError):
            assert len(unpack(garbage, size)) <= max(size, len(garbage)) + 1


def test_bombs_are_not_unpacked() -> None:
    """50 MB of zeros, packed into a few kilobytes and announced as ten bytes."""
    for encoding in (codec.HUFFMAN, codec.DEFLATE, codec.LZMA):
        bomb = codec.PACK[encoding](bytes(50 * 2**20))
        block = b"\x01" + struct.pack("<BI", encoding, len(bomb)) + bomb
        tracemalloc.start()
        try:
            with pytest.raises(codec.DamagedError):
                codec.unpack(block, 10)
            assert tracemalloc.get_traced_memory()[1] < 16 * 2**20  # Huffman's own size is 6 MB
        finally:
            tracemalloc.stop()


def test_differences_work_in_both_directions() -> None:
    a, b = bytearray(b"\x00\xff\x01\x80"), bytearray(b"\x01\x00\xff\x7f")
    for width in (1, 2, 4):
        change = codec.difference(b, a, width)
        assert codec.add_difference(a, change, width) == b
        assert codec.subtract_difference(b, change, width) == a


# --- invented checkpoints --------------------------------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Any, Any]:
    """Base and merged: shards and other files; tensors are changed, equal, added, removed, of another dtype, or moved."""
    names = [f"t{i}" for i in range(draw(st.integers(3, 8)))]
    sides: list[dict[str, Tensors]] = [{}, {}]
    counts = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    for side, count in zip(sides, counts, strict=True):
        side |= {f"model-{i}-of-{count}.safetensors" if count > 1 else "model.safetensors": {} for i in range(count)}
    for name in names:
        tensor = draw(tensors())
        fate = draw(st.sampled_from(["changed", "equal", "added", "removed", "retyped"]))
        other = tensor
        if fate == "changed":
            rng = np.random.default_rng(draw(st.integers(0, 99)))
            noise = rng.integers(1, 256, len(tensor[2])) * (rng.random(len(tensor[2])) < 0.5)
            other = (*tensor[:2], bytes(a ^ int(b) for a, b in zip(tensor[2], noise, strict=True)))
        elif fate == "retyped":
            other = draw(tensors())
        for side, content, absent in ((sides[0], tensor, "added"), (sides[1], other, "removed")):
            if fate != absent:
                side[draw(st.sampled_from(sorted(side)))][name] = content
    content = st.binary(max_size=40)
    common = {"config.json": draw(content), "LICENSE": draw(content), "sub/a b.txt": draw(content)}
    changed = {**common, "config.json": draw(content), "qmerge.json": draw(content)}
    del changed[draw(st.sampled_from(["LICENSE", "sub/a b.txt"]))]
    return (sides[0], common, draw(st.integers(0, 9))), (sides[1], changed, draw(st.integers(0, 9)))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.sampled_from([3, 1, 5, 2, 0]), max_size=3)))
    size = int(np.prod(shape, dtype=int)) * BITS[dtype] // 8
    return dtype, shape, np.random.default_rng(draw(st.integers(0, 99))).bytes(size)


@settings(max_examples=40)
@given(pairs())
def test_every_byte_of_both_folders_is_restored(pair: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        round_trip(folder_of(folder / "base", *pair[0]), folder_of(folder / "merged", *pair[1]), folder)


def test_tensors_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "BLOCK", 64)
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, 1000, np.uint8)
    new = old + (rng.random(1000) < 0.02)
    base = folder_of(tmp_path / "base", {"model.safetensors": {"w": ("U8", (1000,), old.tobytes())}}, {})
    merged = folder_of(tmp_path / "merged", {"model.safetensors": {"w": ("U8", (1000,), new.tobytes())}}, {})
    round_trip(base, merged, tmp_path)


def test_nan_is_restored_bit_for_bit(tmp_path: Path) -> None:
    old, new = (np.array([np.nan, 0.0, 1.0], "<f4") for _ in range(2))
    new.view("<u4")[0] |= 1  # another NaN
    new[1] = -0.0
    base = folder_of(tmp_path / "base", {"model.safetensors": {"w": ("F32", (3,), old.tobytes())}}, {})
    merged = folder_of(tmp_path / "merged", {"model.safetensors": {"w": ("F32", (3,), new.tobytes())}}, {})
    round_trip(base, merged, tmp_path)


# --- real merges -----------------------------------------------------------------------------------------------------


def merge(base: Path, adapter: Path, target: str, out: Path, **more: Any) -> Path:
    run.merge(make_recipe({"base": str(base), "adapter": str(adapter), "target": target, "out": str(out), **more}))
    return out


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model merged into NF4: two million parameters in 123 tensors."""
    out = tmp_path_factory.mktemp("patch") / "merged"
    return merge(DEMO / "base-nf4", DEMO / "adapter", "nf4", out, rounding="stochastic")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_merge_from_nf4_to_nf4_is_small(rounding: str, tmp_path: Path) -> None:
    merged = merge(DEMO / "base-nf4", DEMO / "adapter", "nf4", tmp_path / "merged", rounding=rounding)
    size = round_trip(DEMO / "base-nf4", merged, tmp_path)
    largest_share = {"nearest": 0.01, "stochastic": 0.045}[rounding]  # measured: 0.5 % and 4.1 %, with the card
    assert size - page_size(merged) < largest_share * sum(path.stat().st_size for path in merged.iterdir())


def page_size(merged: Path) -> int:
    """Bytes of the report in a patch: it holds a plotting library, and does not grow with the model."""
    return len(zlib.compress((merged / "qmerge.html").read_bytes(), 9))


@pytest.mark.slow
def test_a_calibrated_merge_is_small(tmp_path: Path) -> None:
    settings = {"calibration": str(DEMO / "calibration.txt"), "calibration_tokens": 8192, "sequence_length": 128}
    merged = merge(DEMO / "base-nf4", DEMO / "adapter", "nf4", tmp_path / "merged", rounding="preserve", **settings)
    size = round_trip(DEMO / "base-nf4", merged, tmp_path)
    assert size - page_size(merged) < 0.065 * sum(path.stat().st_size for path in merged.iterdir())  # measured: 5.6 %


def test_a_merge_into_another_format_stores_both_sides_or_one(tmp_path: Path) -> None:
    merged = merge(DEMO / "base-nf4", DEMO / "adapter", "bf16", tmp_path / "merged")
    both = round_trip(DEMO / "base-nf4", merged, tmp_path)
    summary = make_patch(DEMO / "base-nf4", merged, tmp_path / "one.patch", reversible=False)
    assert summary.base_bytes == 0
    assert summary.nbytes < both - 400_000  # the weights of the base: half a megabyte that hardly compresses
    apply_patch(DEMO / "base-nf4", tmp_path / "one.patch", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(merged)
    with pytest.raises(CheckpointError, match="made one way"):
        unmerge(merged, tmp_path / "one.patch", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", ["gptq", "gptq-act-order-asym"])
def test_a_merge_from_gptq_to_gptq_is_small(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(bases.needs(kind))
    from .. import models

    base = bases.make(kind, tmp_path / "base")
    adapter = models.adapter(models.llama(**bases.LLAMA), tmp_path / "adapter", size=0.0005)
    merged = merge(base, adapter, "gptq", tmp_path / "merged", rounding="stochastic")
    summary = make_patch(base, merged, tmp_path / "only.patch")
    assert summary.replaced == 0
    assert summary.changed == 14  # qweight of 7 layers of 2 blocks; scales, zeros and g_idx cost nothing
    raw = sum(info.nbytes for info in headers(merged).values() if info.name.endswith("qweight"))
    assert summary.delta_bytes < 0.15 * raw
    round_trip(base, merged, tmp_path)


def headers(folder: Path) -> dict[str, Any]:
    return patch_file.read_header(folder / "model.safetensors", CheckpointError)[0]


def test_safetensors_lists_a_patch(demo: Path, tmp_path: Path) -> None:
    make_patch(DEMO / "base-nf4", demo, tmp_path / "x.patch")
    with safe_open(tmp_path / "x.patch", framework="pt") as opened:
        assert "delta/model.safetensors:model.layers.0.mlp.up_proj.weight" in opened.keys()  # noqa: SIM118
        assert json.loads(opened.metadata()["manifest"])["base"]["name"] == "base-nf4"


def test_the_codec_packs_differences_better_than_lzma_packs_xor(demo: Path) -> None:
    """The reason for a codec of qmerge's own."""
    import lzma

    ours = theirs = 0
    old, new = headers(DEMO / "base-nf4"), headers(demo)
    for name, info in new.items():
        a, b = (bytearray(i.file.read_bytes()[i.offset : i.offset + i.nbytes]) for i in (info, old[name]))
        if a != b:
            ours += len(codec.pack(codec.difference(a, b, 1), 1))
            theirs += len(lzma.compress(bytes(x ^ y for x, y in zip(a, b, strict=True))))
    assert ours < 0.75 * theirs


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, a merged folder and their patch; a few hundred bytes each."""
    data = bytes(range(64))
    files = {"config.json": b"{}", "LICENSE": b"Do as you like.\n"}
    shards = {"model.safetensors": {"a": ("U8", (64,), data), "b": ("F32", (2,), bytes(8))}}
    base = folder_of(tmp_path / "base", shards, files)
    shards = {"model.safetensors": {"a": ("U8", (64,), data[:-1] + b"\xff"), "c": ("F16", (2,), b"wxyz")}}
    merged = folder_of(tmp_path / "merged", shards, {**files, "qmerge.json": b'{"a": 1}'})
    make_patch(base, merged, tmp_path / "x.patch")
    return base, merged, tmp_path / "x.patch"


def refused(call: Callable[[], object], *, error: type[Exception], match: str, out: Path) -> None:
    before = {path for path in out.parent.rglob("*") if path != out}
    with pytest.raises(error, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert {path for path in out.parent.rglob("*") if path != out} == before
    assert not out.exists()


def test_a_flipped_bit_is_found_anywhere(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, patch = small
    whole = patch.read_bytes()
    for position in (*range(16), *range(16, len(whole), 3), len(whole) - 1):
        patch.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError):
            patch_file.read_patch(patch)
    patch.write_bytes(whole)
    apply_patch(base, patch, tmp_path / "out")  # the control


@pytest.mark.parametrize(("old", "new"), [(b'"U8"', b'"I8"'), (b" ", b"\t")], ids=["dtype", "white-space"])
def test_a_header_with_another_spelling_is_refused(
    old: bytes, new: bytes, small: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """The hash does not cover dtypes and padding of the header, which change nothing for a reader."""
    base, _, patch = small
    while (length := struct.unpack("<Q", patch.read_bytes()[:8])[0]) and patch.read_bytes()[
        7 + length : 8 + length
    ] != b" ":
        forge(patch, lambda manifest: manifest["base"].update(name=manifest["base"]["name"] + "x"))
    data = patch.read_bytes()
    at = data.rindex(old, 0, 8 + length)
    patch.write_bytes(data[:at] + new + data[at + len(old) :])
    refused(
        lambda: apply_patch(base, patch, tmp_path / "out"), error=CheckpointError, match="damaged", out=tmp_path / "out"
    )


def test_a_patch_with_fewer_or_more_bytes_is_refused(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, patch = small
    whole = patch.read_bytes()
    for data in (*(whole[:n] for n in range(0, len(whole), 37)), whole[:-1], whole + b"\x00"):
        patch.write_bytes(data)
        refused(
            lambda: apply_patch(base, patch, tmp_path / "out"),
            error=CheckpointError,
            match="x.patch",
            out=tmp_path / "out",
        )


def forge(patch: Path, change: Callable[[dict[str, Any]], None], metadata: dict[str, str] | None = None) -> None:
    """Put another manifest into the file, with a SHA-256 that fits."""
    opened = patch_file.read_patch(patch)
    manifest = json.loads(opened.manifest.model_dump_json())
    change(manifest)
    infos = sorted(opened.blobs.values(), key=lambda info: info.offset)
    data = patch.read_bytes()[infos[0].offset :]
    text = json.dumps(manifest)
    sealed = hashlib.sha256(text.encode() + data).hexdigest()
    values = {patch_file.MAGIC: patch_file.VERSION, "manifest": text, "sha256": sealed, **(metadata or {})}
    patch.write_bytes(patch_file.header_of(values, {info.name: info.nbytes for info in infos}) + data)


PATHS = ["../x", "a/../../x", "/etc/x", "C:x", "C:\\x", "a\\b", "\\\\host\\x", "", ".", "./x", "a//b", "x\n", "x\x00",
         ".git/hooks/x", ".GIT/x", "x.partial", ".qmerge.lock", "LICENSE/x", "LICENSE"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("side", ["merged", "base"])
def test_file_names_stay_inside(path: str, side: str, small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, patch = small

    def rename(manifest: dict[str, Any]) -> None:
        next(f for f in manifest[side]["files"] if f["path"] == "config.json")["path"] = path

    forge(patch, rename)
    refused(
        lambda: apply_patch(base, patch, tmp_path / "out"),
        error=CheckpointError,
        match="is corrupted: (invalid|duplicate|reserved) file name|is corrupted: the file .* inside another",
        out=tmp_path / "out",
    )


def set_first(how: str, index: int, value: object) -> Callable[[dict[str, Any]], None]:
    """Change one entry of the first segment of this kind."""

    def change(manifest: dict[str, Any]) -> None:
        segments = [s for f in manifest["merged"]["files"] for s in f["segments"] if s[1] == how]
        segments[0][index] = value

    return change


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "more bytes than the file has": (set_first("copy", 0, 2**50), "do not add up to its"),
    "a missing file": (set_first("copy", 2, 99), "does not have"),
    "a negative file": (set_first("copy", 2, -1), "does not have"),
    "past the end": (set_first("copy", 3, 2**40), "does not have"),
    "no such blob": (set_first("delta", 4, "other"), "'other', which is missing"),
    "a negative size": (set_first("copy", 0, -1), "manifest"),
    "a size that is no number": (set_first("copy", 0, "1"), "manifest"),
    "an unknown kind": (set_first("copy", 1, "run"), "manifest"),
    "an unknown field": (lambda m: m.update(run="sh"), "manifest"),
    "another blob": (lambda m: [s.__setitem__(4, "merged/qmerge.json:") for f in m["merged"]["files"] for s in f["segments"]
                                if s[1] == "delta"] and None, "damaged"),
    "a huge file": (lambda m: m["merged"]["files"][0].update(
        bytes=2**60, segments=[[2**60, "whole", -1, 0, "merged/qmerge.json:"]]), "needs"),
    "another hash": (lambda m: m["merged"]["files"][0].update(sha256="0" * 64), "the restored file has SHA-256 .* expected 0000"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_manifest_is_refused(case: str, small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, patch = small
    change, match = FORGED[case]
    forge(patch, change)
    error = RoomError if case == "a huge file" else CheckpointError
    refused(lambda: apply_patch(base, patch, tmp_path / "out"), error=error, match=match, out=tmp_path / "out")


def test_a_forgery_that_changes_nothing_is_accepted(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The control: the forgeries above are refused for their changes, not because they are forged."""
    base, merged, patch = small
    forge(patch, lambda manifest: None)
    apply_patch(base, patch, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(merged)


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"PK\x03\x04 not a patch", "not a whole safetensors file"), (b"", "not a whole safetensors file")],
)
def test_another_file_is_refused(content: bytes, match: str, small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, patch = small
    patch.write_bytes(content)
    refused(
        lambda: apply_patch(base, patch, tmp_path / "out"), error=CheckpointError, match=match, out=tmp_path / "out"
    )


def test_messages_for_a_model_and_a_newer_patch(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, merged, patch = small
    model, out = merged / "model.safetensors", tmp_path / "out"
    refused(lambda: apply_patch(base, model, out), error=CheckpointError, match="not a patch", out=out)
    forge(patch, lambda manifest: None, {patch_file.MAGIC: "2"})
    refused(lambda: apply_patch(base, patch, out), error=CheckpointError, match="version 2.*reads version 1", out=out)


@pytest.mark.parametrize("damage", ["byte", "size", "missing"])
@pytest.mark.parametrize("way", [apply_patch, unmerge])
def test_the_wrong_folder_is_named(way: Any, damage: str, small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, merged, patch = small
    folder = base if way is apply_patch else merged
    path, out = folder / "model.safetensors", tmp_path / "out"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    data = path.read_bytes()
    {"byte": lambda: path.write_bytes(data[:-1] + b"\x77"), "size": lambda: path.write_bytes(data + b"\x00"),
     "missing": path.unlink}[damage]()  # fmt: skip
    refused(lambda: way(folder, patch, out), error=CheckpointError, match=f"model.safetensors.*{expected}", out=out)


def test_files_that_the_patch_does_not_need_may_differ(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, merged, patch = small
    (base / "notes.txt").write_text("mine")
    apply_patch(base, patch, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(merged)


def test_out_must_be_new_or_empty(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, merged, patch = small
    (tmp_path / "out").mkdir()
    apply_patch(base, patch, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    for out in (tmp_path / "out", base / "inside", patch):
        with pytest.raises(RecipeError):
            apply_patch(base, patch, out)
    assert snapshot(tmp_path / "out") == before == snapshot(merged)


def test_a_patch_is_a_new_file_outside_both_folders(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, merged, patch = small
    whole = patch.read_bytes()
    for file in (patch, base / "x.patch", merged / "x.patch", tmp_path / "no/x.patch"):
        with pytest.raises(RecipeError):
            make_patch(base, merged, file)
    assert patch.read_bytes() == whole
    assert not (merged / "x.patch").exists()


@pytest.mark.parametrize("name", [".qmerge-journal.jsonl", "model.safetensors.partial"])
def test_an_unfinished_folder_is_refused(name: str, small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, merged, _ = small
    (merged / name).write_text("")
    out = tmp_path / "y.patch"
    refused(lambda: make_patch(base, merged, out), error=CheckpointError, match="not finished", out=out)


def test_links_that_lead_out_are_refused(small: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, merged, _ = small
    (tmp_path / "secret").write_text("mine")
    (merged / "notes.txt").symlink_to(tmp_path / "secret")
    out = tmp_path / "y.patch"
    refused(lambda: make_patch(base, merged, out), error=CheckpointError, match="link", out=out)


def test_a_folder_that_changes_during_the_run_is_refused(
    small: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merged, _ = small
    pack = codec.pack

    def meddle(*args: Any, **more: Any) -> bytes:
        (base / "LICENSE").write_text("Do not.\n")
        return pack(*args, **more)

    monkeypatch.setattr(codec, "pack", meddle)
    out = tmp_path / "y.patch"
    refused(lambda: make_patch(base, merged, out), error=CheckpointError, match="changed while", out=out)


# --- room, interruption ----------------------------------------------------------------------------------------------


def test_room_is_checked_first(small: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, merged, patch = small
    monkeypatch.setattr(folder_module, "free_bytes", lambda out: 1000)
    monkeypatch.setattr(patch_file, "free_bytes", lambda out: 10)
    out = tmp_path / "out"
    refused(lambda: apply_patch(base, patch, out), error=RoomError, match="free", out=out)
    file = tmp_path / "y.patch"
    refused(lambda: make_patch(base, merged, file), error=RoomError, match="no room", out=file)


STRIKES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("strike", STRIKES, ids=["no-room", "ctrl-c"])
@pytest.mark.parametrize("way", ["make", "apply", "unmerge"])
def test_an_interruption_leaves_nothing_behind(
    way: str, strike: BaseException, small: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt every sync and every rename, one after the other, until a run is complete."""
    base, merged, patch = small
    out = tmp_path / "out"
    call = {
        "make": lambda: make_patch(base, merged, out),
        "apply": lambda: apply_patch(base, patch, out),
        "unmerge": lambda: unmerge(merged, patch, out),
    }[way]
    before, at = snapshot(tmp_path), 0
    expected = RoomError if isinstance(strike, OSError) else KeyboardInterrupt
    while True:
        with monkeypatch.context() as patched:
            struck = install(patched, at, strike)
            with contextlib.suppress(expected):
                call()
            if not struck():
                break
        assert snapshot(tmp_path) == before
        assert not out.exists()
        at += 1
    assert at >= {"make": 2, "apply": 8, "unmerge": 6}[way]
    assert snapshot(tmp_path) != before


def install(monkeypatch: pytest.MonkeyPatch, at: int, strike: BaseException) -> Callable[[], bool]:
    """Raise ``strike`` at the sync or rename number ``at``. The returned function tells whether that happened."""
    count = iter(range(10**6))
    fsync = os.fsync
    replace = Path.replace
    hit = []

    def around(change: Callable[[], Any]) -> Any:
        if next(count) == at:
            hit.append(at)
            raise strike
        return change()

    monkeypatch.setattr(os, "fsync", lambda fd: around(lambda: fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda path, to: around(lambda: replace(path, to)))
    return lambda: bool(hit)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """The largest amount that Python and numpy have allocated at a time, for a tensor of 48 MB."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, 48 * 2**20, np.uint8)
    new = old + rng.choice(np.array([0, 1, 255], np.uint8), len(old), p=[0.95, 0.025, 0.025])
    shape = (len(old),)
    base = folder_of(tmp_path / "base", {"model.safetensors": {"w": ("U8", shape, old.tobytes())}}, {})
    merged = folder_of(tmp_path / "merged", {"model.safetensors": {"w": ("U8", shape, new.tobytes())}}, {})
    tracemalloc.start()
    try:
        summary = make_patch(base, merged, tmp_path / "x.patch")
        apply_patch(base, tmp_path / "x.patch", tmp_path / "out")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 32 * 2**20
    entropy = -(0.05 * np.log2(0.025) + 0.95 * np.log2(0.95)) / 8
    assert entropy < summary.delta_bytes / len(old) < 1.1 * entropy  # a Huffman code has whole bits
    assert snapshot(tmp_path / "out") == snapshot(merged)
