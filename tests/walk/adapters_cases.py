"""The cases of the walk over adapters: for every type of peft one basic config per kind of layer, and one per option."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from .adapters_models import ARCHITECTURES, Architecture

Value: TypeAlias = tuple[Any, dict[str, Any]]
"""(value as it is written in a case's name, options)."""


@dataclass(frozen=True)
class Case:
    """One adapter: what is adapted, the type of peft, the options of its config, and which of them makes the case special."""

    architecture: str
    layers: str
    peft_type: str
    variation: str
    options: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        return f"{self.peft_type} · {self.architecture} · {self.layers} · {self.variation}"

    def settings(self) -> dict[str, Any]:
        """The options as peft's config class takes them: some are configs of their own."""
        made = dict(self.options)
        for option, config in CONFIGS.items():
            if option in made:
                made[option] = config(**made[option])
        return made


CONFIGS: dict[str, Any] = {
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "kasa_config": KasaConfig,
    "use_bdlora": BdLoraConfig,
}
"""Option → class of its value."""

PROMPTS = {
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "P_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
}
"""Types that change no weight → options; they are built on one model, and without target modules."""

BASIC: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 50},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 4, "stride_A": 1, "num_B": 2},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4},
    "PSOFT": {"r": 4, "psoft_alpha": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2, "random_seed": 5},
    "TINYLORA": {"u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5]},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 50},
}
"""peft_type → options of every case, so that the small layers will do."""

NOT_VARIED: dict[str, str] = {
    "peft_type": "it is the type",
    "task_type": "belongs to the model",
    "auto_mapping": "peft's own note",
    "peft_version": "peft's own note",
    "base_model_name_or_path": "where the base is",
    "revision": "where the base is",
    "inference_mode": "set by peft as it saves",
    "beta1": "of training", "beta2": "of training", "tinit": "of training", "tfinal": "of training", "deltaT": "of training",
    "orth_reg_weight": "of training", "total_step": "of training", "target_r": "of training",
    "megatron_config": "needs Megatron", "megatron_core": "needs Megatron",
    "runtime_config": "not saved", "arrow_config": "needs several adapters",
    "eva_config": "needs data", "corda_config": "needs data", "lora_ga_config": "needs data",
    "loftq_config": "needs a quantized base",
    "ADALORA.rank_pattern": "written by its training: tests/parity/test_tuners.py has it",
    "SHIRA.mask_type": "has one value",
    "progressbar": "of the terminal", "runtime_offload_base_weight": "where the base is kept",
    "layers_pattern": "together with layers_to_transform",
    "feedforward_modules": "on every kind of layer",
    "boft_block_num": "together with boft_block_size", "oft_block_size": "together with r",
    "use_asa": "ADAMSS is refused", "asa_target_subspaces": "ADAMSS is refused", "init_warmup": "ADAMSS is refused",
    "final_warmup": "ADAMSS is refused", "mask_interval": "ADAMSS is refused", "asa_importance_beta": "ADAMSS is refused",
    "asa_uncertainty_beta": "ADAMSS is refused", "asa_schedule_exponent": "ADAMSS is refused",
    "use_dynamic_rank": "ADAMSS is refused", "svd_threshold": "ADAMSS is refused", "num_subspaces": "ADAMSS is refused",
    "subspace_rank": "ADAMSS is refused",
    "stride_A": "LILY is refused", "num_B": "LILY is refused",
    "n_tasks": "POLY is refused", "n_skills": "POLY is refused", "n_splits": "POLY is refused", "poly_type": "POLY is refused",
}  # fmt: skip
"""Option, of all types or of one → why it has no case of its own."""

OF_THE_MODEL = (
    "target_modules",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "ensure_weight_tying",
)
"""Options that mean something else in every model; the others are varied on some models only."""

REFUSED_WHOLE = ("ADAMSS", "LILY", "POLY", "XLORA", "SHADOW", *PROMPTS)
"""Types that have one case each."""

NUMBERS: dict[str, list[Any]] = {
    "r": [2, 8], "init_r": [6], "alpha": [3], "lora_alpha": [3], "randlora_alpha": [3], "psoft_alpha": [3], "delora_lambda": [3],
    "scaling": [3.0], "init_scale": [0.5], "eps": [1e-2], "n_frequency": [20], "random_loc_seed": [3], "random_seed": [7],
    "projection_seed": [7], "proj_seed": [7], "projection_prng_key": [7], "generator_seed": [7], "d_initial": [0.3],
    "init_theta_d_bound": [0.3], "init_v_bound": [0.3], "init_logits_std": [0.3], "init_vector_bank_bound": [0.3],
    "sparse_rate": [0.1], "regularization_alpha": [0.01], "hybrid_r": [2], "gralora_k": [4], "mini_r": [2],
    "boft_block_size": [8], "boft_n_butterfly_factor": [2], "block_size": [8], "decompose_factor": [4],
    "num_cayley_neumann_terms": [3], "cayley_neumann_eps": [0.5], "psoft_svd_lowrank_niter": [3], "depth": [2],
    "act_fn": ["silu"], "group_size": [8], "sparsity": [0.5], "u": [4], "weight_tying": [0.5, 1.0], "theta_d_length": [100],
    "num_vectors": [8], "vector_length": [8], "topk": [1], "wavelet_family": ["db2", "sym2"], "effective_rank": [2, 0.25],
    "TINYLORA.init_weights": ["uniform"],  # with False, its vectors are whatever the memory holds
    "token_indices": [[0, 3, 7]], "qalora_group_size": [8],
}  # fmt: skip
"""Option with numbers or names, of all types or of one → other values than the default and the basic one."""


def options_of(peft_type: str) -> dict[str, Any]:
    """Option of a type's config → its type."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    hints = get_type_hints(config)
    return {option.name: hints[option.name] for option in fields(config) if option.init}


def default_of(peft_type: str, option: str) -> Any:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    found = next(f for f in fields(config) if f.name == option)
    return None if found.default is MISSING else found.default


def values_of(hint: Any) -> set[Any]:
    """The values that a type lists: those of Literals, and of bool."""
    if hint is bool:
        return {True, False}
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return {value for part in get_args(hint) for value in values_of(part)}
    return set()


def cases() -> Iterator[Case]:
    """All cases, in one order."""
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        yield from cases_of(str(kind.value))


def cases_of(peft_type: str) -> Iterator[Case]:
    """The cases of one type."""
    if peft_type in PROMPTS:
        yield Case("llama", "prompt", peft_type, "basic", dict(PROMPTS[peft_type]))
        return
    for name, architecture in ARCHITECTURES.items():
        for number, layers in enumerate(architecture.targets):
            basic = {**BASIC.get(peft_type, {}), "target_modules": architecture.targets[layers]}
            if "target_modules" not in options_of(peft_type):
                basic.pop("target_modules")
            yield Case(name, layers, peft_type, "basic", basic)
            if peft_type == "IA3":  # it then scales the inputs, which are in groups in some convolutions
                inputs = {**basic, "feedforward_modules": basic["target_modules"]}
                yield Case(name, layers, peft_type, "feedforward_modules=all", inputs)
            if number == 0 and peft_type not in REFUSED_WHOLE:
                for variation, options in variations(peft_type, architecture, architecture.targets[layers]):
                    yield Case(name, layers, peft_type, variation, {**basic, **options})


def is_not_varied(peft_type: str, option: str) -> bool:
    return option in NOT_VARIED or f"{peft_type}.{option}" in NOT_VARIED


def variations(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    """(name, options) for every option of a type, where the model has what it takes."""
    for option, hint in options_of(peft_type).items():
        if is_not_varied(peft_type, option) or not (model.varied or option in OF_THE_MODEL):
            continue
        for value, options in values(peft_type, option, hint, model=model, targets=targets):
            yield f"{option}={value}", options


def values(peft_type: str, option: str, hint: Any, *, model: Architecture, targets: list[str]) -> Iterator[Value]:
    """The values of one option."""
    special = SPECIAL.get(option)
    if special is not None:
        yield from ((name, options) for name, options in special(peft_type, model, targets))
        return
    if option.endswith("dropout"):
        yield 0.1, {option: 0.1}
        return
    listed = NUMBERS.get(f"{peft_type}.{option}", NUMBERS.get(option, []))
    if not listed:
        listed = sorted(values_of(hint) - {default_of(peft_type, option)}, key=str)
    for value in listed:
        yield (
            value,
            {**WITH.get((peft_type, option), {}), **WITH.get((peft_type, f"{option}={value}"), {}), option: value},
        )


WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("OFT", "r"): {"oft_block_size": 0},
    ("OFT", "eps"): {"coft": True},
    ("OFT", "num_cayley_neumann_terms"): {"use_cayley_neumann": True},
    ("PSOFT", "num_cayley_neumann_terms"): {"use_cayley_neumann": True},
    ("PSOFT", "cayley_neumann_eps"): {"use_cayley_neumann": True},
    ("PSOFT", "psoft_svd_lowrank_niter"): {"psoft_svd": "lowrank"},
    ("MISS", "init_weights=mini"): {"mini_r": 2},
    ("MISS", "mini_r"): {"init_weights": "mini"},
    ("SUPERTUNING", "lora_alpha"): {"r": 4},
    ("LORA", "qalora_group_size"): {"use_qalora": True},
}  # fmt: skip
"""(type, option) or (type, "option=value") → other options that it needs to have an effect."""


def biases(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    own = {"LORA": "lora_only", "ADALORA": "lora_only"}.get(peft_type, f"{peft_type.lower()}_only")
    for value in ("all", own):
        yield value, {"bias": value}


def target_modules(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    yield "regex", {"target_modules": rf".*({'|'.join(targets)})"}
    yield "all-linear", {"target_modules": "all-linear"}
    if model.saved and len(targets) > 1:
        yield "first", {"target_modules": targets[:1]}


def pattern_values(option: str, small: Any) -> Any:
    def make(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
        if (peft_type, option) == ("ADALORA", "rank_pattern"):
            return
        yield "last", {option: {targets[-1]: small}}
        if model.layered:
            yield "layer", {option: {rf".*\.{model.layered}\.1\..*{targets[0]}": small}}

    return make


def layer_choice(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    if model.layered:
        yield [1], {"layers_to_transform": [1]}
        yield "pattern", {"layers_to_transform": [0], "layers_pattern": model.layered}


def saved_modules(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    yield model.saved, {"modules_to_save": [model.saved]}
    if model.embedding:
        yield model.embedding, {"modules_to_save": [model.embedding]}


def trained_tokens(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    if model.embedding:
        yield "named", {"trainable_token_indices": {model.embedding: [1, 5]}}
        yield "list", {"trainable_token_indices": [1, 5]}


def parameters(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    if model.parameters:
        yield "all", {"target_parameters": model.parameters, "target_modules": []}
        yield "first", {"target_parameters": model.parameters[:1]}
    elif targets[0].startswith("lin"):
        yield "weight", {"target_parameters": [f"{targets[0]}.weight"], "target_modules": targets[1:]}


def only(option: str, **values: Any) -> Any:
    def make(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
        for name, value in values.items():
            yield name, {option: value(targets) if callable(value) else value}

    return make


def replication(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    if model.layered:
        yield "once", {"layer_replication": [(0, 2), (1, 2)]}


def tied(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    if model.embedding:
        yield "saved", {"ensure_weight_tying": True, "modules_to_save": [model.embedding]}


def singular_values(peft_type: str, model: Architecture, targets: list[str]) -> Iterator[Value]:
    if not model.layered:  # it takes full names
        yield "first", {"target_svd_config": {f"{targets[0]}.weight": 5}}


def block_diagonal(targets: list[str]) -> dict[str, Any]:
    return {
        "target_modules_bd_a": targets[:1],
        "target_modules_bd_b": targets[1:2],
        "nblocks": 2,
        "match_strict": False,
    }


SPECIAL: dict[str, Any] = {
    "bias": biases,
    "target_modules": target_modules,
    "exclude_modules": only("exclude_modules", last=lambda targets: rf".*1.*{targets[-1]}.*"),
    "rank_pattern": pattern_values("rank_pattern", 2),
    "alpha_pattern": pattern_values("alpha_pattern", 5),
    "lambda_pattern": pattern_values("lambda_pattern", 3),
    "n_frequency_pattern": pattern_values("n_frequency_pattern", 20),
    "block_size_pattern": pattern_values("block_size_pattern", 8),
    "layers_to_transform": layer_choice,
    "modules_to_save": saved_modules,
    "trainable_token_indices": trained_tokens,
    "target_parameters": parameters,
    "layer_replication": replication,
    "ensure_weight_tying": tied,
    "velora_config": only("velora_config", groups={"num_groups": 2}),
    "monteclora_config": only("monteclora_config", basic={}),
    "kasa_config": only("kasa_config", basic={}),
    "use_bdlora": only("use_bdlora", halves=block_diagonal),
    "alora_invocation_tokens": only("alora_invocation_tokens", tokens=[1, 2]),
    "target_svd_config": singular_values,
    "variant": only("variant", road_2="road_2", road_4="road_4"),
}  # fmt: skip
"""Option → a function that gives (name of the value, options)."""
