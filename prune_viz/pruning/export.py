"""Networks in forms that run without their Python code: torch.export's ``.pt2`` and ONNX.

What is written is read back and compared with the network it came from.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_viz import __version__
from prune_viz.network.calls import does_not_run
from prune_viz.network.copies import plain_copy
from prune_viz.network.tracing import are_names_safe
from prune_viz.utils.errors import UserError, brief
from prune_viz.utils.files import MARK, written_aside
from prune_viz.utils.nested_tensors import tensors_of

TOLERANCE = 1e-4  # largest difference of outputs, as a share of the largest output
_ONNX = ("onnx", "onnxscript", "onnxruntime")


def check_export(path: Path) -> None:
    """Check that a network can be written to a file of this name.

    Raises
    ------
    UserError
        If its ending is neither ``.pt2`` nor ``.onnx``, or what ONNX needs is not installed.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"--export {path} should end in .pt2 (torch.export) or .onnx")
    if path.suffix == ".onnx":
        check_onnx(f"--export {path}")


def check_onnx(what: str) -> None:
    """Raise `UserError` where a library that ONNX needs is not installed; `what` is what needs it."""
    missing = [name for name in _ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {missing[0]}; pip install 'prune-viz[onnx]'")


def export_model(model: nn.Module, input_shape: Sequence[int], path: Path) -> str:
    """Write a network to a file that runs without its code, for batches of any size where that can be.

    Parameters
    ----------
    model : nn.Module
        The network; copied, not changed.
    input_shape : sequence of int
        (C, *size).
    path : Path
        Where to write; its ending says what.

    Returns
    -------
    str
        For people: what was written, and how far its outputs are from the network's own.

    Raises
    ------
    UserError
        If the ending is unknown, something is missing, the network cannot be exported, or the outputs of
        what was written differ by more than `TOLERANCE`. Nothing is left at `path` then.
    """
    check_export(path)
    if not are_names_safe(model):
        raise UserError("this network cannot be exported: its layers' names could be taken for code")
    twin = plain_copy(model).cpu().requires_grad_(False)
    dtype = next((parameter.dtype for parameter in twin.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, *input_shape, generator=generator).to(dtype)
    write = _to_pt2 if path.suffix == ".pt2" else to_onnx
    with torch.no_grad(), quietly():
        try:
            twin(inputs[:1])
        except Exception as error:  # whatever an untrusted forward pass raises
            raise does_not_run(input_shape, error) from None
        try:
            content, run = write(twin, inputs[:2], {0: torch.export.Dim("batch", min=1)})
            batches = "batches of any size"
            given, expected = run(inputs), tensors_of(twin(inputs))
        except Exception:  # the exporters raise nearly anything where they cannot follow a network
            try:
                content, run = write(twin, inputs[:1], None)
                batches = "batches of one"
                given, expected = run(inputs[:1]), tensors_of(twin(inputs[:1]))
            except Exception as error:
                what = path.suffix[1:]
                raise UserError(f"this network cannot be exported to {what} ({brief(error)})") from None
    pairs = [(one.float(), two.float()) for one, two in zip(expected, given, strict=True) if one.numel()]
    if not pairs:
        raise UserError("this network returns no tensors, so nothing shows whether its export is right")
    scale = max(float(one.abs().max()) for one, _ in pairs)
    difference = max(float((one - two).abs().max()) for one, two in pairs)
    if not difference <= TOLERANCE * scale:
        raise UserError(
            f"exported to {path.suffix[1:]}, the network returns other outputs (by {difference:.2g}, of at "
            f"most {scale:.2g}); nothing was written to {path}"
        )
    with written_aside(path) as aside:
        aside.write_bytes(content)
    return (
        f"exported to {path}, for {batches}; its outputs differ by {difference:.1g}, of at most {scale:.2g}"
    )


Runner = Callable[[Tensor], Sequence[Tensor]]


def _to_pt2(model: nn.Module, inputs: Tensor, axes: dict[int, Any] | None) -> tuple[bytes, Runner]:
    """The content of a ``.pt2`` file, and what it computes once it is read again."""
    program = torch.export.export(model, (inputs,), dynamic_shapes=None if axes is None else (axes,))
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={MARK: __version__})
    again = torch.export.load(io.BytesIO(stream.getvalue())).module()
    return stream.getvalue(), lambda batch: tensors_of(again(batch))


def to_onnx(model: nn.Module, inputs: Tensor, axes: dict[int, Any] | None) -> tuple[bytes, Runner]:
    """The content of an ``.onnx`` file, and what ONNX Runtime computes from it."""
    import onnxruntime

    program = torch.onnx.export(
        model, (inputs,), dynamo=True, dynamic_shapes=None if axes is None else (axes,), verbose=False
    )
    if program is None:
        raise RuntimeError("the exporter gave nothing")
    program.model_proto.producer_name, program.model_proto.producer_version = MARK, __version__
    content = program.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return content, lambda batch: [torch.from_numpy(out) for out in session.run(None, {name: batch.numpy()})]


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the exporters' warnings and logs, of which a user can make nothing, from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
