"""Adapters one after the other: each was trained on the model that those before it make, and is applied to that.

One update per weight, so that the result is rounded once; in between everything stays float32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge import hub
from qmerge.adapters.combining.joint import (
    AdapterChange,
    AdapterUpdate,
    SeveralUpdates,
    as_one_adapter,
    changes_by_weight,
    check_shapes,
    sum_of_loras,
)
from qmerge.adapters.reading.folder import CONFIG, Adapter, read_config, tensors_file
from qmerge.adapters.reading.saved_weights import is_embedding
from qmerge.adapters.updates.lora import LoraUpdate, TokenRowsUpdate
from qmerge.errors import AdapterError
from qmerge.safetensors_io.disk import hash_file
from qmerge.types import Replacement, Rows, Update


@dataclass(frozen=True)
class ChainedUpdate(SeveralUpdates):
    """…second(first(base)): an update that depends on its base (DoRA) gets the values that those before it made."""

    updates: tuple[Update, ...]

    @property
    def whole(self) -> bool:
        return any(update.whole for update in self.updates)

    @property
    def rank(self) -> int:
        """The sum of the ranks."""
        return sum(update.rank for update in self.updates)

    def to(self, device: torch.device) -> ChainedUpdate:
        return replace(self, updates=tuple(update.to(device) for update in self.updates))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        values_OI = base_OI
        for update in self.updates:
            values_OI = update.apply(values_OI, rows)
        return values_OI

    def row_norms(self) -> Tensor | None:
        return self._sum.row_norms() if self._sum else None

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self._sum.directions() if self._sum else None

    @property
    def _sum(self) -> LoraUpdate | None:
        """LoRAs do not depend on the base: one after the other, they are their sum."""
        return sum_of_loras(self.updates, [1.0] * len(self.updates))


def chained(adapters: Sequence[Adapter], merged_files: Collection[str] = ()) -> Adapter:
    """One adapter that changes every weight as all of them do, in order.

    Args:
        adapters: in the order in which they are applied.
        merged_files: SHA-256 of the files of adapters that are merged into the base already.

    Raises:
        AdapterError: shapes or options disagree, or the order is not the one in which they were trained.
    """
    check_order(adapters, merged_files)
    updates: dict[str, Update] = {}
    replaced: dict[str, Replacement] = {}
    for name, changes in changes_by_weight(adapters).items():
        values, later_updates = _since_replacement(changes)
        if values is None:
            check_shapes(name, later_updates, adapters)
            updates[name] = in_order([update for _, update in later_updates])
        else:
            for position, update in later_updates:
                values = updated_values(name, values, update, adapters[position])
            replaced[name] = values
    return as_one_adapter(adapters, updates, replaced)


def _since_replacement(changes: Sequence[AdapterChange]) -> tuple[Replacement | None, list[AdapterUpdate]]:
    """(the last new values of the weight, if any; the updates after them). Changes of values that were replaced later have no
    effect."""
    values: Replacement | None = None
    later_updates: list[AdapterUpdate] = []
    for position, change in changes:
        if isinstance(change, Replacement):
            values = change
            later_updates = []
        else:
            later_updates.append(AdapterUpdate(position, change))
    return values, later_updates


def in_order(updates: Sequence[Update]) -> Update:
    """The updates of a weight as one. A single one stays as it is; of token rows that were trained twice, the later win."""
    if len(updates) == 1:
        return updates[0]
    token_rows = [update for update in updates if isinstance(update, TokenRowsUpdate)]
    if len(token_rows) < len(updates):
        return ChainedUpdate(tuple(updates))
    rows: dict[int, Tensor] = {}
    for update in token_rows:
        # A row that was trained twice keeps its place and gets the later values.
        rows.update(zip(update.indices, update.values_TI, strict=True))
    return TokenRowsUpdate(list(rows), torch.stack(list(rows.values())))


def updated_values(name: str, values: Replacement, update: Update, adapter: Adapter) -> Replacement:
    """Values that an earlier adapter brought, updated by a later one.

    Args:
        name: of the weight.
        values: a vector, or a matrix: [O, I], or [I, O] for a Conv1D.
        update: of the later adapter, whose LoRA of a Conv1D is [O, I].
        adapter: the later adapter.

    Raises:
        AdapterError: the update is for another shape.
    """
    stored = values.values
    rows_OI = stored if stored.dim() > 1 else stored[None]
    shape = tuple(rows_OI.shape)
    is_conv1d = bool(adapter.config.get("fan_in_fan_out")) and not is_embedding(name)
    fits_transposed = stored.dim() == 2 and update.shape == shape[::-1]
    # Of a square matrix, only the config says which way round it is.
    is_transposed = fits_transposed and (is_conv1d or shape != shape[::-1])
    fits = all(known in (size, -1) for known, size in zip(update.shape, shape, strict=True))
    if not is_transposed and not fits:
        raise AdapterError(
            f"{name} was trained whole by an adapter before {adapter.folder}, to {list(stored.shape)}, but this one's delta is "
            f"{list(update.shape)}: was it trained on the model that those before it make?"
        )
    if is_transposed:
        rows_OI = rows_OI.T.contiguous()
    updated_OI = update.apply(rows_OI, Rows(0, len(rows_OI)))
    if is_transposed:
        updated_OI = updated_OI.T.contiguous()
    return Replacement(updated_OI.view(stored.shape))


# --- the order -------------------------------------------------------------------------------------------------------


def check_order(adapters: Sequence[Adapter], merged_files: Collection[str] = ()) -> None:
    """Check that an adapter that was trained on another one, by its own config, comes after that one.

    Args:
        adapters: in the order in which they are applied.
        merged_files: SHA-256 of the files of adapters that are merged into the base already.

    Raises:
        AdapterError: it does not, or the other one is not given; the message has the command that applies all in order.
    """
    folders = [adapter.folder.resolve() for adapter in adapters]
    for position, adapter in enumerate(adapters):
        parent = parent_adapter(adapter.folder)
        if parent is None or is_merged(parent, merged_files) or parent in folders[:position]:
            continue
        # Behind other adapters, a parent that is not given at all may be one of them in another folder.
        if position > 0 and parent not in folders:
            continue
        order = " ".join(f"--adapter {folder}" for folder in [*lineage(parent), adapter.folder])
        raise AdapterError(
            f"{adapter.folder} was trained on the model that the adapter {parent} makes (base_model_name_or_path in "
            f"{CONFIG}), which does not come before it: {order} --combine chain. If {parent.name} is merged into --base already, "
            f"write that base into {CONFIG} as base_model_name_or_path"
        )


def check_new(adapters: Sequence[Adapter], merged_files: Collection[str]) -> None:
    """Raise AdapterError for an adapter that is merged into the base already."""
    for adapter in adapters:
        if is_merged(adapter.folder, merged_files):
            raise AdapterError(
                f"{adapter.folder} is merged into this base already, according to its qmerge.json: give the base without it (for "
                f"twice its effect, with --adapter {adapter.folder}=2)"
            )


def is_merged(folder: Path, merged_files: Collection[str]) -> bool:
    """Whether the adapter in this folder is among the adapters with these SHA-256."""
    # Files are hashed only where there is something to compare with.
    file = tensors_file(folder)
    return bool(merged_files) and file.is_file() and hash_file(file) in merged_files


def parent_adapter(folder: Path) -> Path | None:
    """The folder of the adapter that an adapter's config names as its base; None where its base is a model."""
    return adapter_folder(read_config(folder).get("base_model_name_or_path"))


def adapter_folder(base_name: Any) -> Path | None:
    """The folder that ``base_model_name_or_path`` names, if it is one and contains an adapter."""
    if not isinstance(base_name, str) or not base_name.strip():
        return None
    folder = hub.local_path(base_name)
    return folder.resolve() if folder is not None and (folder / CONFIG).is_file() else None


def lineage(folder: Path) -> list[Path]:
    """An adapter's folder and those of all adapters before it, the first one first."""
    folders = [folder]
    while True:
        parent = parent_adapter(folders[0])
        if parent is None or parent in folders:  # configs may name each other
            return folders
        folders.insert(0, parent)
