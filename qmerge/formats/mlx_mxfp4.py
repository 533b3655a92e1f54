"""MXFP4 as mlx writes it: FP4 in groups of 32, whose scales are powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.formats._fp4 import exponents_of, power_candidates, powers_of_two
from qmerge.formats._mlx_config import mlx_info
from qmerge.formats._mlx_fp4 import MlxFp4


class MlxMxfp4(MlxFp4):
    """Scales are exponents of two plus 127."""

    info = mlx_info("mlx_mxfp4")
    mode = "mxfp4"
    group_size = 32

    def decoded_scales(self, stored_OG: Tensor) -> Tensor:
        return torch.where(stored_OG == 255, torch.nan, powers_of_two(stored_OG.int()))

    def encoded_scales(self, scale_OG: Tensor) -> Tensor:
        return exponents_of(scale_OG)

    def scale_candidates(self, largest_OG: Tensor) -> list[Tensor]:
        return power_candidates(largest_OG)


FORMAT = MlxMxfp4()
