"""The embedded default: train a small network, plant filters that it does not need, find and remove them.

Nothing is downloaded: the digits come with scikit-learn.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from prune_viz.demo.digits import (
    DigitsNet,
    Planted,
    accuracy,
    found,
    load_digits,
    plant,
    train,
    train_digits_net,
)
from prune_viz.loading.formats import read_content
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import write_torch
from prune_viz.utils.progress import Progress

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

FINE_TUNING_EPOCHS = 4


@dataclass(frozen=True)
class Stage:
    """A row of the demo's table.

    Attributes
    ----------
    name : str
        What had been done to the network.
    filters : int
        Filters that are left, and not held at zero.
    parameters, macs : int
        Parameters, and multiply-accumulates of one picture.
    accuracy : float
        On the held-out digits, 0 to 1.
    """

    name: str
    filters: int
    parameters: int
    macs: int
    accuracy: float


def run_demo(
    out: Path | str, progress: Progress | None = None, console: Console | None = None
) -> list[Stage]:
    """Train, plant, analyse, mask, remove, fine-tune; print what came of it.

    Parameters
    ----------
    out : path
        Directory for ``model.pt`` and the run. A ``model.pt`` of an earlier demo is used again.
    progress : Progress, optional
        Shows every stage.
    console : rich.console.Console, optional
        Where to print; standard output by default.

    Returns
    -------
    list of Stage
        The rows of the table: before, after masking, after removal with merging, after fine-tuning.

    Raises
    ------
    UserError
        If `out` cannot be written or holds something else.
    """
    from rich.console import Console

    from prune_viz.analysis.pipeline import analyze
    from prune_viz.loading.checkpoints import load_checkpoint
    from prune_viz.network.cost import count_cost
    from prune_viz.pruning.apply import apply_masks
    from prune_viz.pruning.masks import load_masks
    from prune_viz.pruning.remove import remove_filters

    console = console or Console(markup=False, highlight=False)
    progress = progress or Progress()
    digits = load_digits()
    out = Path(out)
    path = out / "model.pt"
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} holds something that is not the demo; give another --out")
        with progress:
            trained = train_digits_net(digits, progress=progress)
        save_demo_model(*plant(trained, digits), path)
    planted = read_planted(path)
    checkpoint = load_checkpoint(path)
    model = checkpoint.model
    run = RunDirectory(out)
    if not (out / "run.json").exists():
        # The model lies in the run directory, which analyze takes only if it is a run of that model.
        run.write_provenance({"state": "running", "model": {"sha256": checkpoint.sha256}, "layers": []})
    shape = DigitsNet.input_shape
    analysis = analyze(model, input_shape=shape, out=out, progress=progress, source=checkpoint.source)

    def row(name: str, network: nn.Module, filters: int) -> Stage:
        parameters, macs = count_cost(network, shape)
        return Stage(name, filters, parameters, macs, accuracy(network, digits))

    masks = load_masks(run.masks_file)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    rows = [row("before", model, count_filters(model))]
    masked = apply_masks(copy.deepcopy(model), masks)
    rows.append(row("after masking", masked, count_filters(masked) - removed))
    smaller = remove_filters(model, masks, torch.zeros(1, *shape), compensate="merge")
    rows.append(row("after removal with merging", smaller, count_filters(smaller)))
    train(smaller, digits, FINE_TUNING_EPOCHS, rate=1e-3)
    rows.append(row("after fine-tuning", smaller, count_filters(smaller)))
    _print_outcome(console, rows, analysis.filters, planted)
    console.print(f"report: {run.report_page}", soft_wrap=True)
    return rows


def save_demo_model(model: DigitsNet, planted: Sequence[Planted], path: Path) -> None:
    """Write the demo's checkpoint, which says its own architecture and what was planted."""
    content = {
        "arch": "prune_viz.demo:DigitsNet",
        "arch_kwargs": {"widths": model.widths},
        "input_shape": list(model.input_shape),
        "state_dict": model.state_dict(),
        "planted": [asdict(truth) for truth in planted],
    }
    write_torch(path, content)


def read_planted(path: Path) -> list[Planted]:
    """Read what was planted from the demo's checkpoint; raises `UserError` if it is another's."""
    try:
        return [Planted(**truth) for truth in read_content(path)["planted"]]
    except Exception:
        raise UserError(f"{path} is not the demo's model; choose another --out") from None


def count_filters(model: nn.Module) -> int:
    """Count the filters of all convolutions of `model`."""
    return sum(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))


def _print_outcome(
    console: Console, rows: Sequence[Stage], filters: pd.DataFrame, planted: Sequence[Planted]
) -> None:
    from rich import box
    from rich.table import Table

    copies, dead = found(filters, planted)
    all_copies, all_dead = (sum(len(getattr(t, kind)) for t in planted) for kind in ("copies", "dead"))
    console.print("trained a network on scikit-learn's digits and planted useless filters in it")
    console.print(f"found {copies} of {all_copies} planted copies")
    console.print(f"found {dead} of {all_dead} planted dead filters")
    console.print()
    table = Table(box=box.SIMPLE if console.is_terminal else None, pad_edge=False)
    table.add_column("network")
    for title in ("filters", "parameters", "MACs", "accuracy"):
        table.add_column(title, justify="right")
    for row in rows:
        numbers = (f"{row.filters:,}", f"{row.parameters:,}", f"{row.macs:,}", f"{row.accuracy:.4f}")
        table.add_row(row.name, *numbers)
    console.print(table)
    console.print()
