"""The tables and figures of `bench_redundancy.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from ablation import SMALL, rank_correlations
from planted_truth import COPIES, DEAD, NOISES
from tables import print_table

from prune_viz.redundancy.judge import TOLERANCE


@dataclass(frozen=True)
class Outcome:
    """What a case gave: a row a planted channel, a flagged one, a peer and site, and an ablation."""

    planted: pd.DataFrame
    flagged: pd.DataFrame
    peers: pd.DataFrame
    ablation: pd.DataFrame
    network: dict[str, object]


def report(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Print the tables and give the figures."""
    planted, flagged, peers, ablation = (
        pd.concat([getattr(outcome, name) for outcome in outcomes], ignore_index=True)
        for name in ("planted", "flagged", "peers", "ablation")
    )
    facts = [outcome.network for outcome in outcomes]
    print_table(
        "Networks; removing: all flagged filters at once, merged; accuracy: trained, planted, smaller",
        ["network", "seed", "filters", "planted", "flagged", "KL of planting", "KL of removing",
         "share of variance", "accuracy", "seconds"],
        [[fact[key] for key in ("family", "seed", "filters", "planted", "flagged", "planting_kl",
                                "removing_kl", "removing_variance")]
         + [" ".join(f"{a:.3f}" for a in fact.get("accuracy", [])), round(fact["seconds"])]  # type: ignore
         for fact in facts],
    )  # fmt: skip
    families = list(dict.fromkeys(planted["family"]))
    counts = planted.groupby(["kind", "family"])["found"].agg(["sum", "count"])
    noisy = [f"noisy {noise:.0%}" for noise in NOISES]
    kinds = [*COPIES, *noisy, "mix", *DEAD, "negated", "shifted", "blend"]
    print_table(
        "Planted filters found, of how many (negated and shifted ones, blends: flagged)",
        ["kind", *families, "all", "share"],
        [[kind]
         + ["{} of {}".format(*counts.loc[(kind, f)]) if (kind, f) in counts.index else "" for f in families]
         + ["{} of {}".format(own["found"].sum(), len(own)), float(own["found"].mean())]
         for kind in kinds if len(own := planted[planted["kind"] == kind])],
    )  # fmt: skip
    precision = {}
    rows = []
    for verdict, own in flagged.groupby("verdict"):
        right = own["as_planted"] | own["removable"]
        precision[verdict] = float(right.mean())
        unplanted = own[~own["as_planted"]]
        rows.append(
            [verdict, len(own), int(own["as_planted"].sum()), len(unplanted),
             int(unplanted["removable"].sum()), float(own["removable"].mean()), float(right.mean()),
             float(own["variance"].max()), float(own["kl"].max())]
        )  # fmt: skip
    print_table(
        "Flagged filters, each removed alone and merged; "
        f"removable: changes less than {TOLERANCE} of the scores' variance",
        ["verdict", "flagged", "as planted", "others", "of them removable", "removable of all", "precision",
         "largest change", "largest KL"],
        rows,
    )  # fmt: skip
    methods = peers.groupby("method", sort=False)
    totals = methods[["sets", "hits", "flagged", "right"]].sum()
    totals["average"] = methods["average"].mean()
    totals["recall"], totals["precision"] = (
        totals["hits"] / totals["sets"],
        totals["right"] / totals["flagged"],
    )
    print_table(
        "Methods; precision counts planted redundancy alone, the peers know how many there are",
        ["method", "average precision of pairs", "recall", "precision"],
        [[name, *row[["average", "recall", "precision"]]] for name, row in totals.iterrows()],
    )
    correlations = {measured: rank_correlations(ablation, measured) for measured in ("merged", "raw")}
    for measured, found in correlations.items():
        table = found.pivot_table(["pooled", "within"], "method", "family", sort=False)
        print_table(
            f"Spearman correlation with the KL of removing single channels, {measured}: "
            f"pooled over layers (mean within them); {len(ablation)} removed",
            ["method", *families, "all"],
            [[method]
             + [f"{table.loc[method, ('pooled', f)]:.2f} ({table.loc[method, ('within', f)]:.2f})"
                for f in families]
             + ["{:.2f} ({:.2f})".format(*found[found["method"] == method][["pooled", "within"]].mean())]
             for method in ("damage", *SMALL)],
        )  # fmt: skip

    def recall(*names: str) -> float | None:
        own = planted[planted["kind"].isin(names)]
        return round(float(own["found"].mean()), 4) if len(own) else None

    def spearman(measured: str, method: str, column: str = "pooled") -> float:
        found = correlations[measured]
        return round(float(found.loc[found["method"] == method, column].mean()), 4)

    raw = correlations["raw"]
    negated = planted[(planted["kind"] == "negated") & planted["found"]]
    named = [
        source in named.split(";")
        for source, named in zip(negated["sources"], negated["representative"], strict=True)
    ]
    others = flagged[(flagged["verdict"] == "redundant") & ~flagged["as_planted"]]
    return {
        "recall_copies": recall(*COPIES),
        "recall_noisy": recall("noisy 10%"),
        "recall_mixes": recall("mix"),
        "precision_redundant": round(precision.get("redundant", 1.0), 4),
        "recall_dead": recall(*DEAD),
        "precision_dead": round(precision.get("dead", 1.0), 4),
        "negated_flagged": len(negated),
        "spearman_ablation": spearman("raw", "damage"),
        "recall_noisy_by_level": {f"{noise:.0%}": recall(f"noisy {noise:.0%}") for noise in NOISES},
        "recall_exact_scaled_rewired": [recall(kind) for kind in COPIES],
        "negated_flagged_by_original": sum(named),  # the original is among those that rebuild it
        "negated_flagged_removable": int(negated["removable"].eq(True).sum()),
        "negated_planted": int((planted["kind"] == "negated").sum()),
        "unplanted_flagged": len(others),
        "unplanted_removable": round(float(others["removable"].mean()), 4) if len(others) else None,
        "largest_removing_kl": max(float(str(fact["removing_kl"])) for fact in facts),
        "average_precision": totals["average"].round(4).to_dict(),
        "recall_of_methods": totals["recall"].round(4).to_dict(),
        "precision_of_methods": totals["precision"].round(4).to_dict(),
        "spearman_by_network": raw[raw["method"] == "damage"].groupby("family", sort=False)["pooled"]
        .mean().round(4).to_dict(),
        "spearman_within_layers": spearman("raw", "damage", "within"),
        "spearman_merged": spearman("merged", "damage"),
        "spearman_of_others": {name: spearman("raw", name) for name in SMALL},
        "spearman_of_others_merged": {name: spearman("merged", name) for name in SMALL},
        "ablated": len(ablation),
    }  # fmt: skip
