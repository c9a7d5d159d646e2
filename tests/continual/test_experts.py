"""The lifecycle without labels: experts are born where something new comes, and only there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from cambia.continual.course import Course
from cambia.continual.domains import ReadRows
from cambia.continual.methods.experts import Experts
from cambia.continual.returns import Returns
from cambia.data.batches import Batch
from cambia.data.generated import GeneratedSource
from cambia.errors import ConfigError
from cambia.evaluation import task_matrix
from cambia.experiment.build import train_in
from cambia.experiment.reopen import reopen
from cambia.experiment.tree import experiment_from
from cambia.models import LoraExperts
from cambia.models.saved import load_model
from cambia.records import Signals
from cambia.reporting import load_run
from cambia.reporting.drawing import to_svg
from cambia.reporting.stream_figures import stream_drawing
from cambia.rundir import RunReader
from cambia.training.checkpoint import load_state

RULE = {"when": {"type": "novelty"}, "then": {"type": "add_lora_expert"}}

QUICK = {
    "type": "experts",
    "course": {"consolidation_steps": 4},
    "background_rows": 16,
    "prefix_tokens": 16,
}


def learned(
    folder: Path, order: list[str], *, steps: int = 40, boundaries: bool = False, **changes: Any
) -> RunReader:
    """A run on a stream of generated text that does not say where one kind ends, unless asked to."""
    tasks = [
        {"name": name, "source": {"type": "generated", "task": name, "size_bytes": 60_000}}
        for name in dict.fromkeys(order)
    ]
    tree: dict[str, Any] = {
        "data": {"tasks": tasks, "stream": {"type": "sequence", "order": order, "boundaries": boundaries}},
        "model": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        },
        "optimizer": {"type": "adamw", "learning_rate": 0.005},
        "training": {"steps": steps, "batch_size": 16, "sequence_length": 32},
        "methods": [QUICK],
        "growth": {"rules": [RULE]},
        "evaluation": {"every_steps": None, "max_bytes": 600, "context_tokens": 16},
        "checkpoint": {"every_steps": None, "keep_tasks": False},
        "threads": 1,
        **changes,
    }  # fmt: skip
    train_in(folder, experiment_from(tree, source="test", flags={}))
    return RunReader(folder)


def written(kind: Literal["counting", "brackets", "copy"], rows: int) -> torch.Tensor:
    """(rows, 32) bytes of generated text."""
    text = "".join(d.text for d in GeneratedSource(kind, size_bytes=4000).documents()).encode()
    return torch.tensor([[*text[i : i + 32]] for i in range(0, rows * 32, 32)])


def opened(run: RunReader) -> Any:
    return reopen(run.folder / "latest", run.config()).method


@pytest.fixture(scope="module")
def recurring(tmp_path_factory: pytest.TempPathFactory) -> RunReader:
    return learned(tmp_path_factory.mktemp("runs") / "run", ["counting", "brackets", "counting"])


def test_each_kind_of_text_has_one_expert_also_where_it_comes_again(recurring: RunReader) -> None:
    experts = opened(recurring).experts
    assert experts.names == experts.sealed == ["expert_0", "expert_1"]
    events = [event for event in recurring.growth() if event["done"]]
    assert [event["operators"][0]["type"] for event in events] == ["add_lora_expert"] * 2
    assert all(event["logit_error"] == 0 for event in events)
    assert all(event["check_flops"] > 0 for event in events)


def test_a_reopened_run_knows_who_learned_what(recurring: RunReader) -> None:
    method = opened(recurring)
    assert [method.right(source) for source in ("counting", "brackets")] == ["expert_0", "expert_1"]


def test_what_is_sealed_is_answered_as_before_by_the_right_route(recurring: RunReader) -> None:
    matrix = task_matrix(recurring.rows("eval.csv"), split="test", route="oracle")
    first = matrix.tasks.index("counting")
    untrained, _, sealed, last = (row[first] for row in matrix.rows)
    assert sealed < untrained - 0.5
    assert last == sealed, "not one bit may change"


def test_a_checkpoint_holds_the_experts_for_anybody_to_load(recurring: RunReader) -> None:
    latest = recurring.folder / "latest"
    experts = LoraExperts.from_pretrained(latest / "experts", load_model(latest))
    before = opened(recurring).experts
    assert experts.names == before.names
    assert [experts[name].sha256 for name in experts.names] == [before[n].sha256 for n in before.names]
    assert list(experts.router.domains) == list(before.router.domains) == experts.names
    text = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
    found, expected = experts.decide(text), before.decide(text)
    assert found.names == expected.names and torch.equal(found.confidence, expected.confidence)
    assert load_state(latest)["allocator"]["domains"][0]["grams"] is None, "the router has the same tables"


def test_the_stream_is_watched(recurring: RunReader) -> None:
    rows = recurring.rows("metrics.csv")
    fresh = [row for row in rows if row["novelty"] is not None]
    assert len(fresh) == 3 * 40
    assert sum(row["novelty"] >= 1 for row in fresh) == 2
    assert fresh[0]["novel_rows"] == 1, "nothing is known at first"
    # The third stage is the first kind of text again: most of it is known, and what is known trains nobody.
    known = [row["known_rows"] for row in fresh[-30:]]
    assert sum(known) / len(known) > 0.8
    certain = [row["routing_confidence"] for row in fresh if row["routing_confidence"] is not None]
    assert all(0.5 < value <= 1 for value in certain)


def test_whose_the_rows_are_is_seen(recurring: RunReader) -> None:
    fresh = [row for row in recurring.rows("metrics.csv") if row["novelty"] is not None]
    used = [line for line in recurring.stream() if "use" in line]
    assert [line["step"] for line in used] == [row["step"] for row in fresh]
    for line, row in zip(used, fresh, strict=True):
        assert len(line["use"]) == row["active_parts"] <= row["parts"]
        assert max(line["use"].values(), default=0) / line["rows"] == row["top_share"]
    first, last = used[20]["use"], used[-1]["use"]
    assert max(first, key=first.get) == max(last, key=last.get) == "expert_0"
    assert {row["parts"] for row in fresh} == {0, 1, 2}


def test_what_was_decided_is_told_in_order(recurring: RunReader) -> None:
    told = [(line["what"], line["part"]) for line in recurring.stream() if "what" in line]
    lives = [
        ("grew", "expert_0"),
        ("grew", "expert_1"),
        ("consolidating", "expert_0"),
        ("sealed", "expert_0"),
    ]
    lives += [("consolidating", "expert_1"), ("sealed", "expert_1")]
    assert [event for event in told if event in lives] == lives
    assert told.count(("novel", None)) == 2
    grown = [event["step"] for event in recurring.growth()]
    assert [line["step"] for line in recurring.stream() if line.get("what") == "novel"] == grown


def test_the_picture_of_a_stream(recurring: RunReader) -> None:
    run = load_run(recurring.folder)
    drawing = stream_drawing(run)
    assert drawing is not None
    svg = to_svg(drawing.figure, "stream", "The stream")
    for words in ("expert_1", "maturity", "sealed", "confidence", "brackets"):
        assert words in svg, words
    assert not re.search(r"#[0-9a-f]{6}", svg), "a color that does not follow the theme"
    # Of many experts the busiest have a band of their own.
    many = {f"expert_{i}": i + 1 for i in range(12)}
    line = {"step": 1, "tokens": 512, "rows": 100, "use": many}
    crowded = stream_drawing(replace(run, stream=(line, {**line, "tokens": 1024})))
    assert crowded is not None and "5 experts with fewer rows share a band" in crowded.caption
    assert stream_drawing(replace(run, stream=())) is None


def test_a_new_version_answers_and_the_old_one_stays(recurring: RunReader, tmp_path: Path) -> None:
    run = learned(
        tmp_path / "run", ["counting", "brackets", "counting"], methods=[{**QUICK, "reopen": "always"}]
    )
    method = opened(run)
    experts, before = method.experts, opened(recurring).experts
    assert experts.names == experts.sealed == ["expert_0", "expert_1", "expert_2"]
    assert experts["expert_2"].parents == ("expert_0",)
    for old in ("expert_0", "expert_1"):
        assert experts[old].sha256 == before[old].sha256, "not one bit may change"
    told = [(line["what"], line["part"]) for line in run.stream() if "what" in line]
    assert told.count(("reopened", "expert_0")) == 1 and told[-1] == ("sealed", "expert_2")
    # Whatever the old one answered goes to the new one.
    assert method.right("counting") == "expert_2"
    rows = written("counting", 16)
    routes = experts.route(rows)
    assert routes.count("expert_2") > 12 and "expert_0" not in routes
    matrix = task_matrix(run.rows("eval.csv"), split="test", route="own")
    place = matrix.tasks.index("counting")
    assert matrix.rows[-1][place] < matrix.rows[-2][place]
    assert method.taught()["expert_0"].keys() == {"counting"}, "a table says who learned what"


def test_the_open_expert_is_measured_again_only_if_it_changed(
    recurring: RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = opened(recurring)
    allocator, ids = method._allocator, written("copy", 48)
    allocator.quarantine.add(method.read(Batch(ids, ids, ids.numel())), [None] * 48, "copy")
    method.experts.add("new")
    method.meet_newcomer()
    measured: list[str] = []
    add = allocator.router.add
    monkeypatch.setattr(
        allocator.router, "add", lambda name, *given, **how: (measured.append(name), add(name, *given, **how))
    )
    for _ in range(3):
        allocator.introduce()
    assert measured == ["new"]
    allocator.allocate(allocator.lesson(16), Signals(1))
    allocator.introduce()
    assert measured == ["new"] * 2
    allocator.load_state_dict(allocator.state_dict())
    allocator.introduce()
    assert measured == ["new"] * 3


def test_few_rows_wait_until_a_whole_batch_is_due(recurring: RunReader) -> None:
    method = opened(recurring)
    allocator, ids = method._allocator, written("copy", 48)
    allocator.quarantine.add(method.read(Batch(ids, ids, ids.numel())), [None] * 48, "copy")
    method.experts.add("new")
    method.meet_newcomer()
    due = len(allocator.material.due)
    assert 16 < due < 48, "some are held back"
    assert len(allocator.lesson(16).input_ids) == 16
    assert allocator.lesson(due + 1) is None
    allocator.finish(due)
    assert allocator.phase == "seeding", "a whole batch is to be read first"
    allocator.finish(due + 1)
    assert allocator.phase == "consolidating" and not len(allocator.material.due)
    assert len(allocator.lesson(due + 1).input_ids) == due, "they are read now"


def test_first_claim_is_not_reopened() -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        Experts(routing="first_claim", reopen="always").check(sequence_length=32, vocab_size=256)


@pytest.mark.parametrize(("loss", "asks"), [(2.0, None), (1.5, None), (2.3, "old")])
def test_a_part_has_drifted_if_it_does_worse_than_in_its_time(loss: float, asks: str | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def losses(mean: float, count: int) -> torch.Tensor:
        return mean + 0.2 * torch.randn(count, generator=generator, dtype=torch.float64)

    returns = Returns("drifted", least_rows=32)
    returns.sealed("old", losses(2.0, 32))
    ids = torch.zeros(16, 8, dtype=torch.int64)
    rows = ReadRows(ids, ids, torch.zeros(16, dtype=torch.float64), torch.zeros(16, 3), 128.0)
    for _ in range(2):
        assert returns.asks(lambda part, rows: losses(loss, len(rows))) is None, "too few"
        returns.add("old", rows, "text")
    assert returns.asks(lambda part, rows: losses(loss, len(rows))) == asks
    # Asked in vain it waits for half of the rows again, and after a version that failed for twice as many.
    assert len(returns.returned["old"].rows) == (32 if asks else 16)
    returns.failed_once_more("old")
    assert returns.enough("old") == 64 and "old" not in returns.returned
    again = Returns("drifted", least_rows=32)
    again.load_state_dict(returns.state_dict())
    assert again.state_dict() == returns.state_dict()


def test_growth_that_is_not_done_leaves_the_text_unlearned(tmp_path: Path) -> None:
    run = learned(tmp_path / "run", ["counting", "brackets"], growth={"rules": [{**RULE, "max_events": 1}]})
    assert opened(run).experts.names == ["expert_0"]
    assert "turned down" in [line.get("what") for line in run.stream()]


def test_with_boundaries_each_text_ends_with_its_expert_sealed(tmp_path: Path) -> None:
    """Also one that is too little to tell another from by ranks, and known text learns nobody."""
    run = learned(tmp_path / "run", ["counting", "brackets", "counting"], steps=14, boundaries=True)
    told = [(line["what"], line["part"], line["step"]) for line in run.stream() if "what" in line]
    sealed = [(part, step) for what, part, step in told if what == "sealed"]
    assert [part for part, _ in sealed] == ["expert_0", "expert_1"]
    second = next(step for what, part, step in told if (what, part) == ("grew", "expert_1"))
    assert sealed[0][1] < second, "before it has seen anything else"
    matrix = task_matrix(run.rows("eval.csv"), split="test", route="oracle")
    assert all(matrix.rows[-1][i] < matrix.rows[0][i] - 0.2 for i in range(2))
    assert matrix.rows[1][0] == matrix.rows[-1][0], "the row at its end is scored with it sealed"


def test_a_young_expert_learns_beside_the_nearest_and_then_alone(recurring: RunReader) -> None:
    method = opened(recurring)
    method.collaborators, experts = 1, method.experts
    new = experts.add()
    rows = written("counting", 8)
    read = method.read(Batch(rows, rows, 256, "counting"))
    method._allocator.phase, method._allocator.losses = "seeding", []
    method._born(new.name, read, None)
    assert method._beside == ["expert_0"], "the one that has learned counting"
    with torch.no_grad():
        with experts.using("expert_0"):
            nearest = experts.model(rows).logits
        with experts.using(None):
            alone = experts.model(rows).logits
        with method.teaching((new.name,)):  # it is nothing yet, so what is said is what the other one says
            torch.testing.assert_close(experts.model(rows).logits, nearest)
        method._allocator.losses = [2.0, 1.9, 1.8, 1.7]  # half of the looks that maturity takes
        with method.teaching((new.name,)):
            said = experts.model(rows).logits
        assert 0 < (said - alone).norm() < (nearest - alone).norm()
        method._allocator.phase = "consolidating"
        with method.teaching((new.name,)):
            assert torch.equal(experts.model(rows).logits, alone)
    with method.teaching((new.name,)):
        experts.model(rows, labels=rows).loss.backward()
    assert all(p.grad is None for p in experts["expert_0"].parameters())
    assert any(p.grad is not None and p.grad.any() for p in new.parameters())


def test_an_expert_that_is_born_at_the_very_end_is_taught(tmp_path: Path) -> None:
    run = learned(tmp_path / "run", ["counting"], steps=3)
    assert [event["step"] for event in run.growth()] == [3]
    method = opened(run)
    assert method.experts.sealed == ["expert_0"] and method.right("counting") == "expert_0"


def test_going_on_with_other_rows_is_refused(recurring: RunReader, tmp_path: Path) -> None:
    start = {"type": "pretrained", "path": str(recurring.folder / "latest")}
    training = {"steps": 2, "batch_size": 16, "sequence_length": 24}
    with pytest.raises(ConfigError, match="measured on rows of 32 tokens"):
        learned(tmp_path / "run", ["copy"], model=start, training=training)


def test_strangeness_is_measured_in_the_same_units_for_good(recurring: RunReader, tmp_path: Path) -> None:
    start = {"type": "pretrained", "path": str(recurring.folder / "latest")}
    run = learned(tmp_path / "run", ["counting"], model=start, steps=2, seed=77)
    before, after = opened(recurring)._allocator.background, opened(run)._allocator.background
    assert torch.equal(before.mean, after.mean) and before.count == after.count


def test_without_a_rule_there_is_nothing_to_learn_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="growth"):
        learned(tmp_path / "run", ["counting", "brackets"], growth={"enabled": False})


def test_a_mature_expert_is_sealed_though_nothing_else_comes(tmp_path: Path) -> None:
    course = {"consolidation_steps": 4, "measure_steps": 4, "maturity": {"window": 2, "slope": 0.2}}
    run = learned(tmp_path / "run", ["counting"], steps=60, methods=[{**QUICK, "course": course}])
    rows = [row for row in run.rows("metrics.csv") if row["novelty"] is not None]
    measured = [row["held_out_loss"] for row in rows if row["held_out_loss"] is not None]
    assert len(measured) >= 2 and measured[-1] < measured[0]
    assert [row["maturity"] for row in rows if row["maturity"] is not None][-1] == 1
    assert rows[-1]["known_rows"] > 0.5, "what comes after it is known, and trains nobody"
    assert opened(run).experts.sealed == ["expert_0"]


def test_an_expert_may_begin_as_the_nearest(recurring: RunReader) -> None:
    method = opened(recurring)
    ids = written("counting", 16)
    rows = method.read(Batch(ids, ids, ids.numel()))
    new = method.experts.add("new")
    method._born("new", rows, None)
    assert new.parents == ()
    method.course = Course(birth="nearest")
    method._born("new", rows, None)
    assert new.parents == ("expert_0",) and new.sha256 == method.experts["expert_0"].sha256
