"""A little HTML, escaped unless it says that it is markup already.

>>> tag("p", "a < b ", tag("b", "bold"), class_="note")
'<p class="note">a &lt; b <b>bold</b></p>'
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources


class Html(str):
    """Markup that is written as it is; every other string is escaped."""

    __slots__ = ()


def join(parts: Iterable[object]) -> Html:
    """Markup and text one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; ``class_`` and ``aria_label`` are spelled in Python's way, None leaves one out."""
    pairs = {
        key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None
    }
    inside = "".join(f' {key}="{html.escape(str(value))}"' for key, value in pairs.items())
    return Html(f"<{name}{inside}>{join(children)}</{name}>")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = ()) -> Html:
    """A table with a head.

    Args:
        numbers: columns that hold numbers, aligned right.
    """
    right = set(numbers)

    def cells(kind: str, row: Sequence[object]) -> Html:
        return tag(
            "tr", *(tag(kind, cell, class_="number" if i in right else None) for i, cell in enumerate(row))
        )

    body = tag("tbody", *(cells("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", cells("th", head)), body), class_="wide")


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """A table of names and what they are; empty ones are left out."""
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", value))
        for name, value in pairs
        if value not in (None, "")
    ]
    return tag("div", tag("table", tag("tbody", *rows), class_="facts"), class_="wide") if rows else Html("")


def section(title: str, *children: object) -> Html:
    """A card of the page."""
    return tag("section", tag("h2", title), *children)


def note(*words: object) -> Html:
    """A paragraph in small print."""
    return tag("p", *words, class_="note")


def tiles(pairs: Sequence[tuple[str, str]]) -> Html:
    """What matters most, as large numbers with what they are beneath."""
    columns = len(pairs) if len(pairs) <= 5 else (len(pairs) + 1) // 2
    drawn = (tag("div", tag("b", big), tag("span", small), class_="tile") for big, small in pairs)
    return tag("div", *drawn, class_="tiles", style=f"--columns:{columns}")


RINGS = Html(
    '<svg viewBox="0 0 32 32" aria-hidden="true" fill="none">'
    '<circle cx="16" cy="16" r="15" fill="var(--band)" stroke="var(--bark)" stroke-width="2"/>'
    '<circle cx="16" cy="16" r="11" stroke="var(--leaf)" stroke-width="2"/>'
    '<circle cx="16" cy="16" r="7" stroke="var(--leaf)" stroke-width="1.4"/>'
    '<circle cx="16" cy="16" r="3.4" stroke="var(--leaf)" stroke-width="1"/></svg>'
)


def document(title: str, *body: object) -> str:
    """A whole page that stands alone: no network, no script, the style sheet inside."""
    style = resources.files("cambia.reporting").joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"{title} · Cambia"),
        tag("style", Html(style)),
    )
    return f'<!doctype html>\n<html lang="en">\n{head}\n{tag("body", *body)}\n</html>\n'
