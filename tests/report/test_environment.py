"""The versions that ``qmerge --version`` names, and libraries that qmerge cannot work with."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import pytest

import qmerge
from qmerge.errors import RecipeError
from qmerge.report import environment

from ..conftest import Cli

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """Package → version that the metadata shall name instead of the true one; None: it is not installed."""
    replaced: dict[str, str | None] = {}

    def pretended(package: str) -> str:
        found = replaced.get(package, version(package))
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(environment, "version", pretended)
    environment.check_environment.cache_clear()
    yield replaced
    environment.check_environment.cache_clear()


def test_version_names_libraries_and_device(cli: Cli) -> None:
    ran = cli("--version")
    lines = dict(line.split(" ", 1) for line in ran.out.splitlines())
    assert ran.code == 0 and ran.out.startswith(f"qmerge {qmerge.__version__}\n")
    assert lines["python"] == platform.python_version()
    for library in ("torch", "transformers", "peft", "bitsandbytes"):
        loaded = __import__(library).__version__
        # torch from PyPI calls itself 2.15.0+cu132, and its metadata 2.15.0.
        assert lines[library] in (loaded, loaded.partition("+")[0])
    assert re.fullmatch(r"(cpu|cuda) \(.+\)", lines["device"])


def test_version_imports_no_library_but_torch() -> None:
    code = "import sys; sys.argv = ['qmerge', '--version']\nimport qmerge.cli\ntry: qmerge.cli.main()\nexcept SystemExit: pass\n"
    check = f"{code}print([name in sys.modules for name in ('torch', 'transformers', 'peft', 'bitsandbytes')])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[True, False, False, False]"


def test_version_without_a_library(cli: Cli, installed: dict[str, str | None]) -> None:
    """Just then, its output is asked for."""
    installed["peft"] = None
    ran = cli("--version")
    assert ran.code == 0 and "\npeft not installed\n" in ran.out


def test_this_environment_is_in_bounds(installed: dict[str, str | None]) -> None:
    environment.check_environment()


@pytest.mark.parametrize(
    "command", [("plan", "--base", "x", "--adapter", "y"), ("--base", "x", "--out", "z"), ("formats",)]
)
def test_old_library_is_one_line(cli: Cli, installed: dict[str, str | None], command: tuple[str, ...]) -> None:
    installed |= {"transformers": "4.57.1", "peft": None}
    ran = cli(*command)
    assert ran.code == 2 and ran.out == ""
    line = ran.err.rstrip("\n")
    assert "\n" not in line
    assert re.search(r"peft not installed \(needed: >=[\d.]+\), transformers 4\.57\.1 \(needed: >=[\d.]+\)", line)
    assert re.search(r'pip install --upgrade "peft>=[\d.]+" "transformers>=[\d.]+"$', line)


def test_help_is_shown_whatever_is_installed(cli: Cli, installed: dict[str, str | None]) -> None:
    installed["transformers"] = "4.57.1"
    for command in ((), ("--help",), ("plan", "--help")):
        assert cli(*command).code == 0


def test_python_functions_check_it_too(installed: dict[str, str | None], tmp_path: Path) -> None:
    installed["torch"] = "1.13.1+cu117"
    for call in (
        lambda: qmerge.merge(base="x", adapter="y", target="nf4", out=tmp_path / "out"), lambda: qmerge.plan(base="x", adapter="y"),
        lambda: qmerge.measure(base="x", adapter="y"), lambda: qmerge.inspect("y"), lambda: qmerge.verify("z"),
        lambda: qmerge.fidelity(out="z", text="t"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=r"torch 1\.13\.1\+cu117 \(needed: >="):
            call()


@pytest.mark.parametrize(("number", "is_fine"), [("99.0.dev0", True), ("2.13.0+cu130", True), ("1.13.1", False)])
def test_development_and_local_versions(installed: dict[str, str | None], number: str, is_fine: bool) -> None:
    installed["torch"] = number
    unmet = [r.name for r in environment._requirements() if not environment._is_met(r)]
    assert unmet == ([] if is_fine else ["torch"])


def test_library_that_was_loaded_before_its_update(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook installs qmerge after it imported an older transformers."""
    old = ModuleType("transformers")
    old.__version__ = "4.57.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(RecipeError, match=r"transformers 4\.57\.1 was loaded before .* restart Python"):
        environment.check_environment()


def test_a_build_may_name_itself_in_more_detail(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch from PyPI: its metadata has no local version."""
    installed["torch"] = "2.99.0"
    monkeypatch.setattr("torch.__version__", "2.99.0+cu126")
    environment.check_environment()


def test_without_metadata_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """qmerge can also run from a folder, without being installed."""

    def no_metadata(_: str) -> list[str]:
        raise PackageNotFoundError("qmerge")

    monkeypatch.setattr(environment, "requires", no_metadata)
    assert list(environment._requirements()) == []
