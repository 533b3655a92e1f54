"""Layers around given values, of the kinds that peft's adapters are put on: linear layers, embeddings, convolutions."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

from torch import Tensor, nn

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

LayerT = TypeVar("LayerT", nn.Linear, Convolution)

CONVOLUTIONS: dict[int, type[Convolution]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""Axes of the weight, [out, in / groups, kernel…] → layer."""


def linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """A linear layer that holds these very tensors."""
    # On the meta device, so that torch draws no initial values for a large weight.
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    return _holding(layer, weight_OI, bias_O)


def embedding(weight_TI: Tensor) -> nn.Embedding:
    """An embedding [tokens, features] that holds this very tensor."""
    return nn.Embedding(weight_TI.shape[0], weight_TI.shape[1], _weight=weight_TI)


def convolution(weight: Tensor, bias_O: Tensor | None, groups: int) -> Convolution:
    """A convolution that holds these very tensors.

    Stride, padding and dilation are those by default: no type of peft's adapters has a delta that depends on them.

    Args:
        weight: [out, in / groups, kernel…].
        groups: of channels.
    """
    layer = CONVOLUTIONS[weight.ndim](
        weight.shape[1] * groups,
        weight.shape[0],
        kernel_size=tuple(weight.shape[2:]),  # type: ignore[arg-type]  # as long as the class has dimensions
        groups=groups,
        bias=bias_O is not None,
        device="meta",
    )
    return _holding(layer, weight, bias_O)


def _holding(layer: LayerT, weight: Tensor, bias_O: Tensor | None) -> LayerT:
    layer.weight = nn.Parameter(weight)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O)
    return layer
