"""A checkpoint folder → its config, its tensors and its weights, from headers and small JSON files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qmerge.checkpoint.documents import ModelConfig, check_document, is_file_name, read_json
from qmerge.checkpoint.mistakes import missing_config_problem
from qmerge.errors import CheckpointError, listed
from qmerge.formats import all_formats, get_format
from qmerge.safetensors_io.disk import LONGEST_SHOWN
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo, Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

QUANTIZE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which auto-gptq and AutoAWQ kept ``quantization_config`` → its ``quant_method``, which they left out."""

MLX_METHOD = "mlx"
"""``quant_method`` of models that mlx_lm has quantized, as qmerge names it: in config.json they have none."""

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")

SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
"""dtype as config.json spells it → as safetensors does."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    folder   where it is
    config   config.json
    weights  by name, in the order of the files
    files    the safetensors files, sorted
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Weight]
    files: tuple[Path, ...]

    @property
    def dtype(self) -> str:
        """The model's dtype, in safetensors' spelling: as its config declares it, else ``stored_dtype``."""
        for config in (self.config, self.config.get("text_config") or {}):
            declared = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
            if declared in SAFETENSORS_NAMES:
                return SAFETENSORS_NAMES[declared]
        return self.stored_dtype

    @cached_property
    def stored_dtype(self) -> str:
        """The most common float dtype of the dense weights, by bytes, whatever the config declares."""
        sizes: dict[str, int] = {"F32": 0}  # where all weights are quantized
        for weight in self.weights.values():
            dtype = get_format(weight.format).info.dense_dtype
            if dtype:
                sizes[dtype] = sizes.get(dtype, 0) + weight.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def quantization(self) -> dict[str, Any]:
        """``quantization_config`` of the config, or of its text part in a multimodal model; {} where it has none."""
        text_config = self.config.get("text_config") or {}
        return dict(self.config.get("quantization_config") or text_config.get("quantization_config") or {})

    def formats(self) -> dict[str, int]:
        """Name of a format → how many weights are stored in it."""
        return self._formats

    @cached_property
    def _formats(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for weight in self.weights.values():
            counts[weight.format] = counts.get(weight.format, 0) + 1
        return counts


def scan(folder: Path, reader: Reader) -> Checkpoint:
    """Read config, index and headers of a checkpoint.

    Raises:
        CheckpointError: something is missing, contradicts something else, or is stored in an unknown way.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(missing_config_problem(folder))
    config = read_json(folder / "config.json", CheckpointError)
    check_document(config, ModelConfig, "config.json", CheckpointError)
    files = shard_files(folder)
    tensors = _read_headers(files, reader)
    _check_index(folder, tensors)
    # A checkpoint without weights, only for its ``quantization``, which formats need to find the weights.
    config = _with_mlx_config(_with_quantize_config(config, folder))
    quantization = Checkpoint(folder, config, {}, files).quantization
    checkpoint = Checkpoint(folder, config, _find_weights(tensors, reader, quantization), files)
    _check_quantization(checkpoint)
    return checkpoint


def _read_headers(files: tuple[Path, ...], reader: Reader) -> dict[str, TensorInfo]:
    """All tensors of several files, by name."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors_of_file, _ = read_header(file, CheckpointError, nbytes=reader.remote_size(file))
        duplicates = sorted(tensors_of_file.keys() & tensors.keys())
        if duplicates:
            first_file = tensors[duplicates[0]].file
            raise CheckpointError(f"{listed(duplicates)}: in {file.name} and in {first_file.name}; expected once")
        tensors.update(tensors_of_file)
    return tensors


def _with_quantize_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Old GPTQ and AWQ folders have ``quantization_config`` in a file of its own, not in config.json."""
    if config.get("quantization_config"):
        return config
    for name, method in QUANTIZE_CONFIGS.items():
        if (folder / name).is_file():
            quantization = {"quant_method": method, **read_json(folder / name, CheckpointError)}
            return {**config, "quantization_config": quantization}
    return config


def _with_mlx_config(config: dict[str, Any]) -> dict[str, Any]:
    """mlx_lm has ``quantization``, which it repeats as ``quantization_config``: without a ``quant_method``."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict) or "group_size" not in quantization:
        return config
    others = {name: value for name, value in config.items() if name != "quantization"}
    return {**others, "quantization_config": {"quant_method": MLX_METHOD, **quantization}}


def shard_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint: those of the index, else ``model.safetensors``.

    Raises:
        CheckpointError: a file is missing, or the model is stored in other files.
    """
    if (folder / INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{INDEX} names {listed(missing)}, which is not in {folder}. Download the model again."
            )
        return tuple(folder / name for name in names)
    if (folder / SINGLE).exists():
        return (folder / SINGLE,)
    pickles = [name for name in PICKLES if (folder / name).exists()]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickle files ({listed(pickles)}), which can run code when they are read; convert them to "
            f"safetensors first (AutoModelForCausalLM.from_pretrained(…).save_pretrained(…))."
        )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}: expected a model in safetensors files")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name → file name, from the index. A name that leads out of the folder is an error, as in huggingface_hub."""
    mapping = read_json(folder / INDEX, CheckpointError).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{INDEX}: weight_map must map tensor names to file names")
    for file in sorted(set(mapping.values())):
        if not is_file_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX} names {file[:LONGEST_SHOWN]!r}: expected a .safetensors file inside the model's folder"
            )
    return mapping


def _check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """The index and the headers must agree on which tensors there are, and on the file of each."""
    if not (folder / INDEX).exists():
        return
    file_of = _weight_map(folder)
    missing = sorted(file_of.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{INDEX} names {listed(missing)}, which is in no file. Download the model again.")
    extra = sorted(tensors.keys() - file_of.keys())
    if extra:
        raise CheckpointError(
            f"{tensors[extra[0]].file.name} holds {listed(extra)}, which {INDEX} does not name. Download the model again."
        )
    for name, info in tensors.items():
        if file_of[name] != info.file.relative_to(folder).as_posix():
            raise CheckpointError(
                f"{name!r} is in {info.file.name}, but {INDEX} names {file_of[name]} for it. Download the model again."
            )


def _find_weights(
    tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any]
) -> dict[str, Weight]:
    """Group tensors into weights: each format claims the tensors that have its marks; every tensor belongs to one weight.

    Returns:
        Name → weight, in the order of the files.
    """
    formats = all_formats()
    unclaimed = dict(tensors)
    weights: list[Weight] = []
    # Quantized formats first. Then raw, before dense formats: it also claims leftovers of quantized weights that have a
    # float dtype.
    for name in sorted(formats, key=lambda name: (not formats[name].info.is_quantized, name != "raw", name)):
        claimed = formats[name].find(unclaimed, reader, quantization)
        for weight in claimed:
            for part in weight.parts.values():
                del unclaimed[part.name]
        weights += claimed
    if unclaimed:
        raise CheckpointError(
            f"{listed(sorted(unclaimed))}: stored in a way that no format of qmerge knows; `qmerge formats` lists them"
        )
    position_of = _positions(tensors)
    weights.sort(key=lambda weight: min(position_of[part.name] for part in weight.parts.values()))
    return _by_name(weights)


def _positions(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Tensor name → its position in the order of files and offsets."""
    in_order = sorted(tensors.values(), key=lambda tensor: (tensor.file, tensor.offset))
    return {tensor.name: position for position, tensor in enumerate(in_order)}


def _by_name(weights: list[Weight]) -> dict[str, Weight]:
    result: dict[str, Weight] = {}
    for weight in weights:
        other = result.setdefault(weight.name, weight)
        if other is not weight:
            raise CheckpointError(
                f"{weight.name} is stored twice: as {other.format} and as {weight.format}; expected once"
            )
    return result


def _check_quantization(checkpoint: Checkpoint) -> None:
    """The config must declare the quantization that the tensors show."""
    method = checkpoint.quantization.get("quant_method")
    formats = all_formats()
    known_methods = sorted({known for fmt in formats.values() for known in fmt.info.read_methods})
    # Three contradictions: a method that no format reads; tensors of another method; no quantized tensor at all.
    if checkpoint.quantization and method not in known_methods:
        raise CheckpointError(
            f"the base is quantized with {method!r}, which this version does not read. "
            f"It reads dense models and: {', '.join(known_methods)}."
        )
    quantized = [weight for weight in checkpoint.weights.values() if formats[weight.format].info.is_quantized]
    if len({weight.format for weight in quantized}) > 1:
        raise CheckpointError(f"the base mixes several quantized formats: {checkpoint.formats()}; expected one")
    if quantized and method not in formats[quantized[0].format].info.read_methods:
        raise CheckpointError(
            f"{quantized[0].name} is stored as {quantized[0].format}, but config.json has quant_method {method!r}; "
            f"use the config.json that belongs to these files"
        )
    if checkpoint.quantization and not quantized:
        raise CheckpointError(
            f"config.json declares that the base is quantized with {method}, but no tensor is; "
            f"use the config.json that belongs to these files, or remove quantization_config from it"
        )
