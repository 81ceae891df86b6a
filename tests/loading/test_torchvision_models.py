"""torchvision's models without PyTorch's compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, torch
from prune_viz.loading.torchvision_models import _LateCompiler, torchvision_models

models = torchvision_models()
print(models.__name__, [name for name in sys.modules if name.startswith(("torch._dynamo", "sympy"))])
from torchvision.ops import roi_align
late = roi_align.__globals__["is_compile_supported"]
print(type(late.__self__) is _LateCompiler, late("cpu"))
from torch._dynamo.utils import is_compile_supported
print(is_compile_supported("cpu"), type(sys.modules["torch._dynamo.utils"]) is _LateCompiler)
print(torchvision_models() is models)
"""


@pytest.mark.slow
def test_the_compiler_comes_when_it_is_asked() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    said = ["torchvision.models []", "True True", "True False", "True"]
    assert done.stdout.splitlines() == said, done.stderr
