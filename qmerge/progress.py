"""Progress of long work: what the terminal, a notebook or nobody is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Who is told how far the work is (the terminal, a notebook, nobody)."""

    def stage(self, label: str, total: int) -> None:
        """A new stage of ``total`` bytes."""

    def advance(self, nbytes: int, label: str = "") -> None:
        """So many bytes more are done. With none, ``label`` says where work is that is not counted in bytes."""

    def say(self, line: str) -> None:
        """What the user should know."""

    def warn(self, line: str) -> None:
        """A warning in plain words."""

    def end(self) -> None:
        """No more stages."""


class NoProgress:
    """Reports to nobody."""

    def stage(self, label: str, total: int) -> None:
        pass

    def advance(self, nbytes: int, label: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass

    def end(self) -> None:
        pass
