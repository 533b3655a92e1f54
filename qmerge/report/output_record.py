"""qmerge.json as the record of its folder: size and SHA-256 of every other file, and a checksum of its own bytes.

``write_record`` is the only function that writes qmerge.json, so that whoever rewrites a file keeps its record right.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from qmerge.errors import CheckpointError
from qmerge.safetensors_io.disk import hash_file, write_file
from qmerge.schema import NAME, FileRecord, ReportData, read_report

CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')
"""The field in qmerge.json. (In the middle of a text, its quotation marks would be escaped.)"""

UNKNOWN = "0" * 64
"""The value of the field while its checksum is computed."""


def file_record(folder: Path, name: str) -> FileRecord:
    """Size and SHA-256 of a file as it is on the disk; ``name`` is its path in the folder."""
    path = folder / name
    return FileRecord(file=name, bytes=path.stat().st_size, sha256=hash_file(path))


def content_record(name: str, content: bytes) -> FileRecord:
    """The same of a file with this content."""
    return FileRecord(file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_record(
    out: Path, report: ReportData, contents: Mapping[str, bytes], others: Iterable[FileRecord] = ()
) -> ReportData:
    """Write small files, then the qmerge.json that records them.

    Args:
        contents: path in the folder → content to write.
        others: records of files that were written before, or are written after.

    Returns:
        The report with the records and the checksum, which is the content of qmerge.json.

    Raises:
        RoomError, DiskError: a file cannot be written.
    """
    records = {record.file: record for record in [*report.files, *others]}
    # The record comes last: until then, the old one names the files that were replaced.
    for name, content in contents.items():
        write_file(out / name, content)
        records[name] = content_record(name, content)
    files = [records[name] for name in sorted(records)]
    report = report.model_copy(update={"files": files, "checksum": UNKNOWN})
    checksum = hashlib.sha256(_encoded(report)).hexdigest()
    report = report.model_copy(update={"checksum": checksum})
    write_file(out / NAME, _encoded(report))
    return report


def rewrite_file(out: Path, name: str, content: bytes) -> None:
    """Write one file of a finished folder again, and record it.

    Raises:
        CheckpointError: qmerge.json is damaged: what it says must not get a new checksum.
    """
    report = read_report(out)
    if report.checksum is None:  # written by a version that recorded weight files only
        write_file(out / name, content)
        return
    # Otherwise a damaged report would get a right checksum.
    check_checksum(out)
    write_record(out, report, {name: content})


def check_checksum(folder: Path) -> None:
    """Compare the bytes of qmerge.json with the checksum in it.

    Raises:
        CheckpointError: they differ.
    """
    # The bytes are compared, not the values: so a space or a digit too many is found, too.
    content = (folder / NAME).read_bytes()
    found = CHECKSUM.findall(content)
    zeroed = CHECKSUM.sub(f'"checksum": "{UNKNOWN}"'.encode(), content)
    if len(found) != 1 or found[0].decode() != hashlib.sha256(zeroed).hexdigest():
        raise CheckpointError(f"{NAME} has changed since it was written: its checksum is that of other content")


def _encoded(report: ReportData) -> bytes:
    return (report.model_dump_json(indent=1) + "\n").encode()
