"""LoRA, DoRA and the other changes of one weight: the arithmetic, in float32, without files or options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qmerge.errors import AdapterError
from qmerge.types import Rows, Update

FEWEST_ROWS = 16
"""Rows of B · A that are always computed together, so that row blocks change no bit of the product."""


@dataclass(frozen=True)
class LoraUpdate(Update):
    """W + s B A (arXiv 2106.09685). ``A_RI`` and ``B_OR`` are float32, ``scale`` is s."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float = 1.0

    depends_on_base = False

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B_OR.shape[0], self.A_RI.shape[1]

    def to(self, device: torch.device) -> LoraUpdate:
        return replace(self, A_RI=self.A_RI.to(device), B_OR=self.B_OR.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        # The order of peft's get_delta_weight, so that float32 results are bit-identical: (B @ A) * scale, then added.
        # BLAS gives other last bits for products of a few rows: never take fewer, so that row blocks change no byte.
        start = max(0, min(rows.start, self.shape[0] - FEWEST_ROWS))
        product_OI = self.B_OR[start : max(rows.stop, start + FEWEST_ROWS)] @ self.A_RI
        delta_OI = product_OI[rows.start - start : rows.stop - start].mul_(self.scale)
        return delta_OI.add_(base_OI)

    def row_norms(self) -> Tensor:
        return self._row_norms_O

    @cached_property
    def _row_norms_O(self) -> Tensor:
        # ‖s b A‖² = s² b (A Aᵀ) bᵀ for every row b of B. float64: for a row near 0, float32 could give less than 0.
        gram_RR = self.A_RI.double() @ self.A_RI.double().T
        B_OR = self.B_OR.double()
        return (B_OR @ gram_RR * B_OR).sum(dim=1).clamp(min=0).sqrt().mul(abs(self.scale)).float()

    def directions(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._svd

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        # scale B A = Q_B (scale R_B R_Aᵀ) Q_Aᵀ: the SVD of an [R, R] matrix is all it takes.
        Q_OR, R_B = torch.linalg.qr(self.B_OR.double())
        Q_IR, R_A = torch.linalg.qr(self.A_RI.double().T)
        u_RR, s_R, vt_RR = torch.linalg.svd(self.scale * R_B @ R_A.T)
        u_OR = Q_OR @ u_RR[:, : len(s_R)]
        v_IR = Q_IR @ vt_RR.T[:, : len(s_R)]
        return u_OR.float(), s_R.float(), v_IR.float()


def refuse_quantized(name: str, update: Update) -> None:
    """Refuse to merge an update onto quantized values when it is correct only on the values that training began with.

    Raises:
        AdapterError: it is such an update (``Update.needs_dense``).
    """
    if update.needs_dense:
        raise AdapterError(
            f"{name} is quantized where the adapter is merged: {update.needs_dense}. Give the 16-bit model that it was trained on "
            f"as --base, or as --original with --merge-onto original"
        )


class WrappingUpdate(Update):
    """An update that contains another one, ``update``, and has its rank, scale and shape."""

    update: Update

    @property
    def rank(self) -> int:
        return self.update.rank

    @property
    def scale(self) -> float:
        return self.update.scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.update.shape


@dataclass(frozen=True)
class DoraUpdate(WrappingUpdate):
    """m / ‖W + s B A‖ · (W + s B A), row by row (arXiv 2402.09353, eq. 5).

    ``magnitude`` is m: float32, one number per row. With ``by_column`` it is one per column, and norms are those of columns:
    peft's DoRA of embeddings, whose weight is [tokens, features].
    """

    update: LoraUpdate
    magnitude: Tensor
    by_column: bool = False

    @property
    def whole(self) -> bool:
        return self.by_column

    def to(self, device: torch.device) -> DoraUpdate:
        return replace(self, update=self.update.to(device), magnitude=self.magnitude.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        moved_OI = self.update.apply(base_OI, rows)
        if self.by_column:
            magnitude, norm_axis = self.magnitude, 0
        else:
            magnitude, norm_axis = self.magnitude[rows.start : rows.stop, None], 1
        norms = torch.linalg.norm(moved_OI, dim=norm_axis, keepdim=True)
        merged_OI: Tensor = magnitude / norms * moved_OI
        return merged_OI


@dataclass(frozen=True)
class AddUpdate(Update):
    """W + Δ for a delta that is stored in full, float32 [O, I]. A bias is one row."""

    delta_OI: Tensor
    scale: float = 1.0  # for reports: the delta includes it

    rank = 1
    depends_on_base = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta_OI.shape[0], self.delta_OI.shape[1]

    def to(self, device: torch.device) -> AddUpdate:
        return replace(self, delta_OI=self.delta_OI.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        return base_OI + self.delta_OI[rows.start : rows.stop]

    def row_norms(self) -> Tensor | None:
        norms_O: Tensor = self.delta_OI.norm(dim=1)
        return norms_O


@dataclass(frozen=True)
class TokenRowsUpdate(Update):
    """Replaces some rows of an embedding by trained ones: row ``indices[t]`` by ``values_TI[t]``, float32 [tokens, I]."""

    indices: list[int]
    values_TI: Tensor

    @property
    def rank(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int]:
        return -1, self.values_TI.shape[1]

    def to(self, device: torch.device) -> TokenRowsUpdate:
        return replace(self, values_TI=self.values_TI.to(device))

    def fitted(self, matrix: tuple[int, int]) -> TokenRowsUpdate:
        if len(self.indices) != len(self.values_TI):
            raise AdapterError(
                f"adapter_config.json lists {len(self.indices)} trainable_token_indices, but the file contains "
                f"{len(self.values_TI)} trained rows: expected one index for each row"
            )
        # A row that the base does not have would be left out without a word.
        largest = max(self.indices, default=0)
        if largest >= matrix[0]:
            raise AdapterError(
                f"adapter_config.json has {str(largest)[:20]} among its trainable_token_indices, but the embedding of the base has "
                f"{matrix[0]} rows. Is this the base that the adapter was trained on?"
            )
        return self

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        merged_OI = base_OI.clone()
        for t, index in enumerate(self.indices):
            if rows.start <= index < rows.stop:
                merged_OI[index - rows.start] = self.values_TI[t]
        return merged_OI


@dataclass(frozen=True)
class OwnBaseUpdate(WrappingUpdate):
    """An update of values that the adapter itself brings, float32 [O, I]: an embedding as it was when LoRA was added to it."""

    base_OI: Tensor
    update: Update

    @property
    def whole(self) -> bool:
        return self.update.whole

    def to(self, device: torch.device) -> OwnBaseUpdate:
        return OwnBaseUpdate(self.base_OI.to(device), self.update.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        # The base's own values are not used: the delta was trained on these.
        return self.update.apply(self.base_OI[rows.start : rows.stop], rows)
