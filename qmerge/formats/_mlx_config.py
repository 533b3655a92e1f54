"""``quantization`` in config.json as mlx_lm writes it, and the tensors of one weight that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats._packing import WORD
from qmerge.formats._tensors import modules_with
from qmerge.formats.base import FormatInfo
from qmerge.types import TensorInfo

QUANT_METHOD = "mlx"
"""``quant_method`` that ``checkpoint.scan`` adds to ``quantization``: mlx_lm writes none."""

AFFINE = "affine"

MODES = (AFFINE, "mxfp4", "nvfp4")
"""``mode`` → how numbers are stored. Without one it is affine: older versions of mlx_lm had no other."""

TAKE_CONFIG = "Take the config.json that belongs to these files"


@dataclass(frozen=True)
class MlxSettings:
    """How mlx quantizes one module."""

    bits: int
    group_size: int
    mode: str = AFFINE

    def as_config(self) -> dict[str, Any]:
        """As an entry of config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def mlx_info(name: str, accepted_options: tuple[str, ...] = ()) -> FormatInfo:
    """Facts that all of MLX's formats share."""
    return FormatInfo(
        name=name,
        quant_method=QUANT_METHOD,
        loaders="mlx_lm, LM Studio",
        accepted_options=accepted_options,
        chosen_by_auto=False,  # it runs on Apple machines
        quantizes_embeddings=True,
    )


def modules_of_mode(
    mode: str, tensors: Mapping[str, TensorInfo], quantization: Mapping[str, Any]
) -> list[tuple[str, MlxSettings]]:
    """The modules that mlx has quantized in this way, each with its settings.

    Raises:
        CheckpointError: the settings of a module are not complete, or of a mode that is not read.
    """
    if not quantization or quantization.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        return []
    of_all = [(module, settings_of(module, quantization)) for module in quantized_modules(tensors)]
    return [(module, settings) for module, settings in of_all if settings.mode == mode]


def quantized_modules(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Modules that have packed codes, scales, or both: where one of them is missing, an error should name it."""
    modules = dict.fromkeys(modules_with("scales", tensors))
    for module in modules_with("weight", tensors):
        if tensors[f"{module}.weight"].dtype == "U32":
            modules[module] = None
    return list(modules)


def settings_of(module: str, quantization: Mapping[str, Any]) -> MlxSettings:
    """The module's own entry, else that of the model.

    Raises:
        CheckpointError: the entry is not complete, or of a mode that is not read.
    """
    entry = quantization.get(module)
    if not isinstance(entry, Mapping):
        entry = quantization
    bits, group_size, mode = entry.get("bits"), entry.get("group_size"), entry.get("mode", AFFINE)
    if not isinstance(bits, int) or not isinstance(group_size, int) or not 1 <= bits <= 8 or group_size < 1:
        raise CheckpointError(
            f"config.json: quantization gives {module} bits {bits!r} and group_size {group_size!r}; expected numbers such as 4 "
            f"and 64. {TAKE_CONFIG}"
        )
    if mode not in MODES:
        raise CheckpointError(
            f"{module} is stored in MLX's mode {mode!r}; qmerge reads {', '.join(MODES)}: take that variant of the model"
        )
    return MlxSettings(bits, group_size, mode)


def shape_of(module: str, parts: Mapping[str, TensorInfo], settings: MlxSettings) -> tuple[int, int]:
    """(O, I) of a weight.

    Raises:
        CheckpointError: it is a stack of experts; the shapes do not belong together.
    """
    shapes = {local: list(info.shape) for local, info in parts.items()}
    if len(parts["weight"].shape) == 3:
        raise CheckpointError(
            f"{module} is a stack of experts, as mlx_lm stores them, which qmerge does not read: use the same model in Hugging "
            f"Face's form as --base"
        )
    if all(len(info.shape) == 2 for info in parts.values()):
        rows, words = parts["weight"].shape
        groups = parts["scales"].shape[1]
        columns = groups * settings.group_size
        is_whole = columns * settings.bits == words * WORD
        if is_whole and all(info.shape == (rows, groups) for local, info in parts.items() if local != "weight"):
            return rows, columns
    raise CheckpointError(
        f"{module}: tensors of shapes {shapes} are not {settings.bits} bits in groups of {settings.group_size}, as config.json "
        f"says. {TAKE_CONFIG}"
    )


def check_storable(name: str, shape: tuple[int, int], group_size: int, advice: str) -> None:
    """Check that mlx_lm would find a weight where qmerge writes it, and that groups divide its inputs.

    Raises:
        RecipeError: it would not, or they do not; ``advice`` says what to do about the second.
    """
    if ".experts." in name:
        raise RecipeError(f"{name} is an expert, which mlx_lm stores in a stack: use another target, or a 16-bit one")
    if shape[1] % group_size:
        raise RecipeError(
            f"{name} has {shape[1]} inputs, which is not a multiple of the group size {group_size}: {advice}"
        )


def with_quantization(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with both names that mlx_lm gives the quantization, and with ``rope_theta``.

    transformers 5 writes it into ``rope_parameters``, where most models of mlx_lm 0.32 do not look: they would take their
    default.
    """
    rope = config.get("rope_parameters") or {}
    old_names = {}
    if "rope_theta" in rope:
        old_names["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        old_names["rope_scaling"] = rope
    return {**old_names, **config, "quantization": quantization, "quantization_config": quantization}
