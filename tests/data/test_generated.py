from __future__ import annotations

import itertools

import pytest

from cambia.data import GeneratedSource
from cambia.data.generated import TASKS
from cambia.errors import ConfigError

OPENING = {")": "(", "]": "[", "}": "{"}


def lines(source):
    return [line for document in source.documents() for line in document.text.splitlines()]


def balanced(text):
    waiting = []
    for mark in text:
        if mark not in OPENING:
            waiting.append(mark)
        elif not waiting or waiting.pop() != OPENING[mark]:
            return False
    return not waiting


def right(task, line):
    if task in ("copy", "reverse"):
        asked, answer = line.split(": ")[1].split(" > ")
        return answer == (asked if task == "copy" else asked[::-1])
    if task == "brackets":
        marks, answer = line.split()
        return balanced(marks) == (answer == "yes")
    if task == "counting":
        numbers = [int(number) for number in line.split()]
        return len({b - a for a, b in itertools.pairwise(numbers)}) == 1
    left, _, right_side = line.partition(" = ")
    value, _, modulus = right_side.partition(" mod ")
    terms = left.split()
    total = int(terms[0])
    for sign, number in zip(terms[1::2], terms[2::2], strict=True):
        total = eval(f"({total} {sign} {number})")
    return total % int(modulus) == int(value)


@pytest.mark.parametrize("difficulty", [1, 2, 3])
@pytest.mark.parametrize("task", TASKS)
def test_every_exercise_is_right_and_keeps_its_key(task, difficulty):
    source = GeneratedSource(task, difficulty=difficulty, size_bytes=20_000)
    documents = [*source.documents()]
    assert sum(len(document.text) for document in documents) == pytest.approx(20_000, abs=100)
    assert all(right(task, line) for line in lines(source))
    keys: dict[str, set[str]] = {}
    for document in documents:
        for line in document.text.splitlines():
            keys.setdefault(line, set()).add(document.key)
    assert all(len(found) == 1 for found in keys.values())


def test_one_seed_gives_one_text():
    assert lines(GeneratedSource("copy", seed=3)) == lines(GeneratedSource("copy", seed=3))
    assert lines(GeneratedSource("copy", seed=3)) != lines(GeneratedSource("copy", seed=4))


def test_the_text_of_a_seed_never_changes():
    assert lines(GeneratedSource("reverse"))[:2] == ["reverse: pqcsd > dscqp", "reverse: dlj > jld"]
    assert lines(GeneratedSource("counting"))[:2] == ["9 17 25 33 41 49 57 65", "9 17 25 33 41 49 57 65"]


@pytest.mark.parametrize("step", [1, 3, -1])
def test_counting_by_a_fixed_step(step):
    source = GeneratedSource("counting", step=step, size_bytes=20_000)
    found = lines(source)
    assert all(right("counting", line) for line in found)
    steps = {int(b) - int(a) for a, b in (line.split()[:2] for line in found)}
    assert steps == {step}
    assert len(set(found)) > 400, "there is enough to learn from"
    assert found == lines(GeneratedSource("counting", step=step, size_bytes=20_000))
    assert found != lines(GeneratedSource("counting", step=step, seed=1, size_bytes=20_000))
    sides: dict[str, set[str]] = {}
    for document in source.documents():
        for line in document.text.splitlines():
            sides.setdefault(line, set()).add(document.key)
    assert all(len(keys) == 1 for keys in sides.values())


@pytest.mark.parametrize(("task", "step"), [("copy", 1), ("counting", 0)])
def test_steps_that_make_no_sense_are_refused(task, step):
    with pytest.raises(ConfigError, match="only counting takes a step, and not 0"):
        GeneratedSource(task, step=step)
