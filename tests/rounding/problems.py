"""Small rounding problems of every kind of grid, for the tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qmerge.rounding import preserve
from qmerge.rounding.base import InputStatistics, make_objective

from ..formats.test_grids import grid_for

RANK = 4


@dataclass(frozen=True)
class Case:
    """A weight of ``shape`` [O, I] for a target; ``shuffled``: its columns in a random order."""

    target: str
    shape: tuple[int, int]
    shuffled: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.target} {self.shape[0]}x{self.shape[1]}{' shuffled' if self.shuffled else ''}"

    def problem(self, device: str = "cpu") -> tuple[preserve.Problem, Tensor]:
        """The problem, and the nearest levels in its order of the columns."""
        generator = torch.Generator().manual_seed(0)
        outputs, inputs = self.shape
        values_OI = torch.randn(self.shape, generator=generator).to(device)
        x = torch.randn(4 * inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)
        delta_OI = torch.randn(outputs, RANK, generator=generator) @ torch.randn(RANK, inputs, generator=generator)
        u, s, vt = torch.linalg.svd(delta_OI, full_matrices=False)
        directions = (u[:, :RANK].to(device), s[:RANK].to(device), vt[:RANK].T.contiguous().to(device))
        statistics = InputStatistics((x.T @ x / len(x)).to(device), None, len(x))
        objective = make_objective(statistics, directions, inputs, torch.device(device))
        grid = grid_for(self.target, values_OI, **self.options)
        merged_OI = grid.decode(grid.nearest(values_OI)) + 0.02 * delta_OI.to(device)
        columns = torch.arange(inputs)
        if self.shuffled:
            columns = torch.randperm(inputs, generator=generator)
        columns = columns.to(device)
        problem = preserve.in_order(columns, merged_OI.T.contiguous(), objective, grid)
        nearest_IO = grid.decode(grid.nearest(merged_OI)).T.contiguous()
        return problem, nearest_IO[columns]

    def rows(self, device: str = "cpu") -> Tensor:
        """Some rows of the weight, not in their order, as a later sweep has them."""
        order = torch.randperm(self.shape[0], generator=torch.Generator().manual_seed(1))
        return order[: max(1, self.shape[0] * 3 // 4)].to(device)


# NF4 blocks straddle rows of 96; 21 rows are no multiple of a tile, 96 and 72 columns none of a block.
CASES = [
    Case("nf4", (21, 96)),
    Case("nf4", (8, 72), shuffled=True),
    Case("fp4", (8, 96), shuffled=True),
    Case("int8", (8, 96)),
    Case("gptq", (16, 96), shuffled=True, options={"group_size": 32}),
    Case("awq", (8, 128), options={"group_size": 64}),
    Case("mlx", (8, 128), shuffled=True),
    Case("mlx_nvfp4", (8, 96)),
    Case("w4a16", (8, 128), shuffled=True),
    Case("nvfp4", (8, 96), shuffled=True),
]
