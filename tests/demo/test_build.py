"""The demo's files are those that its scripts make."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qmerge.demo import build, texts

DEMO = Path(build.__file__).parent


@pytest.mark.parametrize("use", ["calibration", "heldout"])
def test_texts_are_those_of_the_script(use: str) -> None:
    made = texts.text_of(texts.ship_log, use, build.TEXT_CHARACTERS)
    assert made == (DEMO / f"{use}.txt").read_text()
    assert made != texts.text_of(texts.ship_log, "another seed", build.TEXT_CHARACTERS)


def test_documents_of_the_base_are_complete() -> None:
    """No symbol is left, and no article is wrong."""
    made = texts.text_of(texts.everyday, "base", 100_000)
    assert 100_000 <= len(made) < 105_000 and made.endswith("\n\n")
    assert not re.search(r"[<>]", made) and not re.search(r"\b[Aa] [aeiou]", made)
    assert {"sea calm", "sea high"} <= set(re.findall(r"sea \w+", made))


def test_tokenizer_is_that_of_the_script() -> None:
    base_text = texts.text_of(texts.everyday, "base", 3 * build.TEXT_CHARACTERS)[: 3 * build.TEXT_CHARACTERS]
    tokenizer = build.make_tokenizer(base_text + (DEMO / "calibration.txt").read_text())
    shipped = json.loads((DEMO / "base-nf4" / "tokenizer.json").read_text())
    assert tokenizer.get_vocab() == {
        **shipped["model"]["vocab"],
        **{token["content"]: token["id"] for token in shipped["added_tokens"]},
    }


def test_the_whole_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a few steps of training: the files have the names and shapes of those that ship, and the adapter has learned."""
    small = {
        "BASE_STEPS": 4,
        "BASE_CHARACTERS": 20_000,
        "ADAPTER_STEPS": 4,
        "TEXT_CHARACTERS": 6_000,
        "BATCH": 4,
        "THREADS": 1,
    }
    for name, value in small.items():
        monkeypatch.setattr(build, name, value)
    threads = torch.get_num_threads()
    try:
        build.main(tmp_path / "out")
    finally:
        torch.set_num_threads(threads)
    for name in ("base-nf4/model.safetensors", "adapter/adapter_model.safetensors"):
        assert shapes(tmp_path / "out" / name) == shapes(DEMO / name)
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert made == {
        path.relative_to(DEMO).as_posix()
        for path in DEMO.rglob("*")
        if path.is_file() and path.suffix in (".json", ".safetensors", ".txt")
    }
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == build.BASE_NAME
    base, adapted, merged = map(
        float, re.findall(r"(?:base|adapter|peft) (\d+\.\d+)(?:,|\n)", capsys.readouterr().out)[:3]
    )
    assert adapted < base and adapted < merged


def shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
