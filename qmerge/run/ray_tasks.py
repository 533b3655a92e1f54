"""``--workers ray``: every output file is a part of the model, and a task of a Ray cluster.

All nodes need qmerge and the same paths: inputs and the output folder are on storage that they share. Tasks get paths, and
return file names: no weight goes through Ray. A task whose worker dies is run again, and continues as ``--resume`` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import parts_begun
from qmerge.checkpoint.parts import Part, read_part
from qmerge.errors import InputError, NumbersError, QmergeError, RecipeError, RoomError
from qmerge.planning.plan import LIBRARIES_BYTES
from qmerge.progress import NoProgress, Progress
from qmerge.recipe import Recipe, make_recipe
from qmerge.run.parts import check_recipe_for_parts, complete_from_parts, merge_part, prepare_in_parts, read_parts
from qmerge.run.state import Run, shards_of_part
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import ReportData

MOST_RETRIES = 5
"""How often a task is run again whose worker died."""

SECONDS_TO_STOP = 60
"""How long to wait for tasks that were told to stop."""


def merge_with_ray(recipe: Recipe, resume: bool = False, progress: Progress | None = None) -> ReportData:
    """Merge on a Ray cluster: the one that ``RAY_ADDRESS`` or ``ray start`` names, else one on this machine.

    Args:
        resume: go on with the parts that an interrupted run left.

    Returns:
        The content of qmerge.json.

    Raises:
        RecipeError: Ray is missing, the cluster has no GPU for ``--device cuda``, or as ``merge_part``.
        RoomError: a task needs more memory than any node has; or as ``merge``.
        InputError, NumbersError: as ``merge``.
    """
    ray = import_ray()
    progress = progress or NoProgress()
    check_recipe_for_parts(recipe)
    with Reader() as reader:
        run = prepare_in_parts(recipe, reader, progress)
        parts = [Part(number, len(run.plan.shards)) for number in range(1, len(run.plan.shards) + 1)]
        begun = parts_begun(run.out) if run.out.is_dir() else []
        if not resume or not begun:
            # Empty, or an error that says what to do.
            folder.check_content(run.out, resume)
        with discarding(run, parts), folder.locked(run.out), connected(ray):
            try:
                run_tasks(run, parts)
            finally:
                progress.end()
        # The weights are all written: from here on nothing is discarded.
        with folder.locked(run.out):
            return complete_from_parts(run, read_parts(run.out, parts))


def import_ray() -> Any:
    """The ray package.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import ray
    except ImportError as cause:
        raise RecipeError('--workers ray: Ray is missing, install it with: pip install "qmerge[ray]"') from cause
    return ray


@contextmanager
def connected(ray: Any) -> Iterator[None]:
    """Inside, there is a connection to a cluster. One that the program has already is kept."""
    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def discarding(run: Run, parts: list[Part]) -> Iterator[None]:
    """After an error that --resume cannot mend, remove what all parts have written."""
    out_existed = run.out.exists()
    try:
        yield
    except (NumbersError, InputError):
        for part in parts:
            files = [shard.file for shard in shards_of_part(run.plan, part)]
            folder.discard_part(run.out, part, files, made_by_us=not out_existed)
        raise


def run_tasks(run: Run, parts: list[Part]) -> None:
    """Run one task for each part, and wait for all.

    Raises:
        QmergeError: that of the first task that failed. The other tasks are stopped.
        RoomError: a task's worker died again and again.
    """
    import ray

    run.progress.stage("merging on Ray", sum(shard.layout.most_bytes for shard in run.plan.shards))
    task = ray.remote(**task_options(run, ray.nodes()))(merge_one_part)
    part_of_task = {}
    for part in parts:
        part_of_task[task.remote(run.recipe.model_dump(), str(part), str(Path.cwd()))] = part
    waiting = list(part_of_task)
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            for finished in done:
                part = part_of_task[finished]
                error = result_of(ray, finished, part)
                if error is not None:
                    raise error
                for shard in shards_of_part(run.plan, part):
                    run.progress.advance(shard.layout.most_bytes, shard.file)
    except BaseException:  # Ctrl-C, too
        for unfinished in waiting:
            ray.cancel(unfinished)
        if waiting:  # they give their locks back, and keep what --resume needs
            ray.wait(waiting, num_returns=len(waiting), timeout=SECONDS_TO_STOP)
        raise


def result_of(ray: Any, task: Any, part: Part) -> QmergeError | None:
    """What ``merge_one_part`` returned.

    Raises:
        RoomError: its worker died again and again.
    """
    try:
        error: QmergeError | None = ray.get(task)
    except ray.exceptions.RayTaskError:
        raise  # a bug, with the traceback of the task
    except ray.exceptions.RayError as cause:
        # Nearly always the node ran out of memory, and its system ended the process.
        reason = str(cause).strip().partition("\n")[0]
        raise RoomError(
            f"--workers ray: the worker of part {part} died {MOST_RETRIES + 1} times ({reason}); use a smaller --max-memory or "
            f"larger nodes, and continue with --resume"
        ) from cause
    return error


def task_options(run: Run, nodes: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What each task needs of a node: memory as planned, and a GPU where the recipe's device is one.

    Args:
        nodes: those of the cluster, as ``ray.nodes()`` describes them.

    Raises:
        RecipeError, RoomError: no node has it.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    memory = run.plan.peak_memory + LIBRARIES_BYTES
    largest = max(node.get("memory", 0) for node in resources)
    if memory > largest:
        raise RoomError(
            f"--workers ray: a task needs {memory / 1e9:.2f} GB of memory, but the largest node of the cluster offers "
            f"{largest / 1e9:.2f} GB; use a smaller --max-memory, or larger nodes"
        )
    has_gpu = any(node.get("GPU", 0) >= 1 for node in resources)
    if run.recipe.device == "cuda" and not has_gpu:
        raise RecipeError("--device cuda: no node of the Ray cluster has a GPU; use --device cpu or auto")
    uses_gpu = has_gpu and run.recipe.device != "cpu"
    # Errors that qmerge raises on purpose come back as values: only a worker that died is worth a retry.
    return {"num_cpus": 1, "num_gpus": int(uses_gpu), "memory": memory, "max_retries": MOST_RETRIES}


def merge_one_part(settings: dict[str, Any], part: str, working_folder: str) -> QmergeError | None:
    """The task: merge a part, or go on with what a dead worker left of it.

    Args:
        settings: the recipe.
        part: ``i/n``.
        working_folder: the driver's, which relative paths in the recipe are meant from.

    Returns:
        None, or the error that it ended with.
    """
    if Path(working_folder).is_dir():
        os.chdir(working_folder)
    try:
        merge_part(make_recipe(settings), read_part(part), resume=True)
    except QmergeError as error:
        return error
    return None
