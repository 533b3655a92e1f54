"""Progress of long work, as shown on a terminal, in a notebook, or nowhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Step = TypeVar("Step")


class Progress:
    """Takes what long work reports. This base class shows nothing; a subclass overrides the methods that it shows."""

    def stage(self, label: str, total: int) -> None:
        """Begin a stage of ``total`` bytes."""

    def advance(self, nbytes: int, label: str = "") -> None:
        """So many more bytes of the stage are done. ``label`` names the last part that was done."""

    def report(self, line: str) -> None:
        """Where work is that is not counted in bytes: which layer, which token."""
        self.advance(0, line)

    def note(self, line: str) -> None:
        """Show something that the user should know."""

    def warn(self, line: str) -> None:
        """Show a warning."""

    def end(self) -> None:
        """The last stage is over."""


class NoProgress(Progress):
    """Shows nothing."""


def announced(steps: Sequence[Step], label: str, report: Callable[[str], None], *, first: int = 1) -> Iterator[Step]:
    """Yield steps that take about equally long, each after a line: ``calibrating layer 3 of 30, 95 s left``.

    Args:
        label: what goes before the number of a step.
        report: shows a line.
        first: number of the first step.
    """
    last = first + len(steps) - 1
    started = time.monotonic()
    for done, step in enumerate(steps):
        left = f", {(time.monotonic() - started) / done * (len(steps) - done):.0f} s left" if done else ""
        report(f"{label} {first + done} of {last}{left}")
        yield step
