"""QmergeCallback in real trainings: transformers' Trainer, peft, and a tiny model that bitsandbytes quantized."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import qmerge
import qmerge.demo
from qmerge.adapters.reading.named import find_adapter
from qmerge.errors import DiskError, HubError, QmergeError, RecipeError, RoomError
from qmerge.patch import direct
from qmerge.schema import read_report

from .. import models
from ..conftest import NF4
from ..hub_server import WRITER, HubServer

pytestmark = pytest.mark.slow

TOKENS = [{"input_ids": [i, i + 1, i + 2, i + 3], "labels": [i, i + 1, i + 2, i + 3]} for i in range(4)]


@pytest.fixture
def hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """Logged in."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


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
    # The folder of the run is enough for `qmerge --adapter`, whether the script saves the model once more or not.
    assert find_adapter(str(tmp_path / "run")).folder == tmp_path / "run/qmerge-adapter"
    trainer.save_model()
    assert find_adapter(str(tmp_path / "run")).folder == tmp_path / "run"
    assert qmerge.verify(out, reload=False).ok
    assert hub.repos["alice/merged"].private and "model.safetensors" in hub.repos["alice/merged"].files
    # The base's files are quantized already.
    assert "trained_on" not in read_report(out).recipe


def test_a_base_that_was_quantized_while_it_was_loaded(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merge quantizes the 16-bit base as the training did."""
    callback = qmerge.QmergeCallback(
        target="bf16", out=tmp_path / "merged", rounding="nearest", device="cpu", quiet=True
    )
    trainer = trainer_of(dense, callback, tmp_path / "run", on_the_fly=True)
    trainer.train()
    assert callback.error is None and callback.report is not None
    assert read_report(tmp_path / "merged").recipe["trained_on"] == "nf4-dq"
    # No file tells it, so that a merge that has failed and is repeated must be told.
    callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert callback.error is not None and "to merge it, give --trained-on nf4-dq" in capsys.readouterr().err
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
    train(RecipeError, "adapter: the adapter that was trained is merged", adapter=tmp_path / "mine")
    train(RecipeError, "resume: every training makes another adapter", resume=True)
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


# --- without a training: a callback that is called as the trainer calls it ---

DEMO = Path(qmerge.demo.__file__).parent
STATE = SimpleNamespace(is_world_process_zero=True)


def begin_and_end(callback: qmerge.QmergeCallback, model: Any, output_dir: Path) -> None:
    arguments = SimpleNamespace(deepspeed=None, fsdp="", output_dir=str(output_dir))
    callback.on_train_begin(arguments, STATE, None, model=model)
    callback.on_train_end(arguments, STATE, None, model=model)


@pytest.fixture
def two_adapters(nf4: Path) -> PeftModel:
    """As TRL's DPO has them: one that is trained, and the reference."""
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(nf4, dtype=torch.bfloat16, device_map="cpu")
    peft_model = get_peft_model(model, config, adapter_name="policy")
    peft_model.add_adapter("reference", config)
    return peft_model


def demo_model() -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base-nf4", dtype=torch.bfloat16, device_map="cpu")
    return PeftModel.from_pretrained(model, DEMO / "adapter")


def test_the_result_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict on stdout as the command prints it, warnings on stderr; with quiet, warnings only."""
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text()[:2000])
    settings = {
        "base": DEMO / "base-nf4",
        "target": "nf4",
        "rounding": "nearest",
        "device": "cpu",
        "sequence_length": 96,
    }
    out = tmp_path / "out"
    begin_and_end(qmerge.QmergeCallback(**settings, out=out, verify=text), demo_model(), tmp_path / "run")
    shown = capsys.readouterr()
    assert "The fine-tuning is lost" in shown.out and "weights lose more than half of their delta" in shown.err
    assert f"Written to {out}" in shown.err and f"the adapter is in {tmp_path / 'run/qmerge-adapter'}" in shown.err
    begin_and_end(qmerge.QmergeCallback(**settings, out=tmp_path / "2", quiet=True), demo_model(), tmp_path / "run")
    quiet = capsys.readouterr()
    assert not quiet.out and "Written" not in quiet.err and "weights lose more than half of their delta" in quiet.err


def test_held_out_text_is_not_published_unasked(hub: HubServer, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text()[:2000])
    callback = qmerge.QmergeCallback(
        base=DEMO / "base-nf4", target="bf16", out=tmp_path / "out", verify=text, push_to_hub="alice/merged", rounding="nearest",
        sequence_length=96, device="cpu", quiet=True,
    )  # fmt: skip
    begin_and_end(callback, demo_model(), tmp_path / "run")
    assert callback.error is None and "qmerge.json" in hub.repos["alice/merged"].files
    fidelity = read_report(tmp_path / "out").fidelity
    assert fidelity is not None and fidelity.continuations == []


def test_of_two_adapters_the_active_one_is_merged(two_adapters: PeftModel, tmp_path: Path) -> None:
    callback = qmerge.QmergeCallback(target="nf4", out=tmp_path / "out", rounding="nearest", device="cpu", quiet=True)
    begin_and_end(callback, two_adapters, tmp_path / "run")
    assert callback.error is None and callback.report is not None
    saved = (tmp_path / "run").rglob("adapter_model.safetensors")
    assert [path.parent for path in saved] == [tmp_path / "run/qmerge-adapter/policy"]


def test_several_active_adapters_are_an_error_before_the_training(two_adapters: PeftModel, tmp_path: Path) -> None:
    two_adapters.base_model.set_adapter(["policy", "reference"])
    callback = qmerge.QmergeCallback(target="nf4", out=tmp_path / "out")
    with pytest.raises(RecipeError, match="2 adapters are active"):
        begin_and_end(callback, two_adapters, tmp_path / "run")


@pytest.mark.parametrize(
    ("cause", "error", "words"),
    [
        (KeyError("a bug"), QmergeError, "KeyError: 'a bug'"),
        (MemoryError(), RoomError, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), RoomError, "out of memory on the GPU"),
        (RuntimeError("shapes differ"), QmergeError, "RuntimeError: shapes differ"),
        (OSError(errno.EIO, "Input/output error"), DiskError, "Input/output error"),
    ],
)
def test_no_error_of_the_merge_ends_the_script(
    two_adapters: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    cause: Exception, error: type[QmergeError], words: str,
) -> None:  # fmt: skip
    def merge(*_: Any) -> None:
        raise cause

    monkeypatch.setattr(direct, "merge", merge)
    callback = qmerge.QmergeCallback(target="nf4", out=tmp_path / "out", quiet=True)
    begin_and_end(callback, two_adapters, tmp_path / "run")
    assert type(callback.error) is error and words in str(callback.error) and callback.error.__cause__ is cause
    shown = capsys.readouterr().err
    assert f"the adapter is in {tmp_path / 'run/qmerge-adapter/policy'}" in shown
    assert ("Traceback" in shown) == (error is QmergeError)  # what may be a bug is to be reported


def test_a_second_training_forgets_the_first(
    two_adapters: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(*_: Any) -> None:
        raise RuntimeError("a full GPU")

    callback = qmerge.QmergeCallback(target="nf4", out=tmp_path / "out", rounding="nearest", device="cpu", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(direct, "merge", merge)
        begin_and_end(callback, two_adapters, tmp_path / "run")
    assert callback.error is not None and callback.report is None
    begin_and_end(callback, two_adapters, tmp_path / "run")
    assert callback.error is None and callback.report is not None
    # What it has written is not overwritten, and nothing is trained for nothing.
    with pytest.raises(RecipeError, match="expected a folder that is new or empty"):
        begin_and_end(callback, two_adapters, tmp_path / "run")


@pytest.mark.parametrize(
    ("cause", "error"),
    [(OSError(errno.ENOSPC, "No space left"), RoomError), (SafetensorError("I/O error"), QmergeError)],
)
def test_an_adapter_that_cannot_be_saved_does_not_end_the_script(
    two_adapters: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    cause: Exception, error: type[QmergeError],
) -> None:  # fmt: skip
    def save(*_: Any, **__: Any) -> None:
        raise cause

    monkeypatch.setattr(two_adapters, "save_pretrained", save)
    callback = qmerge.QmergeCallback(target="nf4", out=tmp_path / "out", quiet=True)
    begin_and_end(callback, two_adapters, tmp_path / "run")
    assert type(callback.error) is error and callback.report is None
    assert "the adapter could not be saved" in capsys.readouterr().err
