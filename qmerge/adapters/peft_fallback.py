"""Everything else that PEFT can merge (AdaLoRA, LoHa, LoKr, OFT, HRA, IA³, VeRA, FourierFT, …), by PEFT's own layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.base import AdapterKind, Changes, add_change
from qmerge.adapters.reading.saved_weights import add_saved_weights, check_saved_weights
from qmerge.adapters.updates import variants
from qmerge.adapters.updates.lora import AddUpdate, TokenRowsUpdate
from qmerge.adapters.updates.peft_layer import PeftLayerUpdate, is_named
from qmerge.adapters.updates.single_layer import bias_update, module_pattern, own_vector, rank_of
from qmerge.adapters.updates.tuners import INDEX_PARTS, REFUSED, TUNERS, Tuner, glora_bias_parts
from qmerge.adapters.updates.unsaved import drawn_tensors
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, CheckpointError, NeedsBaseError, listed
from qmerge.types import Replacement

EMBEDDING_PARTS = ("hira_embedding_", "oft_embedding_")
"""Beginnings of the names of tensors that peft has in embeddings only. Other types change an embedding like a linear layer."""

NOT_ZERO_AT_START = ("C3A", "FOURIERFT", "VBLORA")
"""Types whose delta is random before training."""

HEADS = ("lm_head", "embed_out")
"""Last parts of the names of output embeddings, which are linear layers."""

BASE_LAYER = ".base_layer."
"""How peft names what is below an adapter layer."""

UNMERGED = "load it with peft, next to the model, or train it without the option"
UNSUPPORTED_OPTIONS = {
    "layer_replication": f"several layers of the trained model share one layer of the base; {UNMERGED}",
    "target_parameters": f"qmerge merges parameters that peft wraps by themselves for LORA only; {UNMERGED}",
    "megatron_config": variants.REFUSED["megatron_config"],
    "sample_at_inference": (
        "PVeRA then draws another delta for every input, which no weight can do. Set it to false in adapter_config.json to merge "
        "the mean delta, as peft does, or load the adapter with peft, next to the model"
    ),
}
"""Options under which no weight of the base, as it is on disk, can hold what was trained → why, and what to do."""


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
        adapter, other_tensors = taken_apart(config, tensors, names)
        adapter.check_shared()
        # What the file contains takes precedence over what is drawn.
        if adapter.unsaved():
            adapter, other_tensors = taken_apart(config, {**adapter.drawn_again(), **tensors}, names)
        changes: Changes = {}
        for module in adapter.modules:
            for name, (change, tensor_names) in adapter.module_changes(module).items():
                add_change(changes, name, change, tensor_names)
        saved = saved_options(config)
        add_saved_weights(changes, adapter.without_copies(changes, other_tensors), saved, tensors)
        check_saved_weights(changes, saved, names)
        return changes


KIND = PeftFallback()


def refuse_options(config: Mapping[str, Any]) -> None:
    """Raise AdapterError for one of ``UNSUPPORTED_OPTIONS``."""
    for option, reason in UNSUPPORTED_OPTIONS.items():
        if config.get(option):
            raise AdapterError(f"adapter_config.json has {option}={config[option]!r}: {reason}")


def saved_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as ``reading/saved_weights.py`` knows it, which is that of LORA."""
    # The names of the values other than none differ between the types.
    bias = "none" if config.get("bias") in ("none", None) else "all"
    # ADALORA inherits lora_bias from LORA's config, and its layers ignore it.
    return {**config, "bias": bias, "lora_bias": False}


def taken_apart(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Names | None
) -> tuple[PeftAdapter, list[str]]:
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
    return PeftAdapter(kind=kind, config=config, shared=shared, modules=modules, names=names), others


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """The layers of an adapter of one of ``TUNERS``.

    kind     peft_type
    config   adapter_config.json
    shared   name → tensor above all modules
    modules  module → its parts
    names    of the base's weights; None where there is no base
    """

    kind: str
    config: Mapping[str, Any]
    shared: dict[str, Tensor]
    modules: dict[str, dict[str, Tensor]]
    names: Names | None

    @property
    def tuner(self) -> Tuner:
        """How this type's tensors are named."""
        return TUNERS[self.kind]

    def check_shared(self) -> None:
        """Raise AdapterError where an adapter was saved without what its deltas are made of."""
        if not self.modules and not self.shared and not self.config.get("modules_to_save"):
            raise AdapterError(
                f"adapter_config.json says peft_type {self.kind}, but no tensor of the file is named "
                f"{self.tuner.prefix}…: this is another type's file (LORA's begin with lora_), or an empty one"
            )
        missing = [name for name in self.tuner.shared if name not in self._shared_kinds()]
        if missing:
            raise AdapterError(f"the adapter is incomplete: it lacks {listed(missing)}, which all its modules share")

    def without_copies(self, changes: Changes, names: list[str]) -> list[str]:
        """The names without those of untrained copies, which are listed with the change that makes them needless.

        peft saves the base's own weight next to an adapter on an embedding, also where the adapter replaces the embedding.
        """
        others: list[str] = []
        for name in names:
            change, tensor_names = changes.get(name.replace(BASE_LAYER, "."), (None, []))
            if BASE_LAYER in name and isinstance(change, Replacement):
                tensor_names.append(name)
            else:
                others.append(name)
        return others

    def _shared_kinds(self) -> set[str]:
        return {name.split(".")[0] for name in self.shared}

    def unsaved(self) -> list[str]:
        """Names of the tensors that are missing because the adapter was saved without ``save_option``."""
        if self.kind in ("TINYLORA", "UNILORA"):  # each module has its own
            part = self.tuner.drawn[0]
            is_saved = any(name.startswith(part) for parts in self.modules.values() for name in parts)
            return [] if is_saved else [part]
        return [name for name in self.tuner.projection if name not in self._shared_kinds()]

    def drawn_again(self) -> dict[str, Tensor]:
        """The tensors that peft did not save, and would have saved with the type's ``save_option``, drawn again.

        Raises:
            AdapterError: the file should contain them; or they follow from the values of the base, or from a model that
                transformers does not know.
            NeedsBaseError: there is no base.
        """
        option, unsaved = self.tuner.save_option, listed(self.unsaved())
        if self.config.get(option):
            raise AdapterError(
                f"the adapter is incomplete: adapter_config.json has {option}=true, but the file lacks {unsaved}"
            )
        lacking = (
            f"the adapter lacks {unsaved}: it was saved with {option}=False, and rebuilding them needs "
            f"{self.tuner.rebuilt_from}"
        )
        way_out = f"Train with {option}=True, or merge with peft into the 16-bit base that it was trained on, then quantize that"
        if not self.tuner.drawn:
            raise AdapterError(f"{lacking}, which the adapter does not contain. {way_out}")
        if self.names is None:
            raise NeedsBaseError(f"{lacking}, which only the base shows")
        try:
            tensors = drawn_tensors(self.config, self.names, save_option=option)
        except CheckpointError as cause:
            raise AdapterError(f"{lacking}, and transformers does not know this architecture. {way_out}") from cause
        except (ValueError, TypeError) as cause:
            raise AdapterError(f"{lacking}, which this base does not show ({cause}). {way_out}") from cause
        drawn: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            # Trained tensors are among them with initial values, which must not take the place of missing ones.
            if any(f".{part}" in f".{name}" for part in self.tuner.drawn):
                drawn[name] = tensor
        return drawn

    def module_changes(self, module: str) -> Changes:
        """All that the adapter changes in one module: its weight, its bias.

        Raises:
            AdapterError: its tensors are not those that peft saves, or the layer cannot be merged by itself.
        """
        parts = self.modules[module]
        self._check_is_called(module)
        if self.kind == "LN_TUNING":
            return self._norm_changes(module)
        if self.kind == "TRAINABLE_TOKENS":
            return self._token_changes(module)
        tensor_names = sorted([*(f"{module}.{part}" for part in parts), *self.shared])
        if self.kind == "BEFT":
            return self._bias_changes(module, tensor_names)
        update = self._weight_update(module)
        changes: Changes = {f"{module}.weight": (update, tensor_names)}
        if self._changes_bias(module):
            changes[f"{module}.bias"] = (bias_update(update), tensor_names)
        return changes

    def _bias_changes(self, module: str, tensor_names: list[str]) -> Changes:
        """BEFT trains a delta of the bias, and nothing else."""
        name = f"{module}.bias"
        if self.names and not self._has_parameter(name):
            raise AdapterError(
                f"BEFT trained a bias for {module}, which has none in this base: no weight can hold it, and peft does not merge "
                f"it either. Load it with peft, next to the model, or train layers with a bias only"
            )
        delta_1O = self._part(module, "beft_bias").reshape(1, -1)
        return {name: (AddUpdate(delta_1O), tensor_names)}

    def _has_parameter(self, name: str) -> bool:
        """Whether the base is known to have a parameter."""
        return self.names is not None and (name in self.names.disk or bool(self.names.blocks_of(name)))

    def _check_is_called(self, module: str) -> None:
        """Raise AdapterError for an adapter that has an effect only once it is merged.

        torch's MultiheadAttention takes the weight of its out_proj and does not call the layer, so nothing there is trained.
        """
        attention, _, last_name = module.rpartition(".")
        if self.kind not in NOT_ZERO_AT_START or last_name != "out_proj":
            return
        if self._has_parameter(f"{attention}.in_proj_weight"):
            raise AdapterError(
                f"{module} belongs to a torch.nn.MultiheadAttention, which takes its weight and never calls the adapter on it: the "
                f"random delta that {self.kind} starts with has no effect unmerged. Train without this layer, or remove its "
                f"tensors from the adapter"
            )

    def _changes_bias(self, module: str) -> bool:
        parts = self.modules[module]
        if self.kind == "IA3" and parts["ia3_l"].ndim > 2:
            # A convolution's factors have one shape for its in and its out channels.
            return not self._scales_inputs(module)
        return self.tuner.changes_bias(parts)

    def _scales_inputs(self, module: str) -> bool:
        """Whether IA³ scales the layer's inputs instead of its outputs."""
        return is_named(module, self.config.get("feedforward_modules") or [])

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
        if self._has_parameter(f"{module}.bias"):
            raise AdapterError(
                f"{module} is a linear layer with a bias, which peft leaves out of layers whose token rows it trains, so that no "
                f"merged layer is the trained one. Train rows of embeddings only, or load it with peft, next to the model"
            )
        update = TokenRowsUpdate(token_indices(module, len(rows_TI), self.config), rows_TI)
        return {f"{module}.weight": (update, [f"{twin}.trainable_tokens_delta" for twin in twins])}

    def _weight_update(self, module: str) -> PeftLayerUpdate:
        parts, shared = self.modules[module], self.shared
        if self.kind == "TINYLORA":
            seed = int(self.config.get("projection_seed", 42))
            shared = own_vector(module, parts["tinylora_P"], shared, seed=seed, layers=len(self.modules))
        kernel = self._kernel(module)
        if self.kind == "OFT" and math.prod(kernel[1:]) > 1:
            raise AdapterError(
                f"{module} is a convolution with a kernel of {list(kernel[1:])}: peft's OFT rotates its inputs patch by patch and "
                f"averages the patches where they overlap, which no weight can do (peft's own merge computes something else). "
                f"Load it with peft, next to the model, or train without this layer"
            )
        return PeftLayerUpdate(
            config=self._layer_config(module),
            module=module,
            tensors=parts,
            shared=shared,
            shape=self._shape(module),
            rank=rank_of(parts, self.config),
            # Where the base has a bias, GLoRA's layer has parameters for it, which must be loaded, too.
            biased=self.kind == "GLORA" and bool(glora_bias_parts(parts)),
            embedding=any(part.startswith(EMBEDDING_PARTS) for part in parts),
            kernel=kernel,
            groups=self._groups(module, kernel),
        )

    def _kernel(self, module: str) -> tuple[int, ...]:
        """Of a convolution, as the base has it: in / groups, and the sizes of its kernel; empty for other layers."""
        if self.names is None:
            return ()
        # A weight that transformers renames has its shape in memory in the blocks that it is made of.
        name = f"{module}.weight"
        shape = self.names.disk.get(name)
        if shape is None:
            blocks = self.names.blocks_of(name)
            shape = blocks[0].shape if blocks else ()
        return shape[1:] if len(shape) > 2 else ()

    def _groups(self, module: str, kernel: tuple[int, ...]) -> int:
        """Groups of a convolution's channels, where the delta depends on them: IA³ has one factor for each in channel."""
        if self.kind != "IA3" or not kernel or not self._scales_inputs(module):
            return 1
        return self.modules[module]["ia3_l"].numel() // kernel[0]

    def _layer_config(self, module: str) -> dict[str, Any]:
        """The config for one layer by itself."""
        config = dict(self.config)
        if self.tuner.save_option:
            config[self.tuner.save_option] = True  # peft then loads what the file contains, and draws nothing
        if self.kind == "TINYLORA":
            config["weight_tying"] = 1.0  # one layer, one vector
        if self.kind == "WAVEFT" and config.get("proportional_parameters"):
            # The layer's share follows from the shapes of all layers; its own tensor shows it, too.
            frequencies = self._part(module, "waveft_spectrum").numel()
            config.update(proportional_parameters=False, n_frequency=frequencies, n_frequency_pattern={})
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
