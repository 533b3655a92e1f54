"""A checkpoint folder → its tensors, its weights and its config, from headers and small JSON files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from qmerge.errors import CheckpointError, InputError, listed
from qmerge.formats import all_formats, get_format
from qmerge.safetensors_io.header import read_header, strict_json
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TensorInfo, Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where auto-gptq and AutoAWQ kept ``quantization_config`` → what they did not say in it: the method."""

LARGEST_JSON = 64 * 2**20
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. ``weights`` is in the order of the files; ``files`` are the safetensors files, sorted."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Weight]
    files: tuple[Path, ...]

    @property
    def dtype(self) -> str:
        """The model's own dtype, safetensors spelling: what the config says, else the one that is stored."""
        named = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
        for config in (self.config, self.config.get("text_config") or {}):
            declared = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
            if declared in named:
                return named[declared]
        return self.stored_dtype

    @property
    def stored_dtype(self) -> str:
        """The most common float dtype of the dense weights, by bytes, whatever the config says."""
        sizes: dict[str, int] = {"F32": 0}
        for weight in self.weights.values():
            dtype = get_format(weight.format).info.dense_dtype
            if dtype:
                sizes[dtype] = sizes.get(dtype, 0) + weight.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def quantization(self) -> dict[str, Any]:
        """``quantization_config`` of the config (of its text part in a multimodal model), or {}."""
        text = self.config.get("text_config") or {}
        return dict(self.config.get("quantization_config") or text.get("quantization_config") or {})

    def formats(self) -> dict[str, int]:
        """How many weights are stored in each format."""
        counts: dict[str, int] = {}
        for weight in self.weights.values():
            counts[weight.format] = counts.get(weight.format, 0) + 1
        return counts


def scan(folder: Path, reader: Reader) -> Checkpoint:
    """Read a checkpoint's config, index and headers.

    Raises:
        CheckpointError: something is missing, lies, contradicts something else, or is stored in an unknown way.
    """
    config = read_json(folder / "config.json", CheckpointError)
    files = shard_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        found, _ = read_header(file, CheckpointError)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{listed(twice)}: in {file.name} and in {tensors[twice[0]].file.name}; expected once"
            )
        tensors.update(found)
    check_index(folder, tensors)
    config = with_quantize_config(config, folder)
    quantization = Checkpoint(folder, config, {}, files).quantization
    checkpoint = Checkpoint(folder, config, find_weights(tensors, reader, quantization), files)
    check_quantization(checkpoint)
    return checkpoint


def with_quantize_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Old GPTQ and AWQ folders have ``quantization_config`` in a file of its own, which config.json does not repeat."""
    for name, method in QUANTIZE_CONFIGS.items():
        if not config.get("quantization_config") and (folder / name).is_file():
            return {
                **config,
                "quantization_config": {"quant_method": method, **read_json(folder / name, CheckpointError)},
            }
    return config


def shard_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up a checkpoint: those of the index, else ``model.safetensors``."""
    if (folder / INDEX).exists():
        names = sorted(set(weight_map(folder).values()))
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


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name → file name, from the index; names that leave the folder are refused (huggingface_hub's rule)."""
    mapping = read_json(folder / INDEX, CheckpointError).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{INDEX}: weight_map must map tensor names to file names")
    for file in sorted(set(mapping.values())):
        # Parsed as a Windows path everywhere: drives, UNC shares and backslashes are seen on every system.
        path = PureWindowsPath(file)
        if path.drive or path.root or ".." in path.parts or path.suffix != ".safetensors":
            raise CheckpointError(f"{INDEX} names {file!r}: expected a .safetensors file inside the model's folder")
    return mapping


def check_index(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """The index and the headers must tell the same: every tensor, and in which file it is."""
    if not (folder / INDEX).exists():
        return
    mapping = weight_map(folder)
    missing = sorted(mapping.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{INDEX} names {listed(missing)}, which is in no file. Download the model again.")
    extra = sorted(tensors.keys() - mapping.keys())
    if extra:
        raise CheckpointError(f"{tensors[extra[0]].file.name} holds {listed(extra)}, which {INDEX} does not name")
    for name, info in tensors.items():
        if mapping[name] != info.file.relative_to(folder).as_posix():
            raise CheckpointError(f"{INDEX} says that {name!r} is in {mapping[name]}, but it is in {info.file.name}")


def find_weights(
    tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any]
) -> dict[str, Weight]:
    """Group tensors into weights: each format claims what carries its marks, and every tensor belongs to one weight."""
    formats = all_formats()
    left = dict(tensors)
    weights: list[Weight] = []
    # raw is asked before dense formats: it knows parts that a quantized weight left behind, also those of a float dtype
    for name in sorted(formats, key=lambda name: (not formats[name].info.is_quantized, name != "raw", name)):
        claimed = formats[name].find(left, reader, quantization)
        for weight in claimed:
            for part in weight.parts.values():
                del left[part.name]
        weights += claimed
    if left:
        raise CheckpointError(f"{listed(sorted(left))}: stored in a way that no format of qmerge knows")
    by_name: dict[str, Weight] = {}
    for weight in weights:
        if (other := by_name.setdefault(weight.name, weight)) is not weight:
            raise CheckpointError(
                f"{weight.name} is stored twice: as {other.format} and as {weight.format}; expected once"
            )
    order = {info.name: place for place, info in enumerate(sorted(tensors.values(), key=lambda t: (t.file, t.offset)))}
    weights.sort(key=lambda weight: min(order[part.name] for part in weight.parts.values()))
    return {weight.name: weight for weight in weights}


def check_quantization(checkpoint: Checkpoint) -> None:
    """What the config says about quantization must be what the tensors show."""
    method = checkpoint.quantization.get("quant_method")
    formats = all_formats()
    known = sorted({name for format in formats.values() for name in format.info.read_methods})
    if checkpoint.quantization and method not in known:
        raise CheckpointError(
            f"the base is quantized with {method!r}, which this version does not read. "
            f"It reads dense models and: {', '.join(known)}."
        )
    stored = [weight for weight in checkpoint.weights.values() if formats[weight.format].info.is_quantized]
    if len({weight.format for weight in stored}) > 1:
        raise CheckpointError(f"the base mixes several quantized formats: {checkpoint.formats()}; expected one")
    if stored and method not in formats[stored[0].format].info.read_methods:
        raise CheckpointError(
            f"{stored[0].name} is stored as {stored[0].format}, but config.json says quant_method {method!r}; "
            f"take the config.json that belongs to these files"
        )
    if checkpoint.quantization and not stored:
        raise CheckpointError(
            f"config.json says that the base is quantized with {method}, but no tensor is; "
            f"take the config.json that belongs to these files, or remove quantization_config from it"
        )


def read_json(path: Path, error: type[InputError]) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB, without duplicate keys."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise error(f"{path.name}: larger than {LARGEST_JSON >> 20} MiB")
        return strict_json(path.read_bytes(), path.name, error)
    except OSError as cause:
        raise error(f"{path.name} cannot be read: {cause.strerror} ({path})") from cause
