"""Everything else that PEFT can merge (AdaLoRA, LoHa, LoKr, OFT, HRA, IA³, VeRA, FourierFT, …), by PEFT's own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.base import AdapterKind, Changes
from qmerge.adapters.lora import check_saved_modules, is_embedding, of_other, place, spelled
from qmerge.adapters.updates.lora import AddUpdate, TokenRowsUpdate
from qmerge.adapters.updates.peft_layer import PeftLayerUpdate
from qmerge.adapters.updates.shapes import (
    UNKNOWN,
    Parts,
    by,
    of_boft,
    of_c3a,
    of_glora,
    of_gralora,
    of_hira,
    of_ia3,
    of_loha,
    of_lokr,
    of_oft,
    of_road,
    of_vblora,
)
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.types import Replacement


@dataclass(frozen=True)
class Tuner:
    """How one type's tensors are found and what they say by themselves.

    Args:
        prefix: what every name of a tensor of the adapter begins with, within its module or above all modules.
        shape: the (O, I) that the tensors of a module and the config show; -1 where they do not.
        shared: tensors above all modules that each module's delta is made of.
        unless: the option without which peft does not save the shared ones, and what they would be rebuilt from.
        bias: whether the layer's bias changes, given the module's parts.
    """

    prefix: str
    shape: Callable[[Parts, Mapping[str, Any]], tuple[int, int]] = lambda parts, config: UNKNOWN
    shared: tuple[str, ...] = ()
    unless: tuple[str, str] = ("", "")
    bias: Callable[[Parts], bool] = lambda parts: False


GENERATOR = "the generator's state (projection_prng_key) and the largest in and out features of all targeted layers"
PROJECTION = ("save_projection", GENERATOR)
TUNERS: dict[str, Tuner] = {
    "ADALORA": Tuner("lora_", by("lora_B", 0, "lora_A", 1)),
    "BEFT": Tuner("beft_"),
    "BOFT": Tuner("boft_", of_boft),
    "C3A": Tuner("c3a_", of_c3a),
    "DEFT": Tuner("deft_", by("deft_P", 0, "deft_R", 1)),
    "DELORA": Tuner("delora_", by("delora_B", 0, "delora_A", 1)),
    "FOURIERFT": Tuner("fourierft_"),
    "FROD": Tuner(
        "frod_", by("", 0, "frod_lambda_l", 0), ("frod_V", "frod_s_indices", "frod_s_size"),
        ("save_projection", "a joint decomposition of the weights of all layers of a kind"),
    ),
    "GLORA": Tuner("glora_", of_glora, bias=lambda parts: bool(glora_of_bias(parts))),
    "GRALORA": Tuner("gralora_", of_gralora),
    "HIRA": Tuner("hira_", of_hira),
    "HRA": Tuner("hra_", by("", 0, "hra_u", 0)),
    "IA3": Tuner("ia3_", of_ia3, bias=lambda parts: parts["ia3_l"].shape[1] == 1),
    "LN_TUNING": Tuner("ln_tuning_"),
    "LOHA": Tuner("hada_", of_loha),
    "LOKR": Tuner("lokr_", of_lokr),
    "MISS": Tuner("miss_"),
    "OFT": Tuner("oft_", of_oft),
    "OSF": Tuner("osf_", by("osf_svd_params.U_low", 0, "osf_svd_params.V_low", 1)),
    "PEANUT": Tuner("peanut_", by("peanut_B.weight", 0, "", 0)),
    "PSOFT": Tuner("psoft_"),
    "PVERA": Tuner("pvera_", by("pvera_lambda_b", 0, "", 0), ("pvera_A", "pvera_B"), PROJECTION),
    "RANDLORA": Tuner("randlora_", shared=("randlora_A", "randlora_B"), unless=PROJECTION),
    "ROAD": Tuner("road_", of_road, bias=lambda parts: True),
    "SHIRA": Tuner("shira_"),
    "SUPERTUNING": Tuner("supertuning_"),
    "TINYLORA": Tuner("tinylora_", shared=("tinylora_v",)),
    "TRAINABLE_TOKENS": Tuner("trainable_tokens_", by("", 0, "trainable_tokens_delta", 1)),
    "UNILORA": Tuner("unilora_", shared=("unilora_theta_d",)),
    "VBLORA": Tuner("vblora_", of_vblora, ("vblora_vector_bank",)),
    "VERA": Tuner("vera_", by("vera_lambda_b", 0, "", 0), ("vera_A", "vera_B"), PROJECTION),
    "WAVEFT": Tuner("waveft_"),
}  # fmt: skip
"""peft_type → how (peft 0.21; the tests fail when peft has one that is in neither table)."""

SAVED = {"FROD": "save_projection", "PVERA": "save_projection", "RANDLORA": "save_projection", "TINYLORA": "save_projection",
         "UNILORA": "save_indices", "VERA": "save_projection"}  # fmt: skip
"""The option that makes peft load what is there in the file, whatever the config says."""

PROMPTS = (
    "it adds virtual tokens or cached states to the input and changes no weight; load it beside the model, with peft"
)
ROUTED = (
    "which of its parts are applied depends on the input, so that no one weight stands for it; load it beside the model"
)
REFUSED: dict[str, str] = {
    "PROMPT_TUNING": PROMPTS,
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "CPT": PROMPTS,
    "CARTRIDGE": PROMPTS,
    "ADAPTION_PROMPT": "it adds attention over learned prompts to every layer, which no weight can hold; load it beside the model",
    "XLORA": ROUTED,
    "POLY": ROUTED,
    "LILY": ROUTED,
    "SHADOW": "it runs a second, small network beside the model; load both with peft",
    "ADAMSS": "its subspaces are clusters that are computed anew from the base's weight and bias together, with scikit-learn, "
    "and are not saved; merge it with peft into the 16-bit base that it was trained on, then quantize: qmerge without --adapter",
}
"""peft_type → why it is not merged, and the way out."""

CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
INDEX_PARTS = (
    "shira_indices",
    "supertuning_indices",
    "_topk_indices",
    "unilora_indices",
    "frod_s_indices",
    "frod_s_size",
)
"""What is in the name of a tensor that may hold integers."""


class PeftFallback(AdapterKind):
    """All types of ``TUNERS``, merged by peft's own code."""

    peft_types = tuple(TUNERS)
    refused = REFUSED
    index_parts = INDEX_PARTS

    def updates(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Names | None) -> Changes:
        return updates(config, tensors)


KIND = PeftFallback()


def updates(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Changes:
    """What is done to each weight, and the tensors it is made of.

    Args:
        config: adapter_config.json.
        tensors: float32 (integers where INDEX_PARTS allows them), by name without ``base_model.model.``; those above all modules
            without ``base_model.``.

    Raises:
        AdapterError: what all modules share was not saved, an option that is not handled, or a tensor of unknown use.
    """
    refuse_options(config)
    kind = str(config["peft_type"]).upper()
    modules, shared, others = sorted_out(tensors, TUNERS[kind].prefix)
    adapter = Tuned(kind, config, shared, modules)
    adapter.check_shared()
    found: Changes = {}
    for module in modules:
        for name, (change, names) in adapter.of_module(module).items():
            place(found, name, change, names)
    plain = {**config, "bias": "all"} if config.get("bias") not in ("none", None) else config
    for name, spellings in spelled(others, tensors).items():
        place(found, *of_other(name, spellings, found, plain, tensors))
    check_saved_modules(found, config)
    return found


def refuse_options(config: Mapping[str, Any]) -> None:
    """Options that put an adapter on something other than a layer of the base as it is on disk."""
    names = ("layer_replication", "target_parameters", "megatron_config", "trainable_token_indices")
    refused = [f"{name}={config[name]!r}" for name in names if config.get(name)]
    if refused:
        raise AdapterError(f"adapter_config.json has {listed(refused)}: this version does not merge such adapters")


def sorted_out(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """(module → its parts, what stands above all modules, names of the rest)."""
    modules: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    others: list[str] = []
    for name in sorted(tensors):
        words = name.split(".")
        at = max((place for place, word in enumerate(words) if word.startswith(prefix)), default=None)
        if at is None:
            others.append(name)
        elif at == 0:
            shared[name] = tensors[name]
        else:
            modules.setdefault(".".join(words[:at]), {})[".".join(words[at:])] = tensors[name]
    return modules, shared, others


@dataclass(frozen=True)
class Tuned:
    """An adapter of one of TUNERS, taken apart.

    Args:
        shared: what stands above all modules, by name.
        modules: module → its parts.
    """

    kind: str
    config: Mapping[str, Any]
    shared: dict[str, Tensor]
    modules: dict[str, dict[str, Tensor]]

    def check_shared(self) -> None:
        """Raise AdapterError where an adapter was saved without what its deltas are made of."""
        if not self.modules and not self.shared:
            raise AdapterError(
                f"adapter_config.json says peft_type {self.kind}, but no tensor of the file is named "
                f"{TUNERS[self.kind].prefix}…: this is another type's file (LORA's begin with lora_), or an empty one"
            )
        missing, (option, source) = self._missing()
        if missing and not option:
            raise AdapterError(f"the adapter is incomplete: it lacks {listed(missing)}, which all its modules share")
        if missing:
            raise AdapterError(
                f"the adapter lacks {listed(missing)}: it was saved with {option}=False, and to rebuild them takes {source}, "
                f"which the adapter does not say. Train with {option}=True, or merge with peft into the 16-bit base that it "
                f"was trained on, then quantize that"
            )

    def _missing(self) -> tuple[list[str], tuple[str, str]]:
        """(names of what is not there, (the option that would have saved it, what it would be rebuilt from))."""
        tuner = TUNERS[self.kind]
        if self.kind == "TINYLORA" and not all("tinylora_P" in parts for parts in self.modules.values()):
            return ["tinylora_P"], ("save_projection", "the order of all targeted layers in the model")
        if self.kind == "UNILORA" and not self.modules:
            return ["unilora_indices"], ("save_indices", "the shapes and the order of all targeted layers in the model")
        there = {name.split(".")[0] for name in self.shared}
        return [name for name in tuner.shared if name not in there], tuner.unless

    def of_module(self, module: str) -> Changes:
        """All that the adapter changes in one module: its weight, its bias."""
        parts = self.modules[module]
        if self.kind == "LN_TUNING":
            found: Changes = {}
            for part, values in parts.items():
                found[f"{module}.{part.rpartition('.')[2]}"] = (Replacement(values), [f"{module}.{part}"])
            return found
        names = sorted([*(f"{module}.{part}" for part in parts), *self.shared])
        if self.kind == "TRAINABLE_TOKENS":
            return self._of_tokens(module)
        if self.kind == "BEFT":
            return {f"{module}.bias": (AddUpdate(self._part(module, "beft_bias").reshape(1, -1)), names)}
        weight = self._weight(module)
        changes: Changes = {f"{module}.weight": (weight, names)}
        if TUNERS[self.kind].bias(parts):
            changes[f"{module}.bias"] = (bias_update(weight), names)
        return changes

    def _weight(self, module: str) -> PeftLayerUpdate:
        parts, shared = self.modules[module], self.shared
        if self.kind == "OSF" and module.rpartition(".")[2] in CONV1D:
            raise AdapterError(
                f"{module}: OSF factors the weight as it lies, and that of a Conv1D lies as [in, out]: not merged"
            )
        if self.kind == "TINYLORA":
            seed = int(self.config.get("projection_seed", 42))
            shared = own_vector(module, parts["tinylora_P"], shared, seed, len(self.modules))
        return PeftLayerUpdate(
            self._settings(module), module, parts, shared, self._shape(module), rank_of(parts, self.config),
            biased=self.kind == "GLORA" and bool(glora_of_bias(parts)),
            embedding=is_embedding(f"{module}.weight") and module.rpartition(".")[2] not in ("lm_head", "embed_out"),
        )  # fmt: skip

    def _settings(self, module: str) -> dict[str, Any]:
        """The config, as it is to be for one layer by itself."""
        settings = dict(self.config)
        if self.kind in SAVED:
            settings[SAVED[self.kind]] = True
        if self.kind == "TINYLORA":
            settings["weight_tying"] = 1.0  # one layer, one vector
        if self.kind == "ADALORA":
            settings["rank_pattern"] = of_this_module(module, self.config.get("rank_pattern"))
        return settings

    def _shape(self, module: str) -> tuple[int, int]:
        """(O, I), -1 where the tensors do not show it.

        Raises:
            AdapterError: a tensor is missing or has another number of axes.
        """
        parts = self.modules[module]
        try:
            return TUNERS[self.kind].shape(parts, self.config)
        except (KeyError, IndexError, ValueError, StopIteration) as cause:
            shapes = listed([f"{name} {list(tensor.shape)}" for name, tensor in parts.items()])
            raise AdapterError(f"{module} has {shapes}: not what peft saves for {self.kind} ({cause!r})") from cause

    def _part(self, module: str, part: str) -> Tensor:
        if part not in self.modules[module]:
            raise AdapterError(
                f"{module} has {listed(sorted(self.modules[module]))} and no {part}: not what peft saves"
            )
        return self.modules[module][part]

    def _of_tokens(self, module: str) -> Changes:
        """Trained rows of an embedding; of two that are tied peft saves both, and they are one."""
        rows = self._part(module, "trainable_tokens_delta")
        twins = [other for other in self.modules if torch.equal(self._part(other, "trainable_tokens_delta"), rows)]
        first = min(twins, key=lambda name: (name.rpartition(".")[2] in ("lm_head", "embed_out"), name))
        if module != first:
            return {}
        update = TokenRowsUpdate(token_indices(module, len(rows), self.config), rows)
        return {f"{module}.weight": (update, [f"{twin}.trainable_tokens_delta" for twin in twins])}


def bias_update(weight: PeftLayerUpdate) -> PeftLayerUpdate:
    """What peft makes of the bias beside a weight.

    Raises:
        AdapterError: it depends on the weight.
    """
    C = next((part for part in weight.tensors if part.startswith("glora_C.")), None)
    if C not in (None, "glora_C.zeros"):
        raise AdapterError(
            f"{weight.module} has {C}: GLoRA adds weight · C to the bias, and qmerge merges one tensor at a time. Train with "
            f"config_C='none', or merge with peft into the 16-bit base, then quantize"
        )
    inputs = weight.tensors[C].shape[0] if C else 1
    return replace(weight, part="bias", shape=(1, weight.shape[0]), inputs=inputs)


def rank_of(parts: Parts, config: Mapping[str, Any]) -> int:
    """For the report: r, where there is one."""
    rank = parts["lora_E"].shape[0] if "lora_E" in parts else config.get("r")
    return rank if isinstance(rank, int) and rank > 0 else 1


def glora_of_bias(parts: Parts) -> list[str]:
    """GLoRA's parameters that peft makes only where the layer has a bias."""
    return [part for part in parts if part[:8] in ("glora_C.", "glora_D.", "glora_E.") and not part.endswith(".zeros")]


def of_this_module(module: str, pattern: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """AdaLoRA's ranks are kept by the full names of parameters; peft looks up every one of them."""
    return {name: ranks for name, ranks in (pattern or {}).items() if f".{module}.lora_" in f".{name}"} or None


def token_indices(module: str, rows: int, config: Mapping[str, Any]) -> list[int]:
    """Which tokens the trained rows are of."""
    indices = config.get("token_indices")
    if not isinstance(indices, list) or len(indices) != rows or not all(isinstance(i, int) and i >= 0 for i in indices):
        raise AdapterError(f"{module} has {rows} trained rows, but adapter_config.json's token_indices are {indices!r}")
    return indices


def own_vector(module: str, P_URR: Tensor, shared: Parts, seed: int, layers: int) -> dict[str, Tensor]:
    """TinyLoRA's layers share vectors by their place among the targeted layers, which is not saved; but the projection is,
    and it was drawn with a seed that is ``seed`` and the place (peft 0.21, tinylora/model.py and layer.py).

    Args:
        layers: how many layers the adapter has.

    Returns:
        The layer's own vector, as the first and only one.

    Raises:
        AdapterError: no place has this projection.
    """
    groups = [name for name in shared if name.startswith("tinylora_v.")]
    if len(groups) == 1:
        return {"tinylora_v.0": shared[groups[0]]}
    std = P_URR.shape[1] ** -0.5
    for index in range(layers):
        drawn_URR = torch.normal(0.0, std, tuple(P_URR.shape), generator=torch.Generator().manual_seed(seed + index))
        if torch.allclose(drawn_URR, P_URR, rtol=2**-7, atol=2**-7):  # it may have been saved in half precision
            group = min(index // max(1, layers // len(groups)), len(groups) - 1)
            return {"tinylora_v.0": shared[f"tinylora_v.{group}"]}
    raise AdapterError(
        f"{module}: the adapter has {len(groups)} vectors tinylora_v, and the projection of this layer is that of none of "
        f"{layers} places, so that nothing says which vector is its own; merge it with peft into the 16-bit base, then quantize"
    )
