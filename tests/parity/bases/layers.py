"""Steps that the writers and readers of all families share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

# Name of a tensor, in its module (``qweight``) or in full → the tensor.
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """A checkpoint as a library writes it."""

    tensors: Tensors

    config: dict[str, Any]
    """``quantization_config``."""

    metadata: dict[str, str] = field(default_factory=dict)
    """Of the safetensors file."""


def pack_linear_layers(model: PreTrainedModel, pack: Callable[[nn.Linear], Tensors]) -> Tensors:
    """The model's state, with the packed tensors of every linear layer but lm_head in place of its weight."""
    state: Tensors = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            del state[f"{name}.weight"]
            for local, tensor in pack(layer).items():
                state[f"{name}.{local}"] = tensor
    return state


def bias_of(layer: nn.Linear) -> Tensors:
    """The bias of a layer by its name, if it has one."""
    return {} if layer.bias is None else {"bias": layer.bias}


def float_copy(layer: nn.Linear) -> nn.Linear:
    """The same layer in float32."""
    rows, columns = layer.weight.shape
    copy = nn.Linear(columns, rows, bias=layer.bias is not None)
    copy.load_state_dict({name: tensor.float() for name, tensor in layer.state_dict().items()})
    return copy


def quantized_modules(tensors: Tensors, mark: str) -> Iterator[tuple[str, Tensors]]:
    """Weight name and tensors (by their local names) of every module that has a tensor called ``mark``."""
    for name in tensors:
        if name.endswith(f".{mark}"):
            prefix = name.removesuffix(mark)
            parts = {
                other.removeprefix(prefix): tensor for other, tensor in tensors.items() if other.startswith(prefix)
            }
            yield f"{prefix}weight", parts


def pad_to_blocks(weight_OI: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight, filled up with zeros to whole blocks."""
    rows, columns = weight_OI.shape
    return nn.functional.pad(weight_OI, (0, -columns % block[1], 0, -rows % block[0]))
