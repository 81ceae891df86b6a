"""The one error that means: what the user gave is at fault; and text made fit to be shown."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong; the message says what it is and what to do.

    The command line prints the message as one line and exits with code 2. Library callers can catch
    it as they would a ``ValueError``.
    """


def one_line(text: object) -> str:
    """Make a stranger's text safe for a terminal: one line, without control characters."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
