"""HQQ as hqq saves it: 1 to 8 bits in groups along either axis, with zeros that are not integers; read, not written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._dense import StoredValues
from qmerge.formats._tensors import check_finite, check_present, modules_with, parts_of
from qmerge.formats.base import NOT_QUANTIZED, Format, FormatInfo, Stored
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Rows, TensorInfo, Weight


@dataclass(frozen=True)
class Packing:
    """How codes are packed into words."""

    bits: int
    per_word: int
    word: torch.dtype


# hqq 0.2.8, core/bitpack.py.
PACKINGS = {
    "8bit_u8": Packing(8, 1, torch.uint8),
    "4bit_u8": Packing(4, 2, torch.uint8),
    "3bit_32": Packing(3, 10, torch.int32),
    "2bit_u8": Packing(2, 4, torch.uint8),
    "1bit_u8": Packing(1, 8, torch.uint8),
}

REQUIRED = ("W_q", "scale", "zero", "shape", "axis", "packing")
# Tensors that hold settings, which qmerge does not need.
SETTINGS = (
    "nbits", "group_size", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip

# Tensors of old files, whose scales or zeros are quantized as well.
QUANTIZED_SCALES = ("zero_scale", "zero_q", "scale_q", "meta_zero", "meta_scale")


@dataclass(frozen=True)
class HqqOptions:
    """How a weight is stored."""

    packing: str
    """One of ``PACKINGS``."""

    axis: int
    """1: groups are runs of the flattened weight. 0: entries at a fixed distance from each other in it."""


class StoredHqq(StoredValues):
    """The flattened weight is seen as a matrix [K, C] of groups.

    Word p of a column holds the codes of its rows p, p + P, p + 2P …, where P is the number of words, the first in the highest
    bits. So the packed codes stay in memory as a whole.
    """

    def __init__(self, weight: Weight, options: HqqOptions, reader: Reader, device: torch.device) -> None:
        self._weight = weight
        self._reader = reader
        self._device = device
        self._packing = PACKINGS[options.packing]
        self._groups_are_rows = options.axis == 1
        self._scale = self._read_flat("scale")
        self._zero = self._read_flat("zero")
        self._words_PC: Tensor | None = None

    def values(self, rows: Rows) -> Tensor:
        # (code − zero) · scale, in float32.
        words_PC, packing = self._words(), self._packing
        columns = self._weight.shape[1]
        entries = torch.arange(rows.start * columns, rows.stop * columns, device=self._device)
        row, column = entries // words_PC.shape[1], entries % words_PC.shape[1]
        shifts = (packing.per_word - 1 - row // len(words_PC)) * packing.bits
        codes = (words_PC[row % len(words_PC), column].int() >> shifts) & (2**packing.bits - 1)
        group = row if self._groups_are_rows else column
        values: Tensor = (codes.float() - self._zero[group]) * self._scale[group]
        return values.view(len(rows), columns)

    def _words(self) -> Tensor:
        """[P, C]."""
        if self._words_PC is None:
            stored = self._reader.tensor(self._weight.parts["W_q"])
            self._words_PC = stored.view(self._packing.word).to(self._device)  # view_as_float: stored as floats
        return self._words_PC

    def _read_flat(self, local: str) -> Tensor:
        """float32, one value for every group."""
        values = self._reader.tensor(self._weight.parts[local]).float().flatten()
        check_finite(values, f"{self._weight.module}.{local}")
        return values.to(self._device)


class Hqq(Format[HqqOptions]):
    """Tensors: ``W_q`` uint8 or int32 [⌈K/codes per word⌉, C], ``scale`` and ``zero`` for every group, and the settings of the
    layer, each a tensor of its own."""

    info = FormatInfo(name="hqq", quant_method="hqq")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []
        return [_weight(module, tensors, reader) for module in modules_with("W_q", tensors)]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredHqq(weight, self.options_of(weight), reader, device)


FORMAT = Hqq()


def _weight(module: str, tensors: Mapping[str, TensorInfo], reader: Reader) -> Weight:
    parts = parts_of(module, (*REQUIRED, *SETTINGS, *QUANTIZED_SCALES), tensors)
    if any(local in parts for local in QUANTIZED_SCALES):
        raise CheckpointError(
            f"{module}: its HQQ scales or zeros are quantized too, which hqq itself no longer reads; quantize the model again "
            f"with a newer version"
        )
    check_present(module, REQUIRED, parts, "HQQ")
    packing = bytes(reader.tensor(parts["packing"]).to(torch.uint8).tolist()).decode("ascii", "replace")
    shape = reader.tensor(parts["shape"]).tolist()
    axis = int(reader.tensor(parts["axis"]).flatten()[0])
    if packing not in PACKINGS or axis not in (0, 1) or len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(
            f"{module}: HQQ with packing {packing!r}, axis {axis} and shape {shape}; expected one of {', '.join(PACKINGS)}, axis 0 "
            f"or 1, and [O, I]. Download the model again"
        )
    options = HqqOptions(packing, axis)
    _check_sizes(module, parts, options, math.prod(shape))
    return Weight(module=module, local="weight", format="hqq", shape=(shape[0], shape[1]), parts=parts, options=options)


def _check_sizes(module: str, parts: Mapping[str, TensorInfo], options: HqqOptions, count: int) -> None:
    """``count`` codes make K rows and C columns: check the number of words, and of scales and zeros."""
    packing = PACKINGS[options.packing]
    packed = parts["W_q"]
    if len(packed.shape) != 2 or packed.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{packed.name} is {packed.dtype} {list(packed.shape)}, expected a matrix of words. Download the model again"
        )
    # view_as_float stores the words as numbers of another width.
    columns = max(1, packed.shape[1] * TORCH_DTYPES[packed.dtype].itemsize // packing.word.itemsize)
    rows = count // columns
    word_rows = -(-rows // packing.per_word)
    groups = rows if options.axis == 1 else columns
    scale, zero = parts["scale"].shape, parts["zero"].shape
    has_all_codes = rows * columns == count and packed.shape[0] == word_rows
    if not has_all_codes or math.prod(scale) != groups or math.prod(zero) != groups:
        raise CheckpointError(
            f"{module}: W_q {list(packed.shape)}, scale {list(scale)} and zero {list(zero)} do not belong to one HQQ weight: "
            f"{count} codes as {options.packing} need {word_rows} rows of {columns} and {groups} scales and zeros. Download the "
            f"model again"
        )
