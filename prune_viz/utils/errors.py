"""The one error that means: what the user gave is at fault; and text made fit to be shown."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user gave is wrong; the message says what it is and what to do.

    The command line prints the message and exits with code 2. Library callers can catch it as they would a
    ``ValueError``. The message is one line without control characters, whatever an untrusted file put in it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class LayerError(UserError):
    """One layer cannot be analysed; the message says why. Others can."""


class IncompleteError(Exception):
    """Part of the work failed. What is done is kept; the message says what is not, and why."""


class RunInterruptedError(KeyboardInterrupt):
    """Someone interrupted a run. What is done is kept."""


def one_line(text: object) -> str:
    """Make untrusted text safe for a terminal: one line, without control characters."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def brief(error: Exception, limit: int = 160) -> str:
    """What untrusted code said of its failure, on one line; the error's own name where it said nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def few(names: Sequence[str], limit: int = 4) -> str:
    """List the first few names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
