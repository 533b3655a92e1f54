"""A causal language model of which only one decoder layer is in memory: for calibrating a merge, and for judging one.

transformers builds the model without weights and runs its own code; its forward passes, one per batch, stop at every
decoder layer. Whoever runs them decides what happens there: loads the layer's weights, runs all batches through, lets
the weights go. Names on disk become parameters (experts stacked, prefixes changed) by transformers' own conversion.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from qmerge.checkpoint.architecture import empty_model
from qmerge.checkpoint.conversion import Conversion
from qmerge.errors import CheckpointError

Values = Callable[[str], Tensor]
"""Name of a weight on disk → its float32 values, in the shape of a dense checkpoint."""


@dataclass(frozen=True)
class Visit:
    """A forward pass has arrived at decoder layer ``index`` and waits for what the layer returns."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayeredModel:
    """``names``: weights of the checkpoint. ``len(model)``: number of decoder layers.

    Raises:
        CheckpointError: transformers does not know the architecture, or it has no stack of decoder layers.
    """

    def __init__(self, config: Mapping[str, Any], names: Iterable[str], device: torch.device) -> None:
        self.device = device
        self.model = empty_model(config).eval()
        self.layers_name, self.layers = decoder_layers(self.model)
        self._forwards = [layer.forward for layer in self.layers]
        self._conversion = Conversion(self.model)
        self.parameters = {name: self._conversion.rename(name).parameter for name in names}
        self._names: dict[int | None, list[str]] = {}
        for name, parameter in self.parameters.items():
            self._names.setdefault(self._layer_of(parameter), []).append(name)
        for index, layer in enumerate(self.layers):
            layer.forward = _stopping(index)
        for name, buffer in list(self.model.named_buffers()):
            module, _, local = name.rpartition(".")
            setattr(self.model.get_submodule(module), local, buffer.to(device))

    def __len__(self) -> int:
        return len(self.layers)

    def is_conv1d(self, name: str) -> bool:
        """Whether this weight is that of a Conv1D (GPT-2), which a dense checkpoint holds as [I, O]."""
        from transformers.pytorch_utils import Conv1D

        module, _, local = self.parameters[name].rpartition(".")
        return local == "weight" and isinstance(self.model.get_submodule(module), Conv1D)

    def run_layer(self, visit: Visit) -> Any:
        """What the layer returns, by its own code; its weights must be loaded."""
        with torch.inference_mode():
            return self._forwards[visit.index](*visit.args, **visit.kwargs)

    def names(self, index: int | None) -> list[str]:
        """Weights (names on disk) of a decoder layer; of everything else, for None."""
        return self._names.get(index, [])

    @contextmanager
    def loaded(self, index: int | None, values: Values) -> Iterator[None]:
        """Inside, the weights of one decoder layer (of everything else, for None) are in memory, as float32."""
        self.load(index, self.names(index), values)
        try:
            yield
        finally:
            self.unload(index)

    def load(self, index: int | None, names: Iterable[str], values: Values) -> None:
        """Weights into the model.

        Raises:
            CheckpointError: some parameters are still without values afterwards.
        """
        self._conversion.load({name: values(name).to(self.device) for name in names})
        missing = [name for name, tensor in self._tensors(index) if tensor.is_meta]
        if missing:
            raise CheckpointError(f"the base holds no values for {missing[0]} of {type(self.model).__name__}")

    def unload(self, index: int | None) -> None:
        for name, tensor in self._tensors(index):
            module, _, local = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
            self.model.get_submodule(module)._parameters[local] = empty

    def _tensors(self, index: int | None) -> list[tuple[str, nn.Parameter]]:
        named = self.model.named_parameters(remove_duplicate=False)
        return [(name, p) for name, p in named if self._layer_of(name) == index]

    def _layer_of(self, parameter: str) -> int | None:
        if not parameter.startswith(f"{self.layers_name}."):
            return None
        return int(parameter[len(self.layers_name) + 1 :].split(".", 1)[0])


class Pass:
    """One forward pass as a coroutine: ``step(answer)`` goes on to the next decoder layer, or to the end.

    A thread of its own holds the pass's place in the model's code; only one of caller and pass ever runs.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._answered: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def step(self, answer: Any = None) -> Any:
        """A ``Visit``, or what the call returned. Raises what the model's code raised."""
        self._answered.put(answer)
        found, error = self._asked.get()
        if error is not None:
            raise error
        return found

    def stop(self) -> None:
        """End a pass that is of no more use."""
        self._answered.put(_Stopped())

    def _run(self, call: Callable[[], Any]) -> None:
        _current.running = self
        try:
            self._wait()
            with torch.inference_mode():
                self._asked.put((call(), None))
        except _Stopped:
            pass
        except BaseException as error:  # every error belongs to the caller
            self._asked.put((None, error))

    def _wait(self) -> Any:
        answer = self._answered.get()
        if isinstance(answer, _Stopped):
            raise answer
        return answer

    def visit(self, visit: Visit) -> Any:
        self._asked.put((visit, None))
        return self._wait()


class _Stopped(BaseException):
    pass


_current = threading.local()


def _stopping(index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        running: Pass = _current.running
        return running.visit(Visit(index, args, kwargs))

    return forward


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers: the outermost list of modules in the text model, with its name.

    Raises:
        CheckpointError: there is none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    inside = [(name, m) for name, m in lists if any(m is own for own in decoder.modules())]
    if not inside:
        raise CheckpointError(f"{type(model).__name__} has no list of decoder layers")
    return min(inside, key=lambda named: named[0].count("."))
