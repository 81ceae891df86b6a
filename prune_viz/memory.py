"""How much memory a run may take, and how many filters at a time fit it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch
from torch import Tensor

from prune_viz.devices import WHOLE, is_out_of_memory, workers_on
from prune_viz.errors import LayerError, UserError
from prune_viz.filters import FilterNetwork
from prune_viz.stimuli import BATCH

SHARE = 0.8  # of what is free that a run takes where it is not told how much
_GROUPS = Path("/sys/fs/cgroup")
SLACK = 1.5  # of what a climb holds, for what the allocator keeps and libraries work with


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU as the system says, or what its container may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    for group in _control_groups():
        try:
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no limit there
            continue
        cache = int(figures.get("inactive_file", 0))  # which the kernel gives back when it must
        free = min(free, limit - used + cache)
    return max(int(free), 0)


def _control_groups() -> list[Path]:
    """Where Linux keeps the limits of this process: those of its own control group and of all around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    return [_GROUPS / own, *(_GROUPS / own).parents][: len(Path(own).parts) + 1]


class MemoryPlan:
    """How many tasks at a time, and how many filters at a time in each.

    On a CPU the budget is for the whole process, what it holds already included; on others it is for what is
    taken of their own memory. What a task holds is estimated, so that peaks may come out somewhat above it.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    budget : int or None
        Bytes; by default `SHARE` of what is free.
    workers : int or None
        How many tasks there may be at a time; by default a CPU's cores, on other devices one.

    Raises
    ------
    UserError
        If the budget does not suffice for a single filter.
    """

    def __init__(self, network: FilterNetwork, budget: int | None, workers: int | None) -> None:
        self._network = network
        on_cpu = network.device.type == "cpu"
        self.held = held = psutil.Process(os.getpid()).memory_info().rss if on_cpu else 0
        self.budget = int(SHARE * free_memory(network.device)) + held if budget is None else budget
        self._left = self.budget - held
        self._taken: dict[str, int] = {}
        # The deepest layer's ascent holds most; one that cannot be looked at is passed over.
        names = [layer.name for layer in reversed(network.layers)]
        row, deepest = next(((taken, name) for name in names if (taken := self.taken(name))), (1, ""))
        if row > self._left:
            what = "--memory" if budget is not None else "memory: what is free,"
            raise UserError(
                f"{what} {in_words(self.budget)} is too little: {in_words(held)} are taken, and one filter "
                f"of {deepest} takes {in_words(row)} more; give more, or a smaller --canvas"
            )
        most = workers or workers_on(network.device)
        self.workers = max(1, min(most, self._left // (WHOLE * row)))

    def batch(self, layer: str) -> int:
        """How many filters of a layer fit at a time in each task; at least one."""
        fitting = self._left // (self.workers * max(1, self.taken(layer)))
        most = BATCH[self._network.device.type]
        return int(max(1, min(most, fitting if fitting < WHOLE else fitting // WHOLE * WHOLE)))

    def taken(self, layer: str) -> int:
        """Bytes that the ascent of one filter of a layer takes, measured; 0 where it cannot be looked at."""
        if layer not in self._taken:
            try:
                self._taken[layer] = _bytes_of_climb(self._network, layer)
            except LayerError:
                self._taken[layer] = 0
            except Exception as error:
                if is_out_of_memory(error):
                    raise UserError(
                        f"{layer}: not enough memory for two inputs; give a smaller --canvas"
                    ) from None
                raise
        return self._taken[layer]


def _bytes_of_climb(network: FilterNetwork, name: str) -> int:
    """What one input's step holds: all that its backward pass reads, and the largest of it a few times."""
    canvas = network.layer(name).canvas
    sums, largest = [], []
    for rows in (1, 2):
        images = torch.zeros(rows, network.input_shape[0], *canvas, device=network.device, requires_grad=True)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            maps = network.maps(name)(images * 1)  # held, so that no storage is freed and found again
        sums.append(sum(kept.values()))
        largest.append(max((tensor.nbytes for tensor in (*maps, images)), default=0))
        largest[-1] = max([largest[-1], *kept.values()])
    # What does not grow with the rows, the weights, is there already.
    return int(SLACK * (sums[1] - sums[0] + 3 * (largest[1] - largest[0]) + 8 * images.nbytes / 2))


def in_words(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
