"""compressed-tensors, by its own compressors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .layers import Tensors, Written, bias_of, pack_linear_layers, pad_to_blocks, quantized_modules


def write(model: PreTrainedModel, preset: str, **args: Any) -> Written:
    """The model as llm-compressor saves it."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    scheme = make_scheme(preset, **args)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, quantization_status="compressed", ignore=["lm_head"]
    )
    dumped = {
        **config.model_dump(exclude={"quant_method"}),
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "sparsity_config": {},
        "transform_config": {},
    }
    return Written(pack_linear_layers(model, lambda layer: pack(layer, scheme)), dumped)


def make_scheme(preset: str, **args: Any) -> Any:
    """A preset of the library; its format is the one that the library infers.

    Args:
        args: ``group_size``, if it is not the preset's; None is one scale per row.
    """
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    if args:
        strategy = "group" if args["group_size"] else "channel"
        scheme.weights = QuantizationArgs(**{**scheme.weights.model_dump(), "strategy": strategy, **args})
    scheme.format = infer_module_format(nn.Linear, scheme)
    return scheme


def pack(layer: nn.Linear, scheme: Any) -> Tensors:
    """The tensors of one layer."""
    parts = compress(layer.weight, scheme)
    if scheme.input_activations and scheme.input_activations.dynamic is False:
        parts["input_scale"] = torch.tensor([0.05], dtype=layer.weight.dtype)
    return {**parts, **bias_of(layer)}


def compress(weight_OI: Tensor, scheme: Any) -> Tensors:
    """The tensors of one weight. Scales have its dtype, as llm-compressor makes them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    low, high = _extremes(weight_OI, scheme.weights)
    parts = {"weight": weight_OI.detach()}
    if scheme.weights.strategy == "tensor_group":
        parts["weight_global_scale"] = generate_gparam(low.min(), high.max())
    scales, zeros = calculate_qparams(low, high, scheme.weights, parts.get("weight_global_scale"))
    parts["weight_scale"] = scales.to(weight_OI.dtype)
    parts["weight_zero_point"] = zeros
    compressed: Tensors = BaseCompressor.get_value_from_registry(scheme.format).compress(parts, scheme)
    return compressed


def _extremes(weight_OI: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of everything that shares a scale."""
    if args.strategy == "tensor":
        return weight_OI.min().view(1), weight_OI.max().view(1)
    if args.strategy == "channel":
        return weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = pad_to_blocks(weight_OI, (height, width))
        blocks = padded.view(len(padded) // height, height, -1, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight_OI.view(len(weight_OI), -1, args.group_size)
    return groups.amin(-1), groups.amax(-1)


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale`` by ``decompress``, with the scales cast to float32 beforehand.

    NVFP4 is ``code * (scale / global scale)``. For FP4 ``decompress`` unpacks to bfloat16 and rounds its result to it, so the
    two functions that it calls are called here.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    known = {name: value for name, value in config.items() if name in QuantizationConfig.model_fields}
    scheme = QuantizationConfig(**known).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    result = {}
    for name, parts in quantized_modules(tensors, "weight_scale"):
        if "weight_packed" in parts and parts["weight_packed"].dtype == torch.uint8:
            result[name] = _decompress_fp4(parts, scheme, compressor)
        else:
            parts["weight_scale"] = parts["weight_scale"].float()
            result[name] = compressor.decompress(parts, scheme)["weight"]
    return result


def _decompress_fp4(parts: Tensors, scheme: Any, compressor: Any) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, bytes_per_row = parts["weight_packed"].shape
    codes = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * bytes_per_row, dtype=torch.float32)
    scales = compressor._decompress_scale(parts["weight_scale"], torch.float32)
    dense: Tensor = dequantize(codes, scales, args=scheme.weights, global_scale=parts.get("weight_global_scale"))
    return dense
