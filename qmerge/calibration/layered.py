"""A model with one of its layers in memory at a time: to calibrate a merge, and to measure its fidelity.

transformers builds the model without weights and runs its own code; forward passes stop at every decoder layer
(``forward.py``). Whoever drives them loads the layer's weights, runs all batches through the layer, and unloads the weights.
Weights on disk become parameters (experts stacked, prefixes changed) by transformers' own conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qmerge.calibration.forward import LayerCall, pausing_forward
from qmerge.calibration.tasks import Task, takes_text, task_of
from qmerge.checkpoint.architecture import empty_model
from qmerge.checkpoint.conversion import Conversion
from qmerge.errors import CheckpointError
from qmerge.schema import Judged
from qmerge.weights.heap import release_freed_memory

Values = Callable[[str], Tensor]
"""Name of a weight on disk → its float32 values, in the shape of a dense checkpoint."""


class LayeredModel:
    """A model on ``device`` whose parameters are empty until they are loaded. ``len(model)``: number of its layers.

    The layers are numbered in the order in which they run: of a model with an encoder and a decoder, those of the encoder come
    first. Where a method takes ``index``, None means everything that is in no layer: embeddings, final norm, head.

    Args:
        names: weights of the checkpoint, by their names on disk.

    Attributes:
        task: what the model does.
        parameters: weight on disk → the parameter that it becomes, or becomes a part of.

    Raises:
        CheckpointError: transformers does not know the architecture, its input is not text, or it has no list of layers.
    """

    def __init__(self, config: Mapping[str, Any], names: Iterable[str], device: torch.device) -> None:
        self.device = device
        self.task = task_of(config)
        self.model = empty_model(config).eval()
        self.layers: list[nn.Module] = []
        self._first_of_list: dict[str, int] = {}
        for list_name, layers in lists_of_layers(self.model, self.task).items():
            self._first_of_list[list_name] = len(self.layers)
            self.layers += layers
        self._conversion = Conversion(self.model)
        self.parameters: dict[str, str] = {}
        self._names: dict[int | None, list[str]] = {}
        for name in names:
            parameter = self._conversion.rename(name).parameter
            self.parameters[name] = parameter
            self._names.setdefault(self.layer_of(parameter), []).append(name)
        # Each layer's own code is kept, and called by ``run_layer``; the model's code finds a pause in its place.
        self._layer_forwards = [layer.forward for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = pausing_forward(index)
        self._move_buffers()

    @property
    def predicts_tokens(self) -> bool:
        """Whether each position of the output predicts a token; of other models, hidden states are judged."""
        return self.task.judged in ("next tokens", "target tokens")

    @property
    def judged(self) -> Judged:
        """What of the model is judged on a text without right answers."""
        return self.task.judged if self.predicts_tokens else "hidden states"

    @property
    def has_encoder_and_decoder(self) -> bool:
        """Whether the layers are in two lists."""
        return len(self._first_of_list) > 1

    def __len__(self) -> int:
        return len(self.layers)

    def is_conv1d(self, name: str) -> bool:
        """Whether this weight belongs to a Conv1D (GPT-2), which a dense checkpoint stores as [I, O]."""
        return is_conv1d(self.model, self.parameters[name])

    def run_layer(self, call: LayerCall) -> Any:
        """The output of the layer for this call, computed by the layer's own code. Its weights must be loaded."""
        with torch.inference_mode():
            return self._layer_forwards[call.index](*call.args, **call.kwargs)

    def names(self, index: int | None) -> list[str]:
        """Names on disk of the weights of a layer."""
        return self._names.get(index, [])

    @contextmanager
    def loaded(self, index: int | None, values: Values) -> Iterator[None]:
        """Inside, the weights of a layer are in memory.

        Raises:
            CheckpointError: see ``load``.
        """
        self.load(index, self.names(index), values)
        try:
            yield
        finally:
            self.unload(index)

    def load(self, index: int | None, names: Iterable[str], values: Values) -> None:
        """Load some weights of a layer, as float32.

        Args:
            names: on disk; weights that make one parameter together must be loaded together.

        Raises:
            CheckpointError: some parameters of the layer have no values afterwards.
        """
        self._conversion.load({name: values(name).to(self.device) for name in names})
        # transformers does not raise where a parameter is missing: the layer's code would fail on it later.
        for parameter, tensor in self._tensors(index):
            if tensor.is_meta:
                raise CheckpointError(f"the base has no values for {parameter} of {type(self.model).__name__}")

    @contextmanager
    def same_memory(self, parameters: Iterable[str]) -> Iterator[None]:
        """What is loaded into these parameters inside is copied into the tensors that they had before."""
        before = {name: self.model.get_parameter(name) for name in parameters}
        yield
        for name, parameter in before.items():
            parameter.data.copy_(self.model.get_parameter(name).data)
            module, _, local = name.rpartition(".")
            self.model.get_submodule(module)._parameters[local] = parameter

    def load_whole(self, values: Values) -> Any:
        """Load every weight and take the pauses out: from here on, the model is an ordinary one.

        Raises:
            CheckpointError: see ``load``.
        """
        for index in (None, *range(len(self))):
            self.load(index, self.names(index), values)
        for layer, forward in zip(self.layers, self._layer_forwards, strict=True):
            layer.forward = forward
        return self.model

    def unload(self, index: int | None) -> None:
        """Free the weights of a layer."""
        for name, tensor in self._tensors(index):
            module, _, local = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
            self.model.get_submodule(module)._parameters[local] = empty
        release_freed_memory()

    def layer_of(self, parameter: str) -> int | None:
        """Index of the layer that a parameter belongs to."""
        for list_name, first in self._first_of_list.items():
            if parameter.startswith(f"{list_name}."):
                inside = parameter.removeprefix(f"{list_name}.")
                return first + int(inside.split(".", 1)[0])
        return None

    def _tensors(self, index: int | None) -> list[tuple[str, nn.Parameter]]:
        # Without duplicates, tied parameters would appear under one of their names only, and the other stay loaded.
        every_parameter = self.model.named_parameters(remove_duplicate=False)
        return [(name, parameter) for name, parameter in every_parameter if self.layer_of(name) == index]

    def _move_buffers(self) -> None:
        """Buffers (rotary frequencies, masks) are small and stay on the device."""
        for name, buffer in list(self.model.named_buffers()):
            module, _, local = name.rpartition(".")
            setattr(self.model.get_submodule(module), local, buffer.to(self.device))


def is_conv1d(model: nn.Module, parameter: str) -> bool:
    """Whether a parameter is the weight of a Conv1D (GPT-2), which is [I, O]."""
    from transformers.pytorch_utils import Conv1D

    module, _, local = parameter.rpartition(".")
    return local == "weight" and isinstance(model.get_submodule(module), Conv1D)


def lists_of_layers(model: Any, task: Task) -> dict[str, nn.ModuleList]:
    """The lists of layers of a model by name, in the order in which they run: one, or that of the encoder and of the decoder.

    Raises:
        CheckpointError: it has none, its input is not text, or it runs its layers more than once (ALBERT).
    """
    kind = type(model).__name__
    if not takes_text(model, task):
        raise CheckpointError(f"{kind} takes {model.main_input_name}, not text")
    if model.config.is_encoder_decoder:
        parts = [model.get_encoder(), model.get_decoder()]
    else:
        parts = [model.get_decoder() if hasattr(model, "get_decoder") else model]
    lists = dict(_outermost_list(model, part) for part in parts)
    if getattr(model.config, "num_hidden_groups", None) is not None:
        raise CheckpointError(f"{kind} runs the same layer several times")
    return lists


def _outermost_list(model: Any, part: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers of a part of a model (its text model, its encoder, …), and its name in the model.

    Raises:
        CheckpointError: it has none.
    """
    # A multimodal model has layers in its vision tower too: only those of the text model count. Lists inside layers
    # (experts) are deeper than the list of layers.
    modules_of_part = {id(module) for module in part.modules()}
    module_lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and id(module) in modules_of_part:
            module_lists.append((name, module))
    if not module_lists:
        raise CheckpointError(f"{type(model).__name__} has no list of layers")
    return min(module_lists, key=lambda named: named[0].count("."))
