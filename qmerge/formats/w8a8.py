"""Compressed-tensors' int8 weights with a scale per row; loaders quantize the activations to int8 as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qmerge.formats._affine import AffineGrid, group_count
from qmerge.formats._compressed import CompressedOptions
from qmerge.formats._compressed_config import QUANT_METHOD
from qmerge.formats._compressed_int import CompressedInt, middle_code
from qmerge.formats.base import FormatInfo
from qmerge.grids import Grid
from qmerge.types import TORCH_DTYPES, Parts, TensorSpec


class W8a8(CompressedInt):
    """Tensors: ``weight`` int8 [O, I], ``weight_scale`` [O, 1], and where asymmetric ``weight_zero_point`` int8 [O, 1]."""

    info = FormatInfo(
        name="w8a8",
        quant_method=QUANT_METHOD,
        loaders="vLLM, SGLang, transformers",
        quantizes_activations=True,
        experts_problem="transformers 5.23 does not load experts in int8 that are not packed",
    )
    kinds = (("int-quantized", "int", 8), ("naive-quantized", "int", 8))
    bits = 8
    codes_tensor = "weight"

    def outputs(self, local: str, shape: tuple[int, ...], options: CompressedOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        groups = group_count(columns, options.group_size)
        specs = {"weight": TensorSpec("I8", shape), "weight_scale": TensorSpec(options.scale_dtype, (rows, groups))}
        if not options.sym:
            specs["weight_zero_point"] = TensorSpec("I8", (rows, groups))
        return specs

    def pack(self, codes_OI: Tensor, grid: Grid, options: CompressedOptions) -> Tensor:
        return (codes_OI.short() - middle_code(self.bits)).to(torch.int8)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: CompressedOptions) -> Parts:
        assert isinstance(grid, AffineGrid)
        tensors = {"weight_scale": grid.scale_OG.to(TORCH_DTYPES[options.scale_dtype]).cpu()}
        if not options.sym:
            tensors["weight_zero_point"] = (grid.zero_OG - middle_code(self.bits)).to(torch.int8).cpu()
        return tensors

    def target_warnings(self, options: CompressedOptions, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        return []  # zero points are not packed here, so all loaders read them

    def inputs_args(self) -> dict[str, Any] | None:
        return {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "group_size": None,
            "strategy": "token",
            "dynamic": True,
        }


FORMAT = W8a8()
