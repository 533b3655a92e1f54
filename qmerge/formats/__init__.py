"""Ways to store a weight, one file each. All are read, most are written too: written weights are read back to measure them.

A plug-in defines ``FORMAT``, a ``Format`` or a ``TargetFormat`` (see ``base``). The first line of its docstring is its help
text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmerge import plugins
from qmerge.errors import RecipeError
from qmerge.formats._names import known_target, meanings

if TYPE_CHECKING:  # at run time this would import torch before a format is asked for
    from qmerge.formats.base import Format, TargetFormat


MIXES = (
    "q3_k_m", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "iq4_nl", "iq4_xs",
    "gguf_f16", "gguf_bf16",
)  # fmt: skip
"""GGUF targets besides ``gguf``: llama.cpp's mixes of block types (``qmerge/gguf/mixes.py`` knows which tensor gets which type).
``fp16`` and ``bf16`` are folders, so the dense files have longer names."""


def get_format(name: str) -> Format[Any]:
    """The format of that name; of a GGUF target, too.

    Raises:
        RecipeError: no format has that name; the message lists those that exist.
    """
    if name in MIXES:
        mix: Format[Any] = plugins.load("formats", "gguf").mix(name)
        return mix
    plugin: Format[Any] = plugins.load("formats", name).FORMAT
    return plugin


def get_target(name: str) -> TargetFormat[Any]:
    """The format of that name, which qmerge can write. Names of other tools are understood (``bnb-4bit``, ``merged_16bit``).

    Raises:
        RecipeError: no target has that name, or several may be meant; the message lists those that exist.
    """
    from qmerge.formats.base import TargetFormat

    known = known_target(name, (*MIXES, *plugins.names("formats")))
    fmt = get_format(known) if known else None
    if isinstance(fmt, TargetFormat):
        return fmt
    help_line = meanings(name) or _target_help(name.lower())
    raise RecipeError(f"no target is called {name!r}. {help_line}")


def targets_of_bits(bits: object) -> str:
    """The targets that users mean by a number of bits, as a sentence; empty where they mean none."""
    return meanings(str(bits))


def _target_help(name: str) -> str:
    """``Did you mean 'nf4'? …``; all names only where none is close: there are more than 30."""
    targets = [*all_targets(), *MIXES]
    close = plugins.closest(name, targets)
    if close is None:
        return plugins.suggestion(name, targets)
    return f"Did you mean {close!r}? All targets: qmerge formats"


def all_formats() -> dict[str, Format[Any]]:
    """Every format, by name."""
    return {name: get_format(name) for name in plugins.names("formats")}


def all_targets() -> dict[str, TargetFormat[Any]]:
    """Every format that qmerge can write, by name. The mixes of ``gguf`` count as one."""
    from qmerge.formats.base import TargetFormat

    return {name: fmt for name, fmt in all_formats().items() if isinstance(fmt, TargetFormat)}
