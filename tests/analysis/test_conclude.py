"""Conclusions part by part: what memory holds of one is gone before the next."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from networks import Plain, randomise_norms

from prune_viz.analysis import conclude
from prune_viz.analysis.pipeline import analyze


class Matrices:
    """Stands for the Gram matrices of a part."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


@pytest.mark.slow
def test_a_parts_matrices_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Matrices] = weakref.WeakSet()
    at_gathering, at_measuring = [], []

    def made(**held: Any) -> Matrices:
        matrices = Matrices(**held)
        alive.add(matrices)
        return matrices

    judge_on_stimuli = conclude._judge_on_stimuli

    def on_stimuli(*given: Any) -> Any:
        at_gathering.append(len(alive))
        return judge_on_stimuli(*given)[0], {0: made()}

    def measured(*given: Any) -> Matrices:
        at_measuring.append(len(alive))
        return made()

    monkeypatch.setattr(conclude, "rounds", lambda groups, most: [[group] for group in groups])
    monkeypatch.setattr(conclude, "_judge_on_stimuli", on_stimuli)
    monkeypatch.setattr(conclude, "measure_groups", measured)
    monkeypatch.setattr(
        conclude, "rank_groups", lambda verdicts, measured: made(verdicts=verdicts, gram_matrices={})
    )
    analyze(randomise_norms(Plain()), input_shape=(3, 16, 16), steps=2)
    assert len(at_gathering) > 1
    assert set(at_gathering) == {0}
    assert set(at_measuring) == {1}  # what was gathered for this part
