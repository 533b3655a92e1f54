"""Values that settings take, and names of settings that belong together."""

from __future__ import annotations

from typing import Literal

MergeOnto = Literal["dequantized", "original"]
EffortName = Literal["fast", "default", "best"]
TrainedOn = Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "none"]
Scales = Literal["keep", "fresh"]
Device = Literal["auto", "cpu", "cuda"]

AS_STORED: Literal["none"] = "none"
"""The value of ``trained_on`` for a base that training did not quantize in memory. Its files may be quantized."""

TRAINED_ON: dict[TrainedOn, tuple[str, bool | None]] = {
    "nf4": ("nf4", False),
    "nf4-dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4-dq": ("fp4", True),
    "int8": ("int8", None),
}
"""How a base was quantized in training → format, and whether with double quantization."""

OPTIONS = (
    "block_size", "double_quant", "quant_storage",
    "bits", "group_size", "sym", "act_order", "static_groups", "checkpoint_format",
)  # fmt: skip
"""Fields that say how a target format is written; every format names those that it takes (``accepted_options``)."""

PATHS = ("base", "adapter", "original", "out", "patch", "calibration", "verify")
"""Fields that take a ``Path``, too."""

INPUTS = ("base", "adapter", "original")
"""Fields that name a model or an adapter: a folder or a Hub id."""

REVISIONS = ("revision", "adapter_revision", "original_revision")
"""Fields for their revisions on the Hub, in the same order."""

AUTO_BASE = "auto"
"""The value of ``base`` for the model that the adapter names."""

WITHOUT_EFFECT_ON_WEIGHTS = {
    "out", "patch", "workers", "max_memory", "min_kept", "max_kl_ratio", "verify", "continuations", "push_to_hub", "private",
}  # fmt: skip
"""Fields that may differ between a run and its --resume, because no output byte of a weight depends on them."""

QUOTED_BEGINNINGS = 3
"""Beginnings of the held-out text in the report of a model that stays on this machine."""

CHAIN = "chain"
"""The value of ``combine`` for adapters that are applied one after the other. It is not a plug-in like the other ways to
combine deltas, because the delta of a later adapter may depend on what an earlier one made."""

CHAIN_HELP = (
    "Apply the adapters one after the other, in full and in order: each was trained on what those before it made."
)

RAY = "ray"
"""The value of ``workers`` for tasks of a Ray cluster."""

MOST_WORKERS = 256

MOST_TOKENS = 2**26
"""Tokens of a calibration: their ids take half a gigabyte."""

LARGEST_RANK = 2**16
"""Rank of a residual LoRA; no weight has more, since none has more rows and columns."""

DEFAULT_TARGET = "nf4"
"""The target of ``plan`` and ``measure`` where none is given."""

JUDGED_TOKENS = 20480
"""Tokens of a held-out text that fidelity is measured on: the hidden states of all of them are in memory, three times."""
