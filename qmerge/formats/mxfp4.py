"""MXFP4 experts of gpt-oss: FP4 numbers in blocks of 32 that share a power of two; read, not written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._dense import StoredValues
from qmerge.formats._levels import FP4
from qmerge.formats.base import NOT_QUANTIZED, Format, FormatInfo, NoOptions, Stored
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows, TensorInfo, Weight

BYTES, BIAS = 16, 127
"""Bytes of a block (two codes in each, the first in the low bits), and what is added to its exponent."""

BLOCKS, SCALES = "_blocks", "_scales"


class StoredMxfp4(StoredValues):
    """Rows are experts: one expert's values lie transposed in a dense checkpoint, so it is read whole."""

    def __init__(self, weight: Weight, reader: Reader, device: torch.device) -> None:
        self._blocks, self._scales = weight.parts[weight.local + BLOCKS], weight.parts[weight.local + SCALES]
        self._reader, self._device = reader, device
        self._table = torch.tensor(FP4, device=device)

    def values(self, rows: Rows) -> Tensor:
        """ldexp(code, scale − 127), as transformers has it (integrations/mxfp4.py): no scale is NaN, not even 255."""
        packed_EOGB, scale_EOG = (self._part(info, rows) for info in (self._blocks, self._scales))
        pairs_EOGBP = torch.stack((packed_EOGB & 15, packed_EOGB >> 4), dim=-1)
        numbers_EOGN = self._table[pairs_EOGBP.int()].flatten(-2)
        values_EOI = torch.ldexp(numbers_EOGN, scale_EOG.int()[..., None] - BIAS).flatten(-2)
        return values_EOI.transpose(1, 2).reshape(len(rows), -1)

    def _part(self, info: TensorInfo, rows: Rows) -> Tensor:
        per_expert = info.nbytes // info.shape[0]
        flat = self._reader.elements(info, rows.start * per_expert, rows.stop * per_expert)
        return flat.view(len(rows), *info.shape[1:]).to(self._device)


class Mxfp4(Format[NoOptions]):
    """Parts of all experts at once: ``gate_up_proj_blocks`` uint8 [E, O, I/32, 16], ``gate_up_proj_scales`` uint8 [E, O, I/32].

    The weight is ``gate_up_proj`` [E, I, O], as a dense checkpoint has it. It is no target: adapters leave experts alone,
    so a merged model either keeps these bytes or has dense experts.
    """

    info = FormatInfo(name="mxfp4", quant_method="mxfp4")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []
        names = [name.removesuffix(BLOCKS) for name, info in tensors.items() if _is_packed(name, info)]
        return [_weight(name, tensors) for name in names]

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredMxfp4(weight, reader, device)


FORMAT = Mxfp4()


def _is_packed(name: str, info: TensorInfo) -> bool:
    return name.endswith(BLOCKS) and info.dtype == "U8" and len(info.shape) == 4


def _weight(name: str, tensors: Mapping[str, TensorInfo]) -> Weight:
    blocks, scales = tensors[name + BLOCKS], tensors.get(name + SCALES)
    if scales is None:
        raise CheckpointError(
            f"{blocks.name} is stored as MXFP4, but {name}{SCALES} is missing. Download the model again"
        )
    experts, rows, groups, size = blocks.shape
    if size != BYTES or scales.dtype != "U8" or scales.shape != blocks.shape[:3]:
        raise CheckpointError(
            f"{name}: blocks {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)} do not belong together: expected "
            f"[E, O, I/32, {BYTES}] and U8 [E, O, I/32]"
        )
    module, _, local = name.rpartition(".")
    parts = {local + BLOCKS: blocks, local + SCALES: scales}
    return Weight(module, local, "mxfp4", (experts, groups * 2 * BYTES, rows), parts, NoOptions())
