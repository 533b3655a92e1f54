"""Numbers in words: fractions, factors and ranges as tables and messages show them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence


def percent(share: float) -> str:
    """0.0123 → ``1.2 %``: two digits below 10 %, whole numbers above."""
    value = 100 * share
    if 0 < abs(value) < 0.01:
        return "< 0.01 %" if value > 0 else "-0.0 %"
    if value == 0 or abs(value) >= 9.95:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if abs(value) >= 0.95 else f"{value:.2f} %"


def times(ratio: float) -> str:
    if not ratio < 1e6:
        return "over a million times"
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def module_names(modules: Sequence[str]) -> str:
    """``q_proj, v_proj of 24 layers``; the whole name where there is one."""
    if len(modules) == 1:
        return modules[0]
    kinds = Counter(module.rpartition(".")[2] for module in modules)
    by_count: dict[int, list[str]] = defaultdict(list)
    for kind, count in kinds.items():
        by_count[count].append(kind)
    return "; ".join(f"{', '.join(names)} of {n} layer{'s' * (n > 1)}" for n, names in by_count.items())


def span(face: Callable[[float], str], values: Iterable[float | None]) -> str:
    """Smallest to largest, once if they read the same."""
    known = [value for value in values if value is not None] or [0.0]
    low, high = face(min(known)), face(max(known))
    return low if low == high else f"{low} to {high}"


def article(target: str) -> str:
    """``n`` where the name of a target takes "an"."""
    return "n" if target[0] in "aeiou" or target.startswith(("nf", "fp")) else ""
