"""The commands by which a person sees what a run found: `report`, `figure` and `review`."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from prune_viz.cli.console import exit_codes, make_console, make_progress
from prune_viz.cli.options import Force, RunArgument
from prune_viz.utils.destinations import check_destination
from prune_viz.utils.errors import UserError, one_line


@exit_codes
def report(
    run: RunArgument,
    single_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it as one file too, for a mail.", show_default=False),
    ] = None,
    force: Force = False,
) -> None:
    """Write the report of RUN again, from what the run directory holds."""
    from prune_viz.runs.ownership import in_use
    from prune_viz.runs.run_directory import RunDirectory

    if single_file is not None:
        if Path(os.path.realpath(single_file)).is_relative_to(os.path.realpath(run)):
            raise UserError(f"--single-file {single_file} lies in the run directory; name a file elsewhere")
        check_destination("--single-file", single_file, force=force)
    directory = RunDirectory(run)
    directory.read_provenance()
    if in_use(directory):
        raise UserError(
            f"analyze is at work in {run} and writes its report itself: what is there so far is in "
            f"{directory.report_page}"
        )

    from prune_viz.report import write_report
    from prune_viz.report.single_file import write_single_file

    with make_progress() as progress:
        page = write_report(directory, progress)
    console = make_console()
    console.print(f"report: {one_line(page)}", soft_wrap=True)
    if single_file is not None:
        size = write_single_file(directory, single_file)
        console.print(f"in one file: {one_line(single_file)} ({size / 1e6:.1f} MB)", soft_wrap=True)


@exit_codes
def figure(
    run: RunArgument,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write: FILE.svg, .png or .pdf.", show_default=False)
    ],
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which layer.", show_default="the network by depth")
    ] = None,
    force: Force = False,
) -> None:
    """Draw stimuli of RUN for a paper: a layer's in cluster order, or some of every depth."""
    from prune_viz.runs.run_directory import RunDirectory

    directory = RunDirectory(run)
    directory.read_provenance()
    check_destination("--out", out, directory.files, force)

    from prune_viz.report.figures import write_figure

    what = write_figure(run, layer, out)
    make_console().print(f"{one_line(what)}: {one_line(out)}", soft_wrap=True)


@exit_codes
def review(
    run: RunArgument,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Where to listen; 0 is any that is free.")
    ] = 0,
) -> None:
    """Serve the report of RUN to this machine alone; what is decided in it is saved as RUN/review.json."""
    from prune_viz.runs.run_directory import RunDirectory

    directory = RunDirectory(run)
    directory.read_provenance()
    directory.read_decisions()

    from prune_viz.report.review_server import ReviewServer

    console = make_console()
    with ReviewServer(directory, port) as server:
        console.print(f"open {server.url}", soft_wrap=True)
        console.print("Ctrl-C ends")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        file = server.review_file
    if file.is_file() and not file.is_symlink():
        masks = shlex.join(["prune-viz", "masks", str(run), "--review", str(file)])
        console.print(f"saved in {one_line(file)}; masks: {one_line(masks)}", soft_wrap=True)
