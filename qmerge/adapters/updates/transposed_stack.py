"""An update of a stack [E, I, O], as that of a matrix [E·O, I] with the matrices one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qmerge.adapters.updates.experts import StackUpdate
from qmerge.adapters.updates.lora import LoraUpdate, WrappingUpdate
from qmerge.types import Rows, Update


@dataclass(frozen=True)
class TransposedStackUpdate(WrappingUpdate):
    """Merged values are bit for bit those of ``update``, whose rows are the matrices, in the order of a dense checkpoint.

    matrix  (I, O) of every matrix
    """

    update: Update
    matrix: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        columns, rows = self.matrix
        return self.update.shape[0] * rows, columns

    @property
    def whole(self) -> bool:
        return self.update.whole

    @property
    def needs_dense(self) -> str:
        return self.update.needs_dense

    @property
    def depends_on_base(self) -> bool:
        return self.update.depends_on_base

    @property
    def members(self) -> tuple[Update, ...]:
        return self.update.members

    def to(self, device: torch.device) -> TransposedStackUpdate:
        return TransposedStackUpdate(self.update.to(device), self.matrix)

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        """``rows`` must be those of whole matrices."""
        columns, height = self.matrix
        matrices = Rows(rows.start // height, rows.stop // height)
        stack_EIO = base_OI.view(len(matrices), height, columns).transpose(1, 2)
        merged_EIO = self.update.apply(stack_EIO.reshape(len(matrices), -1), matrices).view(stack_EIO.shape)
        return merged_EIO.transpose(1, 2).reshape(base_OI.shape).contiguous()

    def row_norms(self) -> Tensor | None:
        if not isinstance(self.update, StackUpdate):
            return None
        norms = [torch.zeros(self.matrix[1])] * self.update.count
        for number in self.update.experts:
            norms[number] = self._lora(number).row_norms()
        return torch.cat(norms)

    def matrix_directions(self, number: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """``directions`` of one matrix [O, I]; None where it has no LoRA, or several."""
        if not isinstance(self.update, StackUpdate) or number not in self.update.experts:
            return None
        return self._lora(number).directions()

    def _lora(self, number: int) -> LoraUpdate:
        """The LoRA of one matrix [O, I]: (B A)ᵀ = Aᵀ Bᵀ."""
        assert isinstance(self.update, StackUpdate)
        lora = self.update.experts[number]
        return LoraUpdate(lora.B_OR.T, lora.A_RI.T, lora.scale)


def matrices_of(update: Update) -> int:
    """Matrices of the stack that an update changes; 1 for any other weight."""
    for member in update.members:
        if isinstance(member, StackUpdate):
            return member.count
    return 1
