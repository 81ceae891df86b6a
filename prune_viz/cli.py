"""The command line. Torch and what else is heavy is imported by the command that needs it."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from prune_viz import __version__
from prune_viz.arguments import (
    check_device,
    check_output,
    check_writable,
    parse_kwargs,
    parse_numbers,
    parse_shapes,
)
from prune_viz.errors import UserError, one_line
from prune_viz.options import (
    Arch,
    ArchKwargs,
    Code,
    Compensate,
    Example,
    InputShapes,
    Key,
    Mode,
    ModelFile,
    Prior,
    RunArgument,
    TrustPickle,
)
from prune_viz.terminal import make_console, make_progress, print_summary

if TYPE_CHECKING:
    from prune_viz.checkpoints import Checkpoint

P = ParamSpec("P")

app = typer.Typer(
    name="prune-viz",
    help="See what every filter of a convolutional network does; remove those that do nothing or repeat.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        except KeyboardInterrupt:
            line, code = "interrupted", 130
        except typer.Exit:
            raise
        except Exception as error:
            if os.environ.get("PRUNE_VIZ_TRACEBACK"):
                traceback.print_exc()
            what = one_line(f"{type(error).__name__}: {error}")
            line, code = f"failed: {what} (PRUNE_VIZ_TRACEBACK=1 shows where)", 1
        else:
            return
        print(line, file=sys.stderr)
        raise typer.Exit(code)

    return guarded


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
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory.", show_default="reports/MODEL's stem")
    ] = None,
    prior: Annotated[
        Prior, typer.Option(help="Bound stimuli as natural pictures, or by their norm alone.")
    ] = (Prior.natural),
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most steps of an ascent.", show_default="176"),
    ] = None,
    canvas: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Size of the stimuli.", show_default="by receptive field"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of all that is random.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    mean: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Mean of the normalisation, of pixels in 0..1."),
    ] = None,
    std: Annotated[
        str | None, typer.Option(metavar="R,G,B", help="Standard deviation of the normalisation.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Example images, unlabelled: what is natural is measured on them."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do again what the run directory already holds.")
    ] = False,
) -> None:
    """Find the redundant and dead filters of MODEL; write stimuli, masks and a report."""
    kwargs, shapes = parse_kwargs(arch_kwargs), parse_shapes(input_shapes)
    normalisation = parse_numbers("--mean", mean), parse_numbers("--std", std)
    check_device(device)
    out = out or Path("reports") / model.stem
    check_writable(out)
    checkpoint = _load(model, arch, kwargs, code, key, trust_pickle)

    from prune_viz import analysis
    from prune_viz.architectures import default_normalisation

    checkpoint = _held(checkpoint, shapes, example)
    shape = _input_shape(checkpoint)
    if normalisation == (None, None):
        normalisation = default_normalisation(checkpoint.arch, shape[0]) or normalisation
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    result = analysis.analyze(
        checkpoint.model,
        input_shape=shape,
        mean=normalisation[0],
        std=normalisation[1],
        data=data,
        out=out,
        layers=layers or (),
        prior=prior.value,
        canvas=canvas,
        seed=seed,
        device=device,
        fresh=fresh,
        progress=make_progress(),
        source=checkpoint.source,
        **options,
    )
    print_summary(result, out, make_console())


@app.command()
@exit_codes
def masks(
    run: RunArgument,
    ratio: Annotated[
        float | None, typer.Option(metavar="R", help="Share of the filters to remove, 0 to 1.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(metavar="R", help="Share of the multiply-accumulates to remove, 0 to 1.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="T", help="Damage allowed to each group, in the run's own unit: nats for classifiers."
        ),
    ] = None,
    round_to: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="With a budget: leave layers a multiple of N filters; hardware is fastest at 8 or 16.",
        ),
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write.", show_default="RUN/masks.pt")
    ] = None,
) -> None:
    """Write masks for a budget from RUN, without a new analysis; by default, those of its verdicts."""
    given = {"ratio": ratio, "macs": macs, "tolerance": tolerance}
    budget = {name: value for name, value in given.items() if value is not None}
    if len(budget) > 1:
        raise UserError(f"give one of --{' and --'.join(budget)}, not both")
    for name, value in budget.items():
        if not value >= 0:
            raise UserError(f"--{name} must be at least 0, not {value:g}")
        if name != "tolerance" and value >= 1:
            raise UserError(f"--{name} must be at least 0 and below 1, not {value:g}")
    if round_to != 1 and not budget:
        raise UserError("--round-to needs a budget: --ratio, --macs or --tolerance")
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a directory; name a file")
    check_writable((out or run).absolute().parent)

    from prune_viz.budgets import write_masks

    console = make_console()
    for line in write_masks(run, out, round_to=round_to, **budget):
        console.print(one_line(line), soft_wrap=True)


@app.command()
@exit_codes
def apply(
    model: ModelFile,
    masks: Annotated[Path, typer.Argument(metavar="MASKS", help="masks.pt of a run.", show_default=False)],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the pruned model.", show_default=False)
    ],
    mode: Annotated[
        Mode, typer.Option(help="Set the filters to zero, or take them out of the network.")
    ] = Mode.zero,
    compensate: Annotated[
        Compensate | None,
        typer.Option(
            help="With --mode remove: make up for them in the weights and batch norms left, or not.",
            show_default="merge, where the masks carry merges fitted to MODEL",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the pruned network itself too: FILE.pt2 or FILE.onnx."),
    ] = None,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    code: Code = None,
    key: Key = None,
    trust_pickle: TrustPickle = False,
    input_shapes: InputShapes = None,
    example: Example = None,
) -> None:
    """Carry out MASKS on MODEL and write the result to a new file."""
    kwargs, shapes = parse_kwargs(arch_kwargs), parse_shapes(input_shapes)
    if mode is Mode.zero and compensate is Compensate.merge:
        raise UserError("--compensate merge needs --mode remove")
    from prune_viz.runs import merges_beside, probes_beside

    inputs = (model, masks, merges_beside(masks), probes_beside(masks))
    check_output("--out", out, inputs)
    if export is not None:
        check_output("--export", export, inputs)
        if export.absolute() == out.absolute():
            raise UserError(f"--export {export} is the file that --out names; name another")

        from prune_viz.export import check_export

        check_export(export)
    checkpoint = _load(model, arch, kwargs, code, key, trust_pickle)

    from prune_viz.pruned import write_removed, write_zeroed

    checkpoint = _held(checkpoint, shapes, example)
    shape = _input_shape(checkpoint) if export or mode is Mode.remove else ()
    if mode is Mode.zero:
        lines = write_zeroed(checkpoint, masks, out, export, shape)
    else:
        how = None if compensate is None else compensate.value
        lines = write_removed(checkpoint, masks, shape, out, how, export)
    console = make_console()
    for line in lines:
        console.print(one_line(line), soft_wrap=True)
    console.print(f"written to {one_line(out)}", soft_wrap=True)


@app.command()
@exit_codes
def report(run: RunArgument) -> None:
    """Write the report of RUN again, from what the run directory holds."""
    from prune_viz.runs import RunDirectory

    directory = RunDirectory(run)
    directory.read_provenance()

    from prune_viz.report import write_report

    with make_progress() as progress:
        page = write_report(directory, progress)
    make_console().print(f"report: {one_line(page)}", soft_wrap=True)


@app.command()
@exit_codes
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run directory.")] = Path("reports/demo"),
) -> None:
    """Train a small network on handwritten digits, plant useless filters in it, find and remove them."""
    check_writable(out)

    from prune_viz.demo import run_demo

    run_demo(out, make_progress(), make_console())


def _load(
    model: Path,
    arch: str | None,
    kwargs: dict[str, Any] | None,
    code: Path | None,
    key: str | None,
    trust_pickle: bool,
) -> Checkpoint:
    """Read a model, and say what reading it decided by itself."""
    from prune_viz.checkpoints import load_checkpoint

    if code is not None:
        if not code.is_dir():
            raise UserError(f"--code {code} is not a directory")
        sys.path.append(str(code.absolute()))  # last, see current_directory_importable
    checkpoint = load_checkpoint(model, arch, kwargs, trust_pickle, key)
    console = make_console()
    for line in checkpoint.describe():
        console.print(one_line(line), soft_wrap=True)
    return checkpoint


def _held(checkpoint: Checkpoint, shapes: list[tuple[int, ...]], example: Path | None) -> Checkpoint:
    """A checkpoint whose network takes one input, of the shape that was given, if one was."""
    from prune_viz.held_inputs import held_at_noise, read_example

    if shapes and example is not None:
        raise UserError("give --input-shape or --example, not both")
    said = [word for shape in shapes for word in ("--input-shape", ",".join(map(str, shape)))]
    if example is not None:
        said = ["--example", str(example)]
    checkpoint = replace(checkpoint, inputs_said=tuple(said))
    inputs = held_at_noise(shapes) if example is None else read_example(example)
    if len(inputs.arguments) > 1 or isinstance(inputs.varied, str) or inputs.is_plain_signal:
        return checkpoint.hold(inputs)
    return replace(checkpoint, input_shape=inputs.input_shape) if inputs.arguments else checkpoint


def _input_shape(checkpoint: Checkpoint) -> tuple[int, ...]:
    from prune_viz.architectures import default_input_shape

    return checkpoint.input_shape or default_input_shape(checkpoint.model, checkpoint.arch)


def main() -> None:
    """Run the command line; mistakes in how it is called get one line too."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="prune-viz", standalone_mode=False)
    except Exception as error:
        message = getattr(error, "format_message", None)  # what all of typer's usage errors have
        if message is None:
            raise
        print(f"error: {one_line(message())} (--help shows how)", file=sys.stderr)
        code = 2
    sys.exit(code)
