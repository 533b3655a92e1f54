"""The manifest of a patch: the files of both folders, and how each file is built. JSON, in the metadata of the patch.

A file is its segments in order. A segment is a JSON array:

    [bytes, "copy",  file, offset, ""]      bytes of a file of the other folder
    [bytes, "delta", file, offset, blob]    the same with a difference: added for base → merged, subtracted for merged → base
    [bytes, "whole", -1,   0,      blob]    bytes that are in the patch

``file`` counts the files of the other folder from 0; ``blob`` is the name of a tensor of the patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from qmerge.checkpoint import journal
from qmerge.checkpoint.folder import LOCK, TOOLS_FOLDERS
from qmerge.safetensors_io.disk import PARTIAL
from qmerge.types import TensorInfo

Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Segment(NamedTuple):
    """Some bytes of a file, and where they come from; ``file`` is -1 where the other folder is not needed."""

    bytes: Annotated[int, Field(gt=0, lt=2**63, strict=True)]
    how: Literal["copy", "delta", "whole"]
    file: Annotated[int, Field(ge=-1, strict=True)] = -1
    offset: Count = 0
    blob: str = ""

    @property
    def needs_folder(self) -> bool:
        """Whether it reads a file of the other folder."""
        return self.how != "whole"

    @property
    def needs_blob(self) -> bool:
        """Whether it reads data of the patch."""
        return self.how != "copy"


class PatchFile(BaseModel):
    """A file of one of the folders; ``path`` is relative to the folder, with slashes."""

    model_config = ConfigDict(extra="forbid")
    path: str
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    segments: list[Segment] = []


class Side(BaseModel):
    """One folder: the name that it had, and its files."""

    model_config = ConfigDict(extra="forbid")
    name: str
    files: list[PatchFile]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)


class Manifest(BaseModel):
    """Both folders. In a patch that is not ``reversible``, the files of the base have no segments."""

    model_config = ConfigDict(extra="forbid")
    made_by: str
    reversible: bool
    base: Side
    merged: Side


def manifest_problems(manifest: Manifest, blobs: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Everything wrong with a manifest, one line each; nothing for one that ``make_patch`` wrote."""
    yield from path_problems([file.path for file in manifest.merged.files])
    yield from _segment_problems(manifest.merged, manifest.base, blobs)
    yield from path_problems([file.path for file in manifest.base.files])
    if manifest.reversible:
        yield from _segment_problems(manifest.base, manifest.merged, blobs)


def path_problems(paths: list[str]) -> Iterator[str]:
    """File names that lead out of their folder, or have a meaning for a system, for git or for qmerge."""
    known = set(paths)
    if len(known) != len(paths):
        duplicate = next(path for path in paths if paths.count(path) > 1)
        yield f"duplicate file name {duplicate!r}"
    for path in paths:
        if not _is_plain(path):
            yield f"invalid file name {path!a}, expected a relative path that stays inside the folder"
        elif _is_reserved(path):
            yield f"reserved file name {path!r}"
        elif any(parent.as_posix() in known for parent in PurePosixPath(path).parents):
            yield f"the file {path!r} is inside another file"


def _is_plain(path: str) -> bool:
    """Whether a name means the same file, inside the folder, on every system."""
    # A Windows path also on other systems, because it knows drives, network shares and backslashes.
    parsed = PureWindowsPath(path)
    leads_out = parsed.drive or parsed.root or ".." in parsed.parts
    is_canonical = parsed.as_posix() == path and path != "." and ":" not in path
    return not leads_out and is_canonical and path.isprintable()


def _is_reserved(path: str) -> bool:
    """Whether qmerge or a tool would take the file for its own."""
    reserved = {LOCK, journal.NAME, *TOOLS_FOLDERS}
    parts = {part.lower() for part in PureWindowsPath(path).parts}
    return path.endswith(PARTIAL) or bool(reserved & parts)


def _segment_problems(side: Side, other: Side, blobs: Mapping[str, TensorInfo]) -> Iterator[str]:
    for file in side.files:
        if sum(segment.bytes for segment in file.segments) != file.bytes:
            yield f"the segments of {file.path} do not add up to its {file.bytes} bytes"
        for segment in file.segments:
            if segment.needs_blob and segment.blob not in blobs:
                yield f"{file.path} needs the data {segment.blob!r}, which is missing"
            if segment.needs_folder and not _is_inside(segment, other):
                yield f"{file.path} needs bytes that the other folder does not have"


def _is_inside(segment: Segment, other: Side) -> bool:
    """Whether the bytes of a segment are inside a file of the other folder."""
    if not 0 <= segment.file < len(other.files):
        return False
    return segment.offset + segment.bytes <= other.files[segment.file].bytes
