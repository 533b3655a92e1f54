"""Everything that qmerge raises on purpose, with its exit code.

QmergeError                   the message is one line that says what, where, expected, what to do
├── RecipeError       (2)     the command line or the recipe
├── InputError        (3)     the input files
│   ├── CheckpointError       the base (or the original)
│   └── AdapterError          the adapter
├── NumbersError      (4)     values that the target cannot hold: NaN, or past the target's range
├── RoomError         (6)     no room on the disk or under --max-memory
└── StoppedError    (130)     Ctrl-C or SIGTERM; --resume goes on

Further exit codes: 0 done; 1 a bug, with traceback; 5 done, but less was kept than --min-kept.
"""

OK, BUG, BELOW_MIN_KEPT = 0, 1, 5


class QmergeError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = BUG

    def __init__(self, message: str) -> None:
        # Names in messages come from files: no line breaks and no control characters reach a terminal.
        super().__init__("".join(c for c in " ".join(message.split()) if c.isprintable()))


class RecipeError(QmergeError):
    exit_code = 2


class InputError(QmergeError):
    exit_code = 3


class CheckpointError(InputError):
    pass


class AdapterError(InputError):
    pass


class NeedsBaseError(AdapterError):
    """An adapter that only its base explains, where there is none."""


class NumbersError(QmergeError):
    exit_code = 4


class RoomError(QmergeError):
    exit_code = 6


class StoppedError(QmergeError):
    exit_code = 130


def listed(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """``a, b, c and 4 more``: names for an error line, shortened but never hiding how many there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
