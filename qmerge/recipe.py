"""What the user asked for: one pydantic model, from the command line, from YAML, or from Python.

This is the only place with defaults. Everything that changes a number is a field, and the recipe is stored with the output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qmerge import hub, plugins
from qmerge.checkpoint.plain_yaml import UNREADABLE, AliasError, PlainLoader
from qmerge.errors import RecipeError, listed
from qmerge.formats import get_target

MergeOnto = Literal["dequantized", "original"]
EffortName = Literal["fast", "default", "best"]
TrainedOn = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "none"]
Scales = Literal["keep", "fresh"]
Device = Literal["auto", "cpu", "cuda"]

AS_STORED: Literal["none"] = "none"
"""The value of ``trained_on`` for a base that training did not quantize in memory. Its files may be quantized."""

TRAINED_ON: dict[TrainedOn, tuple[str, bool | None]] = {
    "nf4": ("nf4", False),
    "nf4-dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4-dq": ("fp4", True),
    "int8": ("int8", None),
}
"""How a base was quantized in training → format, and whether with double quantization."""

OPTIONS = (
    "block_size", "double_quant", "quant_storage",
    "bits", "group_size", "sym", "act_order", "static_groups", "checkpoint_format",
)  # fmt: skip
"""Fields that say how a target format is written; every format names those that it takes (``accepted_options``)."""

PATHS = ("base", "adapter", "original", "out", "patch", "calibration", "verify")
"""Fields that take a ``Path``, too."""

INPUTS = ("base", "adapter", "original")
"""Fields that name a model or an adapter: a folder or a Hub id."""

REVISIONS = ("revision", "adapter_revision", "original_revision")
"""Fields for their revisions on the Hub, in the same order."""

AUTO_BASE = "auto"
"""The value of ``base`` for the model that the adapter names."""

WITHOUT_EFFECT_ON_WEIGHTS = {
    "out", "patch", "workers", "max_memory", "min_kept", "max_kl_ratio", "verify", "continuations", "push_to_hub", "private",
}  # fmt: skip
"""Fields that may differ between a run and its --resume, because no output byte of a weight depends on them."""

QUOTED_BEGINNINGS = 3
"""Beginnings of the held-out text in the report of a model that stays on this machine."""

CHAIN = "chain"
"""The value of ``combine`` for adapters that are applied one after the other. It is not a plug-in like the other ways to
combine deltas, because the delta of a later adapter may depend on what an earlier one made."""

CHAIN_HELP = (
    "Apply the adapters one after the other, in full and in order: each was trained on what those before it made."
)

RAY = "ray"
"""The value of ``workers`` for tasks of a Ray cluster."""

MOST_WORKERS = 256

MOST_TOKENS = 2**26
"""Tokens of a calibration: their ids take half a gigabyte."""

LARGEST_RANK = 2**16
"""Rank of a residual LoRA; no weight has more, since none has more rows and columns."""

DEFAULT_TARGET = "nf4"
"""The target of ``plan`` and ``measure`` where none is given."""

JUDGED_TOKENS = 20480
"""Tokens of a held-out text that fidelity is measured on: the hidden states of all of them are in memory, three times."""

# Bytes. No recipe is larger; a larger file, such as a checkpoint, was given by mistake.
LARGEST_YAML = 2**20

LARGEST_SIZE = 2**63 - 1
"""Bytes; no file system has more."""

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", re.IGNORECASE)
# Decimal units are those of huggingface_hub (max_shard_size="5GB"); binary ones have an i.
BYTES_OF_UNIT = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


class Recipe(BaseModel):
    """One merge. Fields are named as the command line's options, with ``_`` for ``-``; descriptions are their help texts."""

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
        description="calibrate preserve rounding on this: text or jsonl file, Hub dataset, generate, general, random "
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
        None, description="compare the merged model with the unmerged one on this held-out text: txt or jsonl file"
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
        return _with_revisions(settings) if isinstance(settings, dict) else settings

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

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        for check in CONSISTENCY_CHECKS:
            problem = check(self)
            if problem is not None:
                raise RecipeError(problem)
        return self

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
        names = [self.adapter] if isinstance(self.adapter, str) else self.adapter
        return [_split_weight(name) for name in names]

    def identity(self) -> dict[str, Any]:
        """What must be the same for ``--resume``: everything that can change an output byte of a weight."""
        return self.model_dump(exclude=WITHOUT_EFFECT_ON_WEIGHTS)

    @property
    def quoted_beginnings(self) -> int:
        """``continuations``, or its default: nobody's held-out text is published unasked."""
        if self.continuations is not None:
            return self.continuations
        return 0 if self.push_to_hub else QUOTED_BEGINNINGS

    def to_yaml(self) -> str:
        """The recipe as ``qmerge run`` reads it, with all defaults, so that a later version makes the same model."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)

    def published(self) -> Recipe:
        """The recipe as an output may show it to anybody: no absolute path, no name of the user, nothing that only says where
        and with which resources it was run. ``qmerge run`` makes the same model of it."""
        # A model may be moved, and made again with other resources: neither changes a byte.
        changes: dict[str, Any] = {"out": None, "patch": None, "workers": 1, "max_memory": None}
        # Whoever runs the recipe again must not publish by it.
        changes |= {"push_to_hub": None, "private": None}
        for name in INPUTS:
            value = getattr(self, name)
            if isinstance(value, list):
                changes[name] = [hub.published_name(item) for item in value]
            elif value:
                changes[name] = hub.published_name(value)
        for name in ("calibration", "verify"):
            value = getattr(self, name)
            # The path is of no use to anybody else, and may name the user or a customer.
            if value and not _is_hub_dataset(value):
                changes[name] = Path(value).name
        return self.model_copy(update=changes)


def _with_revisions(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which the revisions of ids have fields of their own.

    Several adapters have one such field. Where they have different revisions, these stay in their names.

    Raises:
        RecipeError: a name has another revision than the field.
    """
    settings = dict(settings)
    for name, revision_name in zip(INPUTS, REVISIONS, strict=True):
        value = settings.get(name)
        several = value if isinstance(value, (list, tuple)) else [value]
        references = [reference for reference in several if isinstance(reference, str)]
        if len(references) != len(several):  # a path, or something that pydantic refuses
            continue
        pairs = [hub.split_revision(reference) for reference in references]
        found = {revision for _, revision in pairs}
        if len(found) != 1:
            continue
        (revision,) = found
        ids = [reference for reference, _ in pairs]
        settings[name] = ids[0] if isinstance(value, str) else ids
        given = settings.get(revision_name)
        if revision is None:
            continue
        if given not in (None, revision):
            raise RecipeError(f"{name}: two revisions are given, {revision} in its name and {given}; expected one")
        settings[revision_name] = revision
    return settings


def _is_hub_dataset(text: str) -> bool:
    """Whether a text is ``owner/name`` or ``owner/name:file`` on the Hub. A local file of that name would be read first."""
    return bool(hub.HUB_ID.fullmatch(text.partition(":")[0])) and not Path(text).exists()


def _split_weight(adapter: str) -> tuple[str, float]:
    """``folder=0.7`` → (folder, 0.7). Without a number after the last ``=``, the weight is 1."""
    name, equals, number = adapter.rpartition("=")
    if not equals:
        return adapter, 1.0
    try:
        return name, float(number)
    except ValueError:  # the = belongs to the name
        return adapter, 1.0


# --- settings that do not go together ----------------------------------------------------------------------------------


def _unused_calibration(recipe: Recipe) -> str | None:
    if recipe.calibration and recipe.rounding in ("nearest", "stochastic"):
        return f"calibration is for preserve rounding, {recipe.rounding} does not use it: leave one of them out"
    return None


def _two_destinations(recipe: Recipe) -> str | None:
    if recipe.out and recipe.patch:
        return (
            f"out ({recipe.out}) and patch ({recipe.patch}): a run writes only one of them; for both, use out, then make the "
            f"patch with: qmerge patch BASE OUT"
        )
    return None


def _push_of_a_patch(recipe: Recipe) -> str | None:
    if recipe.push_to_hub and recipe.patch:
        return "push_to_hub uploads a whole model, but patch writes only a difference: use out instead of patch"
    if recipe.private is not None and not recipe.push_to_hub:
        return "private is for push_to_hub, which is not given: leave it out"
    return None


def _density_of_one_adapter(recipe: Recipe) -> str | None:
    if recipe.density != 1 and len(recipe.adapters) < 2:
        return "density thins out the deltas of several adapters, but only one is given: leave density out"
    return None


def _chain_of_parts(recipe: Recipe) -> str | None:
    if recipe.combine != CHAIN:
        return None
    weighted = [f"{name}={weight:g}" for name, weight in recipe.adapters if weight != 1]
    if weighted:
        found = listed(weighted)
    elif recipe.density != 1:
        found = f"density {recipe.density:g}"
    elif len(recipe.adapters) < 2:
        found = "one adapter"
    else:
        return None
    return (
        f"combine chain applies two or more adapters in full and in order, because each was trained on what those before it "
        f"made; expected neither weights nor density, found {found}"
    )


def _auto_and_max_size(recipe: Recipe) -> str | None:
    if recipe.target == "auto" and not recipe.max_size:
        return "target auto needs max_size (--max-size 6GB): without a limit, fp32 is always best"
    if recipe.target != "auto" and recipe.max_size:
        return f"max_size is for target auto, but the target is {recipe.target}: leave max_size out"
    return None


def _promote_of_auto(recipe: Recipe) -> str | None:
    if recipe.promote and recipe.target == "auto":
        return "promote adds bytes to a target: name the target, instead of target auto with max_size"
    return None


def _promote_of_dense(recipe: Recipe) -> str | None:
    if recipe.promote and get_target(recipe.target).info.is_dense:
        return f"promote leaves weights of a quantized model unquantized, but the target {recipe.target} is dense"
    return None


def _act_order_without_calibration(recipe: Recipe) -> str | None:
    # Which inputs matter alike is only known from calibration; with static groups, groups do not depend on it.
    if not recipe.act_order or recipe.static_groups:
        return None
    if recipe.rounding in ("nearest", "stochastic") or recipe.calibration == "none":
        return "act_order groups inputs by what calibration sees of them: it needs preserve rounding, with calibration"
    return None


def _some_adapter(recipe: Recipe) -> str | None:
    if not recipe.adapters:
        return "adapter is an empty list: name at least one adapter"
    return None


def _trained_on_and_original(recipe: Recipe) -> str | None:
    if recipe.trained_on_format and recipe.original:
        return "trained_on is for a dense base, original is for a quantized one: give only one of them"
    return None


def _unused_original(recipe: Recipe) -> str | None:
    if recipe.base.endswith(".gguf"):
        return None  # it may give the config and the tokenizer
    # preserve rounding may use the original while it merges onto the dequantized base.
    if recipe.original and recipe.merge_onto != "original" and recipe.rounding not in ("auto", "preserve"):
        return (
            f"original is given, but merge_onto is 'dequantized' and {recipe.rounding} rounding does not use it: add "
            f"--merge-onto original, or --rounding preserve, or leave original out"
        )
    return None


CONSISTENCY_CHECKS: tuple[Callable[[Recipe], str | None], ...] = (
    _unused_calibration,
    _two_destinations,
    _push_of_a_patch,
    _density_of_one_adapter,
    _chain_of_parts,
    _auto_and_max_size,
    _promote_of_auto,
    _promote_of_dense,
    _act_order_without_calibration,
    _some_adapter,
    _trained_on_and_original,
    _unused_original,
)
"""Each returns what is wrong, or None. The first problem is reported."""


# --- reading -----------------------------------------------------------------------------------------------------------


def make_recipe(settings: dict[str, Any]) -> Recipe:
    """Settings by name → a checked recipe.

    Raises:
        RecipeError: one line about the first thing that is wrong.
    """
    try:
        return Recipe(**settings)
    except ValidationError as cause:
        raise RecipeError(_explain(cause)) from cause


def _explain(problem: ValidationError) -> str:
    """One line about the first error. An unknown key comes first: it is often the reason why another one is missing."""
    # False sorts before True; among equals, min takes the first.
    first = min(problem.errors(), key=lambda error: error["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"recipe: unknown key {name!r}. {plugins.suggestion(name, list(Recipe.model_fields))}"
    if first["type"] == "missing":
        return f"{name} is needed (--{name.replace('_', '-')}): {Recipe.model_fields[name].description}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')}, found {str(first.get('input'))[:80]!r}"


def find_inputs(settings: Mapping[str, Any], output: Path, *, strict: bool = False) -> dict[str, Any]:
    """The inputs that the recipe of a finished model names, as they are found from here.

    Args:
        settings: of the recipe; see ``Recipe.published``.
        output: the folder of the model.

    Returns:
        The fields among ``INPUTS``, with names that lead to the inputs.

    Raises:
        RecipeError: if ``strict``, where one is neither at hand nor a Hub id.
    """
    found: dict[str, Any] = {}
    for field in INPUTS:
        names = settings.get(field)
        if not names:
            continue
        several = names if isinstance(names, list) else [names]
        paths = [hub.find_named(str(name), output) for name in several]
        for name, path in zip(several, paths, strict=True):
            if strict and not hub.may_exist(_split_weight(path)[0]):
                raise RecipeError(
                    f"{field} {name}: not found from here or next to {output}. The recipe of a finished model holds no absolute "
                    f"paths: give it with --{field} DIR"
                )
        found[field] = paths if isinstance(names, list) else paths[0]
    return found


class StrictLoader(PlainLoader):
    """A YAML loader that also refuses duplicate keys, of which PyYAML silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise RecipeError(f"recipe: duplicate key {key!r}: remove one of the two lines")
            keys.append(key)
        return super().construct_mapping(node, deep=deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a mapping from names to values.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise RecipeError(f"{path}: expected a regular file")
        if path.stat().st_size > LARGEST_YAML:
            raise RecipeError(f"{path}: larger than a recipe can be ({LARGEST_YAML >> 20} MiB)")
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)  # a SafeLoader: no code is run
    except OSError as cause:
        raise RecipeError(f"{path}: cannot be read: {cause.strerror}") from cause
    except AliasError as cause:
        raise RecipeError("recipe: YAML aliases (*name) are not allowed: write the value out") from cause
    except UNREADABLE as cause:  # also of a date or a number that does not exist
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(cause).split())}") from cause
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise RecipeError(f"{path}: expected lines like `target: nf4`")
    return settings


def parse_size(text: str) -> int:
    """A size in words → bytes: ``5GB``, ``512MiB``, ``5G`` (decimal), or a plain number of bytes.

    Raises:
        RecipeError: the text is not a size, or zero, or larger than any disk.
    """
    match = SIZE.fullmatch(text)
    if match:
        unit = match[2].lower()
        if not unit.endswith("b"):
            unit += "b"  # 5G is 5GB, and a number alone is bytes
        # Infinity, where the number has hundreds of digits.
        nbytes = float(match[1]) * BYTES_OF_UNIT.get(unit, 0)
        if 1 <= nbytes <= LARGEST_SIZE:
            return int(nbytes)
    raise RecipeError(f"size {text[:80]!r}: expected a number with kB, MB, GB or TB, such as 5GB")
