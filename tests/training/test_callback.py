"""QmergeCallback in real trainings: transformers' Trainer, peft, and a tiny model that bitsandbytes quantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import qmerge
from qmerge.errors import HubError, QmergeError, RecipeError
from qmerge.schema import read_report

from .. import models
from ..conftest import NF4
from ..hub_server import WRITER, HubServer, connected

pytestmark = pytest.mark.slow

TOKENS = [{"input_ids": [i, i + 1, i + 2, i + 3], "labels": [i, i + 1, i + 2, i + 3]} for i in range(4)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with connected(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub


def trainer_of(base: Path, callback: Any, output_dir: Path, on_the_fly: bool = False) -> Trainer:
    """A QLoRA training of one step."""
    quantization = {}
    if on_the_fly:
        quantization["quantization_config"] = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, **quantization, dtype=torch.bfloat16, device_map="cpu")
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=models.LINEAR))
    arguments = TrainingArguments(
        output_dir=str(output_dir), max_steps=1, per_device_train_batch_size=4, learning_rate=0.1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(model=peft_model, args=arguments, train_dataset=TOKENS, callbacks=[callback])


def test_merged_checked_and_pushed(hub: HubServer, nf4: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    callback = qmerge.QmergeCallback(
        target="nf4", out=out, push_to_hub="alice/merged", private=True, rounding="nearest", device="cpu", quiet=True
    )
    trainer = trainer_of(nf4, callback, tmp_path / "run")
    trainer.train()
    assert callback.error is None and callback.report is not None
    assert (tmp_path / "run/qmerge-adapter/adapter_model.safetensors").is_file()
    assert qmerge.verify(out, reload=False).ok
    assert hub.repos["alice/merged"].private and "model.safetensors" in hub.repos["alice/merged"].files
    # The base's files are quantized already.
    assert "trained_on" not in read_report(out).recipe


def test_a_base_that_was_quantized_while_it_was_loaded(dense: Path, tmp_path: Path) -> None:
    """The merge quantizes the 16-bit base as the training did."""
    callback = qmerge.QmergeCallback(
        target="bf16", out=tmp_path / "merged", rounding="nearest", device="cpu", quiet=True
    )
    trainer = trainer_of(dense, callback, tmp_path / "run", on_the_fly=True)
    trainer.train()
    assert callback.error is None and callback.report is not None
    assert read_report(tmp_path / "merged").recipe["trained_on"] == "nf4-dq"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        trained, expected = trainer.model.eval()(ids).logits.float(), merged(ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(ids).logits.float()
    assert (trained - expected).norm() < 0.1 * (trained - base).norm()


def test_errors_before_the_training(hub: HubServer, nf4: Path, dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def train(error: type[QmergeError], words: str, **settings: Any) -> None:
        settings = {"target": "nf4", "out": tmp_path / "merged", **settings}
        with pytest.raises(error, match=words):
            trainer_of(nf4, qmerge.QmergeCallback(**settings), tmp_path / "run").train()
        assert not (tmp_path / "run/qmerge-adapter").exists()

    train(RecipeError, "no target is called", target="nf5")
    train(RecipeError, "unknown key 'typo'", typo=1)
    train(RecipeError, "no such file", verify=tmp_path / "missing.txt")
    train(HubError, "may not write there", push_to_hub="carol/merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    train(RecipeError, "full", out=tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(dense)
    callback = qmerge.QmergeCallback(target="nf4", out=tmp_path / "merged")
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(RecipeError, match="has no adapter"):
        Trainer(model=model, args=arguments, train_dataset=TOKENS, callbacks=[callback]).train()


def test_errors_after_the_training_do_not_end_the_script(
    hub: HubServer, nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model past its limit is kept, and not pushed."""
    callback = qmerge.QmergeCallback(
        target="nf4", out=tmp_path / "merged", push_to_hub="alice/merged", min_kept=1.0, rounding="nearest", device="cpu",
        quiet=True,
    )  # fmt: skip
    trainer_of(nf4, callback, tmp_path / "run").train()
    assert callback.report is not None and "--min-kept" in str(callback.error)
    assert "alice/merged" not in hub.repos and (tmp_path / "merged/config.json").is_file()
    assert str(tmp_path / "run/qmerge-adapter") in capsys.readouterr().err
