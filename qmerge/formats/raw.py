"""Any other tensor (integers, float8, …): copied byte for byte, never merged; not a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qmerge.errors import CheckpointError
from qmerge.formats.base import NOT_QUANTIZED, Format, FormatInfo, NoOptions, Stored
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo, Weight

# Parts that only quantized weights have: left over, they mean a weight whose other parts are missing.
ORPHANS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".SCB",
    ".weight_format",
    ".qweight",
    ".qzeros",
    ".weight_scale_inv",
    ".weight_scale",
    "_proj_blocks",
    "_proj_scales",
    ".W_q",
    ".unpack_view_dtype",
    "._weight_qdata",
    "._weight_scale",
    "._weight_zero_point",
)


class Raw(Format[NoOptions]):
    """Bytes that are passed on."""

    info = FormatInfo(name="raw")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        found = []
        for name, info in tensors.items():
            if info.dtype in ("F32", "F16", "BF16") and not name.endswith(ORPHANS):
                continue
            if name.endswith(ORPHANS) or (info.dtype in ("U8", "I8") and name.endswith(".weight")):
                raise CheckpointError(
                    f"{name} ({info.dtype}) is part of a quantized weight, but the parts that tell how it is quantized "
                    f"are missing. Download the model again."
                )
            module, _, local = name.rpartition(".")
            found.append(Weight(module, local, self.name, info.shape, {local: info}, NoOptions()))
        return found

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        raise CheckpointError(
            f"{weight.name} is stored as {weight.parts[weight.local].dtype}, which qmerge copies but cannot merge into"
        )


FORMAT = Raw()
