"""Fidelity against transformers + peft on whole float32 models."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import qmerge
import qmerge.demo
from qmerge.calibration import texts
from qmerge.calibration.layered import LayeredModel
from qmerge.calibration.layerwise_run import LayerwiseRun
from qmerge.calibration.scores import FinishedRun
from qmerge.evaluation import fidelity
from qmerge.recipe import make_recipe, names_for_against
from qmerge.schema import FidelityRecord

from .. import models
from ..conftest import NF4, Cli

DEMO = Path(qmerge.demo.__file__).parent
TEXT, TOKENS, LENGTH = DEMO / "heldout.txt", 1024, 64


def whole(folder: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(model, adapter).eval() if adapter else model


def dense(base: Path, adapter: Path, out: Path) -> Path:
    """The base's values as a dense float32 model: qmerge's fp32 target with a delta of zero (exact, checked elsewhere)."""
    from safetensors.torch import load_file, save_file

    blank = shutil.copytree(adapter, out.parent / f"{out.name}-blank")
    tensors = load_file(blank / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, blank / "adapter_model.safetensors")
    qmerge.merge(base=str(base), adapter=str(blank), target="fp32", rounding="nearest", out=str(out), quiet=True)
    return out


def log_probabilities(model: Any, batches: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.log_softmax(model(input_ids=ids).logits.double(), -1) for ids in batches]


def expected(base: Any, unmerged: Any, merged: Any, batches: list[Tensor]) -> dict[str, float | None]:
    """By the definitions, in float64, all logits at once."""
    logs = [log_probabilities(model, batches) for model in (base, unmerged, merged)]
    losses = [
        float(
            torch.cat(
                [-log[:, :-1].gather(-1, ids[:, 1:, None]).flatten() for log, ids in zip(found, batches, strict=True)]
            ).mean()
        )
        for found in logs
    ]
    b, u, m = (torch.cat([log.flatten(0, 1) for log in found]) for found in logs)
    to_base, to_merged = ((u.exp() * (u - q)).sum(-1) for q in (b, m))
    return {
        "loss_base": losses[0], "loss_unmerged": losses[1], "loss_merged": losses[2],
        "gain_kept": (losses[0] - losses[2]) / (losses[0] - losses[1]) if losses[1] < losses[0] else None,
        "kl_base": float(to_base.mean()), "kl_merged": float(to_merged.mean()),
        "kl_ratio": float(to_merged.mean() / to_base.mean()),
        "top1_agreement": float((u.argmax(-1) == m.argmax(-1)).double().mean()), "kl_p99": float(to_merged.quantile(0.99)),
    }  # fmt: skip


def close(found: FidelityRecord, numbers: dict[str, float | None]) -> None:
    """Log-probabilities near 6 in float32, summed over a few layers, are off by about 1e-6, and so are their means. A
    divergence is a difference of those, so its error is absolute too. A quotient's error has the divisor in it."""
    off = 5e-6
    allowed = dict.fromkeys(numbers, off) | {
        "gain_kept": 4 * off / abs(found.loss_base - found.loss_unmerged),
        "kl_ratio": 2 * off / found.kl_base,
        "top1_agreement": 2.1 / found.tokens,  # two near ties that fall otherwise
    }
    for name, value in numbers.items():
        same = None if value is None else pytest.approx(value, abs=allowed[name])
        assert getattr(found, name) == same, name


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fidelity") / "out"
    asked = {
        "base": str(DEMO / "base-nf4"),
        "adapter": str(DEMO / "adapter"),
        "target": "nf4",
        "rounding": "stochastic",
    }
    qmerge.merge(**asked, out=str(out), quiet=True)
    return out


def judged(out: Path, **more: Any) -> FidelityRecord:
    return qmerge.fidelity(
        out=str(out), text=str(TEXT), tokens=TOKENS, sequence_length=LENGTH, device="cpu", quiet=True, **more
    )


def test_equals_transformers_and_peft(merged: Path, tmp_path: Path) -> None:
    found = judged(merged)
    batches = texts.token_batches(TEXT, DEMO / "base-nf4", tokens=TOKENS, length=LENGTH, vocab_size=10**6)
    base, stored = (
        dense(DEMO / "base-nf4", DEMO / "adapter", tmp_path / "base"),
        dense(merged, DEMO / "adapter", tmp_path / "out"),
    )
    numbers = expected(whole(base), whole(base, DEMO / "adapter"), whole(stored), batches)
    close(found, numbers)
    assert (found.tokens, found.sequence_length, found.text) == (TOKENS, LENGTH, "heldout.txt")
    assert numbers["gain_kept"] and numbers["gain_kept"] > 0.5, "the adapter and the text are of one domain"


def test_the_base_itself_keeps_nothing(tmp_path: Path) -> None:
    """Nearest rounding of a delta far below the step returns the base: gain 0, KL ratio 1."""
    out = dense(DEMO / "base-nf4", DEMO / "adapter", tmp_path / "out")
    found = judged(out, against=(str(DEMO / "base-nf4"), str(DEMO / "adapter")))
    assert found.gain_kept == pytest.approx(0, abs=1e-6) and found.kl_ratio == pytest.approx(1, abs=1e-6)


def test_an_exact_merge_keeps_all(tmp_path: Path) -> None:
    asked = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "fp32"}
    qmerge.merge(**asked, out=str(tmp_path / "out"), quiet=True)
    found = judged(tmp_path / "out")
    assert found.gain_kept == 1 and found.kl_merged == 0 and found.top1_agreement == 1


def test_another_adapter_is_another_reference(merged: Path, tmp_path: Path) -> None:
    other = shutil.copytree(DEMO / "adapter", tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3 * config["lora_alpha"]}))
    found = judged(merged, against=(str(DEMO / "base-nf4"), str(other)))
    assert found.kl_ratio is not None and judged(merged).kl_ratio is not None
    assert found.kl_ratio > 5 * judged(merged).kl_ratio  # type: ignore[operator]


def test_conv1d_and_quantized_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2, whose dense weights are stored transposed, quantized on the fly in training."""
    batches = [torch.arange(64).view(2, 32) * k % 96 for k in (1, 5)]
    monkeypatch.setattr(texts, "token_batches", lambda *_, **__: batches)
    model = models.gpt2()
    base = models.save(model, tmp_path / "gpt2")
    lora = models.adapter(model, tmp_path / "lora", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    out = tmp_path / "out"
    qmerge.merge(
        base=str(base), adapter=str(lora), trained_on="nf4", target="nf4", rounding="nearest", out=str(out), quiet=True
    )
    found = qmerge.fidelity(out=str(out), text="any", device="cpu", quiet=True)
    quantized = models.quantize(
        base, tmp_path / "quantized", dtype=torch.float32, **{**NF4, "bnb_4bit_compute_dtype": torch.float32}
    )
    seen, stored = dense(quantized, lora, tmp_path / "seen"), dense(out, lora, tmp_path / "stored")
    numbers = expected(whole(seen), whole(seen, lora), whole(stored), batches)
    close(found, {name: value for name, value in numbers.items() if name.startswith(("loss", "kl_m", "kl_b"))})


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**models.LLAMA, num_local_experts=4, num_experts_per_tok=2)).eval()


@pytest.mark.parametrize("make", [mixtral, lambda: models.llama(torch.float32, tie_word_embeddings=True)])
def test_experts_and_tied_embeddings(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are single on disk and stacked in memory; a tied head is on disk once."""
    batches = [torch.arange(64).view(2, 32) * k % 96 for k in (1, 5)]
    monkeypatch.setattr(texts, "token_batches", lambda *_, **__: batches)
    model = make()
    base = models.save(model, tmp_path / "base")
    lora = models.adapter(model, tmp_path / "lora", size=0.1, target_modules=["q_proj", "v_proj"])
    out = tmp_path / "out"
    qmerge.merge(base=str(base), adapter=str(lora), target="int8", rounding="nearest", out=str(out), quiet=True)
    found = qmerge.fidelity(out=str(out), text="any", device="cpu", quiet=True)
    stored = dense(out, lora, tmp_path / "stored")
    close(found, expected(whole(base), whole(base, lora), whole(stored), batches))
    assert found.kl_base > 1e-4, "far above what is allowed, so that a swapped stream would show"


def test_one_layer_of_one_model_is_in_memory(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While hidden states go through the layers, one layer of one of the three models is in memory, and nothing else."""
    made: list[LayeredModel] = []
    load, run, finish = LayeredModel.load, LayerwiseRun.run_loaded_layer, fidelity.finish_run

    def loading(self: LayeredModel, *arguments: Any) -> None:
        made.append(self) if self not in made else None
        load(self, *arguments)

    held: list[list[tuple[int, int | None]]] = []

    def note_what_is_in_memory() -> None:
        named = [(i, n, p) for i, model in enumerate(made) for n, p in model.model.named_parameters()]
        held.append(sorted({(i, made[i].layer_of(n)) for i, n, p in named if not p.is_meta}, key=str))

    def running(self: LayerwiseRun, is_last: bool = False) -> None:
        note_what_is_in_memory()
        run(self, is_last)

    def finishing(self: LayerwiseRun) -> FinishedRun:
        note_what_is_in_memory()
        return finish(self)

    monkeypatch.setattr(LayeredModel, "load", loading)
    monkeypatch.setattr(LayerwiseRun, "run_loaded_layer", running)
    monkeypatch.setattr(fidelity, "finish_run", finishing)
    judged(merged)
    assert held == [[(model, layer)] for layer in range(len(made[0])) for model in range(3)]


def test_no_pass_is_left_waiting_after_an_error(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()

    def failing(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(LayerwiseRun, "run_loaded_layer", failing)
    with pytest.raises(MemoryError):
        judged(merged)
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_on_the_command_line(merged: Path, cli: Cli) -> None:
    asked = [
        "verify",
        merged,
        "--text",
        TEXT,
        "--tokens",
        TOKENS,
        "--sequence-length",
        LENGTH,
        "--no-reload",
        "--device",
        "cpu",
    ]
    ran = cli(*asked)
    table = [line for line in ran.out.splitlines() if not line.startswith("ok ")]  # a check is one line, of any length
    assert ran.code == 0 and "gain kept" in ran.out and max(map(len, table)) <= 80
    found = json.loads(cli(*asked, "--json").out)["fidelity"]
    assert found == judged(merged).model_dump()
    ran = cli("verify", merged, "--against", DEMO / "base-nf4", DEMO / "adapter")
    assert ran.code == 2 and "--text" in ran.err
    ran = cli("verify", merged, "--text", "nowhere.txt", "--no-reload")
    assert ran.code == 2 and "nowhere.txt" in ran.err and "Traceback" not in ran.err
    assert not ran.out, "said before the work"


def test_fidelity_of_a_damaged_folder_is_not_measured(merged: Path, tmp_path: Path, cli: Cli) -> None:
    """The failed checks are shown, as without a text."""
    out = shutil.copytree(merged, tmp_path / "damaged")
    whole_file = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole_file[: len(whole_file) // 2])
    ran = cli("verify", out, "--text", TEXT, "--tokens", TOKENS)
    assert ran.code == 3 and "FAILED hashes" in ran.out and "KL ratio" not in ran.out and not ran.err
    assert "fidelity" not in json.loads(cli("verify", out, "--text", TEXT, "--json").out)


def test_the_command_shown_after_a_merge(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names inputs that the folder's own names do not lead to; no file of the folder does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    inputs = ["--base", DEMO / "base-nf4", "--adapter", DEMO / "adapter"]
    ran = cli(*inputs, "--target", "bf16", "--out", "out")
    assert ran.code == 0, ran.err
    shown = re.search(r"qmerge (verify out --text FILE --against \S+ [^\s,]+)", ran.out)
    assert shown, ran.out
    command = shown[1].replace("FILE", str(TEXT)).split()
    ran = cli(*command, "--no-reload", "--tokens", 256, "--sequence-length", 64)
    assert ran.code == 0 and "The fine-tuning is kept" in ran.out
    for path in Path("out").iterdir():
        assert str(DEMO).encode() not in path.read_bytes(), path.name
    for name in ("base-nf4", "adapter"):  # next to the folder, they are found by their names
        Path(name).symlink_to(DEMO / name)
    recipe = make_recipe({"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "bf16"})
    assert names_for_against(recipe, Path("out")) == []


def test_at_the_end_of_a_merge(tmp_path: Path, cli: Cli) -> None:
    asked = ["--base", DEMO / "base-nf4", "--adapter", DEMO / "adapter", "--target", "nf4", "--rounding", "nearest"]
    ran = cli(*asked, "--out", tmp_path / "out", "--verify", TEXT, "--sequence-length", 64)
    assert ran.code == 0 and "KL ratio" in ran.out
    record = json.loads((tmp_path / "out" / "qmerge.json").read_text())["fidelity"]
    assert record["text"] == "heldout.txt" and record["kl_ratio"] > 0.5
    assert "The fine-tuning is " in (tmp_path / "out" / "README.md").read_text()
    page = (tmp_path / "out" / "qmerge.html").read_text()
    assert "KL ratio" in page and "What the models write" in page
    ran = cli(*asked, "--out", tmp_path / "other", "--verify", "nowhere.txt")
    assert ran.code == 2 and not (tmp_path / "other").exists(), "said before the work, not after it"
