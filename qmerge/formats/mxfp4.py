"""MXFP4 as gpt-oss has it, for its experts: FP4 numbers in blocks of 32 that share a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._dense import StoredValues
from qmerge.formats._fp4 import (
    MXFP4_BIAS,
    StoredFp4,
    exponents_of,
    least_error_scales,
    pack_fp4,
    power_candidates,
    powers_of_two,
)
from qmerge.formats._levels import FP4, FP4_LEVELS, LevelsGrid
from qmerge.formats.base import NOT_QUANTIZED, FormatInfo, ModuleLayout, NoOptions, Stored, TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

# Bytes of a block: two codes in each, the first in the low bits.
BYTES = 16

# Inputs that share a scale.
GROUP_SIZE = 2 * BYTES

# Ends of the tensors' names.
BLOCKS, SCALES = "_blocks", "_scales"

# ``modules_to_not_convert`` of gpt-oss.
DENSE_MODULES = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")

# A scale of which most codes are infinite in float32.
TOO_LARGE = 255


class StoredMxfp4(StoredValues):
    """Rows are experts, for dense targets. An expert is transposed in a dense checkpoint, so it is read as a whole."""

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
        values_EOI = torch.ldexp(numbers_EOGN, scale_EOG.int()[..., None] - MXFP4_BIAS).flatten(-2)
        return values_EOI.transpose(1, 2).reshape(len(rows), -1)

    def _of_experts(self, info: TensorInfo, rows: Rows) -> Tensor:
        """The part of a uint8 tensor that belongs to some experts."""
        per_expert = info.nbytes // info.shape[0]
        flat = self._reader.elements(info, rows.start * per_expert, rows.stop * per_expert)
        return flat.view(len(rows), *info.shape[1:]).to(self._device)


class Mxfp4(TargetFormat[NoOptions]):
    """Tensors of all experts at once: ``gate_up_proj_blocks`` uint8 [E, O, I/32, 16], ``gate_up_proj_scales`` [E, O, I/32].

    The weight is ``gate_up_proj`` [E, I, O], as in a dense checkpoint. It is merged and rounded as a matrix [E·O, I].
    """

    info = FormatInfo(
        name="mxfp4",
        quant_method="mxfp4",
        loaders="vLLM, SGLang, transformers (on a CPU it dequantizes)",
        takes_stacks=True,
    )

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

    def open_matrices(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        experts, columns, rows = weight.shape
        blocks, scales = weight.parts[weight.local + BLOCKS], weight.parts[weight.local + SCALES]
        exponents_OG = reader.tensor(scales).view(experts * rows, columns // GROUP_SIZE)
        if bool((exponents_OG == TOO_LARGE).any()):
            raise CheckpointError(
                f"{scales.name} holds {TOO_LARGE}: numbers that large are read, but nothing is merged into them. Download the "
                f"model again, or use --target bf16"
            )
        packed = replace(blocks, shape=(experts * rows, columns // 2))
        return StoredFp4(packed, powers_of_two(exponents_OG.int()), reader, device, group_size=GROUP_SIZE)

    # --- write ---

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> NoOptions:
        return NoOptions()

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 3

    def check(self, name: str, shape: tuple[int, int], options: NoOptions) -> None:
        if shape[1] % GROUP_SIZE:
            raise RecipeError(
                f"{name} has {shape[1]} inputs, which is not a multiple of {GROUP_SIZE}, the size of MXFP4's blocks: use --target "
                f"bf16"
            )

    def outputs(self, local: str, shape: tuple[int, ...], options: NoOptions) -> dict[str, TensorSpec]:
        experts, columns, rows = shape
        groups = columns // GROUP_SIZE
        return {
            local + BLOCKS: TensorSpec("U8", (experts, rows, groups, BYTES)),
            local + SCALES: TensorSpec("U8", (experts, rows, groups)),
        }

    def codes_part(self, local: str) -> str:
        return local + BLOCKS

    def scales(self, values_OI: Tensor, options: NoOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G]: of the powers of two, those with the least squared error."""
        return least_error_scales(values_OI, GROUP_SIZE, power_candidates, inputs_I)

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: NoOptions, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        return LevelsGrid(FP4_LEVELS, scales, GROUP_SIZE)

    def pack(self, codes_OI: Tensor, grid: Grid, options: NoOptions) -> Tensor:
        return pack_fp4(codes_OI)

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: NoOptions) -> Parts:
        assert isinstance(grid, LevelsGrid)
        return {local + SCALES: exponents_of(grid.scale_OG).cpu()}

    def quantization_config(
        self, options: NoOptions, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        config = dict(base) or {"quant_method": self.info.quant_method, "modules_to_not_convert": list(DENSE_MODULES)}
        if layout.experts:
            listed = config.get("modules_to_not_convert") or []
            config["modules_to_not_convert"] = list(dict.fromkeys([*listed, *layout.experts]))
        return config


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
