"""The sweep directory: one result per configuration, whoever writes, whatever is killed."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from cambia.errors import RunError
from cambia.sweepdir import (
    CELLS,
    RESULTS,
    TABLE,
    CellRecord,
    Result,
    SweepReader,
    SweepWriter,
    find_sweep,
    is_sweep,
)


def record(number: int) -> CellRecord:
    return CellRecord(f"cell-{number}", f"{number:016x}", {"size": number, "seed": 0})


def result(number: int, **more: Any) -> Result:
    cell = record(number)
    values = {"status": "finished", "results": {"loss": 1 / 3 + number}, "seconds": 1.5, **more}
    return Result(cell.name, cell.hash, cell.choice, **values)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepWriter:
    writer = SweepWriter(tmp_path / "sweep")
    writer.write_grid("base: x\n", [record(i) for i in range(4)])
    return writer


def test_what_was_written_is_read(sweep: SweepWriter) -> None:
    assert sweep.record(result(1)) and sweep.record(result(2, status="failed", results={}, error="so"))
    reader = SweepReader(sweep.folder)
    assert reader.cells() == [record(i) for i in range(4)] and reader.grid() == "base: x\n"
    assert (
        reader.results()
        == sweep.results()
        == {r.hash: r for r in (result(1), reader.results()[record(2).hash])}
    )
    assert reader.results()[record(2).hash].error == "so"
    sweep.write_table(reader.cells())
    rows = list(csv.DictReader((sweep.folder / TABLE).read_text().splitlines()))
    assert [(row["cell"], row["size"], row["status"]) for row in rows] == [
        ("cell-1", "1", "finished"),
        ("cell-2", "2", "failed"),
    ]
    assert float(rows[0]["loss"]) == 1 / 3 + 1


def test_a_configuration_finishes_once(sweep: SweepWriter) -> None:
    other = SweepWriter(sweep.folder)
    assert sweep.record(result(1))
    assert not other.record(result(1, results={"loss": 9.0}))
    assert not other.record(result(1, status="failed"))
    assert len((sweep.folder / RESULTS).read_text().splitlines()) == 1


def test_a_failure_may_be_followed_by_a_result(sweep: SweepWriter) -> None:
    sweep.record(result(1, status="failed", error="disk"))
    assert sweep.record(result(1))
    assert SweepReader(sweep.folder).results()[record(1).hash].status == "finished"


def test_a_line_cut_short_is_nobodys_result(sweep: SweepWriter) -> None:
    sweep.record(result(1))
    path = sweep.folder / RESULTS
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    fresh = SweepWriter(sweep.folder)
    assert len(fresh.results()) == len(SweepReader(sweep.folder).results()) == 1
    assert fresh.record(result(2))
    assert [line.startswith(b"{") for line in path.read_bytes().splitlines()] == [True, True]


def test_a_damaged_line_leaves_its_cell_without_a_result(sweep: SweepWriter) -> None:
    sweep.record(result(1))
    sweep.record(result(2))
    path = sweep.folder / RESULTS
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first[:20] + b"\n" + second)
    fresh = SweepWriter(sweep.folder)
    assert set(fresh.results()) == {record(2).hash}
    assert fresh.record(result(1)) and len(SweepReader(sweep.folder).results()) == 2


def test_lines_that_somebody_took_out_are_forgotten(sweep: SweepWriter) -> None:
    for number in (1, 2, 3):
        sweep.record(result(number))
    path = sweep.folder / RESULTS
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    assert sweep.record(result(4))
    assert set(sweep.results()) == {record(2).hash, record(4).hash}
    assert b"\0" not in path.read_bytes()


def test_a_claim_belongs_to_one_process_and_ends_with_it(sweep: SweepWriter) -> None:
    claim, other = sweep.claim("a"), sweep.claim("b")
    assert claim is not None and other is not None and sweep.claim("a") is None
    claim.release()
    other.release()
    child = os.fork()
    if not child:
        held = SweepWriter(sweep.folder).claim("a")
        os._exit(0 if held is not None else 1)  # as if it was killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    after = sweep.claim("a")
    assert after is not None
    after.release()


def test_a_search_adds_cells(sweep: SweepWriter) -> None:
    sweep.add_cells([record(3), record(7)])
    sweep.write_grid("again", None)
    assert [cell.hash for cell in SweepReader(sweep.folder).cells()] == [
        record(i).hash for i in (0, 1, 2, 3, 7)
    ]


def test_names(sweep: SweepWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path))
    assert is_sweep("sweep") and find_sweep("sweep") == sweep.folder and not is_sweep("other")
    with pytest.raises(RunError, match="there is no sweep 'other'"):
        find_sweep("other")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(RunError, match="is a run and no sweep"):
        SweepWriter(run)
    assert (sweep.folder / CELLS).exists()


def test_a_sweep_that_somebody_works_on_is_going(sweep: SweepWriter) -> None:
    reader = SweepReader(sweep.folder)
    assert not reader.is_going()
    claim = sweep.claim("a")
    assert claim is not None and reader.is_going()
    claim.release()
    assert not reader.is_going()
