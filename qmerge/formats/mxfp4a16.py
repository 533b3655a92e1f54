"""MXFP4 as compressed-tensors writes it: FP4 in groups of 32, whose scales are powers of two (MXFP4A16)."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._compressed import CompressedOptions
from qmerge.formats._compressed_config import QUANT_METHOD
from qmerge.formats._fp4 import CompressedFp4, StoredFp4, exponents_of, power_candidates, powers_of_two
from qmerge.formats._levels import FP4_LEVELS, LevelsGrid
from qmerge.formats.base import FormatInfo, Stored
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Parts, Weight


class Mxfp4a16(CompressedFp4):
    """Tensors: ``weight_packed`` uint8 [O, I/2], ``weight_scale`` uint8 [O, I/32], exponents of two plus 127."""

    info = FormatInfo(
        name="mxfp4a16",
        quant_method=QUANT_METHOD,
        loaders="vLLM, transformers (dequantizes)",
        required_dtype="bfloat16",  # as for nvfp4
        takes_single_experts=True,
    )
    kinds = (("mxfp4-pack-quantized", "float", 4),)
    group_size = 32
    strategy = "group"
    scale_dtype = "U8"
    torch_scale_dtype = "torch.uint8"

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        exponents_OG = reader.tensor(weight.parts["weight_scale"])
        if bool((exponents_OG == 255).any()):
            raise CheckpointError(
                f"{weight.module}.weight_scale holds 255, which is NaN, so it is damaged. Download the model again"
            )
        scale_OG = powers_of_two(exponents_OG.int())
        return StoredFp4(weight.parts["weight_packed"], scale_OG, reader, device, group_size=self.group_size)

    def scale_candidates(self, largest_OG: Tensor) -> list[Tensor]:
        return power_candidates(largest_OG)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: CompressedOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return LevelsGrid(FP4_LEVELS, scales, self.group_size)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: CompressedOptions) -> Parts:
        assert isinstance(grid, LevelsGrid)
        return {"weight_scale": exponents_of(grid.scale_OG).cpu()}


FORMAT = Mxfp4a16()
