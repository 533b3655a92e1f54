"""Is a folder what qmerge wrote, whole, and does the stock loader take it?

Hashes against qmerge.json; headers by our strict reader and by the safetensors library; index against headers; and a
load with transformers that must leave nothing missing and nothing over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qmerge import plugins
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import CheckpointError, QmergeError, RecipeError
from qmerge.evaluation.loaders import LOADERS
from qmerge.formats import get_format
from qmerge.pipeline import compute_device
from qmerge.progress import Progress
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import hash_file
from qmerge.schema import NAME as REPORT_NAME
from qmerge.schema import FidelityRecord, ReportData, read_report


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str


def verify(folder: Path, reload: bool = True, loader: str = "transformers") -> list[Check]:
    """Every check that can be made; a later one is left out where an earlier one makes it meaningless.

    Raises:
        CheckpointError: ``folder`` has no qmerge.json.
        RecipeError: no such loader, or its library is not installed.
    """
    if loader not in LOADERS:
        raise RecipeError(f"no loader is called {loader!r}. {plugins.suggestion(loader, list(LOADERS))}")
    report = read_report(folder)
    checks = [_check("hashes", lambda: hashes(folder, report)), _check("headers", lambda: headers(folder))]
    if all(check.ok for check in checks):
        checks.append(_check("finite", lambda: finite(folder)))
        checks.append(
            _check("reload", lambda: loads(folder, loader)) if reload else Check("reload", True, "not asked for")
        )
    return checks


def judge(
    folder: Path, text: Path, against: tuple[str, str] | None, tokens: int, length: int, device: str, progress: Progress
) -> FidelityRecord:  # fmt: skip
    """Gain kept and KL ratio of a folder on held-out text.

    Args:
        folder: a model; one that qmerge did not write needs ``against``.
        against: base and adapter; None for those that the recipe in the folder names.

    Raises:
        QmergeError: as ``judging.fidelity``.
    """
    from qmerge.evaluation.fidelity import fidelity

    foreign = against is not None and not (folder / REPORT_NAME).is_file()
    recipe: dict[str, Any] = {"target": "fp32"} if foreign else read_report(folder).recipe
    if against:
        recipe = {**recipe, "base": against[0], "adapter": against[1], "revision": None, "adapter_revision": None}
    checked = make_recipe({**recipe, "device": device})
    try:
        progress.stage("judging", 1)
        return fidelity(
            folder, checked, text, compute_device(device), tokens, length, lambda at: progress.advance(0, at)
        )
    finally:
        progress.end()


def _check(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, True, work())
    except RecipeError:  # the command line, not the folder
        raise
    except QmergeError as error:
        return Check(name, False, str(error))


def hashes(folder: Path, report: ReportData) -> str:
    """SHA-256 of every output file, as when it was written."""
    for record in report.outputs:
        path = folder / record.file
        if not path.is_file():
            raise CheckpointError(f"{record.file} is missing")
        if path.stat().st_size != record.bytes or hash_file(path) != record.sha256:
            raise CheckpointError(
                f"{record.file} is not as it was written: its size or SHA-256 differs from qmerge.json"
            )
    return f"{len(report.outputs)} files as written"


def headers(folder: Path) -> str:
    """Our reader, the safetensors library and the index agree on what is there."""
    from safetensors import SafetensorError, safe_open

    with Reader() as reader:
        checkpoint = scan(folder, reader)
    count = 0
    for file in checkpoint.files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = set(opened.keys())
        except SafetensorError as cause:
            raise CheckpointError(f"{file.name}: the safetensors library refuses it: {cause}") from cause
        ours = {
            part.name for weight in checkpoint.weights.values() for part in weight.parts.values() if part.file == file
        }
        if names != ours:
            raise CheckpointError(f"{file.name}: the safetensors library sees other tensors than its header lists")
        count += len(names)
    return f"{count} tensors in {len(checkpoint.files)} files, {_formats(checkpoint)}"


def finite(folder: Path) -> str:
    """The small parts (scales) of every quantized weight open without NaN or infinity."""
    import torch

    with Reader() as reader:
        checkpoint = scan(folder, reader)
        quantized = [w for w in checkpoint.weights.values() if get_format(w.format).quant_method]
        for weight in quantized:
            get_format(weight.format).open(weight, reader, torch.device("cpu"))
    return f"scales of {len(quantized)} quantized weights"


def loads(folder: Path, loader: str) -> str:
    """A stock loader takes the model, and answers."""
    size, free = sum(path.stat().st_size for path in folder.glob("*.safetensors")), psutil.virtual_memory().available
    if size > free / 2:
        return f"left out: the model has {size / 1e9:.1f} GB, only {free / 1e9:.1f} GB of memory are free"
    return LOADERS[loader](folder)


def _formats(checkpoint: Checkpoint) -> str:
    return ", ".join(f"{count} {name}" for name, count in checkpoint.formats().items())
