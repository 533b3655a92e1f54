"""The contract of an adapter kind. A plug-in in this folder sets ``KIND`` to an instance of a subclass of ``AdapterKind``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor

from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.types import Change

Changes: TypeAlias = dict[str, tuple[Change, list[str]]]
"""Name of a weight → its change, and the names of the adapter's tensors that the change is made of."""


def add_change(changes: Changes, weight: str, change: Change, tensors: list[str]) -> None:
    """Add the change of a weight, made of these tensors, to those of the adapter's other weights.

    Raises:
        AdapterError: the weight is changed already.
    """
    if weight in changes:
        raise AdapterError(
            f"{weight} is changed by {listed(changes[weight][1])} and again by {listed(tensors)}; expected one change per weight"
        )
    changes[weight] = (change, tensors)


class AdapterKind(ABC):
    """How the tensors and the config of some PEFT types become changes of weights."""

    peft_types: tuple[str, ...]
    """Values of ``peft_type`` in adapter_config.json that this kind reads. Only one kind may read a type."""

    refused: Mapping[str, str] = MappingProxyType({})
    """``peft_type`` → why adapters of this type cannot be merged, and what to do instead."""

    index_parts: tuple[str, ...] = ()
    """Parts of the names of tensors that hold indices: these may be integers, and stay so. All others become float32."""

    def check_folder(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Check the adapter's folder itself, before its tensors are read.

        Raises:
            AdapterError: the name of the folder contradicts its config.
        """
        return

    @abstractmethod
    def updates(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Names | None) -> Changes:
        """The adapter's change of each weight, by the weight's name in the adapter (``reading/placement.py`` finds it on disk).

        Every tensor must be listed with the change that uses it: tensors that nothing lists are refused as left over.

        Args:
            config: adapter_config.json.
            tensors: float32 (integers where ``index_parts`` allows them), by name without ``base_model.model.``.
            names: of the base's weights; None where there is no base.

        Raises:
            AdapterError: an option or a tensor that would change the result and is not handled.
        """
