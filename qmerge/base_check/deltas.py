"""Was the adapter trained on these weights? Answered from its deltas, whatever its config declares.

    cos(D, W P)             D = s B A, W the base, P the projection onto the rows of A: the part of W that D can
                            resemble. At most 0.16 in trained plain LoRAs. PiSSA, OLoRA and CorDA (ipm) initialize B A
                            with a part of W, and train on W without that part: 1 at the start, 0.7 after the factors
                            moved by 60 %.
    cos(D, (W − NF4(W)) P)  At most 0.1 in plain LoRAs. LoftQ initializes B A with the best fit to this error: 1 at the
                            start.

(Without P, both fall with the size of the layer, as √(rank / width).) Measured on two trained Llamas of 2 and 4 million
parameters, with peft's own initializations of rank 4 to 16.

B A was a part of X (X is W or W − NF4(W)). So ⟨D, X⟩ / ‖D‖² is about 1 where X still contains that part, and 0 where it
was taken out. A delta that is much smaller than its projection was never a part of X, however well it is aligned: it
makes the layer louder. Nor was one with a negative cosine, which weight decay gives.

Methods: PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775; LoftQ, arXiv 2310.08659.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmerge.adapters.reading.folder import Adapter
from qmerge.adapters.reading.saved_weights import is_embedding
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.errors import AdapterError
from qmerge.formats import get_format, get_target
from qmerge.planning.plan import Plan
from qmerge.types import Rows, Step, dot
from qmerge.weights.context import RunContext
from qmerge.weights.rows import sampled_rows
from qmerge.weights.values import open_weight
from qmerge.wording import module_names, percent, span

MODULES = 4
"""Weights of each adapter that are examined: those with the largest deltas."""

ENTRIES = 2**18
"""Values in each of the groups of rows that are read of a weight."""

RELATED_COSINE = 0.3
"""A cosine above this is not chance, in matrices with many rows; see ``DEVIATIONS``."""

DEVIATIONS = 6.0
"""A cosine that is not chance is larger than this many standard deviations of a random cosine, 1/√rows at most."""

BASE_SHARES = (0.25, 4.0)
"""Range of ⟨D, W⟩ / ‖D‖² for a D that began as a part of W: training adds to D."""

ERROR_SHARES = (0.1, 2.0)
"""Range of ⟨D, E⟩ / ‖D‖² for a D that began as a fit to the quantization error E; 0.3 measured after several steps of
LoftQ."""

ORTHONORMAL = 0.5
"""‖BᵀB − 1‖ / √R below which B is that of OLoRA."""

LARGE_DELTA = 0.3
"""A delta of more than this fraction of its weight is warned about. Short QLoRA runs change weights by 0.0002 to 0.01; the
largest that was measured is 0.054."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """One LoRA against its weight. The field names are those of ``qmerge inspect --json``.

    rms            rms of D, by which the largest deltas are chosen
    rows           rows of the weight that were read
    relative_size  ‖D‖ / ‖W‖; None for a weight of zeros
    to_base        cos(D, W P); None for a delta of zero
    base_share     ⟨D, W⟩ / ‖D‖²: 1 where W contains what D began as; None for a delta of zero
    to_error       cos(D, (W − NF4(W)) P); None for a delta of zero, and where the delta is added to a quantized weight
    error_share    ⟨D, W − NF4(W)⟩ / ‖D‖²; None as ``to_error``
    """

    module: str
    rms: float
    rows: int
    relative_size: float | None
    to_base: float | None
    base_share: float | None
    to_error: float | None
    error_share: float | None

    @property
    def holds_base(self) -> bool:
        """Whether the delta began as a part of the base that the base still contains."""
        return self._is_part(self.to_base, self.base_share, BASE_SHARES)

    @property
    def holds_error(self) -> bool:
        """Whether the delta began as a fit to a quantization error that the base does not have."""
        return self._is_part(self.to_error, self.error_share, ERROR_SHARES)

    def _is_part(self, cosine: float | None, share: float | None, bounds: tuple[float, float]) -> bool:
        if cosine is None or share is None:
            return False
        smallest, largest = bounds
        chance = DEVIATIONS / math.sqrt(self.rows)
        return cosine > max(RELATED_COSINE, chance) and smallest <= share <= largest


# --- measured --------------------------------------------------------------------------------------------------------


def check_deltas(plan: Plan, context: RunContext) -> None:
    """Examine some weights of every adapter.

    Raises:
        AdapterError: most of them show that the adapter was trained on other weights.
    """
    adapters = plan.inputs.adapters
    for adapter, alignments in zip(adapters, measure_alignments(plan, context), strict=True):
        problem = find_problem(alignments, plan.merge_onto)
        if problem:
            which = f"{adapter.folder}: " if len(adapters) > 1 else ""
            raise AdapterError(which + problem)


def measure_alignments(plan: Plan, context: RunContext) -> list[list[Alignment]]:
    """For every adapter, its plain LoRAs with the largest deltas against their weights.

    At most a million values of each weight are read.
    """
    alignments = []
    for adapter in plan.inputs.adapters:
        largest = _largest_loras(adapter, plan)[:MODULES]
        alignments.append([align(step, lora, context) for lora, step in largest])
    return alignments


def _largest_loras(adapter: Adapter, plan: Plan) -> list[tuple[LoraUpdate, Step]]:
    """The plain LoRAs of linear layers, the largest delta first; each with a step that applies it alone."""
    loras: list[tuple[LoraUpdate, Step]] = []
    for step in plan.merged:
        update = adapter.updates.get(step.name)
        if isinstance(update, LoraUpdate) and is_linear(step):
            # Combined with others, the step may need all rows at once.
            loras.append((update, replace(step, update=update)))
    return sorted(loras, key=lambda pair: -_rms(pair[0]))


def is_linear(step: Step) -> bool:
    """Whether the weight is that of a linear layer."""
    return step.weight.local == "weight" and len(step.weight.shape) == 2 and not is_embedding(step.name)


def _rms(lora: LoraUpdate) -> float:
    return math.sqrt(float(lora.row_norms().double().square().sum()) / math.prod(lora.shape))


def align(step: Step, lora: LoraUpdate, context: RunContext) -> Alignment:
    """A LoRA against its weight, exact over the rows that are read."""
    sums = _AlignmentSums(step, lora, context)
    for rows in sampled_rows(step, min(ENTRIES, context.block_entries)):
        sums.add(rows)
    return sums.alignment()


class _AlignmentSums:
    """Sums over rows of products of the delta D, the weight W and the quantization error E = W − NF4(W).

    A factor P, the projection onto the rows of A, is an orthonormal basis Q of these rows: ‖W P‖ = ‖W Q‖.
    """

    def __init__(self, step: Step, lora: LoraUpdate, context: RunContext) -> None:
        base = step.source.base_weight
        self._step = step
        self._lora = lora
        self._lora_on_device = lora.to(context.device)
        self._base = open_weight(base, step, context)
        self._base_is_dense = get_format(base.format).info.is_dense and not step.source.simulates_training
        self._Q_IR, _ = torch.linalg.qr(self._lora_on_device.A_RI.T)
        self._rows = 0
        self._sums: dict[str, float] = defaultdict(float)

    def add(self, rows: Rows) -> None:
        base_OI = self._base.values(rows)
        delta_OI = self._lora_on_device.apply(torch.zeros_like(base_OI), rows)
        # A quantized base has the error already: an adapter that corrects it is merged onto the right weights.
        error_OI = torch.zeros_like(base_OI)
        if self._base_is_dense:
            error_OI = base_OI - nf4_values(base_OI)
        base_OR = base_OI @ self._Q_IR
        error_OR = error_OI @ self._Q_IR
        self._sums["D D"] += dot(delta_OI, delta_OI)
        self._sums["W W"] += dot(base_OI, base_OI)
        self._sums["WP WP"] += dot(base_OR, base_OR)
        self._sums["D W"] += dot(delta_OI, base_OI)
        self._sums["EP EP"] += dot(error_OR, error_OR)
        self._sums["D E"] += dot(delta_OI, error_OI)
        self._rows += len(rows)

    def alignment(self) -> Alignment:
        sums = self._sums
        relative_size = base_share = error_share = None
        if sums["W W"]:
            relative_size = math.sqrt(sums["D D"] / sums["W W"])
        if sums["D D"]:
            base_share = sums["D W"] / sums["D D"] - share_left_by_olora(self._lora)
        if sums["D D"] and sums["EP EP"]:
            error_share = sums["D E"] / sums["D D"]
        return Alignment(
            module=self._step.label,
            rms=_rms(self._lora),
            rows=self._rows,
            relative_size=relative_size,
            to_base=_cosine(sums["D W"], sums["D D"], sums["WP WP"]),
            base_share=base_share,
            to_error=_cosine(sums["D E"], sums["D D"], sums["EP EP"]),
            error_share=error_share,
        )


def share_left_by_olora(lora: LoraUpdate) -> float:
    """⟨D, W⟩ / ‖D‖² on the very base that OLoRA trained on; 0 for other LoRAs.

    With W = Q R, OLoRA takes s Q₁R₁ out of the base (peft 0.21, ``olora_init``) and leaves (1 − s) Q₁R₁ = (1/s − 1) D
    in it. Its B is Q₁, with orthonormal columns.
    """
    gram_RR = lora.B_OR.T @ lora.B_OR
    identity_RR = torch.eye(lora.rank, device=gram_RR.device)
    is_olora = float((gram_RR - identity_RR).norm()) < ORTHONORMAL * math.sqrt(lora.rank)
    if not is_olora or not lora.scale:
        return 0.0
    return 1 / lora.scale - 1


def _cosine(product: float, squared: float, other_squared: float) -> float | None:
    if not squared or not other_squared:
        return None
    return product / math.sqrt(squared * other_squared)


def nf4_values(values_OI: Tensor) -> Tensor:
    """float32 [rows, I] as bitsandbytes' NF4 stores them, in blocks of 64, as LoftQ does."""
    nf4 = get_target("nf4")
    grid = nf4.sample_grid(values_OI, nf4.options({}, None, "F32"))
    return grid.decode(grid.nearest(values_OI))


# --- judged ----------------------------------------------------------------------------------------------------------


def find_problem(alignments: Sequence[Alignment], merge_onto: str) -> str | None:
    """What is wrong with the base, in words; None unless more than half of the weights show it."""
    with_base = {a.module: a.to_base for a in alignments if a.holds_base}
    if 2 * len(with_base) > len(alignments):
        return (
            f"the adapter was trained on other weights than these: its delta is aligned with the base's own weights "
            f"({_evidence(with_base)}), as when PiSSA, OLoRA or CorDA took it out of the base before training. Merged into this "
            f"base, that part would be counted twice. Give the residual model that the adapter was trained on as --base; or save "
            f"the adapter converted (peft: path_initial_model_for_weight_conversion; LLaMA-Factory: the folder "
            f'pissa_converted). For plain PiSSA or OLoRA, init_lora_weights: "pissa" or "olora" in adapter_config.json makes '
            f"qmerge repeat the initialization."
        )
    with_error = {a.module: a.to_error for a in alignments if a.holds_error}
    if 2 * len(with_error) > len(alignments):
        way_out = (
            "Give the quantized model that the adapter was trained on as --base; or, if LoftQ took one step (loftq_iter=1), pass "
            "--trained-on nf4."
        )
        if merge_onto == "original":
            way_out = "Merge onto the quantized weights: leave --merge-onto original out."
        return (
            f"the adapter corrects a quantization error that this base does not have: its delta is aligned with W − NF4(W) "
            f"({_evidence(with_error)}), as LoftQ initializes it, or as when it is merged into this base already. Merged into "
            f"this base, the correction would be an error. {way_out}"
        )
    return None


def _evidence(cosines: Mapping[str, float | None]) -> str:
    """``cosine 0.82 to 0.97 in … and 3 more``, for the modules that show the problem."""
    text = f"cosine {span('{:.2f}'.format, cosines.values())} in {next(iter(cosines))}"
    others = len(cosines) - 1
    if others:
        text += f" and {others} more"
    return f"{text}; a plain LoRA's is under 0.2"


def delta_size_warnings(plan: Plan, relative_sizes: Mapping[str, float | None]) -> list[str]:
    """LoRA deltas that are too large for fine-tuning.

    Args:
        relative_sizes: module → rms(delta) / rms(weight).
    """
    large: dict[str, float] = {}
    for step in plan.merged:
        size = relative_sizes.get(step.label) or 0.0
        # Embeddings and trained tokens may change much; DoRA and others have no plain size to compare.
        if size > LARGE_DELTA and is_linear(step) and _has_lora(step.name, plan.inputs.adapters):
            large[step.label] = size
    if not large:
        return []
    line = (
        f"{module_names(list(large))}: the delta is {span(percent, large.values())} of the weight, where fine-tuning usually "
        f"changes 0.02 % to 1 %. This is right on a residual model that PiSSA or "
        f"OLoRA left as base; otherwise check that lora_alpha is that of training, and judge the result on held-out text "
        f"(--verify)."
    )
    return [line]


def _has_lora(name: str, adapters: Sequence[Adapter]) -> bool:
    """Whether any adapter changes this weight by a plain LoRA."""
    return any(isinstance(adapter.updates.get(name), LoraUpdate) for adapter in adapters)
