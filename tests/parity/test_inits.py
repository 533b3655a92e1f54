"""Initialisations that change the base before training, against PEFT: what a reloaded adapter answers, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qmerge.adapters import lora
from qmerge.adapters.updates import initializations
from qmerge.errors import AdapterError
from qmerge.planning.plan import make_plan
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader

from .. import models
from ..conftest import Cli
from . import stock
from .test_lora_variants import whisper

BOUND = 4 * 15 * 2**-24 * 160**0.5
"""float32 in another order, as in test_adapters.py."""

CHANGING: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa dora": {"init_lora_weights": "pissa", "use_dora": True},
    "pissa patterns": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"k_proj": 3}},
    "pissa embedding": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
    "olora": {"init_lora_weights": "olora"},
    "olora in capitals": {"init_lora_weights": "OLoRA"},
    "olora dora rslora": {"init_lora_weights": "olora", "use_dora": True, "use_rslora": True},
}
PLAIN = {name: {"init_lora_weights": name} for name in ("gaussian", "orthogonal", "mica")}
C_ATTN = "transformer.h.0.attn.c_attn.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Made:
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    folder = tmp_path_factory.mktemp("inits")

    @cache
    def make(name: str) -> Made:
        base = models.save(models.llama(torch.float32), folder / name / "base")
        wrapped = started(reload(base), {**CHANGING, **PLAIN}[name])
        train(wrapped)
        wrapped.save_pretrained(folder / name / "adapter")
        return Made(base, folder / name / "adapter")

    return make


def reload(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu").eval()


def started(model: PreTrainedModel, settings: dict[str, Any]) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": models.LINEAR, **settings})
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def train(wrapped: PeftModel) -> None:
    """Every parameter that would have been trained is moved, as training moves it."""
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.02)


@pytest.mark.parametrize("name", [*CHANGING, *PLAIN])
def test_merged_as_peft_reloads_it(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    """Weights as peft's own merge has them, to the bit; DoRA's within float32, as it sums in another order."""
    found = made(name)
    wrapped = stock.adapted(reload(found.base), found.adapter)
    expected, alone = models.logits(wrapped), models.logits(reload(found.base))
    model, info = stock.loaded(stock.merged(tmp_path / "out", found.base, found.adapter, "fp32"))
    assert not any(info.values()), info
    assert stock.distance(models.logits(model), expected) < BOUND
    assert stock.distance(alone, expected) > 1e-3, "the control"
    state, wanted = model.state_dict(), wrapped.merge_and_unload().state_dict()
    different = [key for key in wanted if not torch.equal(state[key], wanted[key])]
    assert not different or "dora" in name
    assert all(stock.distance(state[key], wanted[key]) < 1e-6 for key in different)


def test_pissa_of_conv1d(tmp_path: Path) -> None:
    """Weights that lie as [in, out] are decomposed as [out, in]."""
    base = models.save(models.gpt2(), tmp_path / "base")
    wrapped = started(models.gpt2(), {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_proj"]})
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    model, _ = stock.loaded(stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32"))
    state, expected = model.state_dict(), wrapped.merge_and_unload().state_dict()
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == []
    assert not torch.equal(expected[C_ATTN], models.gpt2().state_dict()[C_ATTN]), "the control"


@pytest.mark.parametrize("name", ["pissa", "olora", "gaussian"])
def test_plain_products_would_be_another_model(
    made: Callable[[str], Made], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same tensors with init_lora_weights true are B·A on the base as it is. (The numbers give them away:
    that is looked at elsewhere.)"""
    monkeypatch.setattr("qmerge.forecast.preflight.check_deltas", lambda plan, context: None)
    found = made(name)
    plain = shutil.copytree(found.adapter, tmp_path / "plain")
    models.edit_json(plain / "adapter_config.json", init_lora_weights=True)
    written = [
        stock.tensors(stock.merged(tmp_path / f"of-{kind.parent.name}-{kind.name}", found.base, kind, "fp32"))
        for kind in (found.adapter, plain)
    ]
    distance = stock.distance(written[1][Q], written[0][Q])
    assert distance > 0.1 if name in CHANGING else distance == 0


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_16"])
def test_converted_adapters_are_plain(tmp_path: Path, init: str, rslora: bool) -> None:
    """peft's conversion doubles the rank, and says init_lora_weights true: [A; A₀] and [B, −B₀] on the base as it is."""
    base = models.save(models.llama(torch.float32), tmp_path / "base")
    wrapped = started(reload(base), {"init_lora_weights": init, "use_rslora": rslora})
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = init
    train(wrapped)
    expected = models.logits(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8
    model, _ = stock.loaded(stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32"))
    assert stock.distance(models.logits(model), expected) < BOUND
    assert stock.distance(models.logits(reload(base)), expected) > 1e-3, "the control"


def test_a_converted_adapter_of_corda_keeps_its_settings(made: Callable[[str], Made], tmp_path: Path) -> None:
    """peft's conversion leaves corda_config and lora_ga_config where they are, and peft ignores them there."""
    found = made("gaussian")
    folder = shutil.copytree(found.adapter, tmp_path / "adapter")
    models.edit_json(folder / "adapter_config.json", init_lora_weights=True, corda_config={"corda_method": "ipm"},
                     lora_ga_config={"direction": "ArB2r"})  # fmt: skip
    written = [
        stock.tensors(stock.merged(tmp_path / f"of-{kind.parent.name}-{kind.name}", found.base, kind, "fp32"))
        for kind in (found.adapter, folder)
    ]
    assert stock.differing(*written) == []


# --- quantized bases -------------------------------------------------------------------------------------------------


def quantized(base: Path, folder: Path) -> Path:
    return models.quantize(base, folder, dtype=torch.float32, **stock.BASES["nf4"])


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_quantized_base_is_not_what_training_began_with(
    made: Callable[[str], Made], tmp_path: Path, cli: Cli, name: str
) -> None:
    """The 16-bit original beside it is, and so is a dense base that is quantized after the merge."""
    found = made(name)
    nf4, out = quantized(found.base, tmp_path / "nf4"), tmp_path / "out"
    for more in (("--base", nf4), ("--base", found.base, "--trained-on", "nf4")):
        ran = cli(*more, "--adapter", found.adapter, "--target", "fp32", "--out", out)
        assert isinstance(ran.error, AdapterError) and "weights that training began with" in ran.err, ran.err
        assert "--original" in ran.err and not out.exists()
    onto = ("--original", found.base, "--merge-onto", "original", "--rounding", "nearest")
    ran = cli("--base", nf4, "--adapter", found.adapter, *onto, "--target", "nf4", "--out", out)
    assert ran.code == 0, ran.err
    direct = stock.merged(tmp_path / "direct", found.base, found.adapter, "fp32")
    assert stock.distance(stock.values(out)[Q], stock.values(direct)[Q]) < 0.15, "the error of NF4"
    dense = stock.merged(tmp_path / "dense", found.base, found.adapter, "nf4")
    assert stock.distance(stock.values(dense)[Q], stock.values(direct)[Q]) < 0.15
    assert stock.distance(stock.values(nf4)[Q], stock.values(direct)[Q]) > 0.2, "the control"


@pytest.mark.parametrize("combine", ["linear", "chain"])
def test_nor_among_other_adapters(made: Callable[[str], Made], tmp_path: Path, combine: str) -> None:
    found = made("pissa")
    nf4 = quantized(found.base, tmp_path / "nf4")
    other = models.adapter(models.llama(torch.float32), tmp_path / "other")
    for adapters in ([other, found.adapter], [found.adapter, other]):
        recipe = make_recipe(
            {"base": str(nf4), "adapter": list(map(str, adapters)), "combine": combine, "target": "nf4"}
        )
        with Reader() as reader, pytest.raises(AdapterError, match="a quantized copy has others"):
            make_plan(recipe, reader)


def test_peft_starts_pissa_on_no_quantized_layer_and_requantizes_under_olora(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    """Why: one cannot have been trained there, and the other's base lies on scales of its own."""
    nf4 = quantized(made("pissa").base, tmp_path / "nf4")
    with pytest.raises(TypeError, match="PiSSA"):
        started(AutoModelForCausalLM.from_pretrained(nf4, device_map="cpu"), CHANGING["pissa"])
    wrapped = started(AutoModelForCausalLM.from_pretrained(nf4, device_map="cpu"), CHANGING["olora"])
    absmax = wrapped.get_submodule(f"base_model.model.{Q.removesuffix('.weight')}.base_layer").weight.quant_state.absmax
    assert not torch.equal(absmax, load_file(nf4 / "model.safetensors")[f"{Q}.absmax"])


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pissa_niter": ({"init_lora_weights": "pissa_niter_16"}, ("pissa_niter_16", "randomized", "path_initial_model")),
    "corda": ({"init_lora_weights": "corda"}, ("preprocess_corda", "path_initial_model")),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, ("preprocess_loraga", "path_initial_model")),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, ("quantized copy", "loftq_config {}")),
    "loftq config": ({"loftq_config": {"loftq_bits": 4}}, ("loftq_config=", "quantized copy", "loftq_config {}")),
    "unknown": ({"init_lora_weights": "new"}, ("'new'", "does not know", "path_initial_model")),
    "olora of Conv1D": ({"init_lora_weights": "olora", "fan_in_fan_out": True}, ("wrong way round",)),
    "olora and qalora": ({"init_lora_weights": "olora", "use_qalora": True}, ("no layer that combines olora",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason_and_a_way_out(
    made: Callable[[str], Made], tmp_path: Path, cli: Cli, name: str
) -> None:
    settings, words = REFUSED[name]
    found = made("gaussian")
    folder = shutil.copytree(found.adapter, tmp_path / "adapter")
    models.edit_json(folder / "adapter_config.json", **settings)
    ran = cli("--base", found.base, "--adapter", folder, "--target", "fp32", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and all(word in ran.err for word in words), ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["pissa_init", "pissa_backup", "pissa_converted"])
def test_folders_of_llama_factory(made: Callable[[str], Made], tmp_path: Path, cli: Cli, folder: str) -> None:
    """Their configs are alike; only the folder's name tells which base it belongs to."""
    found = made("gaussian")
    models.edit_json(shutil.copytree(found.adapter, tmp_path / folder) / "adapter_config.json", init_lora_weights=True)
    ran = cli("--base", found.base, "--adapter", tmp_path / folder, "--target", "fp32", "--out", tmp_path / "out")
    if folder == "pissa_converted":
        assert ran.code == 0, ran.err
    else:
        assert isinstance(ran.error, AdapterError) and "take the folder pissa_converted" in ran.err, ran.err


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_starts_no_convolution_that_way(init: str) -> None:
    with pytest.raises((ValueError, AttributeError)):
        started(whisper(), {"init_lora_weights": init, "target_modules": ["conv1"]})
    halves = {"c.lora_A.weight": torch.ones(4, 8, 3), "c.lora_B.weight": torch.ones(32, 4, 1)}
    assert lora.KIND.updates({"r": 4, "lora_alpha": 8}, halves, None), "the control"
    with pytest.raises(AdapterError, match="linear layers only"):
        lora.KIND.updates({"r": 4, "lora_alpha": 8, "init_lora_weights": init}, halves, None)


def test_inits_of_peft_are_classified() -> None:
    """The values that LoraConfig's own annotation lists: a new one fails here until somebody says what it does."""
    found = get_args(get_type_hints(LoraConfig)["init_lora_weights"])
    values = [value for part in found for value in get_args(part)]
    assert {"pissa", "olora", "corda", "loftq", "gaussian"} <= set(values)
    known = {*initializations.PLAIN, "pissa", "olora"}
    assert all(value in known or value.startswith(tuple(initializations.REFUSED)) for value in values), values
