"""``--workers ray`` on a real Ray cluster of two nodes on this machine: the bytes are those of one process, also when a worker
is killed; errors of tasks are those of a merge."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from qmerge.checkpoint.parts import Part
from qmerge.errors import InputError, NumbersError, RecipeError, RoomError
from qmerge.patch import direct
from qmerge.progress import NoProgress
from qmerge.recipe import make_recipe
from qmerge.run import complete, ray_tasks
from qmerge.run import texts as run_texts
from qmerge.run.parts import merge_part
from qmerge.run.state import Run
from qmerge.schema import ReportData

from .. import models
from ..conftest import snapshot, timeless
from .test_parts import merged_by_one

ROOT = Path(__file__).parents[2]


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = make_recipe({"base": "a", "adapter": "b", "target": "nf4", "out": "c", "workers": "ray"})
    with pytest.raises(RecipeError, match=r'pip install "qmerge\[ray\]"'):
        direct.merge(recipe, False, NoProgress())


def nodes(**resources: float) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 2e9}}, {"Alive": True, "Resources": resources}]


class FakeRun:
    """As much of a run as ``task_options`` looks at."""

    def __init__(self, device: str) -> None:
        self.recipe = make_recipe({"base": "a", "adapter": "b", "target": "nf4", "device": device})
        self.plan = type("Plan", (), {"peak_memory": 5_000_000_000})()


@pytest.mark.parametrize(
    ("device", "there", "gpus"),
    [("auto", {"GPU": 2.0}, 1), ("cuda", {"GPU": 1.0}, 1), ("cpu", {"GPU": 1.0}, 0), ("auto", {}, 0)],
)
def test_a_task_asks_for_memory_and_a_gpu(device: str, there: dict[str, float], gpus: int) -> None:
    options = ray_tasks.task_options(FakeRun(device), nodes(memory=8e9, **there))  # type: ignore[arg-type]
    assert options["num_gpus"] == gpus and options["memory"] == 5_600_000_000 and options["max_retries"] > 0


def test_a_task_that_fits_no_node_is_an_error() -> None:
    with pytest.raises(RoomError, match=r"5\.60 GB .* offers 4\.00 GB"):
        ray_tasks.task_options(FakeRun("cpu"), nodes(memory=4e9))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no node of the Ray cluster has a GPU"):
        ray_tasks.task_options(FakeRun("cuda"), nodes(memory=8e9))  # type: ignore[arg-type]


def test_an_error_in_judging_discards_no_weight(
    settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks run in this process, without Ray."""

    def run_tasks(run: Run, parts: list[Part]) -> None:
        for part in parts:
            merge_part(run.recipe, part, resume=True)

    def failing(*arguments: Any, **options: Any) -> Any:
        raise InputError("no words")

    monkeypatch.setattr(ray_tasks, "import_ray", lambda: None)
    monkeypatch.setattr(ray_tasks, "connected", lambda ray: nullcontext())
    monkeypatch.setattr(ray_tasks, "run_tasks", run_tasks)
    monkeypatch.setattr(complete, "fidelity", failing)
    monkeypatch.setattr(run_texts, "load_tokenizer", lambda folder: None)  # the base has none
    text = tmp_path / "text.txt"
    text.write_text("some text")
    with pytest.raises(InputError, match="no words"):
        merge({**settings, "verify": str(text)}, tmp_path / "out")
    left = timeless(tmp_path / "out")
    files = [name for name in whole if name.endswith(".safetensors")]
    assert (
        len(files) > 1
        and "config.json" in left
        and {name: left[name] for name in files} == {name: whole[name] for name in files}
    )


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install "qmerge[ray]"')
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT))  # the workers import this package
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        made = Cluster()
        for _ in range(2):
            made.add_node(num_cpus=1, memory=3_000_000_000, object_store_memory=80_000_000, include_dashboard=False)
        ray.init(address=made.address, log_to_driver=False, logging_level="error")
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def settings(nf4: Path, lora: Path) -> dict[str, Any]:
    return {
        "base": str(nf4), "adapter": str(lora), "target": "nf4", "rounding": "stochastic", "seed": 7, "device": "cpu",
        "max_shard_size": "20kB", "max_memory": "100MB",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return timeless(merged_by_one(settings, tmp_path_factory))


def merge(settings: dict[str, Any], out: Path, resume: bool = False) -> ReportData:
    return direct.merge(make_recipe({**settings, "out": str(out), "workers": "ray"}), resume, NoProgress())[0]


def processes_and_nodes(folder: Path) -> tuple[set[str], set[str]]:
    found = [path.name.split("-") for path in folder.iterdir()]
    return {pid for pid, _, _ in found}, {node for _, node, _ in found}


def noted_part(settings: dict[str, Any], part: str, working_folder: str, notes: Path, victim: str) -> Any:
    """The task, noting where it runs; the first process that works on part ``victim`` kills itself in the middle."""
    import ray

    from qmerge.checkpoint.journal import Journal

    (notes / f"{os.getpid()}-{ray.get_runtime_context().get_node_id()}-{part.partition('/')[0]}").touch()
    append = Journal._append

    def killing(journal: Journal, line: dict[str, Any], sync: bool = False) -> None:
        append(journal, line, sync)
        if "step" in line and part.partition("/")[0] == victim and not (notes.parent / "killed").exists():
            (notes.parent / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Journal._append = killing  # type: ignore[method-assign]
    try:
        return merge_one_part(settings, part, working_folder)
    finally:
        Journal._append = append  # type: ignore[method-assign]


merge_one_part = ray_tasks.merge_one_part


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["none", "2"])
def test_the_bytes_of_one_process(
    cluster: Any, settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:  # fmt: skip
    notes = tmp_path / "notes"
    notes.mkdir()

    def task(recipe: dict[str, Any], part: str, working_folder: str) -> Any:
        return noted_part(recipe, part, working_folder, notes, victim)

    monkeypatch.setattr(ray_tasks, "merge_one_part", task)
    merge(settings, tmp_path / "out")
    assert timeless(tmp_path / "out") == whole
    processes, on_nodes = processes_and_nodes(notes)
    assert len(on_nodes) == 2 and str(os.getpid()) not in processes
    assert (tmp_path / "killed").exists() == (victim != "none")


@pytest.mark.slow
def test_a_worker_that_always_dies_is_one_clear_error(
    cluster: Any, settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(recipe: dict[str, Any], part: str, working_folder: str) -> Any:
        if part.startswith("2/"):
            os.kill(os.getpid(), signal.SIGKILL)
        return merge_one_part(recipe, part, working_folder)

    with monkeypatch.context() as patched:
        patched.setattr(ray_tasks, "merge_one_part", dying)
        patched.setattr(ray_tasks, "MOST_RETRIES", 0)
        with pytest.raises(RoomError, match=r"the worker of part 2/\d+ died 1 times .*--resume"):
            merge(settings, tmp_path / "out")
    merge(settings, tmp_path / "out", resume=True)
    assert timeless(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_run_that_stopped_is_resumed(
    cluster: Any, settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path
) -> None:
    from qmerge.checkpoint.parts import Part

    out = tmp_path / "out"
    count = len([name for name in whole if name.endswith(".safetensors")])
    for number in (1, 3):
        merge_part(make_recipe({**settings, "out": str(out)}), Part(number, count))
    before = snapshot(out)
    with pytest.raises(RecipeError, match=r"--workers ray and --resume"):
        merge(settings, out)
    assert snapshot(out) == before
    merge(settings, out, resume=True)
    assert timeless(out) == whole


@pytest.mark.slow
def test_an_error_of_a_task_is_that_of_a_merge(cluster: Any, dense: Path, tmp_path: Path) -> None:
    """float16 cannot store the merged values of some files: all parts are discarded."""
    big = models.adapter(models.llama(torch.float32), tmp_path / "big", size=1e6, target_modules=["q_proj"])
    settings = {"base": str(dense), "adapter": str(big), "target": "fp16", "rounding": "nearest", "device": "cpu"}
    settings |= {"max_shard_size": "60kB", "max_memory": "100MB"}
    with pytest.raises(NumbersError, match="q_proj"):
        merge(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_relative_paths_are_those_of_the_driver(
    cluster: Any, settings: dict[str, Any], whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(settings["base"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    merge({**settings, "base": "base"}, Path("out"))
    files = [name for name in whole if name.endswith(".safetensors")]
    assert files and {name: snapshot(tmp_path / "out")[name] for name in files} == {name: whole[name] for name in files}
