"""Adapters of classifiers, as peft saves them: onto a base with a head of the task, with another one, and with none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from qmerge.errors import AdapterError
from qmerge.schema import read_report

from .. import models
from ..conftest import Cli
from . import stock
from .test_models import BOUND

LABELS = 3

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**models.LLAMA, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64, "pad_token_id": 0},
    "qwen3": {**models.LLAMA, "head_dim": 16, "pad_token_id": 0},
    "bert": SMALL,
    "roberta": {**SMALL, "max_position_embeddings": 66},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 96},
    "deberta-v2": {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "modernbert": {**SMALL, **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0), "sep_token_id": 2},
}  # fmt: skip
"""``model_type`` → settings of a small model."""

HEADS = ("score.weight", "classifier.weight")
DECODERS = ("llama", "gpt2", "qwen3")
TASKS = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}
BASES = ("classifier", "language model", "no head")
LAYERS = r".*\.(q_proj|v_proj|down_proj|c_attn|query|value|q_lin|v_lin|query_proj|value_proj|Wqkv|attn\.Wo)"
"""Linear layers of these models; all of them would be the head too, which peft trains whole."""

LOST = {
    ("bert", "SEQ_CLS", "language model"): "bert.pooler.dense.weight",
    ("deberta-v2", "SEQ_CLS", "language model"): "pooler.dense.weight",
    ("deberta-v2", "SEQ_CLS", "no head"): "pooler.dense.weight",
    ("modernbert", "SEQ_CLS", "no head"): "head.dense.weight",
    ("modernbert", "TOKEN_CLS", "no head"): "head.dense.weight",
}
"""Cases where training began with random values that nothing stores: peft itself cannot load such an adapter again."""


def auto_class(model: str, task: str, kind: str) -> Any:
    names = {"classifier": TASKS[task], "no head": "AutoModel"}
    language_model = "AutoModelForCausalLM" if model in DECODERS else "AutoModelForMaskedLM"
    return getattr(transformers, names.get(kind, language_model))


def saved_base(folder: Path, model: str, task: str, kind: str, labels: int = LABELS) -> Path:
    config = AutoConfig.for_model(model, **CONFIGS[model], num_labels=labels if kind == "classifier" else 2)
    torch.manual_seed(0)
    return models.save(auto_class(model, task, kind).from_config(config, dtype=torch.float32).eval(), folder)


def trained(base: Path, folder: Path, task: str, **more: Any) -> torch.Tensor:
    """The output of an adapter model that is saved to a folder."""
    torch.manual_seed(1)  # of a new head
    model = classifier(base, task, num_labels=LABELS, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = LoraConfig(r=4, lora_alpha=8, task_type=task, target_modules=LAYERS)
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
        torch.manual_seed(3)
        models.train(wrapped)
        wrapped.save_pretrained(folder)
    return models.logits(wrapped)


def classifier(base: Path, task: str, **more: Any) -> PreTrainedModel:
    return getattr(transformers, TASKS[task]).from_pretrained(base, dtype=torch.float32, **more).eval()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", CONFIGS)
def test_answers_as_the_trained_classifier_does(tmp_path: Path, model: str, task: str, kind: str) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    saved_base(base, model, task, kind)
    expected = trained(base, adapter, task)
    if (model, task, kind) in LOST:
        with pytest.raises(AdapterError, match=LOST[model, task, kind]):
            stock.merged(out, base, adapter, "fp32")
        return
    stock.merged(out, base, adapter, "fp32")
    merged, info = getattr(transformers, TASKS[task]).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert [type(merged).__name__] == merged.config.architectures and merged.config.num_labels == LABELS
    assert stock.distance(models.logits(merged.eval()), expected) < BOUND
    told = [line for line in read_report(out).warnings if type(merged).__name__ in line]
    assert len(told) == (kind != "classifier"), "the head of another class is said, once"
    before = stock.tensors(base)
    assert any(not torch.equal(value, before.get(name, value)) for name, value in stock.tensors(out).items())


@pytest.mark.parametrize(("model", "kind"), [("llama", "language model"), ("bert", "no head"), ("llama", "classifier")])
def test_in_nf4_the_head_stays_as_it_was_trained(tmp_path: Path, model: str, kind: str) -> None:
    """The loader finds it dense, and the quantized layers are those that bitsandbytes quantizes."""
    base = saved_base(tmp_path / "base", model, "SEQ_CLS", kind)
    trained(base, tmp_path / "adapter", "SEQ_CLS")
    dense = stock.merged(tmp_path / "dense", base, tmp_path / "adapter", "fp32")
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", "nf4")
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    told = classifier(dense, "SEQ_CLS", quantization_config=settings, device_map="cpu")
    ours = classifier(out, "SEQ_CLS", device_map="cpu")
    expected, values = stock.weights_of(told), stock.weights_of(ours)
    assert expected.keys() == values.keys() and stock.quantized_names(out)
    assert [name for name in expected if not torch.equal(expected[name], values[name])] == []
    (head,) = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if name.endswith(HEADS)]
    trained_head = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[head]
    assert torch.equal(stock.tensors(out)[head.removeprefix("base_model.model.")].float(), trained_head.float())


@pytest.mark.parametrize("target", ["nf4", "int8", "gptq", "w4a16", "w8a16", "fp8"])
def test_onto_a_base_that_another_merge_has_quantized(tmp_path: Path, target: str) -> None:
    """Every library has a list of its own for dense modules."""
    options = {"group_size": 32} if target in ("gptq", "w4a16") else {}
    dense = saved_base(tmp_path / "dense", "llama", "SEQ_CLS", "language model")
    plain = stock.fresh_adapter(tmp_path / "plain", target_modules=["o_proj"])
    base = stock.merged(tmp_path / "base", dense, plain, target, **options)
    trained(dense, tmp_path / "adapter", "SEQ_CLS")
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", target, **options)
    merged, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True, device_map="cpu", **kernel(target)
    )
    assert not any(info.values()), info
    assert type(merged.score) is torch.nn.Linear


def kernel(target: str) -> dict[str, Any]:
    """gptqmodel's plain kernel, which takes all group sizes."""
    return {"quantization_config": transformers.GPTQConfig(bits=4, backend="gptq_torch")} if target == "gptq" else {}


def test_a_head_of_another_task_or_size(tmp_path: Path) -> None:
    """Equal names do not make it the same head: the merged model is of the adapter's class, with its labels."""
    tokens = saved_base(tmp_path / "tokens", "llama", "TOKEN_CLS", "classifier")
    lm = saved_base(tmp_path / "lm", "llama", "SEQ_CLS", "language model")
    expected = trained(lm, tmp_path / "adapter", "SEQ_CLS")
    two = saved_base(tmp_path / "two", "llama", "SEQ_CLS", "classifier", labels=2)
    for base in (tokens, two):
        out = stock.merged(tmp_path / f"out-{base.name}", base, tmp_path / "adapter", "fp32")
        merged, info = classifier_and_info(out)
        assert type(merged).__name__ == "LlamaForSequenceClassification" and merged.config.num_labels == LABELS
        assert not any(info.values()), info
        assert merged.score.weight.shape[0] == LABELS
    assert stock.distance(models.logits(classifier_and_info(tmp_path / "out-tokens")[0]), expected) < BOUND


def classifier_and_info(out: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


def test_without_a_task_the_class_is_the_one_that_peft_noted(tmp_path: Path, cli: Cli) -> None:
    """As in tutorials for images: modules_to_save, and no task_type."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    base = models.save(transformers.ViTModel(config, add_pooling_layer=False).eval(), tmp_path / "base")
    model = transformers.ViTForImageClassification.from_pretrained(base, num_labels=LABELS).eval()
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "q_proj"], modules_to_save=["classifier"])
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False).eval()
    torch.manual_seed(3)
    models.train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = wrapped(pixel_values=pixels).logits
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", "fp32")
    merged = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        assert stock.distance(merged(pixel_values=pixels).logits, expected) < BOUND
    models.edit_json(tmp_path / "adapter" / "adapter_config.json", auto_mapping=None)
    ran = cli("--base", base, "--adapter", tmp_path / "adapter", "--target", "fp32", "--out", tmp_path / "none")
    assert ran.code == 3 and "The base has no classifier" in " ".join(ran.err.split())


def test_a_quantized_base_without_a_head(tmp_path: Path) -> None:
    """Its config lists the modules that are dense; the head becomes one of them."""
    dense = saved_base(tmp_path / "dense", "llama", "SEQ_CLS", "language model")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head"]}
    base = models.quantize(dense, tmp_path / "base", dtype=torch.float32, **settings)
    trained(dense, tmp_path / "adapter", "SEQ_CLS")
    out = stock.merged(tmp_path / "out", base, tmp_path / "adapter", "nf4")
    merged, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True, device_map="cpu"
    )
    assert not any(info.values()), info
    assert type(merged.score) is torch.nn.Linear
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", "score"]
