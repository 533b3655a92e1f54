"""config.json of the output: dtype and quantization_config as the stock library would have written them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import AdapterError
from qmerge.formats.base import ModuleLayout, TargetFormat
from qmerge.types import Options, Step

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def output_config(
    base: Checkpoint, target: TargetFormat[Any], options: Options | None, layout: ModuleLayout
) -> dict[str, Any]:  # fmt: skip
    """The base's config for another format; ``options`` are those of the weights that are stored as ``target``."""
    config = without_quantization(base.config)
    if target.info.dense_dtype:
        dense_dtype = NAMES[target.info.dense_dtype]
        return {**with_dtype(config, dense_dtype), "dtype": dense_dtype}
    dtype = NAMES.get(base.dtype, "float32")
    if target.info.required_dtype:
        dtype = target.info.required_dtype
        config = {**with_dtype(config, dtype), "dtype": dtype}
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    assert options is not None
    quantization = target.quantization_config(options, shared_quantization_config(base, target), dtype, layout)
    return {**config, "quantization_config": quantization}


def shared_quantization_config(base: Checkpoint, target: TargetFormat[Any]) -> dict[str, Any]:
    """``quantization_config`` of the base, where it speaks of weights like the target's, else {}."""
    same = target.name in base.formats() or base.quantization.get("quant_method") == target.info.quant_method
    return base.quantization if same else {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config (and the configs of its parts, in a multimodal model) without ``quantization_config``."""
    return {
        name: without_quantization(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
        if name != "quantization_config"
    }


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config (and the configs of its parts) that names another dtype, wherever it names one."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("dtype", "torch_dtype"):
            result["dtype"] = dtype
        else:
            result[name] = with_dtype(value, dtype) if name.endswith("_config") and isinstance(value, dict) else value
    return result


def with_vocab_size(
    config: dict[str, Any], steps: tuple[Step, ...], embeddings: tuple[str, str] | None
) -> dict[str, Any]:
    """The config for as many tokens as the embeddings have rows, where the adapter brought larger or smaller ones.

    Raises:
        AdapterError: input and output embedding would differ in size.
    """
    if embeddings is None or not any(step.replacement and step.name in embeddings for step in steps):
        return config
    rows = {step.name: step.outputs[step.name].shape[0] for step in steps if step.name in embeddings and step.outputs}
    if len(set(rows.values())) > 1:
        raise AdapterError(
            f"the adapter resizes one embedding only: {', '.join(f'{name} has {n} rows' for name, n in rows.items())}; "
            f"train and save both (modules_to_save)"
        )
    return with_setting(config, "vocab_size", next(iter(rows.values())))


def with_setting(config: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A config with one setting changed, wherever it stands (multimodal models have it in their text part)."""
    inner = {key: {**part, name: value} for key, part in config.items() if key == "text_config" and name in part}
    return {**config, **inner, **({name: value} if name in config or not inner else {})}
