"""`cambia verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cambia.cli.app import app, console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cambia.reporting.answers import Answer
    from cambia.reporting.movement import Movement
    from cambia.reporting.verify import Audit, Broken

    Show = Callable[[str, Sequence[str], Sequence[Sequence[str]], int], None]
    """Prints a table: its title, its head, its rows, and how many of its columns hold words."""

_MOST_ROWS, _MOST_TENSORS = 40, 5


@app.command
def verify(run: str) -> int:
    """Check that what a run promised not to change is what it was; where it is not, the exit code is 1.

    Promised tensors are compared by their SHA-256 in every checkpoint that is kept, and promised answers
    bit by bit. Of what nobody promised it is shown how far it moved. Of experts it is shown how many of the
    passages that were kept go another way now, what that costs, and how many an expert answers. Nothing is
    written, no text is needed, and the run may still be going.

    Args:
        run: its name or folder, or a folder of experts, whose hashes are compared.
    """
    from rich.text import Text

    from cambia.reporting.expert_folder import is_expert_folder
    from cambia.reporting.terminal import print_table
    from cambia.reporting.units import plural
    from cambia.reporting.verify import verify_run

    if is_expert_folder(run):
        return _verify_folder(run)
    audit, out = verify_run(run), console()

    def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> None:
        print_table(out, title, head, rows[:_MOST_ROWS], words=words)
        if len(rows) > _MOST_ROWS:
            out.print(Text(f"and {len(rows) - _MOST_ROWS:,} more\n", style="dim"))

    told = f"  {audit.status}, {audit.method}, {plural(audit.ended, 'stage')} ended\n"
    out.print(Text.assemble((audit.name, "bold"), told), soft_wrap=True)
    _show_tensors(audit, show)
    _show_answers(audit, show)
    _show_routes(audit, show)
    if not audit.keeps_answers:
        _show_movements(audit.movements, show)
    for sentence in audit.notes:
        out.print(Text(sentence, style="dim"), soft_wrap=True)
    for sentence in (*audit.damaged, *audit.unchecked):
        out.print(Text(sentence, style="red"), soft_wrap=True)
    out.print(Text(_verdict(audit), style="bold green" if audit.held else "bold red"), soft_wrap=True)
    return 0 if audit.held else 1


def _verify_folder(path: str) -> int:
    from rich.text import Text

    from cambia.reporting.expert_folder import verify_experts
    from cambia.reporting.terminal import print_table
    from cambia.reporting.units import plural

    found, out = verify_experts(path), console()
    states = {True: "as written", False: "ALTERED", None: "files as written"}
    rows = [
        (expert.name, expert.state, states[expert.held], f"{expert.parameters:,}", expert.sha256[:12])
        for expert in found.experts
    ]
    if rows:
        head = ("expert", "state", "tensors", "parameters", "SHA-256")
        print_table(out, f"Experts beside a {found.base}", head, rows, words=3)
    for sentence in found.notes:
        out.print(Text(sentence, style="dim"), soft_wrap=True)
    for sentence in found.damaged:
        out.print(Text(sentence, style="red"), soft_wrap=True)
    verdict = f"{plural(len(rows), 'expert')} as written" if found.held else "this is not what was written"
    out.print(Text(verdict, style="bold green" if found.held else "bold red"), soft_wrap=True)
    return 0 if found.held else 1


def _show_tensors(audit: Audit, show: Show) -> None:
    if audit.tensors:
        rows = [
            (checked.name, f"{checked.step:,}", f"{checked.promised:,}", f"{checked.broken:,}")
            for checked in audit.checkpoints
        ]
        show("Promised tensors", ("checkpoint", "step", "promised by then", "broken"), rows, 1)
    if audit.broken:
        rows = [
            (broken.name, broken.stage, _where(broken.checkpoints), _change(broken))
            for broken in audit.broken
        ]
        show("Broken promises", ("tensor", "promised after", "broken in", "largest change"), rows, 3)


def _where(checkpoints: Sequence[str]) -> str:
    shown = ", ".join(checkpoints[:3])
    return shown if len(checkpoints) <= 3 else f"{shown} and {len(checkpoints) - 3} more"


def _change(broken: Broken) -> str:
    if broken.missing:
        return "not there"
    return "unknown" if broken.difference is None else f"{broken.difference:.2g}"


def _show_answers(audit: Audit, show: Show) -> None:
    rows = [
        (
            answer.stage,
            answer.task,
            _became(answer),
            f"{answer.difference:.2g}" if answer.difference else "none",
            f"{answer.loss_then:.4f}",
            f"{answer.loss_now:.4f}",
            f"{answer.loss_now - answer.loss_then:+.4f}",
        )
        for answer in audit.answers
    ]
    state = "promise" if audit.keeps_answers else "since then"
    head = ("asked after", "task", state, "largest change", "loss then", "loss now", "rise")
    if rows:
        show("Answers to a few rows of each task, then and now", head, rows, 3)


def _show_routes(audit: Audit, show: Show) -> None:
    rows = [
        (
            one.stage,
            one.task,
            f"{one.passages:,}",
            f"{one.astray:,}",
            f"{one.covered:,}",
            f"{one.loss_then:.4f}",
            f"{one.loss_now:.4f}",
        )
        for one in audit.routes
    ]
    head = ("kept after", "task", "passages", "go astray", "answered by experts", "loss then", "loss now")
    if rows:
        show("Passages, as they are routed", head, rows, 2)


def _became(answer: Answer) -> str:
    """What became of a promise; of an answer that nobody promised, why it may have moved."""
    if answer.promised:
        return "kept" if answer.held else "BROKEN"
    return "trained again" if answer.again else ""


def _show_movements(movements: Sequence[Movement], show: Show) -> None:
    rows = [
        (
            f"{move.before} → {move.after}",
            ", ".join(f"{group.name} {group.relative:.2g}" for group in move.groups[:3]),
            f"{move.relative:.3g}",
        )
        for move in movements
    ]
    if rows:
        show("How far the weights moved, relative to their norm", ("between", "furthest", "all"), rows, 2)
        show("The tensors that moved furthest", ("tensor", "between", "moved"), list(_furthest(movements)), 2)


def _furthest(movements: Sequence[Movement]) -> Iterator[tuple[str, str, str]]:
    """The tensors that moved furthest between any two checkpoints, each once."""
    every = [(moved.relative, moved.name, move) for move in movements for moved in move.tensors]
    most = {name: (relative, move) for relative, name, move in sorted(every, key=lambda each: each[0])}
    for name, (relative, move) in sorted(most.items(), key=lambda item: -item[1][0])[:_MOST_TENSORS]:
        yield name, f"{move.before} → {move.after}", f"{relative:.3g}"


def _lost(audit: Audit) -> str:
    """What was forgotten where texts are routed: by weights and by routes; and how much is answered."""
    from cambia.reporting.routes import coverage, lost_by_routes

    by_routes, covered = lost_by_routes(audit.routes), coverage(audit.routes)
    if covered is None:
        return ""
    routes = "not known yet" if by_routes is None else f"{by_routes:+.4f} nats per token"
    return f"; F_weight 0, F_route {routes}, coverage {covered:.0%}"


def _verdict(audit: Audit) -> str:
    from cambia.reporting.units import plural

    if audit.held and (audit.tensors or audit.promised_answers):
        answers = plural(audit.promised_answers, "answer")
        held = f"every promise held ({plural(audit.tensors, 'tensor')}, {answers})"
        return f"{held}{_lost(audit)}"
    if audit.held:
        nothing = "nothing was promised, so nothing was broken"
        return nothing if audit.ended else "no stage has ended, and nothing is promised before one has"
    counts = (
        (audit.broken_promises, "promise", "was broken", "were broken"),
        (len(audit.damaged), "checkpoint", "is damaged", "are damaged"),
        (len(audit.unchecked), "promise", "cannot be checked", "cannot be checked"),
    )
    found = [(count, noun, one if count == 1 else several) for count, noun, one, several in counts if count]
    return ", ".join(f"{plural(count, noun)} {what}" for count, noun, what in found)
