"""CPU seconds to judge and rank one coupling group, by how many channels it has.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/benchmarks/bench_judging.py                    # 512 to 4,096 channels
    .venv/bin/python scripts/benchmarks/bench_judging.py --channels 2048

An eighth of the channels are copies of others, and half of what the rest does is shared. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
from tables import print_table

from prune_viz.channels.groups import CouplingGroup, Places
from prune_viz.redundancy.gram_matrices import GramMatrices
from prune_viz.redundancy.judge import judge, rank
from prune_viz.runs.damage import Unit

CHANNELS = (512, 1024, 2048, 4096)
OUTPUTS = 64  # of the layer that reads the group


def made_up(channels: int) -> tuple[CouplingGroup, GramMatrices]:
    """A group of so many channels and its second moments, a quarter of the samples held out."""
    random = np.random.default_rng(0)
    shared = random.normal(size=(2 * channels, channels // 2)) @ random.normal(size=(channels // 2, channels))
    maps = np.maximum(shared / 30 + 0.05 * random.normal(size=(2 * channels, channels)), 0)
    copies = channels // 8
    maps[:, -copies:] = 1.5 * maps[:, :copies]
    samples = np.hstack([maps, np.ones((len(maps), 1))])
    fit, held_out = (part.T @ part / len(part) for part in np.split(samples, [3 * len(samples) // 4]))
    weights = random.normal(size=(OUTPUTS, channels))
    weight_gram = weights.T @ weights
    variance = float((weight_gram * np.cov(maps.T)).sum())
    every = np.arange(channels)
    group = CouplingGroup(
        number=0, channels=channels, producers=[Places("producer", every, every)],
        consumers=[Places("consumer", every, every)], removable=True, note="",
    )  # fmt: skip
    moments = GramMatrices(
        "consumer", fit, held_out, weight_gram, weight_gram, variance, variance, maps.max(axis=0),
        maps.mean(axis=0), maps.var(axis=0),
    )  # fmt: skip
    return group, moments


def measure(channels: int) -> dict[str, Any]:
    """Judge and rank one group."""
    group, moments = made_up(channels)
    times = [time.process_time()]
    judged = judge(group, [moments])
    times.append(time.process_time())
    ranked, _ = rank(judged, [moments], [moments], None, Unit.NATS)
    times.append(time.process_time())
    judging, ranking = np.diff(times).tolist()
    return {"channels": channels, "flagged": len(ranked.flagged), "judging": judging, "ranking": ranking}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    rows = [measure(channels) for channels in parser.parse_args().channels]
    lines = [
        [f"{row['channels']:,}", row["flagged"], f"{row['judging']:.1f}", f"{row['ranking']:.1f}"]
        for row in rows
    ]
    print_table("CPU seconds", ("channels", "flagged", "judging", "ranking"), lines)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
