"""The whole content of qmerge.json, and how it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qmerge import plugins
from qmerge.checkpoint.documents import LONGEST_NAME, is_file_name, odd_number, read_json
from qmerge.errors import CheckpointError
from qmerge.schema.fidelity import FidelityRecord

# The fields of these models are the keys of a published file: a new name is a new schema version.
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
    """Identifies a model by its content, however that is split into files (``checkpoint/fingerprint.py``)."""

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


def numbered_roles(records: Sequence[InputRecord]) -> list[tuple[str, InputRecord]]:
    """Every input with a role of its own: ``base``, ``adapter``, ``adapter 2``."""
    count_of_role: Counter[str] = Counter()
    numbered_records = []
    for record in records:
        count_of_role[record.role] += 1
        count = count_of_role[record.role]
        role = f"{record.role} {count}" if count > 1 else record.role
        numbered_records.append((role, record))
    return numbered_records


BUILT_IN_SOURCES = ("generate", "general", "random", "none")
"""Sources of calibration other than a text of the user."""


class CalibrationRecord(BaseModel):
    """The text that ``preserve`` rounding was calibrated on.

    ``source`` is one of ``BUILT_IN_SOURCES``, or the name of a file or data set; ``sha256`` is that of the token ids.
    """

    model_config = ConfigDict(extra="forbid")
    source: str
    tokens: int = 0
    sequence_length: int = 0
    sequential: bool = False
    sha256: str | None = None
    # Added later: reports without them are still read.
    general_tokens: int = 0
    held_out_tokens: int = 0

    @property
    def text(self) -> str:
        """What the layers' outputs were measured on, in words."""
        if self.source == "random":
            return "random tokens"
        if self.source == "generate":
            return "text that the model wrote"
        if self.source == "general":
            return "qmerge's general text"
        return "the calibration text"

    @property
    def amount(self) -> str:
        """What rounding was fitted to, in words: ``14,336 tokens (train.jsonl) and 8,192 of general text``."""
        own = self.tokens - self.general_tokens
        if own <= 0 or not self.general_tokens:
            return f"{self.tokens:,} tokens ({self.source})"
        return f"{own:,} tokens ({self.source}) and {self.general_tokens:,} of general text"

    @property
    def is_users_text(self) -> bool:
        """Whether the user gave a text."""
        return self.source not in BUILT_IN_SOURCES


class SeenRecord(BaseModel):
    """What calibration saw of one weight's inputs.

    ``borrowed``: share of the Hessian that comes from other experts of the layer, because this one saw too few tokens;
    ``damping``: what had to be added to the Hessian's diagonal before it could be factored, a share of its mean.
    """

    model_config = ConfigDict(extra="forbid")
    tokens: int
    borrowed: float
    damping: float


def adapter_records(inputs: Sequence[InputRecord]) -> list[InputRecord]:
    """The adapters among what was read, in the order of the recipe."""
    return [record for record in inputs if record.role == "adapter"]


def adapter_names(inputs: Sequence[InputRecord]) -> str:
    """All adapters that went into a model: ``math + chat``."""
    return " + ".join(record.name for record in adapter_records(inputs))


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names that tell adapters apart: ``lora``, ``lora (2)``."""
    count_of_name: Counter[str] = Counter()
    distinct = []
    for name in names:
        count_of_name[name] += 1
        count = count_of_name[name]
        distinct.append(f"{name} ({count})" if count > 1 else name)
    return distinct


def overall_kept(values: Mapping[str, float | None]) -> float | None:
    """The share kept, as one number: in the layers' outputs where calibration saw their inputs, else in the weights.

    ``preserve`` puts its rounding errors where no input points, so its share in the weights alone says too little.
    """
    output_kept = values.get("output_kept")
    return values["kept"] if output_kept is None else output_kept


def kept_name(values: Mapping[str, float | None]) -> str:
    """What ``overall_kept`` is called where it is shown: ``kept`` is the share in the weights, and nothing else."""
    return "kept" if values.get("output_kept") is None else "output kept"


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


class RankRecord(BaseModel):
    """The k-th rank of the deltas of several weights, the largest first.

    ``size``: its singular value, a share of the weight's largest, mean over the weights; ``kept``: share of it that is in the
    stored weights, each weight counted by its singular value.
    """

    model_config = ConfigDict(extra="forbid")
    size: float
    kept: float


class GroupRecord(BaseModel):
    """All merged weights together, or those of one kind (``q_proj``); each weight counts by its ‖delta‖²."""

    model_config = ConfigDict(extra="forbid")
    name: str
    weights: int
    values: dict[str, float | None]
    # Added later: reports without them are still read.
    ranks: list[RankRecord] = []


class ModulePairRecord(BaseModel):
    """Two adapters in one weight: the cosine of their deltas, and the share of their common change that has opposite signs.

    ``sign_conflict`` is None where it was not measured.
    """

    model_config = ConfigDict(extra="forbid")
    module: str
    cosine: float | None
    sign_conflict: float | None


class PairRecord(BaseModel):
    """Two adapters that were combined: over all weights that both change, each counted by its size, and in each weight."""

    model_config = ConfigDict(extra="forbid")
    one: str
    other: str
    cosine: float | None
    sign_conflict: float | None
    modules: list[ModulePairRecord]

    @property
    def worst(self) -> ModulePairRecord | None:
        """The weight in which the deltas are most opposed; None where no cosine exists."""
        known = [module for module in self.modules if module.cosine is not None]
        return min(known, key=lambda module: module.cosine or 0.0, default=None)


class ResidualRecord(BaseModel):
    """The LoRA that compensates for the rounding error. ``noise_…``: ``output_noise`` over all merged weights."""

    model_config = ConfigDict(extra="forbid")
    rank: int
    bytes: int
    noise_without: float
    noise_with: float


class ReportData(BaseModel):
    """The whole content of qmerge.json."""

    model_config = ConfigDict(extra="forbid")
    # What was asked, and how it was done
    schema_version: Literal[1] = SCHEMA_VERSION
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    rounding: str
    rounding_reason: str
    calibration: CalibrationRecord | None = None
    created: str
    seconds: float
    # What was read and written
    inputs: list[InputRecord]
    outputs: list[FileRecord]
    actions: dict[str, int] = Field(description="number of weights copied, converted, merged")
    # What survived
    predicted: dict[str, float | None] = Field(description="kept, as predicted before the run: total, and per module")
    total: GroupRecord
    groups: list[GroupRecord]
    weights: list[WeightRecord]
    warnings: list[str]
    # Fields with a default were added later: reports without them are still read.
    bytes_out: int = Field(0, description="size of the weight files")
    bits_per_weight: float = Field(0.0, description="of the weights in the target's format, scales included")
    original_gap: float | None = Field(
        None, description="‖original − dequantized‖ / ‖delta‖, where an original was given"
    )
    promoted: list[str] = []
    interference: list[PairRecord] = Field([], description="pairs of adapters, where several were combined")
    residual: ResidualRecord | None = None
    fidelity: FidelityRecord | None = None
    # All other files of the output folder; then the SHA-256 of qmerge.json itself, with 64 zeros in this place
    files: list[FileRecord] = []
    checksum: str | None = None

    @property
    def is_written(self) -> bool:
        """Whether there is a model: ``qmerge measure`` writes none."""
        return bool(self.outputs)

    @property
    def outputs_measured(self) -> bool:
        """Whether calibration saw the layers' inputs, so that the layers' outputs could be measured, too."""
        return self.total.values.get("output_kept") is not None

    @property
    def calibration_text(self) -> str:
        """What the layers' outputs were measured on, in words."""
        return self.calibration.text if self.calibration else "the calibration text"


def read_report(folder: Path) -> ReportData:
    """The report of an output folder.

    Raises:
        CheckpointError: the folder does not exist, or has no qmerge.json, or one of another schema version.
    """
    path = folder / NAME
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {NAME}: expected a folder that qmerge wrote")
    content = read_json(path, CheckpointError)
    number = odd_number(content)
    if number is not None:
        raise CheckpointError(f"{NAME}: found {number}, which qmerge does not write ({path})")
    try:
        report = ReportData.model_validate(content)
    except ValidationError as cause:
        first = cause.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path.name}: {key}: {first['msg']} (this version of qmerge reads schema version {SCHEMA_VERSION})"
        ) from cause
    problem = _problem(report)
    if problem is not None:
        raise CheckpointError(f"{NAME}: {problem}: was it changed? ({path})")
    # A metric that was added later, or that is missing: it does not exist for these weights.
    records: list[GroupRecord | WeightRecord] = [report.total, *report.groups, *report.weights]
    for record in records:
        record.values = {**dict.fromkeys(plugins.names("metrics")), **record.values}
    return report


def _problem(report: ReportData) -> str | None:
    """What views of a report rely on and its types do not say: the first thing that is wrong."""
    if not isinstance(report.recipe.get("target"), str):
        return "recipe: target is missing"
    if "qmerge" not in report.versions:
        return "versions: qmerge is missing"
    if [record.role for record in report.inputs[:2]] != ["base", "adapter"]:
        return "inputs: expected a base and an adapter"
    # They are opened, to be hashed.
    for file in report.outputs:
        if not is_file_name(file.file):
            return f"outputs: {file.file[:80]!r} is not the name of a file in the folder"
    for weight in report.weights:
        if len(weight.module) > LONGEST_NAME:
            return f"weights: a module has a name of {len(weight.module)} characters"
    return None


def merged_adapter_hashes(folder: Path) -> set[str]:
    """SHA-256 of the files of all adapters that were merged into a model; empty where qmerge did not make the model."""
    if not (folder / NAME).is_file():
        return set()
    try:
        inputs = read_report(folder).inputs
    except CheckpointError:  # written by another version: a base can be used without its report
        return set()
    hashes: set[str] = set()
    for record in adapter_records(inputs):
        hashes.update(file.sha256 for file in record.files)
    return hashes
