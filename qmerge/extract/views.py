"""What an extraction is to a user: JSON, warnings and a table."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import listed
from qmerge.extract.decompose import ENOUGH, Fit, entries, kept, numbers, ratio
from qmerge.extract.pairing import Pair
from qmerge.formats import get_format
from qmerge.report.terminal.console import printable, stdout
from qmerge.wording import percent, percent_or_dash, size_text

ALIKE = 0.5
"""Fine-tuning changes weights by a few percent, two unrelated models differ by about 140 %."""

NO_MATTER = (
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version",
    "use_cache", "unsloth_version", "unsloth_fixed",
)  # fmt: skip
"""Keys of config.json that may differ between two checkpoints of one model."""


@dataclass(frozen=True)
class Other:
    """A weight that differs and is no linear layer. ``delta``, ``base``: squared norms, None where it holds no numbers.
    ``saved``: ``modules_to_save``, ``lora_bias`` or None (lost)."""

    name: str
    module: str
    delta: float | None
    base: float | None
    savable: str | None
    saved: str | None = None


@dataclass(frozen=True)
class Extraction:
    """What was written, and what it lost."""

    merged: str
    base: str
    out: Path
    fits: tuple[Fit, ...]
    others: tuple[Other, ...]
    identical: int
    nbytes: int
    warnings: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, list[Fit]]:
        """By last part of the module name."""
        found: dict[str, list[Fit]] = defaultdict(list)
        for fit in self.fits:
            found[fit.module.rpartition(".")[2]].append(fit)
        return dict(found)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "merged": self.merged,
            "base": self.base,
            "out": str(self.out),
            "bytes": self.nbytes,
            "identical": self.identical,
            "total": numbers(self.fits),
            "groups": [{"name": name, **numbers(fits)} for name, fits in self.groups.items()],
            "weights": [{"name": fit.name, "shape": list(fit.shape), **numbers([fit])} for fit in self.fits],
            "others": [
                {"name": o.name, "relative_size": ratio(o.delta, o.base), "saved": o.saved} for o in self.others
            ],
            "warnings": list(self.warnings),
        }


# --- warnings --------------------------------------------------------------------------------------------------------


def warnings(found: Extraction, save_modules: bool) -> Iterator[str]:
    """What a user should know before using the adapter, the worst first."""
    total = numbers(found.fits)
    size = total["relative_size"]
    if size is None or size > ALIKE:
        much = "all" if size is None else percent(size)
        yield (
            f"MERGED − BASE is {much} of the weights; fine-tuning changes a few percent, unrelated models differ by about "
            f"140 %. Is BASE the model that MERGED was made from?"
        )
    if total["kept"] < ENOUGH:
        yield low_line(found, total)
    yield from others_lines(found, save_modules)


def between(merged: Checkpoint, base: Checkpoint, pairs: Sequence[Pair], found: Extraction) -> Iterator[str]:
    """What the headers and configs tell about the two."""
    forms = {(p.merged.format, p.base.format) for p in pairs if p.linear}
    for theirs, ours in sorted(forms):
        rounded = [name for name in (theirs, ours) if get_format(name).info.is_quantized]
        if rounded and theirs != ours and kept(found.fits) < ENOUGH:
            yield (
                f"MERGED is stored as {theirs}, BASE as {ours}: the delta also holds the rounding error of "
                f"{' and '.join(rounded)}, which no low rank keeps; two checkpoints of the same format may not have it"
            )
    keys = [
        key for key in sorted(merged.config.keys() & base.config.keys())
        if key not in NO_MATTER and merged.config[key] != base.config[key]
    ]  # fmt: skip
    if keys:
        yield f"config.json differs in {listed(keys, 5)}: an adapter cannot hold that, BASE keeps its own"


def low_line(found: Extraction, total: Mapping[str, Any]) -> str:
    shares = {name: kept(fits) for name, fits in found.groups.items()}
    worst = min(shares, key=lambda name: shares[name])
    first, last = total["rank"]
    rank = total["rank_90"]
    line = (
        f"the delta has a higher rank than {last if first == last else f'{first} to {last}'}, which keeps "
        f"{percent(total['kept'])} of it (worst: {worst}, {percent(shares[worst])}). "
    )
    line += f"Use --rank {rank} for 90 %." if total["rank_90_known"] else f"90 % would take --rank {rank} or more."
    if sum(entries(fit.shape, rank) for fit in found.fits) >= sum(math.prod(fit.shape) for fit in found.fits):
        line += " An adapter of that rank is as large as the weights: what was changed is not of low rank; keep MERGED."
    return line


def others_lines(found: Extraction, save_modules: bool) -> Iterator[str]:
    gone = [other for other in found.others if other.saved is None]
    if gone:
        sizes = [size for other in gone if (size := ratio(other.delta, other.base)) is not None]
        by = f" by up to {percent(max(sizes))}" if sizes else ""
        line = f"{len(gone)} weights that are no linear layers differ{by} and are not in the adapter: {listed(names(gone), 5)}."
        if any(other.savable for other in gone) and not save_modules:
            line += " --save-modules stores them as they are in MERGED."
        yield line
    biases = [other for other in found.others if other.saved == "lora_bias"]
    if biases:
        yield (
            f"{len(biases)} biases differ and are stored as lora_bias: the adapter can be used beside BASE, but neither peft "
            f"nor qmerge can merge it where a layer has no bias"
        )


def names(others: Iterable[Other]) -> list[str]:
    return [other.name for other in others]


# --- the terminal ----------------------------------------------------------------------------------------------------


def show(found: Extraction) -> None:
    """Results on stdout; the warnings are the caller's."""
    console = stdout()
    console.print(table(found))
    saved = [other for other in found.others if other.saved]
    if saved:
        console.print(escape(printable(f"Stored beside the LoRAs: {listed(names(saved), 5)}.")))
    if found.identical:
        console.print(f"{found.identical} linear layers are the same in both and get no LoRA.")
    console.print(escape(printable(f"Written to {found.out}: {size_text(found.nbytes)}.")))


def table(found: Extraction) -> Table:
    """By kind of module, at most 80 columns."""
    made = Table(title="What the adapter holds", title_justify="left", title_style="bold")
    made.add_column("modules")
    for name in ("n", "rank", "delta", "kept", "error", "rank for 90 %"):
        made.add_column(name, justify="right")
    for name, fits in found.groups.items():
        made.add_row(escape(printable(name)), *cells(numbers(fits)))
    made.add_section()
    made.add_row("all", *cells(numbers(found.fits)), style="bold")
    made.caption = "delta: of the weight; kept: of the delta's square; error: in deltas"
    made.caption_justify = "left"
    return made


def cells(values: Mapping[str, Any]) -> list[str]:
    low, high = values["rank"]
    rank = str(high) if low == high else f"{low}–{high}"
    needed = f"{'' if values['rank_90_known'] else '≥ '}{values['rank_90']}"
    return [
        str(values["n"]),
        rank,
        percent_or_dash(values["relative_size"]),
        percent_or_dash(values["kept"]),
        f"{values['error']:.2g}",
        needed,
    ]
