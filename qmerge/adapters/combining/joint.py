"""Several adapters as one adapter: the parts that combined and chained adapters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from qmerge.adapters.reading.folder import Adapter
from qmerge.adapters.reading.saved_weights import is_embedding
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.errors import AdapterError, listed
from qmerge.types import Change, Replacement, Update


class AdapterChange(NamedTuple):
    """The change of a weight by one adapter; ``position`` is that of the adapter in the run."""

    position: int
    change: Change


class AdapterUpdate(NamedTuple):
    """The update of a weight by one adapter; ``position`` is that of the adapter in the run."""

    position: int
    update: Update


class SeveralUpdates(Update):
    """The updates of several adapters of one weight, as one update."""

    updates: tuple[Update, ...]

    @property
    def members(self) -> tuple[Update, ...]:
        return self.updates

    @property
    def shape(self) -> tuple[int, int]:
        """As far as one of them knows: token rows do not know the number of rows (−1), IA³ not that of columns."""
        rows = max(update.shape[0] for update in self.updates)
        columns = max(update.shape[1] for update in self.updates)
        return rows, columns

    @property
    def needs_dense(self) -> str:
        """The first reason that one of them has."""
        for update in self.updates:
            if update.needs_dense:
                return update.needs_dense
        return ""


def changes_by_weight(adapters: Sequence[Adapter]) -> dict[str, list[AdapterChange]]:
    """Name of a weight → its changes in the order of the adapters; weights in the order in which the adapters name them."""
    changes: dict[str, list[AdapterChange]] = {}
    for position, adapter in enumerate(adapters):
        changes_of_adapter: dict[str, Change] = {**adapter.updates, **adapter.replaced}
        for weight, change in changes_of_adapter.items():
            changes.setdefault(weight, []).append(AdapterChange(position, change))
    return changes


def check_shapes(name: str, updates: Sequence[AdapterUpdate], adapters: Sequence[Adapter]) -> None:
    """Check that the updates of a weight are for the same shape.

    Args:
        name: of the weight.
        updates: at least one.
        adapters: all adapters of the run.

    Raises:
        AdapterError: they are not; the message names two adapters.
    """
    first = updates[0]
    for other in updates[1:]:
        if not _fits(first.update.shape, other.update.shape):
            raise AdapterError(
                f"{name} is {list(first.update.shape)} for {adapters[first.position].folder} and "
                f"{list(other.update.shape)} for {adapters[other.position].folder}: were both trained on this base?"
            )


def _fits(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes agree where both are known."""
    return all(a == b or min(a, b) < 0 for a, b in zip(shape, other, strict=True))


def sum_of_loras(updates: Sequence[Update], weights: Sequence[float]) -> LoraUpdate | None:
    """Σ wᵢ sᵢ Bᵢ Aᵢ as one LoRA, [w₁s₁B₁ w₂s₂B₂ …] · [A₁; A₂; …]; None unless all updates are LoRA."""
    factors_A: list[torch.Tensor] = []
    factors_B: list[torch.Tensor] = []
    for update, weight in zip(updates, weights, strict=True):
        if not isinstance(update, LoraUpdate):
            return None
        factors_A.append(update.A_RI)
        factors_B.append(update.B_OR * (weight * update.scale))
    return LoraUpdate(torch.cat(factors_A), torch.cat(factors_B, dim=1), 1.0)


def as_one_adapter(
    adapters: Sequence[Adapter], updates: dict[str, Update], replaced: dict[str, Replacement]
) -> Adapter:
    """An adapter with these changes, made of the changes of several adapters.

    Raises:
        AdapterError: options that decide how tensors are understood disagree.
    """
    tensors: dict[str, list[str]] = {}
    for weight in (*updates, *replaced):
        tensors[weight] = []
        for adapter in adapters:
            tensors[weight] += adapter.tensors.get(weight, [])
    kinds = dict.fromkeys(adapter.kind for adapter in adapters)
    return Adapter(
        # The first adapter gives the tokenizer and the name.
        folder=adapters[0].folder,
        kind=" + ".join(kinds),
        config=_joint_config(adapters),
        updates=updates,
        replaced=replaced,
        tensors=tensors,
    )


def _joint_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The first adapter's config, with the options of the others that decide how tensors are read.

    Raises:
        AdapterError: ``fan_in_fan_out`` or ``ensure_weight_tying`` disagree.
    """
    # It decides which way round the deltas of Conv1D weights are.
    _common_option(adapters, "fan_in_fan_out")
    with_embeddings: list[Adapter] = []
    modules_to_save: dict[str, None] = {}
    for adapter in adapters:
        if any(is_embedding(weight) for weight in (*adapter.updates, *adapter.replaced)):
            with_embeddings.append(adapter)
        modules_to_save.update(dict.fromkeys(adapter.config.get("modules_to_save") or []))
    return {
        **adapters[0].config,
        "bias": _widest_bias([adapter.config for adapter in adapters]),
        # Adapters that leave the embeddings alone have no say in whether they stay tied.
        "ensure_weight_tying": _common_option(with_embeddings, "ensure_weight_tying"),
        "modules_to_save": list(modules_to_save) or None,
    }


def _widest_bias(configs: Sequence[Mapping[str, Any]]) -> str:
    options = [config.get("bias") for config in configs]
    for wide in ("all", "lora_only"):
        if wide in options:
            return wide
    return "none"


def _common_option(adapters: Sequence[Adapter], option: str) -> bool:
    """The value that all adapters have, as a bool; False without adapters.

    Raises:
        AdapterError: they have different values.
    """
    values = [bool(adapter.config.get(option)) for adapter in adapters]
    if len(set(values)) > 1:
        choices = [f"{value} in {adapter.folder}" for value, adapter in zip(values, adapters, strict=True)]
        raise AdapterError(f"adapter_config.json's {option} is {listed(choices)}: these adapters cannot be combined")
    return any(values)
