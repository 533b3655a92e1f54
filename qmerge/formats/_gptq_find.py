"""Finds GPTQ's weights in a checkpoint, and checks that their tensors and the config agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats._affine import WHOLE_ROW, check_groups, group_count, sequential_groups
from qmerge.formats._packing import WORD, unpack_bits
from qmerge.formats._tensors import check_dtype, check_present, parts_of
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo, Weight

BITS = (2, 3, 4, 8)
REQUIRED = ("qweight", "qzeros", "scales")
TAKE_CONFIG = "Take the config.json that belongs to these files"


@dataclass(frozen=True, kw_only=True)
class GptqOptions:
    """How a weight is stored."""

    bits: int = 4

    group_size: int = 128
    """Inputs that share a scale and a zero; -1: all of them."""

    sym: bool = True
    """Whether all zeros are the middle code."""

    act_order: bool = False
    """Whether columns with similar mean squares of their inputs share a group, so that ``g_idx`` jumps."""

    static_groups: bool = False
    """With ``act_order``: groups are runs of neighbouring columns all the same."""

    checkpoint_format: str = "gptq"
    """``gptq`` (v1) stores zeros less one, ``gptq_v2`` as they are."""


def find_gptq(
    module: str, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any]
) -> Weight:
    """The weight of a module that has ``qweight``.

    Raises:
        CheckpointError: a tensor of it is missing, or tensors and config contradict each other.
    """
    parts = parts_of(module, (*REQUIRED, "g_idx"), tensors)
    check_present(module, REQUIRED, parts, "GPTQ")
    check_dtype(parts["qweight"], ("I32",))
    check_dtype(parts["qzeros"], ("I32",))
    check_dtype(parts["scales"], ("F16", "BF16", "F32"))
    if "g_idx" in parts:
        check_dtype(parts["g_idx"], ("I32", "I64"))
    bits = _bits(module, parts, quantization)
    groups, rows = parts["scales"].shape
    columns = parts["qweight"].shape[0] * WORD // bits
    _check_group_count(module, columns, groups, quantization)
    group_size = _group_size(columns, groups, quantization)
    group_I = _group_of_columns(parts, columns, groups, reader)
    options = GptqOptions(
        bits=bits,
        group_size=group_size,
        sym=bool(quantization.get("sym", True)),
        act_order=not torch.equal(group_I, sequential_groups(columns, group_size)),
        checkpoint_format=declared_checkpoint_format(quantization),
    )
    if options.sym:
        # Asymmetric zeros do not show their format, so there the label decides.
        found = _checkpoint_format_of_zeros(parts["qzeros"], rows, bits, reader)
        options = replace(options, checkpoint_format=found)
    return Weight(module=module, local="weight", format="gptq", shape=(rows, columns), parts=parts, options=options)


def declared_checkpoint_format(quantization: Mapping[str, Any]) -> str:
    """The label in the config: ``gptq`` (also without one) or ``gptq_v2``. It is often wrong, see below."""
    return str(quantization.get("checkpoint_format", quantization.get("format", "gptq")))


def _has_rules(quantization: Mapping[str, Any]) -> bool:
    """Whether the config has rules for single modules, so that its other entries do not hold for all."""
    return bool(quantization.get("dynamic"))


def _bits(module: str, parts: Mapping[str, TensorInfo], quantization: Mapping[str, Any]) -> int:
    """Bits of a code, from the shapes; the config must agree unless it has rules for single modules."""
    qweight = parts["qweight"].shape
    qzeros = parts["qzeros"].shape
    scales = parts["scales"].shape
    are_matrices = len(qweight) == len(qzeros) == len(scales) == 2
    if not are_matrices or qweight[1] != scales[1] or qzeros[0] != scales[0]:
        raise CheckpointError(
            f"{module}: qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} do not belong to one GPTQ "
            f"weight: expected [I*bits/32, O], [G, O*bits/32] and [G, O]. Download the model again"
        )
    # A row of qzeros has a field for every output, a row of scales an entry.
    bits = qzeros[1] * WORD / max(1, scales[1])
    declared = quantization.get("bits")
    contradicts = declared not in (None, bits) and not _has_rules(quantization)
    if bits not in BITS or contradicts:
        raise CheckpointError(
            f"{module}: qzeros {list(qzeros)} for {scales[1]} outputs are {bits:.3g} bits, but the config says {declared}; "
            f"GPTQ has {', '.join(map(str, BITS))}. {TAKE_CONFIG}"
        )
    return int(bits)


def _check_group_count(module: str, columns: int, groups: int, quantization: Mapping[str, Any]) -> None:
    declared = quantization.get("group_size")
    if declared is None or _has_rules(quantization):
        return
    expected = group_count(columns, declared)
    if expected != groups:
        raise CheckpointError(
            f"{module}: the config says groups of {declared}, which makes {expected} for {columns} inputs, but there are "
            f"{groups}. {TAKE_CONFIG}"
        )


def _group_size(columns: int, groups: int, quantization: Mapping[str, Any]) -> int:
    """The config's; with rules for single modules, or without a config, that of the shapes."""
    declared = quantization.get("group_size")
    if declared is not None and not _has_rules(quantization):
        return int(declared)
    return WHOLE_ROW if groups == 1 else -(-columns // groups)


def _group_of_columns(parts: Mapping[str, TensorInfo], columns: int, groups: int, reader: Reader) -> Tensor:
    """int64 [I]: the group of every column; runs of neighbouring columns without ``g_idx``."""
    info = parts.get("g_idx")
    if info is None:
        return sequential_groups(columns, -(-columns // groups))
    if info.shape != (columns,):
        raise CheckpointError(
            f"{info.name} has shape {list(info.shape)}, expected [{columns}], one for every input. Download the model again"
        )
    group_I = reader.tensor(info).long()
    check_groups(group_I, groups, info.name)
    return group_I


def _checkpoint_format_of_zeros(qzeros: TensorInfo, rows: int, bits: int, reader: Reader) -> str:
    """``gptq`` or ``gptq_v2``, from symmetric zeros: they are all the middle code, or all one less.

    The label in the config is often wrong: transformers' save_pretrained turns v1 zeros into v2 zeros and keeps the label.
    """
    # The first group of all outputs is enough.
    first_words = reader.elements(qzeros, 0, qzeros.shape[1])
    first_O = unpack_bits(first_words[None], bits)[0, :rows]
    low, high = int(first_O.min()), int(first_O.max())
    middle = 2 ** (bits - 1)
    if low == high == middle - 1:
        return "gptq"
    if low == high == middle:
        return "gptq_v2"
    raise CheckpointError(
        f"{qzeros.name}: the config says sym, but its zeros are stored as {low} to {high}; symmetric ones are all {middle - 1} "
        f'(gptq) or all {middle} (gptq_v2). If it is asymmetric, set "sym": false in quantization_config'
    )
