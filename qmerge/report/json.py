"""qmerge.json: what was asked, what was done, what survived. These models are its schema (version 1).

Other faces (terminal, card, HTML) show this data and compute nothing. Shares are fractions of 1, sizes are bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmerge.errors import CheckpointError

SCHEMA_VERSION: Literal[1] = 1
NAME = "qmerge.json"


class FileRecord(BaseModel):
    """A file and its SHA-256."""

    model_config = ConfigDict(extra="forbid")
    file: str
    bytes: int
    sha256: str


class InputRecord(BaseModel):
    """A model or adapter that was read. ``id`` and ``commit`` when it came from the Hub."""

    model_config = ConfigDict(extra="forbid")
    role: str
    name: str
    id: str | None = None
    commit: str | None = None
    files: list[FileRecord]


class WeightRecord(BaseModel):
    """One merged weight. ``values``: metric → number, or None where it does not exist (a delta of zero)."""

    model_config = ConfigDict(extra="forbid")
    module: str
    shape: tuple[int, int]
    base_format: str
    target: str
    rounding: str
    rank: int
    scale: float
    values: dict[str, float | None]


class GroupRecord(BaseModel):
    """All merged weights together, or those whose module ends alike; each weight counts by its ‖delta‖²."""

    model_config = ConfigDict(extra="forbid")
    name: str
    weights: int
    values: dict[str, float | None]


class ReportData(BaseModel):
    """Everything in qmerge.json."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    created: str
    seconds: float
    inputs: list[InputRecord]
    outputs: list[FileRecord]
    actions: dict[str, int] = Field(description="number of weights copied, converted, merged")
    predicted: dict[str, float | None] = Field(description="kept, as predicted before the run: total, and per module")
    total: GroupRecord
    groups: list[GroupRecord]
    weights: list[WeightRecord]
    warnings: list[str]


def read_report(folder: Path) -> ReportData:
    """The report of an output folder.

    Raises:
        CheckpointError: there is none, or it has another schema.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {NAME}: expected a folder that qmerge wrote")
    try:
        return ReportData.model_validate_json(path.read_bytes())
    except ValidationError as cause:
        first = cause.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path.name}: {where}: {first['msg']} (this version reads schema {SCHEMA_VERSION})"
        ) from cause
