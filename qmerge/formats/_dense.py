"""Dense formats: the numbers themselves, in one float dtype."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import NumbersError
from qmerge.formats import _dense_kernels as kernels
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, NoOptions, Stored, TargetFormat
from qmerge.grids import ColumnRounder, Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Options, Rows, TensorInfo, TensorSpec, Weight, as_matrix


class FloatGrid(Grid):
    """The numbers of a float dtype. Codes are those numbers themselves; ties round to even, as IEEE 754 does."""

    levels_count = 2**16
    """Of 16-bit floats; float32 has more, which makes no difference to a sum over levels."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        return values_OI.to(self.dtype)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return codes_OI.float()

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        if self.dtype is torch.float32:
            info = torch.finfo(self.dtype)
            toward = torch.full_like(codes_OI, direction * torch.inf)
            return torch.nextafter(codes_OI, toward).clamp(info.min, info.max)
        if codes_OI.device.type == "cpu":
            return kernels.stepped_codes(codes_OI, direction)
        return stepped_by_torch(codes_OI, direction)

    def expected_slope(self, values_OI: Tensor, sigma_O1: Tensor) -> Tensor:
        if self.dtype is torch.float32 or values_OI.device.type != "cpu":
            return super().expected_slope(values_OI, sigma_O1)
        return kernels.expected_slope(values_OI, self.nearest(values_OI), sigma_O1)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        return lambda _, values_O: values_O.to(self.dtype).float()

    def rows(self, rows: Rows) -> FloatGrid:
        return self


def stepped_by_torch(codes: Tensor, direction: int) -> Tensor:
    """``FloatGrid.step`` of 16-bit numbers on any device."""
    # torch.nextafter lacks float16: walk the integers that the bits are, negated below zero (so that -0 is 0).
    bits = codes.view(torch.int16).int()
    ordered = torch.where(bits < 0, -(bits & 0x7FFF), bits) + direction
    stepped = torch.where(ordered < 0, -ordered | -0x8000, ordered).to(torch.int16).view(codes.dtype)
    return torch.where(stepped.isfinite(), stepped, codes)


class StoredDense(Stored):
    """A dense weight of any shape, read as a matrix: a vector is one row, a stack or convolution is flattened."""

    def __init__(self, weight: Weight, reader: Reader, device: torch.device) -> None:
        self._info = weight.parts[weight.local]
        self._reader = reader
        self._device = device
        _, columns = as_matrix(weight.shape)
        self._columns = max(1, columns)
        self.grid = FloatGrid(TORCH_DTYPES[self._info.dtype])

    def codes(self, rows: Rows) -> Tensor:
        flat = self._reader.elements(self._info, rows.start * self._columns, rows.stop * self._columns)
        return flat.view(len(rows), self._columns).to(self._device)


class StoredValues(Stored):
    """A weight of a format that is only read. Nothing is rounded to its grid, so its values are their own codes."""

    grid = FloatGrid(torch.float32)

    def codes(self, rows: Rows) -> Tensor:
        return self.values(rows)

    @abstractmethod
    def values(self, rows: Rows) -> Tensor: ...


class Dense(TargetFormat[NoOptions]):
    """Numbers in one float dtype, any shape. One tensor, which has the name of the weight."""

    def __init__(self, name: str, dtype: str) -> None:
        self.info = FormatInfo(name=name, dense_dtype=dtype, loaders="everything")
        self._dtype = dtype

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        return [single_tensor(info, self.name) for info in tensors.values() if info.dtype == self._dtype]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredDense(weight, reader, device)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> NoOptions:
        return NoOptions()

    def outputs(self, local: str, shape: tuple[int, ...], options: NoOptions) -> dict[str, TensorSpec]:
        return {local: TensorSpec(self._dtype, shape)}

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: NoOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return FloatGrid(TORCH_DTYPES[self._dtype])

    def pack(self, codes_OI: Tensor, grid: Grid, options: NoOptions) -> Tensor:
        return codes_OI

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return True

    def check_range(self, stored_OI: Tensor, merged_OI: Tensor, name: str) -> None:
        # The extremes tell, several times faster than a test of every value.
        if not stored_OI.numel():
            return
        low, high = stored_OI.aminmax()
        if not math.isinf(low) and not math.isinf(high):
            return
        largest = float(merged_OI.abs().max())
        limit = torch.finfo(TORCH_DTYPES[self._dtype]).max
        raise NumbersError(
            f"{name} reaches {largest:.6g}, but {self.name} ends at {limit:.6g}. Use --target bf16 or fp32."
        )


def single_tensor(info: TensorInfo, format_name: str) -> Weight:
    """A weight that is stored as one tensor of its own name."""
    module, _, local = info.name.rpartition(".")
    return Weight(
        module=module, local=local, format=format_name, shape=info.shape, parts={local: info}, options=NoOptions()
    )
