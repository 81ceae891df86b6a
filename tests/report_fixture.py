"""A synthetic run directory: textures of known filters, planted copies and dead filters, hostile names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from prune_viz.runs.run_directory import LayerTensors, RunDirectory, slug
from prune_viz.runs.run_json import LayerRecord
from prune_viz.utils.array_files import write_arrays
from prune_viz.utils.files import write_json

HOSTILE = (
    "<img src=x onerror=alert(1)>\"'&../..{{7*7}}\x1b[31m\x07\u202etxt.\u00e9\u4e16"
    "</script><script>alert(2)</script>"
)


@dataclass(frozen=True)
class Plan:
    """What one layer of the synthetic run looks like; canvas gives one to three spatial axes."""

    name: str
    filters: int
    canvas: tuple[int, ...]
    channels: int = 3
    kind: str = "3x3 convolution"


SMALL = [
    Plan("features.0", 16, (32, 32), kind="3x3 convolution, stride 2"),
    Plan(HOSTILE, 24, (40, 40), kind="5x5 depthwise convolution"),
    Plan("features.7.conv", 40, (72, 72), kind="1x1 convolution"),
]


def texture(depth: float, canvas: tuple[int, ...], channels: int, rng: np.random.Generator) -> np.ndarray:
    """Filtered noise: oriented lines and colours when shallow (depth 0), bent mixtures when deep (1)."""
    axes = np.meshgrid(*[np.fft.fftfreq(side) for side in canvas], indexing="ij")
    colour = rng.normal(size=(channels,) + (1,) * len(canvas))
    total = np.zeros((channels, *canvas))
    for _ in range(1 + int(3 * depth)):
        direction = rng.normal(size=len(canvas))
        direction /= np.linalg.norm(direction)
        centre = rng.uniform(0.03, 0.22) * direction
        width = 0.02 + 0.05 * depth
        band = np.exp(-sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) / (2 * width**2))
        band[(0,) * len(canvas)] = 0
        wave = np.fft.ifftn(np.fft.fftn(rng.normal(size=canvas)) * band).real
        wave /= wave.std() + 1e-9
        if depth > 0.3:
            wave = np.sin((1 + 2 * depth) * wave) + 0.4 * np.roll(wave, 3, axis=-1)
        total += wave * (colour * (1 - 0.5 * depth) + depth * rng.normal(size=colour.shape))
    if depth < 0.3 and rng.random() < 0.3:
        total = total * 0.05 + colour * 1.5 * np.cos(
            np.arange(canvas[-1]) / canvas[-1] * 3 + rng.uniform(0, 6)
        )
    return total


def _layer(
    plan: Plan, depth: float, rng: np.random.Generator, images: np.ndarray | None
) -> tuple[LayerTensors, pd.DataFrame, list[dict[str, object]]]:
    count = plan.filters
    families = rng.integers(0, max(2, count // 6), size=count)
    verdicts = np.full(count, "keep", dtype=object)
    order = rng.permutation(count)
    dead = np.sort(order[: max(1, count // 16)])
    redundant = np.sort(order[len(dead) : len(dead) + max(2, count // 8)])
    kept = np.sort(order[len(dead) + len(redundant) :])
    verdicts[dead], verdicts[redundant] = "dead", "redundant"
    representatives = {
        int(j): sorted(map(int, rng.choice(kept, 1 + j % 2 * 2, replace=False))) for j in redundant
    }
    if images is None:
        images = np.stack([texture(depth, plan.canvas, plan.channels, rng) for _ in range(count)])
        for j, kin in representatives.items():
            images[j] = 0.95 * images[kin[0]] + 0.25 * texture(depth, plan.canvas, plan.channels, rng)
        images[dead] = 0.02 * rng.normal(size=images[dead].shape)
    traits = rng.normal(size=(families.max() + 1, 6))[families] + 0.35 * rng.normal(size=(count, 6))
    for j, kin in representatives.items():
        traits[j] = traits[kin[0]] + 0.02 * rng.normal(size=6)
        families[j] = families[kin[0]]
    calibration = ((traits[:, None] - traits[None]) ** 2).sum(-1)
    gains = rng.uniform(4, 60, size=count)
    responses = np.exp(-calibration / 6) * gains
    responses[:, dead] = 1e-4 * rng.random((count, len(dead)))
    clusters = families.copy()
    clusters[dead], clusters[kept[0]] = -1, -1
    places = 4 * rng.normal(size=(families.max() + 1, 2))[families] + rng.normal(size=(count, 2))
    score = rng.uniform(0.3, 0.97, size=count)
    score[redundant] = 1 - rng.uniform(1e-5, 3e-3, size=len(redundant))
    damage = rng.uniform(1e-3, 0.3, size=count)
    damage[redundant] = rng.uniform(1e-7, 8e-4, size=len(redundant))
    score[dead], damage[dead] = np.nan, 0
    reason = ["rebuilding it from the other filters would cost too much"] * count
    for j in redundant:
        reason[j] = "99.9 % of its feature map on held-out images is rebuilt from its representatives"
    for j in dead:
        reason[j] = "silent: its own stimulus cannot move it"
    table = pd.DataFrame(
        {
            "layer": plan.name,
            "filter": np.arange(count),
            "verdict": verdicts,
            "representative": [";".join(map(str, representatives.get(j, []))) for j in range(count)],
            "score": score,
            "cluster": clusters,
            "x": places[:, 0],
            "y": places[:, 1],
            "network_x": places[:, 0] + 9 * depth,
            "network_y": places[:, 1],
            "activation": np.diag(responses),
            "damage": damage,
            "reason": reason,
        }
    )
    flagged: list[dict[str, object]] = [
        {
            "layer": plan.name,
            "filter": int(j),
            "verdict": verdicts[j],
            "representatives": representatives.get(int(j), []),
            "coefficients": [
                round(0.98 / (1 + i), 4) * (-1) ** i for i in range(len(representatives.get(int(j), [])))
            ],
            "constant": 0.0 if verdicts[j] == "redundant" else 0.125,
            "score": score[j],
            "damage": damage[j],
            "reason": reason[j],
        }
        for j in np.sort(np.concatenate([redundant, dead]))
    ]
    tensors = LayerTensors(
        images.astype(np.float16), np.diag(responses).astype(np.float32), responses.astype(np.float32)
    )
    return tensors, table, flagged


def write_run(
    path: Path, plans: Sequence[Plan] = SMALL, seed: int = 0, images: dict[str, np.ndarray] | None = None
) -> RunDirectory:
    """Write a complete run of `plans` to `path`; `images` replaces the textures of the layers it names."""
    rng = np.random.default_rng(seed)
    run = RunDirectory(path)
    records, tables, verdicts, groups, orders = [], [], [], [], []
    for depth, plan in enumerate(plans):
        numbers = list(range(plan.filters))
        file = f"layers/{slug(depth, plan.name)}.safetensors"
        share = depth / max(1, len(plans) - 1)
        tensors, table, flagged = _layer(plan, share, rng, (images or {}).get(plan.name))
        arrays = {name: array for name, array in vars(tensors).items() if array is not None}
        write_arrays(run.path / file, arrays, {"layer": "synthetic"})
        field = tuple(min(3 + 4 * depth, 4 * side) for side in plan.canvas)
        records.append(
            LayerRecord(plan.name, plan.kind, plan.filters, depth, field, plan.canvas, depth, file)
        )
        groups.append(
            {
                "id": depth,
                "layers": [plan.name],
                "readers": [plans[depth + 1].name] if depth + 1 < len(plans) else ["classifier"],
                "channels": plan.filters,
                "removable": depth + 1 < len(plans),
                "note": "" if depth + 1 < len(plans) else "its output is the network's own output",
                "writers": [{"layer": plan.name, "filters": numbers, "channels": numbers}],
                "reads": [{"module": plans[depth + 1].name, "share": 1.0}] if depth + 1 < len(plans) else [],
                "norms": [],
            }
        )
        orders.append({"group": depth, "channels": numbers[:-1], "damage": [0.0] * (plan.filters - 1)})
        tables.append(table)
        verdicts.extend(flagged)
    filters = pd.concat(tables, ignore_index=True)
    counts = filters["verdict"].value_counts()
    run.write_filters(filters)
    write_json(
        run.decisions_file,
        {
            "format": 1,
            "model_sha256": "ab" * 32,
            "merges": [],
            "tolerance": 0.001,
            "groups": groups,
            "verdicts": verdicts,
            "removal_order": orders,
            "filters": {plan.name: plan.filters for plan in plans},
            "macs": {plan.name: 1_000 * plan.filters for plan in plans},
            "damage_unit": "nats",
        },
    )
    run.write_provenance(
        {
            "format": 1,
            "state": "complete",
            "model": {
                "path": "weights/street signs.pt", "sha256": "ab" * 32, "arch": "signs.models:SignNet",
                "arch_kwargs": {"width": 1.0}, "trust_pickle": False, "class_name": "SignNet",
                "parameters": 4_652_008, "macs": 385_811_000, "input_shape": [3, 224, 224],
            },
            "options": {"prior": "natural", "steps": 48, "canvas": None, "layers": []},
            "seed": seed,
            "versions": {"prune_viz": "0.1.0", "python": "3.11.9", "torch": "2.10.0"},
            "device": "cpu", "threads": 2,
            "started": "2026-03-02T09:14:03+00:00", "finished": "2026-03-02T09:41:40+00:00",
            "stages": [
                {"name": "stimuli", "seconds": 1402.3, "peak_mib": 1810.0},
                {"name": "responses", "seconds": 161.0, "peak_mib": 2304.5},
                {"name": "embedding", "seconds": 48.2, "peak_mib": 990.0},
                {"name": "verdicts", "seconds": 44.9, "peak_mib": 1204.0},
            ],
            "layers": [asdict(record) for record in records],
            "summary": {
                "filters": len(filters), "keep": int(counts.get("keep", 0)),
                "redundant": int(counts.get("redundant", 0)), "dead": int(counts.get("dead", 0)),
                "parameters": 4_652_008, "parameters_after": 4_031_554,
                "macs": 385_811_000, "macs_after": 322_190_000,
            },
            "notes": ["the model has no batch-norm layers; no calibration images were synthesised"],
        }
    )  # fmt: skip
    return run
