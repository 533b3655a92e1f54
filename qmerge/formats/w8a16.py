"""Compressed-tensors' packed int8 weights, as llm-compressor's W8A16 writes them (vLLM, SGLang, transformers)."""

from __future__ import annotations

from qmerge.formats._compressed_config import QUANT_METHOD
from qmerge.formats._compressed_int import CompressedInt
from qmerge.formats.base import FormatInfo


class W8a16(CompressedInt):
    """int8, four codes in a word."""

    info = FormatInfo(
        name="w8a16",
        quant_method=QUANT_METHOD,
        loaders="vLLM, SGLang, transformers",
        accepted_options=("group_size", "sym"),
        takes_single_experts=True,
    )
    kinds = (("pack-quantized", "int", 8),)
    bits = 8


FORMAT = W8a16()
