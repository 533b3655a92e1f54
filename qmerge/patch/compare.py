"""Compare two folders section by section: fill in the segments of every file, and pack the data that they need.

Sections are compared by name. Equal ones cost nothing; those of the same dtype and shape become one difference, which serves
both directions; all others are stored whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from qmerge import hub
from qmerge.patch import codec
from qmerge.patch.file import framed
from qmerge.patch.folders import HEADER, FolderState, matches
from qmerge.patch.manifest import Manifest, PatchFile, Segment
from qmerge.progress import Progress
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo

SUBTRACTED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""dtype → bytes of the numbers that are subtracted. 1 for every other dtype: integers are codes, or packed codes."""


class BlobSpool:
    """The blobs of a patch, one after the other in a temporary file.

    ``sizes``: name → bytes of every blob, in the order of the file.
    """

    def __init__(self, file: BinaryIO, reader: Reader) -> None:
        self.file = file
        self.sizes: dict[str, int] = {}
        self._reader = reader

    def add_difference(self, name: str, new: TensorInfo, old: TensorInfo) -> bool:
        """Add new − old; returns False, and adds nothing, where both have the same bytes."""
        start = self.file.tell()
        width = SUBTRACTED_BYTES.get(new.dtype, 1)
        differs = False
        for first, stop in _block_spans(new):
            new_bytes = self._reader.bytes(new, first, stop)
            old_bytes = self._reader.bytes(old, first, stop)
            if new_bytes == old_bytes:
                block = codec.zeros(stop - first, width)  # cached: most blocks are full and equal
            else:
                differs = True
                block = codec.pack(codec.difference(new_bytes, old_bytes, width), width)
            self.file.write(framed(block))
        if not differs:
            # All blocks are zeros: the section is a copy and needs no blob.
            self.file.seek(start)
            self.file.truncate()
            return False
        self.sizes[name] = self.file.tell() - start
        return True

    def add_whole(self, name: str, section: TensorInfo) -> None:
        """Add all bytes of a section."""
        start = self.file.tell()
        width = SUBTRACTED_BYTES.get(section.dtype, 1)
        for first, stop in _block_spans(section):
            data = bytes(self._reader.bytes(section, first, stop))
            block = codec.pack(data, width, text=section.name == HEADER)
            self.file.write(framed(block))
        self.sizes[name] = self.file.tell() - start

    def are_equal(self, section: TensorInfo, other: TensorInfo) -> bool:
        """Whether two sections of the same size have the same bytes."""
        for start, stop in _block_spans(section):
            if self._reader.bytes(section, start, stop) != self._reader.bytes(other, start, stop):
                return False
        return True

    def bytes_of(self, prefix: str) -> int:
        """Bytes of all blobs whose name starts so: ``delta/``, ``merged/`` or ``base/``."""
        return sum(size for name, size in self.sizes.items() if name.startswith(prefix))


def _block_spans(section: TensorInfo) -> Iterator[tuple[int, int]]:
    """First byte and end of every block of a section."""
    for start in range(0, section.nbytes, codec.BLOCK):
        yield start, min(start + codec.BLOCK, section.nbytes)


@dataclass(frozen=True)
class BaseSection:
    """A section of the base, and the position of its file in the list of the base's files."""

    file: int
    info: TensorInfo

    @property
    def key(self) -> tuple[int, str]:
        """Names the section among all sections of the base."""
        return self.file, self.info.name


class FolderComparison:
    """Fills in the segments of a manifest, and counts tensors of the merged model.

    ``equal``     the base has them
    ``changed``   stored as a difference
    ``replaced``  stored whole: another dtype or shape, or not in the base
    """

    def __init__(self, base: FolderState, merged: FolderState, manifest: Manifest, spool: BlobSpool) -> None:
        self.equal = 0
        self.changed = 0
        self.replaced = 0
        self._base = base
        self._merged = merged
        self._reversible = manifest.reversible
        self._base_files = manifest.base.files
        self._merged_files = manifest.merged.files
        self._spool = spool
        self._base_sections = [base.sections(file) for file in self._base_files]
        self._base_by_name = self._index_base()
        self._segments_of_base: dict[tuple[int, str], Segment] = {}
        """Key of a section of the base → the segment that restores it from the merged folder."""

    def _index_base(self) -> dict[str, list[BaseSection]]:
        """Section name → sections of the base. Only of files that a download from the Hub has too, because a patch that
        was made for a local base must work with the same base from the Hub."""
        by_name: dict[str, list[BaseSection]] = defaultdict(list)
        for position, sections in enumerate(self._base_sections):
            if matches(self._base_files[position].path, hub.MODEL_FILES):
                for section in sections:
                    by_name[section.name].append(BaseSection(position, section))
        return by_name

    def run(self, progress: Progress) -> None:
        """Fill in all segments that the manifest needs.

        Raises:
            CheckpointError: a safetensors file has an invalid header, or a file was changed since it was hashed.
        """
        progress.stage("comparing", self._merged.nbytes)
        self._describe_merged(progress)
        if self._reversible:
            self._describe_base()
        # A file that changed after it was hashed would make a patch that restores neither version.
        self._base.check_unchanged()
        self._merged.check_unchanged()

    def _describe_merged(self, progress: Progress) -> None:
        base_files = {
            file.sha256: position
            for position, file in enumerate(self._base_files)
            if matches(file.path, hub.MODEL_FILES)
        }
        for position, file in enumerate(self._merged_files):
            sections = self._merged.sections(file)
            # The base has this file, under any name: nothing inside it needs comparing.
            if file.bytes and file.sha256 in base_files:
                file.segments.append(Segment(file.bytes, "copy", file=base_files[file.sha256]))
                self.equal += sum(section.name != HEADER for section in sections)
            else:
                for section in sections:
                    append_segment(file.segments, self._describe_section(position, file, section))
            progress.advance(file.bytes, file.path)

    def _describe_base(self) -> None:
        """Needs the segments that ``_describe_merged`` noted for the way back."""
        merged_files = {file.sha256: position for position, file in enumerate(self._merged_files)}
        for position, file in enumerate(self._base_files):
            if file.bytes and file.sha256 in merged_files:
                file.segments.append(Segment(file.bytes, "copy", file=merged_files[file.sha256]))
                continue
            for section in self._base_sections[position]:
                segment = self._segments_of_base.get((position, section.name))
                append_segment(file.segments, segment or self._store_whole("base", file, section))

    def _describe_section(self, position: int, file: PatchFile, section: TensorInfo) -> Segment:
        """The segment of a section of a merged file; also notes the one that leads back, where both folders share it."""
        is_tensor = section.name != HEADER
        counterpart = self._counterpart(file, section)
        if counterpart is None:
            self.replaced += is_tensor
            return self._store_whole("merged", file, section)
        old = counterpart.info
        blob = f"delta/{file.path}:{section.name}"
        if self._spool.add_difference(blob, section, old):
            self.changed += 1
            segment = Segment(section.nbytes, "delta", file=counterpart.file, offset=old.offset, blob=blob)
        else:
            self.equal += is_tensor
            segment = Segment(section.nbytes, "copy", file=counterpart.file, offset=old.offset)
        # The way back needs the same bytes of the other file, and the same difference, subtracted.
        self._segments_of_base[counterpart.key] = segment._replace(file=position, offset=section.offset)
        return segment

    def _counterpart(self, file: PatchFile, section: TensorInfo) -> BaseSection | None:
        """The base's section of the same name, dtype and shape that is not used yet; first from the file of the same name."""
        candidates = []
        for candidate in self._base_by_name.get(section.name, []):
            same_kind = (candidate.info.dtype, candidate.info.shape) == (section.dtype, section.shape)
            is_used = candidate.key in self._segments_of_base
            if same_kind and not is_used and self._can_share(file, section, candidate):
                candidates.append(candidate)
        for candidate in candidates:
            if self._base_files[candidate.file].path == file.path:
                return candidate
        return next(iter(candidates), None)

    def _can_share(self, file: PatchFile, section: TensorInfo, candidate: BaseSection) -> bool:
        """Whether a difference to this section is worth storing. Headers and other texts pack better by themselves than as
        a difference, so they share only equal bytes."""
        if section.name != HEADER:
            return True
        same_path = self._base_files[candidate.file].path == file.path
        return same_path and self._spool.are_equal(section, candidate.info)

    def _store_whole(self, side: str, file: PatchFile, section: TensorInfo) -> Segment:
        blob = f"{side}/{file.path}:{section.name}"
        self._spool.add_whole(blob, section)
        return Segment(section.nbytes, "whole", blob=blob)


def append_segment(segments: list[Segment], segment: Segment) -> None:
    """Append a segment; a copy that continues the one before it extends that one."""
    last = segments[-1] if segments else None
    if last is not None and _continues(last, segment):
        segments[-1] = last._replace(bytes=last.bytes + segment.bytes)
    else:
        segments.append(segment)


def _continues(last: Segment, segment: Segment) -> bool:
    """Whether two copies follow each other in the other folder as well."""
    both_copy = last.how == "copy" and segment.how == "copy"
    return both_copy and last.file == segment.file and last.offset + last.bytes == segment.offset
