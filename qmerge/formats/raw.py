"""Any other tensor (integers, float8, …): copied byte for byte, never merged; not a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qmerge.errors import CheckpointError
from qmerge.formats._dense import single_tensor
from qmerge.formats.base import NOT_QUANTIZED, Format, FormatInfo, NoOptions, Stored
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo, Weight

# Ends of the names of tensors that only quantized weights have. Left over, they mean that other tensors of one are missing.
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
    """Bytes that are copied. One tensor, which has the name of the weight."""

    info = FormatInfo(name="raw")

    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        weights = []
        for name, info in tensors.items():
            is_orphan = name.endswith(ORPHANS)
            if info.dtype in ("F32", "F16", "BF16") and not is_orphan:
                continue  # the dense formats find it
            is_codes = info.dtype in ("U8", "I8") and name.endswith(".weight")
            if is_orphan or is_codes:
                raise CheckpointError(
                    f"{name} ({info.dtype}) is part of a quantized weight, but the parts that tell how it is quantized are "
                    f"missing. Download the model again."
                )
            weights.append(single_tensor(info, self.name))
        return weights

    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        raise CheckpointError(
            f"{weight.name} is stored as {weight.parts[weight.local].dtype}, which qmerge copies but cannot merge into"
        )


FORMAT = Raw()
