"""Compressed-tensors' packed int4 weights, as llm-compressor's W4A16 writes them (vLLM, SGLang, transformers)."""

from __future__ import annotations

from qmerge.formats._compressed_int import CompressedInt


class W4a16(CompressedInt):
    name = "w4a16"
    kinds = (("pack-quantized", "int", 4),)
    bits = 4
    single_experts = True


FORMAT = W4a16()
