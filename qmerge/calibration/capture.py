"""The inputs of the weights of a decoder layer: every matrix product with one of them is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qmerge.calibration.layered import LayeredModel


@dataclass(frozen=True)
class MatrixProduct:
    """One product: ``x``, float32 [tokens, I], was multiplied with these weights (several where a parameter holds several).

    ``x`` shares memory with the tensor in the model's code, so products with the same input have the same ``data_ptr``.
    """

    names: tuple[str, ...]
    x: Tensor


class AllInputsSeen(Exception):  # noqa: N818  (it is not an error)
    """Every wanted weight has been multiplied with something: the rest of the layer need not be run."""


PRODUCTS: dict[Any, tuple[int, int]] = {nn.functional.linear: (0, 1), torch.addmm: (1, 2)}
"""Function → positions of its arguments input and weight. (GPT-2's Conv1D calls ``addmm``.)"""


class ProductCapture(TorchFunctionMode):
    """Inside, every product of an input with a wanted weight is recorded in ``products``, whatever code makes it.

    A weight is recognized by the memory of its values, not by its module: so slices of stacked experts are recognized too.

    Args:
        wanted: weights of one decoder layer, which is loaded, by their names on disk.
        stop: raise ``AllInputsSeen`` as soon as every wanted weight has been seen.
    """

    def __init__(self, model: LayeredModel, wanted: Sequence[str], stop: bool = False) -> None:
        super().__init__()
        self.products: list[MatrixProduct] = []
        self._stop = stop
        self._missing = set(wanted)
        # (address of the storage, offset in it) → weights on disk. A slice shares the storage of the whole tensor.
        self._weights: dict[tuple[int, int], tuple[str, ...]] = {}
        for parameter, names in _by_parameter(model, wanted).items():
            values = model.model.get_parameter(parameter)
            for offset, names_at_offset in _names_by_offset(values, names):
                self._weights[values.untyped_storage().data_ptr(), offset] = names_at_offset

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """torch calls this for every function that is called inside."""
        if func in PRODUCTS:
            input_position, weight_position = PRODUCTS[func]
            self._record(args[input_position], args[weight_position])
        return func(*args, **(kwargs or {}))

    def _record(self, x: Tensor, weight: Tensor) -> None:
        names = self._weights.get((weight.untyped_storage().data_ptr(), int(weight.storage_offset())))
        if not names:
            return
        self.products.append(MatrixProduct(names, x.detach().reshape(-1, x.shape[-1]).float()))
        self._missing.difference_update(names)
        if self._stop and not self._missing:  # before the product itself is computed
            raise AllInputsSeen


def _by_parameter(model: LayeredModel, names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(model.parameters[name], []).append(name)
    return groups


def _names_by_offset(values: Tensor, names: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Storage offset → the weights there: all at the start of a matrix, or expert by expert in a stack [E, O, I]."""
    first = int(values.storage_offset())
    if values.ndim < 3:  # joined weights (q, k and v in one matrix) are multiplied together
        yield first, tuple(names)
        return
    by_expert: dict[int, list[str]] = {}
    for name in names:
        by_expert.setdefault(_expert_number(name), []).append(name)
    for number, names_of_expert in by_expert.items():
        yield first + number * int(values.stride(0)), tuple(names_of_expert)


def _expert_number(name: str) -> int:
    """The last number in the name: ``layers.3.mlp.experts.11.w1.weight`` → 11."""
    return int(re.findall(r"\.(\d+)(?=\.)", name)[-1])


def without_expert_number(name: str) -> str:
    """``layers.3.mlp.experts.11.w1.weight`` → ``layers.3.mlp.experts.w1.weight``: the same for all experts of a layer."""
    return re.sub(r"(\.experts\.)\d+\.", r"\1", name)
