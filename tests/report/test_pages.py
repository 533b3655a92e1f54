"""The HTML page, the notebook's summary and the model card: the whole model comes first, the layers are a diagnosis."""

from __future__ import annotations

import re

import pytest

from qmerge.report.card import whole_model_lines
from qmerge.report.headline import kept_of_what, measured_instead
from qmerge.report.html import comparison_page, html_report, summary
from qmerge.report.html.comparison import nearest_sentence
from qmerge.report.html.pictures import LEVELS, heat_maps, rank_data, scatter_data
from qmerge.report.html.tables import MOST_ROWS, weights_table
from qmerge.report.make import MOST_RANKS, rank_records
from qmerge.schema import ContinuationRecord, FidelityRecord, ReportData, overall_kept

from .reports import HOSTILE, KINDS, PAIR, fidelity, full_report, report

MEASURED_ON = {"train.txt": "the calibration text", "random": "random tokens", "generate": "text that the model wrote"}
GENERATED = fidelity(0.935, 0.0147, text_kind="generated", measured_on="2,048 tokens that the adapter model wrote")


def plain(page: str) -> str:
    """The text of a page as a reader sees it, in one line."""
    return " ".join(
        re.sub(r"<style>.*?</style>|<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL)
        .replace("&#39;", "'")
        .split()
    )


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


def test_more_than_all_is_explained() -> None:
    """133 % alone would look like more than success."""
    shown = report(output_kept=1.33, calibration="train.txt")
    page = plain(html_report(shown))
    assert "133 % means: moved 1.33 times as far as the adapter moves it" in page
    assert measured_instead(shown).count("there is 1.33 times the adapter's effect") == 1
    assert "means: moved" not in html_report(report(output_kept=1.0, calibration="train.txt"))


def test_more_than_all_is_not_bright() -> None:
    levels = []
    for kept in (1.0, 1.8, 0.2):
        kept_map = heat_maps(report(output_kept=kept, calibration="t").weights)[0]
        (level,) = {cell.level for _, cells in kept_map.rows for cell in cells if cell}
        levels.append(level)
    assert levels[0] > levels[1] == levels[2]


@pytest.mark.parametrize(
    ("record", "word", "mark"),
    [
        (fidelity(0.975, 0.0058), "kept", "✓"), (fidelity(0.935, 0.0147), "mostly-kept", "✓"),
        (fidelity(1.177, 0.724), "damaged", "!"), (fidelity(0.019, 0.975), "lost", "✗"),
        (fidelity(None, None), "none", "?"), (None, "none", "?"),
    ],
)  # fmt: skip
def test_every_verdict_has_its_colour_and_its_sign(record: FidelityRecord | None, word: str, mark: str) -> None:
    for page in (html_report(report(fidelity=record)), summary(report(fidelity=record))):
        assert f'<div class="verdict {word}">' in page
        assert f".qmerge .{word} {{ --verdict: #" in page
        assert re.findall(r'class="mark"[^>]*>([^<]*)<', page) == [mark]


def test_names_from_files_are_text() -> None:
    """tests/report/test_browser.py opens these pages; here, every view is searched for a tag that came from a name."""
    for page in (
        html_report(full_report()),
        summary(full_report()),
        comparison_page([full_report()] * 2, [HOSTILE] * 2),
    ):
        assert "<img" not in page and "window.ran=1<" not in page
        assert "&lt;img src=x onerror=&#34;window.ran=1&#34;&gt;" in page


def test_the_page_is_one_file() -> None:
    page = html_report(report(interference=[PAIR]))
    assert not re.search(r"<(link|img|iframe)|\bsrc=|@import|url\(", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith("default-src &#39;none&#39;") and "unsafe" not in policy[1]
    assert "(prefers-color-scheme: dark)" in page
    cell = "model.layers.%d.q_proj</th><td>%s"
    assert page.index(cell % (0, "-0.08")) < page.index(cell % (1, "–"))


def test_the_page_is_small_with_many_weights() -> None:
    shown = full_report()
    weight = shown.weights[0]
    experts = [
        weight.model_copy(update={"module": f"model.layers.{layer}.mlp.experts.{expert}.gate_proj"})
        for layer in range(80)
        for expert in range(50)
    ]
    shown = full_report(weights=experts)
    page = html_report(shown)
    assert len(page) < 1.5e6
    table = weights_table(shown)
    assert len(table.rows) == MOST_ROWS and table.left_out == 4000 - MOST_ROWS
    assert f"{table.left_out} more are in" in page


def test_the_same_report_gives_the_same_bytes() -> None:
    assert html_report(full_report()) == html_report(full_report())
    assert html_report(full_report()) != html_report(full_report(warnings=[]))


# --- pictures ------------------------------------------------------------------------------------------------------------


def test_the_heat_map_has_layers_and_kinds() -> None:
    weights = report().weights
    kept, size, noise = heat_maps(weights)
    for heat in (kept, size, noise):
        assert heat.columns == list(KINDS) and [label for label, _ in heat.rows] == ["0", "1"]
    head = weights[0].model_copy(update={"module": "lm_head"})
    heat = heat_maps([head, *weights])[0]
    assert heat.columns == ["lm_head", *KINDS] and heat.rows[0][0] == "–"
    assert [cell.text if cell else None for cell in heat.rows[0][1]] == ["78 %", None, None]


def test_the_best_is_bright() -> None:
    """All of the delta is kept, the delta is large, the rounding error is small."""
    for heat in heat_maps(full_report().weights):
        levels = [cell.level for cell in heat.legend]
        assert levels == sorted(set(levels)) and levels[-1] == LEVELS - 1, heat.name
    small, large = report().weights[:2]
    small.values["relative_size"], large.values["relative_size"] = 0.001, 0.1
    ((_, cells),) = heat_maps([small, large])[1].rows
    assert [cell.level for cell in cells if cell] == [0, LEVELS - 1]


def test_the_worst_weights_come_first_and_those_without_a_delta_last() -> None:
    none, little, much = (report().weights[0].model_copy(update={"module": name}) for name in ("a", "z", "b"))
    none.values = dict.fromkeys(none.values)
    little.values = {**little.values, "kept": 0.1}
    shown = report(weights=[none, much, little])
    assert [row[0].text for row in weights_table(shown).rows] == ["z", "b", "a"]
    rows = comparison_page([shown, shown], ["x", "y"]).partition('data-table="modules"')[2]
    assert re.findall(r'<th scope="row">(\w+)</th>', rows) == ["z", "b", "a"]
    least = re.findall(r'<th scope="row">\w+</th><td data-n="([\d.]*)"', rows)
    assert least == ["0.1", "0.78", ""], "what the rows are sorted by can be seen"


def test_the_first_word_that_differs_is_marked() -> None:
    written = ContinuationRecord(prompt="", base=" hot and", unmerged=" wind and sun", merged=" wind and sand and sea")
    page = html_report(report(fidelity=fidelity(0.5, 0.4).model_copy(update={"continuations": [written]})))
    assert '<p class="quiet">differs from the first word on</p><p class="text"> <mark>hot</mark> and</p>' in page
    assert '<h3>adapter, unmerged</h3><p class="text"> wind and sun</p>' in page
    assert '<p class="quiet">the same for 2 words</p><p class="text"> wind and <mark>sand</mark> and sea</p>' in page


@pytest.mark.parametrize(
    ("merged", "words", "text"),
    [
        (" wind and sun", "the same, word for word", " wind and sun"),
        (" wind and", "the same for 2 words", " wind and"),
        (" wind\nand sun", "the same for 1 word", " wind<mark>\nand</mark> sun"),
    ],
)
def test_texts_that_hardly_differ(merged: str, words: str, text: str) -> None:
    written = ContinuationRecord(prompt="", base="", unmerged=" wind and sun", merged=merged)
    page = html_report(report(fidelity=fidelity(0.5, 0.4).model_copy(update={"continuations": [written]})))
    assert f'<h3>merged</h3><p class="quiet">{words}</p><p class="text">{text}</p>' in page


def test_experts_share_a_cell() -> None:
    weights = []
    for expert, kept in enumerate((0.1, 0.5, 0.9)):
        weight = report().weights[0].model_copy(update={"module": f"model.layers.0.experts.{expert}.up_proj"})
        weights.append(weight.model_copy(update={"values": {**weight.values, "kept": kept}}))
    ((_, cells),) = heat_maps(weights)[0].rows
    assert [cell.text for cell in cells if cell] == ["50 %"]


def test_the_drawing_has_a_point_per_weight_inside_its_frame() -> None:
    weights = full_report().weights
    drawn = scatter_data(weights)
    assert len(drawn["steps"]) == len(drawn["labels"]) == len(weights)
    assert drawn["steps"] == tuple(sorted(drawn["steps"])) and drawn["steps"][0] == 0.05
    far = weights[0].model_copy(update={"values": {**weights[0].values, "kept": 7.0, "output_kept": None}})
    assert scatter_data([far])["kept"] == (drawn["most"],) and "7.00x" in scatter_data([far])["labels"][0]
    zero = weights[0].model_copy(update={"values": dict.fromkeys(weights[0].values)})
    assert scatter_data([zero]) == {}


def test_ranks_are_drawn_by_kind() -> None:
    drawn = rank_data(full_report())
    assert [line["name"] for line in drawn["lines"]] == [*KINDS, HOSTILE, "all"]
    assert drawn["sizes"] == [1.0, 1 / 2, 1 / 3, 1 / 4] and drawn["lines"][0]["kept"] == [0.8, 0.7, 0.6, 0.5]
    assert rank_data(report()) == {}


def test_ranks_of_several_weights_are_counted_by_their_size() -> None:
    """The k-th largest of each; a weight with fewer ranks, or none that counts, has no part in the later ones."""
    unsorted = {"landed": [0.5, 2.0], "meant": [1.0, 4.0]}
    one_rank = {"landed": [3.0], "meant": [3.0]}
    one_negligible = {"landed": [0.9, 0.0], "meant": [1.0, 1e-9]}
    first, second = rank_records([unsorted, one_rank, one_negligible, {}])
    assert (first.size, first.kept) == (1.0, 0.7375)  # (2 + 3 + 0.9) / (4 + 3 + 1)
    assert (second.size, second.kept) == (0.25, 0.5)
    assert rank_records([{}]) == []
    assert len(rank_records([{"landed": [1.0] * 300, "meant": [1.0] * 300}])) == MOST_RANKS


# --- several merges ------------------------------------------------------------------------------------------------------


def test_the_nearest_merge_is_named() -> None:
    near, far = report(fidelity=fidelity(0.97, 0.01)), report(fidelity=fidelity(0.5, 0.4))
    assert nearest_sentence([far, near], ["a", "b"]) == "Nearest to the adapter model: b, with KL ratio 0.0100."
    assert "a and b, with" in nearest_sentence([near, near], ["a", "b"])
    assert nearest_sentence([near, report(), far], ["a", "b", "c"]) == "a: kept, c: damaged. No verdict for b."
    assert nearest_sentence([report(), report()], ["a", "b"]) == (
        "No whole model was measured. Rounding error in the weights is least in a and b: 0.10 times the delta."
    )
    page = plain(comparison_page([far, near], ["a", "b"]))
    assert (
        page.index("Nearest to the adapter model: b")
        < page.index("0.4000")
        < page.index("0.0100", page.index("0.4000"))
    )


def test_the_page_says_what_each_number_is_about() -> None:
    """Which merges were measured as a whole, and that shares of outputs and of weights are not the same quantity."""
    measured = report(output_kept=1.06, calibration="train.txt", fidelity=fidelity(0.97, 0.01))
    nearest = with_share(0.0084)
    page = plain(comparison_page([measured, nearest, report()], ["w7", "w8", "w9"]))
    header = page[: page.index("Side by side")]
    assert "Whole model of w7: measured on 20,480 tokens of heldout.txt." in header
    assert "Kept: share of the delta that is in the stored weights. Output kept: share of the delta's effect" in header
    assert "The whole model of w8, w9 was not measured: a merge with --verify FILE does that." in header
    assert "qmerge verify OUT --text FILE" in header
    assert "w8: not measured, but it holds almost nothing of the adapter." in header
    alike = plain(comparison_page([measured, measured], ["a", "b"]))
    assert "Whole models: measured on 20,480 tokens of heldout.txt." in alike and "not measured" not in alike


def test_only_like_is_compared_with_like() -> None:
    """The share in the weights exists for every merge, that in the outputs only after a calibration: two maps, two columns."""
    measured = report(output_kept=0.82, calibration="train.txt")
    page = comparison_page([measured, report()], ["calibrated", "nearest"])
    weights, outputs = page.split('<table class="heat">')[1:3]
    assert re.search(r'down_proj</th><td class="l7">78 %</td><td class="l7">78 %</td>', weights)
    assert re.search(r'down_proj</th><td class="l8">82 %</td><td></td>', outputs)
    assert "Output kept: share of the delta&#39;s effect" in page
    assert 'data-n="0.78">78 %</td><td data-n="0.82">82 %' in page and 'data-n="0.78">78 %</td><td data-n="">–' in page
    assert "Kept in every weight" in page and "Output kept in every weight" not in page
    assert "Output kept in every weight" in comparison_page([measured, measured], ["a", "b"])
    assert "utput kept:" not in comparison_page([report(), report()], ["a", "b"])


def test_shares_of_outputs_are_never_called_kept() -> None:
    page = plain(html_report(report(output_kept=0.82, calibration="train.txt")))
    assert page.count("82 % output kept") >= 3 and "82 % kept" not in page
    assert "Every weight, least output kept first" in page
    maps = heat_maps(report(output_kept=0.82, calibration="train.txt").weights)
    assert [heat.title for heat in maps][:2] == ["output kept", "kept"]
    assert [heat.rows[0][1][0].text for heat in maps[:2]] == ["82 %", "78 %"]  # type: ignore[union-attr]
    assert "78 % kept" in plain(html_report(report())), "the control"


def test_no_module_is_blamed_where_all_kept_almost_all() -> None:
    for shown, words in ((with_share(0.9), "kept"), (report(output_kept=1.0, calibration="t"), "output kept")):
        for weight in shown.weights:
            weight.values["kept"] = 0.995
        page = plain(html_report(shown))
        assert f"Every module: at least 99 % {words}." in page and "modules that kept least" not in page
    shown.weights[0].values["output_kept"] = 0.98
    assert "modules that kept least" in html_report(shown)


def test_a_merge_without_the_adapter_is_not_only_unmeasured() -> None:
    """As a merge that is rounded back onto the base: the weights alone say that the adapter is lost."""
    for text in all_views(with_share(0.0004)):
        assert "The whole model was not measured, but it holds almost nothing of the adapter." in text
        assert "there is 0.04 % of the adapter's change" in text and "No verdict" not in text
    assert all("almost nothing" not in text for text in all_views(report(fidelity=fidelity(0.0, 1.0))))


def test_the_page_of_a_measurement_claims_no_model() -> None:
    for shown in (report(outputs=[]), report(outputs=[], fidelity=GENERATED)):
        page = plain(html_report(shown))
        assert "measured as nf4, not written" in page and "This merge writes the model" in page
        for claim in ("stored as", "made this model", "qmerge verify", "How it was made", "are in qmerge.json"):
            assert claim not in page, claim
        assert "stored as" not in plain(summary(shown))
    assert "stored as nf4" in plain(html_report(report())), "the control"


def test_the_page_says_what_its_commands_leave_out() -> None:
    for page in (html_report(report()), summary(report())):
        assert "OUT is the folder of this model. Other folders and files may be shown by their names only" in plain(
            page
        )


def with_share(kept: float) -> ReportData:
    """A merge by nearest rounding with so much of the delta in its weights."""
    shown = report()
    shown.total.values["kept"] = kept
    return shown


def test_merges_of_different_modules_are_compared() -> None:
    """An adapter of attention and one of all weights: where one has no weight, its cell is empty."""
    one = report()
    attention = [weight for weight in one.weights if weight.module.endswith("q_proj")]
    other = report(weights=attention, groups=one.groups[:1])
    page = comparison_page([one, other], ["all", "attention"])
    assert re.search(r'down_proj</th><td class="l7">78 %</td><td></td>', page)
    assert re.search(
        r'layers.0.down_proj</th><td data-n="0.78">78 %</td><td data-n="0.78">78 %</td><td data-n="">–</td>', page
    )
