"""--target auto: the target that fits and disturbs least, with its reason; and tables that compare targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qmerge.demo
from qmerge.errors import RecipeError
from qmerge.forecast import targets as candidates
from qmerge.planning.inputs import read_inputs
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader

from ..conftest import Cli

DEMO = Path(qmerge.demo.__file__).parent
INPUTS = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter")}
BASE = ("--base", INPUTS["base"], "--adapter", INPUTS["adapter"])


@pytest.fixture(scope="module")
def every() -> dict[str, candidates.Candidate]:
    with Reader() as reader:
        recipe = make_recipe({**INPUTS, "target": "nf4"})
        return {c.target: c for c in candidates.all_candidates(recipe, read_inputs(recipe, reader), reader)}


def chosen(size: str) -> str:
    with Reader() as reader:
        recipe = make_recipe({**INPUTS, "target": "auto", "max_size": size})
        inputs = read_inputs(recipe, reader)
        resolved, _ = candidates.resolve_auto(recipe, inputs, candidates.all_candidates(recipe, inputs, reader))
        assert resolved.max_size is None
        return resolved.target


def test_sizes_are_those_of_the_files(every: dict[str, candidates.Candidate], tmp_path: Path) -> None:
    """Sizes are planned from headers. Written files are as large, except for space that is kept for texts."""
    for target in ("nf4", "gptq", "fp16"):
        out = tmp_path / target
        qmerge.merge(**INPUTS, target=target, rounding="nearest", out=str(out), quiet=True)
        written = (out / "model.safetensors").stat().st_size
        assert written <= every[target].nbytes <= written + 28 * 512
        assert every[target].bits == pytest.approx(json.loads((out / "qmerge.json").read_text())["bits_per_weight"])


def test_order_of_disturbance_is_that_of_whole_models(every: dict[str, candidates.Candidate]) -> None:
    """KL ratios with preserve on text, docs/choosing-a-target.md: fp16, bf16, fp8, nf4, nvfp4, awq, gptq, mxfp4a16."""
    measured = ["fp16", "bf16", "fp8", "nf4", "nvfp4", "awq", "gptq", "mxfp4a16"]
    assert sorted(measured, key=lambda name: every[name].disturbance) == measured
    assert every["nf4"].noise is not None and every["nf4"].noise < 1.1, "nearest is quiet because nothing moves"


@pytest.mark.parametrize(("size", "target"), [("2.05MB", "awq"), ("2.5MB", "nf4"), ("5MB", "fp16"), ("1GB", "fp16")])
def test_the_best_that_fits(size: str, target: str) -> None:
    """fp32 fits into a gigabyte, too, but its gain over fp16 is negligible."""
    assert chosen(size) == target


def test_nothing_fits() -> None:
    with pytest.raises(RecipeError, match=r"--max-size 1MB: nothing fits; the smallest target is mxfp4a16 \(2.03 MB\)"):
        chosen("1MB")


def test_auto_gives_a_reason_and_records_the_target(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = cli(*BASE, "--target", "auto", "--max-size", "2.5MB", "--rounding", "nearest", "--out", out)
    assert ran.code == 0, ran.err
    assert "Target nf4 (2.09 MB): of what fits into 2.5MB" in ran.err and "too large: fp8" in ran.err
    recipe = json.loads((out / "qmerge.json").read_text())["recipe"]
    assert recipe["target"] == "nf4" and "max_size" not in recipe


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "auto"), ("target auto needs max_size", "--max-size 6GB")),
        (("--target", "nf4", "--max-size", "1GB"), ("max_size is for target auto",)),
        (("--target", "auto", "--max-size", "big"), ("size 'big'", "5GB")),
    ],
)
def test_contradictory_settings_are_refused(
    cli: Cli, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = cli(*BASE, *arguments, "--out", tmp_path / "out")
    assert ran.code == 2 and all(word in ran.err for word in words), ran.err
    assert not (tmp_path / "out").exists()


def test_measure_judges_whole_models_and_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text()[:6000])
    ran = cli(
        "measure", *BASE, "--target", "int8", "--target", "fp16", "--verify", text, "--sequence-length", "64", "-q"
    )
    assert ran.code == 0, ran.err
    for word in ("gain kept", "KL ratio", "bits", "fp16: loaded by everything", "int8: loaded by transformers"):
        assert word in ran.out, ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == [text]


def test_plan_shows_every_target_in_80_columns(cli: Cli) -> None:
    ran = cli("plan", *BASE)
    assert ran.code == 0 and max(map(len, ran.out.splitlines())) <= 80
    assert "w4a16" in ran.out and "loaded by vLLM" in ran.out


@pytest.mark.parametrize(
    ("onto", "words"), [("dequantized", "--merge-onto original is without it"), ("original", "is gone")]
)
def test_distance_to_the_original(cli: Cli, tmp_path: Path, onto: str, words: str) -> None:
    """Against ‖original − dequantized‖ / ‖delta‖ over all rows; here every weight is small enough to be read whole."""
    from ..parity import stock

    original, base = tmp_path / "original", tmp_path / "base"
    minus = {**INPUTS, "adapter": f"{INPUTS['adapter']}=-1"}  # plays the 16-bit model
    qmerge.merge(**minus, target="fp32", rounding="nearest", out=str(original), quiet=True)
    (original / "qmerge.json").unlink()
    qmerge.merge(
        base=str(original), adapter=INPUTS["adapter"], target="nf4", rounding="nearest", out=str(base), quiet=True
    )
    (base / "qmerge.json").unlink()  # it records that the adapter is merged already
    ran = cli(
        "--base", base, "--adapter", INPUTS["adapter"], "--original", original, "--merge-onto", onto, "--target", "bf16",
        "--out", tmp_path / "out", *(() if onto == "original" else ("--rounding", "preserve", "--calibration", "none")),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "out" / "qmerge.json").read_text())
    quantized, dense = stock.values(base), stock.values(original)
    adapted = stock.quantized_names(base)
    gap = sum(float((dense[name] - quantized[name]).double().square().sum()) for name in adapted) ** 0.5
    deltas = stock.deltas(stock.float_model(original), DEMO / "adapter")
    size = sum(float(delta.double().square().sum()) for delta in deltas.values()) ** 0.5
    assert found["original_gap"] == pytest.approx(gap / size, rel=0.1), "from a few rows of each weight"
    assert words in ran.err and any(words in line for line in found["warnings"])
