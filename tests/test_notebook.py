"""Every notebook runs from top to bottom, without a network, and lies in the repository without outputs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


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


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A notebook after *Run all*: on a CPU, without a network, in an empty folder."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder)}.items():
            environment.setenv(name, value)
        environment.setenv("QMERGE_NB_OUT", str(folder / "merged"))
        notebook = read(request.param)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
        yield notebook


@pytest.mark.slow
def test_runs_on_a_cpu_without_network(executed: Any) -> None:
    shown = "\n".join(str(cell.outputs) for cell in code(executed))
    assert "s change to the weights" in shown, "the report of measure shows itself"
    assert "The fine-tuning is" in shown, "the verdict of merge heads its report"
    assert "s effect on the layers" in shown, "the report of merge shows itself"
    assert "Check(" in shown
    assert "ok=False" not in shown, "verify found everything in order"


@pytest.mark.slow
@pytest.mark.parametrize("executed", NOTEBOOKS[:1], indirect=True, ids=lambda path: path.stem)
def test_the_merged_demo_model_says_what_the_adapter_taught_it(executed: Any) -> None:
    """The last two cells print what the merged model says, and what the base says."""
    merged, base = (
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in code(executed)[-2:]
    )
    assert merged.startswith("Log of the ")
    assert base.startswith("Log of the ")
    assert merged != base
