"""Calibration of models that are no causal language models: encoders, and models with an encoder and a decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig

import qmerge
import qmerge.demo
from qmerge.calibration import texts
from qmerge.calibration.layered import LayeredModel
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.calibration.scores import finish_run, score_runs
from qmerge.calibration.tasks import token_arguments
from qmerge.errors import CheckpointError, RecipeError, TokenizerError
from qmerge.schema import ReportData

from .. import kinds

DEMO = Path(qmerge.demo.__file__).parent
CPU = torch.device("cpu")
IDS = [torch.arange(24).view(2, 12) * k % 1000 for k in (1, 5)]
TARGETS = {"t5": ["q", "v", "wo"], "vit": ["q_proj", "v_proj"], "albert": ["query", "value"]}


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "bert-classes",
        "distilbert-classes",
        "mpnet",
        "modernbert",
        "llama-classes",
        "llama-embeddings",
        "t5",
        "bart",
    ],
)
def test_layer_by_layer_is_the_whole_model(name: str, tmp_path: Path) -> None:
    """The outputs that are judged, bit for bit: KL divergence and distance to the model itself are zero."""
    model = kinds.build(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")

    def values(key: str) -> Tensor:
        return tensors[key].float()

    runs = [LayerwiseRun(LayeredModel(config, tensors, CPU), values, IDS) for _ in range(3)]
    layered = runs[0].model
    outputs: list[Any] = []

    with stopping(runs), pytest.MonkeyPatch.context() as patched:
        add = "add" if layered.predicts_tokens else "add_vectors"
        patched.setattr(
            "qmerge.calibration.scores.Scores." + add,
            lambda *_, unmerged, **__: outputs.append(unmerged),
        )
        for run in runs:
            run.start()
        for index in range(len(layered) - 1):
            for run in runs:
                run.run_layer(index)
        finished = []
        for run in runs:
            with run.model.loaded(len(layered) - 1, values):
                finished.append(finish_run(run))
        score_runs(*finished, IDS)  # type: ignore[arg-type]
    for number, ids in enumerate(IDS):
        with torch.no_grad():
            whole = model if layered.predicts_tokens else model.base_model
            result = whole(**token_arguments(whole, ids))
        expected = result.logits if layered.predicts_tokens else result.last_hidden_state
        assert torch.equal(outputs[number].view_as(expected), expected), name
    assert len(layered) == (4 if name in ("t5", "bart") else 2)


def test_models_that_no_text_runs_through(tmp_path: Path) -> None:
    for name, problem in (("vit", "takes pixel_values, not text"), ("albert", "runs the same layer several times")):
        kinds.build(name).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        with pytest.raises(CheckpointError, match=problem):
            LayeredModel(config, (), CPU)


# --- merges -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    known: dict[str, dict[str, str]] = {}

    def make(name: str) -> dict[str, str]:
        if name not in known:
            known[name] = made(name, tmp_path_factory.mktemp(name))
        return known[name]

    return make


def made(name: str, folder: Path) -> dict[str, str]:
    """An NF4 base with a tokenizer, and an adapter far below its steps."""
    model = kinds.build(name)
    model.save_pretrained(folder / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": settings, "dtype": torch.float32, "device_map": "cpu"}
    type(model).from_pretrained(folder / "dense", **options).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(DEMO / "base-nf4").save_pretrained(folder / "base")
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS.get(name, ["query", "value", "output.dense"]))
    )
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.04)
    wrapped.save_pretrained(folder / "lora")
    return {"base": str(folder / "base"), "adapter": str(folder / "lora"), "target": "nf4"}


def merged(asked: dict[str, str], out: Path, **more: Any) -> ReportData:
    return qmerge.merge(**asked, out=str(out), quiet=True, **more).data  # type: ignore[arg-type]


def stock(folder: str | Path, adapter: str | None = None) -> Any:
    name = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    model = model.dequantize().float().eval()
    return PeftModel.from_pretrained(model, adapter).eval() if adapter else model


@torch.no_grad()
def distance_ratio(asked: dict[str, str], out: Path, batches: list[Tensor]) -> tuple[float, float]:
    """½ ‖u − b‖² / ‖u‖² of hidden states, its mean over tokens, and the ratio of merged to base, by the stock libraries."""
    models = [stock(asked["base"]), stock(asked["base"], asked["adapter"]), stock(out)]
    base, unmerged, to = (
        torch.cat([model(input_ids=ids).last_hidden_state.flatten(0, 1).double() for ids in batches])
        for model in models
    )
    far, near = (((unmerged - other).square().sum(-1) / (2 * unmerged.square().sum(-1))).mean() for other in (base, to))
    return float(far), float(near / far)


def test_an_encoder_is_calibrated_and_judged(inputs: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    """The numbers of the report are those of the stock libraries on the tokens that were held out. Rounding that saw how the
    layers are used is better than rounding that did not, on text of another kind, too."""
    asked = inputs("bert")
    text = DEMO / "heldout.txt"
    report = merged(asked, tmp_path / "text", calibration=str(text), sequence_length=64, calibration_tokens=4096)
    found = report.fidelity
    assert (
        found and found.judged == "hidden states" and found.loss_base is found.gain_kept is found.top1_agreement is None
    )
    assert report.rounding == "preserve" and report.warnings == []
    assert found.measured_on == "hidden states of 1,024 tokens of heldout.txt, which rounding did not see"
    batches = texts.token_batches(text, Path(asked["base"]), tokens=4096, length=64, vocab_size=1032)
    held_out = texts.hold_out(torch.cat(batches), "heldout.txt").held_out
    far, ratio = distance_ratio(asked, tmp_path / "text", held_out)
    # Two layers in float32: hidden states are off by about 1e-6 of their size, squares of distances by 2e-4 of theirs.
    assert found.kl_base == pytest.approx(far, rel=1e-3) and far > 1e-3
    assert found.kl_ratio == pytest.approx(ratio, rel=5e-3)
    others = {}
    for rounding in ("nearest", "stochastic"):
        merged(asked, tmp_path / rounding, rounding=rounding)
        _, others[rounding] = distance_ratio(asked, tmp_path / rounding, held_out)
    assert ratio < min(others.values()) / 3, others


def test_an_encoder_and_decoder_is_calibrated(inputs: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    """T5 without being told how: on general text. The weights of both parts are reached."""
    report = merged(inputs("t5"), tmp_path / "out", rounding="preserve", sequence_length=64, calibration_tokens=2048)
    assert report.calibration and report.calibration.source == "general"
    assert report.fidelity and report.fidelity.judged == "target tokens" and report.fidelity.loss_base
    assert all(weight.calibration and weight.calibration.tokens for weight in report.weights), "every weight saw inputs"


def test_what_cannot_be_calibrated_is_said(inputs: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    """auto takes the rounding that is best without, and the report says that nothing is known about the outputs."""
    for name, problem in (("vit", "takes pixel_values"), ("albert", "runs the same layer several times")):
        report = merged(inputs(name), tmp_path / name)
        assert report.rounding == "stochastic" and report.fidelity is None
        (line,) = [line for line in report.warnings if "calibrated on nothing" in line]
        assert problem in line and "is not known" in line
    with pytest.raises(CheckpointError, match="takes pixel_values, not text"):
        merged(inputs("vit"), tmp_path / "asked", rounding="preserve", calibration="random")
    with pytest.raises(RecipeError, match="a model for embeddings writes no text by itself"):
        merged(inputs("bert"), tmp_path / "generate", rounding="preserve", calibration="generate")


def test_a_tokenizer_without_words(tmp_path: Path) -> None:
    """transformers makes BERT's tokenizer without a file: every text would be one unknown word after the other."""
    kinds.build("bert").save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="its tokenizer has no vocabulary"):
        texts.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["roberta-classes", "mpnet", "bert"])
def test_longest_sequence(name: str, tmp_path: Path) -> None:
    """RoBERTa's positions begin after that of the padding."""
    model = kinds.build(name)
    length = texts.max_sequence_length(model.config.to_dict())
    ids = torch.full((1, length + 1), 7)
    with torch.no_grad():
        model(input_ids=ids[:, :-1])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)
