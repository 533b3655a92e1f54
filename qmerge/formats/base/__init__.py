"""Base classes of formats: ``Format`` for those that qmerge reads, ``TargetFormat`` for those that it writes too."""

from qmerge.formats.base.format import NOT_QUANTIZED, Format, NoOptions, OptionsT
from qmerge.formats.base.info import FormatInfo
from qmerge.formats.base.on_the_fly import OnTheFly
from qmerge.formats.base.stored import Stored, Transposed, TransposedStack
from qmerge.formats.base.target import ModuleLayout, TargetFormat, with_asked

__all__ = [
    "NOT_QUANTIZED",
    "Format",
    "FormatInfo",
    "ModuleLayout",
    "NoOptions",
    "OnTheFly",
    "OptionsT",
    "Stored",
    "TargetFormat",
    "Transposed",
    "TransposedStack",
    "with_asked",
]
