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

from qmerge.adapters.updates import layers
from qmerge.adapters.updates.shapes import UNKNOWN
from qmerge.errors import AdapterError, listed
from qmerge.types import Rows, Update

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

LOCK = threading.Lock()
"""peft draws initial values, which are then overwritten, and warns: random state and warning filters are global."""

PREFIX, SHARED_PREFIX = "base_model.model.", "base_model."
"""Beginnings of peft's names: of tensors of a module, and of those above all modules."""

CLEARED: dict[str, Any] = {
    "base_model_name_or_path": None,
    "revision": None,
    "task_type": None,
    "auto_mapping": None,
    "inference_mode": True,
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "trainable_token_indices": None,
    "bias": "none",
    "progressbar": False,
    "fan_in_fan_out": False,
    "runtime_offload_base_weight": False,
}
"""Options that say where an adapter goes, or how a model is trained → values for a model of one layer, [out, in], on the CPU."""


@dataclass(frozen=True, kw_only=True)
class PeftLayerUpdate(Update):
    """One weight, or the bias of the same layer, merged by peft's own layer.

    config     adapter_config.json, as far as it concerns this layer
    module     full name of the layer: patterns in the config are matched with it
    tensors    the adapter's tensors of this layer, by name within the module
    shared     the adapter's tensors above all modules, by name
    shape      (O, I), or (1, O) of a bias; -1 where the adapter alone does not show it
    part       the parameter that is merged into
    biased     whether peft's layer has other parameters where the base has a bias
    embedding  whether the base is an embedding [tokens, features]
    kernel     of a convolution: in / groups, and the sizes of its kernel; empty for other layers
    groups     of the convolution's channels
    inputs     in features of the layer whose bias this is, where peft's parameters have them
    """

    config: Mapping[str, Any]
    module: str
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    shape: tuple[int, int] = UNKNOWN
    rank: int = 1  # a value, so that the class is not abstract; always given
    part: Literal["weight", "bias"] = "weight"
    biased: bool = False
    embedding: bool = False
    kernel: tuple[int, ...] = ()
    groups: int = 1
    inputs: int = 1

    whole = True  # peft merges whole layers

    @property
    def optional(self) -> bool:
        """peft has parameters for the bias of a layer, whether the base's layer has one or not."""
        return self.part == "bias"

    def to(self, device: torch.device) -> PeftLayerUpdate:
        return self  # peft's code runs on the CPU, whatever the device: some of it gives other numbers elsewhere

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        """As ``Update.apply``, for all rows at once.

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
            settings = peft_config(self._layer_config(), [self.module])
            model = model_of_one_layer(self.module, self._layer(base_OI))
            wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
            resize_shared(wrapped, self.shared)
            load(wrapped, self._full_names(), self.module)
            rebuild(wrapped.base_model.model.get_submodule(self.module))
            layer = wrapped.merge_and_unload().get_submodule(self.module)
        # peft raises any of these for tensors or options that do not fit its layer.
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError) as cause:
            raise AdapterError(
                f"{self.module} {list(base_OI.shape)}: peft {peft_version()} does not merge this "
                f"{self.config.get('peft_type')} adapter into it: {cause}. Does adapter_config.json belong to these tensors, "
                f"and is this the base that they were trained on?"
            ) from cause
        parameter: Tensor = layer.weight if self.part == "weight" else layer.bias
        return parameter.data

    def _layer_config(self) -> dict[str, Any]:
        """The config for a model that consists of this layer."""
        config = {**self.config, **CLEARED}
        if config.get("feedforward_modules") is not None:
            config["feedforward_modules"] = (
                [self.module] if is_named(self.module, config["feedforward_modules"]) else []
            )
        return config

    def _layer(self, base_OI: Tensor) -> nn.Module:
        """A layer with the base's values. The other parameter of a linear layer or convolution, if any, is zero."""
        if self.embedding:
            return layers.embedding(base_OI.clone())
        columns = self.kernel or (base_OI.shape[1],)
        bias_O: Tensor | None
        if self.part == "bias":
            columns = self.kernel or (self.inputs,)
            weight = torch.zeros(base_OI.numel(), *columns)
            bias_O = base_OI.flatten().clone()
        else:
            weight = base_OI.reshape(-1, *columns).clone()
            bias_O = torch.zeros(base_OI.shape[0]) if self.biased else None
        if self.kernel:
            return layers.convolution(weight, bias_O, self.groups)
        return layers.linear(weight, bias_O)

    def _full_names(self) -> dict[str, Tensor]:
        """The adapter's tensors by the names that peft saves them under."""
        tensors = {f"{PREFIX}{self.module}.{name}": tensor for name, tensor in self.tensors.items()}
        for name, tensor in self.shared.items():
            tensors[SHARED_PREFIX + name] = tensor
        return tensors


def model_of_one_layer(module: str, layer: nn.Module) -> nn.Module:
    """A model that contains nothing but one layer, under its full name."""
    root = nn.Module()
    add_under_name(root, module.split("."), layer)
    return root


def add_under_name(root: nn.Module, path: list[str], layer: nn.Module) -> None:
    """Add a layer to a model under the parts of its full name; modules between them are made where there are none."""
    *parents, last = path
    parent = root
    for name in parents:
        if name not in parent._modules:
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, layer)


def peft_config(config: Mapping[str, Any], target_modules: list[str] | str) -> PeftConfig:
    """peft's own configuration, for these modules.

    Raises:
        AdapterError: the installed peft has no such adapters, or does not know an option that is set.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = str(config["peft_type"]).upper()
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(f"peft {peft_version()} has no {kind} adapters; update it: pip install -U peft")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = set(config_class.__dataclass_fields__)
    # Below, only known options reach peft: the effect of an unknown one would be lost without a trace.
    unknown: list[str] = []
    for name, value in config.items():
        if value and name not in known and name not in CLEARED:
            unknown.append(name)
    if unknown:
        raise AdapterError(
            f"adapter_config.json has {listed(sorted(unknown))}, which peft {peft_version()} does not know for {kind}; "
            f"update it: pip install -U peft"
        )
    settings: dict[str, Any] = {**config, "target_modules": target_modules, "peft_type": kind}
    return config_class(**{name: value for name, value in settings.items() if name in known})


def is_named(module: str, names: Any) -> bool:
    """Whether IA³'s ``feedforward_modules`` names the module, by peft's rule: a regular expression, or ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)


def resize_shared(wrapped: PeftModel, shared: Mapping[str, Tensor]) -> None:
    """Make room for shared projections (VeRA, PVeRA, RandLoRA), which are as large as the largest layer of the trained model.

    peft sizes them by the only layer of this model. Each layer uses its part of them.
    """
    for name, tensor in shared.items():
        buffers = getattr(wrapped.base_model, name, None)
        if isinstance(buffers, nn.Module) and "default" in buffers.state_dict():
            projections: Any = buffers  # a BufferDict of peft, one projection for each adapter's name
            projections["default"] = torch.empty_like(tensor)


def load(wrapped: PeftModel, tensors: Mapping[str, Tensor], module: str) -> None:
    """Load every tensor that peft would save of this module, and no other; shared ones may belong to other modules.

    Raises:
        AdapterError: one is missing, or left over.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    used: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Shared tensors that this layer does not use are for other modules; its own must all be used.
        if name in expected or name.startswith(PREFIX):
            used[name] = tensor
    missing = sorted(expected - used.keys())
    left_over = sorted(used.keys() - expected)
    if missing:
        raise AdapterError(f"{module}: the adapter is incomplete, it lacks {listed(missing)}")
    if left_over:
        raise AdapterError(f"{module}: the adapter has more than peft would have saved, {listed(left_over)}")
    set_peft_model_state_dict(wrapped, used)


def rebuild(layer: nn.Module) -> None:
    """Compute FRoD's left factor: it follows from the base and the projection, which peft knows only after loading."""
    left_factors = getattr(layer, "frod_U", None)
    if left_factors is None:
        return
    frod: Any = layer
    for name, projection in frod.frod_V.items():
        left_factors[name] = frod._calculate_frod_u_and_lambda(projection, frod.get_base_layer().weight)[0]


def peft_version() -> str:
    """Version of the installed peft."""
    import peft

    return str(peft.__version__)
