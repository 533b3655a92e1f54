"""Compare every pair of weights: a LoRA for each linear layer that differs, the size of the difference for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.errors import CheckpointError, listed
from qmerge.extract.adapter import LoraSpool
from qmerge.extract.decompose import decompose_for, lora_factors
from qmerge.extract.difference import PairReader, row_blocks
from qmerge.extract.pairing import CheckpointPair, WeightPair
from qmerge.extract.result import Differences, LoraFit, OtherDifference
from qmerge.extract.storage import how_savable
from qmerge.progress import Progress
from qmerge.types import dot


class PairComparison:
    """Compares pairs of weights. The factors of LoRAs go to ``spool``; ``rank`` and ``energy`` are those of ``extract``."""

    def __init__(
        self,
        checkpoints: CheckpointPair,
        reader: PairReader,
        spool: LoraSpool,
        *,
        rank: int | None,
        energy: float | None,
    ) -> None:
        self._checkpoints = checkpoints
        self._reader = reader
        self._spool = spool
        self._rank = rank
        self._energy = energy

    def compare_all(self, progress: Progress) -> Differences:
        """Compare every pair.

        Raises:
            CheckpointError: no linear layer differs.
            NumbersError: NaN or infinity.
            RoomError: not enough disk space.
        """
        progress.stage("extracting", self._checkpoints.nbytes)
        differing = Differences()
        for pair in self._checkpoints.weights:
            if pair.base.numel:  # empty weights cannot differ
                self._compare(pair, differing)
            progress.advance(pair.nbytes, pair.name)
        if not differing.fits:
            names = [other.name for other in differing.others]
            reason = f"only {listed(names)}" if names else "every weight is the same"
            raise CheckpointError(
                f"MERGED and BASE do not differ in a linear layer ({reason}): there is no LoRA to extract"
            )
        return differing

    def _compare(self, pair: WeightPair, differing: Differences) -> None:
        """Compare one pair, and add the result to ``differing``."""
        if pair.is_linear and not pair.is_raw:
            fit = self._fit_lora(pair)
            if fit is None:
                differing.identical += 1
            else:
                differing.fits.append(fit)
        else:
            other = self._compare_other(pair)
            if other is not None:
                differing.others.append(other)

    def _fit_lora(self, pair: WeightPair) -> LoraFit | None:
        """Make the LoRA of a linear layer; None where both weights are equal."""
        # The decomposition needs the whole delta; of the base, its norm is enough.
        delta_OI = torch.empty(pair.shape, device=self._reader.device)
        base_square = 0.0
        for block in self._reader.differences(pair):
            delta_OI[block.rows.start : block.rows.stop] = block.delta_OI
            base_square += dot(block.base_OI, block.base_OI)
        delta_square = dot(delta_OI, delta_OI)
        if not delta_square:  # equal values; the bytes may differ, in two formats
            return None
        decomposition, rank = decompose_for(delta_OI, delta_square, self._rank, self._energy)
        A_RI, B_OR = lora_factors(decomposition, rank)
        self._spool.add_factors(pair.module, A_RI, B_OR)
        return LoraFit(
            name=pair.name,
            module=pair.module,
            shape=pair.shape,
            rank=rank,
            delta_square=delta_square,
            base_square=base_square,
            error_square=error_square(pair, delta_OI, A_RI, B_OR),
            singular_squares=decomposition.s_K.double().square().cpu(),
            complete=decomposition.complete,
        )

    def _compare_other(self, pair: WeightPair) -> OtherDifference | None:
        """A pair that cannot have a LoRA; None where both weights are equal."""
        if pair.is_raw:
            if self._reader.have_same_bytes(pair):
                return None
            return OtherDifference(name=pair.name, module=pair.module)
        delta_square = 0.0
        base_square = 0.0
        for block in self._reader.differences(pair):
            delta_square += dot(block.delta_OI, block.delta_OI)
            base_square += dot(block.base_OI, block.base_OI)
        if not delta_square:
            return None
        return OtherDifference(
            name=pair.name,
            module=pair.module,
            delta_square=delta_square,
            base_square=base_square,
            savable=how_savable(pair, self._checkpoints),
        )


def error_square(pair: WeightPair, delta_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> float:
    """‖delta − B A‖², in blocks of rows, so that the product needs little memory."""
    squares = []
    for rows in row_blocks(pair):
        error_OI = delta_OI[rows.start : rows.stop] - B_OR[rows.start : rows.stop] @ A_RI
        squares.append(dot(error_OI, error_OI))
    return sum(squares)
