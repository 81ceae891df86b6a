"""How the search for stimuli is cut to fit memory: how many tasks, and how many filters in each."""

from __future__ import annotations

from prune_viz.feature_visualization.search import BATCH
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.utils.devices import WHOLE, is_out_of_memory, workers_on
from prune_viz.utils.errors import LayerError, UserError
from prune_viz.utils.memory import Budget, fitting, in_words, measure_row


class MemoryPlan:
    """How many tasks at a time, and how many filters at a time in each.

    What a task holds is estimated, so that peaks may come out somewhat above the budget.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    limit : int or None
        Bytes of the `Budget`; by default `SHARE` of what is free.
    workers : int or None
        How many tasks there may be at a time; by default a CPU's cores, on other devices one.

    Raises
    ------
    UserError
        If the budget does not suffice for a single filter.
    """

    def __init__(self, network: FilterNetwork, limit: int | None, workers: int | None) -> None:
        self._network = network
        self.budget = Budget.of(network.device, limit)
        self.held = held = self.budget.held()
        self._left = max(0, self.budget.limit - held)
        self._taken: dict[str, int] = {}
        # The deepest layer's optimisation holds most; one that cannot be analysed is passed over.
        names = [layer.name for layer in reversed(network.layers)]
        row, deepest = next(((taken, name) for name in names if (taken := self.taken(name))), (1, ""))
        if row > self._left:
            what = "--memory" if limit is not None else "memory: what is free,"
            raise UserError(
                f"{what} {in_words(self.budget.limit)} is too little: {in_words(held)} are taken, and one "
                f"filter of {deepest} takes {in_words(row)} more; give more, or a smaller --canvas"
            )
        most = workers or workers_on(network.device)
        self.workers = max(1, min(most, self._left // (WHOLE * row)))

    def batch(self, layer: str) -> int:
        """How many filters of a layer fit at a time in each task; at least one."""
        return self.fitting(self.taken(layer))

    def fitting(self, taken: int) -> int:
        """How many filters that take so many bytes each fit at a time in each task; at least one."""
        return min(BATCH[self._network.device.type], fitting(self._left // self.workers, taken))

    def taken(self, layer: str) -> int:
        """Bytes that optimising for one filter of a layer takes, measured; 0 where it cannot be analysed."""
        if layer not in self._taken:
            try:
                self._taken[layer] = _bytes_of_optimising(self._network, layer)
            except LayerError:
                self._taken[layer] = 0
            except Exception as error:
                if is_out_of_memory(error):
                    raise UserError(
                        f"{layer}: not enough memory for two inputs; give a smaller --canvas"
                    ) from None
                raise
        return self._taken[layer]


def _bytes_of_optimising(network: FilterNetwork, name: str) -> int:
    """What one input's step holds."""
    shape = network.input_shape[0], *network.layer(name).canvas
    return measure_row(network.climbed_maps(name), shape, network.device).backward
