"""Reading feature maps of several layers while inputs run through a network: in one pass where that goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from prune_viz.network.filter_network import FilterNetwork
from prune_viz.utils.devices import with_fewer
from prune_viz.utils.errors import LayerError
from prune_viz.utils.memory import Budget, RowLimit

BATCH = 32  # inputs that run through the whole network at a time, at most


def read_maps(
    network: FilterNetwork,
    names: Sequence[str],
    inputs: Callable[[], Iterable[Tensor]],
    reading: Callable[[Tensor], Tensor],
    budget: Budget | None = None,
) -> dict[str, Tensor]:
    """Run inputs and keep what `reading` makes of several layers' feature maps.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    names : sequence of str
        The layers.
    inputs : callable
        Gives them in parts, each shape (B, C, *size), of a size that the network `takes`.
    reading : callable
        From maps, shape (B, F, *map), to what is kept of them, shape (B, F, ...). A layer that cannot be
        traced nor read is read as a map of one zero.
    budget : Budget, optional
        Memory that may be taken.

    Returns
    -------
    dict of str to Tensor, shape (all inputs, F, ...)
        By layer.
    """
    limit = RowLimit(budget, network.outputs, backward=False)
    return with_fewer(partial(_read, network, names, inputs, reading, limit), BATCH, network.device)


def _read(
    network: FilterNetwork,
    names: Sequence[str],
    inputs: Callable[[], Iterable[Tensor]],
    reading: Callable[[Tensor], Tensor],
    limit: RowLimit,
    most: int,
) -> dict[str, Tensor]:
    def batches() -> Iterator[Tensor]:
        for part in inputs():
            for batch in limit.split(part.float(), most):
                yield batch.to(network.device)

    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        if (read := network.reader(names, reading)) is not None:
            for batch in batches():
                for name, found in read(batch).items():
                    rows[name].append(found.cpu())
        for name in [name for name in names if not rows[name]]:
            maps = network.maps(name)
            for batch in batches():
                try:
                    after = maps(batch)[1]
                except LayerError:  # reported where its stimuli are sought
                    after = torch.zeros(len(batch), network.layer(name).filters, *[1] * (batch.ndim - 2))
                rows[name].append(reading(after).cpu())
    return {name: torch.cat(rows.pop(name)) for name in names}
