"""The command line. Torch and what else is heavy is imported by the command that needs it."""

from prune_viz.cli.commands import app, main

__all__ = ["app", "main"]
