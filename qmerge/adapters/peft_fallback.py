"""Everything else that PEFT can merge (AdaLoRA, LoHa, LoKr, OFT, HRA, IA³, VeRA, FourierFT, …), by PEFT's own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.base import AdapterKind, Changes, add_change
from qmerge.adapters.reading.saved_weights import add_saved_weights, check_saved_weights, is_embedding
from qmerge.adapters.updates.lora import AddUpdate, TokenRowsUpdate
from qmerge.adapters.updates.peft_layer import PeftLayerUpdate
from qmerge.adapters.updates.shapes import (
    Parts,
    ShapeRule,
    by_axes,
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
    unknown,
)
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.types import Replacement


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """How the tensors of one PEFT type are named, and what they show by themselves.

    prefix        beginning of the names of its tensors, within their module or above all modules
    shape         the (O, I) that the tensors of a module and the config show
    shared        tensors above all modules that each module's delta is made of
    projection    of these, tensors that peft saves only with ``save_option``
    save_option   option that makes peft save, and load, what it could also draw again
    rebuilt_from  what drawing it again depends on, and no adapter contains
    changes_bias  whether the layer's bias changes, given the module's parts
    """

    prefix: str
    shape: ShapeRule = unknown
    shared: tuple[str, ...] = ()
    projection: tuple[str, ...] = ()
    save_option: str = ""
    rebuilt_from: str = ""
    changes_bias: Callable[[Parts], bool] = lambda parts: False


def glora_bias_parts(parts: Parts) -> list[str]:
    """GLoRA's parameters that peft makes only where the layer has a bias."""
    bias_parts: list[str] = []
    for part in parts:
        if part.startswith(("glora_C.", "glora_D.", "glora_E.")) and not part.endswith(".zeros"):
            bias_parts.append(part)
    return bias_parts


GENERATOR = "the generator's state (projection_prng_key) and the largest in and out features of all targeted layers"
DECOMPOSITION = "a joint decomposition of the weights of all layers of a kind"
LAYER_ORDER = "the order of all targeted layers in the model"
LAYER_SHAPES = "the shapes and the order of all targeted layers in the model"

TUNERS: dict[str, Tuner] = {
    "ADALORA": Tuner(prefix="lora_", shape=by_axes("lora_B", 0, "lora_A", 1)),
    "BEFT": Tuner(prefix="beft_"),
    "BOFT": Tuner(prefix="boft_", shape=of_boft),
    "C3A": Tuner(prefix="c3a_", shape=of_c3a),
    "DEFT": Tuner(prefix="deft_", shape=by_axes("deft_P", 0, "deft_R", 1)),
    "DELORA": Tuner(prefix="delora_", shape=by_axes("delora_B", 0, "delora_A", 1)),
    "FOURIERFT": Tuner(prefix="fourierft_"),
    "FROD": Tuner(
        prefix="frod_",
        shape=by_axes("", 0, "frod_lambda_l", 0),
        projection=("frod_V", "frod_s_indices", "frod_s_size"),
        save_option="save_projection",
        rebuilt_from=DECOMPOSITION,
    ),
    "GLORA": Tuner(prefix="glora_", shape=of_glora, changes_bias=lambda parts: bool(glora_bias_parts(parts))),
    "GRALORA": Tuner(prefix="gralora_", shape=of_gralora),
    "HIRA": Tuner(prefix="hira_", shape=of_hira),
    "HRA": Tuner(prefix="hra_", shape=by_axes("", 0, "hra_u", 0)),
    "IA3": Tuner(prefix="ia3_", shape=of_ia3, changes_bias=lambda parts: parts["ia3_l"].shape[1] == 1),
    "LN_TUNING": Tuner(prefix="ln_tuning_"),
    "LOHA": Tuner(prefix="hada_", shape=of_loha),
    "LOKR": Tuner(prefix="lokr_", shape=of_lokr),
    "MISS": Tuner(prefix="miss_"),
    "OFT": Tuner(prefix="oft_", shape=of_oft),
    "OSF": Tuner(prefix="osf_", shape=by_axes("osf_svd_params.U_low", 0, "osf_svd_params.V_low", 1)),
    "PEANUT": Tuner(prefix="peanut_", shape=by_axes("peanut_B.weight", 0, "", 0)),
    "PSOFT": Tuner(prefix="psoft_"),
    "PVERA": Tuner(
        prefix="pvera_",
        shape=by_axes("pvera_lambda_b", 0, "", 0),
        projection=("pvera_A", "pvera_B"),
        save_option="save_projection",
        rebuilt_from=GENERATOR,
    ),
    "RANDLORA": Tuner(
        prefix="randlora_",
        projection=("randlora_A", "randlora_B"),
        save_option="save_projection",
        rebuilt_from=GENERATOR,
    ),
    "ROAD": Tuner(prefix="road_", shape=of_road, changes_bias=lambda parts: True),
    "SHIRA": Tuner(prefix="shira_"),
    "SUPERTUNING": Tuner(prefix="supertuning_"),
    "TINYLORA": Tuner(
        prefix="tinylora_", shared=("tinylora_v",), save_option="save_projection", rebuilt_from=LAYER_ORDER
    ),
    "TRAINABLE_TOKENS": Tuner(prefix="trainable_tokens_", shape=by_axes("", 0, "trainable_tokens_delta", 1)),
    "UNILORA": Tuner(
        prefix="unilora_", shared=("unilora_theta_d",), save_option="save_indices", rebuilt_from=LAYER_SHAPES
    ),
    "VBLORA": Tuner(prefix="vblora_", shape=of_vblora, shared=("vblora_vector_bank",)),
    "VERA": Tuner(
        prefix="vera_",
        shape=by_axes("vera_lambda_b", 0, "", 0),
        projection=("vera_A", "vera_B"),
        save_option="save_projection",
        rebuilt_from=GENERATOR,
    ),
    "WAVEFT": Tuner(prefix="waveft_"),
}
"""peft_type → how to read it (peft 0.21). A type that is new in peft must be added to this table or to ``REFUSED``: a test asks."""

PROMPTS = (
    "it adds virtual tokens or cached states to the input and changes no weight; load it with peft, next to the model"
)
ROUTED = "the input decides which of its parts are applied, so no one weight can replace it; load it with peft, next to the model"
REFUSED: dict[str, str] = {
    "PROMPT_TUNING": PROMPTS,
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "CPT": PROMPTS,
    "CARTRIDGE": PROMPTS,
    "ADAPTION_PROMPT": (
        "it adds attention over learned prompts to every layer, which no weight can hold; load it with peft, next to the model"
    ),
    "XLORA": ROUTED,
    "POLY": ROUTED,
    "LILY": ROUTED,
    "SHADOW": "it runs a second, small network next to the model; load both with peft",
    "ADAMSS": (
        "its subspaces are clusters that are computed again from the base's weight and bias together, with scikit-learn, and are "
        "not saved; merge it with peft into the 16-bit base that it was trained on, then quantize: qmerge without --adapter"
    ),
}
"""peft_type → why it is not merged, and what to do."""

INDEX_PARTS = (
    "shira_indices",
    "supertuning_indices",
    "_topk_indices",
    "unilora_indices",
    "frod_s_indices",
    "frod_s_size",
)
"""Parts of the names of tensors that may hold integers."""

CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
"""Last parts of the names of GPT-2's Conv1D layers, whose weight is stored as [in, out]."""

HEADS = ("lm_head", "embed_out")
"""Last parts of the names of output embeddings, which are linear layers."""

UNSUPPORTED_OPTIONS = ("layer_replication", "target_parameters", "megatron_config", "trainable_token_indices")
"""Options that put an adapter on something other than a layer of the base as it is on disk."""


class PeftFallback(AdapterKind):
    """All types of ``TUNERS``, merged by peft's own code."""

    peft_types = tuple(TUNERS)
    refused = REFUSED
    index_parts = INDEX_PARTS

    def updates(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Names | None) -> Changes:
        """As ``AdapterKind.updates``; names of tensors above all modules come without ``base_model.``.

        Raises:
            AdapterError: what all modules share was not saved, an option that is not handled, or a tensor of unknown use.
        """
        refuse_options(config)
        adapter, other_tensors = taken_apart(config, tensors)
        adapter.check_shared()
        changes: Changes = {}
        for module in adapter.modules:
            for name, (change, tensor_names) in adapter.module_changes(module).items():
                add_change(changes, name, change, tensor_names)
        if config.get("bias") in ("none", None):
            add_saved_weights(changes, other_tensors, config, tensors)
        else:  # the names of this option's other values differ between the types
            add_saved_weights(changes, other_tensors, {**config, "bias": "all"}, tensors)
        check_saved_weights(changes, config, names)
        return changes


KIND = PeftFallback()


def refuse_options(config: Mapping[str, Any]) -> None:
    """Raise AdapterError for one of ``UNSUPPORTED_OPTIONS``."""
    refused = [f"{name}={config[name]!r}" for name in UNSUPPORTED_OPTIONS if config.get(name)]
    if refused:
        raise AdapterError(f"adapter_config.json has {listed(refused)}: this version does not merge such adapters")


def taken_apart(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PeftAdapter, list[str]]:
    """(the adapter's layers, names of the tensors that are not parts of them)."""
    kind = str(config["peft_type"]).upper()
    modules: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    others: list[str] = []
    for name in sorted(tensors):
        words = name.split(".")
        depths = [depth for depth, word in enumerate(words) if word.startswith(TUNERS[kind].prefix)]
        if not depths:
            others.append(name)
        elif depths[-1] == 0:
            shared[name] = tensors[name]
        else:  # a module may be called like the prefix: the last word that begins so is the adapter's
            module = ".".join(words[: depths[-1]])
            part = ".".join(words[depths[-1] :])
            modules.setdefault(module, {})[part] = tensors[name]
    return PeftAdapter(kind, config, shared, modules), others


@dataclass(frozen=True)
class PeftAdapter:
    """The layers of an adapter of one of ``TUNERS``.

    kind     peft_type
    config   adapter_config.json
    shared   name → tensor above all modules
    modules  module → its parts
    """

    kind: str
    config: Mapping[str, Any]
    shared: dict[str, Tensor]
    modules: dict[str, dict[str, Tensor]]

    @property
    def tuner(self) -> Tuner:
        """How this type's tensors are named."""
        return TUNERS[self.kind]

    def check_shared(self) -> None:
        """Raise AdapterError where an adapter was saved without what its deltas are made of."""
        if not self.modules and not self.shared:
            raise AdapterError(
                f"adapter_config.json says peft_type {self.kind}, but no tensor of the file is named "
                f"{self.tuner.prefix}…: this is another type's file (LORA's begin with lora_), or an empty one"
            )
        unsaved = self._unsaved()
        if unsaved:
            option = self.tuner.save_option
            raise AdapterError(
                f"the adapter lacks {listed(unsaved)}: it was saved with {option}=False, and rebuilding them needs "
                f"{self.tuner.rebuilt_from}, which the adapter does not contain. Train with {option}=True, or merge with peft "
                f"into the 16-bit base that it was trained on, then quantize that"
            )
        missing = [name for name in self.tuner.shared if name not in self._shared_kinds()]
        if missing:
            raise AdapterError(f"the adapter is incomplete: it lacks {listed(missing)}, which all its modules share")

    def _shared_kinds(self) -> set[str]:
        return {name.split(".")[0] for name in self.shared}

    def _unsaved(self) -> list[str]:
        """Names of the tensors that are missing because the adapter was saved without ``save_option``."""
        if self.kind == "TINYLORA" and not all("tinylora_P" in parts for parts in self.modules.values()):
            # Each module has a projection of its own.
            return ["tinylora_P"]
        if self.kind == "UNILORA" and not self.modules:
            # The indices are the only tensors that belong to a module.
            return ["unilora_indices"]
        return [name for name in self.tuner.projection if name not in self._shared_kinds()]

    def module_changes(self, module: str) -> Changes:
        """All that the adapter changes in one module: its weight, its bias.

        Raises:
            AdapterError: its tensors are not those that peft saves, or the layer cannot be merged by itself.
        """
        parts = self.modules[module]
        if self.kind == "LN_TUNING":
            return self._norm_changes(module)
        if self.kind == "TRAINABLE_TOKENS":
            return self._token_changes(module)
        tensor_names = sorted([*(f"{module}.{part}" for part in parts), *self.shared])
        if self.kind == "BEFT":
            # BEFT trains a delta of the bias, and nothing else.
            delta_1O = self._part(module, "beft_bias").reshape(1, -1)
            return {f"{module}.bias": (AddUpdate(delta_1O), tensor_names)}
        update = self._weight_update(module)
        changes: Changes = {f"{module}.weight": (update, tensor_names)}
        if self.tuner.changes_bias(parts):
            changes[f"{module}.bias"] = (bias_update(update), tensor_names)
        return changes

    def _norm_changes(self, module: str) -> Changes:
        """The trained weight and bias of a norm, in place of the base's."""
        changes: Changes = {}
        for part, values in self.modules[module].items():
            leaf = part.rpartition(".")[2]
            changes[f"{module}.{leaf}"] = (Replacement(values), [f"{module}.{part}"])
        return changes

    def _token_changes(self, module: str) -> Changes:
        """Trained rows of an embedding. Of two tied embeddings peft saves both, with the same rows: they are one change."""
        rows_TI = self._part(module, "trainable_tokens_delta")
        twins = []
        for other in self.modules:
            if torch.equal(self._part(other, "trainable_tokens_delta"), rows_TI):
                twins.append(other)
        # The input embedding is on disk; a tied output embedding is not.
        first = min(twins, key=lambda name: (name.rpartition(".")[2] in HEADS, name))
        if module != first:
            return {}
        update = TokenRowsUpdate(token_indices(module, len(rows_TI), self.config), rows_TI)
        return {f"{module}.weight": (update, [f"{twin}.trainable_tokens_delta" for twin in twins])}

    def _weight_update(self, module: str) -> PeftLayerUpdate:
        parts, shared = self.modules[module], self.shared
        last_name = module.rpartition(".")[2]
        if self.kind == "OSF" and last_name in CONV1D:
            raise AdapterError(
                f"{module}: OSF factors the weight as it is stored, which is [in, out] for a Conv1D: this is not merged; merge it "
                f"with peft into the 16-bit base, then quantize"
            )
        if self.kind == "TINYLORA":
            seed = int(self.config.get("projection_seed", 42))
            shared = own_vector(module, parts["tinylora_P"], shared, seed=seed, layers=len(self.modules))
        return PeftLayerUpdate(
            config=self._layer_config(module),
            module=module,
            tensors=parts,
            shared=shared,
            shape=self._shape(module),
            rank=rank_of(parts, self.config),
            # Where the base has a bias, GLoRA's layer has parameters for it, which must be loaded, too.
            biased=self.kind == "GLORA" and bool(glora_bias_parts(parts)),
            # peft takes an output embedding as a linear layer.
            embedding=is_embedding(f"{module}.weight") and last_name not in HEADS,
        )

    def _layer_config(self, module: str) -> dict[str, Any]:
        """The config for one layer by itself."""
        config = dict(self.config)
        if self.tuner.save_option:
            config[self.tuner.save_option] = True  # peft then loads what the file contains, and draws nothing
        if self.kind == "TINYLORA":
            config["weight_tying"] = 1.0  # one layer, one vector
        if self.kind == "ADALORA":
            config["rank_pattern"] = module_pattern(module, self.config.get("rank_pattern"))
        return config

    def _shape(self, module: str) -> tuple[int, int]:
        """(O, I), -1 where the tensors do not show it.

        Raises:
            AdapterError: a tensor is missing or has another number of axes.
        """
        parts = self.modules[module]
        try:
            # Checked before anything is merged: peft would raise only when the weight's turn comes.
            return self.tuner.shape(parts, self.config)
        except (KeyError, IndexError, ValueError, StopIteration) as cause:
            shapes = listed([f"{name} {list(tensor.shape)}" for name, tensor in parts.items()])
            raise AdapterError(f"{module} has {shapes}: not what peft saves for {self.kind} ({cause!r})") from cause

    def _part(self, module: str, part: str) -> Tensor:
        parts = self.modules[module]
        if part not in parts:
            raise AdapterError(
                f"{module} has {listed(sorted(parts))} and no {part}: not what peft saves for {self.kind}"
            )
        return parts[part]


def bias_update(update: PeftLayerUpdate) -> PeftLayerUpdate:
    """The update of a layer's bias, from that of its weight.

    Raises:
        AdapterError: it depends on the weight.
    """
    C = next((part for part in update.tensors if part.startswith("glora_C.")), None)
    # The merged bias is b + W C + D b + E (arXiv 2306.07967): without C it follows from b alone.
    if C not in (None, "glora_C.zeros"):
        raise AdapterError(
            f"{update.module} has {C}: GLoRA adds weight · C to the bias, and qmerge merges one tensor at a time. Train with "
            f"config_C='none', or merge with peft into the 16-bit base, then quantize"
        )
    inputs = update.tensors[C].shape[0] if C else 1
    return replace(update, part="bias", shape=(1, update.shape[0]), inputs=inputs)


def rank_of(parts: Parts, config: Mapping[str, Any]) -> int:
    """The rank, for reports; 1 for types without a rank."""
    # AdaLoRA's r is the largest rank; lora_E has one entry per rank that was left.
    rank = parts["lora_E"].shape[0] if "lora_E" in parts else config.get("r")
    return rank if isinstance(rank, int) and rank > 0 else 1


def module_pattern(module: str, pattern: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The entries of AdaLoRA's ``rank_pattern`` for one module; None if there are none.

    Its keys are the full names of parameters, and peft looks up every one of them in the model.
    """
    entries: dict[str, Any] = {}
    for name, ranks in (pattern or {}).items():
        if f".{module}.lora_" in f".{name}":
            entries[name] = ranks
    return entries or None


def token_indices(module: str, rows: int, config: Mapping[str, Any]) -> list[int]:
    """The tokens that the trained rows belong to.

    Raises:
        AdapterError: ``token_indices`` is not one index per row.
    """
    indices = config.get("token_indices")
    is_list = isinstance(indices, list) and all(isinstance(index, int) and index >= 0 for index in indices)
    if not isinstance(indices, list) or not is_list or len(indices) != rows:
        raise AdapterError(
            f"{module} has {rows} trained rows, but adapter_config.json's token_indices are {indices!r}; expected {rows} indices"
        )
    return indices


def own_vector(module: str, P_URR: Tensor, shared: Parts, *, seed: int, layers: int) -> dict[str, Tensor]:
    """The trained vector of one layer of TinyLoRA, as the first and only one.

    Layers share vectors by their index among the targeted layers, which is not saved. But the projection is saved, and it was
    drawn with a seed that is ``seed`` plus the index (peft 0.21, tinylora/model.py and layer.py).

    Args:
        P_URR: float32, the layer's projection.
        shared: the adapter's tensors above all modules.
        seed: ``projection_seed``.
        layers: number of layers in the adapter.

    Raises:
        AdapterError: no index gives this projection.
    """
    vectors = [name for name in shared if name.startswith("tinylora_v.")]
    if len(vectors) == 1:
        return {"tinylora_v.0": shared[vectors[0]]}
    std = P_URR.shape[1] ** -0.5
    for index in range(layers):
        generator = torch.Generator().manual_seed(seed + index)
        drawn_URR = torch.normal(0.0, std, tuple(P_URR.shape), generator=generator)
        if torch.allclose(drawn_URR, P_URR, rtol=2**-7, atol=2**-7):  # it may have been saved in half precision
            layers_per_vector = max(1, layers // len(vectors))
            group = min(index // layers_per_vector, len(vectors) - 1)
            return {"tinylora_v.0": shared[f"tinylora_v.{group}"]}
    raise AdapterError(
        f"{module}: the adapter has {len(vectors)} vectors tinylora_v, and the projection of this layer is that of none of "
        f"{layers} layers, so its vector is unknown; merge it with peft into the 16-bit base, then quantize"
    )
