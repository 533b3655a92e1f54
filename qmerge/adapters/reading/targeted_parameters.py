"""Which LoRA of an adapter belongs to which of ``target_parameters``: parameters that peft wraps one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qmerge.adapters.updates.experts import TargetedParameter
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, NeedsBaseError, listed


def targeted_parameters(
    modules: Sequence[str], config: Mapping[str, Any], names: Names | None
) -> dict[str, TargetedParameter]:
    """Module → the parameter that its LoRA belongs to; modules whose LoRA belongs to the module itself are left out.

    Args:
        modules: with a LoRA, as the adapter names them.
        names: of the base's weights; None where there is no base.

    Raises:
        AdapterError: the targeted parameters and the LoRAs do not match.
        NeedsBaseError: the config has ``target_parameters``, and there is no base.
    """
    targets = config.get("target_parameters")
    if not targets:
        return {}
    parameters: dict[str, TargetedParameter] = {}
    for module in modules:
        parameter = _parameter_of(module, targets, names)
        if parameter is not None:
            parameters[module] = parameter
    if not parameters:
        raise AdapterError(
            f"adapter_config.json has target_parameters={listed(targets)}, but no LoRA in the file belongs to one of these "
            f"parameters in the base, as far as its order of parameters is known (transformers' model shows it). Is this the base "
            f"that the adapter was trained on?"
        )
    if names is not None:
        _check_complete(parameters, targets, names)
    return parameters


def _parameter_of(module: str, targets: list[str], names: Names | None) -> TargetedParameter | None:
    if names is None:
        raise NeedsBaseError(
            f"adapter_config.json has target_parameters={listed(targets)}: only the base shows which LoRA belongs to which of "
            f"them, and how many experts it has"
        )
    name = names.targeted_parameter(module, targets)
    # peft nests one wrapper per targeted parameter: a .base_layer that is left over belongs to none.
    if name == module and module.endswith(".base_layer"):
        raise AdapterError(
            f"{module}: adapter_config.json's target_parameters ({listed(targets)}) name fewer of the base's parameters than "
            f"there are LoRAs. Is one misspelt, or is this another base?"
        )
    # A LoRA of the module itself.
    if name == module:
        return None
    blocks = names.blocks_of(name)
    return TargetedParameter(name, blocks[0].shape, names.is_transposed(name)) if blocks else None


def _check_complete(parameters: Mapping[str, TargetedParameter], targets: list[str], names: Names) -> None:
    """Raise AdapterError for a targeted parameter without a LoRA where another one of the same module has one."""
    adapted = {parameter.name for parameter in parameters.values()}
    for module in dict.fromkeys(module.replace(".base_layer", "") for module in parameters):
        for name in names.targeted_parameters_in(module, targets):
            if name not in adapted:
                raise AdapterError(f"{name} is one of target_parameters, but has no LoRA: the adapter is incomplete")
