"""From changes of modules and parameters in memory, as an adapter names them, to changes of weights on disk.

transformers stacks experts, joins and splits weights as it loads them. Where it does, a delta is cut or put together as the
weights are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from qmerge.adapters.base import Changes, add_change
from qmerge.adapters.updates.experts import StackUpdate
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.checkpoint.blocks import DiskBlock
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError
from qmerge.types import Change, Replacement, Update, as_matrix

DiskShapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Name of a weight on disk → its shape."""

OUT_OF_ATTENTION = ".base_layer.out_proj.weight"
"""How peft names the second weight of an nn.MultiheadAttention."""

LorasByMatrix: TypeAlias = dict[int | None, list[LoraUpdate]]
"""Index of a matrix in a stack (None: the weight is one matrix) → the LoRAs that are added to it."""


def placed_on_disk(changes: Changes, names: Names) -> Changes:
    """The same changes by the names of weights on disk. A change of a weight that is not on disk keeps its name.

    Raises:
        AdapterError: a weight is changed twice, or in a way that is possible only for the weight as it is in memory.
        CheckpointError: transformers makes a parameter in a way that cannot be followed.
    """
    placed: Changes = {}
    # Parts of one weight on disk may be several weights in memory: their LoRAs are collected, then added up.
    loras: dict[str, LorasByMatrix] = {}
    lora_tensors: dict[str, list[str]] = {}
    for adapter_name, (adapter_change, tensors) in changes.items():
        name, change = _in_attention(adapter_name, adapter_change, names)
        blocks = _blocks_of(name, change, names)
        if not blocks:
            add_change(placed, name, _fitted(change, names.disk.get(name)), tensors)
        elif _is_one_whole_weight(blocks, names.disk):
            weight = blocks[0].weight
            add_change(placed, weight, _as_on_disk(change, names.disk[weight]), tensors)
        elif isinstance(change, Replacement):
            for block in blocks:
                add_change(placed, block.weight, _values_of_block(change, block, names.disk), tensors)
        else:
            for block in blocks:
                loras_by_matrix = loras.setdefault(block.weight, {})
                _add_loras(loras_by_matrix, name, change, block=block, disk_shape=names.disk[block.weight])
                lora_tensors.setdefault(block.weight, []).extend(tensors)
    for weight, loras_by_matrix in loras.items():
        update = _sum_of_loras(loras_by_matrix, names.disk[weight])
        add_change(placed, weight, update, list(dict.fromkeys(lora_tensors[weight])))
    return placed


def _in_attention(name: str, change: Change, names: Names) -> tuple[str, Change]:
    """A change of an nn.MultiheadAttention, with the name of the parameter that it belongs to; any other as it is.

    peft wraps the module as a whole: its own LoRA is that of ``in_proj_weight``, the one inside that of ``out_proj.weight``,
    which every forward pass adds twice (peft 0.21, tuners/lora/layer.py, MultiheadAttention.merge: to the weight, and by the
    layer's own merge).
    """
    module = name.removesuffix(".weight")
    if name not in names.disk and f"{module}.in_proj_weight" in names.disk:
        return f"{module}.in_proj_weight", change
    attention = name.removesuffix(OUT_OF_ATTENTION)
    if attention != name and f"{attention}.in_proj_weight" in names.disk and isinstance(change, LoraUpdate):
        return f"{attention}.out_proj.weight", replace(change, scale=2 * change.scale)
    return name, change


def _blocks_of(name: str, change: Change, names: Names) -> tuple[DiskBlock, ...] | None:
    """Where the weight is on disk; None where it is there under its own name, or not at all."""
    # Under the same name, a stack may be arranged in another way on disk: it is always looked up.
    if name in names.disk and not isinstance(change, StackUpdate):
        return None
    return names.blocks_of(name)


def _is_one_whole_weight(blocks: tuple[DiskBlock, ...], disk: DiskShapes) -> bool:
    return len(blocks) == 1 and blocks[0].covers(disk[blocks[0].weight]) and not blocks[0].transposed


def _as_on_disk(change: Change, disk_shape: tuple[int, ...]) -> Change:
    """The change of a whole weight. A stack of one is that matrix, where the weight on disk is a matrix."""
    if isinstance(change, StackUpdate) and len(disk_shape) == 2:
        return change.experts[0]
    return _fitted(change, disk_shape)


def _fitted(change: Change, disk_shape: tuple[int, ...] | None) -> Change:
    if isinstance(change, Replacement) or disk_shape is None:
        return change
    return change.fitted(as_matrix(disk_shape))


# --- LoRA ------------------------------------------------------------------------------------------------------------


def _add_loras(
    loras: LorasByMatrix, name: str, update: Update, *, block: DiskBlock, disk_shape: tuple[int, ...]
) -> None:
    """Add a block's share of an update to the LoRAs of its weight on disk."""
    for number, lora in _loras_of_block(name, update, block).items():
        A_RI, B_OR = block.factors(lora.A_RI, lora.B_OR, disk_shape)
        matrix = None
        if len(disk_shape) == 3:
            matrix = block.disk_region[0].start
            if number is not None and block.expert is None:  # the block is several matrices of a stack
                matrix += number - block.region[0].start
        loras.setdefault(matrix, []).append(LoraUpdate(A_RI.contiguous(), B_OR.contiguous(), lora.scale))


def _loras_of_block(name: str, update: Update, block: DiskBlock) -> dict[int | None, LoraUpdate]:
    """Index of a matrix in memory (None: it is one matrix) → its LoRA, for the matrices that the block is a part of.

    Raises:
        AdapterError: the update is not LoRA, or has another shape.
    """
    if isinstance(update, StackUpdate):
        numbers: Iterable[int] = [block.expert] if block.expert is not None else block.region[0]
        return {number: update.experts[number] for number in numbers}
    if not isinstance(update, LoraUpdate):
        raise AdapterError(
            f"{name} is only a part of {block.weight} on disk, or transposed in it, where only plain LoRA can be merged; merge "
            f"the adapter with peft into the 16-bit base, then quantize"
        )
    if update.shape != block.shape[-2:]:
        raise AdapterError(
            f"{name} has shape {list(block.shape)}, but the adapter's delta has shape {list(update.shape)}. "
            f"Is this the base that the adapter was trained on?"
        )
    return {None: update}


def _sum_of_loras(loras: LorasByMatrix, disk_shape: tuple[int, ...]) -> Update:
    """The update of a weight on disk, from the LoRAs of its parts."""
    if len(disk_shape) != 3:
        return _summed(loras[None])
    experts: dict[int, LoraUpdate] = {}
    for matrix, parts in loras.items():
        if matrix is not None:
            experts[matrix] = _summed(parts)
    return StackUpdate(disk_shape[0], (disk_shape[1], disk_shape[2]), experts)


def _summed(loras: list[LoraUpdate]) -> LoraUpdate:
    """s₁B₁A₁ + s₂B₂A₂ + … as one pair of factors."""
    if len(loras) == 1:
        return loras[0]
    scales = {lora.scale for lora in loras}
    A_RI = torch.cat([lora.A_RI for lora in loras])
    if len(scales) == 1:
        return LoraUpdate(A_RI, torch.cat([lora.B_OR for lora in loras], dim=1), loras[0].scale)
    return LoraUpdate(A_RI, torch.cat([lora.B_OR * lora.scale for lora in loras], dim=1), 1.0)


# --- values ----------------------------------------------------------------------------------------------------------


def _values_of_block(change: Replacement, block: DiskBlock, disk: DiskShapes) -> Replacement:
    """The new values of a weight on disk that is a block of a parameter in memory.

    Raises:
        AdapterError: the weight on disk has more values than the block.
    """
    disk_shape = disk[block.weight]
    if not block.covers(disk_shape) or tuple(change.values.shape) != block.shape:
        raise AdapterError(
            f"{block.parameter} {list(block.shape)} was trained whole, as {list(change.values.shape)}, which does not make up "
            f"{block.weight} {list(disk_shape)} on disk"
        )
    values: Tensor = change.values[tuple(slice(part.start, part.stop) for part in block.region)]
    # Axes of length 1 are on no axis of the disk; the others are reordered as they are there.
    axes = [axis for axis in block.axes if axis is not None]
    sizes = [size for size, axis in zip(values.shape, block.axes, strict=True) if axis is not None]
    order = [axes.index(axis) for axis in sorted(axes)]
    return Replacement(values.reshape(sizes).permute(order).reshape(disk_shape).contiguous())
