"""Several adapters as one: their deltas are combined weight by weight in float32, and rounded once, with the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.lora import is_embedding
from qmerge.adapters.reading.folder import Adapter
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.combine import get_method
from qmerge.combine.base import CombineSettings
from qmerge.errors import AdapterError, RecipeError, listed
from qmerge.types import Replacement, Rows, Update

Changes = list[tuple[int, Update | Replacement]]
"""What is done to one weight, each with the place of its adapter in the run."""


class SeveralUpdates(Update):
    """The updates of several adapters of one weight, as one update."""

    updates: tuple[Update, ...]

    @property
    def members(self) -> tuple[Update, ...]:
        return self.updates

    @property
    def shape(self) -> tuple[int, int]:
        return known_shape(self.updates)

    @property
    def needs_dense(self) -> str:
        """The first reason that one of them has."""
        return next((update.needs_dense for update in self.updates if update.needs_dense), "")


@dataclass(frozen=True)
class CombinedUpdate(SeveralUpdates):
    """base + combine(Δ₁, Δ₂, …). ``settings.name`` and ``settings.positions`` say which weight and which adapters."""

    updates: tuple[Update, ...]
    weights: tuple[float, ...]
    method: str
    settings: CombineSettings

    @property
    def whole(self) -> bool:
        rowwise = get_method(self.method).rowwise or self._truncated is not None
        return not rowwise or any(update.whole for update in self.updates)

    @property
    def rank(self) -> int:
        ranks = sum(update.rank for update in self.updates)
        return min(ranks, self.settings.rank or ranks) if self.method == "svd" else ranks

    def to(self, device: torch.device) -> CombinedUpdate:
        return replace(self, updates=tuple(update.to(device) for update in self.updates))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        if self._truncated is not None:
            return self._truncated.apply(base_OI, rows)
        assert not self.whole or self.shape[0] in (-1, len(rows)), "the method needs all rows at once"
        deltas = [delta_of(update, base_OI, rows) for update in self.updates]
        settings = replace(self.settings, start_row=rows.start)
        return base_OI + get_method(self.method).combine(deltas, self.weights, settings)

    def row_norms(self) -> Tensor | None:
        return self._small.row_norms() if self._small is not None else None

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self._small.directions() if self._small is not None else None

    @property
    def _small(self) -> LoraUpdate | None:
        """The delta as one pair of small factors, where it is one."""
        return self._stacked if self.method == "linear" else self._truncated

    @cached_property
    def _stacked(self) -> LoraUpdate | None:
        return stacked(self.updates, self.weights)

    @cached_property
    def _truncated(self) -> LoraUpdate | None:
        """``svd`` of LoRAs from their small factors: what its plug-in computes from whole deltas, and some rows at a time."""
        if self.method != "svd" or self._stacked is None:
            return None
        u_OR, s_R, v_IR = self._stacked.directions()
        rank = self.rank
        return LoraUpdate(v_IR[:, :rank].T.contiguous(), u_OR[:, :rank] * s_R[:rank], 1.0)


def stacked(updates: Sequence[Update], weights: Sequence[float]) -> LoraUpdate | None:
    """Σ wᵢ sᵢ Bᵢ Aᵢ = [w₁s₁B₁ w₂s₂B₂ …] · [A₁; A₂; …]; None unless all are LoRA."""
    loras = [update for update in updates if isinstance(update, LoraUpdate)]
    if len(loras) < len(updates):
        return None
    scaled = [lora.B_OR * (weight * lora.scale) for lora, weight in zip(loras, weights, strict=True)]
    return LoraUpdate(torch.cat([lora.A_RI for lora in loras]), torch.cat(scaled, dim=1), 1.0)


def delta_of(update: Update, base_OI: Tensor, rows: Rows) -> Tensor:
    """float32 [rows, I]: what the update adds to the base. Exact where it does not depend on the base; else the difference
    of two float32 numbers."""
    if update.depends_on_base:
        return update.apply(base_OI, rows) - base_OI
    return update.apply(torch.zeros_like(base_OI), rows)


def combined(adapters: Sequence[Adapter], weights: Sequence[float], method: str, settings: CombineSettings) -> Adapter:
    """One adapter that does to every weight what the method makes of all that several do to it. A method sees the adapters
    that touch the weight; a weight that one adapter touches goes through it all the same.

    Args:
        weights: one per adapter; may be negative.
        settings: without ``name``, ``row`` and ``positions``.

    Raises:
        AdapterError: values that were trained whole cannot be combined; shapes or options that disagree.
        RecipeError: no such method; a weight that is no number.
    """
    get_method(method)
    if not adapters or len(adapters) != len(weights):
        raise RecipeError(f"there are {len(weights)} weights for {len(adapters)} adapters; expected one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise RecipeError(f"the adapters' weights are {', '.join(map(str, weights))}; expected numbers like 0.7")
    updates: dict[str, Update] = {}
    replaced: dict[str, Replacement] = {}
    for name, changes in changes_of(adapters).items():
        if any(isinstance(change, Replacement) for _, change in changes):
            replaced[name] = the_replacement(name, changes, adapters, weights)
        else:
            updates[name] = the_update(name, changes, adapters, weights, method, settings)
    return joined(adapters, updates, replaced)


def joined(adapters: Sequence[Adapter], updates: dict[str, Update], replaced: dict[str, Replacement]) -> Adapter:
    """What several adapters do together, as one."""
    tensors = {name: [tensor for a in adapters for tensor in a.tensors.get(name, [])] for name in (*updates, *replaced)}
    kinds = " + ".join(dict.fromkeys(adapter.kind for adapter in adapters))
    return Adapter(adapters[0].folder, kinds, the_config(adapters), updates, replaced, tensors)


def changes_of(adapters: Sequence[Adapter]) -> dict[str, Changes]:
    """By name of the weight, in the order in which the adapters name them."""
    found: dict[str, Changes] = {}
    for place, adapter in enumerate(adapters):
        of_this: dict[str, Update | Replacement] = {**adapter.updates, **adapter.replaced}
        for name, change in of_this.items():
            found.setdefault(name, []).append((place, change))
    return found


def the_update(
    name: str, changes: Changes, adapters: Sequence[Adapter], weights: Sequence[float], method: str, settings: CombineSettings
) -> Update:  # fmt: skip
    """What a single adapter does with weight 1 to a sum stays what it is, to the bit."""
    places = tuple(place for place, _ in changes)
    updates = tuple(change for _, change in changes if not isinstance(change, Replacement))
    check_shapes(name, updates, [adapters[place] for place in places])
    if method == "linear" and len(updates) == 1 and weights[places[0]] == 1:
        return updates[0]
    rank = settings.rank or max(update.rank for update in updates)
    here = replace(settings, name=name, positions=places, rank=rank)
    return CombinedUpdate(updates, tuple(weights[place] for place in places), method, here)


def known_shape(updates: Sequence[Update]) -> tuple[int, int]:
    """What one of them knows: trained token rows do not know how many rows there are (−1), IA³ not how many columns."""
    return max(update.shape[0] for update in updates), max(update.shape[1] for update in updates)


def check_shapes(name: str, updates: Sequence[Update], adapters: Sequence[Adapter]) -> None:
    first = updates[0].shape
    for update, adapter in zip(updates, adapters, strict=True):
        if any(a != b and min(a, b) >= 0 for a, b in zip(first, update.shape, strict=True)):
            raise AdapterError(
                f"{name} is {list(first)} for {adapters[0].folder} and {list(update.shape)} for {adapter.folder}: "
                f"were both trained on this base?"
            )


def the_replacement(name: str, changes: Changes, adapters: Sequence[Adapter], weights: Sequence[float]) -> Replacement:
    """Values that were trained whole have no delta without the base: one is kept as it is, or all are the same."""
    folders = [str(adapters[place].folder) for place, _ in changes]
    values = [change.values for _, change in changes if isinstance(change, Replacement)]
    if len(values) < len(changes):
        raise AdapterError(f"{name} was trained whole in one adapter and changed by another ({listed(folders)}): "
                           f"they cannot be combined; leave one adapter out")  # fmt: skip
    if not all(torch.equal(values[0], other) for other in values[1:]):
        raise AdapterError(f"{name} was trained whole in {listed(folders)}, to different values: "
                           f"they cannot be combined; leave all but one of them out")  # fmt: skip
    weight = weights[changes[0][0]]
    if len(changes) == 1 and weight != 1:
        raise AdapterError(f"{name} was trained whole in {folders[0]}, whose weight is {weight}: such values cannot be "
                           f"scaled; give this adapter the weight 1")  # fmt: skip
    return Replacement(values[0])


def the_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The first one's, with what the others add to how the tensors are to be understood.

    Raises:
        AdapterError: ``fan_in_fan_out`` or ``ensure_weight_tying`` disagree.
    """
    configs = [adapter.config for adapter in adapters]
    agreed(adapters, "fan_in_fan_out")
    embedding = [a for a in adapters if any(is_embedding(name) for name in (*a.updates, *a.replaced))]
    saved = dict.fromkeys(name for config in configs for name in config.get("modules_to_save") or [])
    return {
        **configs[0],
        "bias": next((b for b in ("all", "lora_only") if any(config.get("bias") == b for config in configs)), "none"),
        "ensure_weight_tying": agreed(embedding, "ensure_weight_tying"),
        "modules_to_save": list(saved) or None,
    }


def agreed(adapters: Sequence[Adapter], option: str) -> bool:
    values = [bool(adapter.config.get(option)) for adapter in adapters]
    if len(set(values)) > 1:
        said = [f"{value} in {adapter.folder}" for value, adapter in zip(values, adapters, strict=True)]
        raise AdapterError(f"adapter_config.json's {option} is {listed(said)}: these adapters cannot be combined")
    return any(values)
