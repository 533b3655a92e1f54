"""Sums over the inputs of some weights of one decoder layer: E[x̃ x̃ᵀ], E[(x − x̃) x̃ᵀ] and E[(r + T x − r̃ − T x̃) x̃ᵀ].

x are the inputs in the unmerged adapter model, x̃ those in the model as merged so far; r and r̃ are the residual streams that
the product with T is added to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qmerge.calibration.capture import MatrixProduct, without_expert_number
from qmerge.errors import NumbersError
from qmerge.rounding.base import InputStatistics

TRIANGLE_PARTS = 4
"""x̃ᵀ x̃ is symmetric: of its upper triangle, so many rows of blocks are computed, 10 of 16 blocks."""


class InputSums:
    """Sums of some weights, batch by batch.

    Weights that share an input (q, k and v) share the sums; the first of them, their leader, keeps them.

    Args:
        names: weights of one decoder layer, by their names on disk.
        of_task: whether the text is the user's own.

    Attributes:
        hessians: leader → Σ x̃ x̃ᵀ, float32 [I, I]; below the blocks on its diagonal it is 0.
        crosses: leader → Σ (x − x̃) x̃ᵀ, float32 [I, I].
        missing: weight that writes into the residual stream → Σ (r + T x − r̃ − T x̃) x̃ᵀ, float32 [O, I].
        tokens: weight → number of inputs that it got.
        leaders: weight → its leader; a weight that got no input has none.
    """

    def __init__(self, names: Sequence[str], device: torch.device, *, of_task: bool = True) -> None:
        self.names = names
        self.has_experts = any(without_expert_number(name) != name for name in names)
        self.hessians: dict[str, Tensor] = {}
        self.crosses: dict[str, Tensor] = {}
        self.missing: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = dict.fromkeys(names, 0)
        self.leaders: dict[str, str] = {}
        self._device = device
        self._of_task = of_task

    def add(self, unmerged: Sequence[MatrixProduct] | None, merged: Sequence[MatrixProduct]) -> None:
        """Add the products of one batch.

        Args:
            unmerged: products in the unmerged model, one for each of ``merged``; None: no crosses are needed. Not used
                for experts: the two models may send a token to different experts, so inputs cannot be paired.
            merged: products in the model as merged so far.
        """
        # The same text runs through both models: product k of one belongs to product k of the other.
        unmerged_inputs: list[Tensor] | None = None
        if unmerged is not None and not self.has_experts:
            unmerged_inputs = [product.x for product in unmerged]
            assert len(unmerged_inputs) == len(merged), "the two models make other products"
        leader_of_input: dict[tuple[int, int], str] = {}
        for position, product in enumerate(merged):
            x = product.x
            if not len(x):  # an expert without a token
                continue
            leader = leader_of_input.setdefault((x.data_ptr(), len(x)), product.names[0])
            for name in product.names:
                self.tokens[name] += len(x)
                self.leaders[name] = leader
            if leader != product.names[0]:  # this input has been added already
                continue
            self._add_square(leader, x)
            if unmerged_inputs is not None:
                self._add_product(self.crosses, leader, unmerged_inputs[position] - x, x)

    def add_missing(self, name: str, missing_TO: Tensor, x: Tensor) -> None:
        """Add, for a weight that writes into the residual stream, what the merged model's stream will lack if it is not rounded.

        Args:
            missing_TO: float32 r + T x − r̃ − T x̃.
            x: float32 x̃ [T, I].
        """
        self._add_product(self.missing, name, missing_TO, x)

    def _add_square(self, leader: str, x_TI: Tensor) -> None:
        """Add xᵀ · x, the blocks of its upper triangle."""
        columns = x_TI.shape[1]
        if leader not in self.hessians:
            self.hessians[leader] = torch.zeros(columns, columns, device=self._device)
        for start, stop in triangle_parts(columns):
            self.hessians[leader][start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])

    def _add_product(self, sums: dict[str, Tensor], name: str, left_TL: Tensor, right_TI: Tensor) -> None:
        """Add leftᵀ · right, of T tokens, to a sum."""
        if name not in sums:  # its size is known only now
            sums[name] = torch.zeros(left_TL.shape[1], right_TI.shape[1], device=self._device)
        sums[name].addmm_(left_TL.T, right_TI)

    def statistics(self) -> dict[str, InputStatistics]:
        """Means over all batches, by weight, at the scale where the mean diagonal of E[x̃ x̃ᵀ] is 1. A weight without any input
        is left out, unless other experts lend to it.

        Nothing can be added afterwards: the sums become the means, because large ones would not fit into memory twice.
        """
        leaders = dict.fromkeys(self.leaders.values())
        for leader in leaders:
            complete(self.hessians[leader])
            if not bool(self.hessians[leader].isfinite().all()):
                raise NumbersError(
                    f"{leader}: its inputs contain NaN or infinity on the calibration text: check that the base and the adapter "
                    f"are finite and belong together"
                )
        if self.has_experts:
            return self._statistics_of_experts()
        factors = {leader: _scale(self.hessians[leader]) for leader in leaders}
        for leader, factor in factors.items():
            self.hessians[leader] *= factor
            if leader in self.crosses:
                self.crosses[leader] *= factor
        for name, missing_OI in self.missing.items():
            missing_OI *= factors[self.leaders[name]]
        # Weights with the same sums share one object, and what is computed from it.
        of_leader = {leader: self._of(leader, self.tokens[leader], None) for leader in factors}
        result = {name: of_leader[leader] for name, leader in self.leaders.items()}
        for name, missing_OI in self.missing.items():
            result[name] = self._of(self.leaders[name], self.tokens[name], missing_OI)
        return result

    def _of(self, leader: str, tokens: int, missing_OI: Tensor | None) -> InputStatistics:
        cross_II = self.crosses.get(leader)
        return InputStatistics(self.hessians[leader], cross_II, tokens, of_task=self._of_task, missing_OI=missing_OI)

    def _statistics_of_experts(self) -> dict[str, InputStatistics]:
        # Experts differ in the number of tokens that they get, so each sum has its own count. An expert may be called with an
        # empty input.
        means: dict[str, Tensor] = {}
        for name, leader in self.leaders.items():
            if self.tokens[name]:
                means[name] = self.hessians[leader] / self.tokens[name]
        result = {name: self._of_expert(name, mean_II) for name, mean_II in means.items()}
        for experts in self._expert_groups():
            result |= self._with_borrowed(experts, means)
        return result

    def _of_expert(self, name: str, mean_II: Tensor, borrowed: float = 0.0) -> InputStatistics:
        return InputStatistics(mean_II * _scale(mean_II), None, self.tokens[name], borrowed, self._of_task)

    def _expert_groups(self) -> list[list[str]]:
        """Weights that differ in the expert's number only: ``w1`` of all experts, ``w2`` of all experts, …"""
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(without_expert_number(name), []).append(name)
        return list(groups.values())

    def _with_borrowed(self, experts: Sequence[str], own: dict[str, Tensor]) -> dict[str, InputStatistics]:
        """Statistics of those experts that got fewer tokens than they have inputs.

        Such a Hessian is singular. The missing share is borrowed from the mean over all experts of the group.
        """
        # Experts that got no token at all have nothing to lend.
        seen = [name for name in experts if name in own]
        if not seen:
            return {}
        sum_II = torch.zeros_like(self.hessians[self.leaders[seen[0]]])
        for name in seen:
            sum_II = sum_II + self.hessians[self.leaders[name]]
        shared_II = sum_II / sum(self.tokens[name] for name in seen)
        result: dict[str, InputStatistics] = {}
        for name in experts:
            own_share = min(1.0, self.tokens[name] / len(shared_II))
            if own_share == 1:  # as many tokens as inputs: nothing is borrowed
                continue
            mixed_II = (1 - own_share) * shared_II
            if name in own:
                mixed_II = mixed_II + own_share * own[name]
            result[name] = self._of_expert(name, mixed_II, borrowed=1 - own_share)
        return result


def triangle_parts(columns: int) -> list[tuple[int, int]]:
    """(start, stop) of the rows of blocks."""
    step = -(-columns // TRIANGLE_PARTS)
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def complete(upper_II: Tensor) -> Tensor:
    """Fill in what is below the blocks on the diagonal, in place."""
    for start, stop in triangle_parts(len(upper_II)):
        upper_II[stop:, start:stop] = upper_II[start:stop, stop:].T
    return upper_II


def _scale(hessian_II: Tensor) -> float:
    """The factor that makes its mean diagonal 1; 1 where all inputs were 0."""
    mean = float(hessian_II.diagonal().mean())
    return 1 / mean if mean > 0 else 1.0
