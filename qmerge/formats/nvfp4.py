"""NVFP4 as compressed-tensors writes it: FP4 in groups of 16 with an FP8 scale each and one for all (NVFP4A16)."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.formats._compressed import CompressedOptions
from qmerge.formats._compressed_config import QUANT_METHOD, Scheme
from qmerge.formats._fp4 import CompressedFp4, StoredFp4
from qmerge.formats._levels import FP4_LEVELS, LevelsGrid
from qmerge.formats._scaled_float import FLOAT8, LARGEST
from qmerge.formats.base import FormatInfo, Stored
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Parts, TensorSpec, Weight

# Smallest positive number of FP8 (E4M3), in which the scales of the groups are stored.
SMALLEST = 2.0**-9

# vLLM computes q, k and v (gate and up) as one layer, with one global scale. So all weights get the same one, which suits
# groups with values up to 7. As a power of two it does not round anything.
GLOBAL_SCALE = 256.0

# Scales that are tried, relative to the one that makes a group's largest value a 6. At 1.5 it is a 4.
SHARES = torch.linspace(0.75, 1.5, 13).tolist()


class Nvfp4Grid(LevelsGrid):
    """A whole weight."""

    global_scale: float = GLOBAL_SCALE
    """Scales are multiplied by this before they are stored."""


class Nvfp4(CompressedFp4):
    """Tensors: ``weight_packed`` uint8 [O, I/2], ``weight_scale`` FP8 [O, I/16], ``weight_global_scale`` float32 [1].

    Scales are divided by the global one.
    """

    info = FormatInfo(
        name="nvfp4",
        quant_method=QUANT_METHOD,
        loaders="vLLM, SGLang, transformers (dequantizes)",
        required_dtype="bfloat16",  # compressed-tensors 0.20 decompresses FP4 to nothing else
        experts_problem="transformers 5.23 ignores the global scale of experts, and reads other values",
    )
    kinds = (("nvfp4-pack-quantized", "float", 4),)
    group_size = 16
    strategy = "tensor_group"
    scale_dtype = "F8_E4M3"
    torch_scale_dtype = "torch.float8_e4m3fn"

    def required_parts(self, scheme: Scheme) -> tuple[str, ...]:
        return (*super().required_parts(scheme), "weight_global_scale")

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        global_scale = reader.tensor(weight.parts["weight_global_scale"]).float().reshape(-1)[:1]
        scale_OG = reader.tensor(weight.parts["weight_scale"]).float() / global_scale
        return StoredFp4(weight.parts["weight_packed"], scale_OG, reader, device, group_size=self.group_size)

    def outputs(self, local: str, shape: tuple[int, ...], options: CompressedOptions) -> dict[str, TensorSpec]:
        return {**super().outputs(local, shape, options), "weight_global_scale": TensorSpec("F32", (1,))}

    def scale_candidates(self, largest_OG: Tensor) -> list[Tensor]:
        """Numbers of four significant bits, as FP8 has them."""
        return [four_bits(largest_OG * (share / 6)) for share in SHARES]

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: CompressedOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        global_scale = choose_global_scale(float(scales.max()))
        stored_OG = (scales * global_scale).clamp_(SMALLEST, LARGEST).to(FLOAT8)
        grid = Nvfp4Grid(FP4_LEVELS, stored_OG.float() / global_scale, self.group_size)
        grid.global_scale = global_scale
        return grid

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: CompressedOptions) -> Parts:
        assert isinstance(grid, Nvfp4Grid)
        return {
            "weight_scale": (grid.scale_OG * grid.global_scale).to(FLOAT8).cpu(),
            "weight_global_scale": torch.tensor([grid.global_scale]),
        }


def four_bits(values: Tensor) -> Tensor:
    """float32 ≥ 0, rounded to four significant bits: the implicit one and three of the mantissa's 23."""
    bits = values.contiguous().view(torch.int32)
    half = 1 << 19
    return ((bits + half) >> 20 << 20).view(torch.float32)


def choose_global_scale(largest: float) -> float:
    """A power of two that takes the largest scale into the upper part of FP8's range."""
    if largest == 0 or 2.0**-3 <= largest * GLOBAL_SCALE <= LARGEST:
        return GLOBAL_SCALE
    exponent = torch.frexp(torch.tensor(LARGEST / largest, dtype=torch.float64)).exponent
    # 2**126: its reciprocal is still a normal float32.
    return 2.0 ** min(int(exponent) - 1, 126)


FORMAT = Nvfp4()
