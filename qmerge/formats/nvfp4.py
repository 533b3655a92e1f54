"""NVFP4 as compressed-tensors writes it: FP4 in groups of 16 with an FP8 scale each and one for all (NVFP4A16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._affine import by_groups, sequential_groups
from qmerge.formats._compressed import QUANT_METHOD, TAKE_CONFIG, Compressed, CompressedOptions, Scheme, group_size_of
from qmerge.formats._levels import FP4_LEVELS, LevelsGrid
from qmerge.formats.base import FormatInfo, Stored
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

LARGEST, SMALLEST = 448.0, 2.0**-9
"""Of FP8 (E4M3), in which the scales of the groups are stored."""

GLOBAL_SCALE = 256.0
"""vLLM computes q, k and v (gate and up) as one layer, with one global scale: so all weights get the same, where it holds
groups with values up to 7. As a power of two it does not round anything."""

SHARES = torch.linspace(0.75, 1.5, 13).tolist()
"""Scales that are tried, as parts of the one that makes a group's largest value a 6; at 1.5 it is a 4."""


class StoredFp4(Stored):
    """Two codes in a byte, the first in the low bits."""

    def __init__(self, weight: Weight, reader: Reader, device: torch.device, scale_OG: Tensor, group_size: int) -> None:
        if not bool(scale_OG.isfinite().all()):
            raise CheckpointError(f"{weight.module}: weight_scale or weight_global_scale makes NaN or infinity")
        self._info, self._reader, self._device = weight.parts["weight_packed"], reader, device
        self.grid: LevelsGrid = LevelsGrid(FP4_LEVELS, scale_OG.to(device), group_size)

    def codes(self, rows: Rows) -> Tensor:
        width = self._info.shape[1]
        packed = self._reader.elements(self._info, rows.start * width, rows.stop * width).view(len(rows), width)
        return unpack_fp4(packed.to(self._device))

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))


def unpack_fp4(packed_OW: Tensor) -> Tensor:
    """uint8 [O, I/2] → places among the levels, uint8 [O, I]."""
    disk_OI = torch.stack([packed_OW & 15, packed_OW >> 4], dim=2).flatten(1)
    return FP4_LEVELS.order_D.to(packed_OW.device)[disk_OI.int()]


def pack_fp4(codes_OI: Tensor) -> Tensor:
    """The reverse."""
    disk_OI = FP4_LEVELS.disk_L.to(codes_OI.device)[codes_OI.int()]
    return disk_OI[:, ::2] | (disk_OI[:, 1::2] << 4)


class Nvfp4Grid(LevelsGrid):
    """A whole weight; ``global_scale`` is what its scales are multiplied with to be stored."""

    global_scale: float = GLOBAL_SCALE


class Nvfp4(Compressed):
    """Parts: ``weight_packed`` uint8 [O, I/2], ``weight_scale`` FP8 [O, I/16], ``weight_global_scale`` float32 [1], which
    the former are divided by."""

    info = FormatInfo(
        name="nvfp4",
        quant_method=QUANT_METHOD,
        loaders="vLLM, SGLang, transformers (dequantizes)",
        required_dtype="bfloat16",  # compressed-tensors 0.20 decompresses FP4 to nothing else
    )
    kinds = (("nvfp4-pack-quantized", "float", 4),)
    group_size: ClassVar[int] = 16
    strategy: ClassVar[str] = "tensor_group"
    scale_dtype: ClassVar[str] = "F8_E4M3"

    def needed(self, scheme: Scheme) -> tuple[str, ...]:
        return ("weight_packed", "weight_scale", "weight_global_scale")

    def read_shape(
        self, module: str, parts: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader
    ) -> tuple[tuple[int, int], CompressedOptions]:
        codes, scale = parts["weight_packed"], parts["weight_scale"]
        if (codes.dtype, scale.dtype) != ("U8", self.scale_dtype) or len(codes.shape) != 2:
            raise CheckpointError(
                f"{module}: weight_packed is {codes.dtype} {list(codes.shape)} and weight_scale {scale.dtype}, expected U8 "
                f"[O, I/2] and {self.scale_dtype}"
            )
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        size = group_size_of(module, columns, scheme)
        if size != self.group_size or scale.shape != (rows, columns // size):
            raise CheckpointError(
                f"{module}: weight_scale {list(scale.shape)} and config.json's groups of {size} do not belong to "
                f"{rows} x {columns} in groups of {self.group_size}. {TAKE_CONFIG}"
            )
        return (rows, columns), CompressedOptions(self.name, size, True, scale.dtype)

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        whole = reader.tensor(weight.parts["weight_global_scale"]).float().reshape(-1)[:1]
        scale_OG = reader.tensor(weight.parts["weight_scale"]).float() / whole
        return StoredFp4(weight, reader, device, scale_OG, self.group_size)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> CompressedOptions:
        if isinstance(source, CompressedOptions) and source.form == self.name:
            return source
        return CompressedOptions(self.name, self.group_size, True, self.scale_dtype)

    def describe_options(self, options: CompressedOptions) -> str:
        return f"groups of {self.group_size}"

    def way_out(self, columns: int) -> str:
        return "use --target w4a16 or nf4"

    def outputs(self, local: str, shape: tuple[int, ...], options: CompressedOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            "weight_packed": TensorSpec("U8", (rows, columns // 2)),
            "weight_scale": TensorSpec(self.scale_dtype, (rows, columns // self.group_size)),
            "weight_global_scale": TensorSpec("F32", (1,)),
        }

    def scales(self, values_OI: Tensor, options: CompressedOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G]: of the scales that can be stored, those with the least squared error."""
        group_I = sequential_groups(values_OI.shape[1], self.group_size, values_OI.device)
        values_OGN, weights_GN = by_groups(values_OI, group_I, inputs_I)
        levels = FP4_LEVELS.to(values_OI.device)
        best_OG = least_OG = torch.full_like(values_OGN[..., 0], torch.inf)
        for scale_OG in self.offers(values_OGN.abs().amax(dim=2)):
            scaled_OGN = values_OGN / torch.where(scale_OG == 0, 1.0, scale_OG)[..., None]
            errors_OGN = levels.rounded(scaled_OGN).mul_(scale_OG[..., None]).sub_(values_OGN)
            cost_OG = torch.einsum("ogn,ogn,gn->og", errors_OGN, errors_OGN, weights_GN)
            best_OG = torch.where(cost_OG < least_OG, scale_OG, best_OG)
            least_OG = torch.minimum(cost_OG, least_OG)
        return best_OG

    def offers(self, largest_OG: Tensor) -> list[Tensor]:
        """Numbers of four significant bits, as FP8 has them."""
        return [four_bits(largest_OG * (share / 6)) for share in SHARES]

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: CompressedOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        whole = global_scale(float(scales.max()))
        stored_OG = (scales * whole).clamp_(SMALLEST, LARGEST).to(torch.float8_e4m3fn)
        grid = Nvfp4Grid(FP4_LEVELS, stored_OG.float() / whole, self.group_size)
        grid.global_scale = whole
        return grid

    def pack(self, codes_OI: Tensor, options: CompressedOptions) -> Tensor:
        return pack_fp4(codes_OI)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: CompressedOptions) -> Parts:
        assert isinstance(grid, Nvfp4Grid)
        return {
            "weight_scale": (grid.scale_OG * grid.global_scale).to(torch.float8_e4m3fn).cpu(),
            "weight_global_scale": torch.tensor([grid.global_scale]),
        }

    def weights_args(self, options: CompressedOptions) -> dict[str, Any]:
        dtype = {"F8_E4M3": "torch.float8_e4m3fn", "U8": "torch.uint8"}[self.scale_dtype]
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "group_size": self.group_size,
            "strategy": self.strategy,
            "dynamic": False,
            "scale_dtype": dtype,
        }


def four_bits(values: Tensor) -> Tensor:
    """float32 ≥ 0, rounded to four significant bits."""
    return ((values.contiguous().view(torch.int32) + (1 << 19)) >> 20 << 20).view(torch.float32)


def global_scale(largest: float) -> float:
    """A power of two that takes the largest scale into the upper part of what FP8 holds."""
    if largest == 0 or 2.0**-3 <= largest * GLOBAL_SCALE <= LARGEST:
        return GLOBAL_SCALE
    exponent = torch.frexp(torch.tensor(LARGEST / largest, dtype=torch.float64)).exponent
    return 2.0 ** min(int(exponent) - 1, 126)


FORMAT = Nvfp4()
