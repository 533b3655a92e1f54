"""Reports without a run, for tests of how they are shown."""

from __future__ import annotations

from typing import Any

from qmerge import plugins
from qmerge.schema import (
    CalibrationRecord,
    ContinuationRecord,
    FidelityRecord,
    FileRecord,
    GroupRecord,
    InputRecord,
    ModulePairRecord,
    PairRecord,
    RankRecord,
    ReportData,
    ResidualRecord,
    WeightRecord,
)

KINDS = ("q_proj", "down_proj")
FIDELITY = FidelityRecord(
    text="heldout.txt", tokens=20480, sequence_length=512, loss_base=1.5, loss_unmerged=1.0, loss_merged=1.1, gain_kept=0.8,
    kl_base=0.2, kl_merged=0.01, kl_ratio=0.05, top1_agreement=0.93, kl_p99=0.4,
)  # fmt: skip


def fidelity(gain_kept: float | None, kl_ratio: float | None, improvement: float = 0.5, **more: Any) -> FidelityRecord:
    """A whole model. ``improvement``: nats per token by which the adapter improves the loss."""
    return FidelityRecord(
        text="heldout.txt", tokens=20480, sequence_length=512, loss_base=3.0, loss_unmerged=3.0 - improvement,
        loss_merged=3.0 - improvement * (gain_kept or 0.0), gain_kept=gain_kept, kl_base=0.3,
        kl_merged=0.3 * (kl_ratio or 0.0), kl_ratio=kl_ratio, top1_agreement=0.948, kl_p99=0.4, **more,
    )  # fmt: skip


def values(kept: float, output_kept: float | None) -> dict[str, float | None]:
    """One value for each metric."""
    known: dict[str, float | None] = dict.fromkeys(plugins.names("metrics"), 0.1)
    output_noise = None if output_kept is None else 0.9
    return known | {"kept": kept, "output_kept": output_kept, "output_noise": output_noise, "relative_size": 0.015}


def report(*, output_kept: float | None = None, calibration: str | None = None, **more: Any) -> ReportData:
    """An NF4 merge of two layers. ``output_kept`` and ``calibration`` go together."""
    names = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]
    weights = [
        WeightRecord(
            module=name, shape=(8, 8), base_format="nf4", target="nf4", rounding="preserve", rank=4, scale=2.0,
            values=values(0.78, output_kept),
        )
        for name in names
    ]  # fmt: skip
    inputs = [
        InputRecord(role=role, name=role, files=[FileRecord(file="model.safetensors", bytes=1, sha256="0")])
        for role in ("base", "adapter")
    ]
    settings: dict[str, Any] = {
        "recipe": {"target": "nf4"},
        "versions": {"qmerge": "0.1.0"},
        "device": "cpu",
        "rounding": "nearest" if calibration is None else "preserve",
        "rounding_reason": "as asked",
        "calibration": None if calibration is None else CalibrationRecord(source=calibration, tokens=16384),
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "inputs": inputs,
        "outputs": [FileRecord(file="model.safetensors", bytes=1, sha256="0")],
        "actions": {"merge": len(names)},
        "predicted": {},
        "total": GroupRecord(name="all", weights=len(names), values=values(0.78, output_kept)),
        "groups": [GroupRecord(name=kind, weights=2, values=values(0.78, output_kept)) for kind in KINDS],
        "weights": weights,
        "warnings": [],
        "bytes_out": 2_090_000,
        "bits_per_weight": 4.52,
    }
    return ReportData(**settings | more)


HOSTILE = '"><img src=x onerror="window.ran=1"><script>window.ran=1</script></script>'
"""A name that becomes a script wherever it is not escaped."""

FORMULA = "=HYPERLINK(1)"
"""A name that becomes a formula in a spreadsheet."""


def full_report(layers: int = 4, **more: Any) -> ReportData:
    """A report with everything that a page can show. Weights differ; the last two have hostile names."""
    shown = report(output_kept=0.9, calibration="train.txt")
    weights = []
    for layer in range(layers):
        for kind in KINDS:
            kept = 0.1 + 0.8 * len(weights) / (2 * layers)
            weight = shown.weights[0].model_copy(update={"module": f"model.layers.{layer}.{kind}"})
            sizes = {"relative_size": 0.001 * (layer + 1), "gap_to_delta": 20.0 / (layer + 1), "predicted_kept": 0.01}
            weights.append(weight.model_copy(update={"values": {**values(kept, kept), **sizes}}))
    weights[-1] = weights[-1].model_copy(update={"module": HOSTILE})
    weights[-2] = weights[-2].model_copy(update={"module": FORMULA})
    ranks = [RankRecord(size=1 / rank, kept=0.9 - 0.1 * rank) for rank in range(1, 5)]
    groups = [group.model_copy(update={"ranks": ranks}) for group in shown.groups]
    groups.append(groups[0].model_copy(update={"name": HOSTILE}))
    written = ContinuationRecord(
        prompt=f"The log says{HOSTILE}", base=" wind and rain", unmerged=" wind and sun", merged=HOSTILE
    )
    settings = {
        "weights": weights,
        "groups": groups,
        "total": shown.total.model_copy(update={"ranks": ranks}),
        "fidelity": FIDELITY.model_copy(update={"continuations": [written]}),
        "interference": [PAIR.model_copy(update={"one": HOSTILE})],
        "warnings": [HOSTILE],
        "inputs": [record.model_copy(update={"name": HOSTILE}) for record in shown.inputs],
        "recipe": {"target": "nf4", "base": HOSTILE, "adapter": ["a", HOSTILE], "rounding": "nearest", "sym": False},
    }
    return shown.model_copy(update={**settings, **more})


PAIR = PairRecord(
    one="math", other="chat", cosine=0.01, sign_conflict=0.49,
    modules=[
        ModulePairRecord(module="model.layers.0.q_proj", cosine=-0.08, sign_conflict=0.6),
        ModulePairRecord(module="model.layers.1.q_proj", cosine=None, sign_conflict=None),
    ],
)  # fmt: skip
RESIDUAL = ResidualRecord(rank=8, bytes=1_234_567, noise_without=0.9, noise_with=0.3)
