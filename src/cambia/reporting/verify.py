"""The audit of what a run promised: `cambia verify RUN`.

When a task ends, training writes down the SHA-256 of each tensor that the method says will not change any
more, and what the model answered on a probe, a few rows of the task's text (`cambia.training.audit`). Here
every checkpoint is opened again, and what it holds is compared with what was written down.

    >>> audit = verify_run("specialists")
    >>> audit.held, audit.tensors, audit.broken
    (True, 220, ())
    >>> audit.answers[0].difference
    0.0

Nothing is written and no text is needed, and the run may be going on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cambia import files, rundir, sweepdir
from cambia.continual.methods.together import name_of
from cambia.errors import CheckpointError, ConfigError, RunError
from cambia.experiment.build import is_finished
from cambia.experiment.machine import find_device, provenance
from cambia.experiment.reopen import reopen
from cambia.experiment.tree import Experiment, experiment_from
from cambia.models.hashing import sha256
from cambia.models.saved import STATE_JSON
from cambia.reporting.answers import TOLERANCE, Answer, Heard, answers_of
from cambia.reporting.movement import Movement, movements
from cambia.reporting.routes import KeptRoutes, routes_of
from cambia.reporting.run import Status
from cambia.rundir import RunReader

_MOMENT = 0.2  # seconds
_CIRCUMSTANCES = {
    "Cambia": ("cambia_version",),
    "torch": ("versions", "torch"),
    "transformers": ("versions", "transformers"),
    "processor": ("machine", "cpu"),
    "device": ("machine", "device"),
}
"""What the bits of an answer depend on beside the weights, and where summary.json has it."""


# ---- what is found -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A checkpoint, and the promised tensors that it should hold."""

    name: str
    step: int
    ended: int
    """Stages that had ended; what was promised at their ends counts."""
    promised: int
    """Tensors promised by then."""
    broken: int
    """Those that it holds otherwise, or not at all."""


@dataclass(frozen=True)
class Broken:
    """A tensor that is not what was promised."""

    name: str
    stage: str
    """At whose end it was promised."""
    checkpoints: tuple[str, ...]
    """Those that hold it otherwise, or not at all."""
    missing: bool
    """Whether one of them does not hold it at all."""
    difference: float | None
    """The largest change of an entry; None where no checkpoint holds it as it was promised."""


@dataclass(frozen=True)
class Audit:
    """What was promised, and what became of it."""

    name: str
    folder: Path
    status: Status
    method: str
    """The classes of its methods."""
    keeps_answers: bool
    """Whether they promise answers, beside tensors."""
    ended: int
    """Stages that have ended."""
    checkpoints: tuple[Checked, ...]
    """In the order of their steps."""
    tensors: int
    """Promised tensors that were looked for."""
    broken: tuple[Broken, ...]
    answers: tuple[Answer, ...]
    """To all probes, of the newest checkpoint."""
    routes: tuple[KeptRoutes, ...]
    """Of all passages that were kept, in the newest checkpoint; empty where the method does not route."""
    movements: tuple[Movement, ...]
    """From each checkpoint to the next."""
    damaged: tuple[str, ...]
    """What is wrong with checkpoints whose files are not those that were written."""
    unchecked: tuple[str, ...]
    """What was promised and cannot be checked, and why."""
    notes: tuple[str, ...]
    """What else its reader should know."""

    @property
    def promised_answers(self) -> int:
        """Promised answers that were listened to."""
        return sum(answer.promised for answer in self.answers)

    @property
    def broken_promises(self) -> int:
        """Tensors and answers that are not what was promised."""
        return len(self.broken) + sum(answer.promised and not answer.held for answer in self.answers)

    @property
    def held(self) -> bool:
        """Whether all is as it was promised, and could be checked."""
        return not (self.broken_promises or self.damaged or self.unchecked)


# ---- the audit -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where a run is verified."""

    device: torch.device
    threads: int | None
    elsewhere: str
    """Why the same bits cannot be asked for here; empty where they can."""


@dataclass(frozen=True)
class _Seen:
    """What a checkpoint holds."""

    folder: Path
    step: int
    ended: int
    hashes: Mapping[str, str]
    """Of all that the method promises there."""
    heard: Heard
    """Its answers to the probes; of the newest checkpoint alone."""
    routes: tuple[KeptRoutes, ...] = ()
    """Likewise."""

    @property
    def name(self) -> str:
        return self.folder.name


_Line = Mapping[str, Any]
"""Of promises.jsonl."""


def verify_run(run: str | Path) -> Audit:
    """Compare what the checkpoints of a run hold with what was promised when its stages ended.

    Args:
        run: its name or folder; it may still be going, and then this is what holds so far.

    Raises:
        RunError: there is no such run, or nothing in it that could be verified.
        ConfigError, CheckpointError: its configuration or its promises cannot be read.
    """
    reader = _find(run)
    tree = reader.config()
    experiment = experiment_from(tree, source=str(reader.folder), flags={})
    contract = experiment.method.contract
    status: Status = "finished" if is_finished(reader) else "going" if reader.is_going() else "interrupted"
    place = _place(experiment, reader.summary() or {})
    with _threads(place.threads):
        seen, damaged = _look(reader, tree, place)
        lines = _promises(reader)  # after the checkpoints: a run that is going writes its promises first
        broken = _broken(lines, seen, tree)
    newest = seen[0] if seen else None
    in_time = sorted(seen, key=lambda one: (one.step, one.name == rundir.LATEST, one.name == rundir.BEST))
    return Audit(
        name=reader.name,
        folder=reader.folder,
        status=status,
        method=" + ".join(map(name_of, experiment.methods)) or "naive",
        keeps_answers=contract.keeps_answers or contract.routes,
        ended=newest.ended if newest else 0,
        checkpoints=tuple(_checked(one, lines) for one in in_time),
        tensors=len({name for one in seen for line in _due(lines, one) for name in line["tensors"]}),
        broken=broken,
        answers=newest.heard.answers if newest else (),
        routes=newest.routes if newest else (),
        movements=movements(_one_for_each_step(in_time)),
        damaged=tuple(damaged),
        unchecked=(*_lacking(lines, newest), *(newest.heard.unchecked if newest else ())),
        notes=(*(newest.heard.notes if newest else ()), *_notes(status, place, contract.keeps_answers)),
    )


def _look(reader: RunReader, tree: Mapping[str, Any], place: _Place) -> tuple[list[_Seen], list[str]]:
    """What every checkpoint holds, the newest one first; and what is wrong with damaged ones."""
    seen, damaged = list[_Seen](), dict[Path, str]()
    for folder in _newest_first(reader):
        try:
            opened = reopen(folder, tree, device=place.device)
        except CheckpointError as error:
            damaged[folder] = str(error)
            continue
        if len(opened.stream.stages) < 2 and not opened.method.contract.routes:
            raise RunError(
                f"the run {reader.name!r} has one stage, and a promise is about what comes after it: there "
                "is nothing to verify"
            )
        hashes = {name: sha256(tensor) for name, tensor in opened.method.promised().items()}
        heard = Heard() if seen else answers_of(reader, opened, exact=not place.elsewhere)
        routes = () if seen else routes_of(reader, opened)
        seen.append(_Seen(folder, opened.progress.step, opened.progress.stage, hashes, heard, routes))
    if damaged and reader.is_going():
        time.sleep(_MOMENT)  # it may have been deleting them just now
        damaged = {folder: told for folder, told in damaged.items() if _is_damaged(folder, tree)}
    return seen, list(damaged.values())


def _is_damaged(folder: Path, tree: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is there and cannot be opened."""
    try:
        reopen(folder, tree)
    except CheckpointError:
        return folder.is_dir()
    return False


def _broken(lines: Sequence[_Line], seen: Sequence[_Seen], tree: Mapping[str, Any]) -> tuple[Broken, ...]:
    """The promised tensors that a checkpoint holds otherwise, each once."""
    off: dict[str, list[tuple[_Line, _Seen]]] = {}
    for one in seen:
        for line in _due(lines, one):
            for name, promised in line["tensors"].items():
                if one.hashes.get(name) != promised:
                    off.setdefault(name, []).append((line, one))
    values = _values(off.keys(), seen, tree) if off else {}
    found = []
    for name, cases in off.items():
        first = min((line for line, _ in cases), key=lambda line: line["stage"])
        distances = [_distance(name, line, one, seen, values) for line, one in cases]
        known = [distance for distance in distances if distance is not None]
        found.append(
            Broken(
                name=name,
                stage=f"{first['stage'] + 1} {first['task']}",
                checkpoints=tuple(dict.fromkeys(one.name for _, one in cases)),
                missing=any(name not in one.hashes for _, one in cases),
                difference=max(known, default=None),
            )
        )
    return tuple(found)


def _values(
    names: Iterable[str], seen: Sequence[_Seen], tree: Mapping[str, Any]
) -> dict[tuple[str, str], Tensor]:
    """Some promised tensors by checkpoint and name; of the others only hashes are kept."""
    wanted = set(names)
    found = {}
    for one in seen:
        with suppress(CheckpointError):  # it may have gone meanwhile
            promised = reopen(one.folder, tree).method.promised()
            found |= {(one.name, name): tensor.clone() for name, tensor in promised.items() if name in wanted}
    return found


def _distance(
    name: str,
    line: _Line,
    one: _Seen,
    seen: Sequence[_Seen],
    values: Mapping[tuple[str, str], Tensor],
) -> float | None:
    """How far a tensor is from what was promised, going by a checkpoint that holds it so."""
    good = next((other.name for other in seen if other.hashes.get(name) == line["tensors"][name]), None)
    then, now = values.get((good or "", name)), values.get((one.name, name))
    if then is None or now is None or then.shape != now.shape:
        return None
    return float((now.double() - then.double()).abs().max())


def _checked(one: _Seen, lines: Sequence[_Line]) -> Checked:
    promised = [(name, digest) for line in _due(lines, one) for name, digest in line["tensors"].items()]
    off = {name for name, digest in promised if one.hashes.get(name) != digest}
    return Checked(one.name, one.step, one.ended, len({name for name, _ in promised}), len(off))


def _due(lines: Sequence[_Line], one: _Seen) -> list[_Line]:
    """What was promised by the time of a checkpoint."""
    return [line for line in lines if line["stage"] < one.ended]


def _lacking(lines: Sequence[_Line], newest: _Seen | None) -> list[str]:
    """Stages of which nothing is written down, though the method promises something."""
    if newest is None or not newest.hashes or newest.name == rundir.BEST:  # best/ is saved a moment before
        return []
    lacking = set(range(newest.ended)) - {line["stage"] for line in lines}
    return [
        f"{rundir.PROMISES} says nothing of stage {stage + 1}: what was promised at its end is not known"
        for stage in sorted(lacking)
    ]


def _one_for_each_step(in_time: Sequence[_Seen]) -> list[Path]:
    """latest/ often holds what the last stage's own checkpoint does: the first of such is taken."""
    return [one.folder for i, one in enumerate(in_time) if i == 0 or one.step != in_time[i - 1].step]


def _notes(status: Status, place: _Place, keeps_answers: bool) -> Iterable[str]:
    if status == "going":
        yield "The run is still going: this is what its checkpoints hold so far."
    if place.elsewhere and keeps_answers:
        yield (
            f"{place.elsewhere}: the same bits cannot be asked for, and answers may differ by {TOLERANCE:g} "
            "of the largest logit."
        )


# ---- the run, and where it is looked at -----------------------------------------------------------


def _find(run: str | Path) -> RunReader:
    """The run that is meant.

    Raises:
        RunError: it is none, or one that cannot be opened again.
    """
    if sweepdir.is_sweep(run):
        raise RunError(f"{run} is a sweep: verify one of its runs, `cambia verify {run}/CELL`")
    folders = [folder for folder in (Path(run), rundir.runs_root() / run) if folder.is_dir()]
    for folder in folders:
        yaml = folder / rundir.CONFIG_YAML
        if yaml.is_file() and not yaml.read_text(encoding="utf-8").strip():
            raise RunError(
                f"the run {folder.name!r} was put together in Python: its folder does not say of which "
                "method, so that it cannot be opened again"
            )
        if yaml.is_file():
            return RunReader(folder)
    if folders:
        raise RunError(_why_none(folders[0]))
    return RunReader(run)


def _why_none(folder: Path) -> str:
    """Why a folder is no run."""
    if (folder.parent / rundir.CONFIG_YAML).is_file() and (folder / files.MANIFEST).is_file():
        return f"{folder} is one checkpoint of a run: verify the run, `cambia verify {folder.parent}`"
    if (folder / "config.json").is_file():
        return (
            f"{folder} is a model without its run, and nothing in it says what was promised: name the run "
            "that made it (`cambia runs list` shows the runs there are)"
        )
    return f"{folder} is no run, it has no {rundir.CONFIG_YAML}; `cambia runs list` shows the runs there are"


def _newest_first(reader: RunReader) -> list[Path]:
    """All checkpoints, those without a manifest as well; the best one last, which may be of any time."""
    tasks = [rundir.checkpoint_task_name(line["stage"]) for line in _promises(reader)]
    named = [reader.folder / name for name in (rundir.LATEST, rundir.BEST, *tasks)]
    found = dict.fromkeys([*reader.checkpoints(), *(path for path in named if path.is_dir())])
    if not found:
        raise RunError(f"the run {reader.name!r} has no checkpoint yet; wait until it saved one")
    aside = {rundir.LATEST: 0, rundir.BEST: 2}
    return sorted(found, key=lambda path: (aside.get(path.name) == 2, -_step(path), aside.get(path.name, 1)))


def _step(checkpoint: Path) -> int:
    """Steps that a checkpoint had behind it; -1 where it does not say."""
    try:
        return int(files.read_json(checkpoint / STATE_JSON)["progress"]["step"])
    except (CheckpointError, KeyError, TypeError):
        return -1


def _promises(reader: RunReader) -> list[dict[str, Any]]:
    kinds = {"stage": int, "task": str, "tensors": dict}
    try:
        lines = reader.promises()
        if all(isinstance(line[key], kind) for line in lines for key, kind in kinds.items()):
            return lines
    except (CheckpointError, KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{reader.folder / rundir.PROMISES} is not what training writes: it was altered, and nothing can be "
        "compared with it"
    )


def _place(experiment: Experiment, summary: Mapping[str, Any]) -> _Place:
    """This machine, against the one that the run's summary tells of."""
    try:
        device = find_device(_at(summary, _CIRCUMSTANCES["device"]) or experiment.device)
    except ConfigError:  # there is none like it here
        device = torch.device("cpu")
    experiment.device = str(device)
    here = provenance(experiment)
    threads = _at(summary, ("machine", "threads")) or experiment.threads
    if not summary:
        return _Place(device, threads, f"No {rundir.SUMMARY} says yet where the run was made")
    told = {what: (_at(summary, path), _at(here, path)) for what, path in _CIRCUMSTANCES.items()}
    other = [f"{what} {then}, here {now}" for what, (then, now) in told.items() if then != now]
    return _Place(device, threads, f"The run was made elsewhere ({', '.join(other)})" if other else "")


def _at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = tree
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


@contextmanager
def _threads(count: int | None) -> Generator[None]:
    """As many threads as the run had: with another number sums are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
