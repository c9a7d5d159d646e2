from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cambia import rundir
from cambia.reporting import load_run, write_report
from tests.pages import EVIL, Checked

Make = Callable[..., Path]
SECTIONS = [
    "Health",
    "What it learned and what it kept",
    "Loss",
    "Growth",
    "Size and cost",
    "Learning rate",
    "Next",
    "Where it comes from",
    "Configuration",
]


def written(folder: Path) -> tuple[str, Checked]:
    path = write_report(load_run(folder))
    assert path == folder / rundir.REPORT
    text = path.read_text(encoding="utf-8")
    return text, Checked(text)


def test_all_parts_are_there(make_run: Make) -> None:
    text, parsed = written(make_run(steps=50, growth_steps=(30, 80)))
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS
    assert parsed.tags.count("figure") == 5
    words = " ".join(parsed.words)
    for expected in (
        "1,049,216 → 1,521,363",
        "plateau: validation_loss not below 3.0412 for 5 measurements",
        "intermediate_size 512 → 768",
        "jump +2.4e-07",
        "Intel Xeon Platinum 8375C",
        "torch 2.13.0",
        "cambia run first_growth --name rings",
        "cpp text was generated because torch headers are missing",
        "What is a bit per byte?",
        "sequence_length: 256",
        "training tokens",
        "loss (nats per token)",
        'cambia generate rings --prompt "Once upon a time"',
    ):
        assert expected in words


def test_the_matrix_shows_the_runs_numbers_and_marks_the_diagonal(make_run: Make) -> None:
    folder = make_run(steps=10)
    text, _ = written(folder)
    table = text.split('<table class="matrix">')[1].split("</table>")[0]
    shown = re.findall(r'class="(cell own|cell)" style="--share:([\d.]+)">([\d.]+)<', table)
    matrix = load_run(folder).task_matrix().rows
    assert [float(value) for _, _, value in shown] == [round(bits, 3) for row in matrix for bits in row]
    assert [kind == "cell own" for kind, _, _ in shown] == [i == j + 1 for i in range(4) for j in range(3)]
    assert all(share == "1.000" for kind, share, _ in shown if kind == "cell own")
    assert re.findall(r'class="said">([\d.]+)<', table) == [
        "5.810",
        "6.490",
        "6.130",
        "0.200",
        "0.100",
        "0.000",
    ]


def test_a_task_to_come_is_not_shaded_as_if_it_were_learned(make_run: Make) -> None:
    text, _ = written(make_run(summary=None, steps=10, stop_at=15))
    assert len(re.findall(r'style="--share:0.000">7\.1', text)) == 2 * 2  # two tasks to come, on two splits


def test_the_page_stands_alone(make_run: Make) -> None:
    text, parsed = written(make_run(steps=50))
    assert "http://" not in text
    assert "https://" not in text
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(parsed.tags)
    assert all(load.startswith("#") for load in parsed.loads)
    style = text.split("<style>")[1].split("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    assert len(parsed.ids) == len(set(parsed.ids))


def test_whatever_a_user_wrote_is_escaped(make_run: Make) -> None:
    summary = {
        "command": EVIL,
        "notes": [EVIL],
        "machine": {"cpu": EVIL},
        "versions": {"python": EVIL},
        "cambia_version": EVIL,
        "data": [{"name": EVIL, "source": EVIL, "train_bytes": 3}],
    }
    text, parsed = written(make_run(tasks=[EVIL, "b & c $x$"], steps=10, summary=summary))
    assert "script" not in parsed.tags
    assert EVIL not in text
    assert html.escape(EVIL) in text
    assert EVIL in "".join(parsed.words)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"growth_steps": (), "validation_every": None},
            ["has no growth rules", "There are no validation points"],
        ),
        ({"tasks": ["all"], "steps": 1, "growth_steps": ()}, ["1 task, 1 step;", "Too few steps are logged"]),
        ({"stop_at": 0, "summary": None}, ["No step is logged yet", "Stopped after 0 steps"]),
        ({"stop_at": 50, "summary": None}, ["1 of 3 tasks are done", "cambia run --resume rings"]),
        (
            {"going": True, "stop_at": 50, "summary": None},
            ["Still going; this is how it stood after 50 steps"],
        ),
        ({"summary": {"data": None, "machine": None, "versions": None, "notes": None}}, ["Not known yet"]),
        ({"tasks": ["日本語", "русский"], "growth_steps": ()}, ["日本語"]),
    ],
)
def test_partial_runs_give_a_sensible_page(make_run: Make, settings: dict[str, Any], says: list[str]) -> None:
    text, parsed = written(make_run(**{"steps": 40, **settings}))
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS
    words = " ".join(parsed.words)
    assert [part for part in says if part not in words] == []
    assert not re.search(r"\bnan\b|\bNone\b", words)


def test_a_run_of_which_only_the_config_is_there(runs: Path) -> None:
    writer = rundir.RunWriter(runs / "bare")
    writer.write_config({"a": 1}, "a: 1\n")
    writer.close()
    text, parsed = written(runs / "bare")
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS
    assert "No task is scored yet" in " ".join(parsed.words)


def test_a_long_run_with_many_tasks_stays_small(make_run: Make) -> None:
    folder = make_run(tasks=[f"domain {i}" for i in range(12)], steps=150, growth_steps=range(100, 1700, 70))
    text, _ = written(folder)
    assert len(text.encode()) < 1_500_000
    assert 'class="matrix dense"' in text


def test_the_page_is_the_same_for_the_same_run(make_run: Make) -> None:
    folder = make_run(steps=20)
    assert written(folder)[0] == written(folder)[0]
