"""Check a folder: is it complete and unchanged since qmerge wrote it, and does a stock loader load it?

hashes   every output file has the size and SHA-256 that qmerge.json records, and qmerge.json its own checksum
headers  qmerge's strict reader, the safetensors library and the index agree on the tensors
finite   the scales of quantized weights hold neither NaN nor infinity
inputs   weights computed again from base, adapters and recipe have the same bytes
reload   a stock loader loads the model with nothing missing and nothing left over, and its output is right; or as wrong as
         for the base, because then the loader is at fault
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import psutil
import torch

from qmerge import hub, plugins
from qmerge.checkpoint.consistency import tokenizer_problem
from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.folder import TOOLS_FOLDERS
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import CheckpointError, QmergeError, RecipeError, listed
from qmerge.evaluation.loaders import LOADERS, WrongOutputsError, default_loader, load
from qmerge.evaluation.merged import open_merged
from qmerge.evaluation.recompute import check_against_inputs
from qmerge.formats import get_format
from qmerge.gguf.base import gguf_file
from qmerge.gguf.converter import packages
from qmerge.gguf.header import read_header
from qmerge.report.output_record import check_checksum
from qmerge.report.result import Check, LeftOut
from qmerge.safetensors_io.disk import hash_file
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, FileRecord, ReportData, read_report
from qmerge.wording import counted


def verify(
    folder: Path, reload: bool = True, loader: str | None = None, *, against_inputs: bool = False
) -> list[Check]:
    """Run every check that makes sense: after damaged files, nothing is loaded.

    Args:
        against_inputs: compute all weights again that depend on the inputs alone; else one of each file, if the inputs are at
            hand.
        reload: also load the model with a stock loader.
        loader: one of ``LOADERS``; None: ``default_loader``.

    Raises:
        CheckpointError: ``folder`` has no qmerge.json.
        RecipeError: there is no such loader, or its library is not installed.
    """
    if loader is not None and loader not in LOADERS:
        raise RecipeError(f"no loader is called {loader!r}. {plugins.suggestion(loader, list(LOADERS))}")
    folder = folder.parent if folder.is_file() else folder
    report = read_report(folder)
    # Every error becomes a failed check, so that one run shows all problems.
    checks = [
        _run_check("hashes", lambda: check_hashes(folder, report)),
        _run_check("headers", lambda: check_headers(folder)),
    ]
    if not all(check.ok for check in checks):
        return checks
    checks.append(_run_check("finite", lambda: check_finite(folder)))
    checks.append(_run_check("inputs", lambda: check_against_inputs(folder, report, every=against_inputs)))
    problem = _tokenizer_problem(folder)
    if problem:
        checks.append(Check("tokenizer", True, f"{problem} into this folder", is_warning=True))
    if reload:
        checks.append(_run_check("reload", lambda: check_reload(folder, loader or default_loader(folder), report)))
    else:
        checks.append(Check("reload", True, "not asked for", is_left_out=True))
    return checks


def _run_check(name: str, check: Callable[[], str]) -> Check:
    try:
        found = check()
        return Check(name, True, str(found), is_left_out=isinstance(found, LeftOut))
    except RecipeError:  # the command line is wrong, not the folder
        raise
    except QmergeError as error:
        return Check(name, False, str(error))


def _tokenizer_problem(folder: Path) -> str | None:
    """That the model cannot be used for want of a tokenizer, in words; None where it can. A GGUF file has its own."""
    if gguf_file(folder) is not None:
        return None
    config = read_json(folder / "config.json", CheckpointError)
    return tokenizer_problem([path.name for path in folder.iterdir()], config)


def check_hashes(folder: Path, report: ReportData) -> str:
    """Compare size and SHA-256 of every file with qmerge.json, and qmerge.json with its own checksum.

    Returns:
        One line with the result; so do the other checks.

    Raises:
        CheckpointError: a file is missing or differs, or there are weights that the model does not have.
    """
    if report.checksum is not None:
        check_checksum(folder)
    records = [*report.outputs, *report.files]
    problems = [problem for record in records if (problem := _problem_of(folder, record))]
    if problems:
        raise CheckpointError("; ".join(problems))
    found = f"{counted(len(records), 'file')} as written"
    if report.checksum is None:
        return f"{found}: the weights. This older {NAME} does not record the other files"
    # Weights of a stranger may be loaded with those of the model; other files are its owner's business.
    others = _other_files(folder, {record.file for record in records})
    weights = [name for name in others if name.endswith(".safetensors")]
    if weights:
        raise CheckpointError(
            f"{listed(weights)}: not in {NAME}, so not part of the model, but a loader may read it: remove it"
        )
    not_part = f". Not part of the model: {listed(others)}" if others else ""
    return f"{found}, and {NAME} itself{not_part}"


def _problem_of(folder: Path, record: FileRecord) -> str | None:
    """What is wrong with a recorded file."""
    path = folder / record.file
    if not path.is_file():
        return f"{record.file} is missing"
    if path.stat().st_size != record.bytes or hash_file(path) != record.sha256:
        return f"{record.file} has changed since it was written: its size or SHA-256 differs from {NAME}"
    return None


def _other_files(folder: Path, recorded: Collection[str]) -> list[str]:
    """Paths of files that are not in the record, without those that git and the Hub library keep about a folder."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in TOOLS_FOLDERS and name.as_posix() not in (*recorded, NAME):
            names.append(name.as_posix())
    return names


def check_headers(folder: Path) -> str:
    """Compare the tensors that qmerge's reader, the safetensors library and the index see.

    Raises:
        CheckpointError: they disagree, or a header breaks the specification.
    """
    from safetensors import SafetensorError, safe_open

    file = gguf_file(folder)
    if file is not None:
        return _check_gguf_header(file)
    with Reader() as reader:
        checkpoint = scan(folder, reader)
    count = 0
    for file in checkpoint.files:
        # An independent reader: it must see the same as qmerge's own.
        try:
            with safe_open(file, framework="pt") as opened:
                library_names = set(opened.keys())
        except SafetensorError as cause:
            raise CheckpointError(f"{file.name}: the safetensors library refuses it: {cause}") from cause
        if library_names != _tensor_names(checkpoint, file):
            raise CheckpointError(f"{file.name}: the safetensors library sees other tensors than its header lists")
        count += len(library_names)
    formats = ", ".join(f"{weights} {name}" for name, weights in checkpoint.formats().items())
    return f"{count} tensors in {counted(len(checkpoint.files), 'file')}, {formats}"


def _check_gguf_header(file: Path) -> str:
    """Compare the tensors that qmerge's reader and llama.cpp's own see."""
    gguf, _ = packages()
    header = read_header(file)
    found: dict[str, tuple[str, int]] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        found[tensor.name] = (tensor.tensor_type.name, int(tensor.data_offset))
    expected = {name: (header.types[name], offset) for name, offset in header.offsets.items()}
    if found != expected:
        raise CheckpointError(f"{file.name}: the gguf package sees other tensors than qmerge")
    types = ", ".join(f"{count} {name}" for name, count in Counter(header.types.values()).most_common())
    return f"{len(found)} tensors in 1 file, {types}"


def _tensor_names(checkpoint: Checkpoint, file: Path) -> set[str]:
    """Tensors that qmerge's reader sees in one file."""
    names: set[str] = set()
    for weight in checkpoint.weights.values():
        names.update(part.name for part in weight.parts.values() if part.file == file)
    return names


def check_finite(folder: Path) -> str:
    """Open every quantized weight: formats refuse scales with NaN or infinity.

    Raises:
        CheckpointError: a weight cannot be opened.
    """
    with Reader() as reader:
        checkpoint = open_merged(folder, reader)
        count = 0
        for weight in checkpoint.weights.values():
            weight_format = get_format(weight.format)
            if weight_format.info.is_quantized:
                weight_format.open(weight, reader, torch.device("cpu"))
                count += 1
    return f"scales of {count} quantized weights"


def check_reload(folder: Path, loader: str, report: ReportData) -> str:
    """Load the model with a stock loader and compare its output, where the model fits into memory.

    Raises:
        CheckpointError: it does not load, or computes something else.
        RecipeError: the loader's library is not installed.
    """
    problem = _too_large(folder)
    if problem:
        return LeftOut(f"left out: {problem}")
    try:
        return load(folder, loader)
    except WrongOutputsError as error:
        base_distance = _distance_of_base(folder, report, loader)
        if base_distance < error.distance / 2:
            raise
        return (
            f"loads. The {error.compared} of {error.library} are {100 * error.distance:.0f} % off those of the stored values, "
            f"and for the unmerged base {100 * base_distance:.0f} %: on this machine it computes this format wrongly, so the file "
            f"is not at fault; --text compares the stored values themselves"
        )


def _too_large(folder: Path) -> str:
    """Why the model cannot be loaded into memory; empty where it can."""
    file = gguf_file(folder)
    # Its values take 4 bytes each while they are compared.
    size = file.stat().st_size * 8 if file else 0
    size += sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if size <= free / 2:
        return ""
    return f"the model has {size / 1e9:.1f} GB, only {free / 1e9:.1f} GB of memory are free"


def _distance_of_base(folder: Path, report: ReportData, loader: str) -> float:
    """How far a loader's logits of the base are off those of its stored values; 0 where they are right or unknown."""
    name = hub.find_named(str(report.recipe["base"]), folder)
    base = hub.find_local(name, report.recipe.get("revision"))
    if base is None or _too_large(base):
        return 0.0
    try:
        load(base, loader)
    except WrongOutputsError as error:
        return error.distance
    except QmergeError:  # this loader does not read the base's format, which says nothing about the merged model
        return 0.0
    return 0.0
