"""Text that the adapter model itself writes, to calibrate where no text of the task is at hand (LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.forward import ForwardPass
from qmerge.calibration.unmerged import unmerged_model
from qmerge.planning.plan import Plan
from qmerge.weights.context import RunContext


def generate_tokens(
    plan: Plan,
    context: RunContext,
    *,
    tokens: int,
    length: int,
    seed: int,
    report_progress: Callable[[str], None],
) -> list[Tensor]:
    """Sample sequences from the unmerged adapter model, at temperature 1.

    Every sequence begins with the start-of-text token (with one random token, where the model has none). All sequences
    grow by one token at a time. The layers stay in memory where the float32 model fits twice into the free memory; else
    every token reads them all again, which is slow.

    Args:
        tokens: how many in all; at least one sequence is written.
        length: tokens per sequence.
        report_progress: called with one line per token of a sequence.

    Returns:
        Token ids, int64 [sequences, length] each.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    model = _GeneratorModel(plan, context)
    random = torch.Generator().manual_seed(seed)
    first_ids = torch.full((max(1, tokens // length), 1), model.first_token(random))
    batches = [_GrowingBatch(ids, model.new_cache()) for ids in texts.split_batches(first_ids, length)]
    for position in range(1, length):
        report_progress(f"generating token {position + 1} of {length}")
        for batch, logits in zip(batches, model.next_logits(batches), strict=True):
            probabilities = torch.softmax(logits[:, -1].float(), -1).cpu()  # where the random generator is
            batch.append(torch.multinomial(probabilities, 1, generator=random))
    return [batch.ids for batch in batches]


class _GrowingBatch:
    """Sequences that are being written: token ids so far, int64 [sequences, length], and the cache of keys and values."""

    def __init__(self, first_ids: Tensor, cache: Any) -> None:
        self.ids = first_ids
        self.cache = cache

    @property
    def last_ids(self) -> Tensor:
        """[sequences, 1]: all before are in the cache."""
        return self.ids[:, -1:]

    def append(self, next_ids: Tensor) -> None:
        """Add one token, int64 [sequences, 1], to every sequence."""
        self.ids = torch.cat([self.ids, next_ids], dim=1)


class _GeneratorModel:
    """The unmerged adapter model, one token of all sequences at a time."""

    def __init__(self, plan: Plan, context: RunContext) -> None:
        self.context = context
        self.config = plan.config
        self.model, self.values = unmerged_model(plan, context)
        nbytes = 4 * sum(parameter.numel() for parameter in self.model.model.parameters())
        self.keeps_layers = 2 * nbytes < psutil.virtual_memory().available
        self._load(None)
        if self.keeps_layers:
            for index in range(len(self.model)):
                self._load(index)

    def first_token(self, random: torch.Generator) -> int:
        """The start-of-text token of the config, else a random token."""
        start_of_text = self.config.get("bos_token_id")
        if isinstance(start_of_text, int):  # null where the model has none
            return int(start_of_text)
        model: Any = self.model.model
        vocab_size = int(model.get_input_embeddings().num_embeddings)
        return int(torch.randint(vocab_size, (1,), generator=random))

    def new_cache(self) -> Any:
        """An empty cache of keys and values for one batch."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.model.config)

    def next_logits(self, batches: Sequence[_GrowingBatch]) -> list[Tensor]:
        """Logits [sequences, 1, vocabulary] of every batch for its next token."""
        passes = [self._forward_pass(batch) for batch in batches]
        results = [forward_pass.advance() for forward_pass in passes]
        for index in range(len(self.model)):
            if not self.keeps_layers:
                self._load(index)
            for number, forward_pass in enumerate(passes):
                results[number] = forward_pass.advance(self.model.run_layer(results[number]))
            if not self.keeps_layers:
                self.model.unload(index)
        return [output.logits for output in results]

    def _forward_pass(self, batch: _GrowingBatch) -> ForwardPass:
        model: Any = self.model.model
        input_ids = batch.last_ids.to(self.context.device)
        return ForwardPass(partial(model, input_ids=input_ids, past_key_values=batch.cache, use_cache=True))

    def _load(self, index: int | None) -> None:
        self.model.load(index, self.model.names(index), self.values)
