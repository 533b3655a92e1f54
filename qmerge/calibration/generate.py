"""Text that the adapter model itself writes, to calibrate where no text of the task is at hand (LLM-QAT, arXiv 2305.17888).

Sequences start from what ``starts.py`` gives. Where the tokenizer has a chat template, some start from an open turn of the user:
the model writes a question and then the answer (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration.forward import ForwardPass
from qmerge.calibration.layered import LayeredModel, Values
from qmerge.calibration.room import memory_limit
from qmerge.calibration.starts import Start, Starts
from qmerge.calibration.unmerged import unmerged_model
from qmerge.planning.plan import Plan
from qmerge.progress import announced
from qmerge.weights.context import RunContext

GENERATED_LENGTH = 256
"""Tokens per sequence, …"""

LARGE_MODEL = 2 * 10**9
"""… up to this number of parameters, …"""

LENGTH_OF_LARGE = 128
"""… and above it: such a model seldom fits into memory, and is read again for every token of a sequence. SmolLM2-135M, whose
default has KL ratio 0.0104, has 0.0114 with sequences of 128 tokens."""


def generate_tokens(
    plan: Plan,
    context: RunContext,
    starts: Starts,
    *,
    tokens: int,
    length: int,
    seed: int,
    report_progress: Callable[[str], None],
) -> Tensor:
    """Sample sequences from the unmerged adapter model, at temperature 1 and from all tokens.

    Args:
        starts: what the sequences start from.
        tokens: how many in all, starts included; at least one sequence is written.
        length: tokens per sequence, at most.
        report_progress: called with one line per token of a sequence.

    Returns:
        Token ids, int64 [sequences, length].

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    layered, values = unmerged_model(plan, context)
    # What is written must not depend on the memory that is free, or a run could not be resumed when that has changed.
    length = min(length, LENGTH_OF_LARGE if _parameter_count(layered) > LARGE_MODEL else GENERATED_LENGTH)
    count = max(1, tokens // length)
    random = torch.Generator().manual_seed(seed)
    writers = [_Writer(mine, starts.turn_end) for mine in starts.for_sequences(count, random)]
    model: _WholeModel | _StreamedModel
    fits = fits_whole(layered, plan.recipe.max_memory)
    model = _WholeModel(layered, values) if fits else _StreamedModel(layered, values)
    cache = model.new_cache()
    ids = torch.empty(count, length, dtype=torch.int64)
    ids[:, 0] = torch.tensor([writer.first() for writer in writers])
    for position in announced(range(1, length), f"generating {count} sequences: token", report_progress, first=2):
        sampled = _sample(model.next_logits(ids[:, position - 1 : position], cache), random)
        for number, writer in enumerate(writers):
            ids[number, position] = writer.next(sampled[number])
    return ids


def _sample(logits: Tensor, random: torch.Generator) -> list[int]:
    """One token id per row of logits [sequences, vocabulary]."""
    # Half the time of torch.multinomial, which draws a random number per token of the vocabulary.
    cumulative = torch.softmax(logits.float(), -1).cumsum(-1).cpu()  # where the random generator is
    drawn = torch.rand(len(cumulative), 1, generator=random) * cumulative[:, -1:]
    positions = torch.searchsorted(cumulative, drawn, right=True).clamp(max=cumulative.shape[-1] - 1)
    ids: list[int] = positions.flatten().tolist()
    return ids


class _Writer:
    """One sequence: says which token comes next, the sampled one or a given one.

    Args:
        starts: of the first text, and of those that follow when a chat has ended.
    """

    def __init__(self, starts: Iterator[Start], turn_end: int | None) -> None:
        self._starts = starts
        self._turn_end = turn_end
        self._given: deque[int] = deque()
        self._reply: Sequence[int] = ()
        self._is_chat = False
        self._begin()

    def first(self) -> int:
        """The first token id."""
        return self._given.popleft()

    def next(self, sampled: int) -> int:
        """The next token id."""
        if self._given:
            return self._given.popleft()
        if sampled == self._turn_end and self._is_chat:
            if self._reply:  # the user's turn ends: the assistant's begins
                self._given.extend(self._reply)
                self._reply = ()
            else:
                self._begin()
        return sampled

    def _begin(self) -> None:
        start = next(self._starts)
        self._given.extend(start.ids)
        self._reply = start.reply
        self._is_chat = start.is_chat


def fits_whole(layered: LayeredModel, max_memory: str | None) -> bool:
    """Whether the float32 values of a model fit twice into memory.

    Args:
        max_memory: of the recipe; None for what is free.
    """
    return 2 * 4 * _parameter_count(layered) < memory_limit(max_memory, layered.device)


def _parameter_count(layered: LayeredModel) -> int:
    return sum(parameter.numel() for parameter in layered.model.parameters())


class _WholeModel:
    """The unmerged adapter model in memory, as transformers runs it."""

    def __init__(self, layered: LayeredModel, values: Values) -> None:
        self._model = layered.load_whole(values)
        self._device = layered.device

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return _new_cache(self._model)

    def next_logits(self, last_ids: Tensor, cache: Any) -> Tensor:
        """Logits [sequences, vocabulary] for the token after ``last_ids`` [sequences, 1]; those before are in the cache."""
        with torch.inference_mode():
            output = self._model(input_ids=last_ids.to(self._device), past_key_values=cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits


class _StreamedModel:
    """The same, with one decoder layer in memory at a time."""

    def __init__(self, layered: LayeredModel, values: Values) -> None:
        self._layered = layered
        self._values = values
        layered.load(None, layered.names(None), values)

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return _new_cache(self._layered.model)

    def next_logits(self, last_ids: Tensor, cache: Any) -> Tensor:
        """As that of ``_WholeModel``."""
        model: Any = self._layered.model
        input_ids = last_ids.to(self._layered.device)
        forward_pass = ForwardPass(partial(model, input_ids=input_ids, past_key_values=cache, use_cache=True))
        try:
            result = forward_pass.advance()
            for index in range(len(self._layered)):
                with self._layered.loaded(index, self._values):
                    result = forward_pass.advance(self._layered.run_layer(result))
        finally:
            forward_pass.stop()
        logits: Tensor = result.logits[:, -1]
        return logits


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)
