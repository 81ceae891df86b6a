from __future__ import annotations

import threading
import time

import pytest
import torch

from prune_viz.utils.devices import in_threads, is_out_of_memory, may_pass, pick_device
from prune_viz.utils.errors import UserError


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="--device is auto"):
        pick_device("abacus")
    with pytest.raises(UserError, match="no such device"):
        pick_device("cuda:99")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_out_of_memory_is_told_from_other_errors(error: Exception, said: bool) -> None:
    assert is_out_of_memory(error) == said


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (ModuleNotFoundError("No module named 'mine'"), True),
        (ConnectionResetError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TypeError("it gives no maps"), False),
    ],
)  # fmt: skip
def test_errors_of_the_machine_are_told_from_the_models(error: Exception, passing: bool) -> None:
    assert may_pass(error) == passing


def test_work_in_threads_keeps_its_order() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        barrier = threading.Barrier(3)  # passed only where three work at a time

        def work(item: int) -> tuple[int, int]:
            barrier.wait(timeout=60)
            return item, torch.get_num_threads()

        assert in_threads(work, range(6), torch.device("cpu")) == [(item, 1) for item in range(6)]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_work_in_threads_stops_at_an_error() -> None:
    begun, failed = [], threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            failed.set()
            raise ValueError("the first one")
        failed.wait(timeout=60)
        time.sleep(0.01)

    with pytest.raises(ValueError, match="the first one"):
        in_threads(work, range(1000), torch.device("cpu"))
    assert len(begun) < 1000
