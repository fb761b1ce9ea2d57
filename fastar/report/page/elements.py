"""HTML as text: elements whose content is escaped, tables, and the document around them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from fastar.errors import printable


class Html(str):
    """Markup; every other text is escaped where it is put into an element."""


def tag(name: str, *content: str, **attributes: object) -> Html:
    """An element.

    Args:
        content: markup as it is, other text escaped.
        attributes: by their names, `_` for a hyphen, one at the end left out; None: not there.

    >>> tag("b", "a < b", class_="x")
    '<b class="x">a &lt; b</b>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opened = "".join(f' {key}="{html.escape(printable(str(value)))}"' for key, value in given.items())
    return Html(f"<{name}{opened}>" if name == "img" else f"<{name}{opened}>{joined(content)}</{name}>")


def joined(content: Iterable[str]) -> Html:
    """Pieces one after the other, those that are no markup escaped."""
    return Html("".join(one if isinstance(one, Html) else html.escape(printable(one)) for one in content))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> Html:
    """A table whose first column names the rows; where it is too wide, it alone is scrolled.

    Args:
        words: its cells are words, which begin at the left and may be broken.
    """
    names = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    parts = tag("caption", caption), tag("thead", names), tag("tbody", *body)
    return tag("div", tag("table", *parts, class_="words" if words else None), class_="wide")


def of_rich(given: Table) -> Html:
    """A table of the terminal as HTML, cell by cell."""
    rows = zip(*([str(cell) for cell in column.cells] for column in given.columns), strict=True)
    return table(str(given.title or ""), [" ".join(str(one.header).split()) for one in given.columns], list(rows))


def folded(summary: str, *content: str, class_: str | None = None) -> Html:
    return tag("details", tag("summary", summary), *content, class_=class_)


def lines(texts: Iterable[str]) -> Html:
    return joined(tag("p", text) for text in texts)


def script_data(content: Mapping[str, object]) -> Html:
    """Data for the page's script, numbers to six digits; no text in them can end the element."""
    text = json.dumps(_short(content), separators=(",", ":")).replace("<", "\\u003c")
    return Html(f'<script type="application/json">{text}</script>')


def _short(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_short(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def document(title: str, head: Sequence[str], sections: Mapping[str, str]) -> bytes:
    """A whole page: what `head` says, and the sections by their names.

    Its policy for browsers lets it load nothing, and run no script but its own.
    """
    style, script = (_beside(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    ids = {name: f"s{number}" for number, name in enumerate(sections)}
    links = tag("nav", *(tag("a", name, href=f"#{ids[name]}") for name in sections), aria_label="Sections")
    parts = (tag("section", tag("h2", name), Html(content), id=ids[name]) for name, content in sections.items())
    body = tag("body", tag("header", tag("h1", title), *head), links, tag("main", *parts))
    meta = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    )
    top = f"{meta}{tag('title', title)}<style>{style}</style>"
    whole = f'<!DOCTYPE html>\n<html lang="en"><head>{top}</head>{body}<script>{script}</script></html>\n'
    return whole.encode()


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
