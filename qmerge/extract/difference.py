"""MERGED − BASE of one pair of weights, in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.errors import NumbersError
from qmerge.extract.pairing import WeightPair
from qmerge.formats import get_format
from qmerge.formats.base import Stored, Transposed
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows, TensorInfo, Weight

BLOCK_ENTRIES = 2**22
"""Values that are subtracted at a time."""

CHUNK_BYTES = 2**22
"""Bytes that are compared or copied at a time."""


@dataclass(frozen=True)
class DifferenceBlock:
    """Some rows of a pair: float32 [rows, I] of the base, and of merged − base."""

    rows: Rows
    base_OI: Tensor
    delta_OI: Tensor


@dataclass(frozen=True)
class PairReader:
    """Reads both weights of a pair, as float32 on ``device``."""

    reader: Reader
    device: torch.device

    def differences(self, pair: WeightPair) -> Iterator[DifferenceBlock]:
        """All rows of a pair, block by block.

        Raises:
            NumbersError: NaN or infinity in one of the two.
        """
        merged = self._open_OI(pair.merged, pair)
        base = self._open_OI(pair.base, pair)
        for rows in row_blocks(pair):
            base_OI = base.values(rows)
            delta_OI = merged.values(rows) - base_OI
            # NaN or infinity on either side makes the difference NaN or infinite.
            if not bool(delta_OI.isfinite().all()):
                raise NumbersError(
                    f"{pair.name}: MERGED or BASE contains NaN or infinity: the model is damaged; download it again"
                )
            yield DifferenceBlock(rows, base_OI, delta_OI)

    def merged_values(self, pair: WeightPair) -> Iterator[Tensor]:
        """The weight of MERGED in blocks of rows: in its own dtype and orientation where it is dense, else float32."""
        fmt = get_format(pair.merged.format)
        stored = fmt.open(pair.merged, self.reader, self.device)
        for rows in row_blocks(pair):
            if fmt.info.is_dense:
                yield stored.codes(rows)  # the codes of a dense format are its values
            else:
                yield stored.values(rows)

    def have_same_bytes(self, pair: WeightPair) -> bool:
        """Whether both weights have equal bytes, dtypes and shapes: for weights that cannot be subtracted."""
        if pair.merged.format != pair.base.format:
            return False
        parts = zip(pair.merged.parts.values(), pair.base.parts.values(), strict=False)
        return all(self._is_same_tensor(merged, base) for merged, base in parts)

    def _open_OI(self, weight: Weight, pair: WeightPair) -> Stored:
        """A weight for reading; a dense Conv1D transposed to [O, I]."""
        fmt = get_format(weight.format)
        stored = fmt.open(weight, self.reader, self.device)
        if pair.is_conv1d and fmt.info.is_dense:
            return Transposed(stored, pair.shape[1])
        return stored

    def _is_same_tensor(self, merged: TensorInfo, base: TensorInfo) -> bool:
        if (merged.dtype, merged.shape) != (base.dtype, base.shape):
            return False
        for start in range(0, merged.nbytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, merged.nbytes)
            if self.reader.bytes(merged, start, stop) != self.reader.bytes(base, start, stop):
                return False
        return True


def row_blocks(pair: WeightPair) -> Iterator[Rows]:
    """All rows of a pair in blocks of about ``BLOCK_ENTRIES`` values."""
    row_count, columns = pair.shape
    row_step = 1
    # Both formats must be able to start reading at the first row of every block.
    for weight in (pair.merged, pair.base):
        row_step = math.lcm(row_step, get_format(weight.format).row_step(pair.shape, weight.options))
    rows_that_fit = BLOCK_ENTRIES // max(1, columns)
    block_rows = max(row_step, rows_that_fit // row_step * row_step)
    if pair.is_conv1d:
        block_rows = max(1, row_count)  # one block: a transposed weight is read as a whole in any case
    for start in range(0, row_count, block_rows):
        yield Rows(start, min(start + block_rows, row_count))
