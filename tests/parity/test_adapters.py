"""Everything that LoRA can be in PEFT, against PEFT itself: the merged model answers as base and adapter do unmerged."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qmerge.errors import AdapterError
from qmerge.recipe import make_recipe

from .. import models
from ..checkpoint import test_names
from ..conftest import Cli
from . import stock

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}


@dataclass(frozen=True)
class Kind:
    """``lora``: settings of LoraConfig; ``model``: of the Llama; ``resize``: tokens that were added before training."""

    lora: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    resize: int = 0


SOME = ["q_proj", "down_proj"]
KINDS = {
    "dora": Kind({"use_dora": True, "target_modules": models.LINEAR}),
    "dora rslora patterns": Kind({"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "lora_bias": Kind({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, BIASED),
    "bias all": Kind({"bias": "all"}, BIASED),
    "bias lora_only": Kind({"bias": "lora_only", "target_modules": ["q_proj"]}, BIASED),
    "embedding": Kind({"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding tied": Kind({"target_modules": ["q_proj", "embed_tokens"]}, TIED),
    "lm_head": Kind({"target_modules": ["q_proj", "lm_head"]}),
    "lm_head tied": Kind({"target_modules": ["q_proj", "lm_head"]}, TIED),
    "saved lm_head": Kind({"modules_to_save": ["lm_head"]}),
    "saved lm_head tied": Kind({"modules_to_save": ["lm_head"]}, TIED),
    "saved embed_tokens tied": Kind({"modules_to_save": ["embed_tokens"]}, TIED),
    "saved both, kept tied": Kind({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, TIED),
    "saved norms": Kind({"modules_to_save": ["norm", "input_layernorm"]}),
    "saved layer": Kind({"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}),
    "tokens": Kind({"trainable_token_indices": [1, 5, 95]}),
    "tokens by name": Kind({"trainable_token_indices": {"embed_tokens": [0, 7]}}),
    "resized": Kind({"modules_to_save": ["embed_tokens", "lm_head"]}, resize=5),
    "resized without asking": Kind({}, resize=5),
    # TRL's SFTTrainer trains the new tokens of a chat template so.
    "resized, rows trained": Kind(
        {"trainable_token_indices": {"embed_tokens": [96, 97, 100]}, "modules_to_save": ["lm_head"]}, resize=5
    ),
    "resized, rows trained, kept tied": Kind({"trainable_token_indices": [96, 97, 100]}, TIED, resize=5),
}  # fmt: skip

Made = Callable[[str], tuple[Path, Path, torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(base, adapter, logits of both unmerged, logits of the base alone), all float32."""
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def make(name: str) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
        kind = KINDS[name]
        base = models.save(models.llama(torch.float32, **kind.model), folder / name / "base")
        adapter = trained(reload(base), kind, folder / name / "adapter")
        return base, adapter, models.logits(unmerged(base, adapter, kind.resize)), models.logits(reload(base))

    return make


def reload(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu").eval()


def unmerged(base: Path, adapter: Path, resize: int = 0) -> PeftModel:
    model = reload(base)
    if resize:
        model.resize_token_embeddings(96 + resize)
    return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval()


def trained(model: PreTrainedModel, kind: Kind, folder: Path) -> Path:
    """Every parameter that would have been trained is moved, as training moves it."""
    torch.manual_seed(3)
    if kind.resize:
        model.resize_token_embeddings(96 + kind.resize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about tied embeddings
        settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": SOME, **kind.lora})
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
        models.train(wrapped)
        wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["fp32", "nf4"])
@pytest.mark.parametrize("name", KINDS)
def test_answers_as_the_unmerged_adapter_does(made: Made, tmp_path: Path, name: str, target: str) -> None:
    """float32 in another order: 4 · DEPTH · 2⁻²⁴ · √160, as in test_merge.py. For NF4 only what is not rounded is compared:
    the model loads, nothing is missing, and what was trained whole is there bit for bit."""
    base, adapter, expected, alone = made(name)
    out = stock.merged(tmp_path / "out", base, adapter, target)
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    assert model.config.vocab_size == 96 + KINDS[name].resize
    if target == "fp32":
        bound = 4 * 15 * 2**-24 * 160**0.5
        assert stock.distance(models.logits(model), expected) < bound
        assert expected.shape != alone.shape or stock.distance(alone, expected) > 1e-3, "the control"
        return
    trained_whole, written = load_file(adapter / "adapter_model.safetensors"), stock.tensors(out)
    for key, values in trained_whole.items():
        there = key.removeprefix("base_model.model.")
        if there in written and not any(part in key for part in ("lora_", "down_proj")):
            assert torch.equal(written[there], values), key


@pytest.mark.parametrize("name", ["dora", "lora_bias", "embedding tied", "saved lm_head tied", "tokens", "resized"])
def test_calibrated_in_the_unmerged_model(
    made: Made, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What calibration sees of the inputs are those of peft's model: its last layer's, which all that is adapted reaches."""
    from qmerge import run
    from qmerge.calibration import texts
    from qmerge.rounding.base import InputStatistics
    from qmerge.run import destinations

    base, adapter, _, _ = made(name)
    seen: dict[str, InputStatistics] = {}
    monkeypatch.setattr(
        destinations, "run_step", lambda step, sink, context, inputs=None: keep(step, sink, context, inputs, seen)
    )
    settings = {"base": str(base), "adapter": str(adapter), "device": "cpu", "sequence_length": 16, "sequential": False}
    more = {"target": "nf4", "rounding": "preserve", "calibration_tokens": 64, "out": str(tmp_path / "out")}
    run.merge(make_recipe({**settings, **more}))
    model, inputs = unmerged(base, adapter, KINDS[name].resize), list[torch.Tensor]()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.gate_proj")
    layer.register_forward_hook(lambda _, args, out: inputs.append(args[0].flatten(0, 1)))
    ids = torch.cat(texts.random_tokens(96 + KINDS[name].resize, tokens=64, length=16, seed=0))
    with torch.no_grad():
        model(input_ids=ids)
    x = torch.cat(inputs)
    found = seen["model.layers.1.mlp.down_proj.weight"]
    assert found.tokens == 64
    gate = model.get_submodule("base_model.model.model.layers.1.mlp")
    h = (torch.nn.functional.silu(gate.gate_proj(x)) * gate.up_proj(x)).detach()
    expected = h.T @ h
    assert stock.distance(found.hessian_II, expected / expected.diagonal().mean()) < 1e-4


@pytest.mark.parametrize("name", ["resized", "resized, rows trained"])
def test_the_base_next_to_a_resized_vocabulary(made: Made, name: str) -> None:
    """To be compared with the adapter model, the base gets the rows that it does not have, and no other, from the adapter."""
    from qmerge.calibration.unmerged import unmerged_model
    from qmerge.evaluation.stored import logits_layer_by_layer
    from qmerge.planning.plan import make_plan, make_run_context
    from qmerge.safetensors_io.reader import Reader

    base, adapter, expected, _ = made(name)
    settings = {"base": str(base), "adapter": str(adapter), "target": "nf4", "out": "out", "device": "cpu"}
    with Reader() as reader:
        plan = make_plan(make_recipe({**settings, "rounding": "preserve"}), reader)
        context = make_run_context(plan, reader)
        found = logits_layer_by_layer(
            *unmerged_model(plan, context, with_delta=False), torch.arange(32).view(2, 16) % 96
        )
    with_delta, without = unmerged(base, adapter, KINDS[name].resize), reload(base)
    with torch.no_grad():
        with_delta.merge_and_unload()
        without.resize_token_embeddings(96 + KINDS[name].resize)
        for get in ("get_input_embeddings", "get_output_embeddings"):
            trained_rows = getattr(with_delta.base_model.model, get)().weight[96:]
            getattr(without, get)().weight[96:] = trained_rows
    assert stock.distance(found, models.logits(without)) < 1e-5
    assert stock.distance(found, expected) > 1e-3, "the control"


@pytest.mark.parametrize("name", ["resized", "resized, rows trained"])
def test_a_resized_vocabulary_stays_dense_where_embeddings_are_quantized(made: Made, tmp_path: Path, name: str) -> None:
    base, adapter, _, _ = made(name)
    out = stock.merged(tmp_path / "out", base, adapter, "mlx", group_size=32)
    written = stock.tensors(out)
    assert written["lm_head.weight"].shape == written["model.embed_tokens.weight"].shape == (101, 64)
    assert torch.equal(
        written["lm_head.weight"], load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    )
    assert "lm_head.scales" not in written and "model.layers.0.mlp.up_proj.scales" in written


def keep(step: Any, sink: Any, context: Any, inputs: Any, seen: dict[str, Any]) -> Any:
    from qmerge import pipeline

    if inputs is not None:
        seen[step.name] = inputs
    return pipeline.run_step(step, sink, context, inputs)


def test_dora_depends_on_the_base_it_is_merged_onto(made: Made, tmp_path: Path) -> None:
    """On an NF4 base the norms are those of the dequantized weights, in float32: peft computes them in the weights' dtype."""
    base, adapter, _, _ = made("dora")
    quantized = models.quantize(base, tmp_path / "nf4", dtype=torch.float32, **stock.BASES["nf4"])
    out = stock.merged(tmp_path / "out", quantized, adapter, "fp32")
    model = stock.adapted(stock.float_model(quantized), adapter).merge_and_unload()
    expected = {n: p for n, p in model.state_dict().items() if n.endswith("proj.weight")}
    found = stock.tensors(out)
    errors = [stock.distance(found[n], p) for n, p in expected.items()]
    assert max(errors) < 1e-6
    dense = stock.tensors(stock.merged(tmp_path / "dense", base, adapter, "fp32"))
    deltas = [stock.distance(found[n] - stock.values(quantized)[n], dense[n] - stock.values(base)[n]) for n in expected]
    assert min(deltas) > 0.01, "the control: the delta is another one on another base"


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2.5-vl", "gemma3-text"])
def test_names_that_transformers_changes(tmp_path: Path, name: str, layout: str) -> None:
    """The text tower lies under one name on disk and under another in memory, which the adapter has; both layouts of the
    disk, and an adapter with the names of older versions."""
    model = test_names.build(name)
    model.save_pretrained(tmp_path / "base", save_original_format=layout == "old")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*q_proj|model\.layers.*q_proj")
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = models.logits(wrapped.eval())
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved and not any("vision" in key for key in saved)
    spellings = {"now": saved}
    if any("model.language_model.layers" in key for key in saved):
        older = "model.layers" if name == "qwen2.5-vl" else "language_model.model.layers"
        spellings["older"] = {key.replace("model.language_model.layers", older): v for key, v in saved.items()}
    for spelling, tensors in spellings.items():
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        out = stock.merged(tmp_path / spelling, tmp_path / "base", tmp_path / "adapter", "fp32")
        merged, info = type(model).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert stock.distance(models.logits(merged.eval()), expected) < 4 * 15 * 2**-24 * 160**0.5, spelling
    before = models.logits(type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).eval())
    assert stock.distance(before, expected) > 1e-3, "the control"


# --- several adapters ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, and two adapters of other ranks, on other modules, that share some."""
    folder = tmp_path_factory.mktemp("pair")
    base = models.save(models.llama(torch.float32), folder / "base")
    one = models.adapter(models.llama(torch.float32), folder / "one", r=4)
    other = models.adapter(
        models.llama(torch.float32),
        folder / "other",
        r=8,
        seed=5,
        target_modules=["q_proj", "up_proj"],
        use_rslora=True,
    )
    return base, one, other


def test_two_adapters_are_one_delta(pair: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    """0.7 of one and −0.3 of the other: base + the weighted deltas of peft, with no product of one's A and the other's B."""
    base, one, other = pair
    out = tmp_path / "out"
    ran = cli("--base", base, "--adapter", f"{one}=0.7", "--adapter", f"{other}=-0.3", "--target", "fp32", "--out", out)
    assert ran.code == 0, ran.err
    deltas = [stock.deltas(models.llama(torch.float32), adapter) for adapter in (one, other)]
    before, after = stock.tensors(base), stock.tensors(out)
    for name, value in before.items():
        parts = [weight * delta[name] for weight, delta in zip((0.7, -0.3), deltas, strict=True) if name in delta]
        expected = value + sum(parts) if parts else value
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)
    report = json.loads((out / "qmerge.json").read_text())
    assert [record["role"] for record in report["inputs"]] == ["base", "adapter", "adapter"]
    inputs = ("--base", base, "--adapter", f"{one}=0.7", "--adapter", f"{other}=-0.3")
    again = cli("run", out / "qmerge_recipe.yaml", *inputs, "--out", tmp_path / "again")
    assert again.code == 0 and stock.differing(stock.tensors(tmp_path / "again"), after) == []


@pytest.mark.parametrize("method", ["ties", "dare_linear", "svd", "sce"])
def test_ways_to_combine_reach_the_target(pair: tuple[Path, Path, Path], tmp_path: Path, cli: Cli, method: str) -> None:
    """Each gives another model than the sum, and the same again."""
    base, one, other = pair
    written = []
    for name, combine in (("sum", "linear"), ("first", method), ("second", method)):
        density = () if combine in ("linear", "svd") else ("--density", "0.5")
        ran = cli("--base", base, "--adapter", one, "--adapter", other, "--combine", combine, *density, "--target", "nf4",
                  "--rounding", "nearest", "--out", tmp_path / name)  # fmt: skip
        assert ran.code == 0, ran.err
        written.append(stock.tensors(tmp_path / name))
    assert stock.differing(written[1], written[2]) == []
    assert stock.differing(written[0], written[1])


# --- what does not fit -----------------------------------------------------------------------------------------------


def change(tensors: dict[str, torch.Tensor], find: str, new: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    name = next(n for n in tensors if find in n)
    value = tensors.pop(name)
    if new:
        tensors[name] = new(value).contiguous()


BAD: dict[str, tuple[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], None], tuple[str, ...]]] = {
    "no_magnitude": ("dora", lambda t, c: change(t, "magnitude", None), ("no lora_magnitude_vector", "use_dora")),
    "short_magnitude": ("dora", lambda t, c: change(t, "magnitude", lambda v: v[:-1]), ("lora_magnitude_vector has shape", "expected [")),
    "magnitude_unsaid": ("dora", lambda t, c: c.update(use_dora=False), ("lora_magnitude_vector", "does not say use_dora")),
    "bias_unsaid": ("bias all", lambda t, c: c.update(bias="none"), (".bias", "modules_to_save")),
    "bias_option": ("bias all", lambda t, c: c.update(bias="some"), ("bias='some'", "lora_only")),
    "saved_is_missing": ("saved lm_head", lambda t, c: change(t, "lm_head", None), ("'lm_head' in modules_to_save", "no tensor")),
    "saved_is_smaller": ("saved norms", lambda t, c: change(t, "model.norm", lambda v: v[:-1]), ("model.norm.weight has shape [64]", "[63]")),
    "half_an_embedding": ("embedding", lambda t, c: change(t, "embedding_A", None), ("lora_embedding_B", "no lora_embedding_A")),
    "tokens_unsaid": ("tokens", lambda t, c: c.update(trainable_token_indices=None), ("trainable_token_indices", "do not say")),
    "one_resized": ("resized", lambda t, c: t.update({n: v[:96].contiguous() for n, v in t.items() if "lm_head" in n}), ("resizes only one embedding", "101", "96")),
    "two_of_one": ("lm_head", lambda t, c: t.update({"base_model.model.lm_head.weight": torch.zeros(96, 64)}), ("lm_head.weight is changed by",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(made: Made, tmp_path: Path, cli: Cli, name: str) -> None:
    kind, damage, words = BAD[name]
    base, adapter, _, _ = made(kind)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    damage(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ran = cli("--base", base, "--adapter", folder, "--target", "fp32", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and ran.code == 3, ran.err
    assert all(word in ran.err for word in words), ran.err
    assert not (tmp_path / "out").exists()


def test_rank_and_alpha_that_the_config_leaves_out(dense: Path, tmp_path: Path) -> None:
    """peft's own defaults, as it would load the adapter."""
    adapter = stock.fresh_adapter(tmp_path / "adapter", r=8, lora_alpha=8)
    whole = stock.merged(tmp_path / "whole", dense, adapter, "fp32")
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["r"], config["lora_alpha"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    out = stock.merged(tmp_path / "out", dense, adapter, "fp32")
    assert stock.differing(stock.tensors(out), stock.tensors(whole)) == []
    assert {layer.scaling["default"] for layer in lora_layers(dense, adapter)} == {1.0}, "the oracle"


def lora_layers(base: Path, adapter: Path) -> list[LoraLayer]:
    wrapped = stock.adapted(stock.float_model(base), adapter)
    return [layer for layer in wrapped.modules() if isinstance(layer, LoraLayer)]


def test_a_trained_bias_of_a_layer_without_one(tmp_path: Path, cli: Cli) -> None:
    """peft trains it on the output; the error says that it has no weight to go to, instead of doubting the base."""
    base = models.save(models.llama(torch.float32), tmp_path / "base")
    adapter = stock.fresh_adapter(tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    ran = cli("--base", base, "--adapter", adapter, "--target", "fp32", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and ran.code == 3
    said = " ".join(ran.err.split())
    assert "q_proj has no bias in the base" in said and "Is this the base" not in said
