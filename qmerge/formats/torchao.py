"""torchao's weight-only int8, int4 in int8, and float8, as transformers saves them; read, not written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._affine import AffineGrid, sequential_groups
from qmerge.formats._scaled_float import ScaledFloatGrid
from qmerge.formats.base import NOT_QUANTIZED, Format, FormatInfo, Stored
from qmerge.grids import Grid
from qmerge.safetensors_io.header import read_header, strict_json
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows, TensorInfo, Weight

KINDS = {"Int8Tensor": "I8", "IntxUnpackedToInt8Tensor": "I8", "Float8Tensor": "F8_E4M3"}
"""torchao's classes whose codes lie one in a byte → dtype of the codes."""

CODES, SCALE, ZERO, PRE_SCALE = "_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_act_pre_scale"
MIDDLE = 128
"""int8 codes are counted from 0 here."""


@dataclass(frozen=True)
class TorchaoOptions:
    """``block``: rows and columns that share a scale."""

    kind: str
    block: tuple[int, int]


class StoredTorchao(Stored):
    def __init__(self, weight: Weight, options: TorchaoOptions, reader: Reader, device: torch.device) -> None:
        self._info, self._reader, self._device = weight.parts[CODES], reader, device
        scale_OG = reader.tensor(weight.parts[SCALE]).float()
        if not bool(scale_OG.isfinite().all()):
            raise CheckpointError(f"{weight.module}.{SCALE} holds NaN or infinity; it is damaged, download it again")
        shape, (height, width) = (weight.shape[0], weight.shape[1]), options.block
        counts = (shape[0] // height, shape[1] // width)
        self.grid: Grid
        if options.kind == "Float8Tensor":
            self.grid = ScaledFloatGrid(scale_OG.view(counts).to(device), shape, options.block)
            return
        zero_OG = reader.tensor(weight.parts[ZERO]).float() if ZERO in weight.parts else torch.zeros_like(scale_OG)
        scale_OG, zero_OG = (
            part.view(counts).expand(shape[0], -1).contiguous().to(device) for part in (scale_OG, zero_OG + MIDDLE)
        )
        self.grid = AffineGrid(scale_OG, zero_OG, sequential_groups(shape[1], width, device), 2 * MIDDLE)

    def codes(self, rows: Rows) -> Tensor:
        columns = self._info.shape[1]
        flat = self._reader.elements(self._info, rows.start * columns, rows.stop * columns)
        bytes_OI = flat.view(torch.uint8).view(len(rows), columns).to(self._device)
        return bytes_OI if self._info.dtype != "I8" else bytes_OI ^ MIDDLE

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))


class Torchao(Format[TorchaoOptions]):
    """Parts: ``_weight_qdata`` int8 or float8 [O, I], ``_weight_scale`` [O, G], ``_weight_zero_point`` int8 [O, G]. Which class
    they belong to stands in the metadata of the file."""

    info = FormatInfo(name="torchao", quant_method="torchao")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []

        @cache
        def metadata(file: Path) -> dict[str, str]:
            return read_header(file, CheckpointError)[1]

        modules = [name.removesuffix(f".{CODES}") for name in tensors if name.endswith(f".{CODES}")]
        return [_weight(module, tensors, metadata(tensors[f"{module}.{CODES}"].file)) for module in modules]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredTorchao(weight, self.options_of(weight), reader, device)


FORMAT = Torchao()


def _weight(module: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Weight:
    kind, block, names = _described(module, metadata)
    named = {
        local: tensors.get(f"{module}.{local}") for local in (CODES, SCALE, *(f"_weight_{name}" for name in names))
    }
    parts = {local: info for local, info in named.items() if info is not None}
    if len(parts) < len(named):
        missing = next(local for local in named if local not in parts)
        raise CheckpointError(f"{module}.{CODES} needs {module}.{missing}, which is missing. Download the model again")
    if PRE_SCALE in parts:
        raise CheckpointError(
            f"{module}.{PRE_SCALE}: this layer scales its inputs, too, which a merged weight cannot say"
        )
    codes, scale = parts[CODES], parts[SCALE]
    if codes.dtype != KINDS[kind] or len(codes.shape) != 2 or scale.dtype not in ("F32", "BF16", "F16"):
        raise CheckpointError(
            f"{module}: codes {codes.dtype} {list(codes.shape)} and scale {scale.dtype}; expected {KINDS[kind]} [O, I] and a "
            f"16- or 32-bit float for a {kind}"
        )
    _check_groups(module, codes, scale, parts.get(ZERO), block)
    return Weight(module, "weight", "torchao", codes.shape, parts, TorchaoOptions(kind, block))


def _described(module: str, metadata: Mapping[str, str]) -> tuple[str, tuple[int, int], list[str]]:
    """Class, block and names of the parts of a weight, from the metadata of the file."""
    text = metadata.get(f"{module}.weight")
    if text is None:
        raise CheckpointError(
            f"the metadata of the file does not say which of torchao's classes {module}.weight is: was the file written anew "
            f"without it? Download the model again"
        )
    said = strict_json(text.encode(), f"metadata of {module}.weight", CheckpointError)
    kind, data = str(said.get("_type")), said.get("_data")
    if kind not in KINDS:
        raise CheckpointError(f"{module}.weight is torchao's {kind}, which is not read; these are: {', '.join(KINDS)}")
    block = data.get("block_size") if isinstance(data, dict) else None
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise CheckpointError(
            f"{module}.weight: torchao's block_size is {json.dumps(block)}, expected two positive integers"
        )
    names = said.get("_tensor_data_names")
    return kind, (block[0], block[1]), [str(name) for name in names] if isinstance(names, list) else []


def _check_groups(
    module: str, codes: TensorInfo, scale: TensorInfo, zero: TensorInfo | None, block: tuple[int, int]
) -> None:  # fmt: skip
    (rows, columns), (height, width) = codes.shape, block
    if rows % height or columns % width or (height not in (1, rows) and codes.dtype == "I8"):
        raise CheckpointError(f"{module}: blocks of {height} x {width} do not divide a weight of {rows} x {columns}")
    counts = (rows // height, columns // width)
    fits = (counts, (), (1,)) if counts == (1, 1) else (counts, *([counts[:1]] if counts[1] == 1 else []))
    for part in (scale, *([zero] if zero else [])):
        if part.shape not in fits:
            raise CheckpointError(
                f"{part.name} has shape {list(part.shape)}, expected {list(counts)}: one for every block of {height} x {width} in "
                f"a weight of {rows} x {columns}"
            )
    if zero is not None and zero.dtype not in ("I8", "I32", "I64", "F32"):
        raise CheckpointError(f"{zero.name} is {zero.dtype}, expected I8")
