"""The pages in a real browser: what a reader sees, does and downloads, and that nothing in a report can run."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmerge.report.html import comparison_page, html_report

from .reports import FORMULA, HOSTILE, full_report, report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser is driven by playwright: pip install playwright"
)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH: apt-get install chromium"),
]
# No sandbox: it does not start for root. The others stop the browser's own requests.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 800}


@dataclass(frozen=True)
class Opened:
    """A page, with the requests and the errors since it was opened."""

    page: Any
    requests: list[str]
    errors: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    other = full_report(recipe={"target": "gptq"}, bits_per_weight=4.2)
    ranked = full_report().groups[0]
    many = [ranked.model_copy(update={"name": f"kind {number}"}) for number in range(8)]
    pages = {
        "report": html_report(full_report()),
        "kinds": html_report(full_report(groups=many)),
        "comparison": comparison_page([full_report(), other], ["one", HOSTILE]),
    }
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.fixture
def open_page(browser: Any, files: dict[str, Path]) -> Iterator[Any]:
    contexts = []

    def open_(name: str = "report", viewport: dict[str, int] = WIDE, scheme: str = "light", **more: Any) -> Opened:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **more)
        contexts.append(context)
        context.set_default_timeout(5000)
        page = context.new_page()
        opened = Opened(page, [], [])
        page.on("request", lambda request: opened.requests.append(request.url))
        page.on("console", lambda message: opened.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.goto(files[name].as_uri())
        return opened

    yield open_
    for context in contexts:
        context.close()


def modules(page: Any, table: str = "weights") -> list[str]:
    """First cells of the rows that are shown, in their order."""
    return list(page.locator(f"[data-table={table}] tbody tr:visible th").all_inner_texts())


def ink(page: Any, drawing: str) -> int:
    """Pixels of a drawing that are not empty."""
    script = (
        "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
        ".filter((value, index) => index % 4 === 3 && value > 0).length"
    )
    return int(page.locator(f"[data-drawing={drawing}] canvas").evaluate(script))


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_requested_and_no_name_runs(open_page: Any, files: dict[str, Path], name: str) -> None:
    opened = open_page(name)
    assert opened.requests == [files[name].as_uri()] and opened.errors == []
    assert opened.page.evaluate("window.ran") is None
    assert HOSTILE in opened.page.inner_text("main")


def test_the_policy_allows_the_pages_own_script_only(open_page: Any) -> None:
    """What the test above would not notice: a script and a request that are refused."""
    opened = open_page()
    opened.page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.ran = 1';
        document.body.append(script);
    }""")
    assert opened.page.evaluate("window.ran") is None
    assert opened.page.evaluate("fetch('http://127.0.0.1:9/').catch(error => String(error))").startswith("TypeError")
    assert opened.page.evaluate("getComputedStyle(document.querySelector('.l0')).backgroundColor") == "rgb(0, 34, 78)"
    assert sum("Content Security Policy" in error for error in opened.errors) >= 2


def test_the_first_screen(open_page: Any) -> None:
    page = open_page().page
    for words in (
        "The fine-tuning is damaged",
        "0.800",
        "0.0500",
        "modules that kept least",
        "What to do next",
        "--target nf4",
    ):
        place = page.get_by_text(words).first.bounding_box()
        assert place is not None and place["y"] + place["height"] < WIDE["height"], words
    least = page.locator("header ul code").all_inner_texts()
    assert least == ["model.layers.0.q_proj", "model.layers.0.down_proj", "model.layers.1.q_proj"]


def test_tables_sort(open_page: Any) -> None:
    page = open_page().page
    first = modules(page)
    header = page.locator("[data-table=weights] th", has=page.get_by_role("button", name="kept", exact=True))
    for order, expected in (("ascending", first), ("descending", first[::-1])):
        header.get_by_role("button").click()
        assert header.get_attribute("aria-sort") == order and modules(page) == expected
    page.get_by_role("button", name="module").first.click()
    assert modules(page) == sorted(first, key=str.lower) and header.get_attribute("aria-sort") is None


def test_tables_filter_and_are_downloaded(open_page: Any) -> None:
    page = open_page().page
    page.get_by_label("Filter by name").fill("LAYERS down")
    assert modules(page) == [f"model.layers.{layer}.down_proj" for layer in range(3)]
    assert page.locator("[data-table=weights] [role=status]").inner_text() == "3 of 8 rows"
    page.get_by_label("Filter by name").fill("")
    assert len(modules(page)) == 8
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    assert download.value.suggested_filename == "qmerge-weights.csv"
    rows = list(csv.DictReader(Path(download.value.path()).read_text(encoding="utf-8").splitlines()))
    assert [float(row["kept"]) for row in rows] == pytest.approx([0.1 + 0.1 * number for number in range(8)])
    assert [row["module"] for row in rows[-2:]] == [f"'{FORMULA}", HOSTILE]


def test_maps_and_drawings(open_page: Any) -> None:
    page = open_page().page
    assert ink(page, "scatter") > 2000 and ink(page, "ranks") > 2000
    shown = page.locator("[data-map]:visible")
    assert shown.count() == 1 and "90 %" not in shown.inner_text() and "80 %" in shown.inner_text()
    page.get_by_role("radio", name="size of the delta").check()
    assert shown.count() == 1 and "0.40 %" in shown.inner_text()
    page.hover("[data-drawing=scatter] .u-over", position={"x": 1, "y": 5})
    assert "model.layers.0." in page.inner_text("[data-picked=scatter]")


def test_lines_of_one_colour_have_other_frames_in_the_legend(open_page: Any) -> None:
    markers = open_page("kinds").page.locator("[data-drawing=ranks] .u-legend .u-marker").all()
    look = "e => { const style = getComputedStyle(e); return style.borderTopColor + ' ' + style.borderTopStyle; }"
    looks = [marker.evaluate(look) for marker in markers[1:]]  # the first is that of the axis
    assert len(looks) == len(set(looks)) == 10, looks  # eight kinds, all, and the sizes
    assert len({found.rpartition(" ")[0] for found in looks}) < 10, "the control: fewer colours than lines"


def test_the_keyboard_reaches_everything(open_page: Any) -> None:
    page = open_page().page
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        words = "e => [e.tagName, e.type, e.getAttribute('aria-label') || e.textContent].join(' ')"
        reached.add(page.evaluate(f"({words})(document.activeElement)"))
    wanted = (
        "INPUT radio",
        "INPUT search",
        "BUTTON button Download",
        "BUTTON button kept",
        "DIV  Heat map: output kept",
    )
    assert all(any(found.startswith(words) for found in reached) for words in wanted), reached
    page.get_by_role("button", name="kept", exact=True).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert modules(page)[-1] == "model.layers.0.q_proj"
    page.get_by_role("radio", name="kept", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="size of the delta").is_checked()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_phone_does_not_scroll_sideways(open_page: Any, name: str) -> None:
    page = open_page(name, PHONE).page
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.emulate_media(media="print")
    assert not page.locator(".tools:visible").count() and modules(page, "weights" if name == "report" else "modules")


def test_a_phone_shows_what_decides(open_page: Any) -> None:
    """The verdict, the gain and the KL ratio of each merge, without scrolling to the side."""
    page = open_page("comparison", viewport=PHONE).page
    heads = page.locator("[data-table=merges] thead th")
    edges = {head.inner_text(): head.bounding_box() for head in heads.all()}
    assert all(
        edges[name]["x"] + edges[name]["width"] <= PHONE["width"] for name in ("verdict", "gain kept", "KL ratio")
    )


def test_without_scripts_the_numbers_are_there(open_page: Any) -> None:
    page = open_page(java_script_enabled=False).page
    assert page.locator("[data-map]").count() == 4 and len(modules(page)) == 8
    assert not page.locator(".tools:visible").count() and not page.locator("[data-drawing]:visible").count()


def test_a_report_without_numbers_is_shown(open_page: Any, files: dict[str, Path]) -> None:
    """Of a delta of zero, and written by an older version."""
    empty = report()
    for record in (empty.total, *empty.groups, *empty.weights):
        record.values = dict.fromkeys(record.values)
    files["empty"] = files["report"].with_name("empty.html")
    files["empty"].write_text(html_report(empty), encoding="utf-8")
    opened = open_page("empty")
    assert opened.errors == [] and "No verdict" in opened.page.inner_text("header")
    assert not opened.page.locator("canvas").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_axe_finds_nothing(open_page: Any, name: str, scheme: str) -> None:
    """Contrast, roles, names of controls, order of headings."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    results = axe.Axe().run(open_page(name, scheme=scheme).page)
    assert results.violations_count == 0, results.generate_report()
    assert len(results.response["passes"]) > 15


def test_axe_finds_faults(open_page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = open_page().page
    page.evaluate("document.querySelector('.quiet').style.color = '#ccc'")
    page.evaluate(
        "document.querySelector('input[type=search]').parentNode.replaceWith(document.createElement('input'))"
    )
    found = {violation["id"] for violation in axe.Axe().run(page).response["violations"]}
    assert {"color-contrast", "label"} <= found
