"""The command line: verbs, each of which imports what it needs when it is called.

A user's mistake is one line on stderr and exit code 2, never a traceback; an interrupted run exits with
130 after saving.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cyclopts import CycloptsError

from cambia.cli import audit, decode, grow, learn, manage, measure, plan, sweep, train, use  # noqa: F401 (their commands join the tree)
from cambia.cli.app import app
from cambia.errors import CambiaError


def main(words: Sequence[str] | None = None) -> NoReturn:
    """The `cambia` command; `words` are what stands behind it on the command line."""
    # Progress bars of other libraries would stand between ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(
            sys.argv[1:] if words is None else words,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        _fail(f"{error} (`cambia --help` lists commands, `cambia COMMAND --help` their options)")
    except CambiaError as error:
        _fail(str(error))
    except BrokenPipeError:
        # The reader went away (`cambia recipes | head`): nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; give a place that can be read and written")
    except KeyboardInterrupt:
        print("cambia: stopped", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print(f"cambia: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
