"""--verify at the end of a merge: the text is checked before the work, and a run that was interrupted in it goes on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import qmerge.demo
from qmerge.run import complete

from ..conftest import Cli

DEMO = Path(qmerge.demo.__file__).parent
MERGE = (
    "--base", DEMO / "base-nf4", "--adapter", DEMO / "adapter", "--target", "nf4", "--rounding", "stochastic",
    "--sequence-length", 128,
)  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.txt"
    path.write_text((DEMO / "heldout.txt").read_text()[:3000])
    return path


def test_an_interrupted_judging_is_done_by_resume(
    text: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is complete then, and limits would pass unmeasured. A model that was judged is not judged again."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    asked = [*MERGE, "--verify", text, "--out", tmp_path / "out", "--max-kl-ratio", 1e-6]
    with monkeypatch.context() as patched:
        patched.setattr(complete, "fidelity", interrupted)
        assert cli(*asked).code == 130
    record = tmp_path / "out" / "qmerge.json"
    assert json.loads(record.read_text())["fidelity"] is None
    ran = cli(*asked, "--resume")
    assert ran.code == 5 and "heldout.txt" in ran.out
    assert json.loads(record.read_text())["fidelity"]["text"] == "heldout.txt"
    assert cli("verify", tmp_path / "out", "--no-reload").code == 0
    monkeypatch.setattr(complete, "fidelity", interrupted)
    assert cli(*asked, "--resume").code == 5


def test_a_text_without_words_is_refused_before_the_merge(text: Path, tmp_path: Path, cli: Cli) -> None:
    text.write_text(" \n")
    ran = cli(*MERGE, "--verify", text, "--out", tmp_path / "out")
    assert ran.code == 2 and f"{text}: holds no text" in ran.err and not (tmp_path / "out").exists()


def test_chats_without_a_template_name_the_file(text: Path, tmp_path: Path, cli: Cli) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Where?"}]}))
    ran = cli(*MERGE, "--verify", chats, "--out", tmp_path / "out")
    assert ran.code == 2 and f"{chats}: the text holds chats" in ran.err and "prompt and completion" in ran.err


def test_judging_on_the_calibration_text_is_a_warning(text: Path, tmp_path: Path, cli: Cli) -> None:
    """Also by another name; the control is another file."""
    again = tmp_path / "again.txt"
    again.symlink_to(text)
    asked = [
        *MERGE[:6], "--rounding", "preserve", "--calibration", text, "--calibration-tokens", 512,
        "--sequence-length", 64, "--effort", "fast",
    ]  # fmt: skip
    ran = cli(*asked, "--verify", again, "--out", tmp_path / "same")
    assert ran.code == 0 and "the numbers flatter" in ran.err
    assert "the numbers flatter" in (tmp_path / "same" / "qmerge.json").read_text()
    other = shutil.copy(text, tmp_path / "other.txt")
    assert "flatter" not in cli(*asked, "--verify", other, "--out", tmp_path / "other").err
