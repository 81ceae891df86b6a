"""How far a run is: `prune-viz status`."""

from __future__ import annotations

import json
from typing import Any

from prune_viz.files import read_header
from prune_viz.runs import RunDirectory

RUNNING, STOPPED, COMPLETE = "running", "stopped", "complete"
UNKNOWN = "unknown"  # another user's, running or stopped


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
    key = provenance.get("key")
    state = provenance["state"]
    if state != COMPLETE:
        state = {True: RUNNING, False: STOPPED, None: UNKNOWN}[run.in_use()]
    records = run.layers()
    counts = {record.name: record.filters for record in records}
    whole = [read_header(run.path / record.file) for record in records]
    pieces = [read_header(file) for file in sorted(run.tasks_folder.glob("*.safetensors"))]
    done: dict[str, int] = {}
    seconds = 0.0
    for told in (*whole, *pieces):
        if told is not None and key is not None and told.get("run") == key and told["layer"] in counts:
            layer = told["layer"]
            done[layer] = min(done.get(layer, 0) + int(told["filters"]), counts[layer])
            seconds += float(told["seconds"])
    layers: list[dict[str, Any]] = [
        {"name": one.name, "filters": one.filters, "done": done.get(one.name, 0)} for one in records
    ]
    wanted, found = (sum(layer[name] for layer in layers) for name in ("filters", "done"))
    return {
        "state": state,
        "stopped_by": provenance.get("stopped_by") if state == STOPPED else None,
        "layers": layers,
        "filters": wanted,
        "done": found,
        "left": wanted - found,
        "failed": _failed(run),
        "seconds": round(seconds, 1),
    }


def _failed(run: RunDirectory) -> list[dict[str, str]]:
    """Tasks that failed since the run was last begun or taken up, from the log."""
    failed: dict[str, dict[str, str]] = {}
    try:
        lines = run.log_file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # the last one, of a process that was killed
            continue
        if event["event"] == "run started":
            failed.clear()
        elif event["event"] == "task failed":
            failed[event["task"]] = {"task": event["task"], "error": event["error"]}
        elif event["event"] == "task done":
            failed.pop(event["task"], None)
    return list(failed.values())
