"""Ctrl-C, in commands that keep something to go on with, and in those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmerge.planning import inputs

from ..conftest import Cli

ONE_LINE = "qmerge: interrupted. Nothing was left behind: run the same command again.\n"


@pytest.mark.parametrize("command", ["plan", "measure", "inspect", "merge"])
def test_ctrl_c_is_one_line(
    command: str, nf4: Path, lora: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same one in every command that leaves nothing; a merge offers --resume."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "read_checkpoint", interrupted)
    options: list[object] = [lora, "--base", nf4] if command == "inspect" else ["--adapter", lora, "--base", nf4]
    if command == "merge":
        options += ["--target", "nf4", "--out", tmp_path / "out"]
    ran = cli(command, *options)
    assert ran.code == 130
    if command == "merge":
        assert ran.err.count("\n") == 1 and "--resume goes on" in ran.err
    else:
        assert ran.err == ONE_LINE
