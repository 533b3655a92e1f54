"""Several adapters as one: their deltas are combined weight by weight in float32, and rounded once, with the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qmerge.adapters.combining.joint import (
    AdapterChange,
    AdapterUpdate,
    SeveralUpdates,
    as_one_adapter,
    changes_by_weight,
    check_shapes,
    sum_of_loras,
)
from qmerge.adapters.reading.folder import Adapter
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.combine import get_method
from qmerge.combine.base import CombineSettings
from qmerge.errors import AdapterError, RecipeError, listed
from qmerge.types import Replacement, Rows, Update


@dataclass(frozen=True)
class CombinedUpdate(SeveralUpdates):
    """base + combine(Δ₁, Δ₂, …).

    updates   of the adapters that touch the weight
    weights   of these adapters
    method    name of the method
    settings  with ``name`` and ``positions`` of this weight
    """

    updates: tuple[Update, ...]
    weights: tuple[float, ...]
    method: str
    settings: CombineSettings

    @property
    def whole(self) -> bool:
        # svd of LoRAs needs no whole deltas: it works on their small factors.
        is_rowwise = get_method(self.method).rowwise or self._truncated is not None
        return not is_rowwise or any(update.whole for update in self.updates)

    @property
    def rank(self) -> int:
        """The sum of the ranks: the most that the combined delta can have."""
        ranks = sum(update.rank for update in self.updates)
        if self.method == "svd" and self.settings.rank is not None:
            return min(ranks, self.settings.rank)
        return ranks

    def to(self, device: torch.device) -> CombinedUpdate:
        return replace(self, updates=tuple(update.to(device) for update in self.updates))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        if self._truncated is not None:
            return self._truncated.apply(base_OI, rows)
        assert not self.whole or self.shape[0] in (-1, len(rows)), "the method needs all rows at once"
        deltas = [delta_of(update, base_OI, rows) for update in self.updates]
        # Random draws depend on the position in the weight, not in the row block.
        settings = replace(self.settings, start_row=rows.start)
        return base_OI + get_method(self.method).combine(deltas, self.weights, settings)

    def row_norms(self) -> Tensor | None:
        return self._as_lora.row_norms() if self._as_lora is not None else None

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self._as_lora.directions() if self._as_lora is not None else None

    @property
    def _as_lora(self) -> LoraUpdate | None:
        """The combined delta as one pair of small factors; None where it has none."""
        return self._sum if self.method == "linear" else self._truncated

    @cached_property
    def _sum(self) -> LoraUpdate | None:
        return sum_of_loras(self.updates, self.weights)

    @cached_property
    def _truncated(self) -> LoraUpdate | None:
        """``svd`` of LoRAs, from their small factors: as its plug-in computes it from whole deltas, but in row blocks."""
        if self.method != "svd" or self._sum is None:
            return None
        u_OR, s_R, v_IR = self._sum.directions()
        A_RI = v_IR[:, : self.rank].T.contiguous()
        B_OR = u_OR[:, : self.rank] * s_R[: self.rank]
        return LoraUpdate(A_RI, B_OR, 1.0)


def delta_of(update: Update, base_OI: Tensor, rows: Rows) -> Tensor:
    """float32 [rows, I]: the change of the base by the update.

    Exact where the delta does not depend on the base; else the difference of two float32 numbers.
    """
    if update.depends_on_base:
        return update.apply(base_OI, rows) - base_OI
    return update.apply(torch.zeros_like(base_OI), rows)


def combined(adapters: Sequence[Adapter], weights: Sequence[float], method: str, settings: CombineSettings) -> Adapter:
    """One adapter whose delta of every weight is the combination of the adapters' deltas.

    A method sees the adapters that touch the weight. Where only one touches it, its delta goes through the method, too.

    Args:
        adapters: in the order of the run.
        weights: one per adapter; may be negative.
        method: name of a plug-in in ``combine/``.
        settings: without ``name``, ``start_row`` and ``positions``.

    Raises:
        AdapterError: values that were trained whole cannot be combined; shapes or options disagree.
        RecipeError: there is no such method; a weight is not a number.
    """
    # An unknown method is an error even where no weight needs it.
    get_method(method)
    if not adapters or len(adapters) != len(weights):
        raise RecipeError(f"there are {len(weights)} weights for {len(adapters)} adapters; expected one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise RecipeError(f"the adapters' weights are {', '.join(map(str, weights))}; expected numbers like 0.7")
    updates: dict[str, Update] = {}
    replaced: dict[str, Replacement] = {}
    for name, changes in changes_by_weight(adapters).items():
        updates_of_weight: list[AdapterUpdate] = []
        for position, change in changes:
            if not isinstance(change, Replacement):
                updates_of_weight.append(AdapterUpdate(position, change))
        if len(updates_of_weight) < len(changes):
            replaced[name] = _common_replacement(name, changes, adapters, weights)
            continue
        check_shapes(name, updates_of_weight, adapters)
        updates[name] = _combined_update(updates_of_weight, weights, method, replace(settings, name=name))
    return as_one_adapter(adapters, updates, replaced)


def _combined_update(
    updates: Sequence[AdapterUpdate], weights: Sequence[float], method: str, settings: CombineSettings
) -> Update:
    """One update of a weight. An update that is added alone, with weight 1, stays the same, to the bit."""
    if method == "linear" and len(updates) == 1 and weights[updates[0].position] == 1:
        return updates[0].update
    positions = tuple(position for position, _ in updates)
    members = tuple(update for _, update in updates)
    # svd without a rank keeps the largest rank of the adapters on this weight.
    rank = settings.rank or max(update.rank for update in members)
    return CombinedUpdate(
        members,
        tuple(weights[position] for position in positions),
        method,
        replace(settings, positions=positions, rank=rank),
    )


def _common_replacement(
    name: str, changes: Sequence[AdapterChange], adapters: Sequence[Adapter], weights: Sequence[float]
) -> Replacement:
    """The new values of a weight that was trained whole: they have no delta without the base, so all must be the same.

    Raises:
        AdapterError: an update besides, different values, or a weight other than 1.
    """
    folders = [str(adapters[position].folder) for position, _ in changes]
    replacements = [change for _, change in changes if isinstance(change, Replacement)]
    if len(replacements) < len(changes):
        raise AdapterError(
            f"{name} was trained whole in one adapter and changed by another ({listed(folders)}): "
            f"they cannot be combined; leave one adapter out"
        )
    first = replacements[0]
    if not all(torch.equal(first.values, other.values) for other in replacements[1:]):
        raise AdapterError(
            f"{name} was trained whole in {listed(folders)}, to different values: "
            f"they cannot be combined; leave all but one of them out"
        )
    weight = weights[changes[0].position]
    if len(changes) == 1 and weight != 1:
        raise AdapterError(
            f"{name} was trained whole in {folders[0]}, whose weight is {weight}: such values cannot be "
            f"scaled; give this adapter the weight 1"
        )
    return Replacement(first.values)
