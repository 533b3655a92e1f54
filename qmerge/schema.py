"""qmerge.json: what was asked, what was done, what survived. These models are its schema (version 1).

Other faces (terminal, card, HTML) show this data and compute nothing. Shares are fractions of 1, sizes are bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmerge.errors import CheckpointError

SCHEMA_VERSION: Literal[1] = 1
NAME = "qmerge.json"
RECIPE_NAME = "qmerge_recipe.yaml"


class FileRecord(BaseModel):
    """A file and its SHA-256."""

    model_config = ConfigDict(extra="forbid")
    file: str
    bytes: int
    sha256: str


class FingerprintRecord(BaseModel):
    """Which model it is, whatever files it comes in (``checkpoint/fingerprint.py``)."""

    model_config = ConfigDict(extra="forbid")
    id: str
    tensors: str
    values: str
    config: str


class InputRecord(BaseModel):
    """A model or adapter that was read. ``id`` and ``commit`` when it came from the Hub."""

    model_config = ConfigDict(extra="forbid")
    role: str
    name: str
    id: str | None = None
    commit: str | None = None
    files: list[FileRecord]
    fingerprint: FingerprintRecord | None = None


def numbered(records: Sequence[InputRecord]) -> list[tuple[str, InputRecord]]:
    """``base``, ``adapter``, ``adapter 2``: every input by a name of its own."""
    seen: Counter[str] = Counter()
    found = []
    for record in records:
        seen[record.role] += 1
        number = f" {seen[record.role]}" if seen[record.role] > 1 else ""
        found.append((record.role + number, record))
    return found


class CalibrationRecord(BaseModel):
    """The text that ``preserve`` rounding was calibrated on. ``sha256``: of the token ids."""

    model_config = ConfigDict(extra="forbid")
    source: str
    tokens: int = 0
    sequence_length: int = 0
    sequential: bool = False
    sha256: str | None = None


class SeenRecord(BaseModel):
    """What calibration saw of one weight's inputs. ``borrowed``: share of the Hessian that other experts lent;
    ``damping``: what the metric needed to be factored, a share of its mean diagonal."""

    model_config = ConfigDict(extra="forbid")
    tokens: int
    borrowed: float
    damping: float


def adapters_named(inputs: list[InputRecord]) -> str:
    """``math + chat``: all adapters that went into a model."""
    return " + ".join(record.name for record in inputs if record.role == "adapter")


def one_each(names: Sequence[str]) -> list[str]:
    """Names that tell adapters apart: ``lora``, ``lora (2)``."""
    return [
        f"{name} ({names[: place + 1].count(name)})" if names[:place].count(name) else name
        for place, name in enumerate(names)
    ]


def survived(values: Mapping[str, float | None]) -> float | None:
    """The one number: kept in the layers' output where their inputs were seen, else in the weights."""
    return values["kept"] if values.get("output_kept") is None else values["output_kept"]


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
    calibration: SeenRecord | None = None


class GroupRecord(BaseModel):
    """All merged weights together, or those whose module ends alike; each weight counts by its ‖delta‖²."""

    model_config = ConfigDict(extra="forbid")
    name: str
    weights: int
    values: dict[str, float | None]


class ModulePairRecord(BaseModel):
    """How two adapters meet in one weight. ``sign_conflict`` is None where it was not measured."""

    model_config = ConfigDict(extra="forbid")
    module: str
    cosine: float | None
    sign_conflict: float | None


class PairRecord(BaseModel):
    """Two adapters that were combined: in all the weights that both change together (each by its size), and in each."""

    model_config = ConfigDict(extra="forbid")
    one: str
    other: str
    cosine: float | None
    sign_conflict: float | None
    modules: list[ModulePairRecord]

    @property
    def worst(self) -> ModulePairRecord | None:
        """Where the deltas are most opposed."""
        return min((m for m in self.modules if m.cosine is not None), key=lambda m: m.cosine or 0.0, default=None)


class ResidualRecord(BaseModel):
    """The small adapter beside the merged model. ``noise``: as ``output_noise`` over all merged weights."""

    model_config = ConfigDict(extra="forbid")
    rank: int
    bytes: int
    noise_without: float
    noise_with: float


class FidelityRecord(BaseModel):
    """A whole merged model, judged on text that it was not calibrated on. Losses and divergences in nats per token."""

    model_config = ConfigDict(extra="forbid")
    text: str
    tokens: int
    sequence_length: int
    loss_base: float
    loss_unmerged: float
    loss_merged: float
    gain_kept: float | None
    kl_base: float
    kl_merged: float
    kl_ratio: float | None
    top1_agreement: float
    kl_p99: float


class ReportData(BaseModel):
    """Everything in qmerge.json."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    rounding: str
    rounding_reason: str
    calibration: CalibrationRecord | None = None
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
    bytes_out: int = Field(0, description="size of the weight files")
    bits_per_weight: float = Field(0.0, description="of the weights in the target's format, scales included")
    original_gap: float | None = Field(
        None, description="‖original − dequantized‖ / ‖delta‖, where an original was given"
    )
    promoted: list[str] = []
    interference: list[PairRecord] = Field([], description="pairs of adapters, where several were combined")
    residual: ResidualRecord | None = None
    fidelity: FidelityRecord | None = None


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


def merged_into(folder: Path) -> set[str]:
    """SHA-256 of the files of the adapters that a model already holds, where qmerge made it."""
    if not (folder / NAME).is_file():
        return set()
    try:
        inputs = read_report(folder).inputs
    except CheckpointError:  # of another version: a report is no part of a base
        return set()
    return {file.sha256 for record in inputs if record.role == "adapter" for file in record.files}
