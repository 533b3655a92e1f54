"""What an adapter does to modules and parameters in memory → what it does to weights on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from qmerge.adapters.base import Changes
from qmerge.adapters.updates.experts import StackUpdate
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.checkpoint.blocks import DiskBlock
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.types import Replacement, Update, as_matrix

Shares: TypeAlias = dict[str, dict[int | None, list[LoraUpdate]]]
"""Weight on disk → matrix of a stack (None: it is one matrix) → the LoRAs that are added to it."""


def placed(found: Changes, names: Names) -> Changes:
    """By names on disk. transformers stacks experts, joins and splits weights as it loads them: there, the delta is cut or
    put together as the weights are. What is not on disk keeps its name.

    Raises:
        AdapterError: two changes of one weight; a kind of change that can only be made to a weight as it is in memory.
    """
    result: Changes = {}
    shares: Shares = {}
    made_of: dict[str, list[str]] = {}
    for name, (change, tensors) in found.items():
        places = None if name in names.disk and not isinstance(change, StackUpdate) else names.blocks_of(name)
        if not places or _is_whole(places, names.disk):
            place_name = places[0].weight if places else name
            _put(result, place_name, _on_disk(change, places, names.disk.get(place_name)), tensors)
        elif isinstance(change, Replacement):
            for place in places:
                _put(result, place.weight, _cut_out(change, place, names.disk), tensors)
        else:
            for place in places:
                _share(shares, place, _loras(name, change, place), names.disk)
                made_of.setdefault(place.weight, []).extend(tensors)
    for name, parts in shares.items():
        _put(result, name, _together(parts, names.disk[name]), list(dict.fromkeys(made_of[name])))
    return result


def _is_whole(places: tuple[DiskBlock, ...], disk: Mapping[str, tuple[int, ...]]) -> bool:
    return len(places) == 1 and places[0].covers(disk[places[0].weight]) and not places[0].transposed


def _put(result: Changes, name: str, change: Update | Replacement, tensors: list[str]) -> None:
    if name in result:
        raise AdapterError(f"{name} is changed twice, under two names: {listed([*result[name][1], *tensors])}")
    result[name] = (change, tensors)


def _on_disk(
    change: Update | Replacement, places: tuple[DiskBlock, ...] | None, shape: tuple[int, ...] | None
) -> Update | Replacement:  # fmt: skip
    """A stack of one matrix is that matrix, where it is no stack on disk; what depends on the width of the weight is settled."""
    if isinstance(change, StackUpdate) and places and len(places[0].disk_region) == 2:
        return change.experts[0]
    return change if isinstance(change, Replacement) or shape is None else change.fitted(as_matrix(shape))


def _loras(name: str, change: Update | Replacement, place: DiskBlock) -> dict[int | None, LoraUpdate]:
    """The LoRA of every matrix that the place holds some of, by its number in memory."""
    if isinstance(change, StackUpdate):
        numbers = [place.expert] if place.expert is not None else [*place.region[0]]
        return {number: change.experts[number] for number in numbers}
    if not isinstance(change, LoraUpdate):
        raise AdapterError(
            f"{name} is only a part of {place.weight} on disk, or lies there in another layout: only plain LoRA is merged there"
        )
    if change.shape != place.shape[-2:]:
        raise AdapterError(
            f"{name} is {list(place.shape)}, but the adapter's delta is {list(change.shape)}. "
            f"Is this the base that the adapter was trained on?"
        )
    return {None: change}


def _share(
    shares: Shares, place: DiskBlock, loras: Mapping[int | None, LoraUpdate], disk: Mapping[str, tuple[int, ...]]
) -> None:  # fmt: skip
    shape = disk[place.weight]
    for number, lora in loras.items():
        A_RI, B_OR = place.factors(lora.A_RI, lora.B_OR, shape)
        beside = 0 if number is None or place.expert is not None else number - place.region[0].start
        matrix = place.disk_region[0].start + beside if len(shape) == 3 else None
        here = shares.setdefault(place.weight, {}).setdefault(matrix, [])
        here.append(LoraUpdate(A_RI.contiguous(), B_OR.contiguous(), lora.scale))


def _together(parts: Mapping[int | None, list[LoraUpdate]], shape: tuple[int, ...]) -> Update:
    summed = {matrix: _summed(loras) for matrix, loras in parts.items()}
    if len(shape) == 3:
        experts = {number: lora for number, lora in summed.items() if number is not None}
        return StackUpdate(shape[0], (shape[1], shape[2]), experts)
    return summed[None]


def _summed(loras: list[LoraUpdate]) -> LoraUpdate:
    """s₁B₁A₁ + s₂B₂A₂ + … as one pair of factors."""
    if len(loras) == 1:
        return loras[0]
    same = len({lora.scale for lora in loras}) == 1
    B_OR = torch.cat([lora.B_OR if same else lora.B_OR * lora.scale for lora in loras], dim=1)
    return LoraUpdate(torch.cat([lora.A_RI for lora in loras]), B_OR, loras[0].scale if same else 1.0)


def _cut_out(change: Replacement, place: DiskBlock, disk: Mapping[str, tuple[int, ...]]) -> Replacement:
    """The values of a weight on disk, out of those of a parameter in memory."""
    shape = disk[place.weight]
    if not place.covers(shape) or tuple(change.values.shape) != place.shape:
        raise AdapterError(
            f"{place.parameter} {list(place.shape)} was trained whole, as {list(change.values.shape)}: it does not make up "
            f"{place.weight} {list(shape)} on disk"
        )
    block: Tensor = change.values[tuple(slice(part.start, part.stop) for part in place.region)]
    order = [axis for axis in place.axes if axis is not None]
    block = block.reshape([size for size, axis in zip(block.shape, place.axes, strict=True) if axis is not None])
    return Replacement(block.permute([order.index(axis) for axis in sorted(order)]).reshape(shape).contiguous())
