"""What happened in a run, an event a line, for people and scripts that watch: `log.jsonl`."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prune_viz.utils.errors import UserError
from prune_viz.utils.files import jsonable


def now() -> str:
    """The time, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunLog:
    """Appends events to a file; a run that is taken up again goes on in the same one.

    Parameters
    ----------
    path : Path
        The file; a line an event, each a JSON object with ``time`` and ``event`` and what belongs to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False

    def __call__(self, event: str, **fields: Any) -> None:
        """Append an event.

        Raises
        ------
        UserError
            If it cannot be written.
        """
        line = json.dumps({"time": now(), "event": event, **jsonable(fields)})
        try:
            with self._path.open("ab+") as stream:
                if not self._begun and stream.tell() > 0:
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":  # left by a process that was killed
                        stream.write(b"\n")
                self._begun = True
                stream.write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}") from None
