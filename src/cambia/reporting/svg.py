"""A whole SVG file turned into an element that stands inside a page and takes its colors from it."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping


def embedded(text: str, name: str, *, title: str, variables: Mapping[str, str]) -> str:
    """The <svg> element of a file, without what only a file needs.

    Args:
        text: the file's content.
        name: prefix of its ids, unique within the page.
        title: what a screen reader says.
        variables: CSS variable -> the color that it replaces, as the file spells it.
    """
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    # Ids are shared by everything on the page.
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for variable, color in variables.items():
        body = body.replace(color, f"var(--{variable})")
    start, _, inside = body.partition(">")
    box = re.search(r'viewBox="[^"]+"', start)
    assert box is not None, "the file has no viewBox"
    return f'<svg {box.group()} role="img" aria-label="{html.escape(title)}">{inside.strip()}'
