"""What an adapter says it was trained on, against the base that is given: names, revisions, quantization, architecture.

adapter_config.json names its base, and little else. What does not fit is a warning, never an error: names are given by
people. Where nothing can be concluded (a folder that someone called ``base``), nothing is said.

Sources: PEFT 0.21 (``base_model_name_or_path``, ``revision``, ``auto_mapping``, ``peft_version``); Unsloth Studio
(``unsloth_training_method``), and Unsloth's names of checkpoints (``…-bnb-4bit``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from qmerge.adapters.combining.chain import adapter_at, is_held
from qmerge.base_check.model_names import Origin, marks_of, origin_of, same_model
from qmerge.checkpoint.scan import Checkpoint
from qmerge.formats import get_format
from qmerge.hub import Source
from qmerge.planning.inputs import Inputs
from qmerge.recipe import CHAIN, Recipe
from qmerge.schema import merged_into

Verdict = Literal["fits", "differs", "unknown"]

SEEN = {
    "bnb-4bit": {"nf4", "fp4"},
    "nf4": {"nf4"},
    "bnb-8bit": {"int8"},
    "gptq": {"gptq"},
    "awq": {"awq"},
    "fp8": {"fp8"},
}
"""End of a checkpoint's name → formats that its weights are stored in."""

COMMIT = re.compile(r"[0-9a-f]{7,40}")
FAMILY = re.compile(r"transformers\.models\.(\w+)\.")


@dataclass(frozen=True)
class Given:
    """The base that is given, and what the run does with it. ``formats``: the quantized ones that its weights are stored
    in; ``adapters``: folders of all adapters of the run; ``in_order``: each is applied to what those before
    it made."""

    folder: Path
    config: Mapping[str, Any]
    formats: frozenset[str] = frozenset()
    id: str | None = None
    commit: str | None = None
    revision: str | None = None
    trained_on: str | None = None
    merge_onto: str = "dequantized"
    adapters: tuple[Path, ...] = ()
    in_order: bool = False

    @property
    def name(self) -> str:
        return self.id or self.folder.name


@dataclass(frozen=True)
class Remark:
    """One thing compared. ``warning``: what a difference does to the result, and the way out; empty where there is none."""

    topic: str
    said: str
    given: str
    verdict: Verdict
    warning: str = ""


def declared_warnings(inputs: Inputs, recipe: Recipe) -> list[str]:
    """What does not fit, of every adapter of a run."""
    base, lines = given(inputs.base_source, inputs.base, recipe, inputs.adapter_sources), list[str]()
    for source, adapter in zip(inputs.adapter_sources, inputs.adapters, strict=True):
        said = [remark.warning for remark in compare(adapter.config, base) if remark.warning]
        lines += said if len(inputs.adapter_sources) == 1 else [f"{source.name}: {line}" for line in said]
    return list(dict.fromkeys(lines))


def given(source: Source, base: Checkpoint, recipe: Recipe, adapters: Sequence[Source]) -> Given:
    quantized = frozenset(name for name in base.formats() if get_format(name).info.is_quantized)
    return Given(
        source.folder, base.config, quantized, source.id, source.commit, recipe.revision, recipe.trained_on,
        recipe.merge_onto, tuple(adapter.folder for adapter in adapters), recipe.combine == CHAIN,
    )  # fmt: skip


def compare(config: Mapping[str, Any], base: Given) -> list[Remark]:
    """An adapter's config against a base; one remark per topic, always the same topics in the same order."""
    said = origin_of(text(config, "base_model_name_or_path"))
    which = chain(said, base) or model(said, base)
    return [
        which,
        revision(said, text(config, "revision"), base),
        quantization(said, config, base),
        architecture(config, base),
        saved_by(config),
    ]


def text(config: Mapping[str, Any], name: str) -> str:
    """A setting that should be text; other things count as not said."""
    value = config.get(name)
    return value.strip() if isinstance(value, str) else ""


# --- which model -------------------------------------------------------------------------------------------------------


def chain(said: Origin, base: Given) -> Remark | None:
    """An adapter that was trained on top of another one, where that is a folder that is there."""
    first = adapter_at(said.text)
    if first is None:
        return None
    if first in base.adapters and base.in_order:
        return Remark("base", said.text, "an adapter of this run", "fits")
    if is_held(first, merged_into(base.folder)):
        return Remark("base", said.text, f"{base.name}, which that adapter is merged into", "fits")
    return Remark(
        "base", said.text, base.name, "differs",
        f"the adapter was trained on top of another one ({said.text}), not on a plain base: merged otherwise, it "
        f"corrects what is not there. Give both in order, with --combine chain",
    )  # fmt: skip


def model(said: Origin, base: Given) -> Remark:
    """Is it the same model, by name? Copies (``unsloth/…``), quantized siblings and local folders of it count as the same;
    folders have any name, so that a difference means something between Hub ids alone."""
    if not said.text:
        return Remark("base", "nothing", base.name, "unknown")
    if said.folder and Path(said.text).expanduser().resolve() == base.folder:
        return Remark("base", said.text, base.name, "fits")
    names = [
        origin_of(base.id) if base.id else origin_of(str(base.folder)),
        origin_of(text(base.config, "_name_or_path")),
    ]
    if any(same_model(said, name) for name in names):
        return Remark("base", said.text, base.name, "fits")
    known = next((name for name in names if name.id), None)
    if not said.id or known is None:
        return Remark("base", said.text, base.name, "unknown")
    given = known.text if known is names[0] else f"{base.name} (its config.json says that it comes from {known.text})"
    return Remark(
        "base", said.text, given, "differs",
        f"the adapter names {said.id} as the base that it was trained on, this base is {given}: unless they are copies of one "
        f"model, the delta is added to weights that it was not fitted to, and the result is worse than either, though it "
        f"loads and answers. Give --base {said.id}",
    )  # fmt: skip


def revision(said: Origin, named: str, base: Given) -> Remark:
    """Revisions of one repository; those of copies and siblings are not comparable."""
    wanted = said.commit or named
    here = base.commit or base.revision or "a local folder"
    if not wanted or not base.id or (said.id or "").lower() != base.id.lower() or wanted == "main":
        return Remark("revision", wanted or "nothing", here, "unknown")
    if wanted == base.revision or (base.commit or "").startswith(wanted):
        return Remark("revision", wanted, here, "fits")
    pinned = base.revision and COMMIT.fullmatch(base.revision)
    if not base.commit or (pinned and not COMMIT.fullmatch(wanted)):
        return Remark("revision", wanted, here, "unknown")  # a tag against a commit: they may be one
    return Remark(
        "revision", wanted, here, "differs",
        f"the adapter was trained on revision {wanted[:12]} of {base.id}, this is {here[:12]}: if the weights differ, the "
        f"delta does not fit them. Give --revision {wanted}",
    )  # fmt: skip


# --- how it was quantized in training ----------------------------------------------------------------------------------


def trained_quantized(said: Origin, config: Mapping[str, Any]) -> tuple[set[str] | None, str]:
    """(formats that the base had in training, empty for a dense one, None where nothing says so; what says so)."""
    method = text(config, "unsloth_training_method").lower()
    mark = next((mark for mark in marks_of(said) if mark in SEEN), None)
    if mark and method == "lora":
        return None, f"{said.text}, and unsloth_training_method=lora: they contradict each other"
    if mark:
        return SEEN[mark], said.text
    if method == "qlora":
        return SEEN["bnb-4bit"], "unsloth_training_method=qlora"
    if method == "lora":
        return set(), "unsloth_training_method=lora"
    return None, "nothing"


def quantization(said: Origin, config: Mapping[str, Any], base: Given) -> Remark:
    """Was the base in training quantized as this one is? ``--trained-on`` and ``--merge-onto original`` are the user's own
    words, and end the question."""
    seen, because = trained_quantized(said, config)
    formats = base.formats or ({base.trained_on.removesuffix("-dq")} if base.trained_on else set())
    here = " and ".join(sorted(formats)) or "16- or 32-bit"
    if seen is None or base.trained_on or base.merge_onto == "original":
        return Remark("quantization", because, here, "unknown")
    if (formats & seen) if seen else not formats:
        return Remark("quantization", because, here, "fits")
    kind = f"on a base in {' or '.join(sorted(seen, reverse=True))}" if seen else "on a 16-bit base"
    return Remark(
        "quantization", because, here, "differs",
        f"the adapter was trained {kind} ({because}), this one is {here}: {consequence(seen, formats)}",
    )  # fmt: skip


def consequence(seen: set[str], formats: frozenset[str] | set[str]) -> str:
    if not formats:
        way = (
            "or pass --trained-on nf4-dq (as Unsloth quantizes; nf4 without double quantization), "
            if "nf4" in seen
            else ""
        )
        way = "or pass --trained-on int8, " if "int8" in seen else way
        return (
            f"the delta was fitted to weights with a quantization error that this base has not. Give the quantized "
            f"checkpoint as --base, {way}so that it is merged into what it saw; --merge-onto original says that it is meant so"
        )
    if not seen:
        return (
            "the base's own quantization error, which the adapter never saw, stays in the result. Give the 16-bit model as "
            "--base (it can be written in any format), or as --original with --merge-onto original"
        )
    return (
        "their quantization errors differ, and the adapter learned to live with the other one. Give the checkpoint that "
        "it was trained on as --base"
    )


# --- what kind of model, and who saved it ------------------------------------------------------------------------------


def architecture(config: Mapping[str, Any], base: Given) -> Remark:
    """``auto_mapping`` (which PEFT writes where no task_type was given) against the base's config."""
    mapping = config.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    said, family = text(mapping, "base_model_class"), FAMILY.match(text(mapping, "parent_library"))
    classes = [name for name in base.config.get("architectures") or [] if isinstance(name, str)]
    inner = base.config.get("text_config")
    types = [text(part, "model_type") for part in (base.config, inner) if isinstance(part, dict)]
    here = ", ".join(classes) or ", ".join(filter(None, types)) or "nothing"
    types = [kind.replace("-", "_") for kind in types if kind]
    if not family or not types:
        return Remark("architecture", said or "nothing", here, "unknown")
    if said in classes or any(kind.startswith(family[1]) or family[1].startswith(kind) for kind in types):
        return Remark("architecture", said, here, "fits")
    return Remark(
        "architecture", said, here, "differs",
        f"the adapter was trained on a {said}, this base is a {here}: layers of the same name and shape may do something "
        f"else there, and the result would load and be wrong. Give the model that it was trained on as --base",
    )  # fmt: skip


def saved_by(config: Mapping[str, Any]) -> Remark:
    """The version of PEFT that saved it; options that are newer than what is installed may change the arithmetic."""
    said, here = text(config, "peft_version"), version("peft")
    newer = release(said) > release(here)
    verdict: Verdict = "unknown" if not said else "differs" if newer else "fits"
    unknown = {name: value for name, value in other_options(config).items() if value} if newer else {}
    if not unknown:
        return Remark("saved by", f"peft {said}" if said else "nothing", f"peft {here} is installed", verdict)
    options = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    return Remark(
        "saved by", f"peft {said}", f"peft {here} is installed", verdict,
        f"the adapter was saved by peft {said} with options that peft {here} does not have ({options}): if one of them changes "
        f"what the adapter computes, the merge is wrong. Ask for a qmerge that knows peft {said}",
    )  # fmt: skip


def release(name: str) -> tuple[int, ...]:
    """``0.21.2.dev0@1a2b3c`` → (0, 21, 2); what begins with no number is of no release."""
    match = re.match(r"\d+(?:\.\d+)*", name)
    return tuple(map(int, match[0].split("."))) if match else ()


LORA_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "use_dora", "use_qalora", "qalora_group_size", "layer_replication", "runtime_config",
    "lora_bias", "target_parameters", "arrow_config", "ensure_weight_tying", "use_bdlora", "kasa_config",
    "monteclora_config", "velora_config", "alora_invocation_tokens",
}  # fmt: skip
"""Fields of PEFT 0.21's LoraConfig (a test compares them). Importing PEFT for them takes seconds."""


def other_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in adapter_config.json and is no option of PEFT: notes of training tools, or options of a newer PEFT."""
    kind = text(config, "peft_type").upper()
    known = LORA_OPTIONS if kind in ("LORA", "") else peft_options(kind)
    return {name: value for name, value in config.items() if name not in known} if known else {}


def peft_options(kind: str) -> Sequence[str]:
    from dataclasses import fields

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    if kind not in PeftType.__members__ or PeftType[kind] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return ()
    return [field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]])]
