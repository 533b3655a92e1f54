"""The walk over adapters: whatever peft can put on a model and merge, qmerge must merge, or refuse with its reason.

    python -m tests.walk.adapters [TYPE …] [--log FILE] [--docs]

prints a table of outcomes, for all types of peft or some. ``--log`` writes one line of JSON for each case; cases that the file
has as settled are not walked again. ``--docs`` puts the table into docs/adapters.md. The reference is peft's own unmerged model in
float32. All types take about 20 minutes of CPU time.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from qmerge.errors import QmergeError

from ..parity import stock
from .adapters_cases import PROMPTS, Case, cases
from .adapters_models import ARCHITECTURES

TOLERANCE = 4 * 15 * 2**-24 * math.sqrt(160)
"""Relative distance of outputs: float32 in another order (derived in tests/parity/test_merge.py), for sums of up to 160."""

SIZE = 0.02
"""Standard deviation of what is added to every trained parameter."""

KINDS = {
    "merged": "the outputs are those of peft's unmerged model",
    "as peft": "merged bit for bit as peft merges it, but peft's own unmerged model puts out something else",
    "peft cannot": "refused, and peft itself does not merge it into a model with the same outputs",
    "refused": "refused, though peft merges it",
    "WRONG": "merged, and the outputs are those of neither",
    "CRASH": "a traceback",
    "idle": "the adapter model puts out what the base does",
    "unbuilt": "peft does not put this adapter on this layer, or cannot compute with it",
}
"""Kind of outcome → what it means."""

SETTLED = ("merged", "as peft", "peft cannot", "idle", "unbuilt")
"""Kinds of outcome that a mend of qmerge does not change."""

DOCS = Path(__file__).parent.parent.parent / "docs" / "adapters.md"
BEGIN, END = "<!-- generated: python -m tests.walk.adapters -->\n", "<!-- end -->"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    kind    one of ``KINDS``
    reason  the message of the one who refused; else what is wrong
    exact   whether every tensor is bit for bit that of peft's merge_and_unload
    """

    kind: str
    reason: str = ""
    exact: bool = False


def walked(types: Iterable[str], log: Path | None) -> Iterator[tuple[Case, Outcome]]:
    """Every case of these types, or of all, with its outcome, which is appended to the log."""
    chosen = set(types)
    logged = read_log(log) if log and log.exists() else {}
    unbuilt: dict[tuple[str, str, str], Outcome] = {}
    for case in cases():
        if chosen and case.peft_type not in chosen:
            continue
        if case.name in logged and logged[case.name].kind in SETTLED:
            yield case, logged[case.name]
            continue
        result = outcome_of(case, unbuilt)
        if log:
            write_log(log, case, result)
        yield case, result


def outcome_of(case: Case, unbuilt: dict[tuple[str, str, str], Outcome]) -> Outcome:
    """The outcome of a case. What peft does not put on a layer at all, it does not with another option."""
    where = (case.peft_type, case.architecture, case.layers)
    if where in unbuilt and "target_parameters" not in case.options:
        return unbuilt[where]
    result = outcome(case)
    if case.variation == "basic" and result.kind == "unbuilt":
        unbuilt[where] = result
    return result


def outcome(case: Case) -> Outcome:
    """Build a case, train it, save it, merge it and compare."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = Path(folder, "adapter")
        try:
            wrapped = trained(case)
            unmerged = outputs(case, wrapped)
            wrapped.save_pretrained(adapter)
        except Exception as cause:  # peft refuses in many ways
            return Outcome("unbuilt", one_line(cause))
        if not bool(unmerged.isfinite().all()):
            return Outcome("unbuilt", "its outputs are not finite")
        if case.peft_type not in PROMPTS and torch.equal(unmerged, outputs(case, base_model(case))):
            return Outcome("idle")
        return merged_outcome(case, adapter, wrapped, unmerged)


def merged_outcome(case: Case, adapter: Path, wrapped: Any, unmerged: Tensor) -> Outcome:
    """Merge an adapter by qmerge and compare the outputs."""
    out = adapter.parent / "out"
    try:
        stock.merged(out, base_of(case.architecture), adapter, "fp32")
        merged = ARCHITECTURES[case.architecture].load(out)
    except QmergeError as refusal:
        assert not out.exists(), f"{case.name} was refused, but left an output folder"
        return Outcome("refused" if peft_merges(case, wrapped, unmerged) else "peft cannot", one_line(refusal))
    except Exception as cause:
        traceback.print_exc()
        return Outcome("CRASH", one_line(cause))
    distance = stock.distance(outputs(case, merged), unmerged)
    exact = is_exact(merged, wrapped)
    if distance < TOLERANCE:
        return Outcome("merged", exact=exact)
    return Outcome("as peft" if exact else "WRONG", f"distance of the outputs {distance:.1e}", exact)


def trained(case: Case) -> Any:
    """The adapter model by peft, with every parameter moved that training moves."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(case.peft_type)]
    settings = config(**{"task_type": ARCHITECTURES[case.architecture].task_type, **case.settings()})
    torch.manual_seed(3)
    wrapped = get_peft_model(base_model(case), settings, autocast_adapter_dtype=False).eval()
    # A parameter that the outputs do not depend on gets no gradient, and stays as it was: training cannot move it.
    ARCHITECTURES[case.architecture].outputs(wrapped).square().sum().backward()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.add_(torch.randn(parameter.shape) * SIZE)
                parameter.grad = None
    return wrapped


def peft_merges(case: Case, wrapped: Any, unmerged: Tensor) -> bool:
    """Whether peft's own merged model puts out what its unmerged one does."""
    try:
        merged = wrapped.merge_and_unload().eval()
        return stock.distance(outputs(case, merged), unmerged) < TOLERANCE
    except Exception:  # there is no merge, in as many ways
        return False


def is_exact(merged: nn.Module, wrapped: Any) -> bool:
    """Whether all parameters are bit for bit those of peft's own merge."""
    try:
        expected = wrapped.merge_and_unload().state_dict()
    except Exception:
        return False
    found = merged.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def outputs(case: Case, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return ARCHITECTURES[case.architecture].outputs(model)


def base_model(case: Case) -> nn.Module:
    return ARCHITECTURES[case.architecture].load(base_of(case.architecture))


@cache
def base_of(architecture: str) -> Path:
    """The checkpoint of an architecture, made once."""
    return ARCHITECTURES[architecture].save(Path(workplace().name, architecture.replace(" ", "_")))


@cache
def workplace() -> tempfile.TemporaryDirectory[str]:
    """A folder for this process."""
    return tempfile.TemporaryDirectory()


def one_line(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def read_log(log: Path) -> dict[str, Outcome]:
    """Name of a case → its outcome; the last one counts."""
    lines = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return {name: Outcome(kind, reason, exact) for name, kind, exact, reason in lines}


def write_log(log: Path, case: Case, result: Outcome) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps([case.name, result.kind, result.exact, result.reason]) + "\n")


# --- the table -------------------------------------------------------------------------------------------------------


def table(outcomes: list[tuple[Case, Outcome]]) -> str:
    """Counts by type of peft, as Markdown."""
    shown = [kind for kind in KINDS if kind not in ("idle", "unbuilt")]
    lines = [
        f"| peft_type | cases | {' | '.join(shown)} |",
        f"|---|{'---:|' * (len(shown) + 1)}",
    ]
    counts: dict[str, Counter[str]] = {}
    for case, result in outcomes:
        counts.setdefault(case.peft_type, Counter())[result.kind] += 1
    counts["**all**"] = sum(counts.values(), Counter())
    for peft_type, count in counts.items():
        built = sum(count[kind] for kind in shown)
        if built:
            numbers = [str(count[kind] or "") for kind in shown]
            lines.append(f"| {peft_type} | {built} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def summary(outcomes: list[tuple[Case, Outcome]]) -> str:
    """The figures that matter, in one sentence."""
    count = Counter(result.kind for _, result in outcomes)
    exact = sum(result.exact for _, result in outcomes if result.kind == "merged")
    mergeable = count["merged"] + count["refused"] + count["WRONG"] + count["CRASH"]
    share = 100 * count["merged"] / max(1, mergeable)
    return (
        f"Of {mergeable} adapters that peft {peft_version()} merges correctly, qmerge merges {count['merged']} ({share:.1f} %), "
        f"{exact} of them bit for bit as peft does.\n"
    )


def peft_version() -> str:
    import peft

    return str(peft.__version__)


def write_docs(text: str) -> None:
    """Put the text between the marks in docs/adapters.md."""
    page = DOCS.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args()
    outcomes = list(walked(options.types, options.log))
    text = f"{summary(outcomes)}\n{table(outcomes)}"
    print(text)
    if options.docs:
        write_docs(text)


if __name__ == "__main__":
    main()
