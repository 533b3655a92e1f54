"""Compress bytes, and differences between bytes, in blocks, so that memory stays bounded in both directions.

A merge that keeps its format changes a few percent of the codes, mostly by one step, at places that look random. Their
difference modulo 256 is therefore nearly all zeros, and the cost is in the places of the others. (A step up and a step down
are two symbols in a difference; XOR would make eight of them.) ``SPARSE`` stores the gaps between nonzero bytes and their
values, each with a Huffman code. The gaps have a geometric distribution, for which a Huffman code is nearly optimal.

Measured on the demo model, NF4 with ``preserve``, 8 % of the codes changed. Size as a share of the checkpoint:

    SPARSE                4.7 %   65 MB/s     (the entropy of the differences, for each 4 bits: 4.5 %)
    XOR, zstandard -19    6.3 %    2 MB/s
    XOR, LZMA             6.4 %    2 MB/s
    XOR, zlib -9          6.9 %    1 MB/s

So the standard library is enough.

A block is: width (1 byte), then for each of its ``width`` byte planes: encoding (1 byte), length (4 bytes), payload. Plane k
holds byte k of every number: the first byte of a float is predictable and the last one is not. All numbers are little-endian.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 2**20
"""Raw bytes in a block; the last block of a blob is shorter."""

SAMPLE = 2**16
"""Bytes from the middle of a plane on which encodings are compared."""

WIDTHS = (1, 2, 4, 8)
"""Bytes of the numbers that a block may hold."""

PLANE_HEADER = struct.Struct("<BI")
"""Encoding and payload length of a plane."""

LARGEST_BLOCK = BLOCK + max(WIDTHS) * PLANE_HEADER.size + 1
"""Bytes that a packed block can take: every plane stored unchanged."""

# Encodings of a plane, by their numbers in the file.
STORED = 0
SPARSE = 1
HUFFMAN = 2
DEFLATE = 3
LZMA = 4

BINARY_ENCODINGS = (SPARSE, HUFFMAN, DEFLATE)
TEXT_ENCODINGS = (*BINARY_ENCODINGS, LZMA)

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": BLOCK}]
"""Fixed and not in the file, so that no file can choose how much memory unpacking takes."""

LONGEST_GAP = 255
"""In SPARSE, this byte means: 255 zeros, and the gap continues in the next byte."""


class DamagedError(ValueError):
    """A packed block was not made by ``pack``, or was changed."""


# --- differences -----------------------------------------------------------------------------------------------------


def difference(new: bytearray, old: bytearray, width: int) -> bytes:
    """new − old, as unsigned integers of ``width`` bytes, modulo their range."""
    dtype = np.dtype(f"<u{width}")
    return bytes((np.frombuffer(new, dtype) - np.frombuffer(old, dtype)).tobytes())


def add_difference(old: bytearray, change: bytes, width: int) -> bytes:
    """The ``new`` of ``difference``."""
    dtype = np.dtype(f"<u{width}")
    return bytes((np.frombuffer(old, dtype) + np.frombuffer(change, dtype)).tobytes())


def subtract_difference(new: bytearray, change: bytes, width: int) -> bytes:
    """The ``old`` of ``difference``."""
    dtype = np.dtype(f"<u{width}")
    return bytes((np.frombuffer(new, dtype) - np.frombuffer(change, dtype)).tobytes())


# --- blocks ----------------------------------------------------------------------------------------------------------


def pack(data: bytes, width: int, text: bool = False) -> bytes:
    """Pack one block of numbers of ``width`` bytes; ``text`` also tries LZMA, which is slow and better at words."""
    encodings = TEXT_ENCODINGS if text else BINARY_ENCODINGS
    planes = np.frombuffer(data, np.uint8).reshape(-1, width).T  # row k: byte k of every number
    packed = bytearray([width])
    for plane in planes:
        packed += _pack_plane(plane.tobytes(), encodings)
    return bytes(packed)


@lru_cache(maxsize=64)
def zeros(size: int, width: int) -> bytes:
    """The packed block of ``size`` zeros: two equal blocks have this difference."""
    return pack(bytes(size), width)


def unpack(block: bytes, size: int) -> tuple[bytes, int]:
    """The ``size`` bytes of a block, and the width of its numbers.

    Raises:
        DamagedError: the block holds something else. At most about ``size`` bytes are made to find that out.
    """
    width = block[0] if block else 0
    if width not in WIDTHS or size % width:
        raise DamagedError(f"invalid number width {width}")
    planes = []
    position = 1
    for _ in range(width):
        plane, position = _unpack_plane(block, position, size // width)
        planes.append(plane)
    if position != len(block):
        raise DamagedError("bytes after the last byte plane")
    return np.stack(planes, axis=1).tobytes(), width


def _pack_plane(data: bytes, encodings: tuple[int, ...]) -> bytes:
    """The encoding that is smallest on a sample; the bytes unchanged where that does not make them fewer."""
    # From the middle: the first rows of a weight may belong to rare tokens, the last ones to padding.
    start = max(0, (len(data) - SAMPLE) // 2)
    sample = data[start : start + SAMPLE]
    encoding = min(encodings, key=lambda candidate: len(PACK[candidate](sample)))
    payload = PACK[encoding](data)
    if len(payload) >= len(data):
        encoding, payload = STORED, data
    return PLANE_HEADER.pack(encoding, len(payload)) + payload


def _unpack_plane(block: bytes, position: int, size: int) -> tuple[NDArray[np.uint8], int]:
    """The ``size`` bytes of the plane at ``position``, and the position after it."""
    start = position + PLANE_HEADER.size
    if start > len(block):
        raise DamagedError("a byte plane is missing")
    encoding, length = PLANE_HEADER.unpack_from(block, position)
    payload = block[start : start + length]  # shorter than ``length`` where the block ends too early
    if encoding not in UNPACK or len(payload) != length:
        raise DamagedError(f"a byte plane of {length} bytes in encoding {encoding}")
    plane = np.frombuffer(UNPACK[encoding](payload, size), np.uint8)
    if len(plane) != size:
        raise DamagedError("a byte plane has another size")
    return plane, start + length


# --- encodings: bytes → payload, and (payload, expected size) → bytes ------------------------------------------------


def _deflate_raw(data: bytes, strategy: int) -> bytes:
    """DEFLATE without header and checksum (negative ``wbits``): the patch has its own SHA-256."""
    packer = zlib.compressobj(level=6, wbits=-15, memLevel=9, strategy=strategy)
    return packer.compress(data) + packer.flush()


def _deflate(data: bytes) -> bytes:
    return _deflate_raw(data, zlib.Z_DEFAULT_STRATEGY)


def _huffman(data: bytes) -> bytes:
    return _deflate_raw(data, zlib.Z_HUFFMAN_ONLY)


def _inflate(payload: bytes, size: int) -> bytes:
    """Undo ``_deflate`` and ``_huffman``; at most ``size`` bytes, and nothing after them."""
    unpacker = zlib.decompressobj(-15)
    try:
        data = unpacker.decompress(payload, size + 1)
    except zlib.error as cause:
        raise DamagedError(str(cause)) from cause
    if len(data) > size or not unpacker.eof or unpacker.unused_data:
        raise DamagedError("a DEFLATE stream has another size")
    return data


def _lzma(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def _unlzma(payload: bytes, size: int) -> bytes:
    try:
        # One byte more than expected, so that _unpack_plane sees a stream that is too long.
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(payload, size + 1)
    except (lzma.LZMAError, EOFError) as cause:
        raise DamagedError(str(cause)) from cause


def _stored(payload: bytes, size: int) -> bytes:
    return payload


def _sparse(data: bytes) -> bytes:
    """Size of the data, size of the packed gaps, gaps, nonzero bytes.

    A gap is the number of zeros before a nonzero byte. It is a sum of bytes: 255 as often as it fits, then the rest.
    """
    values = np.frombuffer(data, np.uint8)
    nonzero = np.flatnonzero(values)
    gaps = np.diff(nonzero, prepend=-1) - 1
    # Gap i takes full_bytes[i] bytes of 255 and one byte for the rest, whose position the sum of all bytes so far gives.
    full_bytes = gaps // LONGEST_GAP
    gap_bytes = np.full(int(full_bytes.sum()) + len(gaps), LONGEST_GAP, np.uint8)
    gap_bytes[np.cumsum(full_bytes + 1) - 1] = gaps % LONGEST_GAP
    packed_gaps = _huffman(gap_bytes.tobytes())
    packed_values = _huffman(values[nonzero].tobytes())
    return struct.pack("<II", len(data), len(packed_gaps)) + packed_gaps + packed_values


def _unsparse(payload: bytes, size: int) -> bytes:
    if len(payload) < 8:
        raise DamagedError("a sparse plane has no gaps")
    announced, gaps_length = struct.unpack_from("<II", payload)
    if announced != size:
        raise DamagedError("a sparse plane has another size")
    gaps_end = 8 + gaps_length
    gap_bytes = np.frombuffer(_inflate(payload[8:gaps_end], size), np.uint8)
    values = np.frombuffer(_inflate(payload[gaps_end:], size), np.uint8)
    ends_gap = gap_bytes < LONGEST_GAP
    # Positions so far: the zeros of all gaps, and one for each nonzero byte.
    nonzero = (np.cumsum(gap_bytes.astype(np.int64) + ends_gap) - 1)[ends_gap]
    if len(nonzero) != len(values):
        raise DamagedError("a sparse plane has more or fewer values than gaps")
    if len(nonzero) and nonzero[-1] >= size:
        raise DamagedError("the gaps of a sparse plane are longer than it")
    data = np.zeros(size, np.uint8)
    data[nonzero] = values
    return data.tobytes()


PACK: dict[int, Callable[[bytes], bytes]] = {SPARSE: _sparse, HUFFMAN: _huffman, DEFLATE: _deflate, LZMA: _lzma}
UNPACK: dict[int, Callable[[bytes, int], bytes]] = {
    STORED: _stored,
    SPARSE: _unsparse,
    HUFFMAN: _inflate,
    DEFLATE: _inflate,
    LZMA: _unlzma,
}
