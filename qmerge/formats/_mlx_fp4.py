"""FP4 weights of MLX: eight codes in a word, in groups whose scales are stored in 8 bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmerge.formats._fp4 import least_error_scales, pack_fp4, unpack_fp4
from qmerge.formats._levels import FP4_LEVELS, LevelsGrid
from qmerge.formats._mlx_config import (
    MlxSettings,
    check_storable,
    modules_of_mode,
    shape_of,
    with_quantization,
)
from qmerge.formats._packing import WORD
from qmerge.formats._tensors import check_dtype, check_finite, check_present, parts_of, read_rows
from qmerge.formats.base import NOT_QUANTIZED, ModuleLayout, NoOptions, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

PARTS = ("weight", "scales")

BITS = 4


class StoredMlxFp4(Stored):
    """The words of a row hold its codes, the first in the lowest bits."""

    def __init__(
        self, weight: Weight, scale_OG: Tensor, reader: Reader, device: torch.device, *, group_size: int
    ) -> None:
        check_finite(scale_OG, f"{weight.module}.scales")
        self._info = weight.parts["weight"]
        self._reader = reader
        self._device = device
        self.grid: LevelsGrid = LevelsGrid(FP4_LEVELS, scale_OG.to(device), group_size)

    def codes(self, rows: Rows) -> Tensor:
        return unpack_fp4(read_rows(self._info, rows, self._reader).view(torch.uint8).to(self._device))


class MlxFp4(TargetFormat[NoOptions]):
    """Tensors: ``weight`` uint32 [O, I/8], ``scales`` uint8 [O, G]."""

    mode: ClassVar[str]
    """As mlx names it."""

    group_size: ClassVar[int]

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        return [self._weight(module, tensors) for module, _ in modules_of_mode(self.mode, tensors, quantization)]

    def _weight(self, module: str, tensors: Mapping[str, TensorInfo]) -> Weight:
        parts = parts_of(module, PARTS, tensors)
        check_present(module, PARTS, parts, "MLX")
        check_dtype(parts["weight"], ("U32",))
        check_dtype(parts["scales"], ("U8",))
        shape = shape_of(module, parts, self._settings)
        return Weight(module=module, local="weight", format=self.name, shape=shape, parts=parts, options=NoOptions())

    @property
    def _settings(self) -> MlxSettings:
        return MlxSettings(BITS, self.group_size, self.mode)

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        scale_OG = self.decoded_scales(reader.tensor(weight.parts["scales"]))
        return StoredMlxFp4(weight, scale_OG, reader, device, group_size=self.group_size)

    @abstractmethod
    def decoded_scales(self, stored_OG: Tensor) -> Tensor:
        """uint8 → float32; NaN where mlx has NaN."""

    @abstractmethod
    def encoded_scales(self, scale_OG: Tensor) -> Tensor:
        """The reverse."""

    @abstractmethod
    def scale_candidates(self, largest_OG: Tensor) -> list[Tensor]:
        """float32 [O, G] each: scales to try for groups whose largest magnitudes are given. Ties go to the first one."""

    # --- options ---

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> NoOptions:
        return NoOptions()

    def describe_options(self, options: NoOptions) -> str:
        return f"groups of {self.group_size}"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] % self.group_size == 0

    def check(self, name: str, shape: tuple[int, int], options: NoOptions) -> None:
        check_storable(name, shape, self.group_size, "use another target")

    # --- write ---

    def outputs(self, local: str, shape: tuple[int, ...], options: NoOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            "weight": TensorSpec("U32", (rows, columns * BITS // WORD)),
            "scales": TensorSpec("U8", (rows, columns // self.group_size)),
        }

    def scales(self, values_OI: Tensor, options: NoOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G]: of the scales that can be stored, those with the least squared error."""
        return least_error_scales(values_OI, self.group_size, self.scale_candidates, inputs_I)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: NoOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return LevelsGrid(FP4_LEVELS, scales, self.group_size)

    def pack(self, codes_OI: Tensor, grid: Grid, options: NoOptions) -> Tensor:
        return pack_fp4(codes_OI).view(torch.uint32)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: NoOptions) -> Parts:
        assert isinstance(grid, LevelsGrid)
        return {"scales": self.encoded_scales(grid.scale_OG).cpu()}

    def quantization_config(
        self, options: NoOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        return self._settings.as_config()

    def complete_config(self, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
        return with_quantization(config, quantization)
