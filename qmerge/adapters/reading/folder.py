"""An adapter folder as PEFT saves it → what it does to each weight, every tensor accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qmerge.adapters import all_kinds, get_kind
from qmerge.adapters.reading.placement import placed
from qmerge.checkpoint.names import Names
from qmerge.checkpoint.scan import read_json
from qmerge.errors import AdapterError, listed
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.types import TORCH_DTYPES, Replacement, TensorInfo, Update

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SHARED = "base_model."
"""What stands before the tensors that all modules of an adapter share (VeRA's projections)."""

DEFAULT = "default"
"""What peft calls an adapter that was given no name."""

NAMED = re.compile(
    r"(?P<part>.+\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag|"
    r"modules_to_save|trainable_tokens_delta))"
    r"\.(?P<name>(?!weight$|bias$)[^.]+)(?P<leaf>\.(?:.+\.)?(?:weight|bias))?"
)
"""A tensor's name with the adapter's in it, as in a model's state dict; peft takes it out when it saves."""


@dataclass(frozen=True)
class Adapter:
    """``updates`` and ``replaced`` by the name of a weight of the base; ``tensors`` lists the tensors that each is made of,
    as they are in the file."""

    folder: Path
    kind: str
    config: dict[str, Any]
    updates: dict[str, Update]
    replaced: dict[str, Replacement]
    tensors: dict[str, list[str]]


def read_adapter(folder: Path, reader: Reader, name: str | None = None, names: Names | None = None) -> Adapter:
    """Read a PEFT adapter folder.

    Args:
        name: the adapter's, where the file may hold several.
        names: of the base's weights. None: names stay as the adapter has them, and what only the base can tell is an error.

    Raises:
        AdapterError: pickle, unsupported kind or option, a tensor that is no part of a pair, NaN, a wrong rank.
        CheckpointError: transformers makes an adapted weight of the base's in a way that cannot be followed.
    """
    config, infos = read_json(config_file(folder), AdapterError), of_one(tensor_infos(folder), name)
    kind_name = kind_of(config)
    kind = get_kind(kind_name)
    kind.check_folder(folder, config)
    tensors = {without_prefix(key): finite(info, reader, kind.index_parts) for key, info in infos.items()}
    found = kind.updates(config, tensors, names)
    used = {name for _, names in found.values() for name in names}
    left = sorted(tensors.keys() - used)
    if left:
        raise AdapterError(f"{TENSORS} holds {listed(left)}, which qmerge would not apply; nothing was written")
    found = found if names is None else placed(found, names)
    updates = {name: change for name, (change, _) in found.items() if not isinstance(change, Replacement)}
    replaced = {name: change for name, (change, _) in found.items() if isinstance(change, Replacement)}
    return Adapter(folder, kind_name, config, updates, replaced, {name: names for name, (_, names) in found.items()})


def config_file(folder: Path) -> Path:
    if not (folder / CONFIG).exists():
        raise AdapterError(f"{folder} has no {CONFIG}: expected an adapter folder as PEFT saves it")
    return folder / CONFIG


def tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Headers only.

    Raises:
        AdapterError: there is no safetensors file, or it holds nothing.
    """
    if not (folder / TENSORS).exists():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder} holds only adapter_model.bin, a pickle, which can run code when it is read; convert it where "
                f"you trust it: PeftModel.from_pretrained(…).save_pretrained(…)"
            )
        raise AdapterError(f"{folder} has no {TENSORS}: expected an adapter folder as PEFT saves it")
    infos, _ = read_header(folder / TENSORS, AdapterError)
    if not infos:
        raise AdapterError(f"{TENSORS} is empty: the adapter was saved without its weights")
    return infos


def names_in(tensors: Iterable[str]) -> list[str]:
    """Names of the adapters that the tensors' names tell apart; LoRA's only: a module that was trained whole may have parts
    of any name."""
    lora = [name for name in tensors if ".lora_" in name]
    found = [match["name"] if (match := NAMED.fullmatch(name)) else DEFAULT for name in lora]
    return list(dict.fromkeys(found))


def of_one(infos: Mapping[str, TensorInfo], name: str | None) -> dict[str, TensorInfo]:
    """The tensors of one adapter (and those that are nobody's), by their names without the adapter's.

    Raises:
        AdapterError: there are several, and this is none of them.
    """
    names, found = names_in(infos), dict[str, TensorInfo]()
    if len(names) < 2:
        return dict(infos)
    if name not in names:
        raise AdapterError(f"{TENSORS} holds the adapters {listed(names)}; name one of them: DIR#{names[0]}")
    for tensor, info in infos.items():
        match = NAMED.fullmatch(tensor)
        owner = match["name"] if match and match["name"] in names else DEFAULT if ".lora_" in tensor else None
        if owner in (name, None):
            found[match["part"] + (match["leaf"] or "") if match and owner else tensor] = info
    return found


def kind_of(config: Mapping[str, Any]) -> str:
    """Name of the adapter kind that reads this config's ``peft_type``.

    Raises:
        AdapterError: it cannot be merged, or no kind reads it.
    """
    peft_type = str(config.get("peft_type", "")).upper()
    known: dict[str, str] = {}
    for name, kind in all_kinds().items():
        if peft_type in kind.refused:
            raise AdapterError(f"{CONFIG}: peft_type {peft_type} cannot be merged: {kind.refused[peft_type]}")
        known.update(dict.fromkeys(kind.peft_types, name))
    if peft_type not in known:
        raise AdapterError(f"{CONFIG}: peft_type {peft_type or 'missing'} is not merged; there are: {', '.join(known)}")
    return known[peft_type]


def without_prefix(name: str) -> str:
    if not name.startswith(PREFIX) and name.startswith(SHARED):
        return name.removeprefix(SHARED)
    if not name.startswith(PREFIX):
        raise AdapterError(f"{TENSORS}: {name!r} does not begin with {PREFIX!r}: expected names as PEFT saves them")
    return name.removeprefix(PREFIX)


def finite(info: TensorInfo, reader: Reader, indices: tuple[str, ...] = ()) -> Tensor:
    """float32; NaN and infinity are refused. What is named by one of ``indices`` may be integers, and stays so."""
    if info.dtype in ("I64", "I32", "I16", "U8") and any(part in info.name for part in indices):
        return reader.tensor(info)
    if info.dtype not in TORCH_DTYPES or not TORCH_DTYPES[info.dtype].is_floating_point:
        raise AdapterError(f"{TENSORS}: {info.name} has dtype {info.dtype}, expected floats")
    tensor = reader.tensor(info).float()
    if not bool(tensor.isfinite().all()):
        raise AdapterError(f"{TENSORS}: {info.name} holds NaN or infinity; the training run diverged, nothing to merge")
    return tensor
