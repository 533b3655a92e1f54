"""Roundings on the kept power-of-two scales of MXFP4, for single layers of gpt-oss' size. Synthetic: no model, no text.

    python benchmarks/mxfp4_experts.py [--size 2880] [--experts 2] [--tokens 8192]

A Gaussian weight in MXFP4, a LoRA of rank 16 whose delta is 0.2 %, 0.5 % and 1 % of it, and inputs with a spectrum like that of
hidden states: a few directions are much stronger than the others. Judged on inputs that rounding did not see. "output kept" is
⟨(stored − base) x, delta x⟩ / ‖delta x‖², "output noise" ‖(stored − merged) x‖ / ‖delta x‖.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.formats import get_target
from qmerge.grids import Grid
from qmerge.rounding import get_rounding
from qmerge.rounding.base import InputStatistics, Objective, RoundingContext, make_objective
from qmerge.types import Rows

RANK = 16
SIZES = (0.002, 0.005, 0.01)
HELD_OUT = 2048
HEADER = "| delta | rounding | kept | output kept | output noise | seconds |\n|---|---|---|---|---|---|"


class Layer(NamedTuple):
    """One expert: base values on their grid, the delta, and inputs [tokens, I] to calibrate on and to judge on."""

    base_OI: Tensor
    grid: Grid
    update: LoraUpdate
    seen_TI: Tensor
    unseen_TI: Tensor


def make_layer(size: int, tokens: int, relative: float, seed: int) -> Layer:
    """A layer of ``size`` inputs and outputs whose delta has ``relative`` times the weight's norm."""
    torch.manual_seed(seed)
    target = get_target("mxfp4")
    options = target.options({}, None, "BF16")
    dense_OI = torch.randn(size, size) * 0.02
    grid = target.grid(target.scales(dense_OI, options), (size, size), options)
    base_OI = grid.decode(grid.nearest(dense_OI))
    A_RI, B_OR = torch.randn(RANK, size), torch.randn(size, RANK)
    scale = relative * float(base_OI.norm() / (B_OR @ A_RI).norm())
    # A power law, and four directions that carry as much as all others.
    strength_I = torch.arange(1, size + 1).float() ** -0.4
    strength_I[:4] *= size**0.4
    mixing_II = torch.linalg.qr(torch.randn(size, size)).Q * strength_I
    inputs_TI = torch.randn(tokens + HELD_OUT, size) @ mixing_II.T
    return Layer(base_OI, grid, LoraUpdate(A_RI, B_OR, scale), inputs_TI[:tokens], inputs_TI[tokens:])


def objectives(layer: Layer) -> Iterator[tuple[str, str, Objective | None]]:
    """Name of a row, rounding, objective."""
    columns, device = layer.base_OI.shape[1], torch.device("cpu")
    directions = layer.update.directions()
    yield "nearest", "nearest", None
    yield "stochastic", "stochastic", None
    yield "preserve without calibration", "preserve", make_objective(None, directions, columns, device)
    hessian_II = layer.seen_TI.T @ layer.seen_TI
    hessian_II /= float(hessian_II.diagonal().mean())
    statistics = InputStatistics(hessian_II, None, len(layer.seen_TI))
    yield "preserve with calibration", "preserve", make_objective(statistics, directions, columns, device)


def judge(layer: Layer, stored_OI: Tensor, merged_OI: Tensor) -> tuple[float, float, float]:
    """kept, output kept, output noise."""
    delta_OI, change_OI = merged_OI - layer.base_OI, stored_OI - layer.base_OI
    wanted, moved = layer.unseen_TI @ delta_OI.T, layer.unseen_TI @ change_OI.T
    kept = float((delta_OI * change_OI).sum() / delta_OI.square().sum())
    output_kept = float((wanted * moved).sum() / wanted.square().sum())
    return kept, output_kept, float((moved - wanted).norm() / wanted.norm())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2880)
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    asked = parser.parse_args()
    print(HEADER, flush=True)
    for relative in SIZES:
        sums: dict[str, Tensor] = {}
        for seed in range(asked.experts):
            layer = make_layer(asked.size, asked.tokens, relative, seed)
            rows = Rows(0, asked.size)
            merged_OI = layer.update.apply(layer.base_OI, rows)
            for name, rounding, objective in objectives(layer):
                started = time.monotonic()
                context = RoundingContext(
                    name=f"expert {seed}",
                    rows=rows,
                    base_codes_OI=layer.grid.nearest(layer.base_OI),
                    objective=objective,
                    delta_OI=merged_OI - layer.base_OI,
                )
                codes_OI = get_rounding(rounding).choose(merged_OI, layer.grid, context)
                seconds = time.monotonic() - started
                judged = judge(layer, layer.grid.decode(codes_OI), merged_OI)
                sums[name] = sums.get(name, 0) + torch.tensor([*judged, seconds]) / asked.experts
        for name, numbers in sums.items():
            kept, output_kept, noise, seconds = numbers.tolist()
            row = f"| {100 * relative:g} % | {name} | {kept:.2f} | {output_kept:.2f} | {noise:.2f} | {seconds:.1f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
