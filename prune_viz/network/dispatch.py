"""Watching the operations of a network, without importing PyTorch's compiler."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A `TorchDispatchMode` whose subclasses say in `called` what happens instead of an operation.

    PyTorch's own one keeps its compiler from compiling the mode's code, and imports the compiler for that,
    which takes as long as importing the rest of PyTorch. This one does so only where the compiler is there
    already; where it is not, nothing can be compiled.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, or what replaces it, and return the result."""
        raise NotImplementedError

    @cached_property
    def _never_compiled(self) -> Any:
        return torch.compiler.disable(self.called)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        called = self._never_compiled if "torch._dynamo" in sys.modules else self.called
        return called(func, args, kwargs or {})
