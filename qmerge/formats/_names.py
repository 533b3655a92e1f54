"""Names that users know from other tools → targets. A name that may mean several targets gets all of them as an answer."""

from __future__ import annotations

import re

_SPELLINGS = {
    "nf4": "bnb bnb4 bnb-4bit bnb-nf4 nf4-4bit bitsandbytes bitsandbytes-4bit merged-4bit merged-4bit-forced",
    "fp4": "bnb-fp4",
    "int8": "bnb-8bit bnb8 bitsandbytes-8bit llm-int8",
    "bf16": "merged-16bit 16bit bfloat16 torch.bfloat16",
    "fp16": "float16 half torch.float16",
    "fp32": "f32 float32 float 32bit torch.float32",
    "gptq": "gptq4 gptq-4bit gptq-int4 gptq-w4 int4-gptq",
    "awq": "awq4 awq-4bit awq-int4 int4-awq",
    "w4a16": "w4 int4-w4a16 compressed-tensors-w4a16",
    "fp8": "float8 fp8-block",
    "w8a8": "int8-w8a8 w8a8-int8",
    "mlx": "mlx-4bit mlx-int4 mlx4",
    "q8_0": "q8 gguf-8bit fast-quantized",
    "q6_k": "q6",
}  # fmt: skip

_FOUR_BITS = "nf4 (transformers; the format of most bases), w4a16 or gptq (vLLM, SGLang), q4_k_m (llama.cpp, Ollama), mlx (a Mac)"

_SEVERAL = {
    **dict.fromkeys(("4bit", "int4", "4", "q4bit", "quantized"), _FOUR_BITS),
    **dict.fromkeys(
        ("8bit", "8", "int8bit", "8bits"),
        "fp8 or w8a8 (vLLM, SGLang), int8 (transformers), q8_0 (llama.cpp, Ollama), w8a16 (vLLM, 16-bit activations)",
    ),
    **dict.fromkeys(("q4", "q4k", "gguf4bit", "ggufq4"), "q4_k_m (the usual one), q4_k_s, q4_0, q4_1"),
    **dict.fromkeys(("q5", "q5k", "ggufq5"), "q5_k_m (the usual one), q5_k_s, q5_0, q5_1"),
    "fp8dynamic": "fp8 (a scale for each block of 128 x 128), w8a8 (8-bit integers)",
    "f16": "fp16 (a folder), gguf_f16 (one file for llama.cpp)",
    **dict.fromkeys(
        ("compressedtensors", "llmcompressor"), "w4a16, w8a16, w8a8, nvfp4, mxfp4a16 (all of compressed-tensors), fp8"
    ),
    "safetensors": "bf16, fp16, fp32 (dense), or nf4, w4a16, gptq, fp8 (quantized): all are written as safetensors files",
    **dict.fromkeys(("gptq8bit", "gptqint8"), "gptq with --bits 8"),
    **dict.fromkeys(("mlx8bit", "mlxint8", "mlx8"), "mlx with --bits 8"),
    "mlx6bit": "mlx with --bits 6",
    **dict.fromkeys(("nf4dq", "nf4doublequant", "doublequant"), "nf4 with --double-quant"),
    **dict.fromkeys(("ollama", "llamacpp", "lmstudio"), "q4_k_m, q8_0, … (docs/gguf.md), or gguf with a GGUF base"),
    **dict.fromkeys(("vllm", "sglang"), "w4a16 or gptq (4 bits), fp8 or w8a8 (8 bits), bf16"),
    "transformers": "nf4, w4a16, gptq (4 bits), int8, bf16",
    "lora": "none: the adapter is merged into the model. To serve it unmerged, give the server base and adapter",
}  # fmt: skip


def _plain(name: str) -> str:
    """Upper case and separators do not matter: ``Q4_K_M``, ``q4km`` and ``q4-k-m`` are one name."""
    return re.sub(r"[\s_.-]", "", name.lower())


_TARGETS = {_plain(word): name for name, words in _SPELLINGS.items() for word in words.split()}


def known_target(name: str, targets: tuple[str, ...]) -> str | None:
    """The target that a name means, without doubt; None where it may mean several, or nothing.

    Args:
        targets: the names of all formats.
    """
    plain = _plain(name)
    exact = {_plain(target): target for target in targets}
    # gguf-q4_k_m: llama.cpp's names, with that of the file.
    return exact.get(plain) or _TARGETS.get(plain) or exact.get(plain.removeprefix("gguf"))


def meanings(name: str) -> str:
    """The targets that a name may mean, as a sentence; empty where it means none."""
    found = _SEVERAL.get(_plain(name))
    return f"It may mean: {found}." if found else ""
