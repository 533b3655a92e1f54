"""Compressed-tensors' packed int4 weights, as llm-compressor's W4A16 writes them (vLLM, SGLang, transformers)."""

from __future__ import annotations

from qmerge.formats._compressed_config import QUANT_METHOD
from qmerge.formats._compressed_int import CompressedInt
from qmerge.formats.base import FormatInfo


class W4a16(CompressedInt):
    """int4, eight codes in a word."""

    info = FormatInfo(
        name="w4a16",
        quant_method=QUANT_METHOD,
        loaders="vLLM, SGLang, transformers",
        accepted_options=("group_size", "sym"),
        takes_single_experts=True,
    )
    kinds = (("pack-quantized", "int", 4),)
    bits = 4


FORMAT = W4a16()
