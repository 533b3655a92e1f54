"""Change one operator, number or keyword of qmerge at a time, and see whether a test fails (mutation testing).

    make coverage                                       # records which test runs which line
    pip install -e '.[mutation]'
    python tools/mutants.py --sample 200 --seed 0       # writes logs/mutants.jsonl, and goes on where it stopped
    python tools/mutants.py --table                     # counts, and every mutant that survived

The mutants are those of cosmic-ray. A random sample of the same size is drawn from each part in ``PARTS``: first places in the
code, then one of the changes that are possible there. Changes of annotations, docstrings and decorators (``frozen``, ``cache``)
are left out, because no result depends on them; so are operators that no programmer would take by mistake (``|`` for a product).

Work is done in a copy of the files that git tracks. One process imports torch and transformers once; each mutant is tested in a
fork of it, by the tests that run its line, those that run the fewest lines first. At module level, and in compiled kernels, which
Python does not run, these are the tests that run any function of the module. A mutant is killed when a test fails or the time is
over. At the end, all tests that killed one are run on unchanged code: they must pass.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import importlib
import importlib.util
import json
import os
import py_compile
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from covering_tests import CoveringTests

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "formats": ["qmerge/formats", "qmerge/grids.py"],
    "rounding": ["qmerge/rounding"],
    "merge": ["qmerge/pipeline.py", "qmerge/weights", "qmerge/adapters/updates"],
    "names": ["qmerge/checkpoint/names.py"],
}
LEFT_OUT = ("qmerge/rounding/_block_kernels.py",)
"""Kernels for a GPU: the fast tests cannot run them."""

PRELOADED = (
    "torch", "torchao", "transformers", "peft", "bitsandbytes", "compressed_tensors", "hqq", "gguf", "numba", "pydantic",
    "huggingface_hub", "pytest", "hypothesis",
)  # fmt: skip
"""Imported once, before the forks. Nothing of qmerge may be among them."""

BINARY = frozenset(
    {"Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul", "LShift_RShift", "RShift_LShift",
     "BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitOr"}
)  # fmt: skip
"""Replacements of binary operators, of cosmic-ray's 132. The others fail as soon as the line is run on tensors of floats."""

RESULTS = ROOT / "logs" / "mutants.jsonl"


@dataclass(frozen=True)
class Mutant:
    """One change of one file: cosmic-ray's operator, and which of the places where it applies."""

    part: str
    file: str
    operator: str
    occurrence: int
    line: int
    column: int

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.operator} {self.occurrence}"


# --- the mutants -----------------------------------------------------------------------------------------------------


def meaning(source: str) -> str | None:
    """The syntax tree without annotations, docstrings, decorators, and the kinds of parameters. None: it is no Python.

    cosmic-ray takes the ``*`` in front of keyword-only parameters for an operator. As ``/`` it is not a mistake in a number.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
        if isinstance(node, ast.arguments):
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.posonlyargs, node.kwonlyargs = [], []
            node.defaults = [*node.defaults, *(default for default in node.kw_defaults if default)]
            node.kw_defaults = []
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.dump(tree)


def mutated(source: str, operator: str, occurrence: int) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    changed = mutate_code(source, get_operator(operator)(), occurrence)
    assert changed is not None
    return str(changed)


def is_plausible(operator: str) -> bool:
    """Whether a name of cosmic-ray's is that of a change to try."""
    kind, _, change = operator.partition("_")
    if kind == "ReplaceBinaryOperator":
        return change in BINARY
    if kind == "ReplaceComparisonOperator":
        old, new = change.split("_")
        return ("Is" in old) == ("Is" in new)
    return operator not in ("NoOp", "RemoveDecorator")


def mutants_of(part: str, path: Path) -> Iterator[Mutant]:
    """Every mutant of a file, those of annotations included."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast_from_path(path)))
    for name in sorted(operator_names()):
        if get_operator(name).arguments() or not is_plausible(name.partition("/")[2]):
            continue
        operator = get_operator(name)()
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(positions):
            yield Mutant(part, path.relative_to(ROOT).as_posix(), name, occurrence, line, column)


def files_of(part: str) -> list[Path]:
    paths: list[Path] = []
    for name in PARTS[part]:
        path = ROOT / name
        paths += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [path for path in paths if path.relative_to(ROOT).as_posix() not in LEFT_OUT]


def draw(count: int, seed: int) -> list[Mutant]:
    """``count`` mutants, from each part the same number: random places, and at each one of its changes."""
    chosen: list[list[Mutant]] = []
    for part in PARTS:
        rng = random.Random(f"{seed} {part}")
        places: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
        for path in files_of(part):
            for mutant in mutants_of(part, path):
                places[mutant.file, mutant.line, mutant.column].append(mutant)
        order = sorted(places)
        rng.shuffle(order)
        of_part: list[Mutant] = []
        for place in order:
            mutant = rng.choice(places[place])
            source = (ROOT / mutant.file).read_text()
            if meaning(mutated(source, mutant.operator, mutant.occurrence)) not in (None, meaning(source)):
                of_part.append(mutant)
            if len(of_part) == -(-count // len(PARTS)):
                break
        chosen.append(of_part)
    # One of each part in turn, so that a run that is stopped early is a sample of all parts, too.
    return [of_part[k] for k in range(max(map(len, chosen))) for of_part in chosen if k < len(of_part)]


# --- one mutant in a fork --------------------------------------------------------------------------------------------


def in_fork(folder: Path, tests: list[str], log: Path, seconds: float) -> int | None:
    """Exit code of pytest on some test functions, in a fork of this process; None: it took too long."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run_pytest(folder, tests, log)
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            kill_group(child)  # what the tests have started
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    kill_group(child)
    os.waitpid(child, 0)
    return None


def kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run_pytest(folder: Path, tests: list[str], log: Path) -> int:
    import pytest

    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return int(
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line", "--disable-warnings", *tests])
    )


def failed_test(log: Path) -> str:
    """Id of the test that failed; empty where nothing could be collected."""
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("FAILED "):
            return line.removeprefix("FAILED ").split(" - ")[0]
    return ""


def copied_tree(place: Path) -> Path:
    """The files that git knows, as they are now."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    folder = place / "tree"
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    # A mutant may be of equal size, and of the same second: Python must compare the sources with what it has compiled.
    compileall.compile_dir(folder, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return folder


def preload() -> None:
    """Import what is the same for every mutant."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    assert "qmerge" not in sys.modules


def first_difference(source: str, changed: str) -> tuple[str, str]:
    """The first lines that differ; an empty one for a line that was removed."""
    old, new = source.splitlines(), changed.splitlines()
    k = next(k for k, (before, after) in enumerate(zip(old, new, strict=False)) if before != after)
    return old[k].strip(), new[k].strip() if len(old) == len(new) else ""


def test_mutant(mutant: Mutant, tests: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Change the copy, run the tests, and change it back."""
    path, log = folder / mutant.file, folder.parent / "log"
    source = path.read_text()
    changed = mutated(source, mutant.operator, mutant.occurrence)
    begin = time.monotonic()
    path.write_text(changed)
    try:
        code = in_fork(folder, tests, log, arguments.seconds) if tests else 0
    finally:
        path.write_text(source)
    was, now = first_difference(source, changed)
    # 5: pytest has found no test, because all of them are slow.
    outcomes = {0: "survived", 5: "survived", 1: "killed", None: "killed: time"}
    outcome = outcomes.get(code, "killed before any test")
    by = failed_test(log) if outcome == "killed" else ""
    seconds = round(time.monotonic() - begin, 1)
    return {
        **asdict(mutant),
        "outcome": outcome,
        "was": was,
        "is": now,
        "tests": len(tests),
        "by": by,
        "seconds": seconds,
    }


# --- command ---------------------------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Test the sample, and then the killers on unchanged code."""
    tests = CoveringTests(arguments.data)
    known = {record["key"] for record in read(arguments.results)}
    preload()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        os.environ["NUMBA_CACHE_DIR"] = f"{place}/numba"
        folder = copied_tree(Path(place))
        for mutant in draw(arguments.sample, arguments.seed):
            if mutant.key in known:
                continue
            found = test_mutant(mutant, tests.of(mutant.file, mutant.line)[: arguments.most], folder, arguments)
            with arguments.results.open("a") as file:
                file.write(json.dumps({"key": mutant.key, **found}) + "\n")
            print(
                f"{found['outcome']:10} {mutant.file}:{mutant.line}  {found['is']}  ({found['seconds']} s)", flush=True
            )
        killers = sorted({record["by"] for record in read(arguments.results) if record["by"]})
        log = Path(place) / "log"
        if killers and in_fork(folder, killers, log, 3600) != 0:
            raise SystemExit(f"a test fails on unchanged code, so its kills mean nothing: {failed_test(log)}")


def read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_table(records: list[dict[str, Any]]) -> None:
    print("| part | mutants | killed | survived |\n|---|---|---|---|")
    for part in PARTS:
        outcomes = Counter(record["outcome"] == "survived" for record in records if record["part"] == part)
        print(f"| {part} | {outcomes.total()} | {outcomes[False]} | {outcomes[True]} |")
    for record in records:
        if record["outcome"] == "survived":
            print(f"\n{record['file']}:{record['line']} ({record['tests']} tests)\n- {record['was']}\n+ {record['is']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="mutants, in all parts together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=12, help="test functions for one mutant")
    parser.add_argument("--seconds", type=float, default=300, help="time for one mutant")
    parser.add_argument("--data", type=Path, default=ROOT / ".coverage", help="coverage data, with contexts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the results, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(read(arguments.results))
    else:
        work(arguments)


if __name__ == "__main__":
    main()
