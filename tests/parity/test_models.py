"""Architectures that transformers stacks, joins, renames or ties: the merged checkpoint answers as base and adapter do."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from qmerge.errors import AdapterError, RecipeError
from qmerge.extract import extract
from qmerge.recipe import make_recipe
from qmerge.report.records import fingerprint_record
from qmerge.run import merge
from qmerge.schema import read_report

from .. import models
from ..checkpoint import test_names
from ..conftest import Cli
from . import bases, stock

BOUND = 4 * 15 * 2**-24 * 160**0.5
"""float32 in another order: see test_merge.py."""

TIED = {"gemma3-text"}
ATTENTION = r".*(self_attn|attn)\.(q_proj|c_attn|o_proj|c_proj)|.*mlp\.(up_proj|c_fc)|.*visual.*qkv"
EXPERTS = ["mixtral", "qwen3-moe", "phimoe", "gpt-oss", "granite-moe", "qwen3-vl-moe"]


@dataclass(frozen=True)
class Made:
    base: Path
    adapter: Path
    expected: Tensor
    alone: Tensor
    kind: type


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str, old: bool = True, experts: bool = True) -> Made:
        here = folder / f"{name}-{old}-{experts}"
        model = test_names.build(name)
        if name in TIED:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(here / "base", save_original_format=old)
        reloaded = type(model).from_pretrained(here / "base", dtype=torch.float32).eval()
        alone = models.logits(reloaded)
        wrapped = trained(reloaded, here / "adapter", experts and name in EXPERTS)
        return Made(here / "base", here / "adapter", models.logits(wrapped), alone, type(model))

    return make


def trained(model: Any, folder: Path, experts: bool, seed: int = 5, **more: Any) -> PeftModel:
    parameters = ["experts.gate_up_proj", "experts.down_proj"] if experts else None
    if experts and not any(name.endswith("gate_up_proj") for name, _ in model.named_parameters()):
        parameters = ["input_linear.weight", "output_linear.weight"]  # Granite's words
    settings = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "target_parameters": parameters, **more}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        wrapped.save_pretrained(folder)
    return wrapped


def answer(found: Made, out: Path) -> Tensor:
    model, info = found.kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return models.logits(model.eval())


@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("name", test_names.MODELS)
def test_answers_as_the_unmerged_adapter_does(made: Any, tmp_path: Path, name: str, old: bool) -> None:
    found = made(name, old)
    out = stock.merged(tmp_path / "out", found.base, found.adapter, "fp32")
    assert stock.distance(answer(found, out), found.expected) < BOUND
    assert stock.distance(found.alone, found.expected) > 1e-3, "the control"
    assert stock.tensors(out).keys() == stock.tensors(found.base).keys(), "written in the layout of the disk"


@pytest.mark.parametrize("name", test_names.MODELS)
def test_in_nf4_it_is_what_the_stock_library_quantizes(made: Any, tmp_path: Path, name: str) -> None:
    """The float32 merge, quantized by transformers as it loads it, and the NF4 merge: the same values in every layer."""
    found = made(name)
    dense = stock.merged(tmp_path / "dense", found.base, found.adapter, "fp32")
    out = stock.merged(tmp_path / "out", found.base, found.adapter, "nf4")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False)
    told = found.kind.from_pretrained(dense, dtype=torch.float32, quantization_config=settings, device_map="cpu")
    ours, info = found.kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True, device_map="cpu")
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    expected, values = stock.weights_of(told), stock.weights_of(ours)
    assert expected.keys() == values.keys()
    assert [key for key in expected if not torch.equal(expected[key], values[key])] == []
    assert stock.quantized_names(out)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_calibrated_runs(made: Any, tmp_path: Path, name: str) -> None:
    """preserve walks the model layer by layer, experts and all."""
    found = made(name)
    # Other tokens round differently, and a router close to a tie may send a token elsewhere.
    more = {"rounding": "preserve", "calibration": "random", "calibration_tokens": 256, "sequence_length": 16}
    out = stock.merged(tmp_path / "out", found.base, found.adapter, "bf16", **more)
    assert stock.distance(answer(found, out), found.expected) < 0.05


@pytest.mark.parametrize("target", ["w4a16", "w8a16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_single_experts_in_packed_integers(made: Any, tmp_path: Path, name: str, target: str) -> None:
    """transformers 5.23 takes single experts of a compressed-tensors model only where they are packed. What it loads are the
    values that compressed-tensors unpacks."""
    pytest.importorskip("compressed_tensors")
    found = made(name)
    out = stock.merged(tmp_path / "out", found.base, found.adapter, target, group_size=-1)
    written = stock.tensors(out)
    experts = [key for key in written if ".experts." in key and key.endswith("weight_packed")]
    assert len(experts) == 2 * 12 * 3
    model, info = found.kind.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    values = bases.oracle(out)
    down = "w2" if name == "mixtral" else "down_proj"
    for layer in range(2):
        loaded = model.get_parameter(f"model.layers.{layer}.mlp.experts.down_proj")
        for expert in range(12):
            (key,) = [k for k in values if f"layers.{layer}." in k and f".experts.{expert}.{down}." in k]
            torch.testing.assert_close(loaded[expert], values[key], rtol=2**-8, atol=0)
    assert stock.distance(models.logits(model.eval()), found.expected) < 1.0
    with pytest.raises(RecipeError, match=r"would stay dense .*, and transformers"):
        stock.merged(tmp_path / "refused", found.base, found.adapter, "w8a8")
    with pytest.raises(RecipeError, match="symmetric"):
        stock.merged(tmp_path / "asymmetric", found.base, found.adapter, target, group_size=-1, sym=False)


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2.5-vl", "gpt2", "mixtral"])
def test_a_lora_comes_back_under_names_that_peft_finds(made: Any, tmp_path: Path, name: str) -> None:
    found = made(name, True, False)
    out = stock.merged(tmp_path / "out", found.base, found.adapter, "fp32")
    extract(str(out), str(found.base), tmp_path / "lora", rank=4, device="cpu")
    base = found.kind.from_pretrained(found.base, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, tmp_path / "lora", autocast_adapter_dtype=False).eval()
    assert stock.distance(models.logits(wrapped), found.expected) < 10 * BOUND, (
        "through a difference of float32 numbers"
    )
    assert stock.distance(found.alone, found.expected) > 1e-3, "the control"


def test_experts_packed_in_mxfp4(tmp_path: Path) -> None:
    """gpt-oss as it is published. The square down_proj is [E, I, O]: transformers says so, its shape does not."""
    base = bases.make("mxfp4", tmp_path / "base", intermediate_size=64)
    wrapped = trained(stock.float_model(base, bases.values(base)), tmp_path / "adapter", True)
    expected = models.logits(wrapped)
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32")
    model, info = stock.loaded(out)
    assert not any(info.values())
    assert stock.distance(models.logits(model), expected) < BOUND
    alone = models.logits(stock.float_model(base, bases.values(base)))
    assert stock.distance(alone, expected) > 1e-3, "the control"


# --- adapters of other versions and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("old", [True, False], ids=["single", "stacked"])
def test_adapters_of_single_experts(made: Any, tmp_path: Path, old: bool) -> None:
    """As older versions of transformers had them: w1, w2 and w3 of every expert by themselves."""
    found = made("mixtral", old, False)
    tensors = load_file(found.adapter / "adapter_model.safetensors")
    shapes = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}
    torch.manual_seed(9)
    for layer in range(2):
        for expert in range(12):
            for part, (outputs, inputs) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, inputs) * 0.2
                tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 4) * 0.2
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_bytes((found.adapter / "adapter_config.json").read_bytes())
    modules = ["q_proj", "o_proj", "w1", "w2", "w3"]
    models.edit_json(adapter / "adapter_config.json", target_modules=modules, target_parameters=None)
    out = stock.merged(tmp_path / "out", found.base, adapter, "fp32")
    base = found.kind.from_pretrained(found.base, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = models.logits(PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval())
    assert stock.distance(answer(found, out), expected) < BOUND
    assert stock.distance(found.expected, expected) > 1e-3, "the control: with the attention's part alone"


def with_experts_written_the_other_way(source: Path, place: Path, **config: Any) -> Path:
    """lora_B expert by expert, as Unsloth wrote it for a time."""
    place.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    for key, values in tensors.items():
        if ".experts." in key and "lora_B" in key:
            tensors[key] = values.reshape(len(values), -1, 12).transpose(1, 2).reshape(values.shape).contiguous()
    save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    models.edit_json(place / "adapter_config.json", **config)
    return place


UNSLOTH = {"auto_mapping": {"unsloth_fixed": True}}


def test_columns_expert_by_expert_where_the_config_says_so(made: Any, tmp_path: Path) -> None:
    found = made("qwen3-moe")
    other = with_experts_written_the_other_way(found.adapter, tmp_path / "other", lora_B_layout="expert_major")
    out = stock.merged(tmp_path / "out", found.base, other, "fp32")
    assert stock.distance(answer(found, out), found.expected) < BOUND
    models.edit_json(other / "adapter_config.json", lora_B_layout="rank_major")
    out = stock.merged(tmp_path / "wrong", found.base, other, "fp32")
    assert stock.distance(answer(found, out), found.expected) > 1e-3, "the control"


def test_random_columns_of_unsloths_are_asked_for(made: Any, tmp_path: Path, cli: Cli) -> None:
    found = made("qwen3-moe")
    other = with_experts_written_the_other_way(found.adapter, tmp_path / "other", **UNSLOTH)
    ran = cli("--base", found.base, "--adapter", other, "--target", "fp32", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and "numbers do not tell" in ran.err and "lora_B_layout" in ran.err
    assert not (tmp_path / "out").exists()


def test_trained_columns_tell_their_layout(tmp_path: Path) -> None:
    """A few steps of real training: the columns of an expert have the gradients of its tokens in common."""
    model = test_names.build("qwen3-moe")
    model.save_pretrained(tmp_path / "base")
    found = Made(tmp_path / "base", tmp_path / "adapter", torch.empty(0), models.logits(model), type(model))
    settings = LoraConfig(r=8, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[])
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=0.02)
    for step in range(8):
        ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(step))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = models.logits(wrapped.eval())
    other = with_experts_written_the_other_way(tmp_path / "adapter", tmp_path / "other", **UNSLOTH)
    out = stock.merged(tmp_path / "out", found.base, other, "fp32")
    assert stock.distance(answer(found, out), expected) < BOUND, "told from the numbers"
    assert stock.distance(found.alone, expected) > 1e-3, "the control"
    models.edit_json(other / "adapter_config.json", auto_mapping=None)
    with pytest.raises(AdapterError, match="look expert by expert"):
        stock.merged(tmp_path / "refused", found.base, other, "fp32")


def test_square_experts_of_an_older_peft_lie_transposed(tmp_path: Path) -> None:
    """Before 0.19, lora_A took the first axis of [E, O, I] for the inputs: only the version tells where both are equal."""
    model = test_names.build("qwen3-moe")
    model.config.moe_intermediate_size = 32
    model = type(model)(model.config).eval()
    model.save_pretrained(tmp_path / "base")
    found = Made(tmp_path / "base", tmp_path / "adapter", torch.empty(0), models.logits(model), type(model))
    settings = {"target_parameters": ["experts.down_proj"], "target_modules": []}
    wrapped = trained(model, found.adapter, False, **settings)
    expected = models.logits(wrapped)
    tensors = load_file(found.adapter / "adapter_model.safetensors")
    older = {}
    for key, values in tensors.items():  # (B A)ᵀ = Aᵀ Bᵀ, expert by expert
        pair = tensors[key.replace("lora_A", "?").replace("lora_B", "lora_A").replace("?", "lora_B")]
        split = pair.reshape(12, 4, -1).permute(2, 1, 0).reshape(values.shape) if "lora_B" in key else None
        older[key] = pair.reshape(-1, 4, 12).permute(2, 1, 0).reshape(values.shape) if split is None else split
    save_file({key: values.contiguous() for key, values in older.items()}, found.adapter / "adapter_model.safetensors")
    models.edit_json(found.adapter / "adapter_config.json", peft_version="0.18.1")
    out = stock.merged(tmp_path / "out", found.base, found.adapter, "fp32")
    assert stock.distance(answer(found, out), expected) < BOUND
    models.edit_json(found.adapter / "adapter_config.json", peft_version="0.19.0")
    out = stock.merged(tmp_path / "wrong", found.base, found.adapter, "fp32")
    assert stock.distance(answer(found, out), expected) > 1e-3, "the control"
    models.edit_json(found.adapter / "adapter_config.json", peft_version=None)
    with pytest.raises(AdapterError, match="has no peft_version"):
        stock.merged(tmp_path / "refused", found.base, found.adapter, "fp32")


@pytest.mark.parametrize("old", [True, False], ids=["single", "stacked"])
def test_two_adapters_of_experts_are_one_delta(made: Any, tmp_path: Path, old: bool) -> None:
    found = made("mixtral", old)
    base = found.kind.from_pretrained(found.base, dtype=torch.float32).eval()
    trained(base, tmp_path / "second", True, seed=6, lora_alpha=16)
    merged_twice = found.base
    for number, adapter in enumerate((found.adapter, tmp_path / "second")):
        merged_twice = stock.merged(tmp_path / f"step{number}", merged_twice, adapter, "fp32")
    out = tmp_path / "out"
    settings = {"base": str(found.base), "adapter": [str(found.adapter), str(tmp_path / "second")], "target": "fp32"}
    merge(make_recipe({**settings, "out": str(out), "device": "cpu", "rounding": "nearest"}))
    assert stock.distance(answer(found, out), answer(found, merged_twice)) < BOUND
    assert stock.distance(answer(found, out), found.expected) > 1e-3, "the control"


def test_half_an_adapter_of_experts_is_refused(made: Any, tmp_path: Path, cli: Cli) -> None:
    found = made("mixtral")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = load_file(found.adapter / "adapter_model.safetensors")
    config = json.loads((found.adapter / "adapter_config.json").read_text())
    for wanted, targets, words in (
        (lambda key: ".experts.base_layer." not in key, config["target_parameters"], "gate_up_proj is one of"),
        (lambda key: True, ["experts.gate_up_prooj", "experts.down_proj"], "Is one misspelt"),
        (lambda key: ".experts." not in key, ["experts.gate_up_prooj"], "no LoRA in the file belongs to"),
    ):
        save_file({k: v for k, v in tensors.items() if wanted(k)}, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": targets}))
        ran = cli("--base", found.base, "--adapter", adapter, "--target", "fp32", "--out", tmp_path / "out")
        assert isinstance(ran.error, AdapterError) and words in ran.err, ran.err
        assert not (tmp_path / "out").exists()
    described = cli("inspect", found.adapter)
    assert described.code == 0 and "give --base" in described.err
    beside = json.loads(cli("inspect", found.adapter, "--base", found.base, "--json").out)
    assert beside["problem"] is None and beside["changes"]["LoRA"] > 2 * 12 * 3


def test_experts_of_a_quantized_base_are_packed_too(made: Any, tmp_path: Path) -> None:
    """bitsandbytes leaves stacked experts dense; w4a16 must not."""
    pytest.importorskip("compressed_tensors")
    found = made("mixtral")
    nf4 = stock.merged(tmp_path / "nf4", found.base, found.adapter, "nf4")
    (nf4 / "qmerge.json").unlink()  # it says that the adapter is in there already
    out = stock.merged(tmp_path / "out", nf4, found.adapter, "w4a16", group_size=-1)
    assert len([k for k in stock.tensors(out) if ".experts." in k and k.endswith("weight_packed")]) == 2 * 12 * 3
    _, info = found.kind.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info


# --- layers that are used several times ------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_replicated_layers_become_layers_of_their_own(tmp_path: Path, quantized: bool) -> None:
    """peft merges them all into the one weight that they share, and nothing refuses (peft#1707)."""
    base = models.save(models.llama(torch.float32, num_hidden_layers=3), tmp_path / "base")
    ranges = [[0, 2], [1, 3], [1, 2]]
    if quantized:
        base = models.quantize(base, tmp_path / "nf4", dtype=torch.float32, **stock.BASES["nf4"])
    wrapped = trained(
        stock.float_model(base), tmp_path / "adapter", False, layer_replication=ranges, target_modules=models.LINEAR
    )
    expected = models.logits(wrapped)
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32")
    model, info = stock.loaded(out)
    assert not any(info.values()) and model.config.num_hidden_layers == 5
    assert stock.distance(models.logits(model), expected) < BOUND
    one, other = (model.get_submodule(f"model.layers.{k}.mlp.up_proj").weight for k in (1, 2))
    assert not torch.equal(one, other), "the control: copies of one layer, each with a delta of its own"
    fingerprints = [read_report(out).inputs[0].fingerprint, fingerprint_record(base)]
    assert fingerprints[0] == fingerprints[1], "that of the base as it lies there"
    same = stock.merged(tmp_path / "nf4-out", base, tmp_path / "adapter", "nf4")
    assert not any(stock.loaded(same)[1].values())


def test_kinds_of_layers_move_with_them(tmp_path: Path, cli: Cli) -> None:
    kinds = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    settings = {**models.LLAMA, **kinds, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**settings)).eval()
    base = models.save(model, tmp_path / "base")
    wrapped = trained(model, tmp_path / "adapter", False, layer_replication=[[0, 2], [0, 3]])
    old = wrapped.config.layer_types  # peft leaves it as it was, and then the model does not run
    wrapped.get_base_model().model.config.layer_types = [old[layer] for layer in (0, 1, 0, 1, 2)]
    expected = models.logits(wrapped)
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32")
    merged, info = stock.loaded(out)
    assert not any(info.values())
    assert [kind[:4] for kind in merged.config.layer_types] == ["slid", "full", "slid", "full", "full"]
    assert stock.distance(models.logits(merged), expected) < BOUND
    models.edit_json(tmp_path / "adapter" / "adapter_config.json", layer_replication=[[0, 4]])
    ran = cli("--base", base, "--adapter", tmp_path / "adapter", "--target", "fp32", "--out", tmp_path / "no")
    assert isinstance(ran.error, AdapterError) and "the base has 3 layers" in ran.err
