"""What adapters do to one weight: the arithmetic, in float32, without files or options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qmerge.errors import AdapterError
from qmerge.types import Rows, Update

FEWEST_ROWS = 16


@dataclass(frozen=True)
class LoraUpdate:
    """A_RI and B_OR are float32."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float

    whole = False

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
        return base_OI + product_OI[rows.start - start : rows.stop - start] * self.scale

    def row_norms(self) -> Tensor:
        return self._row_norms_O

    @cached_property
    def _row_norms_O(self) -> Tensor:
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
        return (Q_OR @ u_RR[:, : len(s_R)]).float(), s_R.float(), (Q_IR @ vt_RR.T[:, : len(s_R)]).float()


def fitted(update: Update, shape: tuple[int, int]) -> Update:
    """The update for a weight of this shape, where its tensors alone leave open what they are."""
    return update.fitted(shape) if hasattr(update, "fitted") else update


def needs_dense(update: Update) -> str:
    """Why an update, or a part of it, is merged onto 16- or 32-bit values only; empty where it is not so."""
    parts: tuple[Update, ...] = getattr(update, "updates", ())
    return getattr(update, "needs_dense", "") or next((why for part in parts if (why := needs_dense(part))), "")


def refuse_quantized(name: str, update: Update) -> None:
    """Raise AdapterError for an update that is right on the very values that training began with, and no others."""
    why = needs_dense(update)
    if why:
        raise AdapterError(
            f"{name} is quantized where the adapter is merged: {why}. Give the 16-bit model that it was trained on as "
            f"--base, or as --original with --merge-onto original"
        )


class OfTheBase:
    """What an update whose delta depends on the base says of that delta beforehand: nothing."""

    def row_norms(self) -> Tensor | None:
        return None

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return None


class Around(OfTheBase):
    """An update that has another one in it, with which it shares rank, scale and shape."""

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
class DoraUpdate(Around):
    """m / ‖W + s B A‖ · (W + s B A), row by row (arXiv 2402.09353, eq. 5); column by column in peft's embeddings, which lie as
    [tokens, features]. ``magnitude``: float32, one per row or column."""

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
        norms = torch.linalg.norm(moved_OI, dim=0 if self.by_column else 1, keepdim=True)
        magnitude = self.magnitude if self.by_column else self.magnitude[rows.start : rows.stop, None]
        merged_OI: Tensor = magnitude / norms * moved_OI
        return merged_OI


@dataclass(frozen=True)
class AddUpdate:
    """A delta that is there whole: float32 [O, I] (a bias is one row)."""

    delta_OI: Tensor
    scale: float = 1.0

    whole = False
    rank = 1

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

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return None


@dataclass(frozen=True)
class TokenRowsUpdate(OfTheBase):
    """Some rows of an embedding, trained whole: float32 [tokens, I]."""

    indices: list[int]
    values_TI: Tensor

    whole = False
    scale = 1.0

    @property
    def rank(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int]:
        return -1, self.values_TI.shape[1]

    def to(self, device: torch.device) -> TokenRowsUpdate:
        return replace(self, values_TI=self.values_TI.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        merged_OI = base_OI.clone()
        for place, index in enumerate(self.indices):
            if rows.start <= index < rows.stop:
                merged_OI[index - rows.start] = self.values_TI[place]
        return merged_OI


@dataclass(frozen=True)
class OwnBaseUpdate(Around):
    """An update of values that the adapter brings along (an embedding as it was when LoRA was put on it): float32 [O, I]."""

    base_OI: Tensor
    update: Update

    @property
    def whole(self) -> bool:
        return self.update.whole

    def to(self, device: torch.device) -> OwnBaseUpdate:
        return OwnBaseUpdate(self.base_OI.to(device), self.update.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        return self.update.apply(self.base_OI[rows.start : rows.stop], rows)
