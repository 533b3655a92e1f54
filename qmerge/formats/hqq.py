"""HQQ as hqq saves it: 1 to 8 bits in groups along either axis, with zeros that are no integers; read, not written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._dense import StoredValues
from qmerge.formats.base import NOT_QUANTIZED, Format, FormatInfo, Stored
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Rows, TensorInfo, Weight

PACKINGS = {
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
"""Bits of a code, codes in a word, and dtype of the words (hqq 0.2.8, core/bitpack.py)."""

NEEDED = ("W_q", "scale", "zero", "shape", "axis", "packing")
SETTINGS = (
    "nbits", "group_size", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
DEPRECATED = ("zero_scale", "zero_q", "scale_q", "meta_zero", "meta_scale")


@dataclass(frozen=True)
class HqqOptions:
    """``axis`` 1: groups are runs of the flattened weight; 0: they are what lies a fixed stride apart in it."""

    packing: str
    axis: int


class StoredHqq(StoredValues):
    """The flattened weight is seen as a matrix [K, C] of groups; word p of a column holds the codes of rows p, p + P,
    p + 2P … of it, the first in its highest bits. So the packed codes are held whole.
    """

    def __init__(self, weight: Weight, options: HqqOptions, reader: Reader, device: torch.device) -> None:
        self._weight, self._reader, self._device = weight, reader, device
        self._bits, self._per_word, self._dtype = PACKINGS[options.packing]
        self._along_rows = options.axis == 1
        self._scale, self._zero = (self._small(local) for local in ("scale", "zero"))
        self._words_PC: Tensor | None = None

    def values(self, rows: Rows) -> Tensor:
        """(code − zero) · scale, in float32."""
        if self._words_PC is None:  # view_as_float stores the words under a float dtype
            self._words_PC = self._reader.tensor(self._weight.parts["W_q"]).view(self._dtype).to(self._device)
        words_PC, columns = self._words_PC, self._weight.shape[1]
        places = torch.arange(rows.start * columns, rows.stop * columns, device=self._device)
        row, column = places // words_PC.shape[1], places % words_PC.shape[1]
        shifts = (self._per_word - 1 - row // len(words_PC)) * self._bits
        codes = (words_PC[row % len(words_PC), column].int() >> shifts) & (2**self._bits - 1)
        group = row if self._along_rows else column
        values: Tensor = (codes.float() - self._zero[group]) * self._scale[group]
        return values.view(len(rows), columns)

    def _small(self, local: str) -> Tensor:
        found = self._reader.tensor(self._weight.parts[local]).float().flatten()
        if not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{self._weight.module}.{local} holds NaN or infinity; it is damaged, download it again"
            )
        return found.to(self._device)


class Hqq(Format[HqqOptions]):
    """Parts: ``W_q`` uint8 or int32 [⌈K/codes per word⌉, C], ``scale`` and ``zero`` for every group, and the settings of the
    layer, each a tensor of its own."""

    info = FormatInfo(name="hqq", quant_method="hqq")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []
        modules = [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]
        return [_weight(module, tensors, reader) for module in modules]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredHqq(weight, self.options_of(weight), reader, device)


FORMAT = Hqq()


def _weight(module: str, tensors: Mapping[str, TensorInfo], reader: Reader) -> Weight:
    named = {local: tensors.get(f"{module}.{local}") for local in (*NEEDED, *SETTINGS, *DEPRECATED)}
    parts = {local: info for local, info in named.items() if info is not None}
    missing = [local for local in NEEDED if local not in parts]
    if any(local in parts for local in DEPRECATED):
        raise CheckpointError(f"{module}: its HQQ scales or zeros are quantized too, which hqq itself no longer reads")
    if missing:
        raise CheckpointError(
            f"{module} is stored as HQQ, but {module}.{missing[0]} is missing. Download the model again"
        )
    packing = bytes(reader.tensor(parts["packing"]).to(torch.uint8).tolist()).decode("ascii", "replace")
    shape, axis = reader.tensor(parts["shape"]).tolist(), int(reader.tensor(parts["axis"]).flatten()[0])
    if packing not in PACKINGS or axis not in (0, 1) or len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(
            f"{module}: HQQ with packing {packing!r}, axis {axis} and shape {shape}; expected one of {', '.join(PACKINGS)}, axis "
            f"0 or 1, and [O, I]"
        )
    _check_sizes(module, parts, packing, axis, math.prod(shape))
    return Weight(module, "weight", "hqq", (shape[0], shape[1]), parts, HqqOptions(packing, axis))


def _check_sizes(module: str, parts: Mapping[str, TensorInfo], packing: str, axis: int, count: int) -> None:
    """``count`` codes in K rows and C columns: so many words, and a scale and a zero for every row (axis 1) or column."""
    _, per_word, dtype = PACKINGS[packing]
    packed = parts["W_q"]
    if len(packed.shape) != 2 or packed.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{module}.W_q is {packed.dtype} {list(packed.shape)}, expected words in a matrix")
    columns = max(1, packed.shape[1] * TORCH_DTYPES[packed.dtype].itemsize // dtype.itemsize)
    rows = count // columns
    groups = rows if axis == 1 else columns
    sizes = [math.prod(parts[local].shape) for local in ("scale", "zero")]
    if rows * columns != count or packed.shape[0] != -(-rows // per_word) or sizes != [groups, groups]:
        raise CheckpointError(
            f"{module}: W_q {list(packed.shape)}, scale {list(parts['scale'].shape)} and zero {list(parts['zero'].shape)} do not "
            f"belong to one HQQ weight: {count} codes as {packing} need {-(-rows // per_word)} rows of {columns} and {groups} "
            f"scales and zeros"
        )
