"""python -m tests.walk [NAME ...]: merge an adapter into a tiny model of every architecture, and write docs/models.md.

A NAME is head:model_type, with * for any: "causal:qwen3*". Without names all are walked, in processes of 25 each; those that
the file of results has already are left out, so that an interrupted walk goes on. The page is written when it has all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import transformers

from .architectures import Architecture, architectures
from .page import PAGE, page
from .verdicts import Outcome, append_outcomes, read_outcomes
from .walk import walk

PER_PROCESS = 25
"""Architectures of one process: its memory grows with each of them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.walk", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=["*"], metavar="NAME", help="head:model_type; * stands for any text"
    )
    parser.add_argument("--results", type=Path, default=Path("logs/walk.jsonl"), help="file of results")
    parser.add_argument("--in-this-process", action="store_true", help="start no other process")
    options = parser.parse_args(arguments)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = read_outcomes(options.results)
    wanted = [one for one in architectures() if any(fnmatchcase(one.name, name) for name in options.names)]
    if options.in_this_process:
        return _walk_here(wanted, options.results)
    remaining = [one for one in wanted if one.name not in done]
    for start in range(0, len(remaining), PER_PROCESS):
        names = [one.name for one in remaining[start : start + PER_PROCESS]]
        command = [sys.executable, "-m", "tests.walk", "--in-this-process", "--results", str(options.results), *names]
        subprocess.run(command, check=False)
    outcomes = read_outcomes(options.results)
    if outcomes.keys() >= {one.name for one in architectures()}:
        PAGE.write_text(page(list(outcomes.values())))
    return 0


def _walk_here(wanted: Sequence[Architecture], results: Path) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for architecture in wanted:
        start = time.monotonic()
        outcome = walk(architecture)
        append_outcomes(results, [outcome])
        print(_line(outcome), f"{time.monotonic() - start:.1f} s", flush=True)
    return 0


def _line(outcome: Outcome) -> str:
    error = "" if outcome.error is None else f"{outcome.error:.1e}"
    return "  ".join([outcome.name, outcome.fp32, error, outcome.nf4, *outcome.notes])


if __name__ == "__main__":
    sys.exit(main())
