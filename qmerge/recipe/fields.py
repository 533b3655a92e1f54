"""The settings of a merge, one field for each, with default and help text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qmerge import hub, plugins
from qmerge.errors import RecipeError
from qmerge.formats import get_target
from qmerge.recipe.choices import (
    AS_STORED,
    AUTO_BASE,
    CHAIN,
    LARGEST_RANK,
    MOST_TOKENS,
    MOST_WORKERS,
    OPTIONS,
    PATHS,
    QUOTED_BEGINNINGS,
    RAY,
    TRAINED_ON,
    Device,
    EffortName,
    MergeOnto,
    Scales,
    TrainedOn,
)
from qmerge.recipe.values import parse_size, split_weight, with_revisions


class RecipeFields(BaseModel):
    """Every setting of a merge, checked by itself (``Recipe`` checks them together)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # The order of the fields is that of stored recipes and of qmerge.json.
    # --- what is merged ---
    base: str = Field(
        AUTO_BASE,
        description="use this base, the model of the training: folder or Hub id; auto: as the adapter names it",
    )
    revision: str | None = Field(
        None, description="use this revision of the base on the Hub: branch, tag or commit (default: main)"
    )
    adapter: str | list[str] = Field(
        description="merge this adapter: folder of the training or Hub id (ID#NAME of several); may be repeated, with weights a=0.7"
    )
    combine: str = Field(
        "linear",
        description="combine several adapters in this way (qmerge formats lists all), or apply them in order: chain",
    )
    density: float = Field(
        1.0,
        description="keep this fraction of each delta's entries when adapters are combined (TIES, DARE, …)",
        gt=0,
        le=1,
    )
    adapter_revision: str | None = Field(
        None, description="use this revision of the adapter on the Hub: branch, tag or commit (default: main)"
    )
    allow_pickle: bool = Field(
        False,
        description="read an adapter_model.bin, a pickle: tensors only, in a process of its own (default: refuse)",
    )
    # --- what is written ---
    target: str = Field(
        description="store the model in this format: nf4, gptq, int8, bf16, … (qmerge formats lists all), or auto with max_size"
    )
    max_size: str | None = Field(
        None, description="choose the best format whose files fit into this size, such as 6GB (for target auto)"
    )
    out: str | None = Field(
        None, description="write the model to this folder, which must be new or empty (NAME.gguf means NAME)"
    )
    patch: str | None = Field(
        None,
        description="write only the difference to the base, as a small file (temporarily needs disk space for the full model)",
    )
    # --- how it is rounded ---
    rounding: str = Field(
        "auto",
        description="round in this way: nearest, stochastic, preserve, or auto (preserve where nearest keeps too little)",
    )
    effort: EffortName = Field(
        "default",
        description="how long preserve searches, on how much text: fast, default or best (docs/benchmarks.md has the costs)",
    )
    calibration: str | None = Field(
        None,
        description="calibrate preserve rounding on this: txt, jsonl or json file, Hub dataset, generate, general, random "
        "or none (default: generate)",
    )
    calibration_tokens: int | None = Field(
        None,
        description="calibrate on this many tokens (default: 8192, 16384 or 32768, by effort)",
        ge=1,
        le=MOST_TOKENS,
    )
    sequence_length: int = Field(
        512, description="cut the calibration text into sequences of this many tokens", ge=2, le=MOST_TOKENS
    )
    sequential: bool = Field(
        True, description="calibrate each layer on the outputs of the rounded layers before it (better, slower)"
    )
    # --- which values the delta is added to ---
    merge_onto: MergeOnto = Field(
        "dequantized",
        description="add the delta to the dequantized base, as in training, or to the original 16-bit model",
    )
    original: str | None = Field(
        None, description="read the 16-bit model that a quantized base was made from: folder or Hub id"
    )
    original_revision: str | None = Field(
        None, description="use this revision of the original on the Hub: branch, tag or commit (default: main)"
    )
    trained_on: TrainedOn | None = Field(
        None,
        description="quantize a 16-bit base first, as in training: nf4, fp4, int8, nf4-dq, fp4-dq (dq: double "
        "quantization), or none",
    )
    # --- how the format is stored: None is as in the base where the format stays the same, else the format's default ---
    scales: Scales = Field(
        "keep",
        description="keep the base's scales where the format stays the same, or compute fresh ones: keep or fresh",
    )
    block_size: int | None = Field(
        None, description="quantize NF4 or FP4 in blocks of this many weights (default: the base's, else 64)"
    )
    double_quant: bool | None = Field(
        None, description="quantize the scales of NF4 or FP4, too (default: as the base, else no)"
    )
    quant_storage: str | None = Field(
        None, description="store NF4 or FP4 codes in tensors of this dtype (default: the base's, else uint8)"
    )
    bits: int | None = Field(None, description="use 2, 3, 4 or 8 bits per GPTQ weight (default: the base's, else 4)")
    group_size: int | None = Field(
        None,
        description="share a scale among this many inputs: 32, 64, 128, or -1 for all (default: the base's, else 128)",
    )
    sym: bool | None = Field(
        None,
        description="make integer levels symmetric around zero; vLLM reads no other GPTQ (default: the base's, else yes)",
    )
    act_order: bool | None = Field(
        None, description="group GPTQ inputs by importance, a little better but slower to run (default: no)"
    )
    static_groups: bool | None = Field(
        None, description="keep neighbouring inputs in one group in spite of act_order (default: no)"
    )
    checkpoint_format: str | None = Field(
        None, description="store GPTQ zeros as gptq (v1) or gptq_v2 (default: the base's, else gptq where symmetric)"
    )
    # --- where and with which resources ---
    seed: int = Field(
        0,
        description="seed stochastic rounding, generated text, random tokens and random combinations with this",
        ge=0,
        lt=2**63,
    )
    device: Device = Field("auto", description="compute on this device: auto, cpu or cuda")
    workers: int | Literal["ray"] = Field(
        1, description="work on this many weights at once, or on one output file per task of a Ray cluster: ray"
    )
    max_memory: str | None = Field(
        None,
        description="use this much memory for the weights being worked on, which are cut into row blocks, and for calibration "
        "(default: 2GB, and as much as is free for calibration)",
    )
    max_shard_size: str = Field("5GB", description="split the model into files of at most this size")
    # --- what is done in addition ---
    residual: int | None = Field(
        None,
        description="also write a LoRA of this rank that compensates for the rounding error (OUT/residual)",
        ge=1,
        le=LARGEST_RANK,
    )
    promote: str | None = Field(
        None,
        description="leave the weights that keep least unquantized, for this many extra bytes: 100MB (takes two passes)",
    )
    verify: str | None = Field(
        None,
        description="compare the merged model with the unmerged one on this held-out text: txt, jsonl or json file",
    )
    continuations: int | None = Field(
        None,
        description="quote this many beginnings of the verify text in the report, with what each model writes after them "
        "(default: 3; with push_to_hub, which publishes them: 0)",
        ge=0,
        le=100,
    )
    min_kept: float | None = Field(
        None,
        description="exit with code 5 if gain kept (unmeasured: the share of the delta kept) is less than this, -1 to 1",
        ge=-1,
        le=1,
    )
    max_kl_ratio: float | None = Field(
        None,
        description="exit with code 5 if the KL ratio is larger than this (0: the adapter model, 1: the base) or unmeasured",
        ge=0,
    )
    push_to_hub: str | None = Field(
        None,
        description="upload the finished model to this id on the Hub (token: HF_TOKEN or hf auth login), unless it is past a limit",
    )
    private: bool | None = Field(
        None, description="make the model on the Hub private, if it is new there (default: as its owner's settings say)"
    )

    @model_validator(mode="before")
    @classmethod
    def _revisions_from_names(cls, settings: Any) -> Any:
        """``owner/name@revision``, or an address on the Hub, becomes an id and its revision."""
        return with_revisions(settings) if isinstance(settings, dict) else settings

    @field_validator(*PATHS, mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (list, tuple)):
            return [cls._path_to_text(item) for item in value]
        return value  # pydantic refuses it

    @field_validator("base", "original", "out", "patch", "calibration", "verify")
    @classmethod
    def _check_path(cls, value: str | None) -> str | None:
        if value is not None and hub.local_path(value) is None:
            raise ValueError("no file or folder can have this name")
        return value

    @field_validator("out")
    @classmethod
    def _gguf_file_in_a_folder(cls, out: str | None) -> str | None:
        """``model.gguf``: the folder ``model``, which holds the file, the report and the Modelfile."""
        return out.removesuffix(".gguf") if out else out

    @field_validator("target")
    @classmethod
    def _check_target(cls, name: str) -> str:
        return name if name == "auto" else get_target(name).name

    @field_validator("combine")
    @classmethod
    def _check_combine(cls, name: str) -> str:
        known = (*plugins.names("combine"), CHAIN)
        if name not in known:
            raise RecipeError(f"no way to combine is called {name!r}. {plugins.suggestion(name, known)}")
        return name

    @field_validator("rounding")
    @classmethod
    def _check_rounding(cls, name: str) -> str:
        if name != "auto":
            plugins.load("rounding", name)
        return name

    @field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> Any:
        if value == RAY:
            return value
        if str(value).isdecimal() and 1 <= int(value) <= MOST_WORKERS:
            return int(value)
        raise ValueError(f"expected a number from 1 to {MOST_WORKERS}, or {RAY}")

    @field_validator("max_memory", "max_shard_size", "promote", "max_size")
    @classmethod
    def _check_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text

    @property
    def threads(self) -> int:
        """Weights that one process works on at once."""
        return 1 if isinstance(self.workers, str) else self.workers

    @property
    def format_options(self) -> dict[str, Any]:
        """The options of the target format that were given."""
        given = {}
        for name in OPTIONS:
            value = getattr(self, name)
            if value is not None:
                given[name] = value
        return given

    @property
    def trained_on_format(self) -> tuple[str, dict[str, Any]] | None:
        """Format and options that training quantized a dense base with; None where it was not quantized in memory."""
        if self.trained_on is None or self.trained_on == AS_STORED:
            return None
        name, double_quant = TRAINED_ON[self.trained_on]
        if double_quant is None:
            return name, {}
        return name, {"double_quant": double_quant}

    @property
    def adapters(self) -> list[tuple[str, float]]:
        """Folder or Hub id of every adapter, and its weight."""
        return [split_weight(reference) for reference in self.adapter_references]

    @property
    def adapter_references(self) -> list[str]:
        """Every adapter as it was given: folder or Hub id, with its weight."""
        return [self.adapter] if isinstance(self.adapter, str) else self.adapter

    @property
    def quoted_beginnings(self) -> int:
        """``continuations``, or its default: nobody's held-out text is published unasked."""
        if self.continuations is not None:
            return self.continuations
        return 0 if self.push_to_hub else QUOTED_BEGINNINGS
