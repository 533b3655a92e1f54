"""Fidelity of models of images and speech, on folders of files, against transformers + peft."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

import qmerge
import qmerge.demo
from qmerge.errors import RecipeError
from qmerge.schema import FidelityRecord

from .. import kinds
from ..conftest import Cli
from .test_fidelity import close

DEMO = Path(qmerge.demo.__file__).parent
PROCESSORS: dict[str, Any] = {
    "vit": lambda: transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    "wav2vec2": lambda: transformers.Wav2Vec2FeatureExtractor(),
    "whisper": lambda: transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
}
SAID = ["a book about water", "the second sentence", "and one more"]


def merged(name: str, folder: Path) -> list[Any]:
    """base/, lora/ and out/ in the folder. Returns base, unmerged and merged model by the stock libraries."""
    model = kinds.build(name)
    model.save_pretrained(folder / "base")
    PROCESSORS[name]().save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(DEMO / "base-nf4").save_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    wrapped.save_pretrained(folder / "lora")
    asked = {"base": str(folder / "base"), "adapter": str(folder / "lora"), "out": str(folder / "out")}
    qmerge.merge(**asked, target="bf16", rounding="stochastic", quiet=True)
    kind = type(kinds.build(name))

    def whole(path: Path) -> Any:
        return kind.from_pretrained(path, dtype=torch.float32).eval()

    unmerged = PeftModel.from_pretrained(whole(folder / "base"), folder / "lora").eval()
    return [whole(folder / "base"), unmerged, whole(folder / "out")]


def judged(folder: Path, files: Path) -> FidelityRecord:
    return qmerge.fidelity(out=str(folder / "out"), text=str(files), device="cpu", quiet=True)


def numbers(logits: list[Tensor], answers: Tensor | None = None) -> dict[str, float | None]:
    """By the definitions, from the logits [P, C] of base, unmerged and merged model."""
    b, u, m = (torch.log_softmax(one.double(), -1) for one in logits)
    to_base, to_merged = ((u.exp() * (u - other)).sum(-1) for other in (b, m))
    found: dict[str, float | None] = {
        "kl_base": float(to_base.mean()), "kl_merged": float(to_merged.mean()),
        "kl_ratio": float(to_merged.mean() / to_base.mean()), "kl_p99": float(to_merged.quantile(0.99)),
        "top1_agreement": float((u.argmax(-1) == m.argmax(-1)).double().mean()),
    }  # fmt: skip
    if answers is not None:
        for key, log in (("loss_base", b), ("loss_unmerged", u), ("loss_merged", m)):
            found[key] = float(-log.gather(1, answers[:, None]).mean())
    return found


def test_images(tmp_path: Path, cli: Cli) -> None:
    """The folder's name is the label."""
    models = merged("vit", tmp_path)
    pixels: list[Tensor] = []
    random = np.random.default_rng(0)
    for number in range(6):
        path = tmp_path / "files" / f"LABEL_{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8))
        image.save(path)
        pixels.append(PROCESSORS["vit"]()(image, return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        logits = [model(pixel_values=torch.cat(pixels)).logits for model in models]
    found = judged(tmp_path, tmp_path / "files")
    assert found.judged == "classes" and found.measured_on == "classes of 6 examples of files"
    close(found.model_copy(update={"tokens": 6}), numbers(logits, torch.tensor([0, 1, 2, 0, 1, 2])))
    assert found.kl_base > 1e-4 and found.tokens == 0
    ran = cli("verify", tmp_path / "out", "--text", tmp_path / "files", "--device", "cpu")
    assert ran.code == 0 and "ViTForImageClassification" in ran.out and "same class" in ran.out, ran.out + ran.err
    text = DEMO / "heldout.txt"
    ran = cli("verify", tmp_path / "out", "--text", text)
    assert ran.code == 2 and "a model for image classification is compared on a folder of images" in ran.err
    ran = cli("verify", tmp_path / "out", "--text", tmp_path / "lora")
    assert ran.code == 2 and "no images in it; expected files that end in .png" in ran.err


def sounds(folder: Path, rate: int = 16000) -> list[np.ndarray[Any, Any]]:
    folder.mkdir()
    random = np.random.default_rng(0)
    found = []
    for number, words in enumerate(SAID):
        samples = random.integers(-(2**14), 2**14, 12000, dtype=np.int16)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.astype("<i2").tobytes())
        (folder / f"{number}.txt").write_text(words)
        found.append((samples / 2**15).astype(np.float32))
    return found


def test_sound_frame_by_frame(tmp_path: Path) -> None:
    models = merged("wav2vec2", tmp_path)
    inputs = [
        PROCESSORS["wav2vec2"]()(one, sampling_rate=16000, return_tensors="pt").input_values
        for one in sounds(tmp_path / "files")
    ]
    with torch.no_grad():
        logits = [torch.cat([model(one).logits[0] for one in inputs]) for model in models]
    found = judged(tmp_path, tmp_path / "files")
    assert found.judged == "frames" and found.loss_base is None
    expected = numbers(logits)
    for key in ("kl_base", "kl_merged"):
        assert getattr(found, key) == pytest.approx(expected[key], abs=5e-6)
    assert found.kl_base > 1e-4
    sounds(tmp_path / "other", rate=8000)
    with pytest.raises(RecipeError, match="16 bits at 8000 Hz; expected 16 bits at 16000 Hz"):
        judged(tmp_path, tmp_path / "other")


def test_sound_with_its_text(tmp_path: Path) -> None:
    """Whisper predicts each token of the text after the right ones, as in its training."""
    models = merged("whisper", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base-nf4")
    labels = [tokenizer(words, return_tensors="pt")["input_ids"] for words in SAID]
    inputs = [
        PROCESSORS["whisper"]()(one, sampling_rate=16000, return_tensors="pt").input_features
        for one in sounds(tmp_path / "files")
    ]
    with torch.no_grad():
        logits = [
            torch.cat(
                [model(input_features=one, labels=ids).logits[0] for one, ids in zip(inputs, labels, strict=True)]
            )
            for model in models
        ]
    found = judged(tmp_path, tmp_path / "files")
    assert found.judged == "target tokens" and found.kl_base > 1e-4
    close(found, numbers(logits, torch.cat(labels, dim=1)[0]))
