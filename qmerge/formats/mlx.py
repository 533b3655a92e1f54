"""MLX's affine layout: 2 to 8 bits in groups, as mlx_lm and LM Studio load it on Apple machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import RecipeError
from qmerge.formats._affine import AffineGrid, sequential_groups
from qmerge.formats._mlx_config import (
    AFFINE,
    MlxSettings,
    check_storable,
    mlx_info,
    modules_of_mode,
    shape_of,
    with_quantization,
)
from qmerge.formats._mlx_scales import fit_mlx
from qmerge.formats._packing import WORD, pack_bits, unpack_bits
from qmerge.formats._tensors import check_dtype, check_finite, check_present, parts_of, read_rows
from qmerge.formats.base import NOT_QUANTIZED, ModuleLayout, Stored, TargetFormat, with_asked
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Options, Parts, Rows, TensorInfo, TensorSpec, Weight

PARTS = ("weight", "scales", "biases")

BITS = (2, 3, 4, 5, 6, 8)

GROUP_SIZES = (32, 64, 128)

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class MlxOptions:
    """How a weight is stored."""

    bits: int = 4

    group_size: int = 64
    """Inputs that share a scale and a bias."""

    scale_dtype: str = "F32"
    """dtype of scales and biases, in which loaders compute; mlx takes that of the model."""


class BiasGrid(AffineGrid):
    """value = code · scale + bias, in float32, as ``mx.dequantize`` computes it.

    Methods that decide column by column take −bias / scale for the zero: their levels differ from these values only by the
    rounding of float32, and get their codes from ``nearest``.

    Args:
        scale_OG: float32, often negative.
        bias_OG: float32, the value of code 0.
        group_I: int64, the group of every column.
        levels_count: number of codes.
    """

    def __init__(self, scale_OG: Tensor, bias_OG: Tensor, group_I: Tensor, levels_count: int) -> None:
        self.bias_OG = bias_OG
        zero_OG = torch.where(scale_OG == 0, 0.0, -bias_OG / scale_OG)
        super().__init__(scale_OG, zero_OG, group_I, levels_count)

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        position_OI = (values_OI - self._per_column(self.bias_OG)).mul_(self._per_column(self._inverse_OG))
        codes_OI = position_OI.round_().clamp_(0, self.levels_count - 1).to(torch.uint8)
        if near_OI is None or bool(self.scale_OG.all()):
            return codes_OI
        return torch.where(self._per_column(self.scale_OG) == 0, near_OI, codes_OI)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return codes_OI.float().mul_(self._per_column(self.scale_OG)).add_(self._per_column(self.bias_OG))

    def ends(self) -> tuple[Tensor, Tensor]:
        first_OG = self.bias_OG
        last_OG = (self.levels_count - 1) * self.scale_OG + self.bias_OG
        low_OG, high_OG = torch.minimum(first_OG, last_OG), torch.maximum(first_OG, last_OG)
        return self._per_column(low_OG), self._per_column(high_OG)

    def rows(self, rows: Rows) -> BiasGrid:
        part = slice(rows.start, rows.stop)
        return BiasGrid(self.scale_OG[part], self.bias_OG[part], self.group_I, self.levels_count)


class StoredMlx(Stored):
    """The words of a row hold its codes, the first in the lowest bits."""

    def __init__(self, weight: Weight, options: MlxOptions, reader: Reader, device: torch.device) -> None:
        self._info = weight.parts["weight"]
        self._bits = options.bits
        self._reader = reader
        self._device = device
        scale_OG, bias_OG = (reader.tensor(weight.parts[local]).float() for local in ("scales", "biases"))
        check_finite(scale_OG, f"{weight.module}.scales")
        check_finite(bias_OG, f"{weight.module}.biases")
        group_I = sequential_groups(weight.shape[1], options.group_size, device)
        self.grid: BiasGrid = BiasGrid(scale_OG.to(device), bias_OG.to(device), group_I, 2**options.bits)

    def codes(self, rows: Rows) -> Tensor:
        # torch can shift signed words only.
        words_OW = read_rows(self._info, rows, self._reader).view(torch.int32)
        return unpack_bits(words_OW.to(self._device), self._bits)


class Mlx(TargetFormat[MlxOptions]):
    """Tensors: ``weight`` uint32 [O, I·bits/32], ``scales`` and ``biases`` [O, G] in the model's dtype."""

    info = mlx_info("mlx", accepted_options=("bits", "group_size"))

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        modules = modules_of_mode(AFFINE, tensors, quantization)
        return [_weight(module, tensors, settings) for module, settings in modules]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredMlx(weight, self.options_of(weight), reader, device)

    # --- options ---

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> MlxOptions:
        default = MlxOptions(scale_dtype=dtype if dtype in FLOATS else "F32")
        if isinstance(source, MlxOptions):
            default = source
        options = with_asked(default, asked)
        for name, value, supported in (("bits", options.bits, BITS), ("group-size", options.group_size, GROUP_SIZES)):
            if value not in supported and default is not options:
                raise RecipeError(f"--{name} {value}: mlx supports {', '.join(map(str, supported))}")
        return options

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """Groups of 64, as mlx's default, or of 32 where 64 does not divide the inputs of every weight."""
        if "group_size" in asked or all(shape[-1] % MlxOptions.group_size == 0 for shape in shapes):
            return asked
        return {**asked, "group_size": min(GROUP_SIZES)}

    def describe_options(self, options: MlxOptions) -> str:
        return f"{options.bits} bits, groups of {options.group_size}"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and shape[1] % min(GROUP_SIZES) == 0

    def check(self, name: str, shape: tuple[int, int], options: MlxOptions) -> None:
        advice = f"use --group-size {min(GROUP_SIZES)}, or another target"
        check_storable(name, shape, options.group_size, advice)

    # --- write ---

    def outputs(self, local: str, shape: tuple[int, ...], options: MlxOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        scales = TensorSpec(options.scale_dtype, (rows, columns // options.group_size))
        return {
            "weight": TensorSpec("U32", (rows, columns * options.bits // WORD)),
            "scales": scales,
            "biases": scales,
        }

    def scales(self, values_OI: Tensor, options: MlxOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G, 2]: scale and bias."""
        group_I = sequential_groups(values_OI.shape[1], options.group_size, values_OI.device)
        dtype = TORCH_DTYPES[options.scale_dtype]
        return fit_mlx(values_OI, group_I, bits=options.bits, dtype=dtype, inputs_I=inputs_I)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: MlxOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        scale_OG, bias_OG = scales[..., 0].contiguous(), scales[..., 1].contiguous()
        group_I = sequential_groups(shape[1], options.group_size, scales.device)
        return BiasGrid(scale_OG, bias_OG, group_I, 2**options.bits)

    def pack(self, codes_OI: Tensor, grid: Grid, options: MlxOptions) -> Tensor:
        return pack_bits(codes_OI, options.bits).view(torch.uint32)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: MlxOptions) -> Parts:
        assert isinstance(grid, BiasGrid)
        dtype = TORCH_DTYPES[options.scale_dtype]
        return {"scales": grid.scale_OG.to(dtype).cpu(), "biases": grid.bias_OG.to(dtype).cpu()}

    def quantization_config(
        self, options: MlxOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        """As ``mlx_lm.convert`` writes it, with an entry for every module that has other options."""
        config = MlxSettings(options.bits, options.group_size).as_config()
        for module, other in layout.others:
            assert isinstance(other, MlxOptions)
            config[module] = MlxSettings(other.bits, other.group_size).as_config()
        return config

    def complete_config(self, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
        return with_quantization(config, quantization)


FORMAT = Mlx()


def _weight(module: str, tensors: Mapping[str, TensorInfo], settings: MlxSettings) -> Weight:
    parts = parts_of(module, PARTS, tensors)
    check_present(module, PARTS, parts, "MLX")
    check_dtype(parts["weight"], ("U32",))
    check_dtype(parts["scales"], FLOATS)
    check_dtype(parts["biases"], (parts["scales"].dtype,))
    shape = shape_of(module, parts, settings)
    options = MlxOptions(settings.bits, settings.group_size, parts["scales"].dtype)
    return Weight(module=module, local="weight", format="mlx", shape=shape, parts=parts, options=options)
