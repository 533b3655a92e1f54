"""Everything that qmerge raises on purpose, with its exit code.

QmergeError                   the message is one line: what is wrong, where, what was expected, what to do
├── RecipeError       (2)     the command line or the recipe
├── InputError        (3)     the input files
│   ├── CheckpointError       the base or the original
│   │   └── TokenizerError    its tokenizer
│   └── AdapterError          the adapter
│       └── NeedsBaseError    the adapter can only be read together with its base
├── NumbersError      (4)     values that the target cannot hold: NaN, infinity, or past its range
├── RoomError         (6)     not enough room on the disk, in memory, or under --max-memory
├── DiskError         (7)     the disk failed, or refused to read or write
├── HubError          (8)     the Hub cannot be reached, or refused to write
└── StoppedError    (130)     Ctrl-C or SIGTERM; --resume goes on

Further exit codes: 0 done; 1 a bug, with traceback; 5 done, but past --min-kept or --max-kl-ratio;
141 nobody reads the output any more (``| head``).
"""

import errno
import re

# Exit codes without an exception.
OK = 0
BUG = 1
PAST_LIMIT = 5
CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE has ended

OUT_OF_MEMORY = ("not enough memory", "allocate memory", "out of memory", "_ALLOC_FAILED")
"""Parts of messages of torch (CPU) and CUDA, which raise RuntimeError; of cuBLAS and cuSOLVER, which need memory to work in."""

LONGEST_MESSAGE = 4000
"""Characters; names in a message may be longer than anyone reads."""


class QmergeError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = BUG

    def __init__(self, message: str) -> None:
        # Names in messages come from files: no line breaks and no control characters may reach a terminal.
        line = "".join(filter(str.isprintable, " ".join(message.split())))
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[: LONGEST_MESSAGE // 2]} … {line[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(line)


class RecipeError(QmergeError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class InputError(QmergeError):
    """An input file is wrong."""

    exit_code = 3


class CheckpointError(InputError):
    """The base or the original is wrong."""


class TokenizerError(CheckpointError):
    """The tokenizer cannot be loaded, or does not belong to the model."""


class AdapterError(InputError):
    """The adapter is wrong."""


class NeedsBaseError(AdapterError):
    """The adapter can only be read together with its base, which is not given."""


class NumbersError(QmergeError):
    """There are values that the target cannot hold: NaN, infinity, or values past its range."""

    exit_code = 4


class RoomError(QmergeError):
    """There is not enough room on the disk, in memory, or under ``--max-memory``."""

    exit_code = 6


class DiskError(QmergeError):
    """The disk or its file system failed, or refused to read or write; ``--resume`` goes on."""

    exit_code = 7


class HubError(QmergeError):
    """The Hub cannot be reached, or refused to write; the merged folder stays, and ``qmerge push`` goes on."""

    exit_code = 8


class StoppedError(QmergeError):
    """The run was interrupted by Ctrl-C or SIGTERM."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the CPU or of the GPU has run out, as Python, numpy, the system, torch and CUDA say it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return any(part in str(error) for part in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def out_of_memory(cause: BaseException) -> RoomError:
    """The error for it, with what to do."""
    message = str(cause)
    device = " on the GPU" if re.search("CUDA|CUBLAS|CUSOLVER", message) else ""
    # The rest of the message is advice that is not for users of qmerge.
    size = re.search(r"(tried|unable) to allocate [\d.]+ \w+", message, re.IGNORECASE)
    asked = f" ({size[0]})" if size else ""
    return RoomError(
        f"out of memory{device}{asked}: repeat the command with a smaller --max-memory or fewer --workers (a "
        f"merge: with --resume, which keeps finished work), or start again with fewer --calibration-tokens, a shorter "
        f"--sequence-length, --rounding stochastic (which needs no calibration), or, on a GPU, --device cpu"
    )


def first_line(cause: BaseException) -> str:
    """The first line of what another library's error says; the name of its class where it says nothing."""
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__


def listed(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """Names for an error line: ``a, b, c and 4 more``. It may leave out names, but not how many there are."""
    shown = ", ".join(names[:most])
    if len(names) <= most:
        return shown
    return f"{shown} and {len(names) - most} more"
