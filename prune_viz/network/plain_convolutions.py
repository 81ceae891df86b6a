"""Convolutions that pad their input themselves, as networks from TensorFlow have them, made plain.

Padding within the convolution saves a copy of its input, a tenth of an optimisation's time. Uneven padding,
of strided ones, is had from even padding of which the first outputs are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_viz.network.layer_kinds import plain_kind

TRIED = (4, 5, 6, 7)  # sizes, beyond what a kernel spans, on which both are compared


def put_plain_convolutions(graph: fx.GraphModule) -> None:
    """Replace convolutions of classes of their own by plain ones where both compute the same.

    Parameters
    ----------
    graph : fx.GraphModule
        A copy of its own; changed in place.
    """
    for name, module in list(graph.named_modules()):
        kind = plain_kind(module)
        if kind is None or type(module) is kind:
            continue
        convolution: Any = module
        spans = [d * (k - 1) for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)]
        sizes = [[span + extra for span in spans] for extra in TRIED]
        for plain in _candidates(kind, convolution, spans):
            if all(_agree(plain, convolution, size) for size in sizes):
                parent, _, attribute = name.rpartition(".")
                setattr(graph.get_submodule(parent), attribute, plain)
                break


def _candidates(kind: Any, convolution: Any, spans: Sequence[int]) -> Iterator[nn.Module]:
    """Plain convolutions with the same weights: with even padding, and with what TensorFlow calls "same"."""
    yield _plain(kind, convolution, [span // 2 for span in spans])
    strides = list(convolution.stride)
    totals = [max(span + 1 - stride, 0) for span, stride in zip(spans, strides, strict=True)]
    skipped = [math.ceil((total % 2) / stride) for total, stride in zip(totals, strides, strict=True)]
    padding = [t // 2 + skip * s for t, skip, s in zip(totals, skipped, strides, strict=True)]
    plain = _plain(kind, convolution, padding)
    plain.forward = partial(_leave_out, plain.forward, spans, strides, totals, skipped)
    yield plain


def _plain(kind: Any, convolution: Any, padding: Sequence[int]) -> Any:
    plain: Any = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        kind, convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.stride,
        tuple(padding), convolution.dilation, convolution.groups, convolution.bias is not None,
        device=convolution.weight.device, dtype=convolution.weight.dtype,
    )  # fmt: skip
    plain.eval().load_state_dict(convolution.state_dict(), strict=False)
    return plain


def _leave_out(
    forward: Callable[[Tensor], Tensor],
    spans: Sequence[int],
    strides: Sequence[int],
    totals: Sequence[int],
    skipped: Sequence[int],
    inputs: Tensor,
) -> Tensor:
    """Of maps with more padding than asked for, those positions that were; `totals` is what was, by axis."""
    maps = forward(inputs)
    for axis, (span, stride, total, skip) in enumerate(zip(spans, strides, totals, skipped, strict=True), 2):
        maps = maps.narrow(axis, skip, (inputs.shape[axis] + total - span - 1) // stride + 1)
    return maps


def _agree(one: Any, other: Any, size: Sequence[int]) -> bool:
    """Whether two convolutions compute the same on noise of a size."""
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, one.in_channels, *size, generator=generator).to(one.weight)
    try:
        with torch.no_grad():
            first, second = one(example), other(example)
    except Exception:  # an untrusted convolution may mind the size
        return False
    tolerance = 1e-5 * float(second.abs().max())
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=tolerance)
