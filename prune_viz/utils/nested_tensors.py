"""The tensors in what a network returns, however they are nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a network returns: in sequences, mappings, dataclasses and namespaces, in order."""
    if isinstance(output, Tensor):
        return [output]
    plain = isinstance(output, SimpleNamespace)
    if plain or (dataclasses.is_dataclass(output) and not isinstance(output, type)):
        output = vars(output)
    if isinstance(output, Mapping):
        output = list(output.values())
    return (
        [tensor for part in output for tensor in tensors_of(part)]
        if isinstance(output, (list, tuple))
        else []
    )
