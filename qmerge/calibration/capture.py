"""The inputs of the weights of a decoder layer: matrix products with one of them are recorded, or wait."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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


PRODUCTS: dict[Any, tuple[int, int]] = {
    nn.functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
}
"""Function → positions of its arguments input and weight. (GPT-2's Conv1D calls ``addmm``, gpt-oss' experts ``x @ weight``.)"""

ADDITIONS = (torch.Tensor.add, torch.Tensor.add_, torch.add)
"""What adds the output of a block to the residual stream (``+`` and ``+=`` come as the first two)."""


class ProductCapture(TorchFunctionMode):
    """Inside, ``seen`` is called for every product of an input with a wanted weight, whatever code makes it.

    A weight is recognized by the memory of its values, not by its module: so slices of stacked experts are recognized too.
    The residual stream is followed through the layer: it begins as the layer's input, and every addition makes the next.

    Args:
        wanted: weights of one decoder layer, which is loaded, by their names on disk.
        stream: the residual stream where the layer begins, float32 [sequences, length, width].

    Attributes:
        stream: the residual stream at the moment.
    """

    def __init__(self, model: LayeredModel, wanted: Sequence[str], stream: Tensor) -> None:
        super().__init__()
        self.stream = stream
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
            return self._multiply(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if func in ADDITIONS and len(args) > 1 and isinstance(args[1], Tensor):
            self._follow(args[0], args[1], result)
        return result

    def seen(self, product: MatrixProduct) -> None:
        """A product is about to be computed."""

    def computed(self, names: tuple[str, ...], output: Tensor) -> None:
        """A product has been computed."""

    def added(self, block_output: Tensor) -> None:
        """``block_output`` has been added to the residual stream."""

    def _multiply(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        input_position, weight_position = PRODUCTS[func]
        x, weight = args[input_position], args[weight_position]
        names = self._weights.get((weight.untyped_storage().data_ptr(), int(weight.storage_offset())))
        if names:
            self.seen(MatrixProduct(names, x.detach().reshape(-1, x.shape[-1]).float()))
        output = func(*args, **kwargs)
        if names:
            self.computed(names, output)
        return output

    def _follow(self, one: Tensor, other: Tensor, result: Tensor) -> None:
        if result.shape != self.stream.shape:
            return
        for operand, block_output in ((one, other), (other, one)):
            if _same_memory(operand, self.stream):
                self.added(block_output)
                self.stream = result
                return


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


class RecordedProducts(ProductCapture):
    """All products of one batch, and which weights write into the residual stream.

    Attributes:
        products: in the order in which the layer's code makes them.
        into_stream: weights whose product is added to the residual stream as it is.
    """

    def __init__(self, model: LayeredModel, wanted: Sequence[str], stream: Tensor) -> None:
        super().__init__(model, wanted, stream)
        self.products: list[MatrixProduct] = []
        self.into_stream: set[str] = set()
        # They are kept alive, so that no address is used twice.
        self._outputs: list[tuple[tuple[str, ...], Tensor]] = []

    def seen(self, product: MatrixProduct) -> None:
        self.products.append(product)

    def computed(self, names: tuple[str, ...], output: Tensor) -> None:
        self._outputs.append((names, output))

    def added(self, block_output: Tensor) -> None:
        for names, output in self._outputs:
            # Conv1D multiplies with all sequences in one row of tokens: the same memory, in another shape.
            same = output.data_ptr() == block_output.data_ptr() and output.numel() == block_output.numel()
            if same and len(names) == 1:
                self.into_stream.update(names)


class AllInputsSeen(Exception):  # noqa: N818  (it is not an error)
    """Every wanted weight has been multiplied with something: the rest of the layer need not be run."""


class StoppingProducts(RecordedProducts):
    """The same, but ``AllInputsSeen`` is raised before the last wanted weight is multiplied."""

    def __init__(self, model: LayeredModel, wanted: Sequence[str], stream: Tensor) -> None:
        super().__init__(model, wanted, stream)
        self._missing = set(wanted)

    def seen(self, product: MatrixProduct) -> None:
        super().seen(product)
        self._missing.difference_update(product.names)
        if not self._missing:
            raise AllInputsSeen


@dataclass(frozen=True)
class GroupReached:
    """A batch waits before the first product of a group: the group's input x [tokens, I], and the residual stream."""

    x: Tensor
    stream: Tensor


class PausingProducts(ProductCapture):
    """Inside a ``ForwardPass``: waits before the first product of each group, until the caller has rounded its weights.

    Args:
        groups: names of the weights of each group, in the order of the layer's code.
        pause: hands a ``GroupReached`` to the caller, and returns when the caller goes on.
    """

    def __init__(
        self,
        model: LayeredModel,
        groups: Sequence[Sequence[str]],
        stream: Tensor,
        pause: Callable[[GroupReached], Any],
    ) -> None:
        super().__init__(model, [name for names in groups for name in names], stream)
        self._groups = iter(groups)
        self._reached: set[str] = set()
        self._pause = pause

    def seen(self, product: MatrixProduct) -> None:
        if self._reached.issuperset(product.names):
            return
        self._reached = set(next(self._groups))
        assert self._reached.issuperset(product.names), "a batch takes another way through the layer than the first one"
        self._pause(GroupReached(product.x, self.stream))


def _by_parameter(model: LayeredModel, names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        # A matrix of a stack that is one weight on disk has a name of its own here only.
        on_disk = name if name in model.parameters else without_expert_number(name)
        groups.setdefault(model.parameters[on_disk], []).append(name)
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


def groups_by_input(products: Sequence[MatrixProduct], wanted: Sequence[str]) -> list[list[str]]:
    """Weights that are multiplied with the same input, in the order in which the layer's own code comes to them.

    All experts of a layer are treated as one: ``w1`` of every expert is in the same group, also of those that got no token.
    """
    groups: dict[str, list[str]] = {}
    # Equal inputs have the same memory: ``products`` keeps all of them alive, so no address is used twice.
    first_of_input: dict[tuple[Any, ...], str] = {}
    for product in products:
        kind = without_expert_number(product.names[0])
        key = first_of_input.setdefault((product.x.data_ptr(), tuple(product.x.shape)), kind)
        for known_key, names in groups.items():
            if kind in map(without_expert_number, names):  # the same weight of another expert has been seen
                key = known_key
                break
        group = groups.setdefault(key, [])
        kinds = {without_expert_number(name) for name in product.names}
        for name in wanted:
            if without_expert_number(name) in kinds and name not in group:
                group.append(name)
    return list(groups.values())


def _expert_number(name: str) -> int:
    """The last number in the name: ``layers.3.mlp.experts.11.w1.weight`` → 11."""
    return int(re.findall(r"\.(\d+)(?=\.)", name)[-1])


def with_expert_number(name: str, number: int) -> str:
    """``layers.3.mlp.experts.down_proj``, 11 → ``layers.3.mlp.experts.11.down_proj``: a matrix of a stack, by the name that it
    would have as a weight of its own."""
    module, _, local = name.rpartition(".")
    return f"{module}.{number}.{local}"


def without_expert_number(name: str) -> str:
    """``layers.3.mlp.experts.11.w1.weight`` → ``layers.3.mlp.experts.w1.weight``: the same for all experts of a layer."""
    return re.sub(r"(\.experts\.)\d+\.", r"\1", name)
