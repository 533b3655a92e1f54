"""The HTML page, the notebook's summary and the model card: the whole model comes first, the layers are a diagnosis."""

from __future__ import annotations

import re

import pytest

from qmerge.report.card import whole_model_lines
from qmerge.report.headline import kept_of_what, measured_instead
from qmerge.report.html import heat_map, html_report, scatter_plot, summary
from qmerge.schema import FidelityRecord, ReportData, overall_kept

from .reports import KINDS, PAIR, fidelity, report

MEASURED_ON = {"train.txt": "the calibration text", "random": "random tokens", "generate": "text that the model wrote"}
GENERATED = fidelity(0.935, 0.0147, text_kind="generated", measured_on="2,048 tokens that the adapter model wrote")


def plain(page: str) -> str:
    """The text of a page as a reader sees it, in one line."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL).replace("&#39;", "'").split())


def all_views(shown: ReportData) -> list[str]:
    return [plain(html_report(shown)), plain(summary(shown)), " ".join(whole_model_lines(shown))]


def test_the_whole_model_comes_first() -> None:
    shown = report(output_kept=1.0, calibration="generate", fidelity=GENERATED)
    for text in all_views(shown):
        assert "The fine-tuning is mostly kept: " in text
        assert text.index("mostly kept") < text.index("0.935") < text.rindex("0.0147")
        assert "2,048 tokens that the adapter model wrote" in text and "94.8 %" in text.replace("0.948", "94.8 %")
        assert "qmerge verify OUT --text FILE" in text, "the text of the user's task can give other numbers"
        if "100 %" in text:
            assert text.index("0.0147") < text.index("100 %"), "layers come after the whole model"


@pytest.mark.parametrize(("source", "words"), MEASURED_ON.items())
def test_shares_of_the_layers_outputs_are_no_verdict(source: str, words: str) -> None:
    """They are about 100 % by construction: rounding was fitted to these inputs."""
    measured = report(output_kept=1.0, calibration=source)
    assert overall_kept(measured.total.values) == 1.0
    assert kept_of_what(measured).endswith(f"on the layers' outputs on {words}")
    assert measured_instead(measured) == (
        f"In the layers' outputs on {words}, which rounding was fitted to, there is 100 % of the adapter's effect; other text "
        f"can give less."
    )
    for text in all_views(measured):
        assert "No verdict: the whole model was not measured." in text
        assert "fine-tuning is" not in text and "--verify FILE" in text


def test_a_share_of_the_weights_says_so() -> None:
    measured = report()
    assert kept_of_what(measured) == "of the adapter's change to the weights"
    assert measured_instead(measured) == "In the stored weights, there is 78 % of the adapter's change."
    assert all("there is 78 % of the adapter's change" in text for text in all_views(measured))
    assert "fitted" not in html_report(measured)


def test_more_than_all_is_no_percentage() -> None:
    """133 % would look like more than success."""
    shown = report(output_kept=1.33, calibration="train.txt")
    page = plain(html_report(shown))
    assert "133 %" not in page and "1.33x means: moved 1.33 times as far as the adapter moves it" in page
    assert measured_instead(shown).count("there is 1.33 times the adapter's effect") == 1
    assert "133 %" not in summary(shown)
    assert "1.33x" not in html_report(report(output_kept=1.0, calibration="train.txt"))


def test_more_than_all_is_not_green() -> None:
    colours = []
    for kept in (1.0, 1.8, 0.2):
        (cell,) = set(
            re.findall(r'<td style="background: (hsl\([^)]*\))', html_report(report(output_kept=kept, calibration="t")))
        )
        colours.append(cell)
    assert colours[0] != colours[1] == colours[2]


@pytest.mark.parametrize(
    ("record", "word"),
    [
        (fidelity(0.975, 0.0058), "kept"), (fidelity(0.935, 0.0147), "mostly-kept"), (fidelity(1.177, 0.724), "damaged"),
        (fidelity(0.019, 0.975), "lost"), (fidelity(None, None), "none"),
    ],
)  # fmt: skip
def test_every_verdict_has_its_colour(record: FidelityRecord, word: str) -> None:
    page = html_report(report(fidelity=record))
    assert f'<div class="verdict {word}">' in page
    assert f".verdict.{word} {{ --verdict: #" in page


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
