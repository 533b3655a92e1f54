"""The base that an adapter declares, against the base that is given: name, revision, quantization, architecture.

adapter_config.json names the base, and little else. A difference is a warning and never an error, because people choose
these names. A name that allows no conclusion (a folder called ``base``) gives no warning.

Sources: PEFT 0.21 (``base_model_name_or_path``, ``revision``, ``auto_mapping``, ``peft_version``); Unsloth Studio
(``unsloth_training_method``), and Unsloth's names of checkpoints (``…-bnb-4bit``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from qmerge import hub
from qmerge.adapters.combining.chain import adapter_folder, is_merged
from qmerge.adapters.reading.training_folder import Training, read_training
from qmerge.base_check.model_names import Origin, is_same_model, origin_of
from qmerge.base_check.peft_options import other_options, release, text_setting
from qmerge.base_check.targets import target_warning
from qmerge.base_check.training_quantization import (
    WAS_IT_QUANTIZED,
    DeclaredQuantization,
    declared_base,
    declared_quantization,
    quantization_consequence,
    was_dense,
)
from qmerge.checkpoint.scan import Checkpoint
from qmerge.formats import get_format
from qmerge.hub import Source
from qmerge.planning.inputs import Inputs
from qmerge.recipe import AS_STORED, CHAIN, TRAINED_ON, Recipe, TrainedOn
from qmerge.schema import merged_adapter_hashes

Verdict = Literal["fits", "differs", "unknown"]

COMMIT = re.compile(r"[0-9a-f]{7,40}")
TRANSFORMERS_MODULE = re.compile(r"transformers\.models\.(\w+)\.")


@dataclass(frozen=True, kw_only=True)
class GivenBase:
    """The base of a run, and what the run does with it.

    folder           its files
    config           its config.json
    formats          quantized formats that its weights are stored in
    id               its id, where it comes from the Hub
    commit           its commit on the Hub
    revision         the revision that the recipe asks for
    training_format  how training quantized it, by the recipe (``--trained-on``); None where it does not say
    merge_onto       ``dequantized`` or ``original``
    adapters         folders of all adapters of the run
    in_order         each adapter is applied to the result of those before it (``--combine chain``)
    """

    folder: Path
    config: Mapping[str, Any]
    formats: frozenset[str] = frozenset()
    id: str | None = None
    commit: str | None = None
    revision: str | None = None
    training_format: TrainedOn | None = None
    merge_onto: str = "dequantized"
    adapters: tuple[Path, ...] = ()
    in_order: bool = False

    @property
    def name(self) -> str:
        """The Hub id, or the name of the folder."""
        return self.id or self.folder.name


@dataclass(frozen=True)
class Remark:
    """One topic compared. The field names are those of ``qmerge inspect --json``.

    topic    what is compared
    said     what the adapter declares
    given    what the base is
    verdict  whether they fit together
    warning  what a difference does to the result, and the way out; empty where there is no difference
    """

    topic: str
    said: str
    given: str
    verdict: Verdict
    warning: str = ""


def declared_warnings(inputs: Inputs, recipe: Recipe) -> list[str]:
    """Every difference between the adapters' declarations and the base, a line each; and what else to know of the two."""
    base = given_base(inputs.base_source, inputs.base, recipe, inputs.adapter_sources)
    lines: list[str] = [inputs.head_note] if inputs.head_note else []
    for source, adapter in zip(inputs.adapter_sources, inputs.adapters, strict=True):
        prefix = f"{source.name}: " if len(inputs.adapters) > 1 else ""
        training = read_training(source.folder, adapter.config)
        warnings = [remark.warning for remark in compare(adapter.config, base, training)]
        warnings += [target_warning(adapter), _open_question(adapter.config, base, training)]
        lines += [prefix + warning for warning in warnings if warning]
    # The same adapter may be given twice, with two weights.
    return list(dict.fromkeys(lines))


def given_base(source: Source, base: Checkpoint, recipe: Recipe, adapters: Sequence[Source]) -> GivenBase:
    """The base of a run, for ``compare``."""
    return GivenBase(
        folder=source.folder,
        config=base.config,
        formats=frozenset(name for name in base.formats() if get_format(name).info.is_quantized),
        id=source.id,
        commit=source.commit,
        revision=recipe.revision,
        training_format=recipe.trained_on,
        merge_onto=recipe.merge_onto,
        adapters=tuple(adapter.folder for adapter in adapters),
        in_order=recipe.combine == CHAIN,
    )


def compare(config: Mapping[str, Any], base: GivenBase, training: Training) -> list[Remark]:
    """An adapter against a base: one remark per topic, always the same topics in the same order.

    Args:
        config: adapter_config.json.
        training: what the adapter's folder says (``read_training``).
    """
    declared = declared_base(config)
    return [
        _compare_adapter_chain(declared, base) or _compare_model(declared, base),
        _compare_revision(declared, text_setting(config, "revision"), base),
        _compare_quantization(declared_quantization(declared, training), base),
        _compare_architecture(config, base),
        _compare_peft_version(config),
    ]


# --- which model -----------------------------------------------------------------------------------------------------


def _compare_adapter_chain(declared: Origin, base: GivenBase) -> Remark | None:
    """For an adapter that was trained on top of another adapter, in a folder that exists; None for all others."""
    first = adapter_folder(declared.text)
    if first is None:
        return None
    # Without --combine chain, the deltas are added to the plain base, which is another model than the one in training.
    if first in base.adapters and base.in_order:
        return Remark("base", declared.text, "an adapter of this run", "fits")
    if is_merged(first, merged_adapter_hashes(base.folder)):
        return Remark("base", declared.text, f"{base.name}, which that adapter is merged into", "fits")
    return Remark(
        topic="base",
        said=declared.text,
        given=base.name,
        verdict="differs",
        warning=(
            f"the adapter was trained on top of another one ({declared.text}), not on a plain base: merged without it, it "
            f"corrects something that is missing. Give both in order, with --combine chain"
        ),
    )


def _compare_model(declared: Origin, base: GivenBase) -> Remark:
    """Is it the same model, by name?

    Copies (``unsloth/…``), quantized siblings and local folders of a model count as the same. A folder may have any
    name, so only two Hub ids can differ.
    """
    if not declared.text:
        return Remark("base", "nothing", base.name, "unknown")
    folder = hub.local_path(declared.text) if declared.is_folder else None
    if folder is not None and folder.resolve() == base.folder:
        return Remark("base", declared.text, base.name, "fits")
    own_name = origin_of(base.id or str(base.folder))
    # transformers writes the name that a model was loaded by into its config when it saves it.
    config_name = origin_of(text_setting(base.config, "_name_or_path"))
    if is_same_model(declared, own_name) or is_same_model(declared, config_name):
        return Remark("base", declared.text, base.name, "fits")
    if own_name.id:
        given = own_name.text
    elif config_name.id:
        given = f"{base.name} (its config.json says that it comes from {config_name.text})"
    else:
        given = ""
    if not declared.id or not given:
        return Remark("base", declared.text, base.name, "unknown")
    return Remark(
        topic="base",
        said=declared.text,
        given=given,
        verdict="differs",
        warning=(
            f"the adapter names {declared.id} as the base that it was trained on, but this base is {given}: unless they are copies "
            f"of one model, the delta does not fit these weights; the result loads and answers, but worse than either model. Give "
            f"--base {declared.id}"
        ),
    )


def _compare_revision(declared: Origin, named: str, base: GivenBase) -> Remark:
    """Revisions of the same repository. Those of copies and siblings cannot be compared."""
    wanted = declared.commit or named
    given = base.commit or base.revision or "a local folder"
    # Two ids on the Hub never differ in upper and lower case alone.
    is_same_repository = bool(base.id) and (declared.id or "").lower() == (base.id or "").lower()
    # "main" has moved since, maybe: it names no revision.
    if not wanted or not is_same_repository or wanted == "main":
        return Remark("revision", wanted or "nothing", given, "unknown")
    if wanted == base.revision or (base.commit or "").startswith(wanted):
        return Remark("revision", wanted, given, "fits")
    # A tag and a commit cannot be compared: they may be the same revision.
    asks_for_commit = COMMIT.fullmatch(base.revision or "")
    if not base.commit or (asks_for_commit and not COMMIT.fullmatch(wanted)):
        return Remark("revision", wanted, given, "unknown")
    return Remark(
        topic="revision",
        said=wanted,
        given=given,
        verdict="differs",
        warning=(
            f"the adapter was trained on revision {wanted[:12]} of {base.id}, but this is {given[:12]}: if the weights differ, the "
            f"delta does not fit them. Give --revision {wanted}"
        ),
    )


# --- how it was quantized in training --------------------------------------------------------------------------------


def _compare_quantization(training: DeclaredQuantization, base: GivenBase) -> Remark:
    """Was the base in training quantized as this one is, or as it will be first (``--trained-on``)? With this option or
    ``--merge-onto original`` the user has answered the question, so nothing is warned of."""
    formats = base.formats
    if was_dense(training, base.id, formats):
        training = replace(training, formats=frozenset())
    given = " and ".join(sorted(formats)) or "16- or 32-bit"
    if not formats and base.training_format and base.training_format != AS_STORED:
        formats = frozenset({TRAINED_ON[base.training_format][0]})
        given += f", quantized to {base.training_format} first"
    if training.formats is None or base.merge_onto == "original":
        return Remark("quantization", training.source, given, "unknown")
    both_dense = not training.formats and not formats
    # One format in common is enough: a name like bnb-4bit may mean nf4 or fp4.
    if both_dense or formats & training.formats:
        return Remark("quantization", training.source, given, "fits")
    if base.training_format:
        return Remark("quantization", training.source, given, "unknown")
    kind = "a 16-bit base"
    if training.formats:
        kind = f"a base in {' or '.join(sorted(training.formats, reverse=True))}"
    return Remark(
        topic="quantization",
        said=training.source,
        given=given,
        verdict="differs",
        warning=(
            f"the adapter was trained on {kind} ({training.source}), but this one is {given}: "
            f"{quantization_consequence(training.formats, formats)}"
        ),
    )


def _open_question(config: Mapping[str, Any], base: GivenBase, training: Training) -> str:
    """The question how training quantized a dense base, where neither the adapter nor the user says it; else empty."""
    if base.formats or base.training_format or base.merge_onto == "original":
        return ""
    found = declared_quantization(declared_base(config), training)
    return WAS_IT_QUANTIZED if found.formats is None and not found.as_stored else ""


# --- what kind of model, and who saved it ----------------------------------------------------------------------------


def _compare_architecture(config: Mapping[str, Any], base: GivenBase) -> Remark:
    """``auto_mapping``, which PEFT writes where no task_type was given, against the base's config."""
    mapping = config.get("auto_mapping")
    if not isinstance(mapping, dict):
        mapping = {}
    model_class = text_setting(mapping, "base_model_class")
    family = TRANSFORMERS_MODULE.match(text_setting(mapping, "parent_library"))
    classes = [name for name in base.config.get("architectures") or [] if isinstance(name, str)]
    types = _model_types(base.config)
    # Code of its own (trust_remote_code) has no family in transformers.
    given = ", ".join(classes) or ", ".join(types) or "nothing"
    if not family or not types:
        return Remark("architecture", model_class or "nothing", given, "unknown")
    if model_class in classes or _is_of_family(types, family[1]):
        return Remark("architecture", model_class, given, "fits")
    return Remark(
        topic="architecture",
        said=model_class,
        given=given,
        verdict="differs",
        warning=(
            f"the adapter was trained on a {model_class}, but this base is a {given}: layers of the same name and shape may do "
            f"something else in it, and the result would load and be wrong. Give the model that it was trained on as --base"
        ),
    )


def _model_types(config: Mapping[str, Any]) -> list[str]:
    """``model_type`` of the model, and of its text part."""
    types = []
    for part in (config, config.get("text_config")):
        model_type = text_setting(part, "model_type") if isinstance(part, dict) else ""
        if model_type:
            types.append(model_type)
    return types


def _is_of_family(model_types: Sequence[str], family: str) -> bool:
    """Whether a model type belongs to a folder of ``transformers.models``."""
    for model_type in model_types:
        folder = model_type.replace("-", "_")
        # Several types may be in one folder: qwen3_vl_text is a part of qwen3_vl.
        if folder.startswith(family) or family.startswith(folder):
            return True
    return False


def _compare_peft_version(config: Mapping[str, Any]) -> Remark:
    """The version of PEFT that saved the adapter. Options that the installed one lacks may change the arithmetic."""
    saved_by = text_setting(config, "peft_version")
    installed = version("peft")
    given = f"peft {installed} is installed"
    if not saved_by:
        return Remark("saved by", "nothing", given, "unknown")
    if release(saved_by) <= release(installed):
        return Remark("saved by", f"peft {saved_by}", given, "fits")
    # An option that is off does what peft did before it existed.
    unknown = {name: value for name, value in other_options(config).items() if value}
    if not unknown:
        return Remark("saved by", f"peft {saved_by}", given, "differs")
    options = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    return Remark(
        topic="saved by",
        said=f"peft {saved_by}",
        given=given,
        verdict="differs",
        warning=(
            f"the adapter was saved by peft {saved_by} with options that peft {installed} does not have ({options}): if one of "
            f"them changes what the adapter computes, the merge is wrong. Use a version of qmerge that knows peft {saved_by}"
        ),
    )
