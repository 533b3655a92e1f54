"""Text that the adapter model itself writes, to calibrate where no text of the task is at hand (LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.forward import ForwardPass
from qmerge.calibration.layered import LayeredModel
from qmerge.planning.plan import Plan
from qmerge.weights.context import RunContext
from qmerge.weights.values import unmerged_values


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
    from transformers import DynamicCache

    generator_model = _GeneratorModel(plan, context)
    random = torch.Generator().manual_seed(seed)
    first_ids = torch.full((max(1, tokens // length), 1), generator_model.first_token(random))
    # Per batch: columns of token ids, [sequences, 1] each.
    columns_of_batch = [[ids] for ids in texts.split_batches(first_ids, length)]
    caches = [DynamicCache(config=generator_model.model.model.config) for _ in columns_of_batch]
    for position in range(1, length):
        report_progress(f"generating token {position + 1} of {length}")
        last_columns = [columns[-1] for columns in columns_of_batch]
        all_logits = generator_model.next_logits(last_columns, caches)
        for columns, logits in zip(columns_of_batch, all_logits, strict=True):
            probabilities = torch.softmax(logits[:, -1].float(), -1).cpu()
            columns.append(torch.multinomial(probabilities, 1, generator=random))
    return [torch.cat(columns, dim=1) for columns in columns_of_batch]


class _GeneratorModel:
    """The unmerged adapter model, one token of all sequences at a time."""

    def __init__(self, plan: Plan, context: RunContext) -> None:
        self.steps = {step.name: step for step in plan.steps if step.weight.format != "raw"}
        self.context = context
        self.config = plan.config
        self.model = LayeredModel(self.config, self.steps, context.device)
        nbytes = 4 * sum(parameter.numel() for parameter in self.model.model.parameters())
        self.keeps_layers = 2 * nbytes < psutil.virtual_memory().available
        self._load(None)
        if self.keeps_layers:
            for index in range(len(self.model)):
                self._load(index)

    def first_token(self, random: torch.Generator) -> int:
        """The start-of-text token of the config, else a random token."""
        start_of_text = self.config.get("bos_token_id")
        if isinstance(start_of_text, int):
            return int(start_of_text)
        model: Any = self.model.model
        vocab_size = int(model.get_input_embeddings().num_embeddings)
        return int(torch.randint(vocab_size, (1,), generator=random))

    def next_logits(self, last_ids: Sequence[Tensor], caches: Iterable[Any]) -> list[Tensor]:
        """Logits [sequences, 1, vocabulary] of every batch for the token after ``last_ids`` [sequences, 1]."""
        model: Any = self.model.model
        passes: list[ForwardPass] = []
        for ids, cache in zip(last_ids, caches, strict=True):
            input_ids = ids.to(self.context.device)
            passes.append(ForwardPass(partial(model, input_ids=input_ids, past_key_values=cache, use_cache=True)))
        results = [forward_pass.advance() for forward_pass in passes]
        for index in range(len(self.model)):
            if not self.keeps_layers:
                self._load(index)
            for batch, forward_pass in enumerate(passes):
                results[batch] = forward_pass.advance(self.model.run_layer(results[batch]))
            if not self.keeps_layers:
                self.model.unload(index)
        return [output.logits for output in results]

    def _load(self, index: int | None) -> None:
        self.model.load(index, self.model.names(index), self._values)

    def _values(self, name: str) -> Tensor:
        return unmerged_values(self.steps[name], self.context, self.model.is_conv1d(name))
