"""Which model something was made for, by digests of its file and of its weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import nn

from prune_viz.runs.output_kind import OutputKind


def hash_model(model: nn.Module) -> str:
    """Hex SHA-256 over a model's state dict: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_structure(model: nn.Module, code: str) -> str:
    """Hex SHA-256 of a model beside its weights.

    Counted are its modules and their settings, the code of its graph where it was traced, and tensors that
    its state dict leaves out.
    """
    text = re.sub(r"0x[0-9a-f]+", "", repr(model))  # addresses differ from process to process
    digest = hashlib.sha256(text.encode() + code.encode())
    known = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in known:
            array = buffer.detach().cpu().contiguous()
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Origin:
    """The model that masks were made for.

    Attributes
    ----------
    file : str or None
        SHA-256 of its file; of its weights, if it was analysed in Python.
    weights : str or None
        SHA-256 of its weights (`hash_model`).
    output : OutputKind or None
        What it returns, as the analysis took it.
    """

    file: str | None = None
    weights: str | None = None
    output: OutputKind | None = None

    def agreed(self, other: Origin) -> Origin | None:
        """What both know of their model together; None if it is not the same one."""
        if self == Origin() or other == Origin():
            return other if self == Origin() else self
        if not ({self.file, self.weights} & {other.file, other.weights}) - {None}:
            return None
        return self if self.weights is not None else other

    def is_of(self, model: nn.Module, file: str | None = None) -> bool:
        """Whether that is `model`, loaded from a file with this digest; True where nothing is known."""
        known = {self.file, self.weights} - {None}
        return not known or file in known or hash_model(model) in known

    def has_weights_of(self, model: nn.Module) -> bool:
        """Whether that model's weights are still those of `model`, as far as is known.

        They cannot be compared where nothing is known, or `model` is of another precision now.
        """
        if self.weights is None or hash_model(model) == self.weights:
            return True
        return any(parameter.dtype != torch.float32 for parameter in model.parameters())
