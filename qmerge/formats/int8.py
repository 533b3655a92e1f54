"""LLM.int8() as bitsandbytes writes it: one scale per row (arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._bnb4bit import EXPERTS_PROBLEM, bitsandbytes_config
from qmerge.formats._tensors import check_dtype, check_finite, modules_with, parts_of, read_rows
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, NoOptions, Stored, TargetFormat
from qmerge.grids import ColumnRounder, Grid, ScaleTable
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

# bitsandbytes multiplies by this constant, after the scale: any other order differs in the last bit
# (bitsandbytes/backends/default/ops.py, int8_vectorwise_dequant).
ONE_OVER_127 = 7.874015718698502e-3

# Largest code; the smallest one is −127.
LAST = 127


class Int8Grid(Grid):
    """Levels −127 … 127 times SCB/127 of each row; codes are int8; ties round to even."""

    levels_count = 2 * LAST + 1

    def __init__(self, scb_O: Tensor) -> None:
        self.scb_O = scb_O

    def nearest(self, values_OI: Tensor, near_OI: Tensor | None = None) -> Tensor:
        # An all-zero row has SCB 0: every code is 0 there (bitsandbytes gets NaN, which its cast makes 0).
        scaled_OI = values_OI * (127.0 / self.scb_O)[:, None]
        return scaled_OI.nan_to_num_(0.0).round_().clamp_(-LAST, LAST).to(torch.int8)

    def decode(self, codes_OI: Tensor) -> Tensor:
        return codes_OI * self.scb_O[:, None] * ONE_OVER_127

    def step(self, codes_OI: Tensor, direction: int) -> Tensor:
        return (codes_OI.short() + direction).clamp_(-LAST, LAST).to(torch.int8)

    def column_rounder(self, columns: Tensor, rows: Tensor) -> ColumnRounder:
        scale_O = self.scb_O[rows] * ONE_OVER_127
        inverse_O = torch.where(scale_O == 0, scale_O, 1.0 / scale_O)

        def nearest(_: int, values_O: Tensor) -> Tensor:
            return (values_O * inverse_O).round_().clamp_(-LAST, LAST) * scale_O

        return nearest

    def scale_table(self, columns: int) -> ScaleTable:
        scale_O = self.scb_O * ONE_OVER_127
        return ScaleTable(
            scale=scale_O,
            inverse=torch.where(scale_O == 0, scale_O, 1.0 / scale_O),
            zero=torch.zeros_like(scale_O),
            row_stride=1,
            column_offset_I=torch.zeros(columns, dtype=torch.int64, device=scale_O.device),
            levels_L=scale_O.new_empty(0),
            edges=scale_O.new_empty(0),
            first=-LAST,
            last=LAST,
        )

    def ends(self) -> tuple[Tensor, Tensor]:
        return -self.scb_O[:, None], self.scb_O[:, None]

    def rows(self, rows: Rows) -> Int8Grid:
        return Int8Grid(self.scb_O[rows.start : rows.stop])


class StoredInt8(Stored):
    """Codes on disk are those of the grid."""

    def __init__(self, weight: Weight, reader: Reader, device: torch.device) -> None:
        self._info = weight.parts["weight"]
        self._reader = reader
        self._device = device
        scb_O = reader.tensor(weight.parts["SCB"]).float().flatten().to(device)
        check_finite(scb_O, f"{weight.module}.SCB")
        self.grid: Int8Grid = Int8Grid(scb_O)

    def codes(self, rows: Rows) -> Tensor:
        return read_rows(self._info, rows, self._reader).to(self._device)


class Int8(TargetFormat[NoOptions]):
    """Tensors: ``weight`` int8 [O, I], ``SCB`` float32 [O], ``weight_format`` uint8 (0: row-major)."""

    info = FormatInfo(
        name="int8",
        quant_method="bitsandbytes",
        loaders="transformers, vLLM (CUDA)",
        takes_conv1d=True,
        quantizes_activations=True,
        experts_problem=EXPERTS_PROBLEM,
    )

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        return [_weight(module, tensors, reader) for module in modules_with("SCB", tensors)]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredInt8(weight, reader, device)

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> NoOptions:
        return NoOptions()

    def outputs(self, local: str, shape: tuple[int, ...], options: NoOptions) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec("I8", shape),
            "SCB": TensorSpec("F32", (shape[0],)),
            "weight_format": TensorSpec("U8", ()),
        }

    def scales(self, values_OI: Tensor, options: NoOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows]: the largest magnitude of every row."""
        return values_OI.abs().amax(dim=1)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: NoOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return Int8Grid(scales)

    def as_loaded(self, values_OI: Tensor) -> Tensor:
        # Int8Params casts to float16 before it quantizes (bitsandbytes/nn/modules.py, Int8Params._quantize).
        return values_OI.half().float()

    def pack(self, codes_OI: Tensor, grid: Grid, options: NoOptions) -> Tensor:
        return codes_OI

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: NoOptions) -> Parts:
        assert isinstance(grid, Int8Grid)
        return {"SCB": grid.scb_O.cpu(), "weight_format": torch.zeros((), dtype=torch.uint8)}

    def target_warnings(self, options: NoOptions, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        warning = (
            "int8: bitsandbytes quantizes the activations to int8, too, which no number here includes. On SmolLM2-135M the KL "
            "ratio was 0.063 as it runs, but 0.004 by the stored values. Test the model on your task; w8a16 and bf16 leave "
            "activations alone"
        )
        return [warning]

    def quantization_config(
        self, options: NoOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        return bitsandbytes_config(base, layout, load_in_8bit=True)


FORMAT = Int8()


def _weight(module: str, tensors: Mapping[str, TensorInfo], reader: Reader) -> Weight:
    parts = parts_of(module, ("weight", "SCB", "weight_format"), tensors)
    codes = parts.get("weight")
    if codes is None or codes.dtype != "I8" or len(codes.shape) != 2:
        found = f"{codes.dtype} {list(codes.shape)}" if codes else "nothing"
        raise CheckpointError(
            f"{module}.SCB needs {module}.weight as int8 [O, I], found {found}. Download the model again"
        )
    scb = parts["SCB"]
    check_dtype(scb, ("F32",))
    rows = codes.shape[0]
    if scb.shape not in ((rows,), (rows, 1)):
        raise CheckpointError(
            f"{module}.SCB has shape {list(scb.shape)}, expected [{rows}], one for every row of the weight. Download the model "
            f"again"
        )
    weight_format = parts.get("weight_format")
    if weight_format is not None and int(reader.tensor(weight_format).flatten()[0]) != 0:
        raise CheckpointError(
            f"{module}.weight_format is not 0 (row-major): old versions of bitsandbytes wrote such layouts, which are "
            f"not read. Save the model with a newer version"
        )
    return Weight(module=module, local="weight", format="int8", shape=codes.shape, parts=parts, options=NoOptions())
