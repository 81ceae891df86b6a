"""Watching a network's operations, with PyTorch's compiler and without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, torch
from torch import nn
from prune_viz.network.dispatch import DispatchMode

class Names(DispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def called(self, func, args, kwargs):
        self.names.append(func._schema.name)
        return func(*args, **kwargs)

def seen(model):
    with torch.no_grad(), Names() as mode:
        model(torch.zeros(1, 3))
    return mode.names

model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
before = seen(model)
print("torch._dynamo" in sys.modules, before[-1])
print(seen(torch.compile(model, backend="eager")) == before == seen(model))
"""


@pytest.mark.slow
def test_operations_are_seen_without_the_compiler_and_with_it() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False aten::relu", "True"], done.stderr
