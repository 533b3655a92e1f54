"""Every notebook runs from top to bottom, without a network, and lies in the repository without outputs."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from qmerge.calibration.texts import read_texts
from qmerge.demo import notebook
from qmerge.demo.training import Training, _batches, _rows, train_qlora
from qmerge.errors import RecipeError, RoomError
from qmerge.wording import DASH

from . import models

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_has_forms_as_colab_reads_them(path: Path) -> None:
    """Every code cell has a title; every field is a constant with a kind or choices."""
    for cell in code(read(path)):
        assert cell.source.startswith("# @title "), cell.source
        for line in cell.source.splitlines():
            if "@param" in line:
                name, field = line.split("# @param ")
                assert re.fullmatch(r"[A-Z_]+ = \S.*  ", name), line
                assert re.fullmatch(r"\[.*\]|\{type:\"(string|boolean|number|slider)\".*\}", field), line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_without_outputs(path: Path) -> None:
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(read(path)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_calls_the_library_and_defines_nothing(path: Path) -> None:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in code(read(path)):
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        assert not any(isinstance(node, definitions) for node in ast.walk(tree)), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_in_colab(path: Path) -> None:
    address = f"colab.research.google.com/github/qmerge/qmerge/blob/main/notebooks/{path.name}"
    assert address in read(path).cells[0].source


# --- run -------------------------------------------------------------------------------------------------------------


def execute(path: Path, folder: Path) -> Any:
    folder.mkdir()
    notebook = read(path)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All notebooks after *Run all*: on a CPU, without a network, in empty folders; two at a time."""
    folder = tmp_path_factory.mktemp("notebooks")
    settings = {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder),
        "PYTHONPATH": str(NOTEBOOKS[0].parent.parent),  # this checkout, wherever the notebook runs
    }
    with pytest.MonkeyPatch.context() as environment, ThreadPoolExecutor(2) as pool:
        for name, value in settings.items():
            environment.setenv(name, value)
        running = {path.stem: pool.submit(execute, path, folder / path.stem) for path in NOTEBOOKS}
        yield {name: future.result() for name, future in running.items()}


def shown(notebook: Any, title: str) -> str:
    """What the cell with this title shows, as text."""
    [cell] = [cell for cell in code(notebook) if cell.source.splitlines()[0].startswith(f"# @title {title}")]
    texts = [
        output.get("text") or output["data"].get("text/html") or output["data"]["text/plain"] for output in cell.outputs
    ]
    return "".join(texts)


@pytest.mark.slow
def test_first_trains_merges_and_answers(executed: dict[str, Any]) -> None:
    ran = executed["01-merge-your-qlora"]
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", shown(ran, "Train"))]
    assert losses[-1] < losses[0] - 0.5, losses
    assert "needed" in shown(ran, "Does it fit?")
    assert "The fine-tuning is" in shown(ran, "Merge into NF4")
    assert "&lt;!doctype html&gt;" in shown(ran, "The report")
    checks = shown(ran, "Check every file")
    assert "Check(" in checks and "ok=False" not in checks
    answers = dict(re.findall(r"^(base|unmerged|merged): +(.*)$", shown(ran, "Base, unmerged, merged"), re.MULTILINE))
    assert all(text.startswith("Log of the") for text in answers.values())
    assert answers["merged"] == answers["unmerged"] != answers["base"]
    assert shown(ran, "Upload") == "", "nothing is uploaded without an id"


@pytest.mark.slow
def test_second_shows_what_rounding_does(executed: dict[str, Any]) -> None:
    ran = executed["02-what-survives"]
    table = shown(ran, "Side by side")
    assert table.index("lost") < table.index("nearest") < table.index("preserve")
    pages = [shown(ran, title) for title in ("nearest", "preserve", "The same as a page")]
    assert len(set(pages)) == 3 and all("&lt;!doctype html&gt;" in page for page in pages)
    kept = [float(found) for found in re.findall(r"rounding: +([\d.]+)%", shown(ran, "Predict"))]
    assert len(kept) == 3 and kept == sorted(kept), "a larger delta keeps more"


@pytest.mark.slow
def test_third_has_size_fidelity_and_speed(executed: dict[str, Any]) -> None:
    ran = executed["03-choose-a-target"]
    speeds = dict(re.findall(r"(nf4|gptq|q4_0)\W+[\d.]+ MB\W+([\d.]+|–)\W", plain(shown(ran, "Speed"))))
    assert speeds.keys() == {"nf4", "gptq", "q4_0"}
    assert float(speeds["nf4"]) > 0 and float(speeds["q4_0"]) > 0
    assert re.findall(r"^(\w+) \S+ (?:mostly )?kept$", shown(ran, "Results"), re.MULTILINE) == list(speeds)


@pytest.mark.slow
def test_fourth_judges_both_adapters(executed: dict[str, Any]) -> None:
    ran = executed["04-several-adapters"]
    assert "cosine" in shown(ran, "Plan")
    gains = re.findall(r"^(first|second) +gain kept ([\d.]+)", shown(ran, "Judge"), re.MULTILINE)
    assert [name for name, _ in gains] == ["first", "second"]
    assert all(float(gain) > 0.8 for _, gain in gains)


def plain(table: str) -> str:
    """A table without tags."""
    return re.sub(r"<[^>]*>", "", table)


# --- what helps them -------------------------------------------------------------------------------------------------


def test_half_a_form_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="ADAPTER is empty"):
        notebook.inputs(base="you/base", text="train.jsonl")
    with pytest.raises(RecipeError, match="ADAPTER is empty"):
        notebook.inputs(text="train.jsonl", trains=True)
    with pytest.raises(RecipeError, match="TEXT is empty"):
        notebook.inputs(base="you/base", adapter="you/your-qlora")
    given = notebook.inputs(base="you/base", adapter="you/your-qlora", text="train.jsonl", trained_on="nf4-dq")
    assert given.trained_on == "nf4-dq" and not given.is_demo
    assert notebook.inputs(base="you/base", text="train.jsonl", trains=True).adapter == ""


def test_an_empty_base_is_the_one_that_the_adapter_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(str(notebook.files("qmerge.demo")))
    adapter = shutil.copytree(demo / "adapter", tmp_path / "adapter")
    models.edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(demo / "base-nf4"))
    assert notebook.inputs(adapter=str(adapter), text="train.jsonl").base == str(demo / "base-nf4")
    assert "the adapter names it" in capsys.readouterr().out


def test_texts_of_two_tasks_are_joined(tmp_path: Path) -> None:
    """Whatever their form; of each, not more than is needed."""
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    (tmp_path / "plain.txt").write_text("x" * 100_000)
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": chat})] * 2))
    joined = notebook.joined_texts([tmp_path / "plain.txt", tmp_path / "chats.jsonl"], tmp_path / "new" / "both.jsonl")
    assert read_texts(joined) == ["x" * notebook.JOINED_CHARACTERS, chat, chat]


def test_drive_is_for_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    with pytest.raises(RecipeError, match="in Colab only"):
        notebook.output_folder("merged", notebook.DRIVE)


def test_room_is_checked_before_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"disk_needed": 5000, "peak_memory": 2000, "calibration_memory": None}
    assert notebook.room(plan, tmp_path / "not" / "yet").table.row_count == 3
    monkeypatch.setattr(notebook, "free_bytes", lambda folder: 5000)
    monkeypatch.setattr(notebook, "memory_limit", lambda max_memory, device: 7000)
    _, needed, free = notebook.room(plan, tmp_path).table.columns
    assert list(needed.cells) == ["5.00 kB", "2.00 kB", DASH]
    assert list(free.cells) == ["5.00 kB", "7.00 kB", "7.00 kB"]
    with pytest.raises(RoomError, match="are needed on the disk"):
        notebook.room({**plan, "disk_needed": 5001}, tmp_path)


def test_too_little_text_to_train_on(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Log of the brig Heron.")
    with pytest.raises(RecipeError, match="expected at least 1024 to train on"):
        train_qlora(notebook.files("qmerge.demo") / "base-nf4", text, tmp_path / "adapter")


def test_one_batch_is_enough_to_train_on() -> None:
    """Each row is used once before any is used again."""
    settings = Training(steps=4, sequences=2, sequence_length=3)
    with pytest.raises(RecipeError, match=r"text.txt: 5 tokens; expected at least 6"):
        _rows(list(range(5)), settings, "text.txt")
    assert _rows(list(range(8)), settings, "text.txt").tolist() == [[0, 1, 2], [3, 4, 5]]
    first, second, third, fourth = _batches(_rows(list(range(12)), settings, "text.txt"), settings)
    for one, other in ((first, second), (third, fourth)):
        assert sorted([*one.tolist(), *other.tolist()]) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_rows_that_fill_no_batch_are_trained_on() -> None:
    """Five rows in batches of two: the fifth row begins the third batch."""
    rows = torch.arange(5).view(5, 1)
    used = torch.cat(list(_batches(rows, Training(steps=5, sequences=2)))).flatten().tolist()
    assert sorted(used[:5]) == sorted(used[5:]) == [0, 1, 2, 3, 4]
