"""A model on the Hub as a folder: its small files are downloaded, of its weights only the headers.

A file of weights is replaced by a file with its header alone. Whoever reads values from that finds too few bytes, never
wrong ones; a ``Reader`` that knows the file gets them from the Hub.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qmerge import hub
from qmerge.errors import CheckpointError
from qmerge.remote.ranges import RemoteFile
from qmerge.safetensors_io.header import LARGEST_HEADER, LENGTH_BYTES, read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.temporary import folder_until_exit
from qmerge.types import TensorInfo

THREADS = 16
"""Requests at once: each waits for the network most of the time."""

SMALL = 4096
"""Bytes. Smaller tensors (the state of a quantized weight, its table of levels) are read together with the headers: formats
need those of every weight."""

GAP = 16384
"""Bytes between two small tensors that are read in one request all the same."""


def open_remote(reference: str, revision: str | None, reader: Reader) -> hub.Source | None:
    """A model on the Hub, to be planned with: its headers here, its weights there.

    Args:
        reference: ``owner/name``, with ``@revision`` if need be.
        revision: branch, tag or commit.
        reader: gets the weights; it reads ranges of them from the Hub.

    Returns:
        None where the model is not read like that: a folder, a GGUF file, a model that is in the cache, one that the Hub does
        not have or does not give to this user, or no connection. ``hub.resolve`` says what is wrong.

    Raises:
        CheckpointError: the Hub has the model, but stops answering, or a header is damaged.
    """
    hub_id, named_revision = hub.split_revision(reference)
    path = hub.local_path(reference)
    if not hub.HUB_ID.fullmatch(hub_id) or path is None or path.exists():
        return None
    found = _listing_and_folder(hub_id, named_revision or revision)
    if found is None:
        return None
    listing, weights, folder = found
    with ThreadPoolExecutor(THREADS) as pool:
        files = list(pool.map(lambda name: _with_header(listing, name, folder / name), weights))
        for name, file in zip(weights, files, strict=True):
            reader.add_remote(folder / name, file.read, file.size)
        ranges: list[tuple[RemoteFile, int, int]] = []
        for name, file in zip(weights, files, strict=True):
            tensors, _ = read_header(folder / name, CheckpointError, nbytes=file.size)
            ranges += [(file, start, stop) for start, stop in _small_ranges(tensors.values())]
        # list() raises the first error of any thread.
        list(pool.map(lambda part: part[0].read(part[1], part[2]), ranges))
    return hub.Source(folder, listing.id, listing.commit)


def _listing_and_folder(hub_id: str, revision: str | None) -> tuple[hub.Listing, list[str], Path] | None:
    """The files of a model, the names of those with its weights, and a folder with the small ones; None as ``open_remote``."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        listing = hub.list_files(hub_id, revision)
        if listing is None or hub.ADAPTER_CONFIG in listing.names:
            return None
        # Everybody may list the files of a gated model; to get one of them needs access.
        weights = sorted(hub.needed_weights(listing))
        # Of a GGUF file, the header alone does not say enough.
        if not weights or _are_cached(listing, weights):
            return None
        return listing, weights, _small_files(listing)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _are_cached(listing: hub.Listing, names: Iterable[str]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(listing.id, name, revision=listing.commit) for name in names)
    return all(isinstance(path, str) for path in paths)


def _small_files(listing: hub.Listing) -> Path:
    """A new folder with links to the files that a model needs besides its weights."""
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in hub.MODEL_FILES if not pattern.endswith((".safetensors", ".bin"))]
    snapshot = Path(
        snapshot_download(
            listing.id, revision=listing.commit, allow_patterns=patterns, ignore_patterns=hub.UNUSED_FILES
        )
    )
    folder = folder_until_exit()
    for path in snapshot.rglob("*"):
        # The cache may hold some of the weights: the links would be in the place of headers.
        if path.is_file() and path.suffix != ".safetensors":
            link = folder / path.relative_to(snapshot)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return folder


def _with_header(listing: hub.Listing, name: str, path: Path) -> RemoteFile:
    """Write a file that has the header of a file on the Hub, and nothing else.

    Raises:
        CheckpointError: it is not a safetensors file.
    """
    file = RemoteFile(listing.id, name, listing.commit)
    # Two requests, since the first bytes say how long the header is: a guess would read parts of weights, or too little.
    start = file.read(0, LENGTH_BYTES)
    (length,) = struct.unpack("<Q", start)
    if length > min(LARGEST_HEADER, file.size - LENGTH_BYTES):
        raise CheckpointError(
            f"{name} on the Hub: not a safetensors file: its first 8 bytes announce a header of {length}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + file.read(LENGTH_BYTES, LENGTH_BYTES + length))
    return file


def _small_ranges(tensors: Iterable[TensorInfo]) -> list[tuple[int, int]]:
    """The ranges of a file that hold its small tensors; those that are close to each other in one range."""
    spans = sorted((info.offset, info.offset + info.nbytes) for info in tensors if 0 < info.nbytes <= SMALL)
    ranges: list[tuple[int, int]] = []
    for start, stop in spans:
        if ranges and start - ranges[-1][1] <= GAP:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges
