"""Was the adapter trained on these weights? What its deltas themselves say, whatever its config does.

    cos(D, W P)            D = s B A, W the base, P the projection onto the rows of A: what D could be of W at all. A plain
                           LoRA has 0.16 at most in trained ones. PiSSA, OLoRA and CorDA (ipm) begin with a part of W in B A,
                           and train on W without it: 1 at the start, 0.7 after the factors moved by 60 %.
    cos(D, (W − NF4(W)) P) 0.1 at most in plain ones. LoftQ begins with the best fit to this error: 1 at the start.

(Without P, both fall with the size of the layer, as √(rank / width).) Measured on two trained Llamas of 2 and 4 million
parameters, with peft's own initialisations of rank 4 to 16. What was taken out
of X is a part of it, so ⟨D, X⟩ / ‖D‖² is about 1 where X still holds it, and 0 where it is gone: a delta much smaller than
its projection is none, however well it is aligned, as one that makes a layer louder. A negative cosine (weight decay) is
none. Methods: PiSSA, arXiv 2404.02948; OLoRA, 2406.01775; LoftQ, 2310.08659.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmerge.adapters.lora import is_embedding
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.errors import AdapterError
from qmerge.formats import get_format, get_target
from qmerge.planning.plan import Plan
from qmerge.types import Rows, Step, dot
from qmerge.weights.context import RunContext
from qmerge.weights.rows import sampled_rows
from qmerge.weights.values import open_weight
from qmerge.wording import module_names, percent, span

MODULES, ENTRIES = 4, 2**18
"""Weights of each adapter that are looked at, those with the largest delta; values in each of some groups of rows."""

RELATED, DEVIATIONS = 0.3, 6.0
"""A cosine above both the first, and so many standard deviations of what chance gives (1/√rows at most), is none of chance."""

BASE_SHARES, ERROR_SHARES = (0.25, 4.0), (0.1, 2.0)
"""Between these lies ⟨D, X⟩ / ‖D‖² of what was taken out of X: training adds to D, and LoftQ's later steps (0.3 measured)."""

ORTHONORMAL = 0.5
"""‖BᵀB − 1‖ / √R below which B is OLoRA's."""

LARGE = 0.3
"""A delta of this size, against its weight, is warned about: 0.003 to 0.08 is usual."""


@dataclass(frozen=True)
class Alignment:
    """One LoRA against its weight. Cosines are None for a delta of zero, ``to_error`` also where the weights that are merged
    onto are quantized themselves. ``base_share`` and ``error_share`` are ⟨D, X⟩ / ‖D‖²: 1 where X holds what D began as."""

    module: str
    rows: int
    relative_size: float | None
    to_base: float | None
    base_share: float | None
    to_error: float | None
    error_share: float | None

    @property
    def holds_base(self) -> bool:
        return self._related(self.to_base, self.base_share, BASE_SHARES)

    @property
    def holds_error(self) -> bool:
        return self._related(self.to_error, self.error_share, ERROR_SHARES)

    def _related(self, cosine: float | None, share: float | None, bounds: tuple[float, float]) -> bool:
        if cosine is None or share is None:
            return False
        return cosine > max(RELATED, DEVIATIONS / math.sqrt(self.rows)) and bounds[0] <= share <= bounds[1]


def check_deltas(plan: Plan, context: RunContext) -> None:
    """Look at some weights of every adapter.

    Raises:
        AdapterError: most of them say that it was trained on other weights.
    """
    adapters = plan.inputs.adapters
    for adapter, found in zip(adapters, look(plan, context), strict=True):
        problem = verdict(found, plan.recipe.merge_onto)
        if problem:
            raise AdapterError(problem if len(adapters) == 1 else f"{adapter.folder}: {problem}")


def look(plan: Plan, context: RunContext) -> list[list[Alignment]]:
    """Of every adapter's plain LoRAs, a few; at most a million values of each weight are read."""
    found = []
    for adapter in plan.inputs.adapters:
        loras = [
            (lora, replace(step, update=lora))  # alone: what it becomes with other adapters may need all rows at once
            for step in plan.merged
            if isinstance(lora := adapter.updates.get(step.name), LoraUpdate) and is_linear(step)
        ]
        largest = sorted(loras, key=lambda pair: -rms(pair[0]))[:MODULES]
        found.append([alignment(step, lora, context) for lora, step in largest])
    return found


def is_linear(step: Step) -> bool:
    return step.weight.local == "weight" and len(step.weight.shape) == 2 and not is_embedding(step.name)


def rms(lora: LoraUpdate) -> float:
    return math.sqrt(float(lora.row_norms().double().square().sum()) / math.prod(lora.shape))


def alignment(step: Step, lora: LoraUpdate, context: RunContext) -> Alignment:
    """Exact over the rows that are looked at."""
    weight = step.source.base_weight
    source, here = open_weight(weight, step, context), lora.to(context.device)
    dense = get_format(weight.format).info.is_dense and not step.source.simulates_training
    Q_IR, _ = torch.linalg.qr(here.A_RI.T)
    sums = torch.zeros(6, dtype=torch.float64)  # ‖D‖², ‖W‖², ‖W P‖², ⟨D, W⟩, ‖E P‖², ⟨D, E⟩
    count = 0
    for rows in sampled_rows(step, min(ENTRIES, context.block_entries)):
        base_OI = source.values(rows)
        delta_OI = here.apply(torch.zeros_like(base_OI), rows)
        error_OI = base_OI - nf4(base_OI, rows, context) if dense else torch.zeros_like(base_OI)
        base_OR, error_OR = base_OI @ Q_IR, error_OI @ Q_IR
        pairs = (
            (delta_OI, delta_OI), (base_OI, base_OI), (base_OR, base_OR), (delta_OI, base_OI), (error_OR, error_OR),
            (delta_OI, error_OI),
        )  # fmt: skip
        sums += torch.tensor([dot(a, b) for a, b in pairs], dtype=torch.float64)
        count += len(rows)
    delta, whole, base, to_base, error, to_error = sums.tolist()
    return Alignment(
        step.label, count, math.sqrt(delta / whole) if whole else None,
        cosine(to_base, delta, base), to_base / delta - left_by_olora(lora) if delta else None,
        cosine(to_error, delta, error), to_error / delta if delta and error else None,
    )  # fmt: skip


def left_by_olora(lora: LoraUpdate) -> float:
    """⟨D, W⟩ / ‖D‖² on the very base that OLoRA trained on: with W = Q R it takes s Q₁R₁ out (peft 0.21, ``olora_init``),
    and leaves (1 − s) Q₁R₁ = (1/s − 1) D. Its B is Q₁, with orthonormal columns; 0 for all others."""
    gram_RR = lora.B_OR.T @ lora.B_OR
    one_RR = torch.eye(lora.rank, device=gram_RR.device)
    olora = float((gram_RR - one_RR).norm()) < ORTHONORMAL * math.sqrt(lora.rank)
    return 1 / lora.scale - 1 if olora and lora.scale else 0.0


def cosine(product: float, one: float, other: float) -> float | None:
    return product / math.sqrt(one * other) if one and other else None


def nf4(base_OI: Tensor, rows: Rows, context: RunContext) -> Tensor:
    """What bitsandbytes' NF4 makes of some rows: blocks of 64, which LoftQ has."""
    form = get_target("nf4")
    options = form.options({}, None, "F32")
    grid = form.grid(form.scales(base_OI, options), (len(rows), base_OI.shape[1]), options)
    return grid.decode(grid.nearest(base_OI))


def verdict(found: Sequence[Alignment], merge_onto: str) -> str | None:
    """What is wrong, where more than half of the weights say so; None where nothing is."""
    holding = {a.module: a.to_base for a in found if a.holds_base}
    if 2 * len(holding) > len(found):
        return (
            f"the adapter was trained on other weights than these: its delta lies along the base's own weights "
            f"({evidence(holding)}), as when PiSSA, OLoRA or CorDA took it out of the base before training. Merged here, that "
            f"part would be there twice. Give the residual model that it was trained on as --base; or save the adapter "
            f"converted (peft: path_initial_model_for_weight_conversion; LLaMA-Factory: the folder pissa_converted). Where it "
            f'was plain PiSSA or OLoRA, init_lora_weights: "pissa" or "olora" in adapter_config.json has the start repeated.'
        )
    holding = {a.module: a.to_error for a in found if a.holds_error}
    if 2 * len(holding) > len(found):
        way = (
            "Merge onto the quantized weights: leave --merge-onto original out."
            if merge_onto == "original"
            else "Give the quantized model that it was trained on as --base; or, where LoftQ took one step (loftq_iter=1), "
            "pass --trained-on nf4."
        )
        return (
            f"the adapter corrects a quantization error that this base has not: its delta lies along W − NF4(W) "
            f"({evidence(holding)}), as LoftQ begins, or as where it is merged into this base already. Merged here, the "
            f"correction would be an error. {way}"
        )
    return None


def evidence(cosines: Mapping[str, float | None]) -> str:
    """``cosine 0.82 to 0.97 in … and 3 more``, of modules that are held against an adapter."""
    known = sorted({f"{value:.2f}" for value in cosines.values() if value is not None})
    span = known[0] if len(known) == 1 else f"{known[0]} to {known[-1]}"
    more = f" and {len(cosines) - 1} more" if len(cosines) > 1 else ""
    return f"cosine {span} in {next(iter(cosines))}{more}; a plain LoRA's is under 0.2"


def delta_size_warnings(plan: Plan, relative_sizes: Mapping[str, float | None]) -> list[str]:
    """LoRA deltas that are too large to be fine-tuning.

    Args:
        relative_sizes: module → rms(delta)/rms(weight).
    """
    loras = {name for a in plan.inputs.adapters for name, update in a.updates.items() if isinstance(update, LoraUpdate)}
    linear = {step.label for step in plan.merged if step.name in loras and is_linear(step)}
    large = {module: size for module, size in relative_sizes.items() if module in linear and (size or 0.0) > LARGE}
    if not large:
        return []
    line = (
        f"{module_names(list(large))}: the delta is {span(percent, large.values())} of the weight, where "
        f"fine-tuning usually changes 0.3 % to 8 %. Right on a residual model that PiSSA or OLoRA left as base; else look "
        f"whether lora_alpha is what it was in training, and judge the result on held-out text (--verify)."
    )
    return [line]
