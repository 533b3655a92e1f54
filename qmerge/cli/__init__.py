"""The command line: arguments → recipe → run → results on stdout; progress, warnings and errors on stderr.

Modules that need torch are imported inside the commands, so that ``--help`` and completion are quick.
"""

from qmerge.cli.program import app, main

__all__ = ["app", "main"]
