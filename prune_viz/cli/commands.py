"""The command line. Torch and what else is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from prune_viz import __version__
from prune_viz.cli.arguments import (
    check_code,
    check_device,
    check_spec,
    parse_kwargs,
    parse_memory,
    parse_numbers,
    parse_shapes,
)
from prune_viz.cli.console import (
    exit_codes,
    make_console,
    make_progress,
    print_estimate,
    print_start,
    print_status,
    print_summary,
)
from prune_viz.cli.options import (
    Arch,
    ArchKwargs,
    AsJson,
    Code,
    Data,
    Engine,
    EngineName,
    Example,
    GpusPerTask,
    InputShapes,
    Key,
    Mean,
    Memory,
    ModelFile,
    Only,
    PrecisionName,
    Prior,
    QualityName,
    Quiet,
    RunArgument,
    Std,
    TaskName,
    TrustPickle,
    Workers,
)
from prune_viz.cli.pruning import apply, masks
from prune_viz.cli.viewing import figure, report, review
from prune_viz.utils.destinations import check_writable
from prune_viz.utils.errors import UserError, one_line

app = typer.Typer(
    name="prune-viz",
    help="See what every filter of a convolutional network does; remove those that do nothing or repeat.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"prune-viz {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@exit_codes
def analyze(
    model: ModelFile,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    code: Code = None,
    key: Key = None,
    trust_pickle: TrustPickle = False,
    input_shapes: InputShapes = None,
    example: Example = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Only layers whose name matches; may be repeated.", show_default="all"
        ),
    ] = None,
    task: Annotated[
        TaskName | None,
        typer.Option(
            help="What the network returns: scores of classes, of labels each for itself, of classes at "
            "every position, or other values.",
            show_default="found out",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory.", show_default="reports/MODEL's stem")
    ] = None,
    prior: Annotated[
        Prior, typer.Option(help="Bound stimuli as natural inputs, as spectrograms, or by their norm alone.")
    ] = (Prior.natural),
    only: Annotated[
        Only | None,
        typer.Option(help="Do this alone: pictures and their report, no verdicts.", show_default=False),
    ] = None,
    quality: Annotated[
        QualityName,
        typer.Option(
            help="How much work to do. A draft takes minutes; the same command with a higher quality begins "
            "where it ended."
        ),
    ] = QualityName.standard,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most steps of the optimiser.", show_default="by quality"),
    ] = None,
    canvas: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Size of the stimuli.", show_default="by receptive field"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of all that is random.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[
        PrecisionName,
        typer.Option(
            help="Of the gradients that the search for stimuli follows. auto is bfloat16 where the processor "
            "has instructions for it, which is faster."
        ),
    ] = PrecisionName.auto,
    mean: Mean = None,
    std: Std = None,
    data: Data = None,
    engine: Engine = EngineName.local,
    workers: Workers = None,
    gpus_per_task: GpusPerTask = 1.0,
    memory: Memory = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do again what the run directory already holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would take, from a short trial.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the redundant and dead filters of MODEL; write stimuli, masks and a report.

    A run that was cut short is taken up where it stopped. Exit codes: 0 done, 2 something that was given is
    wrong, 1 anything else, a failed task for instance, 130 interrupted.
    """
    kwargs, shapes = parse_kwargs(arch_kwargs), parse_shapes(input_shapes)
    normalisation = parse_numbers("--mean", mean), parse_numbers("--std", std)
    check_device(device)
    check_spec(arch)
    check_code(code)
    budget = parse_memory(memory)
    if dry_run and engine is not EngineName.local:
        raise UserError("--dry-run estimates a run on this machine: leave out --engine")
    out = out or Path("reports") / model.stem
    check_writable(out)

    from prune_viz.loading.file_kinds import identify
    from prune_viz.runs.ownership import check_run_directory

    check_run_directory(out)
    identify(model, trust_pickle)
    silent = quiet or as_json
    print_start(model, silent)

    from prune_viz.analysis import analyze as run_analysis
    from prune_viz.analysis import estimate as estimate_analysis
    from prune_viz.analysis.options import OptionFields
    from prune_viz.cli.model_options import hold_as_asked, input_shape_of, load_as_asked
    from prune_viz.loading.architectures import default_normalisation

    checkpoint = load_as_asked(model, arch, kwargs, code, key, trust_pickle, silent)
    checkpoint = hold_as_asked(checkpoint, shapes, example, budget)
    shape = input_shape_of(checkpoint)
    if normalisation == (None, None):
        normalisation = default_normalisation(checkpoint.arch, shape[0]) or normalisation
    options = OptionFields(
        input_shape=shape, layers=layers or (), task=None if task is None else task.value, prior=prior.value,
        only=None if only is None else only.value, quality=quality.value, steps=steps, canvas=canvas,
        seed=seed, device=device, precision=precision.value, mean=normalisation[0], std=normalisation[1],
        data=data, engine=engine.value, workers=workers, gpus_per_task=gpus_per_task, memory=budget,
    )  # fmt: skip
    progress = make_progress(silent)
    if dry_run:
        estimate = estimate_analysis(checkpoint.model, out=out, progress=progress, **options)
        if as_json:
            print(json.dumps(estimate.as_json()))
        print_estimate(estimate, make_console(silent))
        return
    result = run_analysis(
        checkpoint.model, out=out, fresh=fresh, progress=progress, source=checkpoint.source, **options
    )
    if as_json:
        print(json.dumps({**result.summary, "out": str(out)}))
    print_summary(result, out, make_console(silent))


@app.command()
@exit_codes
def status(run: RunArgument, as_json: AsJson = False) -> None:
    """Say what of RUN is done, failed and left."""
    from prune_viz.runs.run_directory import RunDirectory
    from prune_viz.runs.status import read_status

    found = read_status(RunDirectory(run))
    if as_json:
        print(json.dumps(found))
    else:
        print_status(found, make_console())


for _command in (masks, apply, report, figure, review):
    app.command()(_command)


@app.command()
@exit_codes
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run directory.")] = Path("reports/demo"),
) -> None:
    """Train a small network on handwritten digits, plant useless filters in it, find and remove them."""
    check_writable(out)

    from prune_viz.demo.run import run_demo

    run_demo(out, make_progress(), make_console())


def main() -> None:
    """Run the command line; mistakes in how it is called get one line too."""
    # Nobody could act on warnings of torch and numpy, and a model file could choose their words.
    warnings.simplefilter("ignore")
    # Read by torch at its first allocation, on Linux: large feature maps on huge pages are made faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Read by GNU's OpenMP: threads that wait for long beside other programs hold up those they wait for.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="prune-viz", standalone_mode=False)
    except Exception as error:
        message = getattr(error, "format_message", None)  # what all of typer's usage errors have
        if message is None:
            raise
        print(f"error: {one_line(message())} (--help shows how)", file=sys.stderr)
        code = 2
    sys.exit(code)
