"""The patch file: a safetensors file whose tensors are packed bytes and whose metadata describes how to use them.

Every tool that lists safetensors files can therefore list a patch, and one strict reader of headers serves both. The price:
the header comes first and the sizes are known last, so the (small) data is copied once, through an unnamed temporary file.

Metadata, all text:

    qmerge_patch    version of this layout
    manifest        JSON: both folders, file by file (``manifest.py``)
    sha256          of the bytes of the manifest and of all bytes after the header

A tensor, here called a blob, is a chain of blocks: length (4 bytes, little-endian), then a block of ``codec.pack`` with up
to ``codec.BLOCK`` raw bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from qmerge.checkpoint.folder import free_bytes
from qmerge.errors import CheckpointError, RoomError
from qmerge.patch import codec
from qmerge.patch.manifest import Manifest, manifest_problems
from qmerge.safetensors_io.disk import hash_file, new_file
from qmerge.safetensors_io.header import LARGEST_HEADER, read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo

VERSION = "1"
MAGIC = "qmerge_patch"
LENGTH = struct.Struct("<I")
"""Length of a block, in front of it."""

COPIED_BYTES = 2**22
"""Bytes that are hashed or copied at a time."""


@dataclass(frozen=True)
class Patch:
    """A patch that was checked completely. ``blobs``: name → where its packed bytes are in the file."""

    path: Path
    manifest: Manifest
    blobs: Mapping[str, TensorInfo]

    def blocks(self, name: str, size: int, reader: Reader) -> Iterator[tuple[bytes, int]]:
        """The ``size`` bytes of a blob, block by block, each with the width of its numbers.

        Raises:
            CheckpointError: the blob is damaged or has another size.
        """
        info = self.blobs[name]
        position = 0
        try:
            for start in range(0, size, codec.BLOCK):
                length = self._block_length(info, position, reader)
                block = self._read(info, position + LENGTH.size, length, reader)
                yield codec.unpack(block, min(codec.BLOCK, size - start))
                position += LENGTH.size + length
            # Bytes that no block reads could hide anything.
            if position != info.nbytes:
                raise codec.DamagedError("bytes after the last block")
        except codec.DamagedError as cause:
            raise CheckpointError(
                f"{self.path.name}: the data {name} is damaged ({cause}): download or make the patch again"
            ) from cause

    def _block_length(self, info: TensorInfo, position: int, reader: Reader) -> int:
        (length,) = LENGTH.unpack(self._read(info, position, LENGTH.size, reader))
        if length > codec.LARGEST_BLOCK:
            raise codec.DamagedError(f"a block of {length} bytes")
        return int(length)

    def _read(self, info: TensorInfo, start: int, length: int, reader: Reader) -> bytes:
        if start + length > info.nbytes:
            raise codec.DamagedError("the last block is incomplete")
        return bytes(reader.bytes(info, start, start + length))


# --- writing ---------------------------------------------------------------------------------------------------------


def framed(block: bytes) -> bytes:
    """A packed block with its length, as it is in a blob."""
    return LENGTH.pack(len(block)) + block


def header_of(metadata: Mapping[str, str], sizes: Mapping[str, int]) -> bytes:
    """The header of a patch whose blobs follow one another in this order. Only this spelling of a header is accepted.

    Raises:
        CheckpointError: the header would be longer than the safetensors library reads.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, size in sizes.items():
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded_length = -(-len(text) // 8) * 8  # the specification aligns the data to 8 bytes
    if padded_length > LARGEST_HEADER:
        raise CheckpointError(
            f"the patch has {len(sizes)} tensors and needs a header of {padded_length} bytes; safetensors allows {LARGEST_HEADER}"
        )
    return struct.pack("<Q", padded_length) + text.ljust(padded_length)


def seal(manifest: str, descriptor: int, start: int) -> str:
    """SHA-256 of the manifest, followed by the bytes of an open file from ``start`` on."""
    digest = hashlib.sha256(manifest.encode("utf-8", "surrogatepass"))  # a lone surrogate is refused when it is parsed
    position = start
    # pread leaves the position of the file alone, where the next blob goes.
    while data := os.pread(descriptor, COPIED_BYTES, position):
        digest.update(data)
        position += len(data)
    return digest.hexdigest()


def write_patch(path: Path, manifest: Manifest, sizes: Mapping[str, int], blobs: BinaryIO) -> int:
    """Write a patch, whole or not at all. Returns its size in bytes.

    Args:
        sizes: name → bytes of every blob, in the order in which ``blobs`` has them.
        blobs: an open file with nothing but the blobs.

    Raises:
        CheckpointError: too many tensors for a header.
        RoomError, DiskError: not enough free disk space, or it cannot be written.
    """
    blobs.flush()
    text = manifest.model_dump_json()
    metadata = {MAGIC: VERSION, "manifest": text, "sha256": seal(text, blobs.fileno(), 0)}
    header = header_of(metadata, sizes)
    nbytes = len(header) + sum(sizes.values())
    if free_bytes(path.parent) < nbytes:
        raise RoomError(
            f"{path}: no room on the disk: the patch needs {nbytes / 1e6:.0f} MB. Nothing was kept; free some space."
        )
    with new_file(path) as out:
        out.write(header)
        blobs.seek(0)
        while data := blobs.read(COPIED_BYTES):
            out.write(data)
    return nbytes


# --- reading ---------------------------------------------------------------------------------------------------------


def read_patch(path: Path) -> Patch:
    """Open a patch and check all of it: no byte may have changed since it was written, and no instruction may reach outside
    the folder, its files or its data.

    Raises:
        CheckpointError: not a patch, a patch of another version, damaged, or made to do harm.
    """
    blobs, metadata = read_header(path, CheckpointError)
    _check_version(path, metadata)
    _check_seal(path, blobs, metadata)
    manifest = _parse_manifest(path, metadata.get("manifest", ""))
    problem = next(manifest_problems(manifest, blobs), None)  # one is enough to refuse the file
    if problem:
        raise CheckpointError(f"{path.name} is corrupted: {problem}: do not use this patch")
    return Patch(path, manifest, blobs)


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    if MAGIC not in metadata:
        raise CheckpointError(
            f"{path.name} is a safetensors file but not a patch: expected a file written by `qmerge patch`"
        )
    if metadata[MAGIC] != VERSION:
        raise CheckpointError(
            f"{path.name} is a patch of version {metadata[MAGIC][:20]}, this qmerge reads version {VERSION}: "
            f"upgrade qmerge, or make the patch again"
        )


def _check_seal(path: Path, blobs: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
    ordered = sorted(blobs.values(), key=lambda info: (info.offset, info.nbytes))
    header = header_of(metadata, {info.name: info.nbytes for info in ordered})
    with path.open("rb") as file:
        # The hash does not cover the header. Comparing it with the only accepted spelling covers dtypes, order and spaces.
        header_is_ours = file.read(len(header)) == header
        digest = seal(metadata.get("manifest", ""), file.fileno(), len(header)) if header_is_ours else None
    if digest is None or digest != metadata.get("sha256"):
        raise CheckpointError(
            f"{path.name} is damaged: its bytes do not have the SHA-256 that it names: download or make the patch again"
        )


def _parse_manifest(path: Path, text: str) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as cause:
        first = cause.errors()[0]  # an error message is one line
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path.name} is corrupted: manifest: {key}: {first['msg']}: do not use this patch"
        ) from cause


# --- errors of the operating system ----------------------------------------------------------------------------------


def hash_of(path: Path) -> str:
    """SHA-256 of a file of either folder.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return hash_file(path)
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause.strerror}") from cause
