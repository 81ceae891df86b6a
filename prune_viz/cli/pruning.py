"""The commands that act on what a run found: `masks` and `apply`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prune_viz.cli.arguments import (
    check_budget,
    check_code,
    check_spec,
    parse_kwargs,
    parse_numbers,
    parse_shapes,
)
from prune_viz.cli.console import exit_codes, make_console, make_progress, print_start
from prune_viz.cli.options import (
    Arch,
    ArchKwargs,
    AsJson,
    Code,
    Compensate,
    Data,
    Example,
    Force,
    InputShapes,
    Key,
    Mean,
    Mode,
    ModelFile,
    RunArgument,
    RuntimeName,
    Std,
    TrustPickle,
)
from prune_viz.utils.destinations import check_destination
from prune_viz.utils.errors import UserError, one_line
from prune_viz.utils.files import check_readable


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
    review: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What was decided in the report of RUN: its review.json."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write.", show_default="RUN/masks.pt")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="The model that was analysed, on which the masks are measured.",
            show_default="where it was then",
        ),
    ] = None,
    arch: Arch = None,
    arch_kwargs: ArchKwargs = None,
    code: Code = None,
    key: Key = None,
    trust_pickle: TrustPickle = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write masks for a budget from RUN, or as a review says; by default, those of its verdicts.

    They are applied to a copy of the model, and the change of its output is
    measured on images that no fit saw.
    """
    budget = check_budget(ratio=ratio, macs=macs, tolerance=tolerance)
    if round_to != 1 and not budget:
        raise UserError("--round-to needs a budget: --ratio, --macs or --tolerance")
    if review is not None and budget:
        raise UserError(f"give --review or --{next(iter(budget))}, not both")
    check_spec(arch)
    check_code(code)
    kwargs = parse_kwargs(arch_kwargs)

    from prune_viz.loading.file_kinds import identify
    from prune_viz.runs.run_directory import RunDirectory

    RunDirectory(run).read_provenance()
    RunDirectory(run).check_masks_destination(out, review, force)
    if review is not None:
        check_readable(review)
    if model is not None:
        identify(model, trust_pickle)

    from prune_viz.cli.model_options import ModelOptions, analysed_model
    from prune_viz.pruning.budgets import write_masks
    from prune_viz.pruning.reviewed_masks import write_reviewed_masks

    options = ModelOptions(model, arch, kwargs, code, key, trust_pickle)
    network, unmeasured = analysed_model(run, options)
    if review is None:
        outcome, lines = write_masks(run, out, round_to=round_to, model=network, **budget), []
    else:
        outcome, decided = write_reviewed_masks(run, review, out, model=network)
        lines = [decided]
    if as_json:
        print(json.dumps(outcome.as_json()))
        return
    lines += outcome.lines()
    if outcome.measured is None and unmeasured:
        lines.append(f"note: {unmeasured}")
    console = make_console()
    for line in [*lines, f"written to {outcome.out}"]:
        console.print(one_line(line), soft_wrap=True)


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
    heal: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="With --mode remove: train the smaller network so many steps to do what MODEL does, without "
            "labels.",
        ),
    ] = None,
    data: Data = None,
    mean: Mean = None,
    std: Std = None,
    runtime: Annotated[
        list[RuntimeName] | None,
        typer.Option(
            help="With --mode remove: what times both networks; may be repeated. Compiling may take minutes.",
            show_default="eager",
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
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Apply MASKS to MODEL and write the result to a new file.

    Healing that is interrupted goes on with the same command. It learns from the run's calibration images, or
    from inputs that --data names.
    """
    kwargs, shapes = parse_kwargs(arch_kwargs), parse_shapes(input_shapes)
    if mode is Mode.zero and compensate is Compensate.merge:
        raise UserError("--compensate merge needs --mode remove")
    if mode is Mode.zero and heal is not None:
        raise UserError("--heal needs --mode remove")
    if mode is Mode.zero and runtime:
        raise UserError("--runtime needs --mode remove: with zeros, a network takes as long as before")
    if heal is None and data is not None:
        raise UserError("--data is what --heal learns from: give --heal STEPS too")
    normalisation = parse_numbers("--mean", mean), parse_numbers("--std", std)
    if data is None and normalisation != (None, None):
        raise UserError("--mean and --std say how --data is normalised: give --data too")
    check_spec(arch)
    check_code(code)

    from prune_viz.loading.file_kinds import identify
    from prune_viz.runs.run_directory import calibration_images_beside, merges_beside

    inputs = (model, masks, merges_beside(masks), calibration_images_beside(masks))
    check_destination("--out", out, inputs, force)
    if export is not None:
        check_destination("--export", export, inputs, force)
        if export.absolute() == out.absolute():
            raise UserError(f"--export {export} is the file that --out names; name another")
    identify(model, trust_pickle)
    check_readable(masks)
    print_start(model, as_json)
    if export is not None:
        from prune_viz.pruning.export import check_export

        check_export(export)

    from prune_viz.cli.model_options import hold_as_asked, input_shape_of, load_as_asked
    from prune_viz.loading.architectures import default_normalisation
    from prune_viz.loading.input_data import read_inputs
    from prune_viz.pruning.distillation import Healing
    from prune_viz.pruning.healing_state import state_file
    from prune_viz.pruning.latency import Runtime, check_runtime
    from prune_viz.pruning.write import write_removed, write_zeroed

    runtimes = [Runtime(one.value) for one in runtime or [RuntimeName.eager]]
    for one in runtimes:
        check_runtime(one)

    checkpoint = load_as_asked(model, arch, kwargs, code, key, trust_pickle, silent=as_json)
    checkpoint = hold_as_asked(checkpoint, shapes, example)
    shape = input_shape_of(checkpoint) if export or mode is Mode.remove else ()
    if mode is Mode.zero:
        applied = write_zeroed(checkpoint, masks, out, export, shape)
    else:
        how, healing = None if compensate is None else compensate.value, None
        if heal is not None:
            if normalisation == (None, None):
                normalisation = default_normalisation(checkpoint.arch, shape[0]) or normalisation
            _, examples, unread = read_inputs(shape, *normalisation, data, None)
            for line in unread:
                make_console(as_json).print(one_line(line), soft_wrap=True)
            healing = Healing(heal, examples, state=state_file(out), progress=make_progress(as_json))
        applied = write_removed(checkpoint, masks, shape, out, how, export, healing, runtimes)
    if as_json:
        print(json.dumps(applied.as_json()))
        return
    console = make_console()
    for line in applied.lines():
        console.print(one_line(line), soft_wrap=True)
    console.print(f"written to {one_line(out)}", soft_wrap=True)
