"""Merging by peft itself: a model of one layer that holds the base's values, wrapped and merged by peft's own code."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qmerge.adapters.updates.shapes import UNKNOWN
from qmerge.errors import AdapterError, listed
from qmerge.types import Rows, Update

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

LOCK = threading.Lock()
"""peft draws initial values, which are then overwritten, and warns: random state and warning filters are global."""

PREFIX, SHARED = "base_model.model.", "base_model."

CLEARED: dict[str, Any] = {
    "base_model_name_or_path": None, "revision": None, "task_type": None, "auto_mapping": None, "inference_mode": True,
    "exclude_modules": None, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
    "trainable_token_indices": None, "bias": "none", "progressbar": False, "fan_in_fan_out": False,
    "runtime_offload_base_weight": False,
}  # fmt: skip
"""Options that say where an adapter goes, or how a model is trained; the skeleton has one layer, [out, in], on the CPU."""


@dataclass(frozen=True)
class PeftLayerUpdate(Update):
    """What peft's own layer makes of one weight, or of the bias beside it.

    Args:
        config: adapter_config.json, as far as it concerns this layer.
        module: its full name: patterns in the config are matched with it.
        tensors: the adapter's, by name within the module.
        shared: those that stand above all modules, by name.
        shape: (O, I), or (1, O) of a bias; -1 where the adapter alone does not say.
        part: what is merged into.
        biased: peft's layer has other parameters where the base has a bias.
        embedding: the base is an embedding [tokens, features].
        inputs: in features of the layer whose bias this is, where peft's parameters have them.
    """

    config: Mapping[str, Any]
    module: str
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    shape: tuple[int, int] = UNKNOWN
    rank: int = 1
    part: Literal["weight", "bias"] = "weight"
    biased: bool = False
    embedding: bool = False
    inputs: int = 1

    whole = True

    @property
    def optional(self) -> bool:
        """Nothing is lost where the base has no such weight: a layer without a bias."""
        return self.part == "bias"

    def to(self, device: torch.device) -> PeftLayerUpdate:
        return self  # peft's code runs on the CPU, whatever the rest is done on: some of it is not the same elsewhere

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        """All rows at once.

        Raises:
            AdapterError: the adapter's tensors are not those of peft's layer of this shape.
        """
        with LOCK, torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            merged = self._merged(base_OI.detach().to("cpu", torch.float32))
        return merged.reshape(base_OI.shape).to(base_OI.device)

    def _merged(self, base_OI: Tensor) -> Tensor:
        from peft import get_peft_model

        try:
            settings = peft_config({**self.config, **CLEARED}, self.module)
            wrapped = get_peft_model(tree(self.module, self._layer(base_OI)), settings, autocast_adapter_dtype=False)
            make_room(wrapped.eval(), self.shared)
            load(wrapped, self._full_names(), self.module)
            rebuild(wrapped.base_model.model.get_submodule(self.module))
            layer = wrapped.merge_and_unload().get_submodule(self.module)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError) as cause:
            raise AdapterError(
                f"{self.module} {list(base_OI.shape)}: peft {peft_version()} does not merge this "
                f"{self.config.get('peft_type')} adapter there: {cause}"
            ) from cause
        merged: Tensor = getattr(layer, self.part).data
        return merged

    def _layer(self, base_OI: Tensor) -> nn.Module:
        """The base's values in a layer of their own; beside a bias stand zeros, and a bias of zeros where one must be."""
        if self.embedding:
            return nn.Embedding(base_OI.shape[0], base_OI.shape[1], _weight=base_OI.clone())
        is_bias = self.part == "bias"
        weight_OI = torch.zeros(base_OI.numel(), self.inputs) if is_bias else base_OI.clone()
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=is_bias or self.biased, device="meta")
        layer.weight = nn.Parameter(weight_OI)
        if is_bias or self.biased:
            layer.bias = nn.Parameter(base_OI.flatten().clone() if is_bias else torch.zeros(base_OI.shape[0]))
        return layer

    def _full_names(self) -> dict[str, Tensor]:
        own = {f"{PREFIX}{self.module}.{name}": tensor for name, tensor in self.tensors.items()}
        return {**own, **{SHARED + name: tensor for name, tensor in self.shared.items()}}


def tree(module: str, layer: nn.Module) -> nn.Module:
    """Nothing but one layer, under its full name."""
    root = at = nn.Module()
    *above, last = module.split(".")
    for name in above:
        at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    at.add_module(last, layer)
    return root


def peft_config(config: Mapping[str, Any], module: str) -> PeftConfig:
    """peft's own configuration, for one module.

    Raises:
        AdapterError: the installed peft has no such adapters, or does not know an option that is set.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(config["peft_type"]).upper()
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(f"peft {peft_version()} has no {kind} adapters; update it: pip install -U peft")
    made = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = set(made.__dataclass_fields__)
    unknown = sorted(name for name, value in config.items() if name not in known | CLEARED.keys() and value)
    if unknown:
        raise AdapterError(
            f"adapter_config.json has {listed(unknown)}, which peft {peft_version()} does not know for {kind}; "
            f"update it: pip install -U peft"
        )
    here: dict[str, Any] = {"target_modules": [module], "peft_type": kind}
    if config.get("feedforward_modules") is not None:
        here["feedforward_modules"] = [module] if is_named(module, config["feedforward_modules"]) else []
    return made(**{name: value for name, value in {**config, **here}.items() if name in known})


def is_named(module: str, names: Any) -> bool:
    """peft's rule for IA³'s feedforward_modules: a regular expression, or ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)


def make_room(wrapped: PeftModel, shared: Mapping[str, Tensor]) -> None:
    """Shared projections are as large as the largest layer takes them (VeRA, PVeRA, RandLoRA): each layer takes its part."""
    for name, tensor in shared.items():
        buffers: Any = getattr(wrapped.base_model, name, None)
        if hasattr(buffers, "state_dict") and "default" in buffers.state_dict():
            buffers["default"] = torch.empty_like(tensor)


def load(wrapped: PeftModel, tensors: dict[str, Tensor], module: str) -> None:
    """Every tensor that peft would save of this module, and no other; what is shared may be for other modules.

    Raises:
        AdapterError: one is missing, or left over.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    tensors = {name: tensor for name, tensor in tensors.items() if name in expected or name.startswith(PREFIX)}
    wrong = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    for names, problem in zip(wrong, ("is incomplete, it lacks", "has more than peft would have saved,"), strict=True):
        if names:
            raise AdapterError(f"{module}: the adapter {problem} {listed(names)}")
    set_peft_model_state_dict(wrapped, tensors)


def rebuild(layer: Any) -> None:
    """FRoD's left factor follows from the base and the projection, which peft knows only after loading."""
    if not hasattr(layer, "frod_U"):
        return
    for name, projection in layer.frod_V.items():
        layer.frod_U[name] = layer._calculate_frod_u_and_lambda(projection, layer.get_base_layer().weight)[0]


def peft_version() -> str:
    import peft

    return str(peft.__version__)
