"""The input and the output embedding: their names, and whether the adapter makes two tied ones different."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from qmerge.adapters.updates.lora import TokenRowsUpdate
from qmerge.checkpoint.architecture import embedding_weights, tied_embedding_weights
from qmerge.errors import AdapterError
from qmerge.planning.inputs import Inputs
from qmerge.planning.modules import NUMBERED
from qmerge.types import Change, Replacement, Update

Pair = tuple[str, str]
"""Names of the input and the output embedding, as on disk. (A tied output embedding is not on disk: its name in
memory.)"""


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of the base, and what the adapter does to them."""

    inputs: Inputs

    @cached_property
    def both(self) -> Pair | None:
        """Their names, tied or not; None where transformers does not know the architecture."""
        return self._on_disk(embedding_weights(self.inputs.base.config))

    @cached_property
    def tied(self) -> Pair | None:
        """Their names where the base ties them and the adapter changes anything outside the numbered layers."""
        adapter = self.inputs.adapter
        changed = (*adapter.updates, *adapter.replaced)
        # Embeddings are outside the layers. Finding their names takes seconds, because the model is built without weights.
        if all(NUMBERED.search(name) for name in changed):
            return None
        return self._on_disk(tied_embedding_weights(self.inputs.base.config))

    @cached_property
    def untied(self) -> Pair | None:
        """Their names where the base ties them and the adapter makes them different, so that both must be written.

        Raises:
            AdapterError: one of several adapters trained rows of both, another one changes one of them.
        """
        tied = self.tied
        if tied is None or tied[0] not in self.inputs.base.weights:
            return None
        input_change, output_change = (self._change_of(name) for name in tied)
        # Both stay as they are, and tied.
        if input_change is None and output_change is None:
            return None
        self._check_several(tied, input_change, output_change)
        # A base may store both although its config ties them. Then both are written, whatever values they have.
        if tied[1] in self.inputs.base.weights:
            return tied
        # The adapter may bring the same values for both.
        if _are_same_values(input_change, output_change):
            return None
        if output_change is None and self._change_is_shared(input_change):
            return None
        return tied

    @cached_property
    def shared(self) -> dict[str, Change]:
        """The change of an output embedding that is on disk although it is tied, where the adapter has it for the input
        embedding only."""
        if self.untied is None or self.untied[1] not in self.inputs.base.weights:
            return {}
        input_change, output_change = (self._change_of(name) for name in self.untied)
        if input_change is None or output_change is not None or not self._change_is_shared(input_change):
            return {}
        return {self.untied[1]: input_change}

    def _on_disk(self, names: Pair | None) -> Pair | None:
        if names is None:
            return None
        input_name, output_name = names
        return self._name_on_disk(input_name), self._name_on_disk(output_name)

    def _name_on_disk(self, name: str) -> str:
        if name in self.inputs.base.weights:
            return name
        blocks = self.inputs.names.blocks_of(name)
        return blocks[0].weight if blocks else name

    def _change_of(self, name: str) -> Update | Replacement | None:
        adapter = self.inputs.adapter
        return adapter.replaced.get(name) or adapter.updates.get(name)

    def _change_is_shared(self, input_change: Update | Replacement | None) -> bool:
        """Whether a change of the input embedding counts for the output embedding too."""
        # peft puts trained tokens into both embeddings, and everything with ensure_weight_tying.
        return all(_trains_rows(input_change)) or bool(self.inputs.adapter.config.get("ensure_weight_tying"))

    def _check_several(
        self, tied: Pair, input_change: Update | Replacement | None, output_change: Update | Replacement | None
    ) -> None:
        trains_rows = _trains_rows(input_change)
        if len(self.inputs.adapter_sources) < 2 or not any(trains_rows):
            return
        if not all(trains_rows) or output_change is not None:
            raise AdapterError(
                f"{tied[0]} is tied to {tied[1]}; one adapter trained rows of both, another one changes only one of them: "
                f"merge one by one"
            )


def _trains_rows(change: Update | Replacement | None) -> list[bool]:
    """For each adapter's part of a change, whether it trained single rows (``trainable_token_indices``)."""
    members = change.members if isinstance(change, Update) else (change,)
    return [isinstance(member, TokenRowsUpdate) for member in members]


def _are_same_values(a: Update | Replacement | None, b: Update | Replacement | None) -> bool:
    return isinstance(a, Replacement) and isinstance(b, Replacement) and torch.equal(a.values, b.values)
