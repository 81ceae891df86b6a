"""Convolutions that pad their input themselves, as networks from TensorFlow have them, made plain.

Padding within the convolution saves a copy of its input, a tenth of an optimisation's time. Uneven padding
is had from even padding of which the first outputs are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_viz.network.layer_kinds import plain_kind

LEAST = 4  # beyond what a kernel spans: the first of the sizes, a stride of them, on which both are compared


def put_plain_convolutions(graph: fx.GraphModule, uneven: bool = True) -> None:
    """Replace convolutions of classes of their own by plain ones where both compute the same.

    Parameters
    ----------
    graph : fx.GraphModule
        A copy of its own; changed in place.
    uneven : bool
        Whether those that pad unevenly are replaced; what they return cannot be viewed otherwise then.
    """
    for name, module in list(graph.named_modules()):
        kind = plain_kind(module)
        if kind is None or type(module) is kind:
            continue
        convolution: Any = module
        spans = [d * (k - 1) for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)]
        tried = range(LEAST, LEAST + max(4, *convolution.stride))
        sizes = [[span + extra for span in spans] for extra in tried]
        for plain in _candidates(kind, convolution, spans, uneven):
            if all(_agree(plain, convolution, size) for size in sizes):
                parent, _, attribute = name.rpartition(".")
                setattr(graph.get_submodule(parent), attribute, plain)
                break


def _candidates(kind: Any, convolution: Any, spans: Sequence[int], uneven: bool) -> Iterator[nn.Module]:
    """Plain convolutions with the same weights: with even padding, and with what TensorFlow calls "same"."""
    yield _plain(kind, convolution, [span // 2 for span in spans])
    if not uneven:
        return
    strides = list(convolution.stride)
    totals = [max(span + 1 - stride, 0) for span, stride in zip(spans, strides, strict=True)]
    skipped = [total % 2 for total in totals]
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
    input: Tensor,  # as torch's own convolutions call it
) -> Tensor:
    """Of maps with more padding than asked for, those positions that were; `totals` is what was, by axis."""
    maps = forward(input)
    for axis, (span, stride, total, skip) in enumerate(zip(spans, strides, totals, skipped, strict=True), 2):
        maps = maps.narrow(axis, skip, (input.shape[axis] + total - span - 1) // stride + 1)
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
