"""Text that the adapter model itself writes: calibration where there is no text of the task (LLM-QAT, arXiv 2305.17888)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.layered import LayeredModel, Pass
from qmerge.pipeline import RunContext, unmerged_values
from qmerge.planning.plan import Plan


def generated_tokens(
    plan: Plan, context: RunContext, tokens: int, length: int, seed: int, tell: Callable[[str], None]
) -> list[Tensor]:
    """int64 [sequences, length] each, sampled at temperature 1 from the start-of-text token on (from a random token, where
    the model has none).

    One token of all sequences at a time, layer by layer; the layers stay in memory where the float32 model fits twice
    into what is free, else each token reads them all again, which takes long.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    from transformers import DynamicCache

    writer = Writer(plan, context)
    generator = torch.Generator().manual_seed(seed)
    first = torch.full((max(1, tokens // length), 1), writer.start(generator))
    batches = [[ids] for ids in texts.split_batches(first, length)]
    caches = [DynamicCache(config=writer.model.model.config) for _ in batches]
    for position in range(1, length):
        tell(f"generating token {position + 1} of {length}")
        for batch, logits in zip(batches, writer.step([ids[-1] for ids in batches], caches), strict=True):
            odds = torch.softmax(logits[:, -1].float(), -1).cpu()
            batch.append(torch.multinomial(odds, 1, generator=generator))
    return [torch.cat(batch, dim=1) for batch in batches]


class Writer:
    """The unmerged adapter model, one step of generation at a time."""

    def __init__(self, plan: Plan, context: RunContext) -> None:
        self.steps = {step.name: step for step in plan.steps if step.weight.format != "raw"}
        self.context, self.config = context, plan.config
        self.model = LayeredModel(self.config, self.steps, context.device)
        size = 4 * sum(parameter.numel() for parameter in self.model.model.parameters())
        self.stays = 2 * size < psutil.virtual_memory().available
        for index in (None, *range(len(self.model))) if self.stays else (None,):
            self.model.load(index, self.model.names(index), self.values)

    def values(self, name: str) -> Tensor:
        return unmerged_values(self.steps[name], self.context, self.model.is_conv1d(name))

    def start(self, generator: torch.Generator) -> int:
        known = self.config.get("bos_token_id")
        model: Any = self.model.model
        vocabulary = int(model.get_input_embeddings().num_embeddings)
        return int(known) if isinstance(known, int) else int(torch.randint(vocabulary, (1,), generator=generator))

    def step(self, last: list[Tensor], caches: list[Any]) -> list[Tensor]:
        """Logits [sequences, 1, vocabulary] that follow the last tokens of every batch."""
        run: Any = self.model.model
        passes = [
            Pass(partial(run, input_ids=ids.to(self.context.device), past_key_values=cache, use_cache=True))
            for ids, cache in zip(last, caches, strict=True)
        ]
        found = [a_pass.step() for a_pass in passes]
        for index in range(len(self.model)):
            if not self.stays:
                self.model.load(index, self.model.names(index), self.values)
            found = [a_pass.step(self.model.run_layer(visit)) for a_pass, visit in zip(passes, found, strict=True)]
            if not self.stays:
                self.model.unload(index)
        return [output.logits for output in found]
