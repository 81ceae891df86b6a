"""What the command line shows: consoles, progress, the summary of an analysis, and how it ends."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from prune_viz.utils.errors import IncompleteError, RunInterruptedError, UserError, one_line

if TYPE_CHECKING:
    from rich.console import Console

    from prune_viz.analysis.dry_run import Estimate
    from prune_viz.analysis.found import Analysis
    from prune_viz.utils.progress import Progress

P = ParamSpec("P")
# What a disk refuses with.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def make_console(silent: bool = False) -> Console:
    """A console that takes nothing it is given for markup; a silent one prints nothing."""
    from rich.console import Console

    return Console(markup=False, highlight=False, quiet=silent)


def make_progress(silent: bool = False) -> Progress:
    """Bars where someone watches, lines elsewhere, and silence where it is asked for."""
    from prune_viz.cli.progress_bar import BarProgress
    from prune_viz.utils.progress import PlainProgress, Progress

    if silent:
        return Progress()
    return BarProgress() if sys.stderr.isatty() else PlainProgress()


def print_start(path: Path, silent: bool = False) -> None:
    """Print at once, on standard error, what a command begins with: importing PyTorch alone takes seconds."""
    if not silent:
        print(f"loading {one_line(path)}", file=sys.stderr, flush=True)


def print_summary(result: Analysis, out: Path, console: Console) -> None:
    """Print what an analysis found, what it would save, what it took and where things lie."""
    from prune_viz.pruning.outcome import describe_change
    from prune_viz.runs.run_directory import RunDirectory
    from prune_viz.runs.verdicts import Verdict

    summary: Mapping[str, Any] = result.summary
    run = RunDirectory(out)
    found = _grid(console)
    for name in ("filters", *Verdict):
        share = f"{summary[name] / max(summary['filters'], 1):.1%}" if name != "filters" else ""
        found.add_row(name, f"{summary[name]:,}", share)
    console.print(found)
    saved = _grid(console)
    for title, name in (("parameters", "parameters"), ("MACs", "macs")):
        before, after = summary[name], summary[f"{name}_after"]
        change = f"{after / before - 1:+.1%}" if before else ""
        saved.add_row(title, f"{before:,}", "->", f"{after:,}", change)
    console.print(saved)
    if result.masks.origin.output is not None:
        console.print(str(result.masks.origin.output))
    if result.masks.measured is not None:
        masks = result.masks
        for line in describe_change(masks.predicted, masks.measured, masks.measured_on, masks.rough):
            console.print(one_line(line))
    elif result.masks.rough:
        console.print(f"note: what is predicted is rough: {result.masks.rough}")
    console.print(f"took {summary['seconds']:,.0f} s and at most {summary['peak_mib']:,.0f} MiB")
    for what, path in (("report", run.report_page), ("masks", run.masks_file), ("table", run.filters_file)):
        console.print(f"{what + ':':<8}{one_line(path)}", soft_wrap=True)


def print_estimate(estimate: Estimate, console: Console) -> None:
    """Print what an analysis would take: a row a layer, then the stages, memory and disk."""
    table = _grid(console, "layer", "filters", "canvas", "at a time", "seconds")
    for cost in estimate.layers:
        layer = cost.layer
        canvas = "x".join(map(str, layer.canvas))
        name, seconds = one_line(layer.name), f"{cost.seconds:,.1f}"
        table.add_row(name, f"{layer.filters:,}", canvas, f"{cost.batch}", seconds)
    console.print(table)
    stages = _grid(console)
    for stage, taken in (*estimate.seconds.items(), ("in all", estimate.total)):
        stages.add_row(stage, f"{taken:,.0f} s")
    console.print(stages)
    filters = sum(cost.layer.filters for cost in estimate.layers)
    console.print(
        f"{filters:,} filters, {estimate.workers} tasks at a time (a layer's seconds are shared by them)"
    )
    console.print(
        f"at most {estimate.memory / 2**20:,.0f} MiB of memory, {estimate.disk / 2**20:,.0f} MiB on disk"
    )


def print_status(found: Mapping[str, Any], console: Console) -> None:
    """Print how far a run is, with the layers that are not done."""
    share = f"{found['done'] / max(found['filters'], 1):.1%}"
    done = sum(layer["done"] == layer["filters"] for layer in found["layers"])
    why = f" ({one_line(found['stopped_by'])})" if found["stopped_by"] else ""
    console.print(f"{found['state']}{why}", soft_wrap=True)
    console.print(
        f"stimuli: {found['done']:,} of {found['filters']:,} filters ({share}), {found['left']:,} left"
    )
    console.print(f"layers:  {done:,} of {len(found['layers']):,}")
    left = _grid(console)
    for layer in found["layers"]:
        if 0 < layer["done"] < layer["filters"]:
            left.add_row(one_line(layer["name"]), f"{layer['done']:,}", "of", f"{layer['filters']:,}")
    if left.row_count:
        console.print(left)
    for failed in found["failed"]:
        console.print(f"failed:  {one_line(failed['task'])}: {one_line(failed['error'])}", soft_wrap=True)
    if found["state"] == "stopped":
        console.print("the same analyze command goes on from there")


def _grid(console: Console, *titles: str) -> Any:
    """A table of five columns, with titles or without."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE if console.is_terminal else None, show_header=bool(titles), pad_edge=False)
    for number, title in enumerate(titles or [""] * 5):
        table.add_column(title, justify="left" if number == 0 else "right")
    return table


def exit_codes(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what `command` raises into one line on standard error and the exit code for it.

    2 for what the user gave, 130 for an interrupt, 1 for anything else. With the environment variable
    ``PRUNE_VIZ_TRACEBACK`` set, the traceback of anything else is shown too.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            line, code = f"error: {one_line(error)}", 2
        except RunInterruptedError:
            line, code = "interrupted: what is done is kept, and the same command goes on from there", 130
        except IncompleteError as error:
            line, code = f"incomplete: {one_line(error)}", 1
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        except typer.Exit:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                where = f"{one_line(error.filename)}: " if error.filename else ""
                line, code = f"error: {where}{error.strerror}", 2
            else:
                if os.environ.get("PRUNE_VIZ_TRACEBACK"):
                    traceback.print_exc()
                what = one_line(f"{type(error).__name__}: {error}")
                line, code = f"failed: {what} (PRUNE_VIZ_TRACEBACK=1 shows where)", 1
        else:
            return
        print(line, file=sys.stderr)
        raise typer.Exit(code)

    return guarded
