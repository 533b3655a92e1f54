"""`qmerge demo`, shortened."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmerge import demo

from ..conftest import Cli


def test_it_runs_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """Neither the folder that it starts in nor that of the models has the demo's inputs."""
    monkeypatch.setattr(demo, "TARGETS", ("bf16",))
    monkeypatch.setattr(demo, "ROUNDINGS", ("nearest",))
    monkeypatch.setattr(demo, "TOKENS", 512)
    monkeypatch.chdir(tmp_path)
    ran = cli("demo", "--out", "kept")
    assert ran.code == 0, ran.err
    assert "What became of the fine-tuning" in ran.out and "The merged models are in kept." in ran.out
