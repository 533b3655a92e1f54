"""The documentation builds as a site without a warning, its links lead somewhere, and what is made of the code is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from qmerge import errors, plugins
from qmerge.recipe import Recipe

from .conftest import Cli

ROOT = Path(__file__).parent.parent
CONFIG = (ROOT / "mkdocs.yml").read_text()

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """Addresses and ids of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and "stylesheet" in found.get("rel", ""):
            self.loaded.append(found["href"])
        elif tag in ("img", "script") and "src" in found:
            self.loaded.append(found["src"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


parsed = cache(Page)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Every page, by its path in the site."""
    out = tmp_path_factory.mktemp("site") / "out"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return {path.relative_to(out).as_posix(): parsed(path) for path in sorted(out.rglob("*.html"))}


def broken(page: Page, root: Path) -> list[str]:
    """Links of a page that lead nowhere in the site."""
    found = []
    for link in [*page.links, *page.loaded]:
        address = urlsplit(link)
        if address.scheme or address.netloc:
            continue
        target = page.path
        if address.path:
            start = root if address.path.startswith("/") else page.path.parent
            target = (start / unquote(address.path).lstrip("/")).resolve()
            target = target / "index.html" if target.is_dir() else target
        is_broken = not target.exists()
        if not is_broken and address.fragment and target.suffix == ".html":
            is_broken = unquote(address.fragment) not in parsed(target).ids
        if is_broken:
            found.append(link)
    return found


def test_links_inside_lead_somewhere(site: dict[str, Page]) -> None:
    root = site["index.html"].path.parent
    # The page for a missing address is served at any path: its links begin with the address of the site.
    assert {name: found for name, page in site.items() if name != "404.html" and (found := broken(page, root))} == {}


def test_broken_links_are_found(site: dict[str, Page], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text('<a href="missing/">a</a><a href="#missing">b</a><img src="no.png"><a id="here" href="#here">c</a>')
    assert broken(Page(path), tmp_path) == ["missing/", "#missing", "no.png"]


def test_links_to_the_repository_lead_to_files(site: dict[str, Page]) -> None:
    prefix = re.compile(r"https://github\.com/qmerge/qmerge/(?:blob|tree|edit)/main/([^#]*)")
    generated = {"docs/options.md", "docs/errors.md", "docs/recipes.md", "docs/formats.md", "docs/python.md"}
    paths = {match[1] for page in site.values() for link in page.links if (match := prefix.match(link))} - generated
    assert len(paths) > 50
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_pages_load_nothing_from_elsewhere(site: dict[str, Page]) -> None:
    assert not {link for page in site.values() for link in page.loaded if urlsplit(link).netloc}


def test_every_page_is_in_the_navigation(site: dict[str, Page]) -> None:
    nav = re.findall(r": ([\w-]+\.md)$", CONFIG, re.MULTILINE)
    pages = {name.removesuffix("/index.html") for name in site if name not in ("index.html", "404.html")}
    assert pages == {name.removesuffix(".md") for name in nav} - {"README"}


def test_options_page_has_every_option(site: dict[str, Page]) -> None:
    shown = site["options/index.html"]
    words = set(re.findall(r"--[\w-]+", shown.text))
    assert {f"--{name.replace('_', '-')}" for name in Recipe.model_fields} <= words
    assert {"--resume", "--shard", "--json", "--loader", "--against-inputs"} <= words
    assert "qmerge-finalize" in shown.ids


def test_recipes_page_has_every_recipe(site: dict[str, Page]) -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} <= site["recipes/index.html"].ids


def test_formats_page_has_every_format(site: dict[str, Page]) -> None:
    assert set(plugins.names("formats")) <= site["formats/index.html"].ids


def test_python_page_has_every_public_name(site: dict[str, Page]) -> None:
    import qmerge

    shown = {name.rpartition(".")[2] for name in site["python/index.html"].ids if name.startswith("qmerge.")}
    assert set(qmerge.__all__) - {"__version__"} <= shown


@pytest.mark.parametrize(
    "command",
    [
        ("run", "recipes/no-such-recipe.yaml"),
        ("inspect", "no/such/folder"),
        ("plan", "--base", "qmerge/demo/adapter", "--adapter", "qmerge/demo/adapter"),
        ("--base", "qmerge/demo/base-nf4", "--adapter", "qmerge/demo/adapter", "--target", "nf5", "--out", "x"),
        ("--base", "qmerge/demo/base-nf4", "--adapter", "qmerge/demo/adapter", "--target", "auto", "--out", "x"),
        ("--base", "qmerge/demo/base-nf4", "--adapter", "qmerge/demo/base-nf4", "--target", "nf4", "--out", "x"),
    ],
    ids=lambda command: command[-1] if command[0] in ("run", "inspect", "plan") else f"{command[3]} {command[5]}",
)
def test_errors_page_has_messages_that_users_see(
    command: tuple[str, ...], site: dict[str, Page], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some run of words of the message is on the page, under its exit code."""
    monkeypatch.chdir(ROOT)
    ran = cli(*command)
    assert ran.error is not None, ran
    shown = site["errors/index.html"].text
    message = str(ran.error).split()
    runs = [" ".join(message[start : start + 3]) for start in range(len(message) - 2)]
    assert any(run in shown for run in runs), ran.error
    assert f"exit-code-{ran.code}" in site["errors/index.html"].ids


def test_errors_page_has_every_class_and_line(site: dict[str, Page]) -> None:
    """The lines that it links to are those where an error is made."""
    page = site["errors/index.html"]
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)} - {"QmergeError"}
    assert {name.lower() for name in raised} <= page.ids
    linked = [found for link in page.links if (found := re.search(r"/blob/main/(qmerge/.*\.py)#L(\d+)$", link))]
    assert len(linked) > 400
    sources = {path: (ROOT / path).read_text().splitlines() for path in {found[1] for found in linked}}
    lines = {sources[found[1]][int(found[2]) - 1] for found in linked}
    assert not [line for line in lines if not re.search(r"Error\(|\berror\(|\breturn\b", line)]


def test_configuration_is_read_by_other_tools() -> None:
    """Apart from its one Python tag, which mkdocs needs for headings with GitHub's anchors."""
    assert CONFIG.count("!!python") == 1
    assert yaml.safe_load(re.sub(r"!!python\S+ ", "", CONFIG))["site_name"] == "qmerge"
