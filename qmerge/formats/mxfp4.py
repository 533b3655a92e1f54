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

# Bytes of a block: two codes in each, the first in the low bits.
BYTES = 16

# Added to the exponent of a block before it is stored.
BIAS = 127

# Ends of the tensors' names.
BLOCKS, SCALES = "_blocks", "_scales"


class StoredMxfp4(StoredValues):
    """Rows are experts. An expert's values are transposed in a dense checkpoint, so it is read as a whole."""

    def __init__(self, weight: Weight, reader: Reader, device: torch.device) -> None:
        self._blocks = weight.parts[weight.local + BLOCKS]
        self._scales = weight.parts[weight.local + SCALES]
        self._reader = reader
        self._device = device
        self._table = torch.tensor(FP4, device=device)

    def values(self, rows: Rows) -> Tensor:
        # ldexp(code, scale − 127), as in transformers (integrations/mxfp4.py): no scale is NaN, not even 255.
        packed_EOGB = self._of_experts(self._blocks, rows)
        scale_EOG = self._of_experts(self._scales, rows)
        pairs_EOGBP = torch.stack((packed_EOGB & 15, packed_EOGB >> 4), dim=-1)
        numbers_EOGN = self._table[pairs_EOGBP.int()].flatten(-2)
        values_EOI = torch.ldexp(numbers_EOGN, scale_EOG.int()[..., None] - BIAS).flatten(-2)
        return values_EOI.transpose(1, 2).reshape(len(rows), -1)

    def _of_experts(self, info: TensorInfo, rows: Rows) -> Tensor:
        """The part of a uint8 tensor that belongs to some experts."""
        per_expert = info.nbytes // info.shape[0]
        flat = self._reader.elements(info, rows.start * per_expert, rows.stop * per_expert)
        return flat.view(len(rows), *info.shape[1:]).to(self._device)


class Mxfp4(Format[NoOptions]):
    """Tensors of all experts at once: ``gate_up_proj_blocks`` uint8 [E, O, I/32, 16], ``gate_up_proj_scales`` [E, O, I/32].

    The weight is ``gate_up_proj`` [E, I, O], as in a dense checkpoint. qmerge does not write it: most adapters do not change
    experts, so a merged model either keeps these bytes or has dense experts.
    """

    info = FormatInfo(name="mxfp4", quant_method="mxfp4")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        if quantization.get("quant_method", self.info.quant_method) != self.info.quant_method:
            return []
        weights = []
        for name, info in tensors.items():
            if name.endswith(BLOCKS) and info.dtype == "U8" and len(info.shape) == 4:
                weights.append(_weight(name.removesuffix(BLOCKS), tensors))
        return weights

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        return StoredMxfp4(weight, reader, device)


FORMAT = Mxfp4()


def _weight(name: str, tensors: Mapping[str, TensorInfo]) -> Weight:
    blocks = tensors[name + BLOCKS]
    scales = tensors.get(name + SCALES)
    if scales is None:
        raise CheckpointError(
            f"{blocks.name} is stored as MXFP4, but {name}{SCALES} is missing. Download the model again"
        )
    experts, rows, groups, size = blocks.shape
    if size != BYTES or scales.dtype != "U8" or scales.shape != blocks.shape[:3]:
        raise CheckpointError(
            f"{name}: blocks {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)} do not belong together: expected "
            f"[E, O, I/32, {BYTES}] and U8 [E, O, I/32]. Download the model again"
        )
    module, _, local = name.rpartition(".")
    return Weight(
        module=module,
        local=local,
        format="mxfp4",
        shape=(experts, groups * 2 * BYTES, rows),
        parts={local + BLOCKS: blocks, local + SCALES: scales},
        options=NoOptions(),
    )
