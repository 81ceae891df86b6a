"""The one error that means: what the user gave is at fault."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong; the message says what it is and what to do.

    The command line prints the message as one line and exits with code 2. Library callers can catch
    it as they would a ``ValueError``.
    """
