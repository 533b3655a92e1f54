"""Held-out examples for models that are judged whole: lines of a text file, or files in a folder → inputs and right answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.documents import JSON_SUFFIXES, json_rows, read_file
from qmerge.calibration.tasks import Task, shifted_right, without_start
from qmerge.errors import RecipeError, TokenizerError

MASKED_EVERY = 7
"""One token in so many is masked, about the share that masked language models are trained with (15 %)."""

NO_NUMBER = (
    "does not run on what --text reads, so there is no number for it. To get one, run base, unmerged and merged model on inputs of "
    "yours and compare their outputs; qmerge verify without --text checks that the model loads and computes what is stored"
)
"""End of a message about models that take something else."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One input.

    inputs   arguments of the model's forward function
    answers  for each output that is judged, the right class or token, int64 [P]; −1 where it is not known
    at       positions of the sequence whose outputs are judged, int64; None for all
    """

    inputs: dict[str, Tensor]
    answers: Tensor
    at: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of token ids, of source and target together; 0 for an image."""
        return sum(ids.numel() for name, ids in self.inputs.items() if name.endswith("input_ids"))


def read_records(path: Path, task: Task) -> list[dict[str, Any]]:
    """The lines of a .jsonl file, or of a .txt file as ``{"text": …}``.

    Raises:
        RecipeError: it cannot be read, or has another form.
    """
    if not task.text:
        raise RecipeError(f"{path}: a model for {task.name} is compared on a folder of {task.media}")
    is_json = path.suffix in JSON_SUFFIXES
    if not is_json and not task.plain:
        raise RecipeError(f"{path}: for {task.name}, expected a .jsonl file with lines like {task.text}")
    records: list[dict[str, Any]] = []
    rows = json_rows(path) if is_json else _text_lines(path)
    for where, record in rows:
        missing = [field for field in FIELDS[task.judged] if not isinstance(record.get(field), str)]
        if missing:
            raise RecipeError(f"{where}: for {task.name}, expected {task.text}, found {', '.join(record)[:80]}")
        records.append(record)
    if not records:
        raise RecipeError(f"{path}: no examples; expected lines like {task.text}")
    return records


def _text_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        if line.strip():
            yield f"{path.name}, line {number}", {"text": line}


FIELDS: dict[str, tuple[str, ...]] = {
    "classes": ("text",),
    "classes of tokens": ("text",),
    "answer spans": ("question", "context"),
    "target tokens": ("source", "target"),
    "masked tokens": ("text",),
    "embeddings": ("text",),
}
"""What is judged → fields that a line must have."""


def make_examples(
    records: Sequence[dict[str, Any]],
    task: Task,
    *,
    tokenizer_folder: Path,
    config: Any,
    tokens: int | None,
    length: int,
) -> list[Example]:
    """Tokenize the beginning of a file.

    Args:
        config: transformers' config of the model.
        tokens: most tokens in all; None for no limit. There is at least one example.
        length: most tokens of an example; the rest of it is cut off.

    Raises:
        RecipeError: a label is none of the model's, or nothing can be judged.
        TokenizerError: the tokenizer cannot be loaded, has no mask, or makes tokens that the model does not know.
    """
    tokenizer = texts.load_tokenizer(tokenizer_folder)
    if task.judged == "masked tokens" and tokenizer.mask_token_id is None:
        raise TokenizerError(
            f"{tokenizer_folder}: the tokenizer has no mask token, which a model for {task.name} needs"
        )
    vocab_size = texts.vocab_size(config.to_dict())
    examples: list[Example] = []
    count = 0
    for record in records:
        example = _example(record, task, tokenizer=tokenizer, config=config, length=length)
        for ids in (example.inputs["input_ids"], example.answers):
            texts.check_vocabulary(ids.flatten().tolist(), vocab_size, tokenizer_folder)
        if example.at is not None and not len(example.at):
            continue  # too short for a mask
        count += example.tokens
        if examples and tokens is not None and count > tokens:
            break
        examples.append(example)
    if not examples:
        raise RecipeError(
            f"the text has no example that a model for {task.name} can be judged on: its lines are too short"
        )
    return examples


def _example(record: dict[str, Any], task: Task, *, tokenizer: Any, config: Any, length: int) -> Example:
    def encoded(*parts: str) -> dict[str, Tensor]:
        return dict(tokenizer(*parts, truncation=True, max_length=length, return_tensors="pt"))

    unknown = torch.tensor([-1])
    if task.judged == "answer spans":
        return Example(inputs=encoded(record["question"], record["context"]), answers=unknown)
    if task.judged == "target tokens":
        inputs = encoded(record["source"])
        # As Seq2SeqTrainer's data: the tokenizer's form for targets, which the decoder sees one position later.
        target = tokenizer(text_target=record["target"], truncation=True, max_length=length, return_tensors="pt")
        target_1L = without_start(config, target["input_ids"])
        inputs["decoder_input_ids"] = shifted_right(config, target_1L)
        return Example(inputs=inputs, answers=target_1L[0])
    pair = [record["text_pair"]] if isinstance(record.get("text_pair"), str) else []
    inputs = encoded(record["text"], *pair)
    if task.judged == "masked tokens":
        return _masked(inputs, tokenizer)
    if task.judged == "classes":
        return Example(inputs=inputs, answers=torch.tensor([class_of(record.get("label"), config)]))
    return Example(inputs=inputs, answers=torch.full_like(inputs["input_ids"][0], -1))


def _masked(inputs: dict[str, Tensor], tokenizer: Any) -> Example:
    """Every seventh token masked, special tokens not counted."""
    ids_L = inputs["input_ids"][0]
    special = tokenizer.get_special_tokens_mask(ids_L.tolist(), already_has_special_tokens=True)
    at = (torch.tensor(special) == 0).nonzero()[:, 0][MASKED_EVERY // 2 :: MASKED_EVERY]
    answers = ids_L[at].clone()
    ids_L[at] = tokenizer.mask_token_id
    return Example(inputs=inputs, answers=answers, at=at)


def class_of(label: Any, config: Any) -> int:
    """The number of a class from its number or its name; −1 for None.

    Raises:
        RecipeError: the model has no such class.
    """
    if label is None:
        return -1
    if isinstance(label, str) and label in config.label2id:
        return int(config.label2id[label])
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    known = ", ".join(map(str, list(config.label2id)[:10]))
    raise RecipeError(f"label {label!r}: the model has the classes 0 to {config.num_labels - 1} ({known})")
