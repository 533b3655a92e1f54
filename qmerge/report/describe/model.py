"""What a model is: how it is stored, its fingerprint, and its inputs where qmerge made it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qmerge.adapters.reading.folder import CONFIG
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.gguf.base import gguf_file
from qmerge.gguf.header import read_header
from qmerge.hub import Source
from qmerge.report.records import fingerprint_record
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, InputRecord, numbered_roles, read_report


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model. One that also holds an adapter counts as the adapter."""
    has_model = (folder / "config.json").is_file() or gguf_file(folder) is not None
    return has_model and not (folder / CONFIG).exists()


def describe_model(source: Source) -> dict[str, Any]:
    """The JSON of ``qmerge inspect MODEL``.

    Raises:
        CheckpointError: the model is damaged or stored in an unknown way, or its qmerge.json cannot be read.
    """
    file = source.file or gguf_file(source.folder)
    if file is not None:
        return _describe_gguf(source, file)
    with Reader() as reader:
        model = scan(source.folder, reader)
    return {
        **describe_storage(source, model),
        "architectures": model.config.get("architectures") or [],
        "fingerprint": fingerprint_record(source.folder).model_dump(),
        "made_of": _inputs_of(source.folder),
    }


def _describe_gguf(source: Source, file: Path) -> dict[str, Any]:
    """The same for a GGUF file, from its header alone. Formats are types of blocks."""
    header = read_header(file)
    return {
        "name": source.name,
        "commit": source.commit,
        "formats": dict(Counter(header.types.values())),
        "bytes": file.stat().st_size,
        "architectures": [f"{header.arch} (GGUF)"],
        "fingerprint": fingerprint_record(file.parent, file).model_dump(),
        "made_of": _inputs_of(file.parent),
    }


def describe_storage(source: Source, model: Checkpoint) -> dict[str, Any]:
    """Name, commit, number of weights in each format, and bytes."""
    return {
        "name": source.name,
        "commit": source.commit,
        "formats": model.formats(),
        "bytes": sum(weight.nbytes for weight in model.weights.values()),
    }


def _inputs_of(folder: Path) -> dict[str, Any]:
    """Role → input, from the model's qmerge.json; empty where qmerge did not make the model."""
    if not (folder / NAME).is_file():
        return {}
    report = read_report(folder)
    return {role: _describe_input(record) for role, record in numbered_roles(report.inputs)}


def _describe_input(record: InputRecord) -> dict[str, Any]:
    fingerprint = record.fingerprint.id if record.fingerprint else None
    return {"name": record.name, "commit": record.commit, "fingerprint": fingerprint}
