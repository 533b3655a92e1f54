"""docs/models.md, from the outcomes of a walk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import peft
import transformers

from .architectures import HEADS
from .verdicts import CRASH, OK, REFUSED, UNBUILT, WRONG, Outcome

PAGE = Path(__file__).parents[2] / "docs/models.md"

TEXT = """# Models

qmerge knows no list of architectures: it asks transformers which tensors on disk make up which layer. This page says what that
gives for {count} classes of {types} model types, every one that transformers {transformers} maps to the tasks below.
`python -m tests.walk` in a clone writes it (about {minutes} minutes on one core); do not edit it.

Each row is a tiny model with random weights and the structure of its config class. peft {peft} adapts all linear layers
(`target_modules="all-linear"`) and all stacked experts (`target_parameters`), and moves every trained value at random.

- **fp32**: qmerge merges into fp32, and transformers loads the result. Every weight must be that of peft's own merge, and every
  output that of the unmerged adapter model; the number is the largest relative distance of an output. The base alone must
  answer otherwise.
- **nf4**: qmerge merges into NF4, and transformers loads the result. Every linear layer must have the values that
  bitsandbytes makes of the fp32 merge, bit for bit.

| verdict | fp32 | nf4 | |
|---|---|---|---|
{verdicts}

Of {weights} classes only the weights were compared, not the outputs: the note has the reason. Outputs are those of tokens (of
images and sounds, where the model takes nothing else), so the vision tower of a language model is compared by its weights.

Heads: {heads}.

The models that people fine-tune now (Qwen3 and 3.5, Gemma 3 and 4, gpt-oss, Llama 3 and 4, Ministral and Magistral, DeepSeek V3
and V4, GLM 4, Phi-4, Granite 4, Falcon-H1, SmolLM3) are also merged with their published config.json, scaled down, and the layers
that Unsloth and Axolotl adapt, into fp32, nf4, w4a16 and fp8: `tests/walk/test_current_models.py`.

| model type | heads | fp32 | nf4 | note |
|---|---|---|---|---|
"""

MEANINGS = {
    OK: "as described above",
    REFUSED: "qmerge refuses it, with the message in the note",
    UNBUILT: "transformers, peft or bitsandbytes cannot do it, not even with files of their own: the note has their message",
    WRONG: "not what it should be",
    CRASH: "an error that is not one of qmerge's",
}

MINUTES = 25


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole page."""
    ordered = sorted(outcomes, key=lambda outcome: (outcome.model_type, list(HEADS).index(outcome.head)))
    verdicts: list[str] = []
    for verdict, meaning in MEANINGS.items():
        counts = [Counter(outcome.fp32 for outcome in ordered)[verdict], Counter(o.nf4 for o in ordered)[verdict]]
        verdicts.append(f"| {verdict} | {counts[0]} | {counts[1]} | {meaning} |")
    text = TEXT.format(
        count=len(ordered),
        types=len({outcome.model_type for outcome in ordered}),
        transformers=transformers.__version__,
        peft=peft.__version__,
        minutes=MINUTES,
        verdicts="\n".join(verdicts),
        weights=sum(outcome.fp32 == OK and outcome.error is None for outcome in ordered),
        heads=", ".join(HEADS),
    )
    return text + "\n".join(_rows(ordered)) + "\n"


def _rows(outcomes: Iterable[Outcome]) -> list[str]:
    """One row for each model type, and one more for each head with another verdict or note."""
    merged: dict[tuple[str, str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        note = "; ".join(outcome.notes)
        merged.setdefault((outcome.model_type, outcome.fp32, outcome.nf4, note), []).append(outcome)
    rows: list[str] = []
    for (model_type, fp32, nf4, note), same in merged.items():
        errors = [outcome.error for outcome in same if outcome.error is not None]
        error = f" ({max(errors):.0e})" if errors else ""
        heads = ", ".join(outcome.head for outcome in same)
        rows.append(f"| `{model_type}` | {heads} | {fp32}{error} | {nf4} | {note} |")
    return rows


def listed(text: str) -> dict[str, tuple[str, str]]:
    """Name of each architecture on the page → its verdicts on fp32 and nf4."""
    found: dict[str, tuple[str, str]] = {}
    for model_type, heads, fp32, nf4 in re.findall(
        r"^\| `(\S+)` \| ([^|]*) \| (\w+)[^|]* \| (\w*) ?\|", text, re.MULTILINE
    ):
        for head in heads.split(", "):
            found[f"{head}:{model_type}"] = (fp32, nf4)
    return found


def version(text: str) -> str:
    """The version of transformers that the page is about."""
    match = re.search(r"transformers (\S+) maps", text)
    assert match
    return match[1]
