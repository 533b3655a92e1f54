"""The file around a page. It holds its style and its scripts, and its policy allows these by their hashes and nothing else:
no request, no other script, no form."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from qmerge.report.terminal.console import printable
from qmerge.wording import decimal_or_dash, fixed_or_dash, percent_or_dash, percent_with_tenths, share_or_dash

STYLES = ("uPlot.min.css", "first_screen.css", "report.css")
SCRIPTS = ("uPlot.iife.min.js", "report.js")


def render(template: str, **content: Any) -> str:
    """A template as it is: a part of a page, or a page without a file around it."""
    return environment().get_template(template).render(content)


def document(template: str, *, data: dict[str, Any], **content: Any) -> str:
    """A whole page.

    Args:
        template: one that extends ``document.html``.
        data: what the script draws. Names in it are text: the script never reads them as HTML.
        content: of the template.
    """
    # The hashes of the policy are those of exactly these texts.
    styles = [asset(name) for name in STYLES]
    scripts = [asset(name) for name in SCRIPTS]
    return render(
        template,
        policy=_policy(styles, scripts),
        styles=[Markup(style) for style in styles],
        scripts=[Markup(script) for script in scripts],
        data=Markup(_json_for_html(data)),
        licence=Markup(asset("uPlot.LICENSE")),
        **content,
    )


def asset(name: str) -> str:
    """The text of a file in ``assets/``, without spaces at its ends, which the hash of a policy would count."""
    return (files("qmerge.report.html") / "assets" / name).read_text(encoding="utf-8").strip()


def _policy(styles: list[str], scripts: list[str]) -> str:
    # default-src covers connect-src and all others; the last two are not covered by it.
    return (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; connect-src 'none'; "
        f"base-uri 'none'; form-action 'none'"
    )


def _hashes(texts: list[str]) -> str:
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _json_for_html(data: dict[str, Any]) -> str:
    """JSON in which no character can end the element around it."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII only
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def environment() -> jinja2.Environment:
    """The templates and their filters."""
    # StrictUndefined: a name that a template misspells is an error, not an empty place on the page.
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("qmerge.report.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "printable": printable,
        "percent": percent_or_dash,
        "decimal": decimal_or_dash,
        "share": share_or_dash,
        "percent_with_tenths": percent_with_tenths,
        "fixed": fixed_or_dash,
    }
    return found
