"""Try qmerge with the lowest versions that pyproject.toml allows, and with the newest that are released.

    python tools/compatibility.py [lowest|newest] [--folder DIR] [--keep] [--lowest-python 3.10] [--newest-python 3.13]

Each set of versions gets a new virtual environment, which is deleted before the next one is made: torch from PyPI takes 6 GB
or more. In it, `qmerge demo` and a fixed choice of tests run. The table that is printed has the versions and the results, as
docs/compatibility.md shows them. Exit code: 0 if everything passed, else 1.

Needs uv, which chooses the versions (`pip install uv`), and the interpreters. What uv, the demo and the tests print is in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "compressed-tensors", "gguf", "accelerate", "optimum",
    "huggingface-hub", "safetensors", "numpy", "numba", "pydantic", "typer",
)  # fmt: skip

TEST_TOOLS = ("pytest", "hypothesis", "pillow")

# The commands, every format, and comparisons with bitsandbytes, peft and transformers; a few minutes.
TESTS = (
    "tests/cli/test_cli.py", "tests/report", "tests/checkpoint", "tests/combine", "tests/metrics", "tests/formats",
    "tests/adapters/test_named.py", "tests/parity/test_merge.py", "tests/parity/test_formats.py",
)  # fmt: skip


@dataclass(frozen=True)
class Versions:
    """A choice of versions. ``extras``: of pyproject.toml. ``uv_options``: how uv resolves. ``left_out``: tests that cannot
    pass with them, whatever qmerge does."""

    name: str
    extras: tuple[str, ...] = ()
    uv_options: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


# gptqmodel and compressed-tensors need newer versions of torch and transformers than qmerge itself.
SETS = {
    "lowest": Versions(
        "lowest",
        extras=("gguf",),
        uv_options=("--resolution", "lowest-direct"),
        # huggingface_hub 1.5 asks huggingface.co whether a card is valid, even where another Hub is set (HF_ENDPOINT).
        left_out=("tests/report/test_card.py::test_what_is_carried_over",),
    ),
    "newest": Versions("newest", extras=("all",)),
}


@dataclass
class Result:
    """What became of one set of versions. ``problems``: names of the steps that failed."""

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    demo: str = "not run"
    tests: str = "not run"
    problems: list[str] = field(default_factory=list)


class Environment:
    """A new virtual environment in a folder, with its logs next to it."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        self._python = python
        self._number = 0

    @property
    def interpreter(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, title: str, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository; its output also goes to a file."""
        settings = {"OMP_NUM_THREADS": "1", "UV_PYTHON_DOWNLOADS": "never", "COLUMNS": "100"}
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings}, check=False
        )
        self._number += 1
        log = self.folder.with_name(f"{self.folder.name}-{self._number}-{title}.log")
        log.write_text(f"$ {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}\nexit code {done.returncode}\n")
        print(f"{self.folder.name}: {title}: exit code {done.returncode}, {log}", file=sys.stderr)
        return done

    def install(self, versions: Versions) -> None:
        """Make the environment, choose the versions, and install them and qmerge. Ends the program where that fails."""
        chosen = self.folder.with_suffix(".txt")
        extras = [f"--extra={extra}" for extra in versions.extras]
        tools = self.folder.with_suffix(".in")
        tools.write_text("\n".join(TEST_TOOLS))
        here = ("--python", self.interpreter)
        self._must("venv", "uv", "venv", "--clear", "--python", self._python, self.folder)
        self._must(
            "choose", "uv", "pip", "compile", *here, *versions.uv_options, *extras, "--no-annotate", "--upgrade",
            "--output-file", chosen, "pyproject.toml",
        )  # fmt: skip
        self._must("install", "uv", "pip", "install", *here, "-r", chosen, "-r", tools)
        self._must("qmerge", "uv", "pip", "install", *here, "--no-deps", "--editable", ".")

    def _must(self, title: str, *command: str | Path) -> None:
        done = self.run(title, *command)
        if done.returncode != 0:
            sys.exit(f"{self.folder.name}: {title} failed:\n{done.stderr[-3000:]}")

    def versions(self) -> dict[str, str]:
        """Python, and every library of interest → installed version."""
        listed = self.run("list", "uv", "pip", "list", "--python", self.interpreter, "--format", "json")
        installed = {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}
        number = self.run("python", self.interpreter, "--version").stdout.split()[-1]
        return {"Python": number, **{name: installed.get(name, "–") for name in LIBRARIES}}


def tried(versions: Versions, environment: Environment) -> Result:
    """Install one set of versions, run the demo and the tests."""
    result = Result(versions.name)
    environment.install(versions)
    result.versions = environment.versions()

    models = environment.folder.with_name(f"{versions.name}-models")
    shutil.rmtree(models, ignore_errors=True)
    demo = environment.run("demo", environment.interpreter, "-m", "qmerge", "demo", "--out", models)
    result.demo = f"fails: {last_line(demo.stderr)}"
    if demo.returncode == 0:
        report = json.loads((models / "nf4-preserve" / "qmerge.json").read_text())["fidelity"]
        result.demo = f"{report['verdict']}: gain kept {report['gain_kept']:.3f}, KL ratio {report['kl_ratio']:.4f}"
    if not result.demo.startswith("kept"):
        result.problems.append("demo")

    left_out = [f"--deselect={test}" for test in versions.left_out]
    tests = environment.run(
        "tests", environment.interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS, *left_out
    )  # fmt: skip
    result.tests = counts(tests.stdout) or f"fail: {last_line(tests.stdout + tests.stderr)}"
    if tests.returncode != 0:
        result.problems.append("tests")
    return result


def counts(output: str) -> str:
    """pytest's last line without warnings and time: ``2 failed, 310 passed, 4 skipped``; empty where there is none."""
    parts = re.findall(r"\d+ (?:failed|passed|skipped|deselected|errors?)", last_line(output))
    return ", ".join(parts)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def table(results: list[Result]) -> str:
    """The results side by side, as a table in Markdown."""
    rows = [("", *(result.name for result in results)), ("---",) * (len(results) + 1)]
    rows += [(name, *(result.versions[name] for result in results)) for name in ("Python", *LIBRARIES)]
    rows += [("`qmerge demo`", *(result.demo for result in results)), ("tests", *(result.tests for result in results))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", choices=SETS, help="lowest or newest; both by default")
    parser.add_argument("--folder", type=Path, help="for environments and logs; by default a new temporary one")
    parser.add_argument("--keep", action="store_true", help="do not delete the environments")
    parser.add_argument("--lowest-python", default="3.10", help="version or path of the interpreter")
    parser.add_argument("--newest-python", default="3.13")
    arguments = parser.parse_args()
    if shutil.which("uv") is None:
        parser.error("uv is missing: pip install uv")

    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="compatibility-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pythons = {"lowest": arguments.lowest_python, "newest": arguments.newest_python}
    results = []
    for name in [arguments.only] if arguments.only else SETS:
        environment = Environment(folder / name, pythons[name])
        results.append(tried(SETS[name], environment))
        if not arguments.keep:
            shutil.rmtree(environment.folder)
    print(table(results))
    return 1 if any(result.problems for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
