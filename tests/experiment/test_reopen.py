"""A checkpoint opened without its text is what the loop itself takes up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cambia import files
from cambia.errors import CheckpointError, RunError
from cambia.experiment.build import assemble, train_in
from cambia.experiment.reopen import reopen
from cambia.rundir import RunReader, RunWriter
from tests.reporting.runs import FORMS, experiment_of

MIXED = {"stream": {"type": "mixtures", "domains": 2, "stages": 2}}


def experiment(cache: Path, form: str, stream: dict[str, Any] | None = None) -> Any:
    made = experiment_of(FORMS[form], cache=cache)
    if stream is None:
        return made
    from cambia.experiment.tree import experiment_from, plain_tree

    tree = plain_tree(made)
    tree["data"]["stream"] = stream
    return experiment_from(tree, source="test", flags={})


@pytest.mark.parametrize("form", ["lora_per_task", "masks"])
def test_it_is_what_the_loop_takes_up(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_in(folder, experiment(tmp_path / "cache", form))
    opened = reopen(folder / "latest", RunReader(folder).config())
    writer = RunWriter(folder, resume=True)
    trainer = assemble(experiment(tmp_path / "cache", form), writer).trainer
    writer.close()
    assert opened.progress == trainer.progress
    mine, theirs = opened.method.promised(), trainer.method.promised()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    ids = torch.arange(20).view(2, 10)
    for task in range(2):
        said = []
        for model, method in ((opened.model, opened.method), (trainer.model, trainer.method)):
            with method.answering(task), torch.no_grad():
                said.append(model.eval()(input_ids=ids).logits)
        assert torch.equal(*said)


def test_stages_are_known_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_in(folder, experiment(tmp_path / "cache", "naive", MIXED["stream"]))
    writer = RunWriter(folder, resume=True)
    stream = assemble(experiment(tmp_path / "cache", "naive", MIXED["stream"]), writer).stream
    writer.close()
    opened = reopen(folder / "latest", RunReader(folder).config()).stream
    assert opened.names == stream.names
    assert opened.stages == stream.stages  # equal shares, as `mixtures` has them
    assert (opened.boundaries, opened.batch_size, opened.sequence_length) == (True, 4, 24)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_in(folder, experiment(tmp_path / "cache", "naive"))
    tree = RunReader(folder).config()
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        reopen(folder / "nowhere", tree)
    with pytest.raises(CheckpointError, match="does not fit the configuration of its run"):
        reopen(folder / "latest", {**tree, "methods": [FORMS["full_per_task"]]})
    for stream, message in (
        ({"tasks": ["copy"], "stages": ["copy+sums"]}, "no task 'sums'"),
        ({}, "a data loader"),
    ):
        state = files.read_json(folder / "latest/state.json")
        files.write_json(folder / "latest/state.json", {**state, "stream": stream})
        manifest = files.read_json(folder / "latest/manifest.json")
        manifest["sha256"]["state.json"] = files.sha256_file(folder / "latest/state.json")
        files.write_json(folder / "latest/manifest.json", manifest)
        with pytest.raises((CheckpointError, RunError), match=message):
            reopen(folder / "latest", tree)
