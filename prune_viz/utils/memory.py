"""How much memory a run may take, and how many filters at a time fit it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from prune_viz.utils.devices import WHOLE, is_out_of_memory, release_memory
from prune_viz.utils.errors import UserError
from prune_viz.utils.nested_tensors import tensors_of

SHARE = 0.8  # of what is free that a run takes unless a budget is set
_GROUPS = Path("/sys/fs/cgroup")
_PASS = 16  # times its input, what a forward pass holds: 64 channels at half the size, three maps at a time
_SMALL_INPUT = 2**20  # numbers
SLACK = 1.5  # of what an optimisation holds, for what the allocator keeps and libraries work with


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


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may take: of the whole process on a CPU, of their own memory on other devices.

    Attributes
    ----------
    device : torch.device
        Whose memory.
    limit : int
        Bytes, what is held already included.
    folder : Path or None
        Where what does not fit is kept meanwhile; None where temporary files are.
    """

    device: torch.device
    limit: int
    folder: Path | None = None

    @classmethod
    def of(cls, device: torch.device, limit: int | None = None) -> Budget:
        """A budget of so many bytes; by default `SHARE` of what is free beside what is held."""
        if limit is None:
            limit = _held(device) + int(SHARE * free_memory(device))
        return cls(device, limit)

    def held(self) -> int:
        """Bytes that are taken already; what allocators keep for later is released first."""
        release_memory(self.device)
        return _held(self.device)

    def left(self) -> int:
        """Bytes that may still be taken."""
        return max(0, self.limit - self.held())

    def of_host(self) -> Budget:
        """The budget of main memory: on a CPU the same, otherwise what is free there."""
        host = torch.device("cpu")
        return self if self.device == host else replace(Budget.of(host), folder=self.folder)

    def rows(self, a_row: int, aside: int = 0) -> int:
        """How many rows of so many bytes fit at a time beside what is put aside; at least one."""
        return fitting(self.left() - aside, a_row)


def check_input_size(shape: Sequence[int], limit: int | None = None, option: str = "--input-shape") -> None:
    """Check that an input of a shape is one that memory holds, before it is made.

    Parameters
    ----------
    shape : sequence of int
        (C, *size).
    limit : int, optional
        Bytes that may be taken (`Budget.of`).
    option : str
        What gave the shape, for the message.

    Raises
    ------
    UserError
        If a forward pass, which holds about `_PASS` times its input, would not fit. Inputs of up to
        `_SMALL_INPUT` numbers are left to what is measured later.
    """
    numbers = math.prod(shape)
    most = Budget.of(torch.device("cpu"), limit).limit
    if numbers > _SMALL_INPUT and 4 * _PASS * numbers > most:
        raise UserError(
            f"{option} {','.join(map(str, shape))}: one such input takes {in_words(4 * numbers)} and a "
            f"forward pass about {in_words(4 * _PASS * numbers)}, more than the {in_words(most)} that may be "
            "taken; give a smaller one, or more --memory"
        )


def check_sizes(input_shape: Sequence[int], canvas: int | None, memory: int | None = None) -> None:
    """Raise `UserError` if an input, or a stimulus on such a canvas, would not fit the memory allowed."""
    check_input_size(input_shape, memory)
    if canvas is not None:
        sides = [canvas] * (len(input_shape) - 1)
        check_input_size((*input_shape[:1], *sides), memory, "--canvas, with the input's channels,")


def _held(device: torch.device) -> int:
    """Bytes that this process holds of a device's memory."""
    if device.type == "cpu":
        return int(psutil.Process(os.getpid()).memory_info().rss)
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def fitting(left: int, a_row: int) -> int:
    """How many rows of so many bytes fit into what is left; at least one, of more a multiple of `WHOLE`."""
    count = left // max(1, a_row)
    return int(max(1, count if count < WHOLE else count // WHOLE * WHOLE))


@dataclass(frozen=True)
class RowBytes:
    """What one row of a batch takes.

    Attributes
    ----------
    kept : int
        Bytes that a backward pass reads.
    largest : int
        Bytes of the largest of it.
    row : int
        Bytes of the row itself.
    """

    kept: int
    largest: int
    row: int

    @property
    def backward(self) -> int:
        """What a forward and a backward pass hold."""
        return int(SLACK * (self.kept + 3 * self.largest + 8 * self.row))

    @property
    def forward(self) -> int:
        """What a forward pass holds, and samples drawn from maps meanwhile."""
        return int(SLACK * (10 * self.largest + 4 * self.row))


def measure_row(run: Callable[[Tensor], object], shape: Sequence[int], device: torch.device) -> RowBytes:
    """Measure what one row takes, by what two take more than one.

    Parameters
    ----------
    run : callable
        The forward pass, from inputs, shape (B, *shape), to whatever is held of it.
    shape : sequence of int
        (C, *size).
    device : torch.device
        Where it runs.
    """
    storages: list[dict[int, int]] = []
    for rows in (1, 2):
        images = torch.zeros(rows, *shape, device=device, requires_grad=True)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # a result that held the graph that holds it would never be freed

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            given = tensors_of(run(images * 1))  # held, so that no storage is freed and found again
        storages.append(kept)
    # What does not grow with the rows, the weights, is there already.
    weights = storages[0].items() & storages[1].items()
    sizes = [[size for place, size in one.items() if (place, size) not in weights] for one in storages]
    largest = max([*sizes[1], *(tensor.nbytes for tensor in (*given, images))])
    return RowBytes(max(0, sum(sizes[1]) - sum(sizes[0])), largest // 2, images.nbytes // 2)


def even_parts(count: int, most: int) -> list[slice]:
    """So few parts of a batch that each has at most so many rows, about as long as each other.

    Parts of unlike lengths would leave holes in memory that the others do not fit into.
    """
    size = math.ceil(count / math.ceil(count / most)) if count else 1
    size = min(most, WHOLE * math.ceil(size / WHOLE))
    return [slice(start, start + size) for start in range(0, count, size)]


class RowLimit:
    """How many rows of inputs fit a budget at a time, measured once for each shape.

    Parameters
    ----------
    budget : Budget or None
        None: as many as one likes.
    run : callable
        A forward pass, from inputs to whatever is held of it.
    backward : bool
        Whether a backward pass follows.
    aside : int
        Bytes that something else will take.
    """

    def __init__(
        self, budget: Budget | None, run: Callable[[Tensor], object], *, backward: bool, aside: int = 0
    ) -> None:
        self._budget, self._run, self._backward, self._aside = budget, run, backward, aside
        self._fitting: dict[tuple[int, ...], int] = {}

    def rows(self, shape: Sequence[int], most: int) -> int:
        """Of inputs of a shape, (C, *size); at least one and at most `most`."""
        if self._budget is None:
            return most
        shape = tuple(shape)
        if shape not in self._fitting:
            self._fitting[shape] = self._measure(self._budget, shape)
        return min(most, self._fitting[shape])

    def split(self, images: Tensor, most: int) -> Iterator[Tensor]:
        """Cut a batch, shape (B, C, *size), into parts that fit; what they held is released after each."""
        rows = self.rows(images.shape[1:], most)
        for places in even_parts(len(images), rows):
            yield images[places]
            if rows < len(images):
                release_memory(images.device if self._budget is None else self._budget.device)

    def _measure(self, budget: Budget, shape: tuple[int, ...]) -> int:
        try:
            row = measure_row(self._run, shape, budget.device)
        except Exception as error:  # an untrusted forward pass may not run where gradients are kept
            if is_out_of_memory(error):
                raise
            return sys.maxsize
        return budget.rows(row.backward if self._backward else row.forward, self._aside)


def in_words(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
