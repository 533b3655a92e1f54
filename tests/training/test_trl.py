"""QmergeCallback in TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qmerge
import qmerge.demo
from qmerge.adapters.reading.named import find_adapter

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow

BASE = Path(qmerge.demo.__file__).parent / "base-nf4"
CHATS = [
    {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]}
    for i in range(8)
]
TEMPLATE = "{% for message in messages %}<|start|>{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"


def trained(callback: qmerge.QmergeCallback, output_dir: Path, **more: Any) -> Any:
    """The trainer after a QLoRA training of two steps."""
    from trl import SFTConfig, SFTTrainer

    settings = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = SFTConfig(
        output_dir=str(output_dir), use_cpu=True, model_init_kwargs={"device_map": "cpu"}, **{**settings, **more}
    )
    chats = datasets.Dataset.from_list(CHATS)
    trainer = SFTTrainer(
        str(BASE), args=arguments, train_dataset=chats, eval_dataset=chats, callbacks=[callback],
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    return trainer


def chat_tokenizer(folder: Path) -> Path:
    """The demo's tokenizer with a chat template, and two tokens of it that the model does not have."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens(["<|start|>", "<|end|>"])
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_new_tokens_of_a_chat_template(tmp_path: Path) -> None:
    """TRL resizes the vocabulary, and trains the new rows and the output embedding."""
    callback = qmerge.QmergeCallback(target="nf4", out=tmp_path / "merged", device="cpu", quiet=True)
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    trainer = trained(callback, tmp_path / "run", chat_template_path=str(tokenizer), gradient_checkpointing=True)
    assert callback.error is None and callback.report is not None
    assert find_adapter(str(tmp_path / "run")).folder == tmp_path / "run/qmerge-adapter"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    rows = len(trainer.processing_class)
    assert merged.config.vocab_size == rows > 768 and len(merged.get_input_embeddings().weight) == rows
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE


def test_the_best_checkpoint_is_merged(tmp_path: Path) -> None:
    """The first of three: at this learning rate, the training diverges."""
    callback = qmerge.QmergeCallback(
        target="nf4", out=tmp_path / "merged", rounding="nearest", device="cpu", quiet=True
    )
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    trainer = trained(
        callback,
        tmp_path / "run",
        **steps,
        learning_rate=1.0,
        load_best_model_at_end=True,
        chat_template_path=str(tokenizer),
    )
    assert callback.error is None and callback.report is not None
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(tmp_path / "run/qmerge-adapter/adapter_model.safetensors")
    last = load_file(tmp_path / "run/checkpoint-3/adapter_model.safetensors")
    expected = load_file(best / "adapter_model.safetensors")
    assert best.name != "checkpoint-3" and all(torch.equal(saved[name], expected[name]) for name in expected)
    assert not all(torch.equal(saved[name], last[name]) for name in last), "the control"
