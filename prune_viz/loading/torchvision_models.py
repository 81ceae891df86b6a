"""Importing torchvision's models, in a fraction of the time that they take otherwise."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo.utils"


class _LateCompiler(ModuleType):
    """Stands for a module of PyTorch's compiler until something in it is needed."""

    def __init__(self) -> None:
        super().__init__(_COMPILER)

    def is_compile_supported(self, device_type: Any) -> Any:
        """The function of that name, of which torchvision asks when it pools regions of interest."""
        return self.__getattr__("is_compile_supported")(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module there is, by `inspect` for instance
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)


def torchvision_models() -> Any:
    """``torchvision.models``, imported without PyTorch's compiler where that is not imported yet.

    torchvision imports the compiler, which takes longer than all else together, for one function that
    networks rarely call.
    """
    if "torch._dynamo" in sys.modules or "torchvision" in sys.modules:
        return importlib.import_module("torchvision.models")
    importlib.import_module("torch")
    late = sys.modules.setdefault(_COMPILER, _LateCompiler())
    try:
        return importlib.import_module("torchvision.models")
    finally:
        if sys.modules.get(_COMPILER) is late and isinstance(late, _LateCompiler):
            del sys.modules[_COMPILER]
