"""The variants of LoRA in PEFT, against PEFT itself: the merged model answers as base and adapter do unmerged."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qmerge.adapters import lora
from qmerge.adapters.updates import variants
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.errors import AdapterError

from .. import models
from ..checkpoint import test_names
from ..conftest import Cli
from . import bases, stock

BOUND = 4 * 15 * 2**-24 * 160**0.5
"""float32 in another order, as in test_adapters.py."""

SOME = ["q_proj", "down_proj"]
BLOCKS = {"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "gate_proj"], "nblocks": 2}


@dataclass(frozen=True)
class Kind:
    """``lora``: settings of LoraConfig; ``merges``: peft can merge it; ``plain``: s·B·A would be right."""

    lora: dict[str, Any]
    merges: bool = True
    plain: bool = False
    model: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "qalora": Kind({"use_qalora": True, "qalora_group_size": 8}, merges=False),
    "qalora rslora patterns": Kind(
        {"use_qalora": True, "qalora_group_size": 16, "use_rslora": True, "rank_pattern": {"q_proj": 2}}, merges=False
    ),
    "bdlora": Kind({"use_bdlora": BdLoraConfig(**BLOCKS), "target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"]}),
    "bdlora of 4, some plain": Kind(
        {"use_bdlora": BdLoraConfig(**{**BLOCKS, "nblocks": 4, "match_strict": False}), "target_modules": models.LINEAR}
    ),
    "kasa": Kind({"kasa_config": KasaConfig(), "target_modules": models.LINEAR}),
    "kasa rslora patterns": Kind({"kasa_config": KasaConfig(), "use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "kasa lora_bias": Kind(
        {"kasa_config": KasaConfig(), "lora_bias": True, "target_modules": ["q_proj"]}, model={"attention_bias": True}
    ),
    "monteclora": Kind({"monteclora_config": MontecloraConfig()}, plain=True),
    "velora": Kind({"velora_config": VeloraConfig(num_groups=4, init_type="random")}, plain=True),
    "dora embedding": Kind({"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "dora embedding tied": Kind(
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}, merges=False, model={"tie_word_embeddings": True}
    ),  # peft merges into the output embedding, too
    "exclude_modules": Kind({"target_modules": models.LINEAR, "exclude_modules": ["k_proj"]}, plain=True),
    "layers_to_transform": Kind({"layers_to_transform": [1], "layers_pattern": "layers"}, plain=True),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    base: Path
    adapter: Path
    expected: Tensor
    alone: Tensor
    merged: dict[str, Tensor]
    """Logits of both unmerged and of the base alone; what peft merges, where it can."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    folder = tmp_path_factory.mktemp("variants")

    @cache
    def make(name: str) -> Made:
        kind = KINDS[name]
        base = models.save(models.llama(torch.float32, **kind.model), folder / name / "base")
        adapter = folder / name / "adapter"
        wrapped = trained(reload(base), kind.lora, adapter)
        expected = models.logits(wrapped)
        merged = wrapped.merge_and_unload().state_dict() if kind.merges else {}
        return Made(base, adapter, expected, models.logits(reload(base)), merged)

    return make


def reload(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu").eval()


def trained(model: nn.Module, settings: dict[str, Any], folder: Path) -> PeftModel:
    """Every parameter that would have been trained is moved, as training moves it; the model as it was saved."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about tied embeddings
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": SOME, **settings})
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        if config.use_qalora:
            pool(wrapped, config)
        models.train(wrapped)
        wrapped.save_pretrained(folder)
    return wrapped.eval()


def pool(wrapped: PeftModel, config: LoraConfig) -> None:
    """peft has QALoRA in GPTQ layers alone: its own code, on dense layers of the same values."""
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer) and type(layer.get_base_layer()) is nn.Linear:
            layer.lora_variant["default"] = QALoraLinearVariant()
            layer.lora_variant["default"].init(layer, "default", config)


@pytest.mark.parametrize("name", KINDS)
def test_answers_as_the_unmerged_adapter_does(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    found = made(name)
    model, info = stock.loaded(stock.merged(tmp_path / "out", found.base, found.adapter, "fp32"))
    assert not any(info.values()), info
    assert stock.distance(models.logits(model), found.expected) < BOUND
    assert stock.distance(found.alone, found.expected) > 1e-3, "the control"
    state = model.state_dict()
    for key, value in found.merged.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if name.startswith("kasa")])
def test_kasa_is_what_peft_merges_to_the_bit(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    found = made(name)
    written = stock.tensors(stock.merged(tmp_path / "out", found.base, found.adapter, "fp32"))
    assert stock.differing(written, found.merged) == []


@pytest.mark.parametrize("name", ["kasa", "bdlora", "qalora", "monteclora"])
def test_plain_products_would_be_another_model(made: Callable[[str], Made], name: str) -> None:
    """The control: s·B·A of the tensors as they lie, or as often repeated as it takes, is right for MonteCLoRA alone."""
    found = made(name)
    tensors, model = load_file(found.adapter / "adapter_model.safetensors"), reload(found.base)
    for key in [key for key in tensors if "lora_A" in key]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        weight = model.get_submodule(key.removeprefix("base_model.model.").split(".lora_A")[0]).weight
        A, B = A.repeat_interleave(weight.shape[1] // A.shape[1], 1), B.repeat_interleave(len(A) // B.shape[1], 1)
        weight.data += B @ A * 2
    distance = stock.distance(models.logits(model), found.expected)
    assert distance < BOUND if KINDS[name].plain else distance > 1e-3


@pytest.mark.parametrize("size", [8, 32])
def test_qalora_where_peft_trains_it(tmp_path: Path, size: int) -> None:
    """On a GPTQ base, whose layers ask for QALoRA themselves."""
    base = bases.make("gptq-g32", tmp_path / "base")
    model, _ = bases.loads(base)
    alone = models.logits(model)
    wrapped = trained(model, {"use_qalora": True, "qalora_group_size": size}, tmp_path / "adapter")
    layers = [layer for layer in wrapped.modules() if isinstance(layer, LoraLayer)]
    assert all(isinstance(layer.lora_variant["default"], QALoraLinearVariant) for layer in layers)
    expected = models.logits(wrapped)
    found, info = stock.loaded(stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32"))
    assert not any(info.values()), info
    assert stock.distance(models.logits(found), expected) < 4 * 15 * 2**-24 * 384**0.5
    assert stock.distance(alone, expected) > 1e-3, "the control"


# --- options that peft ignores in some layers ------------------------------------------------------------------------

IGNORED: dict[str, dict[str, Any]] = {
    "qalora": {"use_qalora": True, "qalora_group_size": 8},
    "bdlora": {"use_bdlora": BLOCKS},
    "kasa": {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
    "monteclora": {"monteclora_config": {"num_samples": 8}},
}


@pytest.mark.parametrize("name", IGNORED)
def test_on_bitsandbytes_layers_peft_trains_a_plain_lora(dense: Path, tmp_path: Path, name: str) -> None:
    """The same tensors as without the option, and the same merge."""
    base = models.quantize(dense, tmp_path / "nf4", **stock.BASES["nf4"])
    wrapped = trained(AutoModelForCausalLM.from_pretrained(base, device_map="cpu"), IGNORED[name], tmp_path / "lora")
    assert not any(layer.lora_variant for layer in wrapped.modules() if isinstance(layer, LoraLayer))
    models.edit_json(
        shutil.copytree(tmp_path / "lora", tmp_path / "plain") / "adapter_config.json", **dict.fromkeys(IGNORED[name])
    )
    written = [stock.merged(tmp_path / f"{kind}-out", base, tmp_path / kind, "fp32") for kind in ("lora", "plain")]
    assert stock.differing(*map(stock.tensors, written)) == []
    assert stock.distance(stock.tensors(written[0])[Q], stock.values(base)[Q]) > 1e-3, "the control"


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(("combine", "weight"), [("linear", 0.5), ("chain", 1)])
@pytest.mark.parametrize("name", ["qalora", "bdlora"])
def test_two_adapters_of_which_one_is_a_variant(
    made: Callable[[str], Made], tmp_path: Path, cli: Cli, name: str, combine: str, weight: float
) -> None:
    """Which of the two widths is right is settled for sums, too."""
    found = made(name)
    other = models.adapter(reload(found.base), tmp_path / "other", target_modules=["q_proj", "down_proj"])
    ran = cli("--base", found.base, "--adapter", f"{found.adapter}={weight}", "--adapter", other, "--target", "fp32",
              "--combine", combine, "--out", tmp_path / "out")  # fmt: skip
    assert ran.code == 0, ran.err
    before, written = stock.tensors(found.base), stock.tensors(tmp_path / "out")
    alone = stock.tensors(stock.merged(tmp_path / "alone", found.base, found.adapter, "fp32"))
    theirs = stock.deltas(reload(found.base), other)
    for key, delta in theirs.items():
        assert stock.distance(written[key] - before[key], weight * (alone[key] - before[key]) + delta) < 1e-5, key


def test_a_truncated_base_is_dense(made: Callable[[str], Made], tmp_path: Path, cli: Cli) -> None:
    """peft has no KaSA on quantized layers: it is merged beside the dense original, or refused."""
    found = made("kasa")
    base = models.quantize(found.base, tmp_path / "nf4", dtype=torch.float32, **stock.BASES["nf4"])
    ran = cli("--base", base, "--adapter", found.adapter, "--target", "nf4", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and "KaSA" in ran.err and "--original" in ran.err, ran.err
    assert not (tmp_path / "out").exists()
    onto = ("--original", found.base, "--merge-onto", "original")
    ran = cli("--base", base, "--adapter", found.adapter, *onto, "--target", "fp32", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    written = stock.tensors(tmp_path / "out")
    assert all(stock.distance(written[key], value) < 1e-6 for key, value in found.merged.items() if "proj" in key)


# --- convolutions ----------------------------------------------------------------------------------------------------


def whisper() -> Any:
    torch.manual_seed(0)
    size = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    more = {
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": 64,
        "num_mel_bins": 8,
        "max_source_positions": 16,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**size, **more, **ids)
    return transformers.WhisperForConditionalGeneration(config).eval()


CONVOLUTIONS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "1d": (whisper, ["conv1", "conv2"]),
    "2d": (lambda: test_names.build("llava"), ["patch_embedding"]),
    "3d": (lambda: test_names.build("qwen2.5-vl"), ["patch_embed.proj"]),
}


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """The layer with the merged weight, on inputs of any values, against peft's forward pass of the layer."""
    build, targets = CONVOLUTIONS[name]
    model = build()
    model.save_pretrained(tmp_path / "base")
    wrapped = trained(model, {**more, "target_modules": targets}, tmp_path / "adapter")
    out = stock.merged(tmp_path / "out", tmp_path / "base", tmp_path / "adapter", "fp32")
    merged, info = type(model).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    layers = {key: layer for key, layer in wrapped.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == len(targets)
    for key, layer in layers.items():
        conv = layer.get_base_layer()
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        x = torch.randn(1, conv.in_channels, *(2 * size for size in conv.kernel_size))
        with torch.no_grad():
            expected, found = layer(x), merged.get_submodule(key).eval()(x)
        assert stock.distance(found, expected) < 1e-6
        assert stock.distance(conv(x), expected) > 1e-3, "the control"


def test_convolutions_stay_dense_beside_quantized_layers(tmp_path: Path) -> None:
    """The merged values bit for bit, in their own shape, as in a dense target."""
    model = test_names.build("llava")
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    trained(model, {"target_modules": ["patch_embedding", "q_proj"]}, tmp_path / "adapter")
    to = {
        target: stock.merged(tmp_path / target, tmp_path / "base", tmp_path / "adapter", target)
        for target in ("nf4", "fp32")
    }
    key = "model.vision_tower.embeddings.patch_embedding.weight"
    found, dense = stock.tensors(to["nf4"]), stock.tensors(to["fp32"])
    assert torch.equal(found[key], dense[key]) and found[key].ndim == 4
    assert "model.language_model.layers.0.self_attn.q_proj.weight.absmax" in found
    assert not torch.equal(dense[key], stock.tensors(tmp_path / "base")[key]), "the control"


# --- what is refused -------------------------------------------------------------------------------------------------


def q_proj(**parts: Tensor) -> dict[str, Tensor]:
    return {f"q_proj.{part.replace('__', '.')}": tensor for part, tensor in parts.items()}


A, B, DIAGONAL = torch.ones(4, 64), torch.ones(64, 4), torch.ones(4)
DIAG = {"q_proj.lora_diag": DIAGONAL}
DORA = {"q_proj.lora_magnitude_vector.weight": torch.ones(64)}
KASA = {"kasa_config": {"beta": 1e-4}}
OF_A, OF_B = {"target_modules_bd_a": ["q_proj"], "nblocks": 2}, {"target_modules_bd_b": ["q"], "nblocks": 2}
CONV_A, CONV_B = torch.ones(4, 8, 3), torch.ones(8, 2, 1)
BAD: dict[str, tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]] = {
    "alora": ({"alora_invocation_tokens": [5]}, {}, ("alora_invocation_tokens", "only on the tokens after", "unmerged")),
    "arrow": ({"arrow_config": {"top_k": 2}}, {}, ("arrow_config", "every token", "unmerged")),
    "arrow by key": ({}, {"q_proj.lora_arrow.prototypes": A}, ("lora_arrow", "every token", "unmerged")),
    "megatron": ({"megatron_config": {"a": 1}}, {}, ("megatron_config", "Megatron", "convert")),
    "diag unsaid": ({}, DIAG, ("lora_diag", "no kasa_config")),
    "diag short": (KASA, {"q_proj.lora_diag": torch.ones(3)}, ("lora_diag", "[3]", "[4]")),
    "diag and dora": ({**KASA, "use_dora": True}, {**DIAG, **DORA}, ("kasa", "combines")),
    "diag and pissa": ({**KASA, "init_lora_weights": "pissa"}, DIAG, ("lora_diag", "initialisation")),
    "embed unsaid": ({}, {"q_proj.lora_velora_embed": DIAGONAL}, ("lora_velora_embed", "no velora_config")),
    "sampler unsaid": ({}, {"q_proj.lora_monteclora_sampler.std_prior": DIAGONAL}, ("sampler", "no monteclora_config")),
    "group of 1": ({"use_qalora": True, "qalora_group_size": 1}, {}, ("qalora_group_size", "2 or more")),
    "group of words": ({"use_qalora": True, "qalora_group_size": "many"}, {}, ("qalora_group_size", "'many'")),
    "both": ({"use_qalora": True, "use_bdlora": BLOCKS}, {}, ("use_qalora and use_bdlora",)),
    "bdlora true": ({"use_bdlora": True}, {}, ("use_bdlora=True", "settings")),
    "bdlora names": ({"use_bdlora": {"target_modules_bd_a": "q_proj"}}, {}, ("use_bdlora", "lists of module names")),
    "bdlora both": ({"use_bdlora": {**OF_A, **OF_B}}, {}, ("q_proj", "both halves")),
    "bdlora blocks": ({"use_bdlora": {**OF_A, "nblocks": 0}}, {}, ("nblocks", "1 or more")),
    "bdlora odd": ({"use_bdlora": {**OF_A, "nblocks": 3}}, {}, ("4 rows", "3 blocks")),
    "bdlora rank": ({"use_bdlora": OF_B}, {"q_proj.lora_B.weight": torch.ones(64, 3)}, ("lora_B [64, 3]", "rank 4")),
    "groups": ({}, q_proj(lora_A__weight=CONV_A, lora_B__weight=CONV_B), ("convolution in 2 groups", "unmerged")),
    "conv halves": ({}, q_proj(lora_A__weight=CONV_A), ("not the factors",)),
    "conv kernel of B": ({}, q_proj(lora_A__weight=CONV_A, lora_B__weight=torch.ones(8, 4, 3)), ("not the factors",)),
    "vector": ({}, q_proj(lora_A__weight=torch.ones(4)), ("lora_A has shape [4]", "matrices")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_by_name(name: str) -> None:
    settings, tensors, words = BAD[name]
    plain = q_proj(lora_A__weight=A, lora_B__weight=B)
    config = {"r": 4, "lora_alpha": 8}
    assert lora.KIND.updates(config, plain, None), "the control"
    with pytest.raises(AdapterError) as raised:
        lora.KIND.updates({**config, **settings}, {**plain, **tensors}, None)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_what_fits_neither_width_is_refused(made: Callable[[str], Made], tmp_path: Path, cli: Cli) -> None:
    found = made("qalora")
    folder = shutil.copytree(found.adapter, tmp_path / "adapter")
    models.edit_json(folder / "adapter_config.json", qalora_group_size=4)
    ran = cli("--base", found.base, "--adapter", folder, "--target", "fp32", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and "has shape [64, 160]" in ran.err and "[64, 80]" in ran.err, ran.err


def test_every_tensor_of_a_variant_is_accounted_for(made: Callable[[str], Made], tmp_path: Path, cli: Cli) -> None:
    """A sampler of a module that has no LoRA is no reason to say that all is well."""
    found = made("monteclora")
    folder = shutil.copytree(found.adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert any("sampler" in key for key in tensors)
    stray = "base_model.model.model.layers.0.self_attn.v_proj.lora_monteclora_sampler.std_prior"
    save_file({**tensors, stray: DIAGONAL}, folder / "adapter_model.safetensors")
    ran = cli("--base", found.base, "--adapter", folder, "--target", "fp32", "--out", tmp_path / "out")
    assert isinstance(ran.error, AdapterError) and "v_proj.lora_monteclora_sampler" in ran.err, ran.err


def test_qalora_keeps_its_scale() -> None:
    """What is reported is alpha / r; the number of groups is in A."""
    config = {"r": 4, "lora_alpha": 8, "use_qalora": True, "qalora_group_size": 16}
    update, _ = lora.KIND.updates(config, q_proj(lora_A__weight=A[:, :4], lora_B__weight=B), None)["q_proj.weight"]
    assert isinstance(update, variants.ByWidthUpdate) and update.scale == 2 and update.shape == (64, 64)
    fitted = update.fitted((64, 64))
    assert isinstance(fitted, LoraUpdate) and torch.equal(fitted.A_RI, torch.full((4, 64), 4 / 16))


# --- nothing is overlooked -------------------------------------------------------------------------------------------

NO_MATH = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core",
    "eva_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
"""Where an adapter goes and how it was trained. (corda_config and lora_ga_config stay in the config of a converted adapter.)"""

READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "lora_bias", "use_dora",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights", "loftq_config", "use_qalora",
    "qalora_group_size", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "target_parameters",
    "layer_replication",
}  # fmt: skip


def test_every_option_of_peft_is_classified() -> None:
    """An option that a newer peft adds fails here until somebody says what it does to a merge."""
    fields = {entry.name for entry in dataclasses.fields(LoraConfig)}
    refused = {*variants.REFUSED, *lora.PLAIN} - {"nvfp4_merge_aware"}
    sets = [NO_MATH, READ, refused]
    assert not NO_MATH & READ and not (NO_MATH | READ) & refused
    assert fields == set().union(*sets), fields ^ set().union(*sets)
