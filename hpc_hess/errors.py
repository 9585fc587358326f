"""Every error a user can meet: one sentence that says what is wrong and what to do, and an exit code."""

from __future__ import annotations

EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: run the same command again to go on


class HpcHessError(Exception):
    """Base of all errors shown to users as one sentence, without a traceback."""

    exit_code = 1


class ConfigError(HpcHessError):
    """The request cannot be carried out as written: configuration, paths, a run directory of another run."""

    exit_code = 2


class ModelError(ConfigError):
    """The model cannot be loaded, sharded or differentiated."""


class SplitError(ModelError):
    """The model's blocks cannot be told apart: exact products can only take it as a whole."""


class DataError(ConfigError):
    """The data cannot be read or does not fit the model."""


class UnreachableError(ModelError, DataError):
    """The Hub, which has what the local cache lacks, does not answer or may not be asked."""


class LayoutError(ConfigError):
    """The parameters do not match the table they are compared with."""


class StoreError(ConfigError):
    """The run directory cannot be opened, is damaged, locked or full."""


class LaunchError(ConfigError):
    """The launcher's environment is contradictory. ``shown_by_other``: of an error on all ranks, another one shows it."""

    def __init__(self, text: str, *, shown_by_other: bool = False) -> None:
        super().__init__(text)
        self.shown_by_other = shown_by_other


class NumericsError(HpcHessError):
    """A number that makes the result meaningless: NaN, infinity, a gradient that does not repeat."""

    exit_code = 3


class CollectiveError(HpcHessError):
    """A collective did not complete, because another rank died or hangs."""


class StoppedError(HpcHessError):
    """A computation stopped early, as a signal or a time limit asked; what it has committed is kept, to go on from."""

    exit_code = EXIT_STOPPED


def first_line(error: BaseException, none: str = "") -> str:
    """Return what a message shows of another program's error: its first line, else ``none``, or else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), none or type(error).__name__)


def in_a_line(error: BaseException) -> str:
    """Return the type of another program's error and the first line of its message."""
    return f"{type(error).__name__}, {first_line(error, 'no message')}"
