"""Errors for users: one line of cause, one line of fix, an exit code. The command line prints no traceback for them."""

from __future__ import annotations


class TrtkitError(Exception):
    """Something the user can act on.

    Args:
        cause: what is wrong, in one line, naming the file, tensor, key or process.
        fix: what to do about it, in one line.
    """

    exit_code = 1

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.fix = fix


class CheckFailedError(TrtkitError):
    """A check ran and said no: verification, lint, validation, a goal of a load test. Exit code 1."""


class InputError(TrtkitError):
    """Wrong usage, a wrong config, or a wrong source or checkpoint. Exit code 2."""

    exit_code = 2


class LacksError(TrtkitError):
    """This machine lacks something: an extra, a program, a port, memory, the network. Exit code 3."""

    exit_code = 3


def missing_extra(package: str, extra: str) -> LacksError:
    """The error for a package that only an extra installs."""
    return LacksError(f"the Python package '{package}' is not installed", f"pip install 'trtkit[{extra}]'")
