"""What a run with experts came to, as two tables: its texts and its experts.

>>> for title, head, rows, words in learned_tables(load_run("learn")):
...     print_table(console, title, head, rows, words=words)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cambia.continual.methods.experts import EXPERTS_FOLDER
from cambia.models.parts.folder import ADAPTERS
from cambia.reporting import units
from cambia.reporting.markup import Html, join, note, section, table, tag
from cambia.reporting.run import Run
from cambia.rundir import LATEST

NOTE = (
    "before: the model alone; after: each passage answered by whom its own beginning names; told: by the "
    "expert that learned the text. right: passages that went to that one; answered: that went to any expert."
)
SPECIALIST = "specialist: a copy of the whole model that learned this text alone, in as many batches."
_MOST_DECISIONS = 200  # in the page; stream.jsonl has all
_Table = tuple[str, Sequence[str], Sequence[Sequence[str]], int]


def learned_tables(run: Run) -> Iterator[_Table]:
    """Title, head, rows, and how many columns hold words; nothing for runs without experts."""
    if not run.summary.get("texts"):
        return
    compared = _has_specialists(run)
    beside = ("specialist",) if compared else ()
    yield (
        "Bits per byte of test text",
        ("text", "learned by", "before", "after", "told", *beside, "right", "answered"),
        [_text(text, compared) for text in run.summary["texts"]],
        2,
    )
    experts: list[Mapping[str, Any]] = run.summary["experts"]
    title = "Experts" if experts else "No expert was needed: nothing new came"
    yield (
        title,
        ("expert", "learned from", "tokens read", "parameters", "size"),
        [_expert(expert) for expert in experts],
        2,
    )


def note_of(run: Run) -> str:
    """What the columns are."""
    return f"{NOTE} {SPECIALIST}" if _has_specialists(run) else NOTE


def _has_specialists(run: Run) -> bool:
    return any(text.get("specialist") is not None for text in run.summary.get("texts", ()))


def _text(text: Mapping[str, Any], compared: bool) -> list[str]:
    scores = [text[name] for name in ("base", "own", "told")]
    scores += [text.get("specialist")] if compared else []
    return [
        text["name"],
        text["expert"] or "nobody",
        *("-" if score is None else f"{score:.3f}" for score in scores),
        f"{text['right']:.0%}",
        f"{text['covered']:.0%}",
    ]


def _expert(expert: Mapping[str, Any]) -> list[str]:
    state = "" if expert["state"] == "sealed" else f" ({expert['state']})"
    return [
        f"{expert['name']}{state}",
        ", ".join(expert["learned_from"]) or "-",
        f"{expert['tokens']:,}",
        f"{expert['parameters']:,}",
        units.size(expert["bytes"]),
    ]


def after_learning(run: Run) -> list[tuple[str, str]]:
    """What to call next, of a run with experts."""
    if not run.summary.get("texts"):
        return []
    adapters = run.folder / LATEST / EXPERTS_FOLDER / ADAPTERS
    return [
        ("prove it", f"cambia verify {run.handle}"),
        ("go on", f"cambia learn {run.handle} MORE_TEXT"),
        *([("adapters", f"{adapters}   (stock PEFT)")] if run.summary["experts"] else []),
    ]


def experts_section(run: Run) -> Html:
    """The part of the page that is about experts; empty for runs without."""
    parts = [
        join([tag("h3", title), table(list(head), rows, numbers=range(words, len(head)))])
        for title, head, rows, words in learned_tables(run)
    ]
    return section("Experts", *parts, note(note_of(run))) if parts else Html("")


def decisions_table(run: Run) -> Html:
    """What was decided over the stream, folded away."""
    found = [entry for entry in run.stream if "what" in entry]
    rows = [[f"{e['step']:,}", e["what"], e["part"] or "", e["reason"]] for e in found[-_MOST_DECISIONS:]]
    title = f"Decisions, {len(found):,}"
    title += f", of which the last {_MOST_DECISIONS}" if len(found) > _MOST_DECISIONS else ""
    decided = table(["step", "what", "expert", "why"], rows, numbers=[0])
    return tag("details", tag("summary", title), decided)
