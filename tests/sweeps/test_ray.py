"""Ray: the same results as anywhere else, one for each configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from cambia import rundir
from cambia.experiment.build import train_in
from cambia.sweepdir import SweepReader
from cambia.sweeps import cells_of, read_grid, run_grid
from tests.sweeps.grids import cache, grid

__all__ = ["cache"]  # a fixture

pytest.importorskip("ray")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cell_is_the_same_under_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CAMBIA_CACHE", str(cache))
    folder = run_grid(grid(seeds=2, workers=2), name="under-ray", ray=True, console=Console(quiet=True))
    assert len(SweepReader(folder).results()) == 4
    for cell in cells_of(read_grid(folder / "grid.yaml")):
        assert train_in(tmp_path / cell.name, cell.experiment())
        for name in (rundir.METRICS, rundir.EVAL):
            assert (tmp_path / cell.name / name).read_bytes() == (folder / cell.name / name).read_bytes()
