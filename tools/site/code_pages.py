"""Pages made of recipes, formats and docstrings."""

from __future__ import annotations

import inspect
from pathlib import Path

import yaml
from markup import cell, table

import qmerge
from qmerge import plugins
from qmerge.formats import all_formats
from qmerge.formats.base import Format, TargetFormat

ROOT = Path(__file__).parent.parent.parent

RECIPES_HEAD = """# Recipes

A recipe is a merge in a file: the same settings as on the command line ([every option](options.md)). Options on the command
line override the file.

```
qmerge run nf4-keep-4bit.yaml --base BASE --adapter ADAPTER --out OUT
qmerge recipe > mine.yaml
```

The first line of each recipe names its [JSON schema](recipe.schema.json). Editors with the YAML language server (VS Code's YAML
extension, Neovim, Zed, …) then complete keys and values, show what they mean, and mark mistakes.
"""

FORMATS_HEAD = """# File formats

A merged folder holds the model in the layout of its target, as the loaders named here read it, and besides it:

| file | content |
|---|---|
| `config.json`, `tokenizer.json`, … | of the base, with the new quantization; tokenizer and template may be of the adapter |
| `qmerge.json` | every measurement, all versions, and the SHA-256 of every file ([fields](qmerge-json.md)) |
| `qmerge.html` | the report, to look at ([reading it](reading-the-report.md)) |
| `qmerge_recipe.yaml` | the recipe with all defaults: `qmerge run` makes the same model of it |
| `README.md` | the model card |

GGUF targets write one file, `model.gguf`, with a `Modelfile` for Ollama ([GGUF](gguf.md)). A patch is [one small file](patch.md).

Which one to choose: [choose a target](choosing-a-target.md). This page is made of the code.
"""

PYTHON_PAGE = """# Python

```python
import qmerge

report = qmerge.merge(base="base-nf4", adapter="adapter", target="nf4", out="merged")
report.verdict, report.gain_kept, report.kl_ratio, report.warnings
```

`import qmerge` takes a moment; torch and the other libraries are imported by the first call. The arguments are the settings of
[every option](options.md). Errors are those of `qmerge.errors`, with the messages of the [index](errors.md).

{functions}

## What they return

{results}

## Errors

::: qmerge.errors
    options:
      show_root_heading: false
      show_root_toc_entry: false
      heading_level: 3
      filters: ["Error$"]
"""

FIRST = ("merge", "measure", "plan", "inspect", "verify", "fidelity")
"""The order of the page; further functions follow by name."""

RESULTS = ("Report", "Checks")


def recipes() -> str:
    """Every recipe, with what it is for."""
    parts = [RECIPES_HEAD]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        target = yaml.safe_load(text)["target"]
        parts.append(f"## {path.stem}\n\nTarget `{target}`.\n\n```yaml\n{text}```")
    return "\n\n".join(parts) + "\n"


def formats() -> str:
    """Every format: what it is, who loads it, which options it takes."""
    parts = [FORMATS_HEAD]
    for title, is_target in (("Read and written", True), ("Only read", False)):
        parts.append(f"## {title}")
        found = {name: fmt for name, fmt in all_formats().items() if isinstance(fmt, TargetFormat) == is_target}
        parts += [_format_section(name, fmt) for name, fmt in found.items()]
    return "\n\n".join(parts) + "\n"


def _format_section(name: str, fmt: Format) -> str:
    documented = inspect.cleandoc(plugins.load("formats", name).__doc__ or "")
    facts = [
        ("loaders", fmt.info.loaders),
        ("`quant_method` in config.json", _code(fmt.info.quant_method)),
        ("read where config.json says", ", ".join(map(_code, fmt.info.other_read_methods))),
        ("options", ", ".join(f"`{option}`" for option in fmt.info.accepted_options)),
    ]
    rows = [(what, value) for what, value in facts if value]
    lines = [f"### {name}", *(cell(paragraph) for paragraph in documented.split("\n\n"))]
    if rows:
        lines.append(table(("", ""), rows))
    return "\n\n".join(lines)


def _code(word: str | None) -> str:
    return f"`{word}`" if word else ""


def python() -> str:
    """The public functions and classes, by mkdocstrings."""
    public = [name for name in qmerge.__all__ if name not in (*RESULTS, "__version__")]
    ordered = [*FIRST, *sorted(set(public) - set(FIRST))]
    functions = "\n\n".join(f"::: {_defined(name)}" for name in ordered)
    returned = [*map(_defined, RESULTS), "qmerge.schema.FidelityRecord"]
    results = "\n\n".join(f"::: {name}\n    options:\n      heading_level: 3" for name in returned)
    return PYTHON_PAGE.format(functions=functions, results=results)


def _defined(name: str) -> str:
    """Where a public name is defined: mkdocstrings reads the code there."""
    return f"{getattr(qmerge, name).__module__}.{name}"
