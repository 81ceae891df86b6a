"""A callback for Lightning that holds masks while its `Trainer` trains (extra ``lightning``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prune_viz.errors import UserError
from prune_viz.masking import apply_masks, make_permanent
from prune_viz.masks import load_masks


class HoldMasks(Callback):
    """Keep masked filters at zero from before optimisers are made until training ends.

    In checkpoints that are written meanwhile, masked tensors stand as `torch.nn.utils.parametrize` has them;
    training goes on from those with the same callback. When training ends they are plain tensors again,
    with zeros.

    Parameters
    ----------
    masks : mapping of str to bool Tensor, or path
        Masks of the network, or a file of them.
    network : str, optional
        Attribute of the LightningModule that is the network whose layers the masks name; by default the
        LightningModule itself or the one of its attributes that has all those layers.

    Raises
    ------
    UserError
        When training starts, if the masks are for another network.
    """

    def __init__(self, masks: Mapping[str, Tensor] | str | Path, network: str | None = None) -> None:
        self.masks = load_masks(masks) if isinstance(masks, (str, Path)) else masks
        self.network = network

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lay the masks over the network."""
        if stage == "fit":
            apply_masks(self._network(pl_module), self.masks)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn them into zeros."""
        make_permanent(self._network(pl_module))

    def _network(self, module: LightningModule) -> nn.Module:
        if self.network is not None:
            found = getattr(module, self.network, None)
            if not isinstance(found, nn.Module):
                raise UserError(f"the LightningModule has no network {self.network!r}")
            return found
        for candidate in (module, *module.children()):
            convolutions = {name for name, m in candidate.named_modules() if isinstance(m, _ConvNd)}
            if convolutions.issuperset(self.masks):
                return candidate
        raise UserError("no network in the LightningModule has all the layers that the masks name")
