"""adapter_model.bin: tensors are read where the user allows it, and nothing else ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qmerge.errors import AdapterError
from qmerge.schema import read_report

from ..conftest import Cli
from ..parity import stock


def as_pickle(adapter: Path, content: Any) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(content, adapter / "adapter_model.bin")


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, Path]:
    """(the adapter as a pickle, the same adapter)."""
    whole = stock.fresh_adapter(tmp_path / "whole")
    adapter = stock.fresh_adapter(tmp_path / "adapter")
    as_pickle(adapter, load_file(whole / "adapter_model.safetensors"))
    return adapter, whole


def test_same_bytes_as_from_safetensors(dense: Path, pickled: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, whole = pickled
    out = stock.merged(tmp_path / "out", dense, adapter, "bf16", allow_pickle=True)
    expected = stock.merged(tmp_path / "expected", dense, whole, "bf16")
    assert stock.differing(stock.tensors(out), stock.tensors(expected)) == []
    assert read_report(out).recipe["allow_pickle"] is True
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]


def test_refused_without_leave(cli: Cli, dense: Path, pickled: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["--base", dense, "--adapter", pickled[0], "--target", "bf16", "--out", tmp_path / "out"]
    ran = cli(*command)
    assert isinstance(ran.error, AdapterError) and ran.code == 3 and "--allow-pickle" in ran.err
    assert cli(*command, "--allow-pickle").code == 0


class Trap:
    """Unpickled without care, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", ["code", "no tensors", "no pickle"])
def test_nothing_but_tensors(dense: Path, pickled: tuple[Path, Path], tmp_path: Path, content: str) -> None:
    adapter, whole = pickled
    tensors: dict[str, Any] = dict(load_file(whole / "adapter_model.safetensors"))
    if content == "code":
        (adapter / "adapter_model.bin").unlink()
        torch.save({**tensors, "trap": Trap(tmp_path / "sprung")}, adapter / "adapter_model.bin")
    elif content == "no tensors":
        torch.save({**tensors, "step": 5}, adapter / "adapter_model.bin")
    else:
        (adapter / "adapter_model.bin").write_bytes(b"\x80\x02broken")
    with pytest.raises(AdapterError, match="something other than tensors"):
        stock.merged(tmp_path / "out", dense, adapter, "bf16", allow_pickle=True)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


def test_the_trap_works(tmp_path: Path) -> None:
    """The control: torch without ``weights_only`` runs the code."""
    torch.save({"trap": Trap(tmp_path / "sprung")}, tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "sprung").exists()
