"""How numbers are written for people: short, with their unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def count(number: float) -> str:
    """``1245824`` -> ``"1.25M"``; thousands, millions, billions, trillions."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def flops(number: float) -> str:
    """``3.1e15`` -> ``"3.1 PFLOP"``."""
    return _scaled(number, (" ", " k", " M", " G", " T", " P", " E", " Z", " Y")) + "FLOP"


def size(number_of_bytes: float) -> str:
    """``1500000`` -> ``"1.5 MB"``."""
    return _scaled(number_of_bytes, (" ", " k", " M", " G", " T")) + "B"


def _scaled(number: float, prefixes: Sequence[str]) -> str:
    place = 0
    # 999.5 would be written as "1000": it belongs to the next prefix already.
    while abs(number) >= 999.5 and place < len(prefixes) - 1:
        number, place = number / 1000, place + 1
    return f"{number:.3g}{prefixes[place]}"


def plural(number: int, noun: str) -> str:
    """``"1 step"``, ``"1,200 steps"``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """``192.4`` -> ``"3 min 12 s"``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole / 86_400:,.1f} days"


def jump(before: float | None, after: float | None) -> str:
    """The signed difference, with as few digits as say something."""
    if before is None or after is None:
        return "not measured"
    return "0" if after == before else f"{after - before:+.2g}"


def error(value: float | None) -> str:
    """A relative error: ``"3.1e-07"``, ``"0"``, or a dash where it was not measured."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def operator(fields: Mapping[str, Any], *, full: bool = False) -> str:
    """An operator in a few words: ``"widen_ffn x1.5"``; `full` adds every setting."""
    name = str(fields["type"]).rpartition(":")[2]
    amounts = {"factor": "x{}", "add": "+{}", "to": "to {}"}
    words = [
        name,
        *(form.format(fields[key]) for key, form in amounts.items() if fields.get(key) is not None),
    ]
    if full:
        words += [f"{key}={value}" for key, value in fields.items() if key not in ("type", *amounts)]
    return " ".join(words)


def operators(event_operators: Sequence[Mapping[str, Any]], *, full: bool = False) -> str:
    """The operators of one growth event."""
    return ", ".join(operator(fields, full=full) for fields in event_operators)
