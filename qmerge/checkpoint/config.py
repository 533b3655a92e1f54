"""config.json of the output: dtype and quantization_config as the stock library would have written them.

A multimodal model has the configs of its parts inside its own: ``text_config``, ``vision_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import AdapterError
from qmerge.formats.base import ModuleLayout, TargetFormat
from qmerge.types import Options, Step

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""dtype in safetensors' spelling → in torch's, which config.json uses."""


def output_config(
    base: Checkpoint, target: TargetFormat[Any], options: Options | None, layout: ModuleLayout
) -> dict[str, Any]:
    """The base's config for another format.

    Args:
        options: of the weights that are stored as ``target``; None for a dense target.
        layout: which modules these are, and which stay dense.
    """
    config = without_quantization(base.config)
    if target.info.dense_dtype:
        # transformers loads in the declared dtype, so all parts of the model must declare the stored one.
        dense_dtype = TORCH_NAMES[target.info.dense_dtype]
        return {**with_dtype(config, dense_dtype), "dtype": dense_dtype}
    # The dtype in which loaders compute with quantized weights, and that of the dense ones.
    dtype = TORCH_NAMES.get(base.dtype, "float32")
    if target.info.required_dtype:
        dtype = target.info.required_dtype
        config = {**with_dtype(config, dtype), "dtype": dtype}
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    if target.info.container:
        return config  # such a file holds its own keys
    assert options is not None
    quantization = target.quantization_config(options, shared_quantization_config(base, target), dtype, layout)
    assert quantization is not None
    return target.complete_config(config, quantization)


def shared_quantization_config(base: Checkpoint, target: TargetFormat[Any]) -> dict[str, Any]:
    """``quantization_config`` of the base if it was written by the target's library, else {}."""
    base_method = base.quantization.get("quant_method")
    if target.info.name in base.formats() or base_method == target.info.quant_method:
        return base.quantization
    return {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and the configs of its parts, without ``quantization_config``."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name == "quantization_config":
            continue
        result[name] = without_quantization(value) if _is_config_of_part(name, value) else value
    return result


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config, and the configs of its parts, with another dtype wherever they have one.

    ``torch_dtype``, the name of older versions of transformers, becomes ``dtype``.
    """
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("dtype", "torch_dtype"):
            result["dtype"] = dtype
        elif _is_config_of_part(name, value):
            result[name] = with_dtype(value, dtype)
        else:
            result[name] = value
    return result


def _is_config_of_part(name: str, value: Any) -> bool:
    return name.endswith("_config") and isinstance(value, dict)


def with_vocab_size(
    config: dict[str, Any], steps: tuple[Step, ...], embeddings: tuple[str, str] | None
) -> dict[str, Any]:
    """The config with as many tokens as the embeddings have rows, if the adapter replaces them.

    Args:
        embeddings: names of the weights of input and output embedding, if they are known.

    Raises:
        AdapterError: input and output embedding would differ in size.
    """
    if embeddings is None or not any(step.replacement and step.name in embeddings for step in steps):
        return config
    rows: dict[str, int] = {}
    for step in steps:
        if step.name in embeddings and step.outputs:
            rows[step.name] = step.outputs[step.name].shape[0]
    if len(set(rows.values())) > 1:
        sizes = ", ".join(f"{name} has {count} rows" for name, count in rows.items())
        raise AdapterError(f"the adapter resizes only one embedding: {sizes}; train and save both (modules_to_save)")
    return with_setting(config, "vocab_size", next(iter(rows.values())))


def with_setting(config: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A config with one setting changed wherever it is: in the config, in its ``text_config``, or in both."""
    result = dict(config)
    text_config = config.get("text_config") or {}
    if name in text_config:
        result["text_config"] = {**text_config, name: value}
    if name in config or name not in text_config:
        result[name] = value
    return result
