"""The HTML page, the notebook's summary and the card's sentence: what they call the most important number."""

from __future__ import annotations

import re

import pytest

from qmerge.report.headline import card_sentence, kept_of_what
from qmerge.report.html import heat_map, html_report, scatter_plot, summary
from qmerge.schema import overall_kept

from .reports import FIDELITY, KINDS, PAIR, report

MEASURED_ON = {"train.txt": "the calibration text", "random": "random tokens", "generate": "text that the model wrote"}


@pytest.mark.parametrize(("source", "words"), MEASURED_ON.items())
def test_a_share_of_the_outputs_says_on_which_text(source: str, words: str) -> None:
    measured = report(output_kept=1.0, calibration=source)
    assert overall_kept(measured.total.values) == 1.0
    for text in (html_report(measured), summary(measured)):
        plain = " ".join(re.sub(r"<[^>]+>", " ", text).split())
        assert f"100 % of the adapter&#39;s effect on the layers&#39; outputs on {words} is kept" in plain
        assert "fine-tuning" not in plain
    sentence = card_sentence(measured, "100 %")
    assert (
        f"**100 %** of the adapter's effect on the layers' outputs is kept, measured on {words} (16384 tokens)"
        in sentence
    )
    assert "Other text can give less" in sentence and "fine-tuning" not in sentence


def test_a_share_of_the_weights_says_so() -> None:
    measured = report()
    assert kept_of_what(measured) == "of the adapter's change to the weights"
    assert "**78 %** of the adapter's change is in the stored weights" in card_sentence(measured, "78 %")
    assert "fitted" not in html_report(measured)


def test_held_out_text_comes_first_where_there_is_one() -> None:
    page = html_report(report(output_kept=1.0, calibration="train.txt", fidelity=FIDELITY))
    assert page.count('class="first"') == 1
    assert re.search(r'class="first"><b>80 %</b>of the adapter\'s gain is kept, on held-out text', page)
    assert "The rounding was fitted" not in page


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = html_report(report(interference=[PAIR], warnings=["<script>alert(1)</script>"]))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and "default-src 'none'" in page
    assert page.index("model.layers.0.q_proj</td><td>-0.08") < page.index("model.layers.1.q_proj</td><td>–")


def test_the_heat_map_has_layers_and_kinds() -> None:
    weights = report().weights
    heat = heat_map(weights)
    assert heat["kinds"] == list(KINDS)
    assert [row["layer"] for row in heat["rows"]] == [0, 1]
    head = weights[0].model_copy(update={"module": "lm_head"})
    heat = heat_map([head, *weights])
    assert heat["kinds"] == ["lm_head", *KINDS] and heat["rows"][0]["layer"] == "–"
    assert heat["rows"][0]["cells"] == [head, None, None]


def test_the_plot_has_a_dot_per_weight_inside_its_frame() -> None:
    weights = report().weights
    plot = scatter_plot(weights)
    assert len(plot["points"]) == len(weights)
    assert all(0 <= x <= plot["width"] and 0 <= y <= plot["height"] for x, y, _ in plot["points"])
    zero = weights[0].model_copy(update={"values": {**weights[0].values, "kept": None, "relative_size": None}})
    assert scatter_plot([zero])["points"] == []
