"""Tensors of an adapter file that are not parts of adapter layers: biases, token rows, and modules that were trained whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.base import Changes, add_change
from qmerge.adapters.updates.lora import AddUpdate, OwnBaseUpdate, TokenRowsUpdate
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.types import Replacement, Rows, Update

EMBEDDINGS = ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in", "wpe")
"""Last parts of the names of embedding modules."""

TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

ALL_ROWS = ".token_adapter.base_layer.weight"
"""All rows of an embedding that was resized before some of its rows were trained (TRL adds the tokens of a chat template so)."""

BASE_LAYER_WEIGHT = ".base_layer.weight"
"""How peft names the weight below an adapter layer."""


def add_saved_weights(
    changes: Changes, names: Sequence[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Add the changes that these tensors make to those of the adapter layers.

    Args:
        names: of the tensors that are not parts of adapter layers.
        config: adapter_config.json.
        tensors: all tensors of the adapter, float32.

    Raises:
        AdapterError: the config does not account for a tensor; copies of a tensor differ.
    """
    for name, copies in copies_of(names, tensors).items():
        values = tensors[copies[0]]
        weight = name.replace(".base_layer.", ".")
        if name.endswith(TOKEN_ROWS):
            module = name.removesuffix(TOKEN_ROWS)
            _add_token_rows(changes, module, TokenRowsUpdate(token_indices(module, config), values), copies, tensors)
        elif name.endswith(ALL_ROWS) and name.replace(ALL_ROWS, TOKEN_ROWS) in tensors:
            continue  # added with the rows that were trained
        elif name.endswith(BASE_LAYER_WEIGHT) and weight in changes:
            # An embedding whose size changed before LoRA was added to it: the base's values are not the ones it was trained on.
            update, update_tensors = changes.pop(weight)
            assert isinstance(update, Update)
            add_change(changes, weight, OwnBaseUpdate(values, update), [*update_tensors, *copies])
        elif _is_trained_whole(weight, config):
            add_change(changes, weight, Replacement(values), copies)
        else:
            raise AdapterError(
                f"adapter tensor {name!r} is not lora_A or lora_B of a linear layer or embedding, and adapter_config.json names it "
                f"neither in modules_to_save nor by its bias option: this version cannot merge it"
            )


def _add_token_rows(
    changes: Changes, module: str, rows: TokenRowsUpdate, copies: list[str], tensors: Mapping[str, Tensor]
) -> None:
    """Add the trained rows of an embedding; where the adapter brings all of its rows, the whole embedding."""
    all_OI = tensors.get(module + ALL_ROWS)
    if all_OI is None:
        add_change(changes, f"{module}.weight", rows, copies)
        return
    count, width = all_OI.shape
    trained_OI = rows.fitted((count, width)).apply(all_OI, Rows(0, count))
    add_change(changes, f"{module}.weight", Replacement(trained_OI), [*copies, module + ALL_ROWS])


def copies_of(names: Sequence[str], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Name of a tensor → its names in the file, the trained copy first.

    peft 0.21 saves an embedding that was resized and trained whole three times: by its name, as ``….modules_to_save.weight``,
    and untrained as ``….original_module.weight``.

    Raises:
        AdapterError: two trained copies of one tensor differ.
    """
    copies: dict[str, list[str]] = {}
    untrained: list[str] = []
    for name in names:
        if ".original_module." in name:
            untrained.append(name)
        else:
            copies.setdefault(name.replace(".modules_to_save.", "."), []).append(name)
    for name, spellings in copies.items():
        if not all(torch.equal(tensors[spellings[0]], tensors[other]) for other in spellings[1:]):
            raise AdapterError(
                f"{listed(spellings)} are copies of one tensor, {name}, but differ; remove from the file those that were not "
                f"trained"
            )
    for name in untrained:
        copies.setdefault(name.replace(".original_module.", "."), []).append(name)
    return copies


def _is_trained_whole(weight: str, config: Mapping[str, Any]) -> bool:
    if weight.endswith(".bias") and config.get("bias") in ("all", "lora_only"):
        return True
    return is_saved_module(weight, config.get("modules_to_save") or []) or is_embedding(weight)


def is_saved_module(name: str, modules_to_save: Sequence[str]) -> bool:
    """Whether a tensor belongs to a module of ``modules_to_save``, by peft's rule: a module's name ends like an entry."""
    parts = name.split(".")
    modules = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(module.endswith(tuple(modules_to_save)) for module in modules)


def is_embedding(name: str) -> bool:
    """Whether a tensor is named like the weight of an embedding.

    peft saves embeddings whole when their size changed, whatever the config says (``save_embedding_layers``).
    """
    module = name.rpartition(".")[0]
    return module.rpartition(".")[2] in EMBEDDINGS


def check_saved_weights(changes: Changes, config: Mapping[str, Any], names: Names | None) -> None:
    """Check that everything that the config lists besides adapter layers is in the file.

    Args:
        names: of the base's weights; None where there is no base.

    Raises:
        AdapterError: biases, token rows or a module are missing.
    """
    tensor_names = [name for _, of_change in changes.values() for name in of_change]
    present = {
        "lora_bias": any(isinstance(change, AddUpdate) for change, _ in changes.values()),
        "trainable_token_indices": any(name.endswith(TOKEN_ROWS) for name in tensor_names),
    }
    for option, is_present in present.items():
        if config.get(option) and not is_present:
            raise AdapterError(
                f"adapter_config.json has {option}={config[option]!r}, but the file contains no tensor of it: "
                f"the adapter is incomplete"
            )
    for module in missing_modules(changes, config.get("modules_to_save") or [], names):
        raise AdapterError(
            f"adapter_config.json lists {module!r} in modules_to_save, but the file contains no tensor of it: "
            f"the adapter is incomplete"
        )


def missing_modules(changes: Changes, modules: Sequence[str], names: Names | None) -> list[str]:
    """The modules of which the file should contain a tensor, and does not.

    A config may list modules that the model does not have: for classifiers, peft always lists ``classifier`` and ``score``
    (peft/peft_model.py, PeftModelForSequenceClassification). Without a base, one of them in the file is enough.
    """
    missing = [module for module in modules if not any(is_saved_module(name, [module]) for name in changes)]
    if names is None:
        return missing if len(missing) == len(modules) else []
    return [module for module in missing if any(is_saved_module(name, [module]) for name in names.disk)]


def token_indices(module: str, config: Mapping[str, Any]) -> list[int]:
    """Indices of the trained token rows of an embedding.

    ``trainable_token_indices`` is a list for the input embedding, or a dict of lists by the end of the module's name.

    Raises:
        AdapterError: it lists none for this module, or something other than indices.
    """
    option = config.get("trainable_token_indices")
    indices = option
    if isinstance(option, dict):
        endings = [ending for ending in option if f".{module}".endswith(f".{ending}")]
        indices = option[endings[0]] if endings else None
    if not isinstance(indices, list) or not all(isinstance(index, int) and index >= 0 for index in indices):
        raise AdapterError(
            f"{module} has trained token rows, but adapter_config.json's trainable_token_indices ({str(option)[:80]}) do not "
            f"say which; expected a list of indices"
        )
    return indices
