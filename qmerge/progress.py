"""Progress of long work, as shown on a terminal, in a notebook, or nowhere."""

from __future__ import annotations


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
