"""Fidelity of models that are judged whole: classifiers, encoders, models with an encoder and a decoder.

Base, unmerged and merged model are in memory at the same time, as float32: these models are small, and the outputs of one of
them on a whole text (probabilities of every token, say) can be larger than the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.documents import read_texts
from qmerge.calibration.scores import Scores
from qmerge.calibration.tasks import CAUSAL_LM, Task, takes_text
from qmerge.calibration.unmerged import steps_with_values
from qmerge.calibration.whole import WholeModel
from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError, RecipeError
from qmerge.evaluation.examples import NO_NUMBER, Example, make_examples, read_records
from qmerge.evaluation.media import media_examples, media_files
from qmerge.evaluation.stored import check_room, whole_stored_model
from qmerge.planning.plan import Plan
from qmerge.progress import announced
from qmerge.schema import FidelityRecord, Judged
from qmerge.weights.context import RunContext
from qmerge.weights.values import unmerged_values
from qmerge.wording import counted

Pooling = Literal["mean", "cls", "lasttoken"]

POOLING_MODES: dict[str, Pooling] = {
    "cls_token": "cls", "cls": "cls", "lasttoken": "lasttoken", "mean_tokens": "mean", "mean": "mean",
}  # fmt: skip
"""sentence-transformers' names of the ways that are measured here."""

OTHER_POOLING_MODES = ("max_tokens", "max", "mean_sqrt_len_tokens", "weightedmean_tokens", "weightedmean")


def whole_fidelity(
    plan: Plan,
    merged: Checkpoint,
    context: RunContext,
    text: Path,
    task: Task,
    *,
    tokens: int | None,
    length: int,
    report_progress: Callable[[str], None],
) -> FidelityRecord:
    """Compare three models on the examples of a file.

    Args:
        plan: of the unmerged model.
        merged: the stored model.
        tokens: most tokens in all examples; None for no limit.
        length: most tokens of an example.

    Raises:
        RecipeError: the file has another form.
        CheckpointError: the models do not fit into memory, or transformers cannot run them.
    """
    whole = WholeModel(plan.config)
    if not task.media and not takes_text(whole.model, task):
        raise RecipeError(f"{type(whole.model).__name__} {NO_NUMBER}")
    examples = _examples(text, task, plan, whole.model, tokens=tokens, length=length)
    check_room(3 * whole.nbytes, context.device)
    report_progress("measuring fidelity: loading base, unmerged and merged model")
    models = [
        _planned_model(plan, context, with_delta=False),
        _planned_model(plan, context),
        whole_stored_model(merged, plan.config, context.reader, context.device),
    ]
    judged = _judged(task, whole.model.config)
    pooling = pooling_of(plan.inputs.base.folder)
    scores = Scores()
    numbers: list[list[Tensor]] = []
    for example in announced(examples, "measuring fidelity: example", report_progress):
        outputs = [_outputs(model, example, judged, pooling) for model in models]
        if judged == "scores":
            numbers.append([output for (output,) in outputs])
            continue
        for base, unmerged, merged_output in zip(*outputs, strict=True):
            _add(scores, judged, example, base=base, unmerged=unmerged, merged=merged_output)
    if numbers:
        # Those of all examples are one vector: the distance of a single one, relative to it, means nothing near zero.
        base, unmerged, merged_output = (torch.cat(of_model, dim=1) for of_model in zip(*numbers, strict=True))
        scores.add_vectors(base=base, unmerged=unmerged, merged=merged_output)
    lengths = [example.tokens for example in examples]
    return scores.record(
        text.name,
        tokens=sum(lengths),
        length=max(lengths),
        judged=judged,
        measured_on=f"{judged} of {counted(len(examples), 'example')} of {text.name}",
    )


def check_text(path: Path, task: Task) -> None:
    """Refuse a file or a folder that a model of this task cannot be judged on.

    Raises:
        RecipeError: it cannot be read, or has another form.
    """
    if task is CAUSAL_LM:
        read_texts(path)
    elif path.is_dir():
        media_files(path, task)
    else:
        read_records(path, task)


def _examples(
    path: Path, task: Task, plan: Plan, model: Any, *, tokens: int | None, length: int
) -> list[Example]:  # fmt: skip
    if path.is_dir():
        folder = plan.inputs.base.folder
        return media_examples(media_files(path, task), task, model=model, processor_folder=folder)
    return make_examples(
        read_records(path, task),
        task,
        tokenizer_folder=plan.inputs.tokenizer_folder,
        config=model.config,
        tokens=tokens,
        length=min(length, texts.max_sequence_length(plan.config)),
    )


def _planned_model(plan: Plan, context: RunContext, *, with_delta: bool = True) -> Any:
    """transformers' model in float32 with the values of the base, and of the updates if asked for."""
    whole = WholeModel(plan.config)
    steps = steps_with_values(plan)

    def values(name: str) -> Tensor:
        return unmerged_values(steps[name], context, whole.is_conv1d(name), with_delta)

    return whole.load(list(steps), values, context.device)


def _judged(task: Task, config: Any) -> Judged:
    """A classifier with one class puts out a number (regression)."""
    return "scores" if task.judged == "classes" and config.num_labels == 1 else task.judged


def _outputs(model: Any, example: Example, judged: Judged, pooling: Pooling) -> list[Tensor]:
    """float32 outputs [P, …] of one example: one tensor, or two for the start and the end of an answer."""
    inputs = {name: value.to(model.device) for name, value in example.inputs.items()}
    with torch.inference_mode():
        result = model(**inputs)
    if judged == "answer spans":
        return [result.start_logits.float(), result.end_logits.float()]
    if judged == "embeddings":
        return [embedding(result.last_hidden_state, pooling)]
    logits: Tensor = result.logits.float()
    if logits.ndim == 3:
        logits = logits[0]
    if example.at is not None:
        logits = logits[example.at.to(logits.device)]
    if judged == "classes" and model.config.problem_type == "multi_label_classification":
        # Each class by itself, yes or no.
        return [torch.stack([torch.zeros_like(logits), logits], dim=-1).flatten(0, 1)]
    return [logits]


def _add(
    scores: Scores, judged: Judged, example: Example, *, base: Tensor, unmerged: Tensor, merged: Tensor
) -> None:  # fmt: skip
    if judged == "embeddings":
        scores.add_vectors(base=base, unmerged=unmerged, merged=merged)
        return
    answers = example.answers.to(base.device)
    if len(answers) != len(base):  # several classes at once, whose answers are not read
        answers = torch.full((len(base),), -1, device=base.device)
    scores.add(answers, base=base, unmerged=unmerged, merged=merged)


def embedding(hidden_1LH: Tensor, pooling: Pooling) -> Tensor:
    """The embedding of a text, float32 [1, H], of length 1."""
    if pooling == "cls":
        pooled = hidden_1LH[:, 0]
    elif pooling == "lasttoken":
        pooled = hidden_1LH[:, -1]
    else:
        pooled = hidden_1LH.mean(dim=1)
    return torch.nn.functional.normalize(pooled.float(), dim=-1)


def pooling_of(folder: Path) -> Pooling:
    """How sentence-transformers pools the hidden states of a model: as its ``*_Pooling/config.json`` says, else their mean.

    Raises:
        CheckpointError: the file names a way that is not known here.
    """
    for path in sorted(folder.glob("*_Pooling/config.json")):
        settings = read_json(path, CheckpointError)
        modes = {name.removeprefix("pooling_mode_") for name, value in settings.items() if value is True}
        modes |= {str(settings["pooling_mode"])} if "pooling_mode" in settings else set()
        modes &= {*POOLING_MODES, *OTHER_POOLING_MODES}
        if modes - POOLING_MODES.keys() or len(modes) > 1:
            raise CheckpointError(f"{path} pools by {', '.join(sorted(modes))}; qmerge measures mean, cls or lasttoken")
        if modes:
            return POOLING_MODES[modes.pop()]
    return "mean"
