"""report.html: everything about a run on one page that stands alone.

No network, no script, no second file: pictures are SVG inside the page, the style sheet is inlined. It
follows the reader's light or dark setting and prints well. Whatever comes from a user is escaped.

    >>> write_report(load_run("first_growth"))
    PosixPath('runs/first_growth/report.html')
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from cambia import files
from cambia.reporting import figures, tables, units
from cambia.reporting.health import health
from cambia.reporting.html import Html, escaped, tag
from cambia.reporting.run import Run
