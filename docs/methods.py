"""Writes the table of docs/methods.md from what continual-learning methods say of themselves.

    python docs/methods.py                  # or: make docs

A test says when the page is out of date.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from cambia.config import resolve
from cambia.continual.methods import CONTINUAL_METHODS, Contract

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- made by docs/methods.py -->\n", "<!-- end -->\n"
COLUMNS = {
    "needs_boundaries": "is told where tasks end",
    "needs_identity": "is told the task when it answers",
    "stores_text": "keeps text",
    "grows": "on a growing model",
    "keeps_answers": "answers stay, to the bit",
}


def table() -> str:
    """A row for each method: what it is, needs and promises."""
    head = ["`type`", "what it does", *COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in CONTINUAL_METHODS:
        kind = resolve(name, CONTINUAL_METHODS, "method")
        contract: Contract = kind().contract
        said = ["yes" if getattr(contract, column) else "" for column in COLUMNS]
        lines.append(f"| `{name}` | {first_sentence(kind)} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def first_sentence(kind: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    paragraph = (inspect.getdoc(kind) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".").replace("|", "\\|")


def page() -> str:
    """The whole page: what stands outside the markers is written by hand."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
