"""What users install: the sdist holds the project and nothing else, and the wheel that is built from it merges a model."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from qmerge import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
NAME = f"qmerge-{__version__}"
LARGEST_SDIST = 20_000_000
"""Bytes; the demo model and the general text take most of it."""


def run(folder: Path, *command: str | Path) -> str:
    """Run a command that sees no code but the installed one, and no network; its stdout."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings |= {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    """Relative paths of the files that belong into a package."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix() for path in paths}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(ROOT, sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder)
    return folder / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as ``python -m build`` does it."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    run(folder / NAME, sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    return folder / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel in it. The dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(folder, sys.executable, "-m", "venv", "--without-pip", folder)
    run(folder, sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", wheel)
    # Python reads no .pth files in folders that a .pth file names: the project's own folder does not come with them.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_sdist_holds_the_project_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers()}
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"qmerge", "tests", "tools", "recipes", "notebooks", "docs", "benchmarks"}
    assert {name for name in names if "/" not in name} == {
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE", "Makefile",
        "constraints.txt", "mkdocs.yml", "pyproject.toml", "PKG-INFO", ".gitignore",
    }  # fmt: skip
    assert not [name for name in names if name.endswith((".pyc", ".so")) or "__pycache__" in name]
    assert sdist.stat().st_size < LARGEST_SDIST
    if (ROOT / ".git").exists():
        tracked = set(run(ROOT, "git", "ls-files").splitlines())
        assert names - tracked == {"PKG-INFO"}


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    """Demo model, general text and templates too."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packed = {name.removeprefix("qmerge/") for name in names if name.startswith("qmerge/")}
    assert packed == files(ROOT / "qmerge")
    assert {"demo/base-nf4/model.safetensors", "report/html/templates/first_screen.html", "py.typed"} <= packed
    metadata = {name.removeprefix(f"{NAME}.dist-info/") for name in names if not name.startswith("qmerge/")}
    assert metadata == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_installed_wheel_merges_its_demo_model(environment: Path, tmp_path: Path) -> None:
    python, qmerge = environment / "bin" / "python", environment / "bin" / "qmerge"
    package = Path(run(tmp_path, python, "-c", "import qmerge; print(qmerge.__path__[0])").strip())
    assert package.is_relative_to(environment.resolve())
    demo = package / "demo"
    run(
        tmp_path, qmerge, "--base", demo / "base-nf4", "--adapter", demo / "adapter", "--target", "nf4",
        "--rounding", "nearest", "--out", "merged",
    )  # fmt: skip
    assert (tmp_path / "merged" / "qmerge.html").stat().st_size > 1000
    checks = run(tmp_path, qmerge, "verify", "merged", "--no-reload")
    assert "ok     hashes: 8 files as written" in checks
