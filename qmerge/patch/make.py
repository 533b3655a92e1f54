"""Two finished folders → one patch.

Tensors are compared by name: equal ones cost nothing, those of the same dtype and shape are stored as a difference,
which serves both ways; every other tensor or file is stored whole, and so is its counterpart in the base, unless the
patch need not be reversible. Layout comes back by itself: headers are bytes like all others.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

from qmerge import hub
from qmerge.checkpoint import journal
from qmerge.checkpoint.folder import LOCK, free_bytes
from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.patch import codec
from qmerge.patch.file import (
    MAGIC,
    TOOLS_FOLDERS,
    VERSION,
    Manifest,
    PatchFile,
    Segment,
    Side,
    framed,
    hashed,
    header_of,
    no_room,
    path_problems,
    seal,
)
from qmerge.progress import NoProgress, Progress
from qmerge.safetensors_io.header import fsync_folder, read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import PARTIAL
from qmerge.types import TensorInfo

HEADER = ""
"""The name under which a file's header (its 8 length bytes included) goes: no tensor's."""

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""dtype → bytes of what is subtracted at a time. One for integers: they are packed codes, or are codes themselves."""

OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx"]


@dataclass(frozen=True)
class Summary:
    """What was written; sizes in bytes. ``equal``, ``changed``, ``replaced``: tensors of the merged model that are the
    base's, that differ, that have another dtype or shape or no counterpart. ``delta_bytes``: of the patch, what serves
    both ways; ``merged_bytes``, ``base_bytes``: what of either folder is stored whole (the second is for unmerge)."""

    file: Path
    nbytes: int
    merged_size: int
    equal: int
    changed: int
    replaced: int
    delta_bytes: int
    merged_bytes: int
    base_bytes: int
    reversible: bool
    seconds: float

    def says(self) -> list[str]:
        """Plain words for a terminal."""
        share = self.nbytes / max(1, self.merged_size)
        back = (
            f"{self.base_bytes / 1e6:.2f} MB of it only for unmerge"
            if self.reversible
            else "one way: apply works, unmerge does not"
        )
        return [
            f"Patch {self.file}: {self.nbytes / 1e6:.2f} MB, {share:.1%} of the merged folder ({back})",
            f"Tensors: {self.equal} equal, {self.changed} changed ({self.delta_bytes / 1e6:.2f} MB), {self.replaced} replaced",
            f"Stored whole, files included: {self.merged_bytes / 1e6:.2f} MB",
        ]


def make_patch(
    base: Path, merged: Path, file: Path, reversible: bool = True, name: str | None = None, progress: Progress | None = None
) -> Summary:  # fmt: skip
    """Write ``file``: what ``merged`` has that ``base`` has not, and (``reversible``) the other way round.

    Args:
        base: a model's folder; weights in forms that qmerge does not read are left out.
        merged: a finished folder; every file counts.
        name: what to call the base in messages (its Hub id).

    Raises:
        CheckpointError: a folder is unfinished, damaged, changed in the meantime, or has files that cannot be named.
        RecipeError: ``file`` cannot be written there.
        RoomError: no room on the disk. Nothing is left behind by any of these.
    """
    progress, started = progress or NoProgress(), time.monotonic()
    check_file(file, {"the base": base, "the merged model": merged})
    ours, theirs = Folder(base, model_files(base)), Folder(merged, all_files(merged))
    try:
        progress.stage("hashing both folders", ours.nbytes + theirs.nbytes)
        base_side = ours.side(name or base.resolve().name, progress)
        merged_side = theirs.side(merged.resolve().name, progress)
        progress.stage("comparing", theirs.nbytes)
        with no_room(file), tempfile.TemporaryFile(dir=file.absolute().parent) as spool, Reader() as reader:
            work = Comparison(ours, theirs, base_side, merged_side, spool, reader, progress)
            work.merged()
            if reversible:
                work.base()
            for folder in (ours, theirs):
                folder.check_unchanged()
            manifest = Manifest(
                made_by=f"qmerge {version('qmerge')}", reversible=reversible, base=base_side, merged=merged_side
            )
            nbytes = publish(file, manifest, work.sizes, spool)
    finally:
        progress.end()
    return Summary(
        file, nbytes, merged_side.nbytes, work.equal, work.changed, work.replaced, work.packed("delta/"),
        work.packed("merged/"), work.packed("base/"), reversible, time.monotonic() - started,
    )  # fmt: skip


# --- the folders -----------------------------------------------------------------------------------------------------


def check_file(file: Path, folders: dict[str, Path]) -> None:
    """Raise RecipeError unless a new file can be made there."""
    if file.exists() or file.is_symlink():
        raise RecipeError(f"{file} exists: delete it or choose another name")
    if not file.absolute().parent.is_dir():
        raise RecipeError(f"{file}: there is no folder {file.parent}; make it first")
    for role, folder in folders.items():
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: expected {role}")
        if file.resolve().is_relative_to(folder.resolve()):
            raise RecipeError(f"{file} lies inside {role} ({folder}); write somewhere else")


def all_files(folder: Path) -> list[str]:
    """Every file below a folder, but what git and the Hub library keep about it.

    Raises:
        CheckpointError: the run that wrote it is not finished, or a link leads out of it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    names = [path.relative_to(folder).as_posix() for path in paths]
    names = [name for name in names if name != LOCK and not set(name.split("/")) & set(TOOLS_FOLDERS)]
    unfinished = next((name for name in names if name == journal.NAME or name.endswith(PARTIAL)), None)
    if unfinished:
        raise CheckpointError(f"{folder} holds {unfinished}: it is not finished; finish the run with --resume")
    problem = next(path_problems(names), None)
    if problem:
        raise CheckpointError(f"{folder}: {problem}; rename it")
    places = (folder.resolve(), hub.cache_folder())
    for name in names:
        real = (folder / name).resolve()
        if real.is_dir():
            raise CheckpointError(f"{folder}: {name} is a link to a folder; put the folder there instead")
        if not name.endswith(".safetensors") and not any(real.is_relative_to(place) for place in places):
            raise CheckpointError(
                f"{folder}: {name} is a link that leads out of the folder; put the file there instead"
            )
    return names


def model_files(folder: Path) -> list[str]:
    """Those files, without weights in forms that qmerge does not read: they would have to be stored whole."""
    return [name for name in all_files(folder) if not among(name, [*hub.UNUSED_FILES, *OTHER_WEIGHTS])]


def among(name: str, patterns: list[str]) -> bool:
    """Whether a file is meant; the Hub library's rule."""
    return any(fnmatch(name, pattern) for pattern in patterns)


class Folder:
    """The files of a folder as they were when it was first looked at."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self.names = path, names
        self._stats = [self._stat(name) for name in names]
        if not any(name.endswith(".safetensors") for name in names):
            raise CheckpointError(f"{path} holds no safetensors file: expected a model")

    @property
    def nbytes(self) -> int:
        return sum(size for size, _ in self._stats)

    def side(self, name: str, progress: Progress) -> Side:
        files = []
        for file, (size, _) in zip(self.names, self._stats, strict=True):
            files.append(PatchFile(path=file, bytes=size, sha256=hashed(self.path / file)))
            progress.advance(size, file)
        return Side(name=name, files=files)

    def pieces(self, file: PatchFile) -> list[TensorInfo]:
        """What a file is made of, in order: header and tensors, or one piece. Pieces of no bytes are left out."""
        path = self.path / file.path
        if not file.path.endswith(".safetensors"):
            whole = TensorInfo("U8", (file.bytes,), HEADER, path, 0)
            return [whole] if file.bytes else []
        tensors, _ = read_header(path, CheckpointError)
        ordered = sorted((t for t in tensors.values() if t.nbytes), key=lambda t: t.offset)
        start = file.bytes - sum(t.nbytes for t in ordered)
        return [TensorInfo("U8", (start,), HEADER, path, 0), *ordered]

    def check_unchanged(self) -> None:
        for name, stat in zip(self.names, self._stats, strict=True):
            if self._stat(name) != stat:
                raise CheckpointError(f"{self.path / name} was changed while it was read; try again")

    def _stat(self, name: str) -> tuple[int, int]:
        try:
            stat = (self.path / name).stat()
        except OSError as cause:
            raise CheckpointError(f"{self.path / name}: cannot be read: {cause.strerror}") from cause
        return stat.st_size, stat.st_mtime_ns


# --- the comparison --------------------------------------------------------------------------------------------------


class Comparison:
    """Fills in the segments of both sides; packed bytes go to ``spool``, their names and sizes to ``sizes``."""

    def __init__(
        self, base: Folder, merged: Folder, base_side: Side, merged_side: Side, spool: BinaryIO, reader: Reader,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.folders, self.sides = {"base": base, "merged": merged}, {"base": base_side, "merged": merged_side}
        self.spool, self.reader, self.progress = spool, reader, progress
        self.sizes: dict[str, int] = {}
        self.equal = self.changed = self.replaced = 0
        self._twins: dict[tuple[int, str], Segment] = {}
        """Piece of the base (its file's place in the list, its name) → the segment that makes it of a merged one."""
        self._pieces = [base.pieces(file) for file in base_side.files]
        self._by_name: dict[str, list[tuple[int, TensorInfo]]] = {}
        for place, pieces in enumerate(self._pieces):
            had = among(base_side.files[place].path, hub.MODEL_FILES)  # also where the base comes from the Hub
            for piece in pieces if had else ():
                self._by_name.setdefault(piece.name, []).append((place, piece))

    def packed(self, prefix: str) -> int:
        """Bytes of the patch that blobs of one kind take."""
        return sum(size for name, size in self.sizes.items() if name.startswith(prefix))

    def merged(self) -> None:
        files = self.sides["base"].files
        same = {file.sha256: place for place, file in enumerate(files) if among(file.path, hub.MODEL_FILES)}
        for place, file in enumerate(self.sides["merged"].files):
            pieces = self.folders["merged"].pieces(file)
            if file.sha256 in same and file.bytes:
                file.segments.append(Segment(file.bytes, "copy", same[file.sha256], 0))
                self.equal += sum(piece.name != HEADER for piece in pieces)
            else:
                for piece in pieces:
                    add(file.segments, self._merged_piece(place, file, piece))
            self.progress.advance(file.bytes, file.path)

    def base(self) -> None:
        same = {file.sha256: place for place, file in enumerate(self.sides["merged"].files)}
        for place, file in enumerate(self.sides["base"].files):
            if file.sha256 in same and file.bytes:
                file.segments.append(Segment(file.bytes, "copy", same[file.sha256], 0))
                continue
            for piece in self._pieces[place]:
                twin = self._twins.get((place, piece.name))
                add(file.segments, twin or self._whole("base", file, piece))

    def _merged_piece(self, place: int, file: PatchFile, piece: TensorInfo) -> Segment:
        found = self._counterpart(file, piece)
        if found is None:
            self.replaced += piece.name != HEADER
            return self._whole("merged", file, piece)
        there, old = found
        blob = self._delta(file, piece, old)
        how: Literal["delta", "copy"] = "delta" if blob else "copy"
        self._twins[there, old.name] = Segment(piece.nbytes, how, place, piece.offset, blob)
        self.changed += bool(blob)
        self.equal += not blob and piece.name != HEADER
        return Segment(piece.nbytes, how, there, old.offset, blob)

    def _counterpart(self, file: PatchFile, piece: TensorInfo) -> tuple[int, TensorInfo] | None:
        """The base's piece of this name, dtype and shape that has no twin yet; in the file of that name, if it is there."""
        files = self.sides["base"].files
        found = [
            (place, old)
            for place, old in self._by_name.get(piece.name, [])
            if (old.dtype, old.shape) == (piece.dtype, piece.shape) and (place, old.name) not in self._twins
        ]
        if piece.name == HEADER:  # text: where it is not the same, it packs better by itself than as a difference
            found = [(p, old) for p, old in found if files[p].path == file.path and self._equal(piece, old)]
        return min(found, key=lambda item: files[item[0]].path != file.path, default=None)

    def _equal(self, a: TensorInfo, b: TensorInfo) -> bool:
        spans = [(start, min(start + codec.BLOCK, a.nbytes)) for start in range(0, a.nbytes, codec.BLOCK)]
        return all(self.reader.bytes(a, *span) == self.reader.bytes(b, *span) for span in spans)

    def _delta(self, file: PatchFile, piece: TensorInfo, old: TensorInfo) -> str:
        """The name of the blob that holds the difference, or "" where there is none."""
        start, width, differs = self.spool.tell(), WIDTHS.get(piece.dtype, 1), False
        for first in range(0, piece.nbytes, codec.BLOCK):
            span = (first, min(first + codec.BLOCK, piece.nbytes))
            a, b = self.reader.bytes(piece, *span), self.reader.bytes(old, *span)
            differs = differs or a != b
            packed = codec.zeros(len(a), width) if a == b else codec.pack(codec.difference(a, b, width), width)
            self.spool.write(framed(packed))
        if not differs:
            self.spool.seek(start)
            self.spool.truncate()
            return ""
        return self._named(f"delta/{file.path}:{piece.name}", start)

    def _whole(self, side: str, file: PatchFile, piece: TensorInfo) -> Segment:
        start, width = self.spool.tell(), WIDTHS.get(piece.dtype, 1)
        for first in range(0, piece.nbytes, codec.BLOCK):
            data = self.reader.bytes(piece, first, min(first + codec.BLOCK, piece.nbytes))
            self.spool.write(framed(codec.pack(bytes(data), width, text=piece.name == HEADER)))
        return Segment(piece.nbytes, "whole", blob=self._named(f"{side}/{file.path}:{piece.name}", start))

    def _named(self, name: str, start: int) -> str:
        self.sizes[name] = self.spool.tell() - start
        return name


def add(segments: list[Segment], segment: Segment) -> None:
    """Append; copies that follow each other on both sides become one."""
    last = segments[-1] if segments else None
    joins = last and last.how == segment.how == "copy" and last.file == segment.file
    if last and joins and last.offset + last.bytes == segment.offset:
        segments[-1] = last._replace(bytes=last.bytes + segment.bytes)
    else:
        segments.append(segment)


# --- the file --------------------------------------------------------------------------------------------------------


def publish(file: Path, manifest: Manifest, sizes: dict[str, int], spool: BinaryIO) -> int:
    """Header and data under a temporary name, synced, renamed; returns the size."""
    spool.flush()
    text = manifest.model_dump_json()
    header = header_of({MAGIC: VERSION, "manifest": text, "sha256": seal(text, spool.fileno(), 0)}, sizes)
    needed = len(header) + sum(sizes.values())
    if free_bytes(file.parent) < needed:
        raise RoomError(f"{file}: the patch has {needed / 1e6:.0f} MB, the disk has no room for it; nothing was kept")
    partial = file.with_name(file.name + PARTIAL)
    try:
        with partial.open("wb") as out:
            out.write(header)
            spool.seek(0)
            while data := spool.read(2**22):
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
        fsync_folder(file.absolute().parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        file.unlink(missing_ok=True)  # there was none before
        raise
    return needed
