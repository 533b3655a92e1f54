"""Scales and biases of fresh grids for MLX: those of mlx itself, or better ones by the squared error of nearest rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.formats import _mlx_scales_kernels as kernels
from qmerge.formats._fit_scales import GroupSearch, by_groups

# Fractions of a group's range that the search tries.
SHRINKS = torch.linspace(1.0, 0.6, 17).tolist()

# Least-squares steps after the search: the best scale and bias for the codes, then the codes for those.
REFITS = 4

# mlx's smallest scale.
LEAST_SCALE = 1e-7


def mlx_scales(values_OGN: Tensor, last_code: int) -> tuple[Tensor, Tensor]:
    """float32 scale and bias [O, G] as ``mx.quantize`` chooses them, before it casts them to the dtype of the weight.

    The end of the range that is further from zero is on the grid, and so is zero (mlx 0.32, backend/cpu/quantized.cpp).
    """
    low_OG, high_OG = values_OGN.amin(dim=2), values_OGN.amax(dim=2)
    scale_OG = ((high_OG - low_OG) / last_code).clamp(min=LEAST_SCALE)
    low_is_further_OG = low_OG.abs() > high_OG.abs()
    scale_OG = torch.where(low_is_further_OG, scale_OG, -scale_OG)
    edge_OG = torch.where(low_is_further_OG, low_OG, high_OG)
    steps_OG = (edge_OG / scale_OG).round()
    bias_OG = torch.where(steps_OG == 0, 0.0, edge_OG)
    return torch.where(steps_OG == 0, scale_OG, edge_OG / steps_OG), bias_OG


def fit_mlx(
    values_OI: Tensor, group_I: Tensor, *, bits: int, dtype: torch.dtype, inputs_I: Tensor | None = None
) -> Tensor:
    """float32 [O, G, 2]: scale and bias with the least squared error of nearest rounding, never worse than mlx's own.

    The range is shrunk step by step. Then scale and bias are fitted to the codes by least squares.

    Args:
        values_OI: float32.
        group_I: int64, the group of every column.
        dtype: dtype in which scales and biases are stored; they are chosen among its numbers.
        inputs_I: float32, mean square of every input, which weights the errors; None: all count alike.
    """
    values_OGN, weights_GN = by_groups(values_OI, group_I, inputs_I)
    search = _Search(values_OGN, weights_GN, last_code=2**bits - 1, dtype=dtype)
    search.offer(*mlx_scales(values_OGN, search.last_code))
    low_OG, high_OG = values_OGN.amin(dim=2), values_OGN.amax(dim=2)
    for shrink in SHRINKS:
        search.offer((high_OG - low_OG) * (shrink / search.last_code), low_OG * shrink)
    for _ in range(REFITS):
        search.offer(*search.refitted())
    return torch.stack((search.scale_OG, search.offset_OG), dim=2)


class _Search(GroupSearch):
    """Keeps the best scale and bias of those that were offered, group by group."""

    def __init__(self, values_OGN: Tensor, weights_GN: Tensor, *, last_code: int, dtype: torch.dtype) -> None:
        super().__init__(values_OGN, weights_GN, last_code=last_code, dtype=dtype)
        self.scale_OG.fill_(LEAST_SCALE)

    def offer(self, scale_OG: Tensor, bias_OG: Tensor) -> None:
        """Take the scale and the bias of the groups in which they make the error smaller."""
        scale_OG, bias_OG = scale_OG.to(self.dtype).float(), bias_OG.to(self.dtype).float()
        cost_OG = self._squared_error(scale_OG, bias_OG)
        self.take((cost_OG < self.cost_OG) & (scale_OG != 0), scale_OG, bias_OG, cost_OG)

    def refitted(self) -> tuple[Tensor, Tensor]:
        """Scale and bias with the least squared error for the codes of the best ones so far."""
        scale_OG, code_mean_OG, value_mean_OG = self._regression()
        # The bias belongs to the scale as it is stored.
        return scale_OG, value_mean_OG - scale_OG.to(self.dtype).float() * code_mean_OG

    def _squared_error(self, scale_OG: Tensor, bias_OG: Tensor) -> Tensor:
        """float64 [O, G], of rounding to the nearest codes."""
        if self.is_on_cpu:
            return kernels.squared_error(self.values_OGN, self.weights_GN, scale_OG, bias_OG, last_code=self.last_code)
        errors_OGN = self._codes(scale_OG, bias_OG).mul_(scale_OG[..., None]).add_(bias_OG[..., None])
        errors_OGN.sub_(self.values_OGN)
        return torch.einsum("ogn,ogn,gn->og", errors_OGN, errors_OGN, self.weights_GN).double()

    def _regression(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slope of values over codes by least squares, the mean code, and the mean value, for the best so far."""
        if self.is_on_cpu:
            return kernels.regression(
                self.values_OGN, self.weights_GN, self.scale_OG, self.offset_OG, last_code=self.last_code
            )
        codes_OGN = self._codes(self.scale_OG, self.offset_OG)
        total_G1 = self.weights_GN.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        shares_GN = self.weights_GN / total_G1
        code_mean_OG = torch.einsum("ogn,gn->og", codes_OGN, shares_GN)
        value_mean_OG = torch.einsum("ogn,gn->og", self.values_OGN, shares_GN)
        codes_OGN -= code_mean_OG[..., None]
        products_OG = torch.einsum("ogn,ogn,gn->og", codes_OGN, self.values_OGN, shares_GN)
        squares_OG = torch.einsum("ogn,ogn,gn->og", codes_OGN, codes_OGN, shares_GN)
        return torch.where(squares_OG > 0, products_OG / squares_OG, self.scale_OG), code_mean_OG, value_mean_OG

    def _codes(self, scale_OG: Tensor, bias_OG: Tensor) -> Tensor:
        position_OGN = (self.values_OGN - bias_OG[..., None]) / scale_OG[..., None]
        return position_OGN.round_().clamp_(0, self.last_code)
