"""The kinds of checkpoints: which library writes each, and with which settings."""

from __future__ import annotations

from typing import Any

# Every format can store these sizes: they are multiples of 128 (q 256, k and v 128, gate and up 384), with several groups.
LLAMA = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}

# Blocks of 128 do not fit: 192 × 192, 96 × 192, 320 × 192, 192 × 320.
ODD = {**LLAMA, "hidden_size": 192, "intermediate_size": 320}

# ``one_sided``: a third of the rows has no negative weights and a third no positive ones, which drives zero points to both
# ends of their range. torchao's packed int4 (``Int4WeightOnlyConfig``) is left out: no CPU makes it, and it has no
# dequantization.
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"family": "gptq"},
    "gptq-g32": {"family": "gptq", "group_size": 32},
    "gptq-channel": {"family": "gptq", "group_size": -1},
    "gptq-v2": {"family": "gptq", "format": "gptq_v2"},
    "gptq-asym": {"family": "gptq", "sym": False},
    "gptq-asym-v2": {"family": "gptq", "sym": False, "format": "gptq_v2"},
    "gptq-asym-edge": {"family": "gptq", "sym": False, "group_size": 32, "one_sided": True},
    "gptq-act-order": {"family": "gptq", "desc_act": True},
    "gptq-act-order-asym": {"family": "gptq", "desc_act": True, "sym": False, "group_size": 32},
    "gptq-2bit": {"family": "gptq", "bits": 2, "group_size": 32},
    "gptq-3bit": {"family": "gptq", "bits": 3},
    "gptq-3bit-asym": {"family": "gptq", "bits": 3, "sym": False, "one_sided": True},
    "gptq-8bit": {"family": "gptq", "bits": 8},
    "gptq-8bit-asym": {"family": "gptq", "bits": 8, "sym": False, "one_sided": True},
    "awq": {"family": "awq", "group_size": 64},
    "awq-g32": {"family": "awq", "group_size": 32, "one_sided": True},
    "fp8": {"family": "fp8"},
    "fp8-odd": {"family": "fp8", "sizes": ODD},
    "fp8-tensor": {"family": "fp8", "block": None},
    "fp8-ue8m0": {"family": "fp8", "scale_fmt": "ue8m0"},
    "fbgemm-fp8": {"family": "fbgemm_fp8"},
    "ct-fp8-tensor": {"family": "compressed-tensors", "preset": "FP8"},
    "ct-fp8-channel": {"family": "compressed-tensors", "preset": "FP8_DYNAMIC"},
    "ct-fp8-block": {"family": "compressed-tensors", "preset": "FP8_BLOCK"},
    "ct-fp8-block-odd": {"family": "compressed-tensors", "preset": "FP8_BLOCK", "sizes": ODD},
    "ct-int4": {"family": "compressed-tensors", "preset": "W4A16"},
    "ct-int4-g32": {"family": "compressed-tensors", "preset": "W4A16", "group_size": 32},
    "ct-int4-asym": {"family": "compressed-tensors", "preset": "W4A16_ASYM"},
    "ct-int4-asym-g32": {"family": "compressed-tensors", "preset": "W4A16_ASYM", "group_size": 32, "one_sided": True},
    "ct-int8": {"family": "compressed-tensors", "preset": "W8A16", "group_size": None},
    "ct-int8-w8a8": {"family": "compressed-tensors", "preset": "W8A8"},
    "ct-nvfp4": {"family": "compressed-tensors", "preset": "NVFP4A16"},
    "ct-mxfp4": {"family": "compressed-tensors", "preset": "MXFP4A16"},
    "mxfp4": {"family": "mxfp4"},
    "hqq": {"family": "hqq"},
    "hqq-axis0": {"family": "hqq", "axis": 0},
    "hqq-2bit": {"family": "hqq", "nbits": 2, "group_size": 32},
    "hqq-3bit": {"family": "hqq", "nbits": 3},
    "hqq-8bit": {"family": "hqq", "nbits": 8},
    "mlx": {"family": "mlx"},
    "mlx-3bit-g32": {"family": "mlx", "bits": 3, "group_size": 32},
    "mlx-8bit": {"family": "mlx", "bits": 8},
    "mlx-mxfp4": {"family": "mlx", "group_size": 32, "mode": "mxfp4"},
    "mlx-nvfp4": {"family": "mlx", "group_size": 16, "mode": "nvfp4"},
    "torchao-int8": {"family": "torchao", "config": "Int8WeightOnlyConfig"},
    "torchao-int8-g32": {"family": "torchao", "config": "Int8WeightOnlyConfig", "group_size": 32},
    "torchao-fp8": {"family": "torchao", "config": "Float8WeightOnlyConfig"},
    "torchao-intx4": {"family": "torchao", "config": "IntxWeightOnlyConfig", "group_size": 32},
}

MODULES = {
    "gptq": "gptqmodel", "awq": "gptqmodel", "fp8": "transformers", "fbgemm_fp8": "transformers", "hqq": "hqq",
    "compressed-tensors": "compressed_tensors", "mxfp4": "compressed_tensors", "torchao": "torchao",
    "mlx": "mlx_lm",
}  # fmt: skip


def needs(kind: str) -> str:
    """The module to importorskip: it makes and reads this kind, and the stock loader uses it too."""
    return MODULES[KINDS[kind]["family"]]
