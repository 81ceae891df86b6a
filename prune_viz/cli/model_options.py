"""The model that a command's options name, and what it takes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from prune_viz.cli.arguments import parse_shapes
from prune_viz.cli.console import make_console
from prune_viz.loading.architectures import default_input_shape
from prune_viz.loading.checkpoints import Checkpoint, architecture_of, load_checkpoint
from prune_viz.loading.fixed_inputs import fixed_at_noise, read_example
from prune_viz.runs.fingerprint import Origin
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.run_json import ModelRecord
from prune_viz.utils.errors import UserError, one_line
from prune_viz.utils.memory import check_input_size


@dataclass(frozen=True)
class ModelOptions:
    """How the command line says which model is meant; the fields are the options' values."""

    model: Path | None
    arch: str | None
    kwargs: dict[str, Any] | None
    code: Path | None
    key: str | None
    trust_pickle: bool


def analysed_model(run: Path, options: ModelOptions) -> tuple[nn.Module | None, str]:
    """The model that a run analysed, as the options say or else as the run holds it.

    A run is not trusted more than a model file is: of what it names, only what
    `prune_viz.loading.checkpoints.architecture_of` finds safe is built.

    Parameters
    ----------
    run : Path
        The run directory.
    options : ModelOptions
        What the command line says.

    Returns
    -------
    nn.Module or None
        None where it cannot be had without more options.
    str
        For people: why not; empty where it can.

    Raises
    ------
    UserError
        If a model that the command line names cannot be read, or is another one.
    """
    record = RunDirectory(run).read_provenance().model
    named = options.model is not None
    path = options.model if options.model is not None else Path(record.path or "")
    if not named and (record.path is None or not path.is_file()):
        return None, "not measured: the model file is not there; --model FILE names it"
    if record.trust_pickle and not options.trust_pickle and options.arch is None and record.arch is None:
        return None, "not measured: reading the model needs --trust-pickle"
    about = {"arch": record.arch, "arch_kwargs": record.arch_kwargs}
    key = options.key if options.key is not None else record.key or None
    try:
        arch, kwargs = architecture_of(path, about, options.arch, options.kwargs)
        checkpoint = load_as_asked(path, arch, kwargs, options.code, key, options.trust_pickle, silent=True)
        checkpoint = _held_as_then(checkpoint, record)
    except UserError as error:
        if named:
            raise
        return None, f"not measured: {error}"
    if not Origin(record.sha256, record.weights).is_of(checkpoint.model, checkpoint.sha256):
        if named:
            raise UserError(f"{path} is not the model that was analysed: its weights differ")
        return None, f"not measured: {path} has changed since it was analysed"
    return checkpoint.model, ""


def _held_as_then(checkpoint: Checkpoint, record: ModelRecord) -> Checkpoint:
    """A checkpoint whose network takes one input, as it did when it was analysed.

    Raises
    ------
    UserError
        If that cannot be had from what the run holds.
    """
    if record.held_inputs is None:
        return checkpoint
    words = list(record.inputs_said)
    shapes = parse_shapes(words[1::2]) if set(words[::2]) == {"--input-shape"} else []
    held = hold_as_asked(checkpoint, shapes, None) if shapes else checkpoint
    if held.held is None or held.held.digest != record.held_inputs:
        raise UserError("the model was called with an --example, which the run does not hold")
    return held


def load_as_asked(
    model: Path,
    arch: str | None,
    kwargs: dict[str, Any] | None,
    code: Path | None,
    key: str | None,
    trust_pickle: bool,
    silent: bool = False,
) -> Checkpoint:
    """Read a model, and say what reading it decided by itself."""
    if code is not None:
        sys.path.append(str(code.absolute()))  # last, see current_directory_importable
    checkpoint = load_checkpoint(model, arch, kwargs, trust_pickle, key)
    console = make_console(silent)
    for line in checkpoint.describe():
        console.print(one_line(line), soft_wrap=True)
    return checkpoint


def hold_as_asked(
    checkpoint: Checkpoint, shapes: list[tuple[int, ...]], example: Path | None, memory: int | None = None
) -> Checkpoint:
    """A checkpoint whose network takes one input, of the shape that was given, if one was.

    Raises
    ------
    UserError
        If an input would not fit the `memory` that may be taken, or as `read_example`.
    """
    if shapes and example is not None:
        raise UserError("give --input-shape or --example, not both")
    for shape in shapes:
        check_input_size(shape, memory)
    said = [word for shape in shapes for word in ("--input-shape", ",".join(map(str, shape)))]
    if example is not None:
        said = ["--example", str(example)]
    checkpoint = replace(checkpoint, inputs_said=tuple(said))
    inputs = fixed_at_noise(shapes) if example is None else read_example(example)
    if len(inputs.arguments) > 1 or isinstance(inputs.varied, str) or inputs.is_plain_signal:
        return checkpoint.hold(inputs)
    return replace(checkpoint, input_shape=inputs.input_shape) if inputs.arguments else checkpoint


def input_shape_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Shape of one input: as was said, or else what the architecture takes."""
    return checkpoint.input_shape or default_input_shape(checkpoint.model, checkpoint.arch)
