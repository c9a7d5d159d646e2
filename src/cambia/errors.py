"""Everything that can go wrong and that a user can repair, as one family of exceptions.

Each is also the standard exception a Python programmer would expect, so both
``except CambiaError`` and ``except ValueError`` work. A message says what is wrong (with the value),
what was expected, and the flag or call that repairs it, in one line: the command line prints it as
it is and exits with code 2.

To add one: subclass `CambiaError` and the standard exception that fits. Keep the message the only
argument, so that it can be pickled and sent back from a worker.
"""

from __future__ import annotations


class CambiaError(Exception):
    """The base of all errors that a user can repair."""


class ConfigError(CambiaError, ValueError):
    """A setting is unknown, of the wrong kind, out of range, or contradicts another."""


class RewardError(ConfigError):
    """A reward told nothing apart or was not a number; what was learned until then is kept."""

    policy: object = None
    """What was learned until then, where it stopped a fit."""


class DataError(CambiaError, ValueError):
    """A file or a corpus cannot be used as it is."""


class CheckpointError(CambiaError, RuntimeError):
    """A checkpoint is missing, altered, cut short, or of another version."""


class GrowthError(CambiaError, RuntimeError):
    """A growth step is illegal for this model, or was rolled back because it was not exact."""


class ExportError(CambiaError, ValueError):
    """A model has no exact form in the class it should be exported to."""


class RunError(CambiaError, RuntimeError):
    """A run directory is taken, missing, or still being written by another process."""


class SweepError(CambiaError, RuntimeError):
    """A sweep cannot go on."""


class NonFiniteLossError(CambiaError, ArithmeticError):
    """The loss became infinite or not a number; the last good checkpoint is kept."""


class StorageFullError(CambiaError, OSError):
    """The disk is full; what was written before stays readable."""


class OutOfMemoryError(CambiaError, MemoryError):
    """The model or the batch does not fit into memory."""


class MissingExtraError(CambiaError, ImportError):
    """An optional dependency is not installed."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtraError:
        """The error for a package that comes with one of Cambia's extras."""
        return cls(f"{package!r} is not installed and this needs it: pip install 'cambia[{extra}]'")
