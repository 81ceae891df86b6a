"""Where the work is done: picking a device, laying out its inputs, telling when its memory is exhausted."""

from __future__ import annotations

import torch

from prune_viz.errors import UserError


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
    told = (
        "out of memory",
        "not enough memory",
        "allocate memory",
        "alloc_failed",
        "could not create a memory",
    )
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in told)


def release_memory(device: torch.device) -> None:
    """Give back what the device's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
