"""Compressed-tensors' packed int8 weights, as llm-compressor's W8A16 writes them (vLLM, SGLang, transformers)."""

from __future__ import annotations

from qmerge.formats._compressed_int import CompressedInt


class W8a16(CompressedInt):
    name = "w8a16"
    kinds = (("pack-quantized", "int", 8),)
    bits = 8
    single_experts = True


FORMAT = W8a16()
