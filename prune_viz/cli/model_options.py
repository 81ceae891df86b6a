"""The model that a command's options name, and what it takes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_viz.cli.console import make_console
from prune_viz.loading.architectures import default_input_shape
from prune_viz.loading.checkpoints import Checkpoint, load_checkpoint
from prune_viz.loading.fixed_inputs import fixed_at_noise, read_example
from prune_viz.utils.errors import UserError, one_line
from prune_viz.utils.memory import check_input_size


def load_as_told(
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
        if not code.is_dir():
            raise UserError(f"--code {code} is not a directory")
        sys.path.append(str(code.absolute()))  # last, see current_directory_importable
    checkpoint = load_checkpoint(model, arch, kwargs, trust_pickle, key)
    console = make_console(silent)
    for line in checkpoint.describe():
        console.print(one_line(line), soft_wrap=True)
    return checkpoint


def hold_as_told(
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
