"""From an untrusted checkpoint to a model: formats, the safe unpickler, state dicts, architectures."""

from prune_viz.loading.checkpoints import Checkpoint, load_checkpoint, load_model

__all__ = ["Checkpoint", "load_checkpoint", "load_model"]
