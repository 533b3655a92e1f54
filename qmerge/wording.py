"""Numbers and names in words: percentages, factors, ranges and sizes, as tables and messages show them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

DASH = "–"
"""A table shows this where a value does not exist."""

MOST_PERCENT = 2.0
"""Shares up to here are shown as percentages, so that those of one column are read alike."""


def percent(share: float) -> str:
    """A fraction of 1 as a percentage. ``0.0123`` → ``1.2 %``: two digits below 10 %, whole numbers above."""
    value = 100 * share
    if 0 < abs(value) < 0.01:
        return "< 0.01 %" if value > 0 else "> -0.01 %"
    if value == 0 or abs(value) >= 9.95:  # 9.95 would be shown as 10.0, three digits
        return f"{value:.0f} %"
    if abs(value) >= 0.95:
        return f"{value:.1f} %"
    return f"{value:.2f} %"


def times(ratio: float) -> str:
    """A factor. ``18.3`` → ``18x``, ``1.44`` → ``1.4x``."""
    if not ratio < 1e6:  # NaN and infinity, too
        return "over a million times"
    if ratio >= 9.95:
        return f"{ratio:.0f}x"
    return f"{ratio:.1f}x"


def decimal(value: float) -> str:
    """A ratio with two decimals; small ones that are not zero are ``< 0.01``."""
    if value >= 0.01 or value == 0:
        return f"{value:.2f}"
    return "< 0.01"


def percent_or_dash(share: float | None) -> str:
    """As ``percent``; a dash for None."""
    return DASH if share is None else percent(share)


def percent_with_tenths(share: float) -> str:
    """A fraction of 1 near 1, where tenths of a percent tell good from very good. ``0.9667`` → ``96.7 %``."""
    return f"{100 * share:.1f} %"


def share(value: float) -> str:
    """A share kept: a percentage up to 200 %, and a factor above. Tables explain what is above 100 %: it is too much.

    ``0.78`` → ``78 %``, ``1.33`` → ``133 %``, ``7.0`` → ``7.00x``.
    """
    return percent(value) if value <= MOST_PERCENT else f"{value:.2f}x"


def exceeds_all(value: float | None) -> bool:
    """Whether a share kept is above 100 %, rounded to whole percents."""
    return value is not None and round(100 * value) > 100


def share_or_dash(value: float | None) -> str:
    """As ``share``; a dash for None."""
    return DASH if value is None else share(value)


def kept_beside(noise: float | None, kept: float | None) -> str:
    """A share kept of the delta, in parentheses where noise is larger than the delta: ``(75 %)``."""
    text = share_or_dash(kept)
    return f"({text})" if kept is not None and noise is not None and noise > 1 else text


def decimal_or_dash(value: float | None) -> str:
    """As ``decimal``; a dash for None."""
    return DASH if value is None else decimal(value)


def fixed_or_dash(value: float | None, decimals: int) -> str:
    """So many decimals; a dash for None."""
    return DASH if value is None else f"{value:.{decimals}f}"


def size_text(nbytes: float) -> str:
    """Bytes in decimal units. ``2087432`` → ``2.09 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"


def counted(number: int, noun: str) -> str:
    """``1 warning``, ``2 warnings``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def module_names(modules: Sequence[str]) -> str:
    """Many modules, shortened to their kinds: ``q_proj, v_proj of 24 layers``. A single one keeps its whole name."""
    if len(modules) == 1:
        return modules[0]
    layers_of_kind = Counter(module.rpartition(".")[2] for module in modules)
    kinds_by_layers: dict[int, list[str]] = defaultdict(list)
    for kind, layers in layers_of_kind.items():
        kinds_by_layers[layers].append(kind)
    return "; ".join(f"{', '.join(kinds)} of {counted(layers, 'layer')}" for layers, kinds in kinds_by_layers.items())


def span(formatter: Callable[[float], str], values: Iterable[float | None]) -> str:
    """The smallest and the largest value, ``1.0 % to 3.4 %``; only one where both read the same. Without values, zero."""
    known = [value for value in values if value is not None] or [0.0]
    low = formatter(min(known))
    high = formatter(max(known))
    return low if low == high else f"{low} to {high}"


def article(target: str) -> str:
    """What follows "a" before the name of a target: ``n`` for "an NF4 step", nothing for "a GPTQ step"."""
    return "n" if target.startswith(("nf", "nv", "fp", "mx", "ml", "a", "e", "i", "o", "u")) else ""
