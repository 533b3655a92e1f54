"""Where qmerge runs: versions of the libraries, whether they are those that it needs, and the device.

Importing this module imports no library: versions come from the metadata of the installed packages.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from qmerge.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from packaging.requirements import Requirement

SHOWN = ("torch", "transformers", "peft", "bitsandbytes")
"""Libraries that ``--version`` names: a problem with a model is most often a problem with one of them."""

NOT_INSTALLED = "not installed"


def installed_versions(*packages: str) -> dict[str, str]:
    """Package → installed version, or ``not installed``."""
    return {package: _installed(package) or NOT_INSTALLED for package in packages}


def version_lines() -> list[str]:
    """What ``qmerge --version`` prints: qmerge, Python, the libraries and the device, one a line."""
    versions = installed_versions("qmerge", *SHOWN)
    lines = [f"{name} {installed}" for name, installed in versions.items()]
    lines.insert(1, f"python {platform.python_version()}")
    return [*lines, f"device {_default_device()}"]


@cache
def check_environment() -> None:
    """Compare the installed libraries with the bounds in qmerge's own metadata. It is done once in a process.

    Raises:
        RecipeError: a library is missing or out of bounds; or the process has loaded another version than is installed.
    """
    unmet = [requirement for requirement in _requirements() if not _is_met(requirement)]
    if unmet:
        problems = ", ".join(f"{_as_found(each.name)} (needed: {each.specifier})" for each in unmet)
        wanted = " ".join(f'"{each.name}{each.specifier}"' for each in unmet)
        raise RecipeError(f"this environment does not suit qmerge: {problems}: pip install --upgrade {wanted}")
    for name in SHOWN:
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded is not None and not _same_release(loaded, version(name)):
            raise RecipeError(
                f"{name} {loaded} was loaded before {version(name)} was installed: restart Python (in a notebook, the runtime)"
            )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return platform.machine() or "cpu"


def _default_device() -> str:
    """The device that ``--device auto`` takes, with its name."""
    try:
        from qmerge.weights.context import compute_device
    except ImportError as cause:
        return f"unknown: torch cannot be imported ({cause})"
    device = compute_device("auto")
    return f"{device.type} ({device_name(device)})"


def _requirements() -> Iterator[Requirement]:
    """What qmerge needs without its extras; nothing where it runs from a folder, without metadata."""
    from packaging.requirements import Requirement

    try:
        lines = requires("qmerge") or []
    except PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _is_met(requirement: Requirement) -> bool:
    installed = _installed(requirement.name)
    # Builds from source have versions such as 5.24.0.dev0, which are in bounds if 5.24.0 is.
    return installed is not None and requirement.specifier.contains(installed, prereleases=True)


def _same_release(loaded: str, installed: str) -> bool:
    from packaging.version import Version

    # torch from PyPI calls itself 2.7.0+cu126, and its metadata 2.7.0.
    return Version(loaded).public == Version(installed).public


def _as_found(package: str) -> str:
    return f"{package} {_installed(package) or NOT_INSTALLED}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
