"""What a run did → the content of qmerge.json."""

from __future__ import annotations

import platform
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

import torch

from qmerge.adapters.combining.interference import PairSums, cosine, over_modules, sign_conflict
from qmerge.base_check.deltas import delta_size_warnings
from qmerge.forecast.predict import Survival, total_kept
from qmerge.forecast.preflight import Preflight, input_warnings, rounding_name
from qmerge.forecast.warnings import clipping_warnings, interference_warnings, original_warnings, survival_warnings
from qmerge.metrics.base import Sums, over_weights, values_of
from qmerge.pipeline import Outcome
from qmerge.planning.plan import Plan
from qmerge.schema import (
    FileRecord,
    GroupRecord,
    InputRecord,
    ModulePairRecord,
    PairRecord,
    ReportData,
    SeenRecord,
    WeightRecord,
    one_each,
)
from qmerge.weights.context import RunContext

VERSIONED = ("qmerge", "torch", "bitsandbytes", "peft", "transformers", "safetensors", "numpy")


def make_report(
    plan: Plan, context: RunContext, records: list[InputRecord], outputs: list[FileRecord], outlook: Preflight,
    outcomes: Mapping[str, Outcome], started: float,
) -> ReportData:  # fmt: skip
    """Sums → values, per weight, per kind of module and in total; and the warnings about them."""
    measured = {name: outcome.sums for name, outcome in outcomes.items()}
    predicted, weights, kinds = outlook.predicted, dict[str, WeightRecord](), defaultdict(list)
    for step in plan.merged:
        values = values_of(measured[step.name])
        assert step.update is not None
        kinds[step.label.rpartition(".")[2]].append(step.name)
        weights[step.name] = WeightRecord(
            module=step.label,
            shape=step.shape,
            base_format=step.source.base_format,
            target=step.target,
            rounding=step.rounding,
            rank=step.update.rank,
            scale=step.update.scale,
            values=values,
            calibration=seen_record(outcomes[step.name]),
        )
    names = [record.name for record in records if record.role == "adapter"]
    pairs = pair_records(names, {weights[name].module: outcome.pair_sums or {} for name, outcome in outcomes.items()})
    return ReportData(
        recipe=plan.recipe.portable(exclude_none=True, exclude={"out"}),
        versions=versions(),
        device=device_name(context.device),
        rounding=rounding_name(plan),
        rounding_reason=outlook.reason,
        calibration=outlook.calibration,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        inputs=records,
        outputs=outputs,
        actions=dict(Counter(step.action for step in plan.steps)),
        predicted={"total": total_kept(predicted), **{s.module: s.kept for s in predicted}},
        total=group("all", [step.name for step in plan.merged], measured),
        groups=[group(kind, names, measured) for kind, names in kinds.items()],
        weights=list(weights.values()),
        original_gap=outlook.original_gap,
        bytes_out=plan.bytes_out,
        bits_per_weight=plan.bits_per_weight,
        promoted=sorted(plan.promoted),
        interference=pairs,
        warnings=input_warnings(plan)
        + delta_size_warnings(plan, {s.module: s.relative_size for s in predicted})
        + clipping_warnings(
            values_of(over_weights(measured.values()))["clipped"], any(s.source.keeps_grid for s in plan.merged)
        )
        + interference_warnings(pairs, plan.recipe.combine)
        + original_warnings(plan.merge_onto, outlook.original_gap)
        + survival_warnings([survival(record, measured[name]) for name, record in weights.items()], predicted=False),
    )


def pair_records(adapters: Sequence[str], met: Mapping[str, PairSums]) -> list[PairRecord]:
    """By pair of adapters, in the order of the recipe; ``met``: module → the sums of the pairs that meet there."""
    pairs: dict[str, dict[str, dict[str, float]]] = {}
    for module in sorted(met):
        for pair, sums in met[module].items():
            pairs.setdefault(pair, {})[module] = sums
    records, names = [], one_each(adapters)
    for pair, modules in sorted(pairs.items(), key=lambda item: [int(place) for place in item[0].split()]):
        one, other = (names[int(place)] for place in pair.split())
        total = over_modules(modules)
        each = [
            ModulePairRecord(module=m, cosine=cosine(s), sign_conflict=sign_conflict(s)) for m, s in modules.items()
        ]
        records.append(
            PairRecord(one=one, other=other, cosine=cosine(total), sign_conflict=sign_conflict(total), modules=each)
        )
    return records


def seen_record(outcome: Outcome) -> SeenRecord | None:
    return SeenRecord.model_validate(outcome.input_stats) if outcome.input_stats else None


def group(name: str, names: Sequence[str], measured: dict[str, Sums]) -> GroupRecord:
    return GroupRecord(name=name, weights=len(names), values=values_of(over_weights(measured[n] for n in names)))


def survival(record: WeightRecord, measured: Sums) -> Survival:
    """A measured weight, as the warnings want it: by the layer's output where its inputs were seen.

    ``preserve`` puts its errors where no input points and the adapter does not read: in weight space they are large.
    """
    v = record.values
    squared = measured["kept"]["delta_delta"]
    kept, noise = v["kept"], v["noise"]
    if record.rounding == "preserve":
        kept, noise = v["kept"] if v["output_kept"] is None else v["output_kept"], v["output_noise"]
    return Survival(
        module=record.module,
        target=record.target,
        rounding=record.rounding,
        rank=record.rank,
        kept=kept,
        noise=noise,
        relative_size=v["relative_size"],
        gap_to_delta=v["gap_to_delta"],
        delta_squared=squared,
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or "cpu"
