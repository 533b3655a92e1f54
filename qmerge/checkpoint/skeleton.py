"""Which modules the stock loader would quantize, asked of transformers itself on a model without weights.

Only needed where tensors do not tell: a dense base that gets quantized, and GPT-2's Conv1D, whose dense weights lie as
[I, O] but are quantized as [O, I]. No code from the checkpoint is run: an architecture that transformers does not
know is an error, with the way out.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from qmerge.checkpoint.config import with_dtype
from qmerge.errors import CheckpointError


@dataclass(frozen=True)
class Skeleton:
    """``quantizable``: modules that become 4- or 8-bit; ``conv1d``: modules whose dense weight lies as [I, O];
    ``skipped``: what the loader leaves dense, as its skip list names it; ``towers``: linear layers of a multimodal model
    that are not in its text model."""

    quantizable: frozenset[str]
    conv1d: frozenset[str]
    skipped: tuple[str, ...]
    towers: frozenset[str] = frozenset()


def skeleton(config: Mapping[str, Any], skip: Sequence[str] | None) -> Skeleton:
    """Build the model on the meta device and ask transformers' own rules.

    Args:
        config: config.json of the base.
        skip: ``llm_int8_skip_modules`` of the quantization config, if any.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    return _skeleton(json.dumps(config), None if skip is None else tuple(skip))


@lru_cache(maxsize=8)
def _skeleton(config: str, skip: tuple[str, ...] | None) -> Skeleton:
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = meta_model(json.loads(config))
    names = None if skip is None else list(skip)
    skipped = HfQuantizer.get_modules_to_not_convert(model, names, getattr(model, "_keep_in_fp32_modules", None))
    conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    chosen = {name for name in linear | conv1d if should_convert_module(name, skipped)}
    return Skeleton(frozenset(chosen), frozenset(conv1d), tuple(skipped), frozenset(beside_text(model)))


def beside_text(model: Any) -> set[str]:
    """Linear layers of the vision and audio towers, and of what joins them to the text."""
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return set()
    text = {id(module) for module in (*model.get_decoder().modules(), model.get_output_embeddings())}
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name for name, module in linear if id(module) not in text}


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether input and output embedding are one tensor; what a config leaves out, its class decides (Gemma ties)."""
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    import transformers

    try:
        return bool(transformers.AutoConfig.for_model(str(config.get("model_type"))).tie_word_embeddings)
    except (ValueError, AttributeError):
        return False


def tied_embeddings(config: Mapping[str, Any], whatever: bool = False) -> tuple[str, str] | None:
    """Names of the input and the output embedding's weight, where the model ties them (``whatever``: tied or not); None
    where it does not, or where transformers does not know the architecture."""
    return _embeddings(json.dumps(config)) if whatever or ties_embeddings(config) else None


@lru_cache(maxsize=8)
def _embeddings(config: str) -> tuple[str, str] | None:
    try:
        model: Any = meta_model(json.loads(config))
    except CheckpointError:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    found = [names.get(id(module)) for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    return (f"{found[0]}.weight", f"{found[1]}.weight") if found[0] and found[1] else None


def meta_model(config: Mapping[str, Any]) -> torch.nn.Module:
    """The model of a config.json without weights."""
    unknown = (
        "so it is not known which modules are linear layers. Use a 16-bit target, or a base that is quantized already"
    )
    return _built(config, torch.device("meta"), unknown)


def empty_model(config: Mapping[str, Any]) -> torch.nn.Module:
    """The same with its buffers (rotary frequencies, masks), so that it can run in float32 once weights are put in.

    Experts run one after the other, in plain products, whichever kernels there are.
    """
    from accelerate import init_empty_weights

    unknown = "so it cannot be run. Merging needs no run: --calibration none"
    model: Any = _built(with_dtype(config, "float32"), init_empty_weights(include_buffers=False), unknown)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    built: torch.nn.Module = model
    return built


def _built(config: Mapping[str, Any], place: Any, unknown: str) -> torch.nn.Module:
    import transformers

    plain = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
    names = config.get("architectures") or []
    model_class = getattr(transformers, str(names[0]), None) if names else None
    try:
        with warnings.catch_warnings(), place:
            warnings.simplefilter("ignore")
            parsed = transformers.AutoConfig.for_model(**plain)
            factory = model_class or transformers.AutoModelForCausalLM
            model: torch.nn.Module = factory._from_config(parsed) if model_class else factory.from_config(parsed)
            return model
    except Exception as cause:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build {names or config.get('model_type')!r}, {unknown}. "
            f"({' '.join(str(cause).split())[:160]})"
        ) from cause
