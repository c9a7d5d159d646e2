"""What a run would have come to, had it ended earlier; and that asking changes nothing."""

from __future__ import annotations

import pytest
import torch

from cambia.errors import ConfigError
from cambia.experiment.build import train_in
from cambia.experiment.tree import experiment_from
from tests.training.test_trainer import TREE, trained  # noqa: F401 (a fixture)

SETTINGS = {
    "training__steps": 24,
    "growth__rewarm_steps": 9,
    "growth__rules__0__when__at_steps": [10],
    "training__schedule__warmup_fraction": 0.0,
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optimizer__type": "muon"},
        {"training__average_decay": 0.8, "training__precision": "float16"},
        {"model__attention_dropout": 0.2, "methods": [{"type": "replay", "fraction": 0.5}]},
    ],
    ids=["plain", "muon", "average", "dropout"],
)
def test_looking_ahead_changes_nothing(trained, more):  # noqa: F811
    plain, one = trained("plain", **SETTINGS, **more)
    # Before the growth, while newborn layers warm up, and afterwards.
    looked, other = trained("looked", **SETTINGS, **more, evaluation__decayed_at=[0.3, 0.55, 0.9])
    assert [row["step"] for row in looked.rows("decayed.csv")] == [7, 13, 22]
    for name in ("metrics.csv", "eval.csv", "growth.jsonl"):
        assert (plain.folder / name).read_bytes() == (looked.folder / name).read_bytes(), name
    theirs = dict(other.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in one.model.named_parameters())


def test_the_run_would_have_come_to_that(trained):  # noqa: F811
    looked, _ = trained("looked", **SETTINGS, evaluation__decayed_at=[0.75])
    ended, _ = trained("ended", **{**SETTINGS, "training__steps": 18})
    row, last = looked.rows("decayed.csv")[0], ended.rows("metrics.csv")[-1]
    assert (row["step"], row["tokens"], row["flops"]) == (18, last["tokens"], last["flops"])
    scores = {score["split"]: score["bits_per_byte"] for score in ended.rows("eval.csv")}
    assert row["test_bits_per_byte"] == scores["test"]
    assert row["valid_bits_per_byte"] == scores["valid"]
    assert row["test_bits_per_byte"] < looked.rows("eval.csv")[0]["bits_per_byte"]


TWO = [
    {"name": task, "source": {"type": "generated", "task": task, "limit_bytes": 20_000}}
    for task in ("counting", "copy")
]


@pytest.mark.parametrize(
    "more", [{"training.schedule.type": "cosine"}, {"data.tasks": TWO}], ids=["cosine", "two tasks"]
)
def test_what_has_no_end_to_look_at_is_refused(tmp_path, more):
    experiment = experiment_from(TREE, source="test", flags={"evaluation.decayed_at": [0.5], **more})
    with pytest.raises(ConfigError, match="decayed_at"):
        train_in(tmp_path / "refused", experiment)
