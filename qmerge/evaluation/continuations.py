"""How base, unmerged and merged model go on with the beginning of a held-out text: numbers tell how much differs, these what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration.generate import fits_whole
from qmerge.calibration.layered import LayeredModel, Values
from qmerge.calibration.texts import load_tokenizer
from qmerge.calibration.unmerged import unmerged_model
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import QmergeError
from qmerge.evaluation.stored import layered_stored_model
from qmerge.planning.plan import Plan
from qmerge.schema import ContinuationRecord
from qmerge.weights.context import RunContext
from qmerge.weights.heap import release_freed_memory

PROMPT_TOKENS = 32
"""Tokens that are given, at most half of a sequence, …"""

NEW_TOKENS = 40
"""… and that each model writes."""

ModelAndValues = tuple[LayeredModel, Values]


def continue_texts(
    plan: Plan,
    merged: Checkpoint,
    context: RunContext,
    batches: Sequence[Tensor],
    *,
    count: int,
    report_progress: Callable[[str], None],
) -> list[ContinuationRecord]:
    """Let the three models go on with some beginnings, each with its likeliest token at every step.

    Nothing is written where the float32 values of a model do not fit into memory, because it would be read once per token, nor
    where transformers cannot generate with it.

    Args:
        merged: the merged model.
        batches: the held-out text, int64 [sequences, length] each.
        count: how many beginnings, from sequences all over the text.
    """
    tokenizer = load_tokenizer(plan.inputs.tokenizer_folder)
    prompts_NL = chosen_prompts(batches, count, tokenizer)
    makers: dict[str, Callable[[], ModelAndValues]] = {
        "base": lambda: unmerged_model(plan, context, with_delta=False),
        "unmerged": lambda: unmerged_model(plan, context),
        "merged": lambda: layered_stored_model(merged, plan.config, context.reader, context.device),
    }
    written: dict[str, list[str]] = {}
    for name, make in makers.items():
        report_progress(f"writing {count} continuations with the {name} model")
        model, values = make()
        whole: Any = model.model
        if not fits_whole(model, plan.recipe.max_memory) or not whole.can_generate():
            return []
        try:
            written[name] = _continued(model, values, prompts_NL, tokenizer)
        except QmergeError:
            raise
        except Exception:  # every architecture's own code may raise something else, and the scores are measured
            return []
        # One model at a time: the next one is as large.
        del model, values, whole
        release_freed_memory()
    prompts = [tokenizer.decode(ids) for ids in prompts_NL]
    records = []
    for number, prompt in enumerate(prompts):
        texts = {name: of_model[number] for name, of_model in written.items()}
        records.append(ContinuationRecord(prompt=prompt, **texts))
    return records


def chosen_prompts(batches: Sequence[Tensor], count: int, tokenizer: Any) -> Tensor:
    """Beginnings from ``count`` sequences (or from all, where there are fewer), evenly spaced over the text.

    In each sequence, where a document begins, else a paragraph, else a line, else the sequence itself.

    Returns:
        int64 [count, length].
    """
    sequences_NL = torch.cat([batch for batch in batches if batch.shape[1] == batches[0].shape[1]])
    count = min(count, len(sequences_NL))
    # Of short sequences, half: a beginning must not be the whole text.
    length = max(1, min(PROMPT_TOKENS, sequences_NL.shape[1] // 2))
    prompts = []
    for number in range(count):
        ids_L = sequences_NL[len(sequences_NL) * number // count]
        start = _start(ids_L[:-length].tolist(), tokenizer)
        prompts.append(ids_L[start : start + length])
    return torch.stack(prompts)


def _start(ids: list[int], tokenizer: Any) -> int:
    """The position after the first end-of-text token, else after the first blank line, else after the first line, else 0."""
    if tokenizer.eos_token_id in ids:
        return ids.index(tokenizer.eos_token_id) + 1
    # Some tokens at a time: a line break may be two of them.
    ends = [tokenizer.decode(ids[max(0, end - 3) : end]) for end in range(1, len(ids) + 1)]
    for line_break in ("\n\n", "\n"):
        for end, text in enumerate(ends, start=1):
            if text.endswith(line_break):
                return end
    return 0


def _continued(layered: LayeredModel, values: Values, prompts_NL: Tensor, tokenizer: Any) -> list[str]:
    """What a model writes after each prompt, without the prompt."""
    model = layered.load_whole(values)
    prompts_NL = prompts_NL.to(layered.device)
    with torch.inference_mode():
        ids_NL = model.generate(
            input_ids=prompts_NL,
            attention_mask=torch.ones_like(prompts_NL),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id or 0,
        )
    texts = []
    for ids in ids_NL[:, prompts_NL.shape[1] :].tolist():
        # After its end, a text is filled up to the length of the longest.
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        texts.append(tokenizer.decode(ids[:end]))
    return texts
