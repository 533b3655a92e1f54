"""Every architecture that the walk takes: the classes that transformers maps to a task, by ``model_type``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto as auto


@dataclass(frozen=True, order=True)
class Architecture:
    """A class of transformers that is built from the config of one ``model_type``.

    Attributes:
        head: its task, one of ``HEADS``.
        model_type: as in config.json.
        class_name: as in ``architectures`` of config.json.
    """

    head: str
    model_type: str
    class_name: str

    @property
    def name(self) -> str:
        """Names it on the command line."""
        return f"{self.head}:{self.model_type}"

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.class_name)


HEADS: dict[str, Any] = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "embedding": {name: auto.MODEL_MAPPING_NAMES[name] for name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES},
    "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "ctc": auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "speech": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}


def architectures() -> list[Architecture]:
    """All of them, heads in the order of ``HEADS``. A class that two heads share is in the first one only."""
    seen: set[tuple[str, str]] = set()
    result: list[Architecture] = []
    for head, mapping in HEADS.items():
        for model_type, names in sorted(mapping.items()):
            class_name = names if isinstance(names, str) else names[0]
            if (model_type, class_name) not in seen:
                seen.add((model_type, class_name))
                result.append(Architecture(head, model_type, class_name))
    return result
