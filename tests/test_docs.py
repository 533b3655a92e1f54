"""The documentation says what the code does: files, commands, options, exit codes, formats, fields, links, numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from qmerge import errors, plugins, schema
from qmerge.cli import app
from qmerge.formats import MIXES, all_targets
from qmerge.formats.serving import PROGRAMS
from qmerge.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
BENCHMARKS = (ROOT / "docs/benchmarks.md").read_text()
COMMAND_LINE = (ROOT / "docs/command-line.md").read_text()
TARGETS = (ROOT / "docs/choosing-a-target.md").read_text()
SCHEMA = (ROOT / "docs/qmerge-json.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = [*PAGES, *sorted((ROOT / "recipes").iterdir()), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
OF_OTHER_TOOLS = {
    "migration.md": {"--lora-model-dir", "--model", "--adapter-path", "--save-path"},
    "CHANGELOG.md": {"--lora", "--model", "--output-dir", "--quantize"},
}
"""Page → options in the commands of other tools."""
MODELS = [
    model for model in vars(schema).values()
    if isinstance(model, type) and issubclass(model, BaseModel) and model.__module__.startswith(schema.__name__)
]  # fmt: skip


def section(text: str, title: str) -> str:
    """The text under a heading, up to the next heading of the same or a higher level."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |^#(?!\1)|\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"no heading {title!r}"
    return match[2]


def rows(table: str) -> dict[str, list[str]]:
    """A Markdown table's rows: first cell without backquotes → the other cells."""
    cells = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in table.splitlines()
        if re.match(r"\| *[`\d]", line)
    ]  # fmt: skip
    return {first.strip("`"): rest for first, *rest in cells}


def commands() -> dict[str, set[str]]:
    """Command of the console program → its options; the empty name is the program itself."""
    group = typer.main.get_command(app)
    found = {"": group, **group.commands}  # type: ignore[attr-defined]
    return {
        name: {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
        for name, command in found.items()
    }


# --- the tree, in CONTRIBUTING ---------------------------------------------------------------------------------------


def test_tree_names_every_file_and_folder_of_the_package() -> None:
    tree = section(CONTRIBUTING, "The tree")
    inside, beside = tree.split("recipes/", 1)
    named = set(re.findall(r"^  (\S+) ", inside, re.MULTILINE))
    package = ROOT / "qmerge"
    there = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    there |= {path.name for path in package.glob("*.py")}
    assert named == there
    tracked = {f"{name}/" for name in ("notebooks", "docs", "benchmarks", "tests")} | {"constraints.txt"}
    assert all(f"\n{name}" in beside and (ROOT / name).exists() for name in tracked)


@pytest.mark.parametrize("kind", ["formats", "adapters", "rounding", "combine"])
def test_tree_names_every_plugin(kind: str) -> None:
    line = re.search(rf"^  {kind}/ .*: (.*)$", section(CONTRIBUTING, "The tree"), re.MULTILINE)
    assert line
    assert set(line[1].split()) == set(plugins.names(kind))


# --- the command line ------------------------------------------------------------------------------------------------


def test_table_of_commands_is_the_programs() -> None:
    table = rows(section(COMMAND_LINE, "Commands"))
    named = [name.removeprefix("qmerge").split("--")[0].strip() for name in table]
    assert sorted(named) == sorted(commands())


def test_table_of_exit_codes_is_the_programs() -> None:
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.QmergeError)}
    codes = raised | {errors.OK, errors.BUG, errors.PAST_LIMIT, errors.CLOSED_PIPE}
    assert set(rows(section(COMMAND_LINE, "Exit codes"))) == {str(code) for code in codes}


# --- targets ---------------------------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(all_targets())


def test_table_of_targets_is_the_programs() -> None:
    assert rows(section(TARGETS, "Formats")).keys() == targets()


def test_targets_in_the_readme_exist() -> None:
    text = section(README, "Which target?")
    named = set(re.findall(r"`(\w+)`", "".join(line for line in text.splitlines() if line.startswith("|"))))
    assert named and named <= targets() | set(MIXES)
    assert f"[{len(targets())} targets]" in text


def test_table_of_benchmarks_has_every_target_that_rounds() -> None:
    text = section(BENCHMARKS, "All targets, on the demo model")
    of_stacks = {"mxfp4"}  # the demo model has none
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == targets() - {"fp32"} - of_stacks


# --- the README ------------------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len(README.split()) <= 1100


def test_front_page_of_the_documentation_links_every_page() -> None:
    front = (ROOT / "docs/README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not [name for name in pages if f"]({name})" not in front]
    assert "](docs/README.md)" in README


# --- every page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_option_exists(path: Path) -> None:
    known = {"--help"}.union(*commands().values())
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", path.read_text()))
    others = serving_options() | OF_OTHER_TOOLS.get(path.name, set())
    assert used <= known | benchmark_options() | others


def test_tables_of_large_models_are_the_scripts() -> None:
    script = [sys.executable, str(ROOT / "benchmarks/scale.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = (ROOT / "docs/scale.md").read_text().splitlines()
    assert len(printed) > 20 and not [line for line in printed if line not in lines]


def serving_options() -> set[str]:
    """Options of the programs that serve models, in the commands that the model card and the documents show."""
    commands = " ".join(program.from_folder + program.from_hub for program in PROGRAMS.values())
    return set(re.findall(r"--[a-z-]+", commands))


def test_table_of_programs_is_the_code() -> None:
    lines = section((ROOT / "docs/hub.md").read_text(), "Programs that serve it").splitlines()
    cells = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "---" not in line}
    assert cells.keys() == {"program", *(program.title for program in PROGRAMS.values())}
    for program in PROGRAMS.values():
        named = re.findall(r"`([a-z0-9_]+)`", cells[program.title].split("|")[2])
        assert named == [target for target in program.targets if target not in MIXES or target == "q4_k_m"]
        if program.language == "sh":
            on_disk, on_hub = cells[program.title].split("|")[3:5]
            assert (
                re.findall("`(.*?)`", on_disk) == program.command("OUT", file="model.gguf", on_hub=False).splitlines()
            )
            assert re.findall("`(.*?)`", on_hub) == program.command("ID", file="model.gguf", on_hub=True).splitlines()


def benchmark_options() -> set[str]:
    scripts = [
        *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "tests/run/faults.py",
        ROOT / "tests/golden/__main__.py", ROOT / "Makefile",
    ]  # fmt: skip
    of_uvx_and_pipx = {"--from", "--spec"}
    return of_uvx_and_pipx.union(*(re.findall(r"--[a-z-]+", path.read_text()) for path in scripts))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_line_is_understood(path: Path) -> None:
    """Lines that begin with ``qmerge`` in code blocks: the command exists and takes those options."""
    options = commands()
    for block in re.findall(r"^```\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if not line.startswith("qmerge "):
                continue
            words = line.split("#")[0].split()[1:]
            name = words[0] if words[0] in options else ""
            assert words[0].startswith("-") or name, line
            assert {word for word in words if word.startswith("--")} <= options[name], line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_inside_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_badge_of_a_workflow_has_its_file(path: Path) -> None:
    for name in re.findall(r"/actions/workflows/([\w.-]+)", path.read_text()):
        assert (ROOT / ".github/workflows" / name).exists(), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_heading_leads_somewhere(path: Path) -> None:
    for page, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text()):
        linked = (path.parent / page if page else path).read_text()
        headings = re.findall(r"^#+ (.*)$", linked, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_paths_in_contributing_exist() -> None:
    for name in re.findall(r"`((?:qmerge|tests|docs|recipes)/[\w/.-]+)`", CONTRIBUTING):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name


# --- formats, in CONTRIBUTING ----------------------------------------------------------------------------------------


def test_contributing_lists_what_a_format_defines() -> None:
    from qmerge.formats.base import Format, FormatInfo, TargetFormat

    text = section(CONTRIBUTING, "A format: `qmerge/formats/NAME.py`")
    must, rest = text.split("| a target must define")
    must_of_target, rest = rest.split("| a target may define")
    may, facts = rest.split("| fact")
    assert rows(must).keys() == Format.__abstractmethods__ | {"info"}
    assert rows(must_of_target).keys() == TargetFormat.__abstractmethods__ - Format.__abstractmethods__
    public = {name for name in dir(TargetFormat) if not name.startswith("_")}
    assert named(may) == public - TargetFormat.__abstractmethods__ - {"name", "options_of"}
    assert named(facts.split("Parity")[0]) == {field.name for field in fields(FormatInfo)}


def named(table: str) -> set[str]:
    """Words in code quotes in the first column of a table."""
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    return set(re.findall(r"`(\w+)`", "".join(first)))


# --- qmerge.json -----------------------------------------------------------------------------------------------------


def test_schema_version_is_documented() -> None:
    assert f"schema version {schema.SCHEMA_VERSION}\n" in SCHEMA
    assert rows(SCHEMA)["schema_version"][1] == str(schema.SCHEMA_VERSION)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_documented(model: type[BaseModel]) -> None:
    heading = re.search(rf"^## (.*\(`{model.__name__}`\))$", SCHEMA, re.MULTILINE)
    assert heading, f"no section for {model.__name__}"
    documented = rows(section(SCHEMA, heading[1]))
    assert documented.keys() == model.model_fields.keys()
    assert all(kind and what for kind, what in documented.values())


def test_every_metric_is_documented() -> None:
    assert rows(section(SCHEMA, "Metrics")).keys() == set(plugins.names("metrics"))


# --- Python ----------------------------------------------------------------------------------------------------------


def test_settings_in_the_python_example_are_fields() -> None:
    example = re.search(r"```python\n(.*?)```", section(README, "Python"), re.DOTALL)
    assert example
    assert set(re.findall(r"[(,] ?(\w+)=", example[1])) <= Recipe.model_fields.keys() | {
        "targets",
        "resume",
        "quiet",
        "text",
    }


def test_python_names_stay_what_they_are() -> None:
    """``qmerge.plan`` and the others are functions after their modules have been imported, too."""
    import qmerge
    import qmerge.api

    for name in (name for name in qmerge.__all__ if name != "__version__"):
        assert callable(getattr(qmerge, name)), name


@pytest.mark.slow
def test_the_judge_gives_the_numbers_of_the_table(tmp_path: Path) -> None:
    """The script in docs/benchmarks.md, run as a user would, on the demo model."""
    import qmerge

    script = re.search(r"```python\n(.*?)```", BENCHMARKS, re.DOTALL)
    assert script
    demo, judge, merged = ROOT / "qmerge/demo", tmp_path / "judge.py", tmp_path / "merged"
    judge.write_text(script[1])
    inputs = {"base": str(demo / "base-nf4"), "adapter": str(demo / "adapter")}
    report = qmerge.merge(**inputs, target="nf4", rounding="stochastic", out=str(merged), quiet=True)
    arguments = [demo / "base-nf4", demo / "adapter", demo / "heldout.txt", merged]
    ran = subprocess.run(
        [sys.executable, judge, *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    found = re.search(r"gain kept ([\d.]+), KL ratio ([\d.]+)", ran.stdout)
    assert found, ran.stderr
    table = next(line for line in BENCHMARKS.splitlines() if line.startswith("| `nf4` | `--rounding stochastic`"))
    kept, noise, gain, divergence = (float(cell) for cell in table.strip("|").split("|")[2:])
    assert report.kept == pytest.approx(kept, abs=0.002)
    assert report.noise == pytest.approx(noise, abs=0.02)
    # Other processors sum in another order: a few codes differ, and so do the last digits.
    assert float(found[1]) == pytest.approx(gain, abs=0.02)
    assert float(found[2]) == pytest.approx(divergence, abs=0.01)
