"""FP4 weights of compressed-tensors: two codes in a byte, in groups whose scales are stored in 8 bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.formats import _fp4_kernels as kernels
from qmerge.formats._affine import sequential_groups
from qmerge.formats._compressed import Compressed, CompressedOptions
from qmerge.formats._compressed_config import TAKE_CONFIG, Scheme, group_size_of
from qmerge.formats._fit_scales import by_groups
from qmerge.formats._levels import FP4_LEVELS, LevelsGrid
from qmerge.formats._tensors import read_rows
from qmerge.formats.base import Stored
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Rows, TensorInfo, TensorSpec

# Added to the exponents of MXFP4's scales before they are stored.
MXFP4_BIAS = 127


class StoredFp4(Stored):
    """Two codes in a byte, the first in the low bits."""

    def __init__(
        self, packed: TensorInfo, scale_OG: Tensor, reader: Reader, device: torch.device, *, group_size: int
    ) -> None:
        if not bool(scale_OG.isfinite().all()):
            raise CheckpointError(
                f"the scales of {packed.name} make NaN or infinity, so they are damaged. Download the model again"
            )
        self._info = packed
        self._reader = reader
        self._device = device
        self.grid: LevelsGrid = LevelsGrid(FP4_LEVELS, scale_OG.to(device), group_size)

    def codes(self, rows: Rows) -> Tensor:
        return unpack_fp4(read_rows(self._info, rows, self._reader).to(self._device))


def unpack_fp4(packed_OW: Tensor) -> Tensor:
    """uint8 [O, I/2] → codes in the order of the levels, uint8 [O, I]."""
    disk_OI = torch.stack([packed_OW & 15, packed_OW >> 4], dim=2).flatten(1)
    return FP4_LEVELS.order_D.to(packed_OW.device)[disk_OI.int()]


def pack_fp4(codes_OI: Tensor) -> Tensor:
    """The reverse of ``unpack_fp4``."""
    disk_OI = FP4_LEVELS.disk_L.to(codes_OI.device)[codes_OI.int()]
    return disk_OI[:, ::2] | (disk_OI[:, 1::2] << 4)


def least_error_scales(
    values_OI: Tensor, group_size: int, candidates: Callable[[Tensor], list[Tensor]], inputs_I: Tensor | None
) -> Tensor:
    """float32 [O, G]: of some scales, those with the least squared error.

    Args:
        candidates: largest magnitudes of the groups → scales to try, each [O, G]. Ties go to the first one.
        inputs_I: float32, mean square of every input, which weights the errors; None: all count alike.
    """
    group_I = sequential_groups(values_OI.shape[1], group_size, values_OI.device)
    values_OGN, weights_GN = by_groups(values_OI, group_I, inputs_I)
    best_OG = torch.full_like(values_OGN[..., 0], torch.inf)
    least_OG = best_OG.double()
    for scale_OG in candidates(values_OGN.abs().amax(dim=2)):
        cost_OG = squared_error(values_OGN, weights_GN, scale_OG)
        best_OG = torch.where(cost_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(cost_OG, least_OG)
    return best_OG


def squared_error(values_OGN: Tensor, weights_GN: Tensor, scale_OG: Tensor) -> Tensor:
    """float64 [O, G]: weighted squared error of the nearest levels."""
    if values_OGN.device.type == "cpu":
        return kernels.squared_error(values_OGN, weights_GN, scale_OG.contiguous())
    levels = FP4_LEVELS.to(values_OGN.device)
    scaled_OGN = values_OGN / torch.where(scale_OG == 0, 1.0, scale_OG)[..., None]
    errors_OGN = levels.rounded(scaled_OGN).mul_(scale_OG[..., None]).sub_(values_OGN)
    return torch.einsum("ogn,ogn,gn->og", errors_OGN, errors_OGN, weights_GN).double()


def power_candidates(largest_OG: Tensor) -> list[Tensor]:
    """Scales of MXFP4: the power that makes the largest value a 4 or more, and its neighbours."""
    exponent_OG = torch.frexp(largest_OG).exponent - 3 + MXFP4_BIAS
    return [powers_of_two((exponent_OG + step).clamp(1, 254)) for step in (0, 1, -1)]


def powers_of_two(exponents: Tensor) -> Tensor:
    """2 ** (exponents − 127), exactly; int32 0 … 254 → float32.

    The bits are put together: the exponent is above the 23 bits of the mantissa. The least power is below float32's normal
    numbers.
    """
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23)
    return bits.to(torch.int32).view(torch.float32)


def exponents_of(powers: Tensor) -> Tensor:
    """The reverse of ``powers_of_two``, uint8."""
    return (torch.frexp(powers).exponent - 1 + MXFP4_BIAS).to(torch.uint8)


class CompressedFp4(Compressed):
    """FP4 in groups of a fixed size. Tensors: ``weight_packed`` uint8 [O, I/2], ``weight_scale`` [O, G]."""

    group_size: ClassVar[int]

    strategy: ClassVar[str]
    """``strategy`` of the scheme."""

    scale_dtype: ClassVar[str]
    """safetensors dtype of the scales."""

    torch_scale_dtype: ClassVar[str]
    """The same in torch's spelling, as the scheme has it."""

    def required_parts(self, scheme: Scheme) -> tuple[str, ...]:
        return ("weight_packed", "weight_scale")

    def shape_and_options(
        self, module: str, parts: Mapping[str, TensorInfo], scheme: Scheme, reader: Reader
    ) -> tuple[tuple[int, int], CompressedOptions]:
        codes, scale = parts["weight_packed"], parts["weight_scale"]
        if codes.dtype != "U8" or scale.dtype != self.scale_dtype or len(codes.shape) != 2:
            raise CheckpointError(
                f"{module}: weight_packed is {codes.dtype} {list(codes.shape)} and weight_scale {scale.dtype}, expected U8 "
                f"[O, I/2] and {self.scale_dtype}. Download the model again"
            )
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        size = group_size_of(module, columns, scheme)
        if size != self.group_size or scale.shape != (rows, columns // size):
            raise CheckpointError(
                f"{module}: weight_scale {list(scale.shape)} and config.json's groups of {size} do not belong to {rows} x "
                f"{columns} in groups of {self.group_size}. {TAKE_CONFIG}"
            )
        return (rows, columns), self._fresh_options()

    def _fresh_options(self) -> CompressedOptions:
        return CompressedOptions(format=self.name, group_size=self.group_size, sym=True, scale_dtype=self.scale_dtype)

    # --- options ---

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> CompressedOptions:
        if isinstance(source, CompressedOptions) and source.format == self.name:
            return source
        return self._fresh_options()

    def describe_options(self, options: CompressedOptions) -> str:
        return f"groups of {self.group_size}"

    def advice_for_inputs(self, columns: int) -> str:
        return "use --target w4a16 or nf4"

    # --- write ---

    def outputs(self, local: str, shape: tuple[int, ...], options: CompressedOptions) -> dict[str, TensorSpec]:
        rows, columns = shape
        return {
            "weight_packed": TensorSpec("U8", (rows, columns // 2)),
            "weight_scale": TensorSpec(self.scale_dtype, (rows, columns // self.group_size)),
        }

    def scales(self, values_OI: Tensor, options: CompressedOptions, inputs_I: Tensor | None = None) -> Tensor:
        """float32 [rows, G]: of the scales that can be stored, those with the least squared error."""
        return least_error_scales(values_OI, self.group_size, self.scale_candidates, inputs_I)

    @abstractmethod
    def scale_candidates(self, largest_OG: Tensor) -> list[Tensor]:
        """float32 [O, G] each: scales to try for groups whose largest magnitudes are given. Ties go to the first one."""

    def pack(self, codes_OI: Tensor, grid: Grid, options: CompressedOptions) -> Tensor:
        return pack_fp4(codes_OI)

    def weights_args(self, options: CompressedOptions) -> dict[str, Any]:
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "group_size": self.group_size,
            "strategy": self.strategy,
            "dynamic": False,
            "scale_dtype": self.torch_scale_dtype,
        }
