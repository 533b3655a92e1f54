"""The functions of ``import qmerge``: the same settings as a recipe, typed, documented, and the results of the commands."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import qmerge
from qmerge.errors import RecipeError
from qmerge.recipe import PATHS, Recipe

from .conftest import Cli, snapshot

WITH_SETTINGS = {"merge": qmerge.merge, "plan": qmerge.plan, "measure": qmerge.measure}
OTHERS = {"inspect": qmerge.inspect, "verify": qmerge.verify, "fidelity": qmerge.fidelity, "push": qmerge.push}
OF_THEIR_OWN = {"merge": {"resume", "quiet"}, "plan": {"served_with"}, "measure": {"targets", "quiet"}}
"""Arguments that are no settings of a recipe."""


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_arguments_are_the_fields_of_a_recipe(name: str) -> None:
    found = parameters(WITH_SETTINGS[name])
    assert found.keys() - OF_THEIR_OWN[name] == Recipe.model_fields.keys()
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in found.values())


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_defaults_are_those_of_a_recipe(name: str) -> None:
    for field, parameter in parameters(WITH_SETTINGS[name]).items():
        if field in OF_THEIR_OWN[name]:
            assert parameter.default in (None, False)
        elif field == "target" and name != "merge":
            assert parameter.default is None
        elif Recipe.model_fields[field].is_required():
            assert parameter.default is inspect.Parameter.empty, field
        else:
            assert parameter.default == Recipe.model_fields[field].default, field


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_types_are_those_of_a_recipe(name: str) -> None:
    hints = get_type_hints(WITH_SETTINGS[name])
    for field, info in Recipe.model_fields.items():
        expected = info.annotation
        if field == "adapter":
            expected = str | Path | Sequence[str | Path]
        elif field in PATHS:
            expected = info.annotation | Path  # type: ignore[operator]
        elif field == "target" and name != "merge":
            expected = str | None
        assert set(get_args(hints[field]) or [hints[field]]) == set(get_args(expected) or [expected]), field


@pytest.mark.parametrize("name", WITH_SETTINGS | OTHERS)
def test_every_argument_is_documented(name: str) -> None:
    function = (WITH_SETTINGS | OTHERS)[name]
    documented = set(re.findall(r"^    (\w+): \S", inspect.getdoc(function) or "", re.MULTILINE))
    if "All other arguments are those of ``merge``" in " ".join((function.__doc__ or "").split()):
        documented |= parameters(qmerge.merge).keys()
    assert parameters(function).keys() <= documented
    assert all(section in (function.__doc__ or "") for section in ("Returns:", "Raises:"))


def test_importing_is_quick() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import qmerge, sys; print({'torch', 'transformers', 'rich'} & sys.modules.keys())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="targt"):
        qmerge.merge(base="a", adapter="b", targt="nf4")  # type: ignore[call-arg]
    with pytest.raises(RecipeError, match="no target is called 'nf5'"):
        qmerge.merge(base="a", adapter="b", target="nf5")


def test_paths_and_texts_make_the_same_model(dense: Path, lora: Path, tmp_path: Path) -> None:
    for out, kind in ((tmp_path / "path", Path), (tmp_path / "text", str)):
        report = qmerge.merge(
            base=kind(dense), adapter=[kind(lora)], target="bf16", out=kind(out), device="cpu", quiet=True
        )
        assert report.kept is not None and report.data.outputs
    assert snapshot(tmp_path / "path")["model.safetensors"] == snapshot(tmp_path / "text")["model.safetensors"]


def test_plan_is_the_json_of_the_command(dense: Path, lora: Path, cli: Cli) -> None:
    for more in ({}, {"target": "nf4"}):
        flags = [part for name, value in more.items() for part in (f"--{name}", value)]
        shown = json.loads(cli("plan", "--base", dense, "--adapter", lora, *flags, "--json").out)
        planned = json.loads(json.dumps(qmerge.plan(base=dense, adapter=lora, **more)))
        for volatile in ("disk_free",):
            shown.pop(volatile, None)
            planned.pop(volatile, None)
        assert planned == shown


def test_measure_several_targets(dense: Path, lora: Path) -> None:
    reports = qmerge.measure(
        base=dense, adapter=lora, targets=["int8", "fp32"], rounding="nearest", device="cpu", quiet=True
    )
    assert [report.data.recipe["target"] for report in reports] == ["int8", "fp32"]
    (report,) = qmerge.measure(base=dense, adapter=lora, target="fp32", device="cpu", quiet=True)
    assert report.kept == reports[1].kept and report.noise == reports[1].noise
    assert "what survived in fp32" in str(report) and "of the adapter&#39;s change" in report._repr_html_()
    assert (report.verdict, report.gain_kept, report.kl_ratio) == (None, None, None), "no whole model was measured"
    assert str(report).startswith("No verdict")


def test_inspect_is_the_json_of_the_command(dense: Path, lora: Path, cli: Cli) -> None:
    for folder in (lora, dense):
        assert qmerge.inspect(folder) == json.loads(cli("inspect", folder, "--json").out)
    compared = json.loads(cli("inspect", lora, "--base", dense, "--json").out)
    assert json.loads(json.dumps(qmerge.inspect(lora, base=dense))) == compared


def test_verify_is_a_list_with_a_verdict(dense: Path, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qmerge.merge(base=dense, adapter=lora, target="bf16", out=out, device="cpu", quiet=True)
    checks = qmerge.verify(out, reload=False)
    assert checks.ok and [check.name for check in checks] == [
        "hashes",
        "headers",
        "finite",
        "inputs",
        "tokenizer",
        "reload",
    ]
    (out / "model.safetensors").write_bytes(b"")
    checks = qmerge.verify(str(out), reload=False)
    assert not checks.ok and not checks[0].ok and "model.safetensors" in checks[0].found
