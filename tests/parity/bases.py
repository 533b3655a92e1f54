# mypy: disable-error-code="import-untyped"
"""Small checkpoints of the other quantized kinds, as their libraries write them, and the values those libraries read back.

Each weight is packed by the library's own code, module by module: whole quantization pipelines take minutes and would
choose other codes, but not another layout. The oracle is the library's own dequantization with float32 scales.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import models

Parts = dict[str, Tensor]
"""Name of a part within its module (``qweight``) → tensor."""

LLAMA = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Every format can hold it: all sizes are multiples of 128 (q 256, k and v 128, gate and up 384), with several groups."""

ODD = {**LLAMA, "hidden_size": 192, "intermediate_size": 320}
"""Blocks of 128 end in the middle: 192 × 192, 96 × 192, 320 × 192, 192 × 320."""

GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "sliding_window": 8,
    "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip

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
    "torchao-int8": {"family": "torchao", "config": "Int8WeightOnlyConfig"},
    "torchao-int8-g32": {"family": "torchao", "config": "Int8WeightOnlyConfig", "group_size": 32},
    "torchao-fp8": {"family": "torchao", "config": "Float8WeightOnlyConfig"},
    "torchao-intx4": {"family": "torchao", "config": "IntxWeightOnlyConfig", "group_size": 32},
}
"""Name of a kind → who writes it, and with which settings.

``one_sided``: a third of the rows has no negative and a third no positive weights, which drives zero points to both ends
of their range. Not here is torchao's packed int4 (``Int4WeightOnlyConfig``): no CPU makes it, and it has no dequantization.
"""


def needs(kind: str) -> str:
    """The module to importorskip: it makes and reads this kind, and the stock loader uses it too."""
    modules = {
        "gptq": "gptqmodel", "awq": "gptqmodel", "fp8": "transformers", "fbgemm_fp8": "transformers", "hqq": "hqq",
        "compressed-tensors": "compressed_tensors", "mxfp4": "compressed_tensors", "torchao": "torchao",
    }  # fmt: skip
    return modules[KINDS[kind]["family"]]


def make(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A complete folder; ``changes`` go into the model's config (``attention_bias=True``)."""
    settings = dict(KINDS[kind])
    family, sizes = settings.pop("family"), {**settings.pop("sizes", LLAMA), **changes}
    model = gpt_oss(seed, **changes) if family == "mxfp4" else models.llama(seed=seed, **sizes)
    if settings.pop("one_sided", False):
        _make_one_sided(model)
    model.save_pretrained(folder)  # the config, and the files beside the weights; the weights are written again
    with torch.no_grad():
        state, config, metadata = WRITERS[family](model, **settings)
    contiguous = {name: part.contiguous() for name, part in state.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt", **metadata})
    models.edit_json(folder / "config.json", quantization_config=config)
    if family == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(config, indent=2))
    return folder


def oracle(folder: Path) -> dict[str, Tensor]:
    """Weight name → float32 values as the library dequantizes them: [O, I], for experts [E, I, O] as their parameter lies.

    Everything is computed in float32, also where the library itself would round to 16 bits in the end.
    """
    config = quantization_config(folder)
    found, metadata = _read(folder)
    with torch.no_grad():
        return READERS[config["quant_method"]](found, config, metadata)


def values(folder: Path) -> dict[str, Tensor]:
    """The oracle's values and those of the tensors that are not quantized: what a float32 model must be loaded with."""
    result = oracle(folder)
    modules = {name.rpartition(".")[0] for name in result}
    for name, tensor in _read(folder)[0].items():
        module, _, local = name.rpartition(".")
        if module not in modules or local.endswith("bias"):
            result[name] = tensor.float()
    return result


def quantization_config(folder: Path) -> dict[str, Any]:
    """What config.json says; empty for a dense model."""
    return dict(json.loads((folder / "config.json").read_text()).get("quantization_config") or {})


def _read(folder: Path) -> tuple[Parts, dict[str, str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _modules(found: Parts, mark: str) -> Iterator[tuple[str, Parts]]:
    """Weight name and parts of every module that has a part of this name."""
    for name in found:
        if name.endswith(f".{mark}"):
            module = name.removesuffix(mark)
            yield f"{module}weight", {n.removeprefix(module): part for n, part in found.items() if n.startswith(module)}


def _packed(model: PreTrainedModel, pack: Callable[[nn.Linear], Parts]) -> Parts:
    """The model's state, with the parts of every linear layer but lm_head in place of its weight."""
    state: Parts = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            del state[f"{name}.weight"]
            state.update({f"{name}.{local}": part for local, part in pack(layer).items()})
    return state


def _make_one_sided(model: PreTrainedModel) -> None:
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data[::3] = layer.weight.data[::3].abs()
            layer.weight.data[1::3] = -layer.weight.data[1::3].abs()


# GPTQ, by gptqmodel


def _write_gptq(
    model: PreTrainedModel, bits: int = 4, group_size: int = 128, sym: bool = True, desc_act: bool = False,
    format: str = "gptq",
) -> tuple[Parts, dict[str, Any], dict[str, str]]:  # fmt: skip
    from gptqmodel.quantization import QuantizeConfig

    config = QuantizeConfig(
        bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, format=format, offload_to_disk=False,
        act_group_aware=group_size > 0 and not desc_act,
    )  # fmt: skip
    return _packed(model, lambda layer: _gptq_parts(layer, config)), config.to_dict(), {}


def _gptq_parts(layer: nn.Linear, config: Any) -> Parts:
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    scales_OG, zeros_OG, g_idx = _gptq_grid(layer.weight.float(), config)
    module = _gptq_module(config.to_dict(), layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.load_state_dict({name: part.float() for name, part in layer.state_dict().items()})
    module.pack_original(linear, scales_OG, zeros_OG, g_idx)  # pack() gives the same, after compiling C++ for a minute
    if config.format == "gptq":
        convert_gptq_v2_to_v1_format_module(module, config)
    return {name: part for name, part in module.state_dict().items() if part is not None}


def _gptq_grid(weight_OI: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zeros [O, G], and the group of every column. Act-order is any order; layers of one input share it."""
    from gptqmodel.quantization.quantizer import Quantizer

    columns = weight_OI.shape[1]
    size = columns if config.group_size == -1 else config.group_size
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    order = order if config.desc_act else torch.arange(columns)
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[order] = torch.arange(columns, dtype=torch.int32) // size
    quantizer = Quantizer(config)
    quantizer.configure(perchannel=True)
    quantizer.find_params(weight_OI[:, order].reshape(-1, size), weight=True)
    return quantizer.scale.view(len(weight_OI), -1), quantizer.zero.view(len(weight_OI), -1), g_idx


def _gptq_module(config: dict[str, Any], columns: int, rows: int, bias: bool = False) -> Any:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear(
        bits=config["bits"], group_size=config["group_size"], sym=config["sym"], desc_act=config["desc_act"],
        in_features=columns, out_features=rows, bias=bias,
    )  # fmt: skip


def _read_gptq(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``scales[g_idx] * (code - zero)``, by ``TorchLinear.dequantize_weight``; the label says which zeros these are."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    result = {}
    for name, parts in _modules(found, "qweight"):
        module = _gptq_module(config, len(parts["g_idx"]), parts["scales"].shape[1])
        for local in ("qweight", "qzeros", "g_idx"):
            setattr(module, local, parts[local].clone())
        module.scales = parts["scales"].float()
        if config["checkpoint_format"] == "gptq":
            convert_gptq_v1_to_v2_format_module(module, config["bits"], torch.int32)
        result[name] = module.dequantize_weight().T.contiguous()
    return result


# GPTQ, by auto-gptq 0.7.1


def auto_gptq() -> ModuleType | None:
    """auto-gptq, or None where it is not installed."""
    from qmerge.evaluation import loaders

    return loaders.import_auto_gptq() if importlib.util.find_spec("auto_gptq") else None


def auto_gptq_packed(
    weight_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor, g_idx: Tensor | None, bits: int, group_size: int
) -> Parts:
    """Parts of one weight as auto-gptq packs them; zeros count from 1 (it corrupts words at 0), values lie on the grid.

    Without ``g_idx`` by the class for sequential groups, else by the one for act-order: auto-gptq chooses alike.
    """
    rows, columns = weight_OI.shape
    module = _auto_gptq_module(bits, group_size, columns, rows, sequential=g_idx is None)
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.float16)
    linear.weight.data = weight_OI.half()
    module.pack(linear, scales_OG.clone(), zeros_OG.clone(), g_idx)  # clones: it subtracts 1 in place
    return {name: part.contiguous() for name, part in module.state_dict().items()}


def auto_gptq_product(parts: Parts, bits: int, group_size: int, x: Tensor) -> Tensor:
    """x · Wᵀ by auto-gptq's forward pass, with float32 scales; x is float32 [N, I]."""
    columns, rows = len(parts["g_idx"]), parts["scales"].shape[1]
    size = columns if group_size == -1 else group_size
    sequential = torch.equal(parts["g_idx"].long(), torch.arange(columns) // size)
    module = _auto_gptq_module(bits, group_size, columns, rows, sequential)
    module.load_state_dict(parts)
    module.scales = parts["scales"].float()
    with torch.no_grad():
        product: Tensor = module(x)
    return product


def _auto_gptq_module(bits: int, group_size: int, columns: int, rows: int, sequential: bool) -> Any:
    assert auto_gptq() is not None, "auto-gptq 0.7.1 is not installed"
    file = "qlinear_cuda_old" if sequential else "qlinear_cuda"
    cls = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{file}").QuantLinear
    return cls(bits, group_size, columns, rows, bias=False)


# AWQ, packed by gptqmodel, with the config that AutoAWQ writes


def _write_awq(model: PreTrainedModel, group_size: int) -> tuple[Parts, dict[str, Any], dict[str, str]]:
    config = {
        "bits": 4, "group_size": group_size, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
    return _packed(model, lambda layer: _awq_parts(layer, group_size)), config, {}


def _awq_parts(layer: nn.Linear, group_size: int) -> Parts:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    rows, columns = layer.weight.shape
    groups_OGI = layer.weight.float().view(rows, -1, group_size)
    low, high = groups_OGI.amin(-1, keepdim=True), groups_OGI.amax(-1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-(low / scales).round()).clamp(0, 15)
    linear = nn.Linear(columns, rows, bias=layer.bias is not None)
    linear.load_state_dict({name: part.float() for name, part in layer.state_dict().items()})
    # pack() does not clamp: the values must lie on the grid already
    linear.weight.data = (((groups_OGI / scales + zeros).round().clamp(0, 15) - zeros) * scales).view(rows, columns)
    module = AwqTorchLinear(
        bits=4, group_size=group_size, sym=False, desc_act=False, in_features=columns, out_features=rows,
        bias=layer.bias is not None, register_buffers=True,
    )  # fmt: skip
    module.pack(linear, scales.squeeze(-1), zeros.squeeze(-1))
    return dict(module.state_dict())


def _read_awq(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale``, by ``dequantize_gemm``."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    result = {}
    for name, parts in _modules(found, "qweight"):
        weight_IO = dequantize_gemm(
            parts["qweight"], parts["qzeros"], parts["scales"].float(), config["bits"], config["group_size"]
        )
        result[name] = weight_IO.T.contiguous()
    return result


# FP8 in blocks (DeepSeek, Qwen) and per tensor, by transformers


def _write_fp8(
    model: PreTrainedModel, block: tuple[int, int] | None = (128, 128), scale_fmt: str = "float"
) -> tuple[Parts, dict[str, Any], dict[str, str]]:
    from transformers import FineGrainedFP8Config

    scheme = "dynamic" if block else "static"
    config = FineGrainedFP8Config(activation_scheme=scheme, weight_block_size=block, scale_fmt=scale_fmt).to_dict()
    return _packed(model, lambda layer: _fp8_parts(layer, config)), {**config, "fmt": "e4m3"}, {}


def _fp8_parts(layer: nn.Linear, config: dict[str, Any]) -> Parts:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    rows, columns = layer.weight.shape
    block = config["weight_block_size"] or (rows, columns)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=SimpleNamespace(**config)))
    # transformers leaves blocks that end outside unquantized; DeepSeek's own converter quantizes them like this
    parts: Parts = quantize._quantize_one("weight", _to_blocks(layer.weight, block))
    parts["weight"] = parts["weight"][:rows, :columns]
    if config["weight_block_size"] is None:
        parts["weight_scale_inv"] = parts["weight_scale_inv"].reshape(())
        parts["activation_scale"] = torch.tensor(0.05)
    return {**parts, **({} if layer.bias is None else {"bias": layer.bias})}


def _to_blocks(weight_OI: Tensor, block: tuple[int, int]) -> Tensor:
    rows, columns = weight_OI.shape
    return nn.functional.pad(weight_OI, (0, -columns % block[1], 0, -rows % block[0]))


def _read_fp8(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``code * scale``, by the dequantization of the backward pass. The one of the loader infers blocks from the shapes."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    return {
        name: _dequantize_fp8_weight(
            parts["weight"], parts["weight_scale_inv"], config["weight_block_size"], torch.float32
        )
        for name, parts in _modules(found, "weight_scale_inv")
    }


# FP8 per row, for fbgemm's kernels


def _write_fbgemm(model: PreTrainedModel) -> tuple[Parts, dict[str, Any], dict[str, str]]:
    from transformers import FbgemmFp8Config

    config = FbgemmFp8Config(modules_to_not_convert=["lm_head"]).to_dict()
    return _packed(model, _fbgemm_parts), config, {}


def _fbgemm_parts(layer: nn.Linear) -> Parts:
    """fbgemm itself needs a GPU; transformers has the same quantization in torch."""
    from transformers.integrations.compressed_tensors import quantize_fp8_per_row

    codes, scales = quantize_fp8_per_row(layer.weight)
    parts = {"weight": codes, "weight_scale": scales.view(-1, 1)}
    return {**parts, **({} if layer.bias is None else {"bias": layer.bias})}


def _read_fbgemm(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``code * scale``, the meaning of the scales in fbgemm's product: no library has a dequantization of its own."""
    return {
        name: parts["weight"].float() * parts["weight_scale"].float() for name, parts in _modules(found, "weight_scale")
    }


# compressed-tensors


def _write_compressed(model: PreTrainedModel, preset: str, **args: Any) -> tuple[Parts, dict[str, Any], dict[str, str]]:
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    scheme = _scheme(preset, **args)
    state = _packed(model, lambda layer: _compressed_parts(layer, scheme))
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format, quantization_status="compressed", ignore=["lm_head"]
    )  # fmt: skip
    head = {"quant_method": "compressed-tensors", "version": compressed_tensors.__version__, "sparsity_config": {}}
    return state, {**config.model_dump(exclude={"quant_method"}), **head, "transform_config": {}}, {}


def _scheme(preset: str, **args: Any) -> Any:
    """A preset, with another group size (None: one scale per row); its format is the one the library infers."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    if args:
        strategy = "group" if args["group_size"] else "channel"
        scheme.weights = QuantizationArgs(**{**scheme.weights.model_dump(), "strategy": strategy, **args})
    scheme.format = infer_module_format(nn.Linear, scheme)
    return scheme


def _compressed_parts(layer: nn.Linear, scheme: Any) -> Parts:
    parts = _compressed(layer.weight, scheme)
    if scheme.input_activations and scheme.input_activations.dynamic is False:
        parts["input_scale"] = torch.tensor([0.05], dtype=layer.weight.dtype)
    return {**parts, **({} if layer.bias is None else {"bias": layer.bias})}


def _compressed(weight_OI: Tensor, scheme: Any) -> Parts:
    """Scales have the weight's dtype, as llm-compressor makes them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    low, high = _extremes(weight_OI, scheme.weights)
    parts = {"weight": weight_OI.detach()}
    if scheme.weights.strategy == "tensor_group":
        parts["weight_global_scale"] = generate_gparam(low.min(), high.max())
    scales, zeros = calculate_qparams(low, high, scheme.weights, parts.get("weight_global_scale"))
    parts.update(weight_scale=scales.to(weight_OI.dtype), weight_zero_point=zeros)
    compressed: Parts = BaseCompressor.get_value_from_registry(scheme.format).compress(parts, scheme)
    return compressed


def _extremes(weight_OI: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Least and greatest value of everything that shares a scale."""
    if args.strategy == "tensor":
        return weight_OI.min().view(1), weight_OI.max().view(1)
    if args.strategy == "channel":
        return weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True)
    if args.strategy == "block":
        height, width = args.block_structure
        filled = _to_blocks(weight_OI, (height, width))
        blocks = filled.view(len(filled) // height, height, -1, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight_OI.view(len(weight_OI), -1, args.group_size)
    return groups.amin(-1), groups.amax(-1)


def _read_compressed(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale`` by ``decompress``, with the scales cast to float32 beforehand.

    NVFP4 is ``code * (scale / global scale)``. For FP4 ``decompress`` unpacks to bfloat16 and rounds its result to it, so
    the two functions that it calls are called here.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    given = {name: value for name, value in config.items() if name in QuantizationConfig.model_fields}
    scheme = QuantizationConfig(**given).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    result = {}
    for name, parts in _modules(found, "weight_scale"):
        if "weight_packed" in parts and parts["weight_packed"].dtype == torch.uint8:
            result[name] = _decompressed_fp4(parts, scheme, compressor)
        else:
            parts["weight_scale"] = parts["weight_scale"].float()
            result[name] = compressor.decompress(parts, scheme)["weight"]
    return result


def _decompressed_fp4(parts: Parts, scheme: Any, compressor: Any) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, bytes_per_row = parts["weight_packed"].shape
    codes = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * bytes_per_row, dtype=torch.float32)
    scales = compressor._decompress_scale(parts["weight_scale"], torch.float32)
    dense: Tensor = dequantize(codes, scales, args=scheme.weights, global_scale=parts.get("weight_global_scale"))
    return dense


# MXFP4 experts (gpt-oss), read by transformers


def gpt_oss(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random gpt-oss in bfloat16."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    return GptOssForCausalLM(GptOssConfig(**{**GPT_OSS, **changes})).to(torch.bfloat16).eval()


def _write_mxfp4(model: PreTrainedModel) -> tuple[Parts, dict[str, Any], dict[str, str]]:
    """transformers packs experts on a GPU only; compressed-tensors has the same codes, scales and order of nibbles."""
    from transformers import Mxfp4Config

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    scheme = _scheme("MXFP4A16")
    state: Parts = dict(model.state_dict())
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        weight_EOI = state.pop(name).transpose(1, 2).contiguous()
        parts = _compressed(weight_EOI.flatten(0, 1), scheme)
        state[f"{name}_blocks"] = parts["weight_packed"].view(*weight_EOI.shape[:2], -1, 16)
        state[f"{name}_scales"] = parts["weight_scale"].view(*weight_EOI.shape[:2], -1)
    return state, Mxfp4Config(modules_to_not_convert=kept).to_dict(), {}


def _read_mxfp4(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``code * 2 ** (scale - 127)`` as [E, I, O], by ``convert_moe_packed_tensors``."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    names = [name.removesuffix("_blocks") for name in found if name.endswith("_blocks")]
    return {
        name: convert_moe_packed_tensors(found[f"{name}_blocks"], found[f"{name}_scales"], dtype=torch.float32)
        for name in names
    }


# HQQ, as transformers 4 saved it: the state dict of every HQQLinear, settings and all, as tensors


def _write_hqq(
    model: PreTrainedModel, nbits: int = 4, group_size: int = 64, axis: int = 1
) -> tuple[Parts, dict[str, Any], dict[str, str]]:
    from hqq.core.quantize import HQQLinear
    from transformers import HqqConfig

    config = HqqConfig(nbits=nbits, group_size=group_size, axis=axis).to_dict()

    def parts(layer: nn.Linear) -> Parts:
        made = HQQLinear(
            layer, config["quant_config"], compute_dtype=layer.weight.dtype, device="cpu", del_orig=False
        )  # fmt: skip
        return {name: part for name, part in made.state_dict().items() if part is not None}

    return _packed(model, parts), config, {}


def _read_hqq(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale``, by ``Quantizer.dequantize``, with scales and zeros in float32."""
    from hqq.core.quantize import _META_TYPE, Quantizer
    from hqq.core.utils import decode_safetensor_type

    result = {}
    for name, parts in _modules(found, "W_q"):
        meta = {key: decode_safetensor_type(parts[key], kind) for key, kind in _META_TYPE.items() if key in parts}
        meta.update(scale=meta["scale"].float(), zero=meta["zero"].float(), compute_dtype=torch.float32)
        result[name] = Quantizer.dequantize(parts["W_q"], meta)
    return result


# torchao, flattened for safetensors as transformers does


def _write_torchao(
    model: PreTrainedModel, config: str, group_size: int | None = None
) -> tuple[Parts, dict[str, Any], dict[str, str]]:
    import torchao.quantization as ao
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from transformers import TorchAoConfig

    args: dict[str, Any] = {"granularity": ao.PerGroup(group_size)} if group_size else {}
    if config == "IntxWeightOnlyConfig":
        args["weight_dtype"] = torch.int4  # type: ignore[attr-defined]
    settings = getattr(ao, config)(**args)
    ao.quantize_(model, settings, lambda layer, name: isinstance(layer, nn.Linear) and name != "lm_head")
    state, metadata = flatten_tensor_state_dict(model.state_dict())
    return state, TorchAoConfig(settings, modules_to_not_convert=["lm_head"]).to_dict(), metadata


def _read_torchao(found: Parts, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``(code - zero) * scale``, by the tensors' own ``dequantize``, with scale and result in float32."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    restored, left = unflatten_tensor_state_dict(found, metadata)
    assert not left, sorted(left)
    return {name: _torchao_values(tensor) for name, tensor in restored.items() if type(tensor) is not Tensor}


def _torchao_values(tensor: Any) -> Tensor:
    intx = type(tensor).__name__.startswith("Intx")  # it takes its dtype from the scales, the others as an argument
    values: Tensor = tensor.to(torch.float32).dequantize() if intx else tensor.dequantize(torch.float32)
    return values


WRITERS: dict[str, Callable[..., tuple[Parts, dict[str, Any], dict[str, str]]]] = {
    "gptq": _write_gptq, "awq": _write_awq, "fp8": _write_fp8, "fbgemm_fp8": _write_fbgemm, "mxfp4": _write_mxfp4,
    "compressed-tensors": _write_compressed, "hqq": _write_hqq, "torchao": _write_torchao,
}  # fmt: skip
"""Family → model and settings to state dict, quantization_config, and metadata of the safetensors file."""

READERS: dict[str, Callable[[Parts, dict[str, Any], dict[str, str]], dict[str, Tensor]]] = {
    "gptq": _read_gptq, "awq": _read_awq, "fp8": _read_fp8, "fbgemm_fp8": _read_fbgemm, "mxfp4": _read_mxfp4,
    "compressed-tensors": _read_compressed, "hqq": _read_hqq, "torchao": _read_torchao,
}  # fmt: skip
"""quant_method → tensors, quantization_config and metadata of a file to values."""


LOADABLE = set(KINDS) - {
    "fp8-odd",  # transformers infers blocks from the shapes: 320 rows in 3 blocks are an error, 192 in 2 are silently wrong
    "fbgemm-fp8",  # accepted_options for a GPU
    "hqq", "hqq-axis0", "hqq-2bit", "hqq-3bit", "hqq-8bit",  # transformers 5.23 leaves W_q over and starts at random weights
}  # fmt: skip
"""Kinds that transformers loads and runs on a CPU."""

EXACT = LOADABLE - {
    "awq", "awq-g32",  # gptqmodel computes in float16
    "ct-int4-asym", "ct-int4-asym-g32", "ct-nvfp4",  # dequantized on loading, to bfloat16
}  # fmt: skip
"""Kinds whose logits, as loaded here, are those of a float32 model with the oracle's values; of the rest within 1 %."""


def loads(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The stock loader's model, computing in float32, and what the loader says about missing and unexpected tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, device_map="cpu", **_options(quantization_config(folder))
    )  # fmt: skip
    for layer in model.modules():
        _in_float32(layer)
    return model.eval(), info


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """What the loader must be told beyond config.json. (A quantization_config of None makes it ignore the file's.)"""
    import transformers

    # gptqmodel's own choice of a kernel for 4 bits rounds to bfloat16, and takes few group sizes
    if config["quant_method"] == "gptq":
        return {"quantization_config": transformers.GPTQConfig(bits=config["bits"], backend="gptq_torch")}
    if config["quant_method"] == "awq":
        return {"quantization_config": transformers.AwqConfig(backend="torch_awq")}
    if config["quant_method"] == "compressed-tensors":
        weights = config["config_groups"]["group_0"]["weights"]
        # compressed-tensors 0.20 expects zero points that are not packed, and computes with FP4 in bfloat16 only
        if not weights["symmetric"] or (weights["type"], weights["num_bits"]) == ("float", 4):
            return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    return {}


def _in_float32(layer: nn.Module) -> None:
    """Takes away what rounds beside the weights: 16-bit scales and parameters, and activations that are quantized too."""
    if hasattr(layer, "qweight"):
        layer.scales = layer.scales.float()
    if hasattr(layer, "quantization_scheme"):
        layer.quantization_enabled = False  # type: ignore[assignment]
    for name, parameter in layer.named_parameters(recurse=False):
        if type(parameter.data) is not Tensor:
            setattr(layer, name, nn.Parameter(_torchao_values(parameter.data), requires_grad=False))
        elif parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
