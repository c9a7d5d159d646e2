"""Reporting: reads directories of runs and of sweeps, and shows them to a person.

    >>> run = load_run("first_growth")
    >>> run.status, run.tokens, run.transfer_metrics().final_mean
    ('finished', 393216, 2.31)
    >>> write_report(run)
    PosixPath('runs/first_growth/report.html')
    >>> load_sweep("learning_rates").best().choice
    {'rate': 0.003, 'seed': 1}

Everything here is imported when it is first used: matplotlib only to draw.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Run": "cambia.reporting.run",
    "load_run": "cambia.reporting.run",
    "Check": "cambia.reporting.health",
    "check_health": "cambia.reporting.health",
    "Audit": "cambia.reporting.verify",
    "verify_run": "cambia.reporting.verify",
    "print_summary": "cambia.reporting.terminal",
    "write_report": "cambia.reporting.page",
    "Comparison": "cambia.reporting.comparison",
    "compare": "cambia.reporting.comparison",
    "load_for_comparison": "cambia.reporting.comparison",
    "print_comparison": "cambia.reporting.side_by_side",
    "Sweep": "cambia.reporting.sweeps.sweep",
    "load": "cambia.reporting.sweeps.sweep",
    "load_sweep": "cambia.reporting.sweeps.sweep",
    "print_sweep": "cambia.reporting.terminal",
    "write_sweep_report": "cambia.reporting.sweeps.page",
    "SweepComparison": "cambia.reporting.sweeps.comparison",
    "are_sweeps": "cambia.reporting.sweeps.comparison",
    "compare_sweeps": "cambia.reporting.sweeps.comparison",
    "print_sweep_comparison": "cambia.reporting.sweeps.comparison",
    "write_sweep_comparison": "cambia.reporting.sweeps.comparison",
    "write_comparison": "cambia.reporting.side_by_side",
    "MethodPoint": "cambia.reporting.task_figures",
    "forgetting_drawing": "cambia.reporting.task_figures",
    "stability_plasticity": "cambia.reporting.task_figures",
}

__all__ = [
    "Audit",
    "Check",
    "Comparison",
    "MethodPoint",
    "Run",
    "Sweep",
    "SweepComparison",
    "are_sweeps",
    "check_health",
    "compare",
    "compare_sweeps",
    "forgetting_drawing",
    "load",
    "load_for_comparison",
    "load_run",
    "load_sweep",
    "print_comparison",
    "print_summary",
    "print_sweep",
    "print_sweep_comparison",
    "stability_plasticity",
    "verify_run",
    "write_comparison",
    "write_report",
    "write_sweep_comparison",
    "write_sweep_report",
]

if TYPE_CHECKING:
    from cambia.reporting.comparison import Comparison as Comparison
    from cambia.reporting.comparison import compare as compare
    from cambia.reporting.comparison import load_for_comparison as load_for_comparison
    from cambia.reporting.health import Check as Check
    from cambia.reporting.health import check_health as check_health
    from cambia.reporting.page import write_report as write_report
    from cambia.reporting.run import Run as Run
    from cambia.reporting.run import load_run as load_run
    from cambia.reporting.side_by_side import print_comparison as print_comparison
    from cambia.reporting.side_by_side import write_comparison as write_comparison
    from cambia.reporting.sweeps.comparison import SweepComparison as SweepComparison
    from cambia.reporting.sweeps.comparison import are_sweeps as are_sweeps
    from cambia.reporting.sweeps.comparison import compare_sweeps as compare_sweeps
    from cambia.reporting.sweeps.comparison import print_sweep_comparison as print_sweep_comparison
    from cambia.reporting.sweeps.comparison import write_sweep_comparison as write_sweep_comparison
    from cambia.reporting.sweeps.page import write_sweep_report as write_sweep_report
    from cambia.reporting.sweeps.sweep import Sweep as Sweep
    from cambia.reporting.sweeps.sweep import load as load
    from cambia.reporting.sweeps.sweep import load_sweep as load_sweep
    from cambia.reporting.task_figures import MethodPoint as MethodPoint
    from cambia.reporting.task_figures import forgetting_drawing as forgetting_drawing
    from cambia.reporting.task_figures import stability_plasticity as stability_plasticity
    from cambia.reporting.terminal import print_summary as print_summary
    from cambia.reporting.terminal import print_sweep as print_sweep
    from cambia.reporting.verify import Audit as Audit
    from cambia.reporting.verify import verify_run as verify_run


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cambia.reporting' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
