"""What mkdocs does not do itself: pages that are made of the code, and links that lead out of docs/."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import code_pages
import error_pages
import option_pages
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent

GENERATED: dict[str, Callable[[], str]] = {
    "options.md": option_pages.options,
    "errors.md": error_pages.errors,
    "recipes.md": code_pages.recipes,
    "formats.md": code_pages.formats,
    "python.md": code_pages.python,
}
"""Page of the site → what writes it. They are not in docs/: nobody should edit them."""

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]*)(#[^)\s]*)?\)")
"""A link from a page in docs/ to a file elsewhere in the repository, as GitHub follows it."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, write in GENERATED.items():
        files.append(File.generated(config, name, content=write()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ lead to the repository, except to what is a page of the site."""
    return OUTSIDE.sub(lambda link: f"]({site_address(link[1], link[2] or '', config['repo_url'])})", markdown)


def site_address(path: str, anchor: str, repository: str) -> str:
    """Where a path of the repository is for a reader of the site."""
    if path.strip("/") == "recipes":
        return f"recipes.md{anchor}"
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{repository}/{kind}/main/{path}{anchor}"
