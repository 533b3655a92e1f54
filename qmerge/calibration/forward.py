"""Forward passes that pause at every decoder layer.

Calibration needs all batches at one layer before any of them goes on to the next, because only one layer is in memory. A
model's ``forward`` does it the other way round: one batch through all layers. So each batch has a forward pass in a thread
of its own, which stops where the model calls a decoder layer and waits until somebody else has computed its output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch


@dataclass(frozen=True)
class LayerCall:
    """The call of decoder layer ``index`` at which a forward pass has stopped: it waits for the layer's output."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ForwardPass:
    """One forward pass as a coroutine: ``advance`` runs it up to the next decoder layer, or to its end.

    A thread holds the position in the model's code. Only one of the two, caller or thread, ever runs.

    Args:
        call: runs the model, whose layers have the forward function ``pausing_forward``.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._to_caller: SimpleQueue[Any] = SimpleQueue()
        self._to_thread: SimpleQueue[Any] = SimpleQueue()
        # A daemon: a pass that nobody stops must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def advance(self, answer: Any = None) -> Any:
        """Go on with what it waits for: the output of a layer (None at the start).

        Returns:
            What it stops at next (a ``LayerCall``), or the result of ``call``.

        Raises:
            BaseException: whatever the model's code raised.
        """
        self._to_thread.put(answer)
        result, error = self._to_caller.get()
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """End a pass that is not needed any more, wherever it waits."""
        # A pass that has ended already never reads this message.
        self._to_thread.put(_Stopped())

    def pause(self, found: Any) -> Any:
        """For the thread: hand something to the caller of ``advance``, and wait for the answer."""
        self._to_caller.put((found, None))
        return self._wait()

    def _run(self, call: Callable[[], Any]) -> None:
        _running.forward_pass = self
        try:
            self._wait()  # for the first ``advance``
            with torch.inference_mode():
                self._to_caller.put((call(), None))
        except _Stopped:
            pass
        except BaseException as error:  # the caller handles all of them
            self._to_caller.put((None, error))

    def _wait(self) -> Any:
        message = self._to_thread.get()
        if isinstance(message, _Stopped):
            raise message
        return message


class _Stopped(BaseException):
    """Unwinds a pass. Not an Exception, so that no handler in the model's code catches it."""


_running = threading.local()
"""``forward_pass``: the pass that this thread belongs to."""


def pause(found: Any) -> Any:
    """Inside a pass: hand something to the caller of ``advance``, and wait for the answer."""
    forward_pass: ForwardPass = _running.forward_pass
    return forward_pass.pause(found)


def pausing_forward(index: int) -> Callable[..., Any]:
    """The forward function that decoder layer ``index`` is given: it computes nothing, but pauses the pass."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return pause(LayerCall(index, args, kwargs))

    return forward
