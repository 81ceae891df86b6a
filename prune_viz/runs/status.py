"""How far a run is: `prune-viz status`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_viz.runs.ownership import in_use, own_tensors
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.array_files import read_header
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import irregularity
from prune_viz.utils.json_files import convert_json, decode_json

RUNNING, STOPPED, COMPLETE = "running", "stopped", "complete"
UNKNOWN = "unknown"  # another user's, running or stopped
_LONGEST_LINE = 2**20  # bytes of an event


def read_status(run: RunDirectory) -> dict[str, Any]:
    """How far a run is.

    Parameters
    ----------
    run : RunDirectory
        The run directory; nothing in it is changed.

    Returns
    -------
    dict
        ``state``, one of ``running, stopped, complete, unknown``; ``stopped_by``, why it stopped where that
        is known, or None; ``layers``, a dict each of ``name, filters, done``; ``filters, done, left``,
        numbers of filters whose stimuli are wanted, found, and not; ``failed``, the tasks that failed since
        the run was last begun or taken up, a dict each of ``task, error``; ``seconds``, those of tasks done,
        summed.

    Raises
    ------
    UserError
        If the directory is not a run.
    """
    provenance = run.read_provenance()
    key, state = provenance.key, str(provenance.state)
    if state != COMPLETE:
        state = {True: RUNNING, False: STOPPED, None: UNKNOWN}[in_use(run)]
    records = provenance.layers
    counts = {record.name: record.filters for record in records}
    whole = [read_header(run.path / record.file) for record in records]
    results = [read_header(file) for file in own_tensors(run.tasks_folder)]
    done: dict[str, int] = {}
    seconds = 0.0
    for header in (*whole, *results):
        layer = (header or {}).get("layer", "")
        if header is None or key is None or header.get("run") != key or layer not in counts:
            continue
        try:
            filters, taken = int(header["filters"]), float(header["seconds"])
        except (KeyError, ValueError):  # not as we write them
            continue
        done[layer] = min(done.get(layer, 0) + max(0, filters), counts[layer])
        seconds += taken if 0 <= taken < math.inf else 0.0
    layers: list[dict[str, Any]] = [
        {"name": one.name, "filters": one.filters, "done": done.get(one.name, 0)} for one in records
    ]
    wanted, found = (sum(layer[name] for layer in layers) for name in ("filters", "done"))
    return {
        "state": state,
        "stopped_by": provenance.stopped_by if state == STOPPED else None,
        "layers": layers,
        "filters": wanted,
        "done": found,
        "left": wanted - found,
        "failed": _failed(run),
        "seconds": round(seconds, 1),
    }


@dataclass(frozen=True)
class _Event:
    """What of a line of `log.jsonl` is needed here."""

    event: str
    task: str = ""
    error: str = ""


def _failed(run: RunDirectory) -> list[dict[str, str]]:
    """Tasks that failed since the run was last begun or taken up, from the log."""
    failed: dict[str, dict[str, str]] = {}
    for event in _events(run.log_file):
        if event.event == "run started":
            failed.clear()
        elif event.event == "task failed":
            failed[event.task] = {"task": event.task, "error": event.error}
        elif event.event == "task done":
            failed.pop(event.task, None)
    return list(failed.values())


def _events(log: Path) -> Iterator[_Event]:
    """The events of a log, without lines that are none, such as the last of a process that was killed."""
    if irregularity(log) or not log.exists():
        return
    with log.open("rb") as stream:
        while line := stream.readline(_LONGEST_LINE):
            with suppress(UserError):
                yield convert_json(decode_json(line, "the log"), _Event, "the log")
