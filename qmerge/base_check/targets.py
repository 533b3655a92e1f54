"""Modules that have a LoRA in the adapter's file although its config does not target them: peft would not load these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qmerge.adapters.lora import KEY
from qmerge.adapters.reading.folder import TIED_BY_PEFT, Adapter
from qmerge.adapters.reading.patterns import matches
from qmerge.errors import listed


def target_warning(adapter: Adapter) -> str:
    """That the config targets fewer modules than the file has, in one line; empty where it does not."""
    tensors = [name for names in adapter.tensors.values() for name in names]
    others = untargeted_modules(adapter.config, tensors)
    if not others:
        return ""
    return (
        f"target_modules in adapter_config.json does not name {listed(others)}, which the file has a LoRA of: peft leaves "
        f"such a LoRA out, qmerge merges it. If it was not trained for this adapter, remove it from the file"
    )


def untargeted_modules(config: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Modules with a LoRA that ``target_modules`` does not match, by peft's rule (tuners_utils.py, check_target_module_exists).

    Args:
        tensors: names in the file, without prefix.
    """
    targets = config.get("target_modules")
    # Parameters of a module are targeted by other options; MLX adapters may target all layers.
    if not targets or config.get("target_parameters") or targets == "all-linear":
        return []
    modules: dict[str, None] = {}
    for name in tensors:
        match = KEY.fullmatch(name)
        if match is not None:
            modules[match["module"]] = None
    if config.get("ensure_weight_tying"):  # peft itself adds the other embedding
        modules = {module: None for module in modules if module.rpartition(".")[2] not in TIED_BY_PEFT}
    return [module for module in modules if not _is_targeted(module, targets)]


def _is_targeted(module: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return matches(targets, module)
    return any(f".{module}".endswith(f".{target}") for target in targets)
