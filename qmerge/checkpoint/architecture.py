"""What transformers knows about a model's architecture: its modules, its embeddings, and which layers loaders quantize.

The questions are put to a model that transformers builds without weights. They only come up where the tensors on disk do
not give the answer: a dense base that gets quantized, or GPT-2's Conv1D, whose dense weights are [I, O] but are quantized
as [O, I]. No code from the checkpoint is run: an architecture that transformers does not know is an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from qmerge.checkpoint.config import with_dtype
from qmerge.errors import CheckpointError

USUAL_NAMES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""``model_type`` → class of models whose embeddings are ``model.embed_tokens`` and ``lm_head`` (a test asks transformers)."""

SPECIAL_FLOAT = "__float__"
"""Key of infinities and NaN in config.json (transformers/configuration_utils.py)."""


@dataclass(frozen=True, kw_only=True)
class ModuleKinds:
    """How stock loaders treat the modules of a model, by module name.

    quantizable  modules that become 4- or 8-bit
    conv1d       Conv1D modules (GPT-2), whose dense weight is [I, O]
    skipped      patterns of modules that the loader leaves dense, as its skip list names them
    towers       linear layers of a multimodal model that are not in its text model
    """

    quantizable: frozenset[str]
    conv1d: frozenset[str]
    skipped: tuple[str, ...]
    towers: frozenset[str] = frozenset()


def module_kinds(config: Mapping[str, Any], skip: Sequence[str] | None) -> ModuleKinds:
    """Build the model on the meta device and apply transformers' own rules to its modules.

    Args:
        config: config.json of the base.
        skip: ``llm_int8_skip_modules`` of the quantization config; None where it has none.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    # As text, the config can be the key of a cache: a plan asks several times, and building a model takes seconds.
    return _module_kinds(json.dumps(config), None if skip is None else tuple(skip))


@lru_cache(maxsize=8)
def _module_kinds(config: str, skip: tuple[str, ...] | None) -> ModuleKinds:
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = meta_model(json.loads(config))
    _untie(model)
    # None is not the same as []: transformers then skips the output embedding, tied weights and the last module.
    skip_list = None if skip is None else list(skip)
    skipped = HfQuantizer.get_modules_to_not_convert(model, skip_list, getattr(model, "_keep_in_fp32_modules", None))
    conv1d: set[str] = set()
    linear: list[str] = []
    special: list[str] = []  # of classes of their own, which only compressed-tensors takes for linear layers (routers)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            conv1d.add(name)
        if type(module) is torch.nn.Linear or name in conv1d:
            linear.append(name)
        elif isinstance(module, torch.nn.Linear):
            special.append(name)
    # Other libraries take names where transformers takes patterns (compressed-tensors: DeepSeek V4's "compressor.kv_proj").
    named: list[str] = []
    for pattern in skipped:
        matching = [name for name in linear if not should_convert_module(name, [pattern])]
        named += matching or [pattern]
    return ModuleKinds(
        quantizable=frozenset(name for name in linear if should_convert_module(name, skipped)),
        conv1d=frozenset(conv1d),
        skipped=tuple(dict.fromkeys([*named, *special])),
        towers=frozenset(_linear_layers_outside_text(model)),
    )


def _untie(model: Any) -> None:
    """Give tied weights parameters of their own, as they are when loaders choose what stays dense.

    They leave the last parameter's module dense: the output embedding, but of a tied model the layer before it (Gemma 3n).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in parameters.keys() & getattr(model, "all_tied_weights_keys", {}).keys():
        module, _, local = name.rpartition(".")
        own = torch.nn.Parameter(parameters[name].detach(), requires_grad=False)
        setattr(model.get_submodule(module), local, own)


def _linear_layers_outside_text(model: Any) -> set[str]:
    """Linear layers of the vision and audio towers, and of the projectors between them and the text model."""
    # The config of a text-only model is its own text config.
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return set()
    text_modules = {id(module) for module in (*model.get_decoder().modules(), model.get_output_embeddings())}
    outside: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and id(module) not in text_modules:
            outside.add(name)
    return outside


def auto_classes(listed: str) -> Mapping[str, str | tuple[str, ...]]:
    """One of transformers' lists of classes: ``model_type`` → name of the model class, or of several.

    Args:
        listed: ``SEQUENCE_CLASSIFICATION`` for ``MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES``; "" for ``MODEL_MAPPING_NAMES``.
    """
    from transformers.models.auto import modeling_auto

    prefix = f"MODEL_FOR_{listed}" if listed else "MODEL"
    classes: Mapping[str, str | tuple[str, ...]] = getattr(modeling_auto, f"{prefix}_MAPPING_NAMES")
    return classes


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether input and output embedding are one tensor.

    A config that does not say so leaves it to its class (Gemma ties by default).
    """
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    import transformers

    try:
        return bool(transformers.AutoConfig.for_model(str(config.get("model_type"))).tie_word_embeddings)
    except (ValueError, AttributeError):
        return False


def tied_embedding_weights(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The same as ``embedding_weights`` where the model ties the two, else None."""
    return embedding_weights(config) if ties_embeddings(config) else None


def embedding_weights(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Names of the weights of the input and the output embedding, whether or not the model ties them.

    None where the model lacks one of them, or where transformers does not know the architecture.
    """
    if config.get("model_type") in USUAL_NAMES and config.get("architectures") == [USUAL_NAMES[config["model_type"]]]:
        return "model.embed_tokens.weight", "lm_head.weight"  # without building the model, which takes seconds
    return _embedding_weights(json.dumps(config))


@lru_cache(maxsize=8)
def _embedding_weights(config: str) -> tuple[str, str] | None:
    try:
        model: Any = meta_model(json.loads(config))
    except CheckpointError:
        return None
    return embedding_weights_of(model)


def embedding_weights_of(model: Any) -> tuple[str, str] | None:
    """The same of a model that is built."""
    try:
        embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # vision and speech models have none
        return None
    # transformers gives the modules; only the model knows their names.
    name_of = {id(module): name for name, module in model.named_modules()}
    input_module, output_module = (name_of.get(id(module)) for module in embeddings)
    if not input_module or not output_module:
        return None
    return f"{input_module}.weight", f"{output_module}.weight"


def meta_model(config: Mapping[str, Any]) -> torch.nn.Module:
    """The model of a config.json on the meta device: modules and shapes, no memory.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    consequence = (
        "so it is not known which modules are linear layers. Use a 16-bit target, or a base that is quantized already"
    )
    return _build(config, torch.device("meta"), consequence)


def empty_model(config: Mapping[str, Any]) -> torch.nn.Module:
    """The same in float32 and with its buffers (rotary frequencies, masks), ready to run once weights are loaded.

    Experts run one after the other in plain matrix products, whichever kernels are installed.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    from accelerate import init_empty_weights

    consequence = "so it cannot be run. Merging needs no run: --calibration none"
    model: Any = _build(with_dtype(config, "float32"), init_empty_weights(include_buffers=False), consequence)
    # In fused kernels, the product with a single expert could not be seen (calibration/capture.py).
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    module: torch.nn.Module = model
    return module


def _build(config: Mapping[str, Any], device: AbstractContextManager[Any], consequence: str) -> torch.nn.Module:
    """The model that ``architectures`` of a config names, else the causal language model of its ``model_type``.

    Args:
        device: the context in which modules are created; it decides where their parameters are.
        consequence: the end of the error message, after "transformers cannot build …".
    """
    import transformers

    # quantization_config would make transformers look for kernels, auto_map for code inside the checkpoint.
    kept = {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}
    plain = _with_special_floats(kept)
    # The class that was saved may have more than the causal language model: a vision tower, another head.
    names = config.get("architectures") or []
    model_class = getattr(transformers, str(names[0]), None) if names else None
    try:
        with warnings.catch_warnings(), device:
            warnings.simplefilter("ignore")
            parsed = transformers.AutoConfig.for_model(**plain)
            if model_class:
                model: torch.nn.Module = model_class._from_config(parsed)
            else:
                model = transformers.AutoModelForCausalLM.from_config(parsed)
            return model
    except Exception as cause:  # every architecture's own code may raise something else
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build {names or config.get('model_type')!r}, {consequence}. "
            f"({' '.join(str(cause).split())[:160]})"
        ) from cause


def _with_special_floats(value: Any) -> Any:
    """Replace ``{"__float__": "Infinity"}``, as transformers writes what JSON has no number for, by that number.

    Bamba, Granite 4 and Nemotron-H have it in ``time_step_limit``.
    """
    if isinstance(value, dict):
        if value.keys() == {SPECIAL_FLOAT}:
            return float(value[SPECIAL_FLOAT])
        return {name: _with_special_floats(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_with_special_floats(entry) for entry in value]
    return value
