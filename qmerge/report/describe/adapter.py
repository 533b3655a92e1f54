"""What an adapter is: its config, its deltas, and what looks wrong. With a base: whether it was trained on that one."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from torch import Tensor

from qmerge import hub
from qmerge.adapters.reading.folder import (
    Adapter,
    read_adapter,
    read_config,
    select_adapter,
    tensor_infos,
    tensors_file,
)
from qmerge.adapters.reading.saved_weights import is_embedding
from qmerge.adapters.reading.training_folder import checkpoints_of, read_training
from qmerge.adapters.updates.experts import StackUpdate
from qmerge.adapters.updates.initializations import ChangedBaseUpdate
from qmerge.adapters.updates.lora import AddUpdate, DoraUpdate, LoraUpdate, OwnBaseUpdate, TokenRowsUpdate
from qmerge.adapters.updates.variants import ByWidthUpdate
from qmerge.base_check import declared, deltas, peft_options
from qmerge.base_check.from_training import with_training
from qmerge.checkpoint.scan import scan
from qmerge.errors import AdapterError, CheckpointError, NeedsBaseError, QmergeError
from qmerge.planning.inputs import read_inputs
from qmerge.planning.plan import make_run_context, plan_from
from qmerge.recipe import Recipe, make_recipe
from qmerge.report.describe.model import describe_storage
from qmerge.report.records import fingerprint_record
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Update

# Keys of adapter_config.json that are always shown, where they are set.
CONFIG_KEYS = (
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "unsloth_training_method",
)  # fmt: skip

KINDS_OF_CHANGE: tuple[tuple[type, str], ...] = (
    (DoraUpdate, "DoRA"),
    (TokenRowsUpdate, "token rows"),
    (AddUpdate, "biases, added to"),
    (StackUpdate, "LoRA of experts"),
    (ChangedBaseUpdate, "LoRA on a base that its start changed"),
)

# A delta whose entries are smaller than this is reported as zero.
ZERO_RMS = 1e-8

# alpha / r above this is reported: usual are 0.5 to 4.
USUAL_SCALE = 8


def describe_adapter(source: hub.Source, base: str | None = None, base_revision: str | None = None) -> dict[str, Any]:
    """The JSON of ``qmerge inspect ADAPTER``, also for an adapter that cannot be merged (``problem`` then says why).

    Args:
        source: the adapter's folder.
        base: a model to compare the adapter with: folder or Hub id.
        base_revision: revision of that model on the Hub.

    Raises:
        AdapterError, CheckpointError: the folder holds no adapter, or ``base`` is not a model.
    """
    config = read_config(source.folder)
    described = _describe_files(source, config)
    if base is not None:
        return described | _compare_with_base(_recipe_for(source, base, base_revision), source, config)
    try:
        with Reader() as reader:
            return described | _describe_changes(read_adapter(source.folder, reader, source.adapter), config)
    except NeedsBaseError as error:
        return {**described, "suspicious": [f"{error}: give --base"]}
    except AdapterError as error:
        return {**described, "problem": str(error)}


def _describe_files(source: hub.Source, config: dict[str, Any]) -> dict[str, Any]:
    """What config and headers say, before any value is read."""
    known = {}
    for name in CONFIG_KEYS:
        if config.get(name) not in (None, {}, []):
            known[name] = config[name]
    other = peft_options.other_options(config)
    for name in CONFIG_KEYS:
        other.pop(name, None)
    infos = select_adapter(tensor_infos(source.folder), source.adapter)
    return {
        "name": source.name,
        "commit": source.commit,
        "checkpoint": _describe_checkpoint(source),
        "config": known,
        "other_options": other,
        "training": asdict(read_training(source.folder, config)),
        "file": tensors_file(source.folder).name,
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": sorted({info.dtype for info in infos.values()}),
        "problem": None,
        "modules": [],
        "suspicious": [],
    }


def _describe_checkpoint(source: hub.Source) -> dict[str, Any] | None:
    """The run of a checkpoint, and which of the run's checkpoints it is, counted from 1; None for a finished adapter."""
    states = checkpoints_of(source.folder.parent)
    if source.folder.name not in states:
        return None
    # In the Hub's cache, the folder of the run is named after a commit.
    run = source.id or source.folder.parent.name
    return {"run": run, "number": states.index(source.folder.name) + 1, "of": len(states)}


def _describe_changes(adapter: Adapter, config: dict[str, Any]) -> dict[str, Any]:
    """What the adapter does to the base, module by module."""
    modules = []
    for name, update in adapter.updates.items():
        modules.append(_describe_module(name.removesuffix(".weight"), update))
    return {
        "kind": adapter.kind,
        "changes": _count_changes(adapter),
        "modules": modules,
        "replaced": list(adapter.replaced),
        "suspicious": _suspicious(modules, config),
    }


def _describe_module(name: str, update: Update) -> dict[str, Any]:
    """``rms``: of the delta's entries; ``effective_rank``: exp of the entropy of its squared singular values."""
    rms = None
    row_norms_O = update.row_norms()
    if row_norms_O is not None:
        rms = float(row_norms_O.square().sum()) ** 0.5 / math.sqrt(math.prod(update.shape))
    effective_rank = largest_singular = None
    directions = update.directions()
    if directions is not None:
        singular_R = directions[1]
        effective_rank = _effective_rank(singular_R)
        largest_singular = float(singular_R.max()) if len(singular_R) else None
    return {
        "module": name,
        "shape": list(update.shape),
        "rank": update.rank,
        "scale": update.scale,
        "rms": rms,
        "effective_rank": effective_rank,
        "largest_singular": largest_singular,
    }


def _effective_rank(singular_R: Tensor) -> float:
    """1 when one direction carries everything, R when all carry the same (Roy and Vetterli, 2007); 0 for a delta of zero."""
    squares_R = singular_R.double().square()
    if not float(squares_R.sum()):
        return 0.0
    shares_R = squares_R / squares_R.sum()
    entropy = -(shares_R * shares_R.clamp(min=1e-300).log()).sum()  # the clamp makes 0 · log 0 a zero
    return math.exp(float(entropy))


def _count_changes(adapter: Adapter) -> dict[str, int]:
    """Kind of change → how many tensors of the base it is made to."""
    kinds = Counter(_kind_of_change(name, update) for name, update in adapter.updates.items())
    for name in adapter.replaced:
        kinds["biases, trained" if name.endswith(".bias") else "trained whole"] += 1
    return dict(kinds)


def _kind_of_change(name: str, update: Update) -> str:
    if isinstance(update, OwnBaseUpdate):  # wraps the update that matters
        return _kind_of_change(name, update.update)
    if isinstance(update, LoraUpdate | ByWidthUpdate):
        return "LoRA of embeddings" if is_embedding(name) else "LoRA"
    for update_type, kind in KINDS_OF_CHANGE:
        if isinstance(update, update_type):
            return kind
    return "other updates"


def _suspicious(modules: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    """What a user should look at before merging."""
    lines = []
    untrained = [m["module"] for m in modules if m["rms"] is not None and m["rms"] < ZERO_RMS]
    if untrained:
        lines.append(
            f"{len(untrained)} of {len(modules)} modules have a delta of zero (the first is {untrained[0]}): they were "
            f"probably never trained. Check that this is the final adapter"
        )
    for module in modules:
        if module["scale"] > USUAL_SCALE:
            lines.append(
                f"{module['module']} has scale {module['scale']:.3g} (alpha / r); usual are 0.5 to 4. Check lora_alpha and r "
                f"in adapter_config.json"
            )
            break  # one is enough: all modules of an adapter usually have the same scale
    if not config.get("base_model_name_or_path"):
        lines.append(
            "adapter_config.json does not name the base (base_model_name_or_path is missing): qmerge cannot check it"
        )
    return lines


# --- compared with a base ----------------------------------------------------------------------------------------------


def _recipe_for(source: hub.Source, base: str, base_revision: str | None) -> Recipe:
    """A merge of the adapter into the base, as far as it must be planned to compare them."""
    # An adapter in a folder of its own is found by that folder; one of several in a file needs its name.
    name = f"#{source.adapter}" if source.adapter and source.adapters_folder is None else ""
    return make_recipe({"base": base, "revision": base_revision, "adapter": f"{source.folder}{name}", "target": "fp32"})


def _compare_with_base(recipe: Recipe, adapter: hub.Source, config: dict[str, Any]) -> dict[str, Any]:
    """What adapter and base declare, and how the largest deltas relate to the base's weights."""
    with Reader() as reader:
        source = hub.resolve(recipe.base, recipe.revision, CheckpointError)
        base = scan(source.folder, reader)
        as_merged = recipe
        fingerprint = fingerprint_record(base.folder).model_dump()
        described: dict[str, Any] = {
            "base": {**describe_storage(source, base), "fingerprint": fingerprint},
            "comparison": [],
            "alignments": [],
        }
        try:
            inputs = read_inputs(recipe, reader)
            described |= _describe_changes(inputs.adapter, config)
            # A merge quantizes the base first where the training folder says so: then it is that base which must fit.
            as_merged, _ = with_training(recipe, inputs)
            plan = plan_from(recipe, inputs)
            (alignments,) = deltas.measure_alignments(plan, make_run_context(plan, reader))
            described["alignments"] = [asdict(alignment) for alignment in alignments]
            described["problem"] = deltas.find_problem(alignments, recipe.merge_onto)
        except QmergeError as error:  # the adapter does not fit this base: what both declare still helps
            described["problem"] = str(error)
        given = declared.given_base(source, base, as_merged, [adapter])
        remarks = declared.compare(config, given, read_training(adapter.folder, config))
        described["comparison"] = [asdict(remark) for remark in remarks]
        return described
