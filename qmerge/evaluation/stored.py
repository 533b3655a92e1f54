"""What a model computes from the values that qmerge reads from its files, by transformers' own code in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration.layered import LayeredModel, Values
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.calibration.room import memory_limit
from qmerge.calibration.tasks import CAUSAL_LM, task_of
from qmerge.calibration.whole import WholeModel
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError, is_out_of_memory
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Weight
from qmerge.weights.values import dense_values

OUTPUTS: dict[tuple[str, ...], str] = {
    ("logits",): "logits",
    ("start_logits", "end_logits"): "start and end logits",
    ("text_embeds", "image_embeds"): "embeddings",
    ("last_hidden_state", "pooler_output"): "hidden states and pooled output",
    ("last_hidden_state",): "hidden states",
}
"""Fields of a model's result that are compared → what they are. The first that the result has are taken."""


def outputs_of(result: Any) -> tuple[Tensor, str]:
    """float32 outputs [1, …] of a model's result, and what they are."""
    for names, words in OUTPUTS.items():
        if all(getattr(result, name, None) is not None for name in names):
            return torch.cat([getattr(result, name).flatten() for name in names]).float()[None], words
    return result[0].float(), "outputs"


class CannotCompareError(CheckpointError):
    """The model of the stored values cannot be run here, or not on this input: the folder is not at fault."""


def stored_outputs(checkpoint: Checkpoint, inputs: Mapping[str, Any], reader: Reader) -> tuple[Tensor, str]:
    """float32 outputs [1, …] of the stored values of a model, and what they are, as ``outputs_of`` gives them.

    Args:
        inputs: arguments of its forward function.
        reader: of its tensors.

    Raises:
        CheckpointError: a parameter has no values.
        CannotCompareError: too little memory, or transformers' code does not take the inputs.
    """
    if task_of(checkpoint.config) is CAUSAL_LM:  # layer by layer, so that large models fit
        return stored_logits(checkpoint, inputs["input_ids"], reader).flatten()[None], "logits"
    model = whole_stored_model(checkpoint, checkpoint.config, reader, torch.device("cpu"))
    try:
        with torch.inference_mode():
            return outputs_of(model(**inputs))
    except Exception as cause:  # every architecture's own code may raise something else
        if is_out_of_memory(cause):
            raise CannotCompareError(f"memory ran out while {type(model).__name__} computed: {cause}") from cause
        raise CannotCompareError(f"{type(model).__name__} does not take {', '.join(inputs)} alone: {cause}") from cause


def whole_stored_model(
    checkpoint: Checkpoint, config: Mapping[str, Any], reader: Reader, device: torch.device
) -> Any:  # fmt: skip
    """transformers' model in float32 with the stored values of a checkpoint.

    Args:
        config: of the model.

    Raises:
        CheckpointError: transformers does not know the architecture, or a parameter has no values.
        CannotCompareError: it does not fit into memory.
    """
    whole = WholeModel(config)
    check_room(whole.nbytes, device)
    weights = weights_with_values(checkpoint)

    def values(name: str) -> Tensor:
        return dense_values(weights[name], reader, device, whole.is_conv1d(name))

    return whole.load(list(weights), values, device)


def check_room(needed: int, device: torch.device) -> None:
    """Raise CannotCompareError where fewer bytes than these are free on a device."""
    free = memory_limit(None, device)
    if needed > free:
        raise CannotCompareError(
            f"float32 values of whole models take {needed / 1e9:.1f} GB here, and {free / 1e9:.1f} GB of memory are free"
        )


def stored_logits(checkpoint: Checkpoint, ids_NL: Tensor, reader: Reader) -> Tensor:
    """float32 logits [N, L, V] of the stored values of a model, layer by layer.

    Args:
        ids_NL: token ids, int64 [N, L].
        reader: of its tensors.
    """
    return logits_layer_by_layer(*layered_stored_model(checkpoint, None, reader, ids_NL.device), ids_NL)


def layered_stored_model(
    checkpoint: Checkpoint, config: dict[str, Any] | None, reader: Reader, device: torch.device
) -> tuple[LayeredModel, Values]:
    """A model without weights, and the stored values of a checkpoint to load into it.

    Args:
        config: of the model; None for the checkpoint's own.
    """
    weights = weights_with_values(checkpoint)
    model = LayeredModel(config or checkpoint.config, weights, device)

    def values(name: str) -> Tensor:
        return dense_values(weights[name], reader, device, model.is_conv1d(name))

    return model, values


def weights_with_values(checkpoint: Checkpoint) -> dict[str, Weight]:
    """The weights that transformers loads as numbers, by name: not the ``raw`` tensors, such as integers."""
    return {name: weight for name, weight in checkpoint.weights.items() if weight.format != "raw"}


def logits_layer_by_layer(model: LayeredModel, values: Values, ids_NL: Tensor) -> Tensor:
    """float32 logits [N, L, V]."""
    run = LayerwiseRun(model, values, [ids_NL], with_head=True)
    with stopping([run]):
        run.start()
        for index in range(len(model)):
            run.run_layer(index)
        with model.loaded(None, values), torch.inference_mode():
            return run.logits(0).float()
