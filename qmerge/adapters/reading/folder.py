"""An adapter folder, as PEFT or mlx_lm saves it → its change of each weight, with every tensor accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qmerge import hub
from qmerge.adapters import all_kinds, get_kind
from qmerge.adapters.reading import mlx
from qmerge.adapters.reading.mistakes import missing_config_problem
from qmerge.adapters.reading.patterns import matches
from qmerge.adapters.reading.placement import placed_on_disk
from qmerge.adapters.reading.saved_weights import is_saved_module
from qmerge.checkpoint.documents import AdapterConfig, check_document, read_json
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Replacement, TensorInfo, Update

CONFIG, TENSORS = hub.ADAPTER_CONFIG, "adapter_model.safetensors"

PREFIX = "base_model.model."
"""Beginning of the names of the tensors of a module."""

SHARED_PREFIX = "base_model."
"""Beginning of the names of the tensors that all modules of an adapter share (VeRA's projections)."""

DEFAULT = "default"
"""peft's name for an adapter that was given none."""

NAMED = re.compile(
    r"(?P<part>.+\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag|"
    r"modules_to_save|trainable_tokens_delta))"
    r"\.(?P<name>(?!weight$|bias$)[^.]+)(?P<leaf>\.(?:.+\.)?(?:weight|bias))?"
)
"""A tensor's name with the adapter's name in it, as in a model's state dict. peft removes it when it saves."""

TIED_BY_PEFT = ("embed_tokens", "lm_head")
"""Names of embeddings that peft keeps tied (peft/utils/constants.py, EMBEDDING_LAYER_NAMES)."""

INTEGERS = ("I64", "I32", "I16", "U8")
"""dtypes of indices."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was read, or several as one.

    folder    where it was read from
    kind      name of its adapter kind
    config    adapter_config.json
    updates   name of a weight of the base → its update
    replaced  name of a weight of the base → its new values
    tensors   name of a weight of the base → the adapter's tensors that its change is made of, by their names in the file
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    updates: dict[str, Update]
    replaced: dict[str, Replacement]
    tensors: dict[str, list[str]]


def read_adapter(folder: Path, reader: Reader, name: str | None = None, names: Names | None = None) -> Adapter:
    """Read an adapter folder of PEFT or mlx_lm.

    Args:
        folder: as ``PeftModel.save_pretrained`` or ``mlx_lm.lora`` writes it.
        reader: of its tensors.
        name: of the adapter, where the file may contain several.
        names: of the base's weights. None: names stay as the adapter has them, and adapters that need the base are an error.

    Raises:
        AdapterError: pickle, an unsupported kind or option, a tensor that is not part of a pair, NaN, a wrong rank.
        NeedsBaseError: the adapter cannot be understood without the base's names.
        CheckpointError: transformers makes an adapted weight of the base's weights in a way that cannot be followed.
    """
    config = read_config(folder)
    infos = select_adapter(tensor_infos(folder), name)
    kind_name = kind_of(config)
    kind = get_kind(kind_name)
    kind.check_folder(folder, config)
    tensors = {key: read_finite(info, reader, kind.index_parts) for key, info in infos.items()}
    if tensors_file(folder).name == mlx.TENSORS:
        tensors = mlx.peft_tensors(tensors)
    else:
        tensors = {without_prefix(key): tensor for key, tensor in tensors.items()}
    changes = kind.updates(config, tensors, names)
    # A tensor that no change uses would be a part of the training that is lost.
    unused = set(tensors)
    for _, tensor_names in changes.values():
        unused.difference_update(tensor_names)
    if unused:
        raise AdapterError(
            f"{tensors_file(folder).name} contains {listed(sorted(unused))}, which qmerge cannot apply; nothing was written"
        )
    if names is not None:
        changes = placed_on_disk(changes, names)
    updates: dict[str, Update] = {}
    replaced: dict[str, Replacement] = {}
    for weight, (change, _) in changes.items():
        if isinstance(change, Replacement):
            replaced[weight] = change
        else:
            updates[weight] = change
    return Adapter(
        folder=folder,
        kind=kind_name,
        config=config,
        updates=updates,
        replaced=replaced,
        tensors={weight: tensor_names for weight, (_, tensor_names) in changes.items()},
    )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder; that of mlx_lm is translated to PEFT's.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    if not (folder / CONFIG).exists():
        raise AdapterError(missing_config_problem(folder))
    config = read_json(folder / CONFIG, AdapterError)
    if mlx.is_mlx(config):
        config = mlx.peft_config(config)
    check_document(config, AdapterConfig, CONFIG, AdapterError)
    if config.get("ensure_weight_tying") and not _peft_ties_embeddings(config):
        return {**config, "ensure_weight_tying": False}
    return config


def _peft_ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether ``ensure_weight_tying`` has an effect: peft 0.21 looks for two names (tuners_utils.py, _check_tied_modules).

    A model that calls its input embedding otherwise (GPT-2: wte) is trained without tying.
    """
    names: list[str] = list(config.get("modules_to_save") or [])
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        names += [name for name in TIED_BY_PEFT if matches(targets, name)]
    else:
        names += targets
    return any(name.rpartition(".")[2] in TIED_BY_PEFT for name in names)


def tensors_file(folder: Path) -> Path:
    """The file with the adapter's tensors, which need not exist: PEFT's, or mlx_lm's where there is only that one."""
    if (folder / mlx.TENSORS).is_file() and not (folder / TENSORS).exists():
        return folder / mlx.TENSORS
    return folder / TENSORS


def tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """The tensors in the adapter's file, from its header only.

    Raises:
        AdapterError: there is no safetensors file, or it is empty.
    """
    file = tensors_file(folder)
    if not file.exists():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder} contains only adapter_model.bin, a pickle, which can run code when it is read. With --allow-pickle, a "
                f"process of its own reads the tensors and nothing else"
            )
        raise AdapterError(f"{folder} has no {TENSORS}: expected an adapter folder as PEFT saves it")
    infos, _ = read_header(file, AdapterError)
    if not infos:
        raise AdapterError(f"{file.name} is empty: the adapter was saved without its weights; save it again")
    return infos


def trained_head(folder: Path, name: str | None = None) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """(adapter_config.json, the tensors of modules that were trained whole, by their names in the model).

    Raises:
        AdapterError: the folder or its files cannot be read.
    """
    config = read_config(folder)
    modules = config.get("modules_to_save") or []
    head: dict[str, TensorInfo] = {}
    if modules and tensors_file(folder).name == TENSORS:
        for key, info in select_adapter(tensor_infos(folder), name).items():
            weight = without_prefix(key).replace(".modules_to_save.", ".")
            if is_saved_module(weight, modules) and ".original_module." not in key:
                head[weight] = info
    return config, head


def adapter_names(tensors: Iterable[str]) -> list[str]:
    """Names of the adapters that the names of tensors distinguish.

    Only LoRA's tensors count: parts of a module that was trained whole may have any name.
    """
    # A dict keeps the order of the file.
    names: dict[str, None] = {}
    for tensor in tensors:
        if ".lora_" in tensor:
            match = NAMED.fullmatch(tensor)
            names[match["name"] if match else DEFAULT] = None
    return list(names)


def select_adapter(infos: Mapping[str, TensorInfo], name: str | None) -> dict[str, TensorInfo]:
    """The tensors of one adapter, and those that belong to none, by their names without the adapter's.

    Raises:
        AdapterError: the file contains several adapters, and none of this name.
    """
    names = adapter_names(infos)
    if len(names) < 2:
        return dict(infos)
    if name not in names:
        raise AdapterError(f"{TENSORS} contains the adapters {listed(names)}; name one of them: DIR#{names[0]}")
    selected: dict[str, TensorInfo] = {}
    known = set(names)
    for tensor, info in infos.items():
        match = NAMED.fullmatch(tensor)
        if match and match["name"] in known:
            if match["name"] == name:
                selected[match["part"] + (match["leaf"] or "")] = info
        elif ".lora_" not in tensor or name == DEFAULT:
            # A module that was trained whole belongs to all of them; a LoRA without a name is the default adapter's.
            selected[tensor] = info
    return selected


def kind_of(config: Mapping[str, Any]) -> str:
    """Name of the adapter kind that reads this config's ``peft_type``.

    Raises:
        AdapterError: it cannot be merged, or no kind reads it.
    """
    peft_type = str(config.get("peft_type", "")).upper()
    known: dict[str, str] = {}
    for name, kind in all_kinds().items():
        # A reason is more help than the list of types that can be merged.
        if peft_type in kind.refused:
            raise AdapterError(f"{CONFIG}: peft_type {peft_type} cannot be merged: {kind.refused[peft_type]}")
        known.update(dict.fromkeys(kind.peft_types, name))
    if peft_type not in known:
        raise AdapterError(
            f"{CONFIG}: peft_type {peft_type or 'missing'} cannot be merged; expected one of {', '.join(known)}"
        )
    return known[peft_type]


def without_prefix(name: str) -> str:
    """A tensor's name as kinds expect it.

    Raises:
        AdapterError: it is not a name that PEFT writes.
    """
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    if name.startswith(SHARED_PREFIX):
        return name.removeprefix(SHARED_PREFIX)
    raise AdapterError(f"{TENSORS}: {name!r} does not begin with {PREFIX!r}: expected names as PEFT saves them")


def read_finite(info: TensorInfo, reader: Reader, index_parts: tuple[str, ...] = ()) -> Tensor:
    """A tensor of the adapter as float32.

    Args:
        info: which tensor.
        reader: of the adapter's file.
        index_parts: tensors with one of these in their name may be integers, and stay so.

    Raises:
        AdapterError: other integers; NaN or infinity.
    """
    if info.dtype in INTEGERS and any(part in info.name for part in index_parts):
        return reader.tensor(info)
    if info.dtype not in TORCH_DTYPES or not TORCH_DTYPES[info.dtype].is_floating_point:
        raise AdapterError(f"{info.file.name}: {info.name} has dtype {info.dtype}, expected floats")
    # The only cast of the adapter: from here on everything is float32.
    tensor = reader.tensor(info).float()
    if not bool(tensor.isfinite().all()):
        raise AdapterError(
            f"{info.file.name}: {info.name} contains NaN or infinity: the training run diverged; use an earlier checkpoint of it"
        )
    return tensor
