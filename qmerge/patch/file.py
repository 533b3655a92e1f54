"""The patch file: a safetensors file whose tensors are packed bytes and whose metadata says what they are for.

A safetensors file, because then every tool that lists tensors lists a patch, and one strict reader of headers serves;
its price, that the header stands first and sizes are known last, is one copy of the (small) data through an unnamed
temporary file. Metadata, all text:

    qmerge_patch    version of this layout
    manifest        JSON, the ``Manifest`` below: both folders, file by file, each file a list of segments
    sha256          of the manifest's bytes and the data after the header

A file is its segments in order: ``[bytes, "copy", file, offset, ""]`` stands in the other folder; ``[bytes, "delta",
file, offset, blob]`` is that with a difference added (base → merged) or taken away (merged → base); ``[bytes, "whole",
-1, 0, blob]`` is in the patch. A blob is a chain of blocks: length (4 bytes), then what ``codec.pack`` made of up to
``codec.BLOCK`` bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmerge.checkpoint import journal
from qmerge.checkpoint.folder import LOCK
from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.patch import codec
from qmerge.safetensors_io.header import LARGEST_HEADER, read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import PARTIAL, hash_file
from qmerge.types import TensorInfo

VERSION = "1"
MAGIC = "qmerge_patch"
TOOLS_FOLDERS = (".git", ".cache")
"""What tools keep about a folder, which is no part of a model; writing there could make git run something."""

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Segment(NamedTuple):
    """Some bytes of a file. ``file`` and ``offset``: in the other folder's list of files; −1 where there is none."""

    bytes: Annotated[int, Field(gt=0, lt=2**63, strict=True)]
    how: Literal["copy", "delta", "whole"]
    file: Annotated[int, Field(ge=-1, strict=True)] = -1
    offset: Count = 0
    blob: str = ""


class PatchFile(BaseModel):
    """A file of one of the folders. ``path``: within the folder, with slashes."""

    model_config = ConfigDict(extra="forbid")
    path: str
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    segments: list[Segment] = []


class Side(BaseModel):
    """One folder, and the name that it had."""

    model_config = ConfigDict(extra="forbid")
    name: str
    files: list[PatchFile]

    @property
    def nbytes(self) -> int:
        return sum(file.bytes for file in self.files)


class Manifest(BaseModel):
    """Both folders. Where ``reversible`` is false, the base's files have no segments."""

    model_config = ConfigDict(extra="forbid")
    made_by: str
    reversible: bool
    base: Side
    merged: Side


@dataclass(frozen=True)
class Patch:
    """A patch that was checked whole. ``blobs``: name → where its packed bytes lie."""

    path: Path
    manifest: Manifest
    blobs: Mapping[str, TensorInfo]

    def blocks(self, name: str, size: int, reader: Reader) -> Iterator[tuple[bytes, int]]:
        """The ``size`` bytes of a blob and their width, block by block.

        Raises:
            CheckpointError: it holds something else.
        """
        info, position = self.blobs[name], 0
        try:
            for start in range(0, size, codec.BLOCK):
                length = _length(self._read(info, position, 4, reader))
                block = self._read(info, position + 4, length, reader)
                yield codec.unpack(block, min(codec.BLOCK, size - start))
                position += 4 + length
            if position != info.nbytes:
                raise codec.DamagedError("more than was announced")
        except codec.DamagedError as cause:
            raise CheckpointError(f"{self.path.name}: {name} is damaged ({cause}); get the patch again") from cause

    def _read(self, info: TensorInfo, start: int, length: int, reader: Reader) -> bytes:
        if start + length > info.nbytes:
            raise codec.DamagedError("less than was announced")
        return bytes(reader.bytes(info, start, start + length))


def _length(data: bytes) -> int:
    length = int(struct.unpack("<I", data)[0])
    if length > codec.LARGEST_BLOCK:
        raise codec.DamagedError(f"a block of {length} bytes")
    return length


def framed(block: bytes) -> bytes:
    """A block as it stands in a blob."""
    return struct.pack("<I", len(block)) + block


def header_of(metadata: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
    """The header of a patch file whose blobs lie one after the other; the one way to write it.

    Raises:
        CheckpointError: it would be longer than the safetensors library reads.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, size in sizes.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    if len(text) > LARGEST_HEADER:
        raise CheckpointError(
            f"a patch of so many tensors needs a header of {len(text)} bytes, the most is {LARGEST_HEADER}"
        )
    return struct.pack("<Q", len(text)) + text


def seal(manifest: str, descriptor: int, start: int) -> str:
    """SHA-256 of the manifest and of a file from ``start`` on."""
    digest, position = hashlib.sha256(manifest.encode()), start
    while data := os.pread(descriptor, 2**22, position):
        digest.update(data)
        position += len(data)
    return digest.hexdigest()


def read_patch(path: Path) -> Patch:
    """Open a patch and check all of it: no byte may differ from what was written, and nothing in it may reach beyond
    what it announces.

    Raises:
        CheckpointError: no patch, of another version, damaged, or made to do harm.
    """
    blobs, metadata = read_header(path, CheckpointError)
    if MAGIC not in metadata:
        raise CheckpointError(f"{path.name} is a safetensors file, but no patch: expected what `qmerge patch` wrote")
    if metadata[MAGIC] != VERSION:
        raise CheckpointError(
            f"{path.name} is a patch of version {metadata[MAGIC][:20]}, this qmerge reads version {VERSION}; "
            f"upgrade qmerge, or make the patch again"
        )
    text = metadata.get("manifest", "")
    ordered = sorted(blobs.values(), key=lambda info: (info.offset, info.nbytes))
    with path.open("rb") as file:
        expected = header_of(metadata, {info.name: info.nbytes for info in ordered})
        same = file.read(len(expected)) == expected  # also the bytes that say nothing: spaces, order, spelling
        if not same or seal(text, file.fileno(), len(expected)) != metadata.get("sha256"):
            raise CheckpointError(f"{path.name} is damaged: its SHA-256 is not the one in it; get the patch again")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path.name}: manifest: {where}: {first['msg']}") from cause
    problem = next(_problems(manifest, blobs), None)
    if problem:
        raise CheckpointError(f"{path.name} is no sound patch: {problem}; do not use it")
    return Patch(path, manifest, blobs)


def _problems(manifest: Manifest, blobs: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What is wrong with a manifest that was not made by ``make_patch``."""
    sides = (manifest.merged, manifest.base) if manifest.reversible else (manifest.merged,)
    for side, other in zip((manifest.merged, manifest.base), (manifest.base, manifest.merged), strict=True):
        yield from path_problems([file.path for file in side.files])
        if side not in sides:
            continue
        for file in side.files:
            if sum(segment.bytes for segment in file.segments) != file.bytes:
                yield f"the segments of {file.path} are not its {file.bytes} bytes"
            for segment in file.segments:
                if segment.how != "copy" and segment.blob not in blobs:
                    yield f"{file.path} needs {segment.blob!r}, which is not there"
                if segment.how != "whole" and not _inside(segment, other):
                    yield f"{file.path} wants bytes that the other folder does not have"


def _inside(segment: Segment, other: Side) -> bool:
    inside = 0 <= segment.file < len(other.files)
    return inside and segment.offset + segment.bytes <= other.files[segment.file].bytes


def path_problems(paths: list[str]) -> Iterator[str]:
    """File names that lead out of their folder, or mean something to a system, to git or to qmerge."""
    known = set(paths)
    if len(known) != len(paths):
        yield f"{next(path for path in paths if paths.count(path) > 1)!r} stands there twice"
    for path in paths:
        # Parsed as a Windows path everywhere: drives, UNC shares and backslashes are seen on every system.
        seen = PureWindowsPath(path)
        odd = seen.drive or seen.root or ".." in seen.parts or seen.as_posix() != path or ":" in path or path == "."
        if odd or not path.isprintable():
            yield f"the file name {path!a} is not one inside a folder"
        elif path.endswith(PARTIAL) or {LOCK, journal.NAME, *TOOLS_FOLDERS} & {part.lower() for part in seen.parts}:
            yield f"a file cannot be called {path!r}"
        elif any(parent.as_posix() in known for parent in PurePosixPath(path).parents):
            yield f"{path!r} lies inside another file"


def hashed(path: Path) -> str:
    """SHA-256 of a file of either folder; CheckpointError where it cannot be read."""
    try:
        return hash_file(path)
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause.strerror}") from cause


@contextmanager
def no_room(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RoomError(f"{file}: no room left: {cause.strerror}. Nothing was kept.") from cause
        if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
            raise RecipeError(f"{file}: cannot be written: {cause.strerror}") from cause
        raise
