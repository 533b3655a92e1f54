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
from qmerge.formats._tensors import check_finite, modules_with, parts_of, read_rows
from qmerge.formats.base import NOT_QUANTIZED, Format, FormatInfo, Stored
from qmerge.grids import Grid
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.strict_json import strict_json
from qmerge.types import Rows, TensorInfo, Weight

# torchao's classes with one code in a byte → dtype of the codes.
KINDS = {"Int8Tensor": "I8", "IntxUnpackedToInt8Tensor": "I8", "Float8Tensor": "F8_E4M3"}

# Local names of the parts of a torchao tensor, which is flattened for safetensors.
CODES = "_weight_qdata"
SCALE = "_weight_scale"
ZERO = "_weight_zero_point"
PRE_SCALE = "_weight_act_pre_scale"

# int8 codes are counted from 0 in qmerge's grid.
MIDDLE = 128


@dataclass(frozen=True)
class TorchaoOptions:
    """How a weight is stored."""

    kind: str
    """torchao's class, one of ``KINDS``."""

    block: tuple[int, int]
    """Rows and columns that share a scale."""


class StoredTorchao(Stored):
    """Codes on disk are one to a byte."""

    def __init__(self, weight: Weight, options: TorchaoOptions, reader: Reader, device: torch.device) -> None:
        self._info = weight.parts[CODES]
        self._reader = reader
        self._device = device
        scale_RC = reader.tensor(weight.parts[SCALE]).float()
        check_finite(scale_RC, f"{weight.module}.{SCALE}")
        rows, columns = weight.shape
        height, width = options.block
        counts = (rows // height, columns // width)
        self.grid: Grid
        if options.kind == "Float8Tensor":
            self.grid = ScaledFloatGrid(scale_RC.view(counts).to(device), (rows, columns), options.block)
            return
        zero_RC = torch.zeros_like(scale_RC)
        if ZERO in weight.parts:
            zero_RC = reader.tensor(weight.parts[ZERO]).float()
        # A scale for each row, also where a block has all rows.
        scale_OG = scale_RC.view(counts).expand(rows, -1).contiguous()
        zero_OG = (zero_RC + MIDDLE).view(counts).expand(rows, -1).contiguous()
        self.grid = AffineGrid(
            scale_OG.to(device),
            zero_OG.to(device),
            sequential_groups(columns, width, device),
            levels_count=2 * MIDDLE,
        )

    def codes(self, rows: Rows) -> Tensor:
        bytes_OI = read_rows(self._info, rows, self._reader).view(torch.uint8).to(self._device)
        if self._info.dtype == "I8":
            return bytes_OI ^ MIDDLE  # flips the sign bit, which adds 128
        return bytes_OI


class Torchao(Format[TorchaoOptions]):
    """Tensors: ``_weight_qdata`` int8 or float8 [O, I], ``_weight_scale`` [O, G], ``_weight_zero_point`` int8 [O, G].

    The metadata of the file says which class they belong to.
    """

    info = FormatInfo(name="torchao", quant_method="torchao")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []

        @cache
        def metadata_of(file: Path) -> dict[str, str]:
            return read_header(file, CheckpointError, nbytes=reader.remote_size(file))[1]

        weights = []
        for module in modules_with(CODES, tensors):
            metadata = metadata_of(tensors[f"{module}.{CODES}"].file)
            weights.append(_weight(module, tensors, metadata))
        return weights

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredTorchao(weight, self.options_of(weight), reader, device)


FORMAT = Torchao()


@dataclass(frozen=True)
class _Declared:
    """The entry of a weight in the metadata of its file."""

    options: TorchaoOptions
    parts: tuple[str, ...]
    """Local names of its tensors."""


def _weight(module: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> Weight:
    declared = _read_metadata(module, metadata)
    names = dict.fromkeys((CODES, SCALE, *declared.parts))
    parts = parts_of(module, names, tensors)
    for local in names:
        if local not in parts:
            raise CheckpointError(
                f"{module}.{CODES} needs {module}.{local}, which is missing. Download the model again"
            )
    if PRE_SCALE in parts:
        raise CheckpointError(
            f"{module}.{PRE_SCALE}: this layer scales its inputs, too, which a merged weight cannot express. Choose another "
            f"variant of the model"
        )
    codes, scale = parts[CODES], parts[SCALE]
    options = declared.options
    expected = KINDS[options.kind]
    if codes.dtype != expected or len(codes.shape) != 2 or scale.dtype not in ("F32", "BF16", "F16"):
        raise CheckpointError(
            f"{module}: codes {codes.dtype} {list(codes.shape)} and scale {scale.dtype}; expected {expected} [O, I] and a 16- or "
            f"32-bit float for a {options.kind}. Download the model again"
        )
    _check_groups(module, parts, options.block)
    return Weight(module=module, local="weight", format="torchao", shape=codes.shape, parts=parts, options=options)


def _read_metadata(module: str, metadata: Mapping[str, str]) -> _Declared:
    text = metadata.get(f"{module}.weight")
    if text is None:
        raise CheckpointError(
            f"the metadata of the file does not say which of torchao's classes {module}.weight is: was the file written again "
            f"without it? Download the model again"
        )
    declared = strict_json(text.encode(), f"metadata of {module}.weight", CheckpointError)
    kind = str(declared.get("_type"))
    if kind not in KINDS:
        raise CheckpointError(
            f"{module}.weight is torchao's {kind}, which is not read; qmerge reads {', '.join(KINDS)}. Choose another variant of "
            f"the model"
        )
    data = declared.get("_data")
    block = data.get("block_size") if isinstance(data, dict) else None
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise CheckpointError(
            f"{module}.weight: torchao's block_size is {json.dumps(block)}, expected two positive integers. Download the model "
            f"again"
        )
    names = declared.get("_tensor_data_names")
    parts = [f"_weight_{name}" for name in names] if isinstance(names, list) else []
    return _Declared(TorchaoOptions(kind, (block[0], block[1])), tuple(parts))


def _check_groups(module: str, parts: Mapping[str, TensorInfo], block: tuple[int, int]) -> None:
    """Check that blocks divide the weight, and that there is a scale (and a zero) for each."""
    codes, zero = parts[CODES], parts.get(ZERO)
    rows, columns = codes.shape
    height, width = block
    is_row_or_column = height in (1, rows)
    if rows % height or columns % width or (codes.dtype == "I8" and not is_row_or_column):
        raise CheckpointError(
            f"{module}: blocks of {height} x {width} do not divide a weight of {rows} x {columns}. Download the model again"
        )
    counts = (rows // height, columns // width)
    # A single scale may have no axes, and one for every row only one axis.
    allowed: list[tuple[int, ...]] = [counts]
    if counts == (1, 1):
        allowed += [(), (1,)]
    elif counts[1] == 1:
        allowed.append((counts[0],))
    for local in (SCALE, ZERO):
        part = parts.get(local)
        if part is not None and part.shape not in allowed:
            raise CheckpointError(
                f"{part.name} has shape {list(part.shape)}, expected {list(counts)}: one for every block of {height} x {width} in "
                f"a weight of {rows} x {columns}. Download the model again"
            )
    if zero is not None and zero.dtype not in ("I8", "I32", "I64", "F32"):
        raise CheckpointError(f"{zero.name} is {zero.dtype}, expected I8. Download the model again")
