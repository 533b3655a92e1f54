"""Every type of adapter that PEFT can merge, against PEFT itself: the merged weights, and what the unmerged model answers."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qmerge.adapters import get_kind, peft_fallback
from qmerge.adapters.updates.tuners import REFUSED, TUNERS
from qmerge.errors import AdapterError

from .. import models
from ..conftest import Cli
from . import stock

BIASED = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
SOME = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Kind:
    """``options``: of peft's config class; ``model``: of the Llama; ``gpt2``: a model of Conv1D layers instead;
    ``pruned``: some ranks were taken away in training; ``size``: how far parameters are moved."""

    peft_type: str
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    gpt2: bool = False
    pruned: bool = False
    size: float = 0.05


GPT2 = {"target_modules": ["c_attn", "c_fc"]}
ON_CONV1D: dict[str, dict[str, Any]] = {
    "deft": {"r": 4}, "fourierft": {"n_frequency": 50}, "frod": {"progressbar": False}, "gralora": {"r": 8}, "pvera": {"r": 8},
    "randlora": {"r": 4}, "tinylora": {"u": 8}, "vblora": {"r": 2, "num_vectors": 16, "vector_length": 16}, "vera": {"r": 8},
    "waveft": {"n_frequency": 50},
}  # fmt: skip
KINDS = {
    "adalora": Kind("ADALORA", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "adalora pruned": Kind("ADALORA", {"init_r": 4, "target_r": 2, "total_step": 10}, pruned=True),
    "adalora bias": Kind("ADALORA", {"init_r": 4, "total_step": 10, "bias": "all"}, BIASED),
    "adalora gpt2": Kind("ADALORA", {"init_r": 4, "total_step": 10, **GPT2}, gpt2=True),
    "beft": Kind("BEFT", {"target_modules": ["v_proj", "down_proj"]}, BIASED),
    "boft": Kind("BOFT", {"boft_block_size": 4}),
    "boft factors": Kind("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}, BIASED),
    "boft bias": Kind("BOFT", {"boft_block_size": 0, "boft_block_num": 4, "bias": "boft_only"}, BIASED),
    "c3a": Kind("C3A", {"block_size": 16}),
    "c3a patterns": Kind("C3A", {"block_size": 16, "block_size_pattern": {"q_proj": 8}}),
    "deft": Kind("DEFT", {"r": 4}),
    "deft qr": Kind("DEFT", {"r": 4, "decomposition_method": "qr", "para": True}),
    "delora": Kind("DELORA", {"r": 4}),
    "delora patterns": Kind("DELORA", {"r": 4, "rank_pattern": {"q_proj": 2}, "lambda_pattern": {"layers.1.self_attn.v_proj": 3}}),
    "fourierft": Kind("FOURIERFT", {"n_frequency": 50}),
    "fourierft patterns": Kind("FOURIERFT", {"n_frequency": 50, "random_loc_seed": 3, "n_frequency_pattern": {"down_proj": 20}}),
    "frod": Kind("FROD", {"progressbar": False}),
    "glora": Kind("GLORA", {"r": 4}),
    "glora vector": Kind("GLORA", {"r": 4, "config_A_B": "vector"}),
    "glora bias": Kind("GLORA", {"r": 4, "config_C": "none", "config_D_E": "vector"}, BIASED),
    "gralora": Kind("GRALORA", {"r": 8}),
    "gralora hybrid": Kind("GRALORA", {"r": 8, "hybrid_r": 4}),
    "hira": Kind("HIRA", {"r": 4}),
    "hira patterns": Kind("HIRA", {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 2}}),
    "hira embedding": Kind("HIRA", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "hira gpt2": Kind("HIRA", {"r": 4, **GPT2}, gpt2=True),
    "hra": Kind("HRA", {"r": 4}),
    "hra gs": Kind("HRA", {"r": 4, "apply_GS": True, "bias": "hra_only"}, BIASED),
    "ia3": Kind("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ia3 bias": Kind("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, BIASED),
    "ia3 regex": Kind("IA3", {"target_modules": r".*\.(k_proj|up_proj)", "feedforward_modules": r".*\.mlp\..*"}, BIASED),
    "ia3 gpt2": Kind("IA3", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}, gpt2=True),
    "ln_tuning": Kind("LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}),
    "ln_tuning gpt2": Kind("LN_TUNING", {"target_modules": ["ln_1", "ln_f"]}, gpt2=True),
    "loha": Kind("LOHA", {"r": 4}),
    "loha patterns": Kind("LOHA", {"r": 4, "alpha": 2, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}}),
    "lokr": Kind("LOKR", {"r": 4}),
    "lokr both": Kind("LOKR", {"r": 2, "decompose_both": True, "decompose_factor": 4, "rank_pattern": {"v_proj": 1}}),
    "miss": Kind("MISS", {"r": 4}),
    "miss bat": Kind("MISS", {"r": 4, "init_weights": "bat"}),
    "miss mini": Kind("MISS", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
    "oft": Kind("OFT", {"oft_block_size": 8}),
    "oft r": Kind("OFT", {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False, "bias": "oft_only"}, BIASED),
    "oft coft": Kind("OFT", {"oft_block_size": 8, "coft": True, "eps": 1e-3, "block_share": True}),
    "oft embedding": Kind("OFT", {"oft_block_size": 8, "target_modules": ["q_proj", "embed_tokens"]}),
    "osf": Kind("OSF", {"effective_rank": 4}),
    "peanut": Kind("PEANUT", {"r": 4}),
    "peanut deep": Kind("PEANUT", {"r": 4, "depth": 2, "act_fn": "silu"}),
    "psoft": Kind("PSOFT", {"r": 4}),
    "psoft lowrank": Kind("PSOFT", {"r": 4, "psoft_svd": "lowrank", "use_cayley_neumann": True}),
    "pvera": Kind("PVERA", {"r": 8}),
    "randlora": Kind("RANDLORA", {"r": 4}, size=0.01),
    "randlora sparse": Kind("RANDLORA", {"r": 4, "sparse": True}, size=0.01),
    "road": Kind("ROAD", {"group_size": 16}),
    "road bias": Kind("ROAD", {"group_size": 16, "variant": "road_2"}, BIASED),
    "road 4": Kind("ROAD", {"group_size": 16, "variant": "road_4"}, BIASED),
    "shira": Kind("SHIRA", {"r": 2, "random_seed": 5}),
    "supertuning": Kind("SUPERTUNING"),
    "supertuning lora": Kind("SUPERTUNING", {"r": 4, "lora_alpha": 8, "save_precomputed_indices": False}),
    "tinylora": Kind("TINYLORA", {"u": 8}),
    "tinylora tied": Kind("TINYLORA", {"u": 8, "weight_tying": 0.5}),
    "tinylora one": Kind("TINYLORA", {"u": 8, "weight_tying": 1.0}),
    "tinylora embedding": Kind("TINYLORA", {"u": 8, "target_modules": ["q_proj", "embed_tokens"]}),
    "trainable_tokens": Kind("TRAINABLE_TOKENS", {"target_modules": ["embed_tokens"], "token_indices": [1, 5]}),
    "unilora": Kind("UNILORA", {"save_indices": True}),
    "vblora": Kind("VBLORA", {"r": 2, "num_vectors": 16, "vector_length": 16}),
    "vblora topk": Kind("VBLORA", {"r": 2, "num_vectors": 16, "vector_length": 16, "save_only_topk_weights": True}),
    "vera": Kind("VERA", {"r": 8}),
    "vera bias": Kind("VERA", {"r": 8, "bias": "all"}, BIASED),
    "waveft": Kind("WAVEFT", {"n_frequency": 50}),
    "waveft db2": Kind("WAVEFT", {"n_frequency": 50, "wavelet_family": "db2", "use_idwt": False}),
    **{f"{kind} gpt2": Kind(kind.upper(), {**GPT2, **options}, gpt2=True, size=0.01) for kind, options in ON_CONV1D.items()},
    "tokens tied": Kind("TRAINABLE_TOKENS", {"target_modules": ["embed_tokens"], "token_indices": [1, 5]}, TIED),
    "lora tokens tied": Kind("LORA", {"trainable_token_indices": [1, 5]}, TIED),
    "adalora tokens": Kind("ADALORA", {"init_r": 4, "total_step": 10, "trainable_token_indices": [1, 5]}),
    "pvera drawn": Kind("PVERA", {"r": 8, "save_projection": False}),
    "randlora drawn": Kind("RANDLORA", {"r": 4, "save_projection": False, "projection_prng_key": 5}, size=0.01),
    "tinylora drawn": Kind("TINYLORA", {"u": 8, "weight_tying": 0.5, "save_projection": False}),
    "tinylora drawn gpt2": Kind("TINYLORA", {"u": 8, "save_projection": False, **GPT2}, gpt2=True),
    "unilora drawn": Kind("UNILORA", {"proj_seed": 7}),
    "unilora drawn gpt2": Kind("UNILORA", {"layers_to_transform": [1], "layers_pattern": "h", **GPT2}, gpt2=True),
    "vera drawn": Kind("VERA", {"r": 8, "save_projection": False}),
    "vera drawn gpt2": Kind("VERA", {"r": 8, "save_projection": False, **GPT2}, gpt2=True, size=0.01),
    "saved whole": Kind("LOHA", {"r": 4, "modules_to_save": ["lm_head", "norm"]}),
}  # fmt: skip

Made = Callable[[str], tuple[Path, Path]]


def fresh(kind: Kind) -> PreTrainedModel:
    model: PreTrainedModel = models.gpt2() if kind.gpt2 else models.llama(torch.float32, **kind.model)
    if kind.model:
        torch.manual_seed(11)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def trained(model: PreTrainedModel, kind: Kind, folder: Path, **more: Any) -> Path:
    """Every parameter that would have been trained is moved, as training moves it."""
    torch.manual_seed(3)
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.peft_type)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = made(**{"target_modules": SOME, "task_type": "CAUSAL_LM", **kind.options, **more})
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * kind.size)
        if kind.pruned:
            adapted_names = [name for name, _ in wrapped.base_model.model.named_parameters() if ".lora_E" in name]
            wrapped.peft_config["default"].rank_pattern = {
                name.removesuffix(".default"): [True, False, True, index % 2 == 0]
                for index, name in enumerate(adapted_names)
            }
        wrapped.save_pretrained(folder)
    return folder


def adapted(model: PreTrainedModel, adapter: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return stock.adapted(model, adapter)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(base, adapter), float32."""
    folder = tmp_path_factory.mktemp("tuners")

    @cache
    def make(name: str) -> tuple[Path, Path]:
        kind = {**KINDS, **OTHERS}[name]
        base = models.save(fresh(kind), folder / name / "base")
        adapter = trained(stock.float_model(base), kind, folder / name / "adapter")
        return base, adapter

    return make


@pytest.mark.parametrize("name", KINDS)
def test_merges_as_peft_does(made: Made, tmp_path: Path, name: str) -> None:
    """Bit for bit what peft's own merge makes of the whole model; and the answers are those of the adapter unmerged, with
    float32 in another order: 4 · DEPTH · 2⁻²⁴ · √160, as in test_merge.py, relative to the largest of sums that cancel."""
    base, adapter = made(name)
    out = stock.merged(tmp_path / "out", base, adapter, "fp32")
    found, before = stock.tensors(out), stock.tensors(base)
    expected = adapted(stock.float_model(base), adapter).merge_and_unload().state_dict()
    assert [n for n, value in found.items() if not torch.equal(value, expected[n])] == []
    changed = {n for n, value in before.items() if not torch.equal(value, expected[n])}
    assert len(changed) >= least(name), "the control: every layer that was adapted differs from the base's"
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    unmerged = models.logits(adapted(stock.float_model(base), adapter))
    assert stock.distance(models.logits(model), unmerged) < 4 * 15 * 2**-24 * math.sqrt(160)
    assert stock.distance(models.logits(stock.float_model(base)), unmerged) > 1e-4, (
        "the control: the base answers otherwise"
    )


def least(name: str) -> int:
    """Weights that a kind of adapter changes at least: two layers of two modules, or embeddings, or norms."""
    return (
        1
        if "tokens" in name
        else 2
        if name == "unilora drawn gpt2"
        else 3
        if "embedding" in name or name == "ln_tuning"
        else 4
    )


ON_NF4 = [
    "adalora", "boft", "c3a", "delora", "fourierft", "frod", "gralora", "hira", "hra", "ia3 bias", "loha", "lokr", "miss bat",
    "oft", "osf", "psoft", "pvera", "randlora", "road bias", "shira", "supertuning", "tinylora", "unilora", "vblora", "vera",
    "waveft",
]  # fmt: skip


def quantized(base: Path, folder: Path) -> Path:
    """The base as NF4; only its linear layers are rounded."""
    return models.quantize(base, folder, dtype=torch.float32, load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize("name", ON_NF4)
def test_merges_onto_the_quantized_base_it_was_trained_on(made: Made, tmp_path: Path, name: str) -> None:
    """What peft makes of the dequantized values in float32, where it refuses, fails on or rounds the 4-bit ones itself."""
    base, _ = made(name)
    nf4 = quantized(base, tmp_path / "nf4")
    adapter = trained(stock.float_model(nf4), KINDS[name], tmp_path / "adapter")
    found, values = stock.tensors(stock.merged(tmp_path / "out", nf4, adapter, "fp32")), stock.values(nf4)
    expected = adapted(stock.float_model(nf4), adapter).merge_and_unload().state_dict()
    assert [n for n, value in expected.items() if not torch.equal(found[n], value)] == []
    dense = stock.tensors(stock.merged(tmp_path / "dense", base, adapter, "fp32"))
    moved = [n for n in found if n.endswith("down_proj.weight") and not torch.equal(found[n], values[n])]
    assert len(moved) == 2 and all(not torch.equal(found[n], dense[n]) for n in moved), (
        "the control: it is another base"
    )


@pytest.mark.parametrize("name", ["boft", "hira", "hra", "oft", "psoft", "miss bat", "road"])
def test_the_delta_is_that_of_the_base_it_is_merged_onto(made: Made, tmp_path: Path, name: str) -> None:
    """The control of the test above: a delta that was made once, on the 16-bit base, would be wrong for the quantized one."""
    base, adapter = made(name)
    deltas = []
    for folder, out in ((base, "dense"), (quantized(base, tmp_path / "nf4"), "merged")):
        values = stock.values(folder)
        found = stock.tensors(stock.merged(tmp_path / out, folder, adapter, "fp32"))
        deltas.append({n: found[n] - values[n] for n in found if n.endswith("q_proj.weight")})
    assert min(stock.distance(deltas[0][n], deltas[1][n]) for n in deltas[0]) > 0.001


@pytest.mark.parametrize("name", ["delora", "randlora"])
def test_no_byte_depends_on_the_number_of_workers(made: Made, tmp_path: Path, name: str) -> None:
    """peft draws initial values for every layer that it makes; none of them is left."""
    base, adapter = made(name)
    one, other = (stock.merged(tmp_path / str(n), base, adapter, "nf4", workers=n) for n in (1, 3))
    assert stock.differing(stock.tensors(one), stock.tensors(other)) == []


def test_to_a_quantized_target(made: Made, tmp_path: Path) -> None:
    """Rounded like any merged weight: the file's values are the nearest of the grid that bitsandbytes makes of peft's."""
    base, adapter = made("oft")
    out = stock.merged(tmp_path / "out", base, adapter, "nf4")
    merged = adapted(stock.float_model(base), adapter).merge_and_unload()
    dense = models.save(merged, tmp_path / "peft")
    expected = stock.values(quantized(dense, tmp_path / "nf4"))
    found = stock.values(out)
    assert all(torch.equal(found[n], value) for n, value in expected.items() if n.endswith("proj.weight"))


CHANGES: list[tuple[str, str, Any]] = [
    ("loha", "alpha", 5), ("fourierft", "random_loc_seed", 4), ("oft", "use_cayley_neumann", False), ("vblora", "topk", 1),
    ("waveft", "scaling", 1.0), ("ia3", "feedforward_modules", []), ("miss mini", "init_weights", "bat"),
    ("vera drawn", "projection_prng_key", 1), ("unilora drawn", "proj_seed", 8), ("psoft", "use_cayley_neumann", True),
    ("tinylora tied", "projection_seed", 43), ("adalora pruned", "lora_alpha", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value"), CHANGES)
def test_the_options_count(made: Made, tmp_path: Path, name: str, option: str, value: Any) -> None:
    """A control: with one option changed the result is another one, or none."""
    base, adapter = made(name)
    other = shutil.copytree(adapter, tmp_path / "adapter")
    models.edit_json(other / "adapter_config.json", **{option: value})
    found = stock.tensors(stock.merged(tmp_path / "out", base, adapter, "fp32"))
    try:
        changed = stock.tensors(stock.merged(tmp_path / "changed", base, other, "fp32"))
    except AdapterError:
        assert not (tmp_path / "changed").exists()
        return
    assert any(not torch.equal(found[n], value) for n, value in changed.items())


@pytest.mark.parametrize("name", ["loha", "oft", "osf", "tinylora", "unilora drawn", "vera", "waveft"])
def test_a_config_may_leave_out_defaults(made: Made, tmp_path: Path, name: str) -> None:
    """peft's own defaults take their place: r, alpha, seeds, …"""
    base, adapter = made(name)
    short = shutil.copytree(adapter, tmp_path / "short")
    fields = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(KINDS[name].peft_type)].__dataclass_fields__
    config = json.loads((short / "adapter_config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in fields or fields[key].default != value}
    assert len(kept) < len(config) - 5, "the control: there are many"
    (short / "adapter_config.json").write_text(json.dumps({**kept, "peft_type": KINDS[name].peft_type}))
    found, whole = (stock.merged(tmp_path / f"of {folder.name}", base, folder, "fp32") for folder in (short, adapter))
    assert stock.differing(stock.tensors(found), stock.tensors(whole)) == []


# --- every type has its answer ---------------------------------------------------------------------------------------


def test_every_type_of_peft_is_in_one_table() -> None:
    known = {kind.value for kind in PeftType} | {kind.value for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    here = {*peft_fallback.KIND.peft_types, *REFUSED, *get_kind("lora").peft_types}
    assert known - here == set(), "a type that is new in peft: put it into TUNERS or into REFUSED"
    assert here - known == set() and not TUNERS.keys() & REFUSED.keys()


def test_every_type_that_is_merged_is_tested() -> None:
    assert {kind.peft_type for kind in KINDS.values()} >= set(peft_fallback.KIND.peft_types)
    assert all(t.save_option and t.rebuilt_from for t in TUNERS.values() if t.projection)


@pytest.mark.parametrize("peft_type", REFUSED)
def test_what_stands_for_no_weight_is_refused_by_name(made: Made, tmp_path: Path, cli: Cli, peft_type: str) -> None:
    base, adapter = made("loha")
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    models.edit_json(folder / "adapter_config.json", peft_type=peft_type)
    refused(cli, base, folder, tmp_path, peft_type, REFUSED[peft_type][:30])


def change(tensors: dict[str, torch.Tensor], find: str, new: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    name = next(n for n in tensors if find in n)
    value = tensors.pop(name)
    if new:
        tensors[name] = new(value).contiguous()


def without(tensors: dict[str, torch.Tensor], find: str) -> None:
    for name in [n for n in tensors if find in n]:
        del tensors[name]


def unsaved(tensors: dict[str, torch.Tensor], config: dict[str, Any], prefix: str) -> None:
    without(tensors, f"base_model.{prefix}")
    config["save_projection"] = False


LAYER = "base_model.model.model.layers.0.mlp.down_proj."
Damage = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
BAD: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    "half_a_product": ("loha", lambda t, c: change(t, "hada_w2_b", None), ("is incomplete, it lacks", "hada_w2_b")),
    "one_too_many": ("loha", lambda t, c: t.update({LAYER + "hada_w3": torch.zeros(1)}), ("more than peft would have", "hada_w3")),
    "another_type": ("loha", lambda t, c: c.update(peft_type="LOKR"), ("peft_type LOKR", "named lokr_")),
    "another_rank": ("loha", lambda t, c: c.update(r=3), ("LOHA", "size mismatch")),
    "another_width": ("hra", lambda t, c: change(t, "q_proj.hra_u", lambda v: v[:-1]), ("weight has shape [64, 64]", "[-1, 63]")),
    "no_axes": ("boft", lambda t, c: change(t, "boft_R", lambda v: v.flatten()), ("not what peft saves for BOFT", "boft_R")),
    "unknown_option": ("loha", lambda t, c: c.update(hadamard_power=3), ("hadamard_power", "does not know for LOHA")),
    "replicated": ("adalora", lambda t, c: c.update(layer_replication=[[0, 2]]), ("layer_replication",)),
    "no_projection": ("vera", lambda t, c: without(t, "base_model.vera_"), ("vera_A, vera_B", "save_projection=true")),
    "no_bases": ("randlora", lambda t, c: without(t, "base_model.randlora_"), ("randlora_A", "is incomplete")),
    "no_decomposition": ("frod", lambda t, c: unsaved(t, c, "frod_"), ("frod_V", "joint decomposition")),
    "no_bank": ("vblora", lambda t, c: without(t, "vector_bank"), ("vblora_vector_bank", "incomplete")),
    "no_index_map": ("unilora", lambda t, c: without(t, "unilora_indices"), ("unilora", "lacks")),
    "theta_alone": ("unilora", lambda t, c: without(t, "proj."), ("unilora_indices", "save_indices=true")),
    "no_place": ("tinylora", lambda t, c: change(t, "tinylora_P", lambda v: v + 1), ("tinylora_v", "none of 6 layers")),
    "no_seeded_projection": ("tinylora", lambda t, c: without(t, "tinylora_P"), ("tinylora_P", "save_projection=true")),
    "bias_of_weight": ("glora C", lambda t, c: None, ("glora_C", "config_C='none'")),
    "short_tokens": ("trainable_tokens", lambda t, c: c.update(token_indices=[1]), ("2 trained rows", "[1]")),
    "bias_unsaid": ("vera bias", lambda t, c: c.update(bias="none"), (".bias", "modules_to_save")),
}  # fmt: skip
OTHERS = {"glora C": Kind("GLORA", {"r": 4}, BIASED)}
"""Kinds that are refused whole."""


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(made: Made, tmp_path: Path, cli: Cli, name: str) -> None:
    kind, damage, words = BAD[name]
    base, adapter = made(kind)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    damage(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(cli, base, folder, tmp_path, *words)


@pytest.mark.parametrize("name", ["unilora drawn", "tinylora drawn"])
def test_what_is_drawn_in_the_order_of_layers_needs_a_known_architecture(
    made: Made, tmp_path: Path, cli: Cli, name: str
) -> None:
    base, adapter = made(name)
    other = shutil.copytree(base, tmp_path / "base")
    models.edit_json(other / "config.json", model_type="unknown", architectures=["UnknownForCausalLM"])
    option = TUNERS[KINDS[name].peft_type].save_option
    refused(
        cli, other, adapter, tmp_path, f"{option}=False", "does not know this architecture", f"Train with {option}=True"
    )


def test_shapes_on_disk_are_enough_where_no_order_counts(made: Made, tmp_path: Path) -> None:
    base, adapter = made("vera drawn")
    other = shutil.copytree(base, tmp_path / "base")
    models.edit_json(other / "config.json", model_type="unknown", architectures=["UnknownForCausalLM"])
    known, unknown = (stock.merged(tmp_path / f"of {n}", b, adapter, "fp32") for n, b in enumerate((base, other)))
    assert stock.differing(stock.tensors(known), stock.tensors(unknown)) == []


def refused(cli: Cli, base: Path, adapter: Path, tmp_path: Path, *words: str) -> None:
    ran = cli("--base", base, "--adapter", adapter, "--target", "fp32", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and ran.code == 3, ran.err
    assert all(word in " ".join(ran.err.split()) for word in words), ran.err
    assert not (tmp_path / "out").exists()
