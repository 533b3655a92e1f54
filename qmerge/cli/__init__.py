"""The command line."""

from qmerge.cli.commands import app, main

__all__ = ["app", "main"]
