"""qmerge merges QLoRA adapters into quantized language models and measures how much of the fine-tuning survives.

    report = qmerge.merge(base="base-nf4", adapter="adapter", target="nf4", out="merged")

Importing this package is quick; torch and the rest are imported by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmerge.api import Report
    from qmerge.schema import FidelityRecord

__all__ = ["__version__", "fidelity", "measure", "merge", "plan"]
__version__ = "0.1.0"


def merge(**settings: Any) -> Report:
    """Merge an adapter into a base and write the model.

    Args:
        base: folder or Hub id of the model that the adapter was trained on.
        adapter: folder or Hub id of the PEFT adapter.
        target: ``nf4``, ``fp4``, ``int8``, ``fp16``, ``bf16`` or ``fp32``.
        out: folder to write to; new or empty. (``patch``: instead, the file to write; see docs/patch.md.)
        resume: go on with an interrupted run in ``out``.
        settings: any other field of ``qmerge.recipe.Recipe``.

    Returns:
        A ``Report``: ``report.kept`` is the share of the delta that survived; it shows itself in a notebook.

    Raises:
        qmerge.errors.QmergeError: see ``qmerge/errors.py``; nothing half-written carries a final name.
    """
    from qmerge import api

    return api.merge(settings)


def measure(*, targets: list[str] | None = None, **settings: Any) -> list[Report]:
    """The full run without writing: what would survive, for one or several targets. Settings as for ``merge``."""
    from qmerge import api

    return api.measure(settings, targets)


def fidelity(*, out: str, text: str, against: tuple[str, str] | None = None, **settings: Any) -> FidelityRecord:
    """Judge a merged model on held-out text: loss of base, unmerged and merged, gain kept, KL ratio, top-1 agreement.

    Args:
        out: a folder that qmerge wrote.
        text: a text or jsonl file that the model was not trained on.
        against: base and adapter; by default those of the folder's own recipe.
        settings: ``tokens`` (20480), ``sequence_length`` (512), ``device`` ("auto"), ``quiet``.
    """
    from qmerge import api

    return api.fidelity(out, text, against, **settings)


def plan(**settings: Any) -> dict[str, Any]:
    """Headers only: every weight and its action, bytes, memory, and predicted survival for every target.

    Settings as for ``merge``; ``target`` and ``out`` may be left out.
    """
    from qmerge.recipe import make_recipe
    from qmerge.report.describe.plan import describe_plan

    return describe_plan(make_recipe({"target": "nf4", **settings}), target_given="target" in settings)
