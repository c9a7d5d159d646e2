"""`verify_run`: what is promised and held is found so; what was altered is found, told and measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cambia import files
from cambia.continual.methods.masks import FREE
from cambia.data.orders import SequenceOrder
from cambia.errors import CheckpointError, RunError
from cambia.experiment.build import train_in
from cambia.reporting.verify import Audit, verify_run
from cambia.rundir import RunWriter
from cambia.training.audit import Probe
from tests.laws.test_methods import killed_at
from tests.reporting.runs import FORMS, ORDER, experiment_of, renew, rewrite

PER_TASK = ("full_per_task", "lora_per_task")
SEALED = "/method/records/sealed/1/"
"""What the state keeps of the second task."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of each form, made once; not to be altered."""
    root = tmp_path_factory.mktemp("whole")

    def run_of(form: str) -> Path:
        if not (root / form).exists():
            train_in(root / form, experiment_of(FORMS[form], cache=root / "cache"))
        return root / form

    return run_of


@pytest.fixture
def copy(whole: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a finished run, to be altered."""

    def copied(form: str) -> Path:
        return Path(shutil.copytree(whole(form), tmp_path / form))

    return copied


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and its time."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def next_value(tensor: Tensor, place: tuple[int, ...]) -> float:
    """Change one entry by its last bit; returns by how much."""
    before = float(tensor[place])
    tensor[place] = torch.nextafter(tensor[place], torch.tensor(torch.inf))
    return float(tensor[place]) - before


# ---- what holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_what_was_promised_holds_and_nothing_is_written(form: str, whole: Callable[[str], Path]) -> None:
    folder = whole(form)
    before, state = content(folder), torch.get_rng_state()
    audit = verify_run(folder)
    assert content(folder) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert audit.held and audit.status == "finished" and audit.ended == 3 and not audit.notes
    of_tasks = [checked for checked in audit.checkpoints if checked.name != "best"]
    assert [checked.name for checked in of_tasks] == ["ckpt_task0", "ckpt_task1", "ckpt_task2", "latest"]
    assert len(audit.checkpoints) == 5
    promised = [json.loads(line)["tensors"] for line in (folder / "promises.jsonl").read_text().splitlines()]
    assert audit.tensors == len(promised[-1])
    assert [checked.promised for checked in of_tasks] == [len(promised[i]) for i in (0, 1, 2, 2)]
    assert bool(audit.tensors) == (form != "naive")
    # The first task was learned anew later; and the newest checkpoint answers as it did when it was saved.
    assert [answer.task for answer in audit.answers] == list(ORDER)
    assert [answer.promised for answer in audit.answers] == [False, *[form in PER_TASK] * 2]
    assert [answer.again for answer in audit.answers] == [True, False, False]
    assert audit.promised_answers == (2 if form in PER_TASK else 0)
    assert audit.answers[0].difference > 0 and audit.answers[-1].difference == 0
    assert (audit.answers[1].difference == 0) == (form in PER_TASK)


def test_a_naive_run_is_told_about(whole: Callable[[str], Path]) -> None:
    folder = whole("naive")
    audit = verify_run(folder)
    forgotten = audit.answers[1]
    probe = load_file(folder / "probes/stage1.safetensors")
    said = probe["1.logits"][:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(said, probe["1.input_ids"][:, 1:].flatten())
    assert forgotten.loss_then == pytest.approx(float(loss), rel=1e-6)
    assert forgotten.loss_now != forgotten.loss_then
    assert forgotten.relative == pytest.approx(forgotten.difference / float(probe["1.logits"].abs().max()))
    assert [(move.before, move.after) for move in audit.movements] == [
        ("ckpt_task0", "ckpt_task1"),
        ("ckpt_task1", "ckpt_task2"),
    ]
    assert all(0 < move.relative < 1 for move in audit.movements)


def test_no_text_is_needed(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise AssertionError("text was opened")

    folder = copy("full_per_task")
    monkeypatch.setattr("cambia.experiment.build.prepare", gone)
    monkeypatch.setattr("cambia.experiment.build.build_tokenizer", gone)
    assert verify_run(folder).held


def test_methods_together(tmp_path: Path) -> None:
    methods = ({"type": "replay", "capacity": 10}, FORMS["freeze"])
    train_in(tmp_path / "run", experiment_of(*methods, cache=tmp_path / "cache"))
    audit = verify_run(tmp_path / "run")
    assert audit.held and audit.method == "replay + freeze" and audit.tensors > 0


# ---- what was altered ----------------------------------------------------------------------------


def sealed_place(form: str, folder: Path) -> tuple[str, str, str, tuple[int, ...]]:
    """One promised entry: the file that holds it, its tensor there, the promise's name, its place."""
    inside = "model.layers.1.mlp.up_proj.weight"
    if form == "full_per_task":
        return "state.safetensors", f"{SEALED}{inside}", f"task 1: {inside}", (3, 4)
    if form == "lora_per_task":
        tensors = load_file(folder / "latest/state.safetensors")
        name = next(name for name in tensors if name.startswith(f"{SEALED}adapter.") and name.endswith("B"))
        return (
            "state.safetensors",
            name,
            f"task 1: {name.removeprefix(SEALED).replace('~1', '/')}",
            (3, 1),
        )
    if form == "masks":
        since = load_file(folder / "latest/state.safetensors")[f"/method/since/{inside}"]
        row, column = (since == 1).nonzero()[0].tolist()
        assert since[row, column] != FREE
        return "model.safetensors", inside, f"{inside} since stage 1", (row, column)
    embedding = "model.embed_tokens.weight"
    return "model.safetensors", embedding, embedding, (5, 6)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "naive"])
def test_one_altered_bit_is_found_and_measured(form: str, copy: Callable[[str], Path]) -> None:
    folder = copy(form)
    file, tensor, promise, place = sealed_place(form, folder)
    by: list[float] = []
    rewrite(folder / "latest" / file, lambda tensors: by.append(next_value(tensors[tensor], place)))
    audit = verify_run(folder)
    (broken,) = audit.broken
    assert (broken.name, broken.checkpoints, broken.missing) == (promise, ("latest",), False)
    assert broken.stage == ("1 counting" if form == "freeze" else "2 copy")
    assert broken.difference == by[0] > 0
    assert {checked.name: checked.broken for checked in audit.checkpoints}["latest"] == 1
    assert sum(checked.broken for checked in audit.checkpoints) == 1
    assert not audit.held and audit.broken_promises >= 1


@pytest.mark.parametrize("form", PER_TASK)
def test_an_altered_answer_is_found(form: str, copy: Callable[[str], Path]) -> None:
    folder = copy(form)
    _, tensor, promise, place = sealed_place(form, folder)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[tensor][place] += 0.5

    rewrite(folder / "latest/state.safetensors", change)
    audit = verify_run(folder)
    assert [broken.name for broken in audit.broken] == [promise]
    assert audit.broken[0].difference == pytest.approx(0.5)
    broken = [answer for answer in audit.answers if answer.promised and not answer.held]
    assert [answer.task for answer in broken] == ["copy"]
    assert broken and broken[0].difference > 0 and audit.broken_promises == 2


def test_by_how_much_is_unknown_where_nothing_holds_it(copy: Callable[[str], Path]) -> None:
    folder = copy("full_per_task")
    _, tensor, _, place = sealed_place("full_per_task", folder)
    for checkpoint in ("ckpt_task1", "ckpt_task2", "best"):
        shutil.rmtree(folder / checkpoint, ignore_errors=True)
    rewrite(folder / "latest/state.safetensors", lambda tensors: next_value(tensors[tensor], place))
    (broken,) = verify_run(folder).broken
    assert broken.difference is None and not broken.missing


def test_what_is_not_there_is_broken(copy: Callable[[str], Path]) -> None:
    folder = copy("full_per_task")
    state = files.read_json(folder / "latest/state.json")
    names = state["method"]["records"]["sealed"].pop("1")
    files.write_json(folder / "latest/state.json", state)
    renew(folder / "latest")
    audit = verify_run(folder)
    assert {broken.name for broken in audit.broken} == {f"task 1: {name}" for name in names}
    assert all(broken.missing and broken.checkpoints == ("latest",) for broken in audit.broken)


def test_a_promise_that_changes_is_broken_by_the_sooner_or_the_later(copy: Callable[[str], Path]) -> None:
    folder = copy("freeze")
    lines = (folder / "promises.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    name = next(iter(last["tensors"]))
    last["tensors"][name] = "0" * 64
    (folder / "promises.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    (broken,) = verify_run(folder).broken
    assert broken.name == name and broken.stage == "3 counting" and "ckpt_task1" not in broken.checkpoints


@pytest.mark.parametrize("checkpoint", ["ckpt_task0", "latest"])
@pytest.mark.parametrize("what", ["byte", "manifest", "file"])
def test_a_damaged_checkpoint_is_told_and_the_others_are_checked(
    checkpoint: str, what: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("full_per_task")
    weights = folder / checkpoint / "model.safetensors"
    if what == "byte":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    else:
        (weights if what == "file" else folder / checkpoint / "manifest.json").unlink()
    audit = verify_run(folder)
    (told,) = audit.damaged
    assert f"{checkpoint}/" in told and not audit.held
    assert checkpoint not in [checked.name for checked in audit.checkpoints]
    assert len(audit.checkpoints) == 4 and audit.tensors > 0
    assert audit.promised_answers == 2 and audit.broken_promises == 0


def test_a_state_that_does_not_fit_is_damage(copy: Callable[[str], Path]) -> None:
    folder = copy("full_per_task")
    _, tensor, *_ = sealed_place("full_per_task", folder)
    rewrite(folder / "ckpt_task1/state.safetensors", lambda tensors: tensors.pop(tensor))
    (told,) = verify_run(folder).damaged
    assert "ckpt_task1 does not fit" in told


# ---- what is lacking -----------------------------------------------------------------------------


def test_a_lost_probe(copy: Callable[[str], Path]) -> None:
    folder = copy("full_per_task")
    (folder / "probes/stage0.safetensors").unlink()  # of a task that was trained again: nobody promised
    audit = verify_run(folder)
    assert audit.held and len(audit.notes) == 1 and "after 1 counting is gone" in audit.notes[0]
    (folder / "probes/stage1.safetensors").write_bytes(b"nothing")
    audit = verify_run(folder)
    assert not audit.held and not audit.broken_promises
    assert len(audit.unchecked) == 1 and "after 2 copy cannot be read" in audit.unchecked[0]
    assert [answer.stage for answer in audit.answers] == ["3 counting"]


def test_lost_probes_of_a_run_that_promised_nothing(copy: Callable[[str], Path]) -> None:
    folder = copy("naive")
    shutil.rmtree(folder / "probes")
    audit = verify_run(folder)
    assert audit.held and not audit.answers and len(audit.notes) == 3 and audit.movements


def test_lost_promises(copy: Callable[[str], Path]) -> None:
    folder = copy("masks")
    lines = (folder / "promises.jsonl").read_text().splitlines(keepends=True)
    (folder / "promises.jsonl").write_text(lines[0] + lines[2])
    audit = verify_run(folder)
    assert not audit.held and not audit.broken
    assert len(audit.unchecked) == 1 and "stage 2" in audit.unchecked[0]
    (folder / "promises.jsonl").unlink()
    assert len(verify_run(folder).unchecked) == 3
    for wrong in ("{", "[1]", '{"stage": "one", "task": "copy", "tensors": {}}'):
        (folder / "promises.jsonl").write_text(wrong + "\n")
        with pytest.raises(CheckpointError, match="is not what training writes"):
            verify_run(folder)


# ---- where and when it is looked at --------------------------------------------------------------


def shift_logits(folder: Path, share: float) -> None:
    """Let what was answered after the second task be off by a share of the largest logit."""
    path = folder / "probes/stage1.safetensors"
    kept = load_file(path)
    kept["1.logits"][0, 0, 0] += share * kept["1.logits"].abs().max()
    save_file(kept, path)


@pytest.mark.parametrize(
    "share, elsewhere, held", [(1e-6, False, False), (1e-6, True, True), (1e-3, True, False)]
)
def test_bits_are_asked_for_where_the_run_was_made(
    share: float, elsewhere: bool, held: bool, copy: Callable[[str], Path]
) -> None:
    folder = copy("full_per_task")
    shift_logits(folder, share)
    if elsewhere:
        summary = files.read_json(folder / "summary.json")
        summary["versions"]["torch"] = "1.0"
        files.write_json(folder / "summary.json", summary)
    audit = verify_run(folder)
    assert audit.held == held and audit.answers[1].relative == pytest.approx(share, rel=0.2)
    assert bool(audit.notes) == elsewhere
    if elsewhere:
        assert "torch 1.0, here" in audit.notes[0] and "1e-05" in audit.notes[0]


def test_it_has_as_many_threads_as_the_run_had(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("naive")
    summary = files.read_json(folder / "summary.json")
    summary["machine"]["threads"] = threads = torch.get_num_threads() + 1
    files.write_json(folder / "summary.json", summary)
    asked, again = list[int](), Probe.again

    def counting(self: Probe, *arguments: Any) -> Tensor:
        asked.append(torch.get_num_threads())
        return again(self, *arguments)

    monkeypatch.setattr(Probe, "again", counting)
    verify_run(folder)
    assert asked == [threads] * 3 and torch.get_num_threads() == threads - 1


def test_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = experiment_of(FORMS["full_per_task"], cache=tmp_path / "cache")
    killed_at(experiment, tmp_path / "run", 5, monkeypatch)  # saved last after step 4, inside the second task
    audit = verify_run(tmp_path / "run")
    assert audit.held and audit.status == "interrupted" and audit.ended == 1
    assert audit.checkpoints[-1].step == 4 and audit.promised_answers == 1
    assert "No summary.json says yet" in audit.notes[-1]
    with_text = experiment_of(FORMS["full_per_task"], cache=tmp_path / "cache")
    train_in(tmp_path / "run", with_text)
    assert verify_run(tmp_path / "run").held


def test_before_the_first_task_ends_nothing_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = experiment_of(FORMS["full_per_task"], cache=tmp_path / "cache")
    killed_at(experiment, tmp_path / "run", 2, monkeypatch)
    audit = verify_run(tmp_path / "run")
    assert audit.held and (audit.ended, audit.tensors, audit.answers) == (0, 0, ())


def test_a_run_that_is_going(copy: Callable[[str], Path]) -> None:
    folder = copy("lora_per_task")
    (folder / "summary.json").unlink()
    writer = RunWriter(folder, resume=True)
    try:
        audit = verify_run(folder)
        assert audit.held and audit.status == "going" and "still going" in " ".join(audit.notes)
    finally:
        writer.close()


@pytest.mark.parametrize("deleting", [True, False])
def test_a_checkpoint_that_is_being_deleted_is_no_damage(
    deleting: bool, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy("naive")
    (folder / "ckpt_task0/model.safetensors").unlink()
    if deleting:
        monkeypatch.setattr("time.sleep", lambda _: shutil.rmtree(folder / "ckpt_task0"))
    writer = RunWriter(folder, resume=True)
    try:
        audit = verify_run(folder)
    finally:
        writer.close()
    assert audit.held == deleting and len(audit.damaged) == (not deleting)
    assert [checked.name for checked in audit.checkpoints if checked.name != "best"] == [
        "ckpt_task1",
        "ckpt_task2",
        "latest",
    ]


def test_a_checkpoint_that_is_replaced_meanwhile_is_read_again(
    copy: Callable[[str], Path], whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cambia.experiment import reopen

    folder, later = copy("full_per_task"), whole("full_per_task") / "latest"
    for checkpoint in ("latest", "ckpt_task2", "best"):
        shutil.rmtree(folder / checkpoint)
    shutil.copytree(folder / "ckpt_task1", folder / "latest")
    load, done = reopen.load_model, list[Path]()

    def replacing(checkpoint: Path) -> Any:
        if checkpoint.name == "latest" and not done:  # between its state and its model
            done.append(checkpoint)
            shutil.rmtree(checkpoint)
            shutil.copytree(later, checkpoint)
        return load(checkpoint)

    monkeypatch.setattr(reopen, "load_model", replacing)
    audit = verify_run(folder)
    assert done and audit.held and audit.ended == 3 and audit.checkpoints[-1].step == 9


# ---- what cannot be verified ---------------------------------------------------------------------


def refused(place: Any) -> str:
    with pytest.raises(RunError) as error:
        verify_run(place)
    return str(error.value)


def test_what_is_no_run(copy: Callable[[str], Path], tmp_path: Path) -> None:
    assert "there is no run 'nowhere'" in refused("nowhere")
    (tmp_path / "foreign").mkdir()
    assert "is no run" in refused(tmp_path / "foreign")
    folder = copy("naive")
    assert f"cambia verify {folder}" in refused(folder / "latest")
    shutil.copytree(folder / "latest", tmp_path / "model")
    assert "is a model without its run" in refused(tmp_path / "model")


def test_what_has_nothing_to_verify(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("naive")
    (folder / "config.yaml").write_text("")
    assert "put together in Python" in refused(folder)
    experiment = experiment_of(FORMS["naive"], cache=tmp_path / "cache")
    experiment.data.stream = SequenceOrder(order=["copy"])
    train_in(tmp_path / "single", experiment)
    assert "has one stage" in refused(tmp_path / "single")
    for checkpoint in (tmp_path / "single").glob("*/manifest.json"):
        shutil.rmtree(checkpoint.parent)
    assert "has no checkpoint" in refused(tmp_path / "single")


def test_an_audit_is_a_record(whole: Callable[[str], Path]) -> None:
    audit = verify_run(whole("naive"))
    assert isinstance(audit, Audit) and isinstance(hash(audit.answers), int)
    with pytest.raises(AttributeError):
        audit.tensors = 3  # ty: ignore[invalid-assignment]
