"""Codes of a few bits ↔ int32 words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Bits of a word.
WORD = 32

SMALL = 128
"""Rows or columns below which a layer may stay dense because it does not fit into words."""


def pack_bits(codes_XN: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, integers [X, N] → int32 [X, N·bits/32]: one little-endian stream of bits in every row.

    This is the order of GPTQ, AWQ, compressed-tensors and MLX, which describe it differently: "least significant first" for 2,
    4 and 8 bits, and for 3, 5 and 6 bits so many words that hold 32 codes, some of which span words.

    Args:
        codes_XN: N is a multiple of 32/bits (where codes span words: of 32).
    """
    rows, count = codes_XN.shape
    if WORD % bits:
        return _pack_spanning(codes_XN, bits)
    per_word = WORD // bits
    shifts = torch.arange(per_word, device=codes_XN.device) * bits
    words = (codes_XN.long().view(rows, count // per_word, per_word) << shifts).sum(dim=2)
    return _as_int32(words)


def _pack_spanning(codes_XN: Tensor, bits: int) -> Tensor:
    """The same for codes that span words: ``bits`` words hold 32 codes."""
    rows, count = codes_XN.shape
    codes = codes_XN.long().view(rows, count // WORD, WORD)
    first_bits = torch.arange(WORD, device=codes_XN.device) * bits
    words = torch.zeros(rows, count // WORD, bits, dtype=torch.int64, device=codes_XN.device)
    for word in range(bits):
        shifts = first_bits - WORD * word
        overlaps = (shifts > -bits) & (shifts < WORD)
        # A code that began in the word before has a negative shift: only its upper bits are in this word.
        shifted_left = codes << shifts.clamp(min=0)
        shifted_right = codes >> (-shifts).clamp(min=0)
        in_word = torch.where(shifts >= 0, shifted_left, shifted_right)
        words[:, :, word] = (in_word * overlaps).sum(dim=2) & 0xFFFFFFFF
    return _as_int32(words.flatten(1))


def unpack_bits(words_XW: Tensor, bits: int) -> Tensor:
    """The reverse of ``pack_bits``: int32 [X, W] → uint8 [X, W·32/bits]."""
    if WORD % bits:
        return _unpack_spanning(words_XW, bits)
    shifts = torch.arange(WORD // bits, device=words_XW.device, dtype=torch.int32) * bits
    fields: Tensor = (words_XW[:, :, None] >> shifts) & (2**bits - 1)
    return fields.to(torch.uint8).view(len(words_XW), -1)


def _unpack_spanning(words_XW: Tensor, bits: int) -> Tensor:
    rows, count = words_XW.shape
    words = (words_XW.long() & 0xFFFFFFFF).view(rows, count // bits, bits)
    first_bits = torch.arange(WORD, device=words_XW.device) * bits
    word, shifts = first_bits // WORD, first_bits % WORD
    from_next_word = words[:, :, (word + 1).clamp(max=bits - 1)] << (WORD - shifts)
    fields = (words[:, :, word] >> shifts) | torch.where(shifts > WORD - bits, from_next_word, 0)
    codes: Tensor = (fields & (2**bits - 1)).to(torch.uint8)
    return codes.view(rows, -1)


def pack_padded(codes_XN: Tensor, bits: int) -> Tensor:
    """uint8 [X, N] → int32 [X, ⌈N·bits/32⌉]: the last word of every row is filled up with zeros."""
    missing = -codes_XN.shape[1] % (WORD // bits)
    return pack_bits(pad(codes_XN, (0, missing)), bits)


def words_for(count: int, bits: int) -> int:
    """Number of words for so many codes."""
    return -(-count * bits // WORD)


def _as_int32(words: Tensor) -> Tensor:
    """Words of 32 bits in int64 → int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
