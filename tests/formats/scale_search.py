"""Scale searches without their compiled kernels."""

from __future__ import annotations

from types import ModuleType

import pytest

from qmerge.formats._fit_scales import GroupSearch


def with_sums_of_torch(monkeypatch: pytest.MonkeyPatch, search_class: type[GroupSearch], kernels: ModuleType) -> None:
    """From now on a search adds up with torch, as on a GPU; its kernels cannot be called."""

    def without_kernels(search: GroupSearch, *arguments: object, **options: object) -> None:
        made(search, *arguments, **options)
        search.is_on_cpu = False

    made = search_class.__init__
    monkeypatch.setattr(search_class, "__init__", without_kernels)
    monkeypatch.setattr(kernels, "squared_error", None)
