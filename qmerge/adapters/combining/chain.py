"""Adapters one after the other: each was trained on the model that those before it make, and is applied to that.

One update per weight, so that what comes out is rounded once; in between everything stays float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.combining.combined import SeveralUpdates, changes_of, check_shapes, joined, stacked
from qmerge.adapters.lora import is_embedding
from qmerge.adapters.reading.folder import CONFIG, TENSORS, Adapter
from qmerge.adapters.updates.lora import LoraUpdate, TokenRowsUpdate
from qmerge.checkpoint.scan import read_json
from qmerge.errors import AdapterError
from qmerge.safetensors_io.writer import hash_file
from qmerge.types import Replacement, Rows, Update


@dataclass(frozen=True)
class ChainedUpdate(SeveralUpdates):
    """…second(first(base)): an update that depends on its base (DoRA) sees what those before it made of it."""

    updates: tuple[Update, ...]

    @property
    def whole(self) -> bool:
        return any(update.whole for update in self.updates)

    @property
    def rank(self) -> int:
        return sum(update.rank for update in self.updates)

    def to(self, device: torch.device) -> ChainedUpdate:
        return replace(self, updates=tuple(update.to(device) for update in self.updates))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        return reduce(lambda values_OI, update: update.apply(values_OI, rows), self.updates, base_OI)

    def row_norms(self) -> Tensor | None:
        return self._sum.row_norms() if self._sum else None

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self._sum.directions() if self._sum else None

    @property
    def _sum(self) -> LoraUpdate | None:
        """LoRAs do not depend on the base: one after the other, they are their sum."""
        return stacked(self.updates, [1.0] * len(self.updates))


def chained(adapters: Sequence[Adapter], held: Collection[str] = ()) -> Adapter:
    """One adapter that does to every weight what all of them do, in order.

    Args:
        held: SHA-256 of the files of adapters that the base holds already.

    Raises:
        AdapterError: shapes or options that disagree, or an order that is not the one they were trained in.
    """
    check_order(adapters, held)
    updates: dict[str, Update] = {}
    replaced: dict[str, Replacement] = {}
    for name, changes in changes_of(adapters).items():
        steps = [(change, adapters[place]) for place, change in changes]
        starts = [place for place, (change, _) in enumerate(steps) if isinstance(change, Replacement)]
        steps = steps[starts[-1] :] if starts else steps  # what was done to values that were replaced later is gone
        first, parts = steps[0][0], [(u, adapter) for u, adapter in steps if not isinstance(u, Replacement)]
        if isinstance(first, Replacement):
            replaced[name] = reduce(lambda values, part: moved(name, values, *part), parts, first)
        else:
            check_shapes(name, [update for update, _ in parts], [adapter for _, adapter in parts])
            updates[name] = in_order([update for update, _ in parts])
    return joined(adapters, updates, replaced)


def in_order(updates: Sequence[Update]) -> Update:
    """One update stays what it is; so do trained token rows, of which the later ones win."""
    tokens = [update for update in updates if isinstance(update, TokenRowsUpdate)]
    if len(updates) == 1:
        return updates[0]
    if len(tokens) < len(updates):
        return ChainedUpdate(tuple(updates))
    rows = {index: values_I for t in tokens for index, values_I in zip(t.indices, t.values_TI, strict=True)}
    return TokenRowsUpdate(list(rows), torch.stack(list(rows.values())))


def moved(name: str, values: Replacement, update: Update, adapter: Adapter) -> Replacement:
    """Values that an earlier adapter brought, with a later one's update. A Conv1D's lie as [in, out], what LoRA does to
    them as [out, in]."""
    lying = values.values
    rows_OI = lying if lying.dim() > 1 else lying[None]
    shape, reverse = tuple(rows_OI.shape), tuple(rows_OI.shape[::-1])
    conv1d = bool(adapter.config.get("fan_in_fan_out")) and not is_embedding(name)
    turned = lying.dim() == 2 and update.shape == reverse and (shape != reverse or conv1d)
    if not turned and any(known not in (there, -1) for known, there in zip(update.shape, shape, strict=True)):
        raise AdapterError(
            f"{name} was trained whole by an adapter before {adapter.folder}, to {list(lying.shape)}, but this one's delta is "
            f"{list(update.shape)}: was it trained on the model that those before it make?"
        )
    rows_OI = rows_OI.T.contiguous() if turned else rows_OI
    made_OI = update.apply(rows_OI, Rows(0, len(rows_OI)))
    return Replacement((made_OI.T.contiguous() if turned else made_OI).view(lying.shape))


# --- which came before? ----------------------------------------------------------------------------------------------


def check_order(adapters: Sequence[Adapter], held: Collection[str] = ()) -> None:
    """An adapter that says of itself that it was trained on another one stands behind that one.

    Raises:
        AdapterError: it does not, or the other one is not given; the message has the command that applies all in order.
    """
    folders = [adapter.folder.resolve() for adapter in adapters]
    for place, adapter in enumerate(adapters):
        before = trained_on(adapter.folder)
        if (
            before is not None
            and not is_held(before, held)
            and before not in folders[:place]
            and (place == 0 or before in folders[place:])
        ):
            order = " ".join(f"--adapter {folder}" for folder in [*lineage(before), adapter.folder])
            raise AdapterError(
                f"{adapter.folder} was trained on the model that the adapter {before} makes (base_model_name_or_path in "
                f"{CONFIG}), which does not stand before it: {order} --combine chain. If --base holds it already, say so "
                f"there: base_model_name_or_path is then that base"
            )


def check_new(adapters: Sequence[Adapter], held: Collection[str]) -> None:
    """Raise AdapterError for an adapter that the base holds already."""
    for adapter in adapters:
        if is_held(adapter.folder, held):
            raise AdapterError(
                f"{adapter.folder} is merged into this base already, says its qmerge.json: give the base without it (to have it "
                f"twice, there: --adapter {adapter.folder}=2)"
            )


def is_held(folder: Path, held: Collection[str]) -> bool:
    return bool(held) and (folder / TENSORS).is_file() and hash_file(folder / TENSORS) in held


def trained_on(folder: Path) -> Path | None:
    """The adapter's folder that an adapter names as its base; None where its base is no such folder."""
    return adapter_at(read_json(folder / CONFIG, AdapterError).get("base_model_name_or_path"))


def adapter_at(declared: Any) -> Path | None:
    """The folder of this name, where there is one and an adapter is in it."""
    place = Path(declared).expanduser() if isinstance(declared, str) and declared.strip() else None
    return place.resolve() if place is not None and (place / CONFIG).is_file() else None


def lineage(folder: Path) -> list[Path]:
    """The adapter and all before it, the first one first."""
    found = [folder]
    while (before := trained_on(found[0])) is not None and before not in found:
        found.insert(0, before)
    return found
