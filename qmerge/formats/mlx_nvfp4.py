"""NVFP4 as mlx writes it: FP4 in groups of 16 with an FP8 scale each, and none for the whole weight."""

from __future__ import annotations

import torch
from torch import Tensor

from qmerge.errors import NumbersError
from qmerge.formats._mlx_config import mlx_info
from qmerge.formats._mlx_fp4 import MlxFp4
from qmerge.formats._scaled_float import FLOAT8, LARGEST

# Of FP4.
LARGEST_LEVEL = 6.0

# Scales that are tried, relative to the one that makes a group's largest value a 6. At 1.5 it is a 4. Without a scale for the
# whole weight most scales are small, where FP8 is coarse: so neighbours of those are tried as well.
SHARES = torch.linspace(0.6, 1.6, 21).tolist()


class MlxNvfp4(MlxFp4):
    """Scales are E4M3 numbers, as their bits."""

    info = mlx_info("mlx_nvfp4")
    mode = "nvfp4"
    group_size = 16

    def decoded_scales(self, stored_OG: Tensor) -> Tensor:
        return stored_OG.view(FLOAT8).float()

    def encoded_scales(self, scale_OG: Tensor) -> Tensor:
        return scale_OG.to(FLOAT8).view(torch.uint8)

    def scale_candidates(self, largest_OG: Tensor) -> list[Tensor]:
        return [(largest_OG * (share / 6)).clamp(max=LARGEST).to(FLOAT8).float() for share in SHARES]

    def check_range(self, stored_OI: Tensor, merged_OI: Tensor, name: str) -> None:
        if not merged_OI.numel():
            return
        low, high = merged_OI.aminmax()
        largest = max(-float(low), float(high))
        limit = LARGEST * LARGEST_LEVEL
        if largest > limit:
            raise NumbersError(f"{name} reaches {largest:.6g}, but {self.name} ends at {limit:.6g}. Use --target mlx.")


FORMAT = MlxNvfp4()
