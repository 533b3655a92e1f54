"""Files, folders and programs that cannot judge a merged model: each is refused by name."""

from __future__ import annotations

import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qmerge.errors import CheckpointError, RecipeError
from qmerge.evaluation import llama_cpp, verify
from qmerge.evaluation.llama_cpp import next_token_logprobs, tokens_per_second
from qmerge.evaluation.loaders import load_with_llama_cpp
from qmerge.evaluation.media import _pixels, _sound, media_examples, media_files
from qmerge.evaluation.recompute import IDENTITY_PACKAGES, _check_versions
from qmerge.evaluation.stored import outputs_of

FILE = Path("model.gguf")


# --- images and sound ------------------------------------------------------------------------------------------------


def task(media: str) -> Any:
    return SimpleNamespace(media=media, name="classes", text="{…}", judged="classes")


def test_a_folder_for_a_model_of_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected a text file; a model for classes takes lines like"):
        media_files(tmp_path, task(""))
    with pytest.raises(RecipeError, match=r"no images in it; expected files that end in .png, "):
        media_files(tmp_path, task("images"))


def test_a_model_without_a_processor(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no processor"):
        media_examples([], task("images"), model=None, processor_folder=tmp_path)


def test_damaged_images_and_sounds(tmp_path: Path) -> None:
    for read, name, message in ((_pixels, "a.png", "no image that"), (_sound, "a.wav", "no wav file that")):
        for content in (b"", b"RIFF", bytes(99)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(RecipeError, match=f"{name}: {message} can be read"):
                read(tmp_path / name, None)


def test_a_sound_of_another_rate(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(bytes(8))
    with pytest.raises(RecipeError, match=r"a.wav: 8 bits at 8000 Hz; expected 16 bits at 16000 Hz"):
        _sound(tmp_path / "a.wav", SimpleNamespace(sampling_rate=16000))


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def prints(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Run this instead of llama.cpp."""
    monkeypatch.setattr(llama_cpp, "has_llama_cpp", lambda: True)
    for name in ("PROGRAM", "SPEED_PROGRAM"):
        monkeypatch.setattr(llama_cpp, name, program)


def test_probabilities_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    prints(monkeypatch, "print('noise'); print([[1, -2.0], [0, -0.5]])")
    assert next_token_logprobs(FILE, [[7]], 2).tolist() == [[-0.5, -2.0]]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import sys; print('x: Error: no tensor', file=sys.stderr); sys.exit(3)",
            r"does not load model.gguf: x: Error: no",
        ),
        ("import sys; sys.exit(3)", r"does not load model.gguf: exit status 3"),
        ("pass", r"does not load model.gguf: exit status 0"),
        ("print([[1, -2.0]])", r"loads model.gguf, but its probabilities hold NaN, or lack tokens"),
        ("print('[[1, NaN], [0, -2.0]]')", r"loads model.gguf, but its probabilities hold NaN, or lack tokens"),
    ],
)
def test_llama_cpp_that_fails(program: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prints(monkeypatch, program)
    with pytest.raises(CheckpointError, match=f"llama.cpp {message}"):
        next_token_logprobs(FILE, [[7]], 2)


def test_speed_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    prints(monkeypatch, "import json, sys; print('noise'); print(json.load(sys.stdin)[0][1] + int(sys.argv[3]))")
    assert tokens_per_second(FILE, [7, 8], 64) == 72.0
    prints(monkeypatch, "pass")
    with pytest.raises(CheckpointError, match=r"does not load model.gguf: exit status 0"):
        tokens_per_second(FILE, [7])


def test_llama_cpp_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    prints(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(llama_cpp, "SECONDS_TO_LOAD", 0.2)
    monkeypatch.setattr(llama_cpp, "SECONDS_PER_PROMPT", 0)
    with pytest.raises(CheckpointError, match=r"llama.cpp took longer than 0 seconds for model.gguf"):
        next_token_logprobs(FILE, [[7]], 2)


def test_no_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_cpp, "has_llama_cpp", lambda: False)
    with pytest.raises(RecipeError, match="needs xllamacpp: pip install xllamacpp"):
        next_token_logprobs(FILE, [[7]], 2)
    with pytest.raises(CheckpointError, match=r"llama.cpp reads GGUF files, and .* has none"):
        load_with_llama_cpp(tmp_path)


# --- verify ----------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_into_memory_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    for free, fits in ((2000, True), (1999, False)):
        monkeypatch.setattr(verify.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        monkeypatch.setitem(verify.LOADERS, "none", lambda folder: "loaded")
        found = verify.check_reload(tmp_path, "none", None)  # type: ignore[arg-type]
        assert found == "loaded" if fits else found.startswith("left out: the model has 0.0 GB, only 0.0 GB of memory")


def test_weights_that_another_version_made(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = dict.fromkeys(IDENTITY_PACKAGES, "0.0.1")
    with pytest.raises(CheckpointError, match=r"torch 0\.0\.1, not \d"):
        _check_versions(SimpleNamespace(versions=versions))  # type: ignore[arg-type]


def test_outputs_of_a_model_without_a_known_name() -> None:
    found, words = outputs_of((torch.ones(1, 2, dtype=torch.float16),))
    assert (found.dtype, found.tolist(), words) == (torch.float32, [[1.0, 1.0]], "outputs")
