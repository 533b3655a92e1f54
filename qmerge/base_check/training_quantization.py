"""How the base was quantized in training, as the adapter and its folder declare it, and what a difference does to the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmerge.adapters.reading.training_folder import Training
from qmerge.base_check.model_names import Origin, origin_of, storage_marks
from qmerge.base_check.peft_options import text_setting
from qmerge.recipe import AS_STORED, TRAINED_ON

FORMATS_BY_MARK = {
    "bnb-4bit": {"nf4", "fp4"},
    "nf4": {"nf4"},
    "bnb-8bit": {"int8"},
    "gptq": {"gptq"},
    "awq": {"awq"},
    "fp8": {"fp8"},
}
"""End of a checkpoint's name → formats that its weights are stored in."""

DENSE_MARKS = frozenset({"bf16", "fp16", "fp32", "bfloat16", "float16", "16bit", "unsloth"})
"""Ends of a checkpoint's name that do not mean that it is quantized."""

IN_MEMORY_FORMATS = frozenset({"nf4", "fp4", "int8"})
"""Formats of bitsandbytes. Models are published in others, too, without a mark in their name (gpt-oss, DeepSeek-V3)."""

WAS_IT_QUANTIZED = (
    "nothing tells whether training quantized this 16-bit base in memory (QLoRA, load_in_4bit=True). If it did, add --trained-on "
    "nf4-dq: then the result is the model that was trained, else it is another one (SmolLM2-135M: KL ratio 0.72). If training was "
    "in 16 bits, the result is right: --trained-on none confirms that"
)
"""The question about a base and an adapter that say nothing, with what each answer does to the result."""


@dataclass(frozen=True)
class DeclaredQuantization:
    """How the base was quantized in training.

    formats    formats of its weights, empty for a dense base; None where nothing tells
    source     what tells
    as_stored  it was not quantized in memory: training saw the values of the files
    id         id on the Hub of the base that training loaded as it is stored, where its name does not say that it is quantized
    """

    formats: frozenset[str] | None
    source: str
    as_stored: bool = False
    id: str | None = None


def declared_base(config: Mapping[str, Any]) -> Origin:
    """The base that adapter_config.json names."""
    return origin_of(text_setting(config, "base_model_name_or_path"))


def stored_format_marks(declared: Origin) -> list[str]:
    """Marks in the name of a base that say in which quantized format it is stored."""
    return [mark for mark in storage_marks(declared) if mark in FORMATS_BY_MARK]


def declared_quantization(declared: Origin, training: Training) -> DeclaredQuantization:
    """How training quantized the base.

    Args:
        declared: the base that adapter_config.json names.
        training: what the adapter's folder says.
    """
    marks = stored_format_marks(declared)
    if marks and training.in_16_bits:
        contradiction = f"{declared.text}, and {training.source}: they contradict each other"
        return DeclaredQuantization(None, contradiction)
    if marks:
        return DeclaredQuantization(frozenset(FORMATS_BY_MARK[marks[0]]), declared.text)
    if training.in_16_bits:
        return DeclaredQuantization(frozenset(), training.source, as_stored=True)
    if training.quantization == AS_STORED:
        plain_id = declared.id if DENSE_MARKS.issuperset(storage_marks(declared)) else None
        return DeclaredQuantization(None, training.source, as_stored=True, id=plain_id)
    if training.quantization is not None:
        return DeclaredQuantization(frozenset({TRAINED_ON[training.quantization][0]}), training.source)
    return DeclaredQuantization(None, "nothing")


def was_dense(training: DeclaredQuantization, base_id: str | None, formats: frozenset[str]) -> bool:
    """Whether training loaded a 16-bit base where a quantized copy of it is given now.

    Args:
        base_id: id on the Hub of the base that is given; None for a folder.
        formats: quantized formats of its weights.
    """
    # The very base that training loaded fits, however it is stored.
    if not training.as_stored or training.id is None or training.id == base_id:
        return False
    return bool(formats) and formats <= IN_MEMORY_FORMATS


def quantization_consequence(training_formats: frozenset[str], formats: frozenset[str]) -> str:
    """What the difference does to the result, and the way out."""
    if formats and training_formats:
        return (
            "their quantization errors differ, and the adapter learned to live with the other one. Give the checkpoint that "
            "it was trained on as --base"
        )
    if formats:
        return (
            "the base's quantization error, which the adapter never saw, stays in the result. Give the 16-bit model as "
            "--base (it can be written in any format), or as --original with --merge-onto original"
        )
    on_the_fly = ""
    if "int8" in training_formats:
        on_the_fly = "or pass --trained-on int8, "
    elif "nf4" in training_formats:
        on_the_fly = "or pass --trained-on nf4-dq (as Unsloth quantizes; nf4 without double quantization), "
    return (
        f"the delta was fitted to weights with a quantization error that this base does not have. Give the quantized checkpoint as "
        f"--base, {on_the_fly}so that it is merged into the weights that it was trained on; --merge-onto original confirms that "
        f"the 16-bit weights are meant"
    )
