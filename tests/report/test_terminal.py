"""What the terminal shows: progress in fitting units, each warning once, tables whose columns are explained."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from qmerge.progress import announced
from qmerge.report.headline import measuring_command
from qmerge.report.result import Check
from qmerge.report.terminal import console, progress
from qmerge.report.terminal.checks import check_line
from qmerge.report.terminal.plan import targets_table
from qmerge.report.terminal.progress import TerminalProgress
from qmerge.report.terminal.tables import (
    extra_lines,
    fidelity_table,
    measured_table,
    pair_line,
    report_tables,
    survival_table,
)
from qmerge.schema import GroupRecord

from .reports import FIDELITY, PAIR, RESIDUAL, fidelity, report, values

WIDTH = 80


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the progress sees it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


# --- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (2_000_000, "merging: 1.00 MB of 2.00 MB, 50.00 kB/s, 20 s left"),
        (8_000_000_000, "merging: 4.00 GB of 8.00 GB, 200.00 MB/s, 20 s left"),
        (600, "merging: 300 B of 600 B, 15 B/s, 20 s left"),
    ],
)
def test_units_fit_the_size(total: int, line: str, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = TerminalProgress()
    shown.stage("merging", total)
    shown.advance(total // 4)
    clock[0] = 20.0
    shown.advance(total // 4)
    assert lines_of(capsys) == [line]


def test_nothing_is_said_where_nothing_is_known(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = TerminalProgress()
    for total in (0, 1, 1000):
        shown.stage("predicting what survives", total)
        clock[0] += 100
        shown.advance(0)
        shown.end()
    assert lines_of(capsys) == []


def test_parts_that_are_not_counted_in_bytes_are_named(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = TerminalProgress()
    shown.stage("predicting what survives", 1)
    shown.report("calibrating layer 1 of 4")  # too soon after the beginning
    clock[0] = 20.0
    shown.report("calibrating layer 2 of 4")
    assert lines_of(capsys) == ["calibrating layer 2 of 4"]


def test_parts_of_counted_work_have_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = TerminalProgress()
    shown.stage("merging", 1000)
    shown.advance(250)
    clock[0] = 20.0
    shown.report("calibrating layer 2 of 4")
    assert lines_of(capsys) == ["calibrating layer 2 of 4, 60 s left"]


def test_steps_of_equal_length_have_the_time_left(clock: list[float]) -> None:
    lines: list[str] = []
    for _ in announced(range(3), "measuring fidelity: layer", lines.append):
        clock[0] += 30
    assert lines == [
        f"measuring fidelity: layer {step}" for step in ("1 of 3", "2 of 3, 60 s left", "3 of 3, 30 s left")
    ]


def test_quiet_shows_warnings_only(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = TerminalProgress(quiet=True)
    shown.stage("merging", 1000)
    clock[0] = 100.0
    shown.advance(500)
    shown.note("a note")
    shown.warn("a warning")
    assert lines_of(capsys) == ["warning: a warning"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_warning_is_shown_once(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    shown = TerminalProgress(quiet)
    for line in ("first", "second"):
        shown.warn(line)
    lines_of(capsys)
    shown.warn_again(["first", "third", "second"])
    assert lines_of(capsys) == ["warning: third", *([] if quiet else ["2 warnings above."])]
    shown.warn_again([])
    assert lines_of(capsys) == []


def test_a_bar_shows_bytes_only_where_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for total, expected in ((2_000_000, True), (1, False)):
        screen = io.StringIO()
        monkeypatch.setattr(progress, "stderr", lambda s=screen: Console(file=s, force_terminal=True, width=WIDTH))
        shown = TerminalProgress()
        shown.stage("working", total)
        shown.advance(total // 2, "part")
        shown.end()
        assert "working" in screen.getvalue()
        assert bool(re.search(r"\d [kM]?B|bytes", screen.getvalue())) == expected


# --- tables ------------------------------------------------------------------------------------------------------------


def printed(table: object) -> str:
    """The table as it is printed on a narrow terminal."""
    screen = io.StringIO()
    Console(file=screen, width=WIDTH, highlight=False).print(table)
    return screen.getvalue()


TARGETS = [
    {
        "target": "nf4", "bits_per_weight": 4.52, "bytes_out": 2_090_000, "predicted_kept": 0.0005, "predicted_noise": 1.0,
        "gap_to_delta": 18.0,
    },
    {"target": "w4a16", "impossible": "a reason"},
]  # fmt: skip


@pytest.mark.parametrize(
    "table",
    [
        survival_table(report()), survival_table(report(output_kept=1.0, calibration="train.txt")),
        measured_table([report(), report(fidelity=FIDELITY)]), fidelity_table(FIDELITY),
        measured_table([report(), report(output_kept=1.06, calibration="t")], ["a", "b"]),
        measured_table([report()]), fidelity_table(fidelity(None, 0.01)), fidelity_table(fidelity(1.177, 0.724)),
        fidelity_table(fidelity(0.975, 0.0058)),
        fidelity_table(fidelity(1.1, 0.01, 0.001, text_kind="mixed")),
        fidelity_table(fidelity(0.935, 0.0147, text_kind="generated")), targets_table(TARGETS),
    ],
    ids=["survival", "outputs",
         "judged", "fidelity", "side by side", "measured", "no gain", "gain above 1", "kept", "chance", "generated", "targets"],
)  # fmt: skip
def test_every_column_is_explained_within_80_columns(table: console.NotedTable) -> None:
    assert all(len(line) <= WIDTH for line in table.lines), table.lines
    assert all(len(line) <= WIDTH for line in str(table.table.title).splitlines()), table.table.title
    headers = [str(column.header).replace("\n", " ") for column in table.table.columns]
    explained = " ".join(table.lines)
    plain = {"", "modules", "n", "target", "size", "loss", "rounding", "verdict"}
    assert not [name for name in headers if name not in plain and name not in explained], explained
    assert all(len(line) <= WIDTH for line in printed(table).splitlines())


def test_shares_in_larger_noise_stand_in_parentheses() -> None:
    """75 % of a delta below 66 times as much rounding error is no better than the 0 % of the unmerged base."""
    other = {**TARGETS[0], "target": "mxfp4a16", "predicted_kept": 0.75, "predicted_noise": 66.06}
    lines = printed(targets_table([TARGETS[0], other])).splitlines()
    assert any("nf4" in line and " 0.05 %" in line and "(" not in line for line in lines)
    assert any("66.06" in line and "(75 %)" in line for line in lines)


def test_the_whole_model_heads_the_report() -> None:
    head, layers = report_tables(report(output_kept=1.0, calibration="train.txt", fidelity=fidelity(0.975, 0.0058)))
    lines = [line.rstrip() for line in printed(head).splitlines()]
    assert " ".join(lines[:2]).startswith("The fine-tuning is kept: the model predicts almost like the adapter model.")
    assert "Measured on 20,480 tokens of heldout.txt" in printed(head)
    merged = next(line for line in lines if "merged" in line and "│" in line)
    assert merged.replace("│", " ").split() == ["merged", "0.975", "0.0058", "94.8", "%", "0.4", "2.5125"]
    assert printed(layers).startswith("Layer by layer")


def test_a_report_without_the_whole_model_says_so() -> None:
    head, _ = report_tables(report())
    assert printed(head).splitlines() == [
        "No verdict: the whole model was not measured.",
        "In the stored weights, there is 78 % of the adapter's change.",
        "To measure it: qmerge verify OUT --text FILE, or merge with --verify FILE.",
    ]


def test_nothing_is_to_be_verified_where_nothing_was_written() -> None:
    general = fidelity(0.97, 0.01, text_kind="general")
    for shown in (report(outputs=[]), report(outputs=[], fidelity=general)):
        text = printed(report_tables(shown)[0])
        assert "add --verify FILE" in text and "qmerge verify" not in text


def test_commands_name_the_folder() -> None:
    general = fidelity(0.97, 0.01, text_kind="general")
    for shown in (report(), report(fidelity=general)):
        head, _ = report_tables(shown, measuring_command("my model", ("/of/a/base", "/of an/adapter")))
        command = "qmerge verify 'my model' --text FILE --against /of/a/base '/of an/adapter'"
        assert command in " ".join(printed(head).split())


def test_a_gain_above_one_is_explained_not_praised() -> None:
    assert "is no success: KL ratio 0.72 shows that it is another model" in printed(
        fidelity_table(fidelity(1.177, 0.724))
    )
    assert "A gain above 1 is not better than 1" in printed(fidelity_table(fidelity(1.05, 0.01)))
    assert "A gain above 1" not in printed(fidelity_table(fidelity(1.007, 0.004)))


def test_more_than_all_is_explained() -> None:
    shown = printed(survival_table(report(output_kept=1.33, calibration="train.txt")))
    assert "133 %: moved 1.33 times as far as the adapter moves it; not better than 100 %" in shown
    assert "102 %: moved 1.02 times as far" in printed(
        survival_table(report(output_kept=1.02, calibration="train.txt"))
    )
    assert "moved" not in printed(survival_table(report(output_kept=1.0, calibration="train.txt")))


def test_many_kinds_of_modules_are_the_worst_ones() -> None:
    """A share above all is as bad as one as far below it."""
    groups = [GroupRecord(name=f"kind{n}", weights=2, values=values(n / 20, None)) for n in range(20, 8, -1)]
    groups.append(GroupRecord(name="toofar", weights=2, values=values(1.9, None)))
    shown = printed(survival_table(report().model_copy(update={"groups": groups})))
    rows = [line.replace("│", " ").split()[0] for line in shown.splitlines() if line.startswith("│")]
    assert rows == ["toofar", *(f"kind{n}" for n in range(9, 17)), "all"]
    assert "4 more kinds of modules keep more; qmerge.html has all" in shown
    assert "more kinds" not in printed(survival_table(report()))


def test_shares_have_bars() -> None:
    """As long as the share; more than all is a full one."""
    bars = {}
    for share in (0.0, 0.5, 1.0, 1.33, -0.2):
        groups = [GroupRecord(name="q_proj", weights=2, values=values(share, None))]
        shown = printed(survival_table(report().model_copy(update={"groups": groups})))
        row = next(line for line in shown.splitlines() if "q_proj" in line)
        bars[share] = row.count("█")
    assert bars == {0.0: 0, 0.5: 4, 1.0: 8, 1.33: 8, -0.2: 0}


def test_targets_side_by_side_have_verdicts() -> None:
    shown = printed(
        measured_table([report(fidelity=fidelity(0.935, 0.0147)), report(fidelity=fidelity(0.019, 0.975)), report()])
    )
    assert re.search(r"mostly kept +│ 0.935 │ 0.0147", shown) and re.search(r"lost +│ 0.019 │ 0.9750", shown)
    assert shown.count("measured on 20,480 tokens of heldout.txt") == 1
    lost = report()
    lost.total.values["kept"] = 0.0004
    names = ["w7", "w8"]
    shown = printed(measured_table([report(fidelity=fidelity(0.935, 0.0147)), lost], names))
    assert "Whole model of w7: measured on 20,480 tokens of heldout.txt." in shown
    assert "w8: not measured, but it holds almost nothing of the adapter." in shown
    assert "The whole models were not measured" in printed(measured_table([report()]))


def test_shares_of_weights_and_of_outputs_have_columns_of_their_own() -> None:
    calibrated = report(output_kept=0.82, calibration="t")
    shown = printed(measured_table([calibrated, report()], ["one", "two"]))
    assert re.search(r"one .*│ +0.10 │ +78 % │ +0.90 │ +82 % │", shown)
    assert re.search(r"two .*│ +0.10 │ +78 % │ +– │ +– │", shown)
    judged = printed(measured_table([calibrated, report(fidelity=FIDELITY)], ["one", "two"]))
    assert re.search(r"one .*│ +78 % │ +82 % │", judged) and re.search(r"two .*│ +78 % │ +– │", judged)


def test_outputs_are_said_to_be_those_on_the_calibration_text() -> None:
    assert "in the layers' outputs, on the calibration text" in printed(
        survival_table(report(output_kept=1.0, calibration="train.txt"))
    )
    assert "in the layers' outputs, on random tokens" in printed(
        survival_table(report(output_kept=1.0, calibration="random"))
    )
    assert "outputs" not in printed(survival_table(report()))


def test_lines_about_several_adapters_and_additions() -> None:
    lines = extra_lines(report(interference=[PAIR], residual=RESIDUAL, promoted=["model.layers.0.q_proj\x1b[2J"]))
    assert lines[0] == pair_line(PAIR)
    assert lines[0] == (
        "math and chat: cosine 0.01, opposite signs in 49 % of what both change; lowest cosine -0.08, in model.layers.0.q_proj"
    )
    assert lines[1] == "Left unquantized, because they kept least: model.layers.0.q_proj[2J."
    assert "a LoRA of rank 8 (1.23 MB) that compensates for the rounding error" in lines[2]
    assert "0.300 deltas instead of 0.900" in lines[2]


@pytest.mark.parametrize(
    ("check", "line"),
    [
        (Check("hashes", True, "8 files"), "ok     hashes: 8 files"),
        (Check("hashes", False, "one has changed"), "FAILED hashes: one has changed"),
        (Check("tokenizer", True, "none", is_warning=True), "WARN   tokenizer: none"),
        (Check("inputs", True, "left out: not at hand", is_left_out=True), "-      inputs: left out: not at hand"),
    ],
)
def test_what_was_not_checked_is_not_ok(check: Check, line: str) -> None:
    assert check_line(check) == line


def test_names_from_files_cannot_steer_the_terminal() -> None:
    assert console.printable("a\x1b[2J\u202eb\nc") == "a[2Jb\nc"
    assert console.safe("[red]x[/red]") == "\\[red]x\\[/red]"
