"""Where the work is done: picking a device, and batches that fit its memory."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from prune_viz.utils.errors import UserError

_In = TypeVar("_In")
_T = TypeVar("_T")
WHOLE = 4  # batches are filled up to a multiple of it: of odd sizes, convolutions round differently


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device that is there.

    Raises
    ------
    UserError
        If the name is not one of these or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise UserError(f"--device {name}: this machine has no such device; use --device auto")
    return device


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out, on any device.

    The allocators of the CPU and of MPS raise plain RuntimeErrors, known by their words alone.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error).lower()
    phrases = (
        "out of memory",
        "not enough memory",
        "allocate memory",
        "alloc_failed",
        "could not create a memory",
    )
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in phrases)


def may_pass(error: Exception) -> bool:
    """Whether an error is the machine's, not the model's: another time, or elsewhere, it may not come."""
    if is_out_of_memory(error) or isinstance(error, (OSError, ImportError, torch.AcceleratorError)):
        return True
    words = str(error).lower()
    phrases = ("cuda error", "cublas error")
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in phrases)


def workers_on(device: torch.device) -> int:
    """How many threads of work a device keeps busy: a CPU one a core, each of its own, others one."""
    return torch.get_num_threads() if device.type == "cpu" else 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let operations of torch run in the thread that calls them alone.

    Several threads with a task each are faster than one task whose operations are spread over them, and give
    the same to the bit however many they are, which those do not.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(work: Callable[[_In], _T], items: Sequence[_In], device: torch.device) -> list[_T]:
    """Do work on items, as many at a time as keep a device busy, and return its results in their order.

    Parameters
    ----------
    work : callable
        From an item; it is called in several threads at once.
    items : sequence
        What there is to do.
    device : torch.device
        Where operations run.
    """
    workers = workers_on(device)
    with one_thread_each(), ThreadPoolExecutor(workers, initializer=_one_thread) as pool:
        try:
            return list(pool.map(work, items))
        finally:
            pool.shutdown(cancel_futures=True)  # for Ctrl-C


def _one_thread() -> None:
    torch.set_num_threads(1)


def filled_up(count: int) -> Tensor:
    """Which of `count` rows make a batch that rounds as all do: they repeat up to a multiple of `WHOLE`."""
    return torch.arange(WHOLE * math.ceil(count / WHOLE)) % count


def in_batches(count: int, batch: int, work: Callable[[Tensor, int], Any], device: torch.device) -> int:
    """Do work on rows in batches, halving them whenever memory runs out.

    Parameters
    ----------
    count : int
        How many rows there are.
    batch : int
        Rows at a time.
    work : callable
        Called with the rows that are next, filled up as `filled_up` does where that many are allowed, and how
        many of them are new.
    device : torch.device
        Where it works.

    Returns
    -------
    int
        Rows at a time that fitted.

    Raises
    ------
    UserError
        If memory does not suffice for a single row.
    """
    done = 0
    while done < count:
        size = min(batch, count - done)
        rows = done + (filled_up(size) if batch >= WHOLE else torch.arange(size))
        try:
            work(rows, size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise UserError("not enough memory for a single input; give a smaller --canvas") from None
            batch = halved(len(rows))
        else:
            done += size
            continue
        release_memory(device)  # only here has the error let go of what it held
    return batch


def with_fewer(work: Callable[[int], _T], most: int, device: torch.device) -> _T:
    """Do work that takes so many rows at a time; with half, from its start, whenever memory runs out.

    Parameters
    ----------
    work : callable
        Called with how many rows to take at a time.
    most : int
        Rows at a time to begin with.
    device : torch.device
        Where it works.

    Raises
    ------
    UserError
        If memory does not suffice for a single row.
    """
    while True:
        try:
            return work(most)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if most == 1:
                raise UserError("not enough memory for a single input; free some, and go on") from None
        most = halved(most)
        release_memory(device)  # only here has the error let go of what it held


def halved(rows: int) -> int:
    """Half as many rows, a multiple of `WHOLE` where there are so many."""
    half = rows // 2
    return half - half % WHOLE if half >= WHOLE else half


def release_memory(device: torch.device) -> None:
    """Give back what allocators keep for later, the device's and the C library's of threads that ended."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    with suppress(OSError, AttributeError):  # only glibc keeps much, and has this
        ctypes.CDLL(None).malloc_trim(0)
