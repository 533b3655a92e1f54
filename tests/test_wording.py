"""Numbers and names in words, as tables and messages show them."""

from __future__ import annotations

import math

import pytest

from qmerge import wording


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"), (1.0, "100 %"), (0.0123, "1.2 %"), (0.123, "12 %"), (0.0994, "9.9 %"), (0.0996, "10 %"),
        (0.00123, "0.12 %"), (0.0094, "0.94 %"), (0.0096, "1.0 %"), (0.00001, "< 0.01 %"), (-0.00001, "> -0.01 %"),
        (-0.057, "-5.7 %"), (1.38, "138 %"),
    ],
)  # fmt: skip
def test_percent(share: float, text: str) -> None:
    assert wording.percent(share) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(18.3, "18x"), (1.44, "1.4x"), (9.96, "10x"), (2e6, "over a million times"), (math.inf, "over a million times"),
     (math.nan, "over a million times")],
)  # fmt: skip
def test_times(ratio: float, text: str) -> None:
    assert wording.times(ratio) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.00"), (0.004, "< 0.01"), (0.01, "0.01"), (3.798, "3.80")])
def test_decimal(value: float, text: str) -> None:
    assert wording.decimal(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(-0.2, "-20 %"), (0.78, "78 %"), (1.06, "106 %"), (2.0, "200 %"), (2.01, "2.01x"), (7, "7.00x")]
)
def test_shares(value: float, text: str) -> None:
    assert wording.share(value) == text


def test_what_does_not_exist_is_a_dash() -> None:
    assert wording.percent_or_dash(None) == wording.decimal_or_dash(None) == wording.fixed_or_dash(None, 3) == "–"
    assert wording.percent_or_dash(0.5) == "50 %" and wording.decimal_or_dash(0.5) == "0.50"
    assert wording.fixed_or_dash(0.5, 3) == "0.500"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_087_432, "2.09 MB"), (5e9, "5.00 GB"), (17_100.4, "17.10 kB")],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert wording.size_text(nbytes) == text


def test_counted() -> None:
    assert (wording.counted(1, "file"), wording.counted(0, "file"), wording.counted(2, "file")) == (
        "1 file", "0 files", "2 files",
    )  # fmt: skip


def test_module_names() -> None:
    layers = [f"model.layers.{n}.self_attn.{kind}" for n in range(24) for kind in ("q_proj", "v_proj")]
    assert wording.module_names(layers) == "q_proj, v_proj of 24 layers"
    assert (
        wording.module_names([*layers, "model.layers.0.mlp.up_proj"])
        == "q_proj, v_proj of 24 layers; up_proj of 1 layer"
    )
    assert wording.module_names(layers[:1]) == layers[0]


def test_span() -> None:
    assert wording.span(wording.percent, [0.034, None, 0.01]) == "1.0 % to 3.4 %"
    assert wording.span(wording.percent, [0.5, 0.5001]) == "50 %"
    assert wording.span(wording.percent, []) == "0 %"


@pytest.mark.parametrize(
    ("target", "text"),
    [("nf4", "an"), ("fp8", "an"), ("awq", "an"), ("int8", "an"), ("mxfp4a16", "an"), ("nvfp4", "an"), ("gptq", "a"),
     ("w4a16", "a"), ("bf16", "a"), ("mlx", "an")],
)  # fmt: skip
def test_article(target: str, text: str) -> None:
    assert f"a{wording.article(target)}" == text
