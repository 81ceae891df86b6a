"""A callback for Lightning that holds masks while its `Trainer` trains (extra ``lightning``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune_viz.network.layer_kinds import reads_channels
from prune_viz.network.packed_attention import place_of
from prune_viz.pruning.apply import FilterMask, apply_masks, make_permanent
from prune_viz.pruning.masks import load_masks
from prune_viz.utils.errors import UserError


class HoldMasks(Callback):
    """Keep masked filters at zero from before optimisers are made until training ends.

    Checkpoints that are written meanwhile hold plain tensors, with zeros, so that they load with or without
    this callback. The network must be there once the LightningModule is made, not in ``configure_model``.

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
        self._reading: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lay the masks over the network."""
        if stage == "fit":
            network = apply_masks(self._network(pl_module), self.masks)
            # Checkpoints are read before callbacks hear of them.
            self._reading = network.register_load_state_dict_pre_hook(_laid_over)  # type: ignore[no-untyped-call]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn them into zeros."""
        self._end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Turn them into zeros."""
        self._end(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write plain tensors under their own names."""
        state = checkpoint["state_dict"]
        for prefix, module, name in _masked(pl_module):
            state[f"{prefix}{name}"] = getattr(module, name).detach()
            for key in [key for key in state if key.startswith(f"{prefix}parametrizations.{name}.")]:
                del state[key]

    def _end(self, pl_module: LightningModule) -> None:
        if self._reading is not None:
            self._reading.remove()
            self._reading = None
            make_permanent(self._network(pl_module))

    def _network(self, module: LightningModule) -> nn.Module:
        if self.network is not None:
            found = getattr(module, self.network, None)
            if not isinstance(found, nn.Module):
                raise UserError(f"the LightningModule has no network {self.network!r}")
            return found
        for candidate in (module, *module.children()):
            modules = dict(candidate.named_modules())
            places = [place_of(modules, name) for name in self.masks]
            if all(prefix or reads_channels(layer) for layer, prefix in places):
                return candidate
        raise UserError("no network in the LightningModule has all the layers that the masks name")


def _masked(network: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Prefix in the state dict, module and name of each tensor over which masks lie, and nothing else."""
    return [
        (f"{path}." if path else "", module, name)
        for path, module in network.named_modules()
        if parametrize.is_parametrized(module)
        for name, steps in module.parametrizations.items()
        if all(isinstance(step, FilterMask) for step in steps)
    ]


def _laid_over(network: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Rename plain tensors of a state dict to where they stand while masks lie over them."""
    own = network.state_dict()
    for path, _, name in _masked(network):
        if f"{prefix}{path}{name}" in state:
            state[f"{prefix}{path}parametrizations.{name}.original"] = state.pop(f"{prefix}{path}{name}")
            mask = f"{path}parametrizations.{name}.0.mask"
            state[f"{prefix}{mask}"] = own[mask]
