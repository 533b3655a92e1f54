"""A base without the head that the adapter was trained with: a language model, or an encoder, and a new classifier.

peft saves the head with the adapter (``modules_to_save``). The merged model is of the class that has this head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from qmerge.checkpoint.architecture import auto_classes, meta_model
from qmerge.checkpoint.names import Names
from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import AdapterError, listed
from qmerge.formats.base import NoOptions
from qmerge.types import DENSE_FORMATS, TensorInfo, Weight

AUTO_CLASSES = {
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
"""``task_type`` of an adapter → name of transformers' list of classes."""

HEADED = ("Classification", "QuestionAnswering", "ForCTC", "MultipleChoice")
"""Ends of the names of classes whose head is trained anew for a task."""


def with_head(base: Checkpoint, adapter: Mapping[str, Any], head: Mapping[str, TensorInfo]) -> Checkpoint:
    """The base as a model of the class that was trained, with the adapter's head.

    Weights that this class does not have (``lm_head``) are left out. A base that has this head already stays as it is.

    Args:
        adapter: adapter_config.json.
        head: the adapter's tensors of modules that were trained whole, by their names in the model.

    Raises:
        AdapterError: the class has no such head, or weights that neither base nor adapter stores.
    """
    class_name = _class_for(base, adapter)
    if class_name is None or not head:
        return base
    is_same_class = base.config.get("architectures") == [class_name]
    if is_same_class and all(name in base.weights and base.weights[name].shape == head[name].shape for name in head):
        return base
    config = {**base.config, "architectures": [class_name]}
    model = meta_model(config)
    labels = _label_count(model, head)
    if labels is not None:
        config = _with_labels(config, labels)
        model = meta_model(config)
    _check_head(model, head, class_name)
    names = Names(config, {name: weight.shape for name, weight in base.weights.items()})
    weights = {name: weight for name, weight in base.weights.items() if names.parameter_of(name) and name not in head}
    weights.update({name: _head_weight(name, info) for name, info in head.items()})
    _check_complete(model, names, head, class_name)
    return replace(base, config=config, weights=weights)


def head_note(base: Checkpoint) -> str:
    """What to know of a base that got its head from the adapter, in one line."""
    labels = list((base.config.get("id2label") or {}).values())
    named = f"Its labels are called {listed(labels)} in config.json" if labels else "config.json names no labels"
    return (
        f"the base has no head like the adapter's: the merged model is {base.config['architectures'][0]}, with the adapter's head. "
        f"{named}, and the adapter does not name them: set id2label, label2id and, for several labels or numbers, problem_type"
    )


def _class_for(base: Checkpoint, adapter: Mapping[str, Any]) -> str | None:
    """Name of the class that was trained: transformers' for the task, or the one that peft has noted; None where unknown."""
    import transformers

    task = str(adapter.get("task_type"))
    if task in AUTO_CLASSES:
        class_name = auto_classes(AUTO_CLASSES[task]).get(str(base.config.get("model_type")))
        return class_name if isinstance(class_name, str) else None
    # Without a task, peft notes the class of the model (auto_mapping).
    noted = (adapter.get("auto_mapping") or {}).get("base_model_class")
    if not isinstance(noted, str) or not noted.endswith(HEADED) or not hasattr(transformers, noted):
        return None
    config_class = getattr(getattr(transformers, noted), "config_class", None)
    return noted if getattr(config_class, "model_type", None) == base.config.get("model_type") else None


def _label_count(model: nn.Module, head: Mapping[str, TensorInfo]) -> int | None:
    """Number of labels of the head, where it is not that of the config: rows of the one layer that differs."""
    rows = set()
    for name, parameter in model.named_parameters():
        if name in head and head[name].shape[1:] == parameter.shape[1:] and head[name].shape != parameter.shape:
            rows.add(head[name].shape[0])
    return rows.pop() if len(rows) == 1 else None


def _with_labels(config: Mapping[str, Any], labels: int) -> dict[str, Any]:
    """The config with this many labels, named as transformers names them by default: the adapter has no names."""
    names = [f"LABEL_{number}" for number in range(labels)]
    id2label = {str(number): name for number, name in enumerate(names)}
    return {**config, "id2label": id2label, "label2id": {name: number for number, name in enumerate(names)}}


def _check_head(model: nn.Module, head: Mapping[str, TensorInfo], class_name: str) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, info in head.items():
        if shapes.get(name) != info.shape:
            found = f"{class_name} has {list(shapes[name])}" if name in shapes else f"{class_name} has no such weight"
            raise AdapterError(
                f"the adapter trained {name} {list(info.shape)} whole, but {found}. Merge onto the model that it was trained on, "
                f"saved with its head"
            )


def _check_complete(model: Any, names: Names, head: Mapping[str, TensorInfo], class_name: str) -> None:
    """Raise AdapterError for a weight of the class that neither base nor adapter stores."""
    tied = getattr(model, "all_tied_weights_keys", {})
    missing: list[str] = []
    for name, _ in model.named_parameters():
        if name not in head and name not in tied and not names.blocks_of(name):
            missing.append(name)
    if missing:
        raise AdapterError(
            f"{class_name}, which the adapter was trained with, has {listed(missing)}, which neither the base nor the adapter "
            f"stores: training began with random values there, which are lost. Merge onto the model that it was trained on "
            f"(save_pretrained of the base model, before training), or list these modules in modules_to_save"
        )


def _head_weight(name: str, info: TensorInfo) -> Weight:
    """A weight of the head, stored in the adapter's file."""
    module, _, local = name.rpartition(".")
    return Weight(
        module=module,
        local=local,
        format=DENSE_FORMATS[info.dtype],
        shape=info.shape,
        parts={local: info},
        options=NoOptions(),
    )
