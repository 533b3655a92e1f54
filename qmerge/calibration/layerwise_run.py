"""All batches of a text on their way through one model, decoder layer by decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from qmerge.calibration.forward import ForwardPass, LayerCall
from qmerge.calibration.layered import LayeredModel, Values
from qmerge.calibration.tasks import token_arguments


class LayerwiseRun:
    """One forward pass per batch; all of them wait at the same decoder layer.

    Args:
        values: the weights of ``model``, for ``start`` and ``run_layer``.
        batches: token ids, int64 [sequences, length] each.
        with_head: also compute logits; without, the passes end at the last decoder layer.
        keep: what is kept of a layer's output until the next layer, instead of the output itself.

    Attributes:
        waiting: per batch, the call of the decoder layer at which it waits.
    """

    def __init__(
        self,
        model: LayeredModel,
        values: Values,
        batches: Sequence[Tensor],
        *,
        with_head: bool = False,
        keep: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model = model
        self.values = values
        self._keep = keep
        self.waiting: list[LayerCall] = []
        self._last_outputs: list[Any] = []
        # transformers' name for the model without its head; a model that has none is its own.
        forward: Any = model.model
        if not with_head:
            forward = getattr(model.model, "base_model", model.model)
        self._passes: list[ForwardPass] = []
        for ids in batches:
            self._passes.append(ForwardPass(partial(forward, **token_arguments(forward, ids.to(model.device)))))

    def start(self) -> None:
        """Run the embeddings, up to the first decoder layer."""
        self.model.load(None, self.model.names(None), self.values)
        self.waiting = [forward_pass.advance() for forward_pass in self._passes]
        # After the encoder's last layer, its final norm and the decoder's embeddings are needed.
        if not self.model.has_encoder_and_decoder:
            self.model.unload(None)

    def run_layer(self, index: int) -> None:
        """Load decoder layer ``index``, at which all batches wait, run them through it, and unload it."""
        with self.model.loaded(index, self.values):
            self.run_loaded_layer(is_last=index + 1 == len(self.model))

    def run_loaded_layer(self, is_last: bool = False) -> None:
        """Run all batches through the layer at which they wait, and on to the next one.

        After the last layer the passes wait until the head is loaded: ``logits`` goes on with them.
        """
        for batch in range(len(self._passes)):
            output = self.model.run_layer(self.waiting[batch])
            if is_last:
                self._last_outputs.append(output)
            else:
                self.go_on(batch, output)

    def go_on(self, batch: int, output: Any) -> None:
        """One batch goes on to the next decoder layer, with the output of the one at which it waits."""
        # Only hidden states are kept between two layers, those of every batch.
        if self._keep is not None:
            output = self._keep(output)
        self.waiting[batch] = self._passes[batch].advance(output)

    def logits(self, batch: int) -> Tensor:
        """Logits [sequences, length, vocabulary] of one batch. Every layer has been run, and the head is loaded."""
        logits: Tensor = self._passes[batch].advance(self._last_outputs[batch]).logits
        return logits

    def stop(self) -> None:
        """End all passes."""
        for forward_pass in self._passes:
            forward_pass.stop()


@contextmanager
def stopping(runs: Iterable[LayerwiseRun]) -> Iterator[None]:
    """Stop the runs at the end: after an error, their passes would wait in their threads and keep hidden states alive."""
    try:
        yield
    finally:
        for run in runs:
            run.stop()
