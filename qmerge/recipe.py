"""What the user asked for: one pydantic model, from the command line, from YAML, or from Python.

The only place with defaults. Everything that changes a number is here, and the recipe goes into the output.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qmerge import plugins
from qmerge.errors import RecipeError, listed
from qmerge.formats import get_target

LARGEST_YAML = 2**20
UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", re.IGNORECASE)
TRAINED_ON = {
    "nf4": ("nf4", False),
    "nf4-dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4-dq": ("fp4", True),
    "int8": ("int8", None),
}

OPTIONS = (
    "block_size", "double_quant", "quant_storage",
    "bits", "group_size", "sym", "act_order", "static_groups", "checkpoint_format",
)  # fmt: skip
"""How a target format is written; every format says which of these it takes (``Format.asks``)."""

# Where the work is done, not what comes out of it: these may differ between a run and its --resume.
WORKPLACE = {"out", "patch", "workers", "max_memory", "min_kept", "verify"}


CHAIN = "chain"
"""Adapters one after the other, which is no way to combine deltas: a later one may depend on what an earlier one made."""

JUDGED_TOKENS = 20480
"""Tokens of a held-out text that a model is judged on: hidden states of all of them are in memory, three times."""


class Recipe(BaseModel):
    """One merge. Field names are the command line's, with ``_`` for ``-``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str = Field(description="the model the adapter was trained on: a folder, or a Hub id")
    revision: str | None = Field(None, description="revision of the base on the Hub (branch, tag or commit)")
    adapter: str | list[str] = Field(
        description="the PEFT adapter: a folder or Hub id (ID#NAME if it holds several); several with weights, as a=0.7 and b=0.3"
    )
    combine: str = Field(
        "linear",
        description="how several adapters become one (qmerge formats lists the ways); or chain: one after the other, in order",
    )
    density: float = Field(
        1.0, description="share of each adapter's delta that combinations which thin it out keep", gt=0, le=1
    )
    adapter_revision: str | None = Field(None, description="revision of the adapter on the Hub")
    target: str = Field(
        description="format to write: nf4, gptq, int8, bf16, … (qmerge formats lists them); auto: the best that fits max_size"
    )
    max_size: str | None = Field(
        None, description="for --target auto: the best format whose files fit into this, such as 6GB"
    )
    out: str | None = Field(None, description="folder to write to; must not exist, or be empty")
    patch: str | None = Field(
        None,
        description="instead of a folder, the file to write what the base has not (takes the folder's room until it is there)",
    )
    rounding: str = Field(
        "auto",
        description="how codes are chosen: nearest, stochastic, preserve, or auto (nearest where it keeps enough, else preserve)",
    )
    calibration: str | None = Field(
        None,
        description="what preserve calibrates on: a text or jsonl file, a Hub dataset, generate, random or none (default: random)",
    )
    calibration_tokens: int = Field(16384, description="tokens to calibrate on", ge=1)
    sequence_length: int = Field(512, description="tokens per sequence of the calibration text", ge=2)
    sequential: bool = Field(
        True, description="calibrate each layer on what rounding did to those before it (slower, better)"
    )
    merge_onto: Literal["dequantized", "original"] = Field(
        "dequantized",
        description="what the delta is added to: dequantized (what the adapter saw) or original (the 16-bit model)",
    )
    original: str | None = Field(None, description="the 16-bit model that a quantized base was made from")
    original_revision: str | None = Field(None, description="revision of the original on the Hub")
    trained_on: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] | None = Field(
        None,
        description="for a dense base: how training quantized it: nf4, nf4-dq (double quantization), fp4, fp4-dq or int8",
    )
    scales: Literal["keep", "fresh"] = Field(
        "keep",
        description="where the format stays the same: keep the base's scales, or fresh ones as its library makes",
    )
    block_size: int | None = Field(None, description="NF4/FP4 block size (default: the base's, else 64)")
    double_quant: bool | None = Field(None, description="NF4/FP4 double quantization (default: the base's)")
    quant_storage: str | None = Field(None, description="NF4/FP4 storage dtype (default: the base's, else uint8)")
    bits: int | None = Field(None, description="GPTQ bits per weight: 2, 3, 4 or 8 (default: the base's, else 4)")
    group_size: int | None = Field(
        None, description="inputs that share a scale: 32, 64, 128, or -1 for all (default: the base's, else 128)"
    )
    sym: bool | None = Field(
        None,
        description="integer levels symmetric around zero (default: the base's, else yes; vLLM reads no other GPTQ)",
    )
    act_order: bool | None = Field(
        None,
        description="GPTQ groups made of the inputs that matter alike: a little better, slower to run (default: no)",
    )
    static_groups: bool | None = Field(None, description="GPTQ act-order with groups of neighbours (default: no)")
    checkpoint_format: str | None = Field(
        None, description="GPTQ zeros as gptq (v1) or gptq_v2 (default: the base's, else gptq where symmetric)"
    )
    seed: int = Field(0, description="seed of stochastic rounding and of random calibration tokens", ge=0)
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to compute: auto, cpu or cuda")
    workers: int = Field(1, description="weights that are worked on at once", ge=1, le=256)
    max_memory: str = Field("2GB", description="memory for weights being worked on; larger weights go in row blocks")
    max_shard_size: str = Field("5GB", description="largest size of one output file")
    residual: int | None = Field(
        None,
        description="also write a LoRA of this rank with what the target could not hold, to be loaded beside it (OUT/residual)",
        ge=1,
    )
    promote: str | None = Field(
        None,
        description="extra bytes for keeping the weights that survive worst dense, such as 100MB (takes two passes)",
    )
    verify: str | None = Field(
        None, description="held-out text to judge the merged model on, against the unmerged one (txt or jsonl)"
    )
    min_kept: float | None = Field(
        None, description="exit with 5 when less of the delta than this was kept", ge=-1, le=1
    )

    @field_validator("target")
    @classmethod
    def _known_target(cls, name: str) -> str:
        return name if name == "auto" else get_target(name).name

    @field_validator("combine")
    @classmethod
    def _known_combination(cls, name: str) -> str:
        known = (*plugins.names("combine"), CHAIN)
        if name not in known:
            raise RecipeError(f"no way to combine is called {name!r}. {plugins.suggestion(name, known)}")
        return name

    @field_validator("rounding")
    @classmethod
    def _known_rounding(cls, name: str) -> str:
        if name != "auto":
            plugins.load("rounding", name)
        return name

    @field_validator("max_memory", "max_shard_size", "promote", "max_size")
    @classmethod
    def _readable_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.calibration and self.rounding in ("nearest", "stochastic"):
            raise RecipeError(
                f"calibration is for preserve; {self.rounding} rounding has no use for it: leave one of them out"
            )
        if self.out and self.patch:
            raise RecipeError(
                f"out ({self.out}) and patch ({self.patch}): a run writes one of them; qmerge patch BASE OUT makes the other of it"
            )
        if self.density != 1 and len(self.adapters) < 2:
            raise RecipeError("density thins out the deltas of several adapters; there is one")
        scaled = [f"{name}={weight:g}" for name, weight in self.adapters if weight != 1]
        if self.combine == CHAIN and (scaled or len(self.adapters) < 2 or self.density != 1):
            found = listed(scaled) if scaled else "one adapter" if self.density == 1 else f"density {self.density:g}"
            raise RecipeError(
                f"combine chain applies two or more adapters in full, in order, because each was trained on what those before "
                f"it made: without weights and density; found {found}"
            )
        if (self.target == "auto") != bool(self.max_size):
            raise RecipeError(
                "target auto needs max_size (--max-size 6GB): without a limit, fp32 is always best"
                if self.target == "auto"
                else f"max_size is for target auto; the target is {self.target}"
            )
        if self.promote and self.target == "auto":
            raise RecipeError("promote adds bytes to a target: name it, instead of target auto with max_size")
        if self.promote and get_target(self.target).info.is_dense:
            raise RecipeError(
                f"promote: keeps weights dense beside a quantized format; the target {self.target} is dense"
            )
        if (
            self.act_order
            and not self.static_groups
            and (self.rounding in ("nearest", "stochastic") or self.calibration == "none")
        ):
            raise RecipeError(
                "act_order groups inputs by what calibration sees of them: it needs preserve, with calibration"
            )
        if self.trained_on and self.original:
            raise RecipeError("trained_on is for a dense base, original is for a quantized one: give one of them")
        if self.original and self.merge_onto != "original" and self.rounding not in ("auto", "preserve"):
            raise RecipeError(
                f"original is given, but merge_onto is 'dequantized' and {self.rounding} rounding has no use for it: add "
                f"--merge-onto original, or --rounding preserve, or leave it out"
            )
        return self

    @property
    def asked(self) -> dict[str, Any]:
        """Options for the target format that were asked for."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def trained_on_format(self) -> tuple[str, dict[str, Any]] | None:
        if self.trained_on is None:
            return None
        name, double_quant = TRAINED_ON[self.trained_on]
        return name, {} if double_quant is None else {"double_quant": double_quant}

    @property
    def adapters(self) -> list[tuple[str, float]]:
        """Folder or id of every adapter, and its weight."""
        names = [self.adapter] if isinstance(self.adapter, str) else self.adapter
        return [weighted(name) for name in names]

    def identity(self) -> dict[str, Any]:
        """What must be the same for ``--resume``: everything that can change an output byte."""
        return self.model_dump(exclude=WORKPLACE)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.portable(exclude_none=True), sort_keys=False, allow_unicode=True)

    def portable(self, **dump: Any) -> dict[str, Any]:
        """The recipe for publishing: the user's home folder is written ``~`` (and read so)."""
        home = f"{Path.home()}/"
        settings = self.model_dump(**dump)
        for name in ("base", "original", "out", "patch"):
            settings |= {name: tilde(settings[name], home)} if settings.get(name) else {}
        adapter = settings["adapter"]
        settings["adapter"] = tilde(adapter, home) if isinstance(adapter, str) else [tilde(a, home) for a in adapter]
        return settings


def tilde(path: str, home: str) -> str:
    return "~/" + path.removeprefix(home) if path.startswith(home) else path


class StrictLoader(yaml.SafeLoader):
    """YAML without a key that stands twice (PyYAML silently takes the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise RecipeError(f"recipe: {twice!r} stands there twice")
        return super().construct_mapping(node, deep=deep)


def make_recipe(settings: dict[str, Any]) -> Recipe:
    """Settings by name → a checked recipe.

    Raises:
        RecipeError: one line for the first thing that is wrong.
    """
    try:
        return Recipe(**settings)
    except ValidationError as cause:
        raise RecipeError(_explain(cause)) from cause


def weighted(name: str) -> tuple[str, float]:
    """``folder=0.7`` → (folder, 0.7); without a number, the weight is 1."""
    place, equals, number = name.rpartition("=")
    try:
        return (place, float(number)) if equals else (name, 1.0)
    except ValueError:
        return name, 1.0


def read_recipe(path: Path) -> dict[str, Any]:
    """Settings from a YAML file.

    Raises:
        RecipeError: it cannot be read, or is no mapping.
    """
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise RecipeError(f"{path}: larger than a recipe can be ({LARGEST_YAML >> 20} MiB)")
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except OSError as cause:
        raise RecipeError(f"{path}: cannot be read: {cause.strerror}") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(cause).split())}") from cause
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise RecipeError(f"{path}: expected lines like `target: nf4`")
    return settings


def parse_size(text: str) -> int:
    """``5GB`` or ``512MiB`` → bytes (decimal units as huggingface_hub, binary ones with an i)."""
    match = SIZE.fullmatch(text)
    unit = match[2].lower() if match else "?"
    unit = unit if unit.endswith("b") or not unit else unit + "b"
    if not match or unit not in UNITS | {"b": 1} or float(match[1]) == 0:
        raise RecipeError(f"size {text!r}: expected a number with kB, MB, GB or TB, such as 5GB")
    return int(float(match[1]) * (UNITS | {"b": 1})[unit])


def _explain(problem: ValidationError) -> str:
    # An unknown key comes first: it is often why another one is missing.
    first = min(problem.errors(), key=lambda error: error["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"recipe: unknown key {name!r}. {plugins.suggestion(name, list(Recipe.model_fields))}"
    if first["type"] == "missing":
        return f"{name} is needed (--{name.replace('_', '-')}): {Recipe.model_fields[name].description}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')}, found {str(first.get('input'))[:80]!r}"
