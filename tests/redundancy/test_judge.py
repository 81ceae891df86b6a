from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Plain, randomise_norms
from torch import nn

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup, Places, group_of_layer
from prune_viz.redundancy import judge as redundancy
from prune_viz.redundancy.channel_verdicts import GroupVerdicts
from prune_viz.redundancy.elimination import MAX_REPRESENTATIVES, eliminate, rebuild
from prune_viz.redundancy.gram_matrices import GramMatrices, gather_gram_matrices
from prune_viz.redundancy.judge import judge, rank
from prune_viz.redundancy.sign_pairs import weight_signs
from prune_viz.runs.damage import Unit


def _gram_matrix_of(samples: np.ndarray) -> np.ndarray:
    rows = np.hstack([samples, np.ones((len(samples), 1))])
    return rows.T @ rows / len(rows)


def _damage_by_least_squares(samples: np.ndarray, weights: np.ndarray, gone: list[int]) -> float:
    """What a 1x1 consumer loses when columns go and the rest is refitted, by plain least squares."""
    kept = [index for index in range(samples.shape[1]) if index not in gone]
    basis = np.hstack([samples[:, kept], np.ones((len(samples), 1))])
    lost = samples[:, gone] - basis @ np.linalg.lstsq(basis, samples[:, gone], rcond=None)[0]
    return float(((lost @ weights[:, gone].T) ** 2).sum(axis=1).mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 8))
def test_order_damage_equals_least_squares(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    samples = random.normal(size=(200, count)) @ random.normal(size=(count, count)) + random.normal(
        size=count
    )
    weights = random.normal(size=(5, count))
    order, damage = eliminate(_gram_matrix_of(samples), weights.T @ weights)
    assert sorted(order) == sorted(set(order))
    assert len(order) == count - 1
    assert damage == sorted(damage)
    for step in range(1, count):
        expected = _damage_by_least_squares(samples, weights, order[:step])
        assert damage[step - 1] == pytest.approx(expected, rel=1e-3, abs=1e-6 * damage[-1])


@pytest.mark.parametrize("first", [(), (7, 2, 11, 5, 0)])
def test_blocks_change_nothing_but_rounding(first: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    samples = random.normal(size=(300, 23)) @ random.normal(size=(23, 23))
    weights = random.normal(size=(9, 23))
    gram, weight_gram = _gram_matrix_of(samples), weights.T @ weights
    order, damage = eliminate(gram, weight_gram, first=first)
    assert order[: len(first)] == list(first)
    for block in (1, 2, 7, 22):
        monkeypatch.setattr("prune_viz.redundancy.elimination._BLOCK", block)
        again, same = eliminate(gram, weight_gram, first=first)
        assert again == order
        np.testing.assert_allclose(same, damage, rtol=1e-9)


def test_each_step_removes_the_least_missed() -> None:
    random = np.random.default_rng(3)
    samples = random.normal(size=(300, 6)) @ random.normal(size=(6, 6))
    weights = random.normal(size=(4, 6))
    order, _ = eliminate(_gram_matrix_of(samples), weights.T @ weights)
    single = [_damage_by_least_squares(samples, weights, [index]) for index in range(6)]
    assert order[0] == int(np.argmin(single))


def test_channels_named_first_go_before_all_others() -> None:
    samples = np.random.default_rng(3).normal(size=(400, 6))
    weights = np.random.default_rng(4).normal(size=(8, 6))
    gram, weight_gram = _gram_matrix_of(samples), weights.T @ weights
    free, _ = eliminate(gram, weight_gram)
    last = [channel for channel in range(6) if channel not in free]
    order, damage = eliminate(gram, weight_gram, first=[*last, free[3]])
    assert order[:2] == [*last, free[3]]
    assert len(set(order)) == len(order) == 5
    assert damage == sorted(damage)


def test_rebuild_finds_the_mix() -> None:
    random = np.random.default_rng(0)
    samples = random.normal(size=(500, 6))
    samples[:, 5] = 0.7 * samples[:, 1] - 0.2 * samples[:, 3] + 4
    weights = rebuild(5, np.arange(5), _gram_matrix_of(samples))
    np.testing.assert_allclose(weights, [0, 0.7, 0, -0.2, 0, 0, 4], atol=1e-6)


def _group(
    samples: np.ndarray, held_out: np.ndarray, weights: np.ndarray
) -> tuple[CouplingGroup, list[GramMatrices]]:
    count = samples.shape[1]
    outputs = samples @ weights.T
    places = Places("conv", np.arange(count), np.arange(count))
    consumer = Places("consumer", np.arange(count), np.arange(count))
    variance = float(outputs.var(axis=0).sum())
    gram_matrices = GramMatrices(
        "consumer", _gram_matrix_of(samples), _gram_matrix_of(held_out),
        weights.T @ weights, weights.T @ weights, variance, variance,
        np.abs(samples).max(axis=0), samples.mean(axis=0), samples.var(axis=0),
    )  # fmt: skip
    return CouplingGroup(0, count, [places], [consumer]), [gram_matrices]


def _relu_samples(seed: int, rows: int, count: int) -> np.ndarray:
    return np.maximum(np.random.default_rng(seed).normal(size=(rows, count)), 0)


def _planted(rows: int, seed: int) -> np.ndarray:
    """0-5 free; 6 copies 0; 7 is 2.5 times 1; 8 mixes 2 and 3; 9 is -4; 10 silent; 11 constant; 12 unread."""
    s = _relu_samples(seed, rows, 13)
    s[:, 6] = s[:, 0]
    s[:, 7] = 2.5 * s[:, 1]
    s[:, 8] = 0.6 * s[:, 2] + 0.4 * s[:, 3]
    s[:, 9] = _relu_samples(seed + 1, rows, 1)[:, 0]
    s[:, 10] = 0
    s[:, 11] = 0.8
    return s


def test_planted_truth_is_found_and_nothing_else() -> None:
    weights = np.random.default_rng(5).normal(size=(7, 13))
    weights[:, 12] = 0
    verdicts = judge(*_group(_planted(4000, 0), _planted(2000, 10), weights))
    found = {verdict.channel: verdict for verdict in verdicts.channels}
    pairs = [{0, 6}, {1, 7}]
    for pair in pairs:
        flagged = {channel for channel in pair if found[channel].verdict == "redundant"}
        assert len(flagged) == 1
        (channel,) = flagged
        assert found[channel].representatives == list(pair - flagged)
        assert found[channel].score > 0.9999
    assert sum(found[channel].verdict == "redundant" for channel in (2, 3, 8)) == 1
    assert {c: found[c].kind for c in (10, 11, 12)} == {10: "silent", 11: "constant", 12: "unread"}
    assert found[11].constant == pytest.approx(0.8)
    assert all(found[channel].verdict == "keep" for channel in (4, 5, 9))
    assert verdicts.damage < 1e-6


def test_only_one_of_two_copies_goes() -> None:
    # Channel 24 mixes all of the first 24, so that elimination proposes it and its copy; no eight do.
    random = np.random.default_rng(0)
    base = random.normal(size=(20_000, 24))
    mixed = base @ random.normal(size=24) / 5 + 0.1 * random.normal(size=20_000)
    samples = np.column_stack([base, mixed, mixed])
    weights = random.normal(size=(16, 26))
    weights[:, 24:] *= 0.3
    verdicts = judge(*_group(samples, samples, weights), tolerance=0.05)
    assert set(verdicts.order[:2]) == {24, 25}
    assert verdicts.order_damage[1] < 0.05
    flagged = [verdict for verdict in verdicts.channels if verdict.verdict == "redundant"]
    assert len(flagged) == 1
    assert {flagged[0].channel, *flagged[0].representatives} == {24, 25}


def test_a_groups_only_channel_has_its_damage() -> None:
    samples = _relu_samples(0, 2000, 1)
    group, gram_matrices = _group(samples, samples, np.ones((3, 1)))
    ranked, _ = rank(judge(group, gram_matrices), gram_matrices, gram_matrices, np.array([0.25]), Unit.NATS)
    assert ranked.order == []
    assert ranked.channels[0].verdict == "keep"
    assert ranked.channels[0].damage == 0.25


def test_costly_redundant_channel_is_kept() -> None:
    samples = _relu_samples(0, 4000, 8)
    samples[:, 6] = samples[:, 0]
    samples[:, 7] = samples[:, 1] + 0.02 * _relu_samples(1, 4000, 1)[:, 0]
    weights = np.random.default_rng(5).normal(size=(7, 8))
    group, gram_matrices = _group(samples, samples, weights)
    verdicts = judge(group, gram_matrices)
    pairs = ({0, 6}, {1, 7})

    def flagged(found: GroupVerdicts) -> list[int]:
        redundant = {one.channel for one in found.channels if one.verdict == "redundant"}
        return [len(redundant & pair) for pair in pairs]

    assert flagged(verdicts) == [1, 1]
    ablations = np.full(8, 0.5)
    costly = [replace(gram_matrices[0], unit=gram_matrices[0].unit / 1e3)]
    for calibration, weighed, unit, bearable in (
        (gram_matrices, gram_matrices, Unit.NATS, True),
        (gram_matrices, costly, Unit.NATS, False),  # the output
        (gram_matrices, costly, Unit.OUTPUT, False),
        (costly, gram_matrices, Unit.NATS, False),  # the consumers
        (costly, costly, Unit.CONSUMERS, False),
    ):
        ranked, _ = rank(verdicts, calibration, weighed, ablations, unit)
        assert flagged(ranked) == ([1, 1] if bearable else [1, 0])
        back = [one for one in ranked.channels if one.channel in pairs[1] and one.verdict == "keep"]
        assert all(one.damage == 0.5 and one.representatives == [] for one in back)
        assert len(back) == 1 or all(one.score > 0.99 for one in back)  # each rebuilt by the other


def test_where_no_consumer_varies_the_damage_is_unknown() -> None:
    samples = _relu_samples(0, 2000, 4)
    group, gram_matrices = _group(samples, samples, np.random.default_rng(0).normal(size=(3, 4)))
    still = [replace(gram_matrices[0], output_variance=0.0, unit=0.0)]
    ranked, _ = rank(judge(group, gram_matrices), still, still, None, Unit.CONSUMERS)
    assert ranked.order == []
    assert all(np.isnan(one.damage) for one in ranked.channels)


def test_the_last_of_a_sign_is_kept_after_all() -> None:
    samples = _relu_samples(0, 4000, 8)
    samples[:, 5] = samples[:, 6] = samples[:, 7] = samples[:, 0]
    group, gram_matrices = _group(samples, samples, np.random.default_rng(5).normal(size=(7, 8)))
    verdicts = judge(group, gram_matrices)

    def kept(signs: np.ndarray | None) -> int:
        found, _ = rank(verdicts, gram_matrices, gram_matrices, np.full(8, 0.5), Unit.NATS, signs)
        return sum(found.channels[channel].verdict == "keep" for channel in (0, 5, 6, 7))

    signs = np.eye(8, dtype=int)
    assert kept(None) == kept(signs) == 1
    signs[np.ix_([0, 5, 6, 7], [0, 5, 6, 7])] = 1
    assert kept(signs) == 1
    for one, other in [(6, 7), (0, 7), (5, 7)]:  # 7 is the opposite of the others
        signs[one, other] = signs[other, one] = -1
    assert kept(signs) == 2


def test_weights_of_one_direction_are_told_by_their_sign() -> None:
    for layer in (nn.Conv2d(3, 5, 3, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)):
        model = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))
        rows = layer.weight.data if isinstance(layer, nn.Conv2d) else layer.weight.data[:2].transpose(0, 1)
        rows[1], rows[2] = -2 * rows[0], 0.5 * rows[0]
        count = layer.out_channels
        every = Places("0", np.arange(count), np.arange(count))
        group = CouplingGroup(0, count, [every], [])
        expected = np.eye(count, dtype=int)
        expected[:3, :3] = [[1, -1, 1], [-1, 1, -1], [1, -1, 1]]
        assert (weight_signs(model, group, {"0": "1"}) == expected).all()
        with torch.no_grad():
            model[1].weight[2] = -1
        expected[:3, :3] = [[1, -1, -1], [-1, 1, 1], [-1, 1, 1]]
        assert (weight_signs(model, group, {"0": "1"}) == expected).all()


def test_opposite_signs_are_not_copies() -> None:
    raw = np.random.default_rng(0).normal(size=(4000, 4))
    samples = np.maximum(np.hstack([raw, -raw[:, :1]]), 0)  # behind a ReLU f and -f never fire together
    weights = np.random.default_rng(1).normal(size=(6, 5))
    verdicts = judge(*_group(samples, samples, weights))
    assert all(verdict.verdict == "keep" for verdict in verdicts.channels)


def test_what_the_fit_got_by_luck_is_not_flagged() -> None:
    # Twelve samples and ten channels: the fit rebuilds each channel well, other calibration images tell.
    samples, held_out = _relu_samples(0, 12, 10), _relu_samples(1, 4000, 10)
    weights = np.random.default_rng(1).normal(size=(6, 10))
    verdicts = judge(*_group(samples, held_out, weights))
    assert all(verdict.verdict == "keep" for verdict in verdicts.channels)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-4, 1e-3, 1e-2, 0.1]))
def test_flagged_filters_cost_under_tolerance(seed: int, tolerance: float) -> None:
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(4, 9))
    draw = [
        np.maximum(random.normal(size=(800, 4)) @ mixing + 0.1 * random.normal(size=(800, 9)), 0)
        for _ in range(2)
    ]
    group, gram_matrices = _group(*draw, random.normal(size=(6, 9)))
    verdicts = judge(group, gram_matrices, tolerance)
    assert verdicts.damage <= tolerance
    kept = {verdict.channel for verdict in verdicts.channels if verdict.verdict == "keep"}
    assert kept
    for verdict in verdicts.channels:
        assert set(verdict.representatives) <= kept
        assert len(verdict.representatives) <= MAX_REPRESENTATIVES
        if verdict.verdict == "redundant":
            assert verdict.score >= redundancy.MIN_SCORE


def test_a_group_that_cannot_be_removed_is_kept_whole() -> None:
    group, gram_matrices = _group(_planted(500, 0), _planted(500, 1), np.ones((2, 13)))
    fixed = CouplingGroup(0, 13, group.producers, group.consumers, removable=False, note="why")
    assert all(verdict.verdict == "keep" for verdict in judge(fixed, gram_matrices).channels)


def _copy_filter(model: Plain, source: int, target: int, scale: float) -> None:
    with torch.no_grad():
        model.conv1.weight[target] = model.conv1.weight[source]
        for name in ("running_mean", "running_var"):
            getattr(model.bn1, name)[target] = getattr(model.bn1, name)[source]
        for name in ("weight", "bias"):
            getattr(model.bn1, name)[target] = scale * getattr(model.bn1, name)[source]


@pytest.mark.parametrize("padding", [0, 1])
def test_constant_counts_the_padded_border(padding: int) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Plain(padding=padding))
    with torch.no_grad():
        model.bn1.weight[3], model.bn1.bias[3] = 0, 1.5
        model.bn1.weight[6], model.bn1.bias[6] = 0, 1e-3
    _copy_filter(model, 1, 5, 2.0)
    group = group_of_layer(find_groups(model, torch.zeros(1, 3, 16, 16)))["conv1"]
    images = [(torch.randn(32, 3, 16, 16), held_out) for held_out in (False, True)]
    verdicts = judge(group, gather_gram_matrices(copy.deepcopy(model), [group], lambda: images)[group.number])
    found = {verdict.channel: verdict.kind or verdict.verdict for verdict in verdicts.channels}
    assert {found[1], found[5]} == {"keep", "redundant"}
    assert found[6] == "constant"
    assert found[3] == ("constant" if padding == 0 else "keep")


def test_an_untrained_wide_layer_keeps_what_differs() -> None:
    torch.manual_seed(1)
    model = randomise_norms(Plain(width=16))
    group = group_of_layer(find_groups(model, torch.zeros(1, 3, 16, 16)))["conv2"]
    assert isinstance(model.conv3, nn.Conv2d)
    images = [(torch.randn(64, 3, 16, 16), held_out) for held_out in (False, True)]
    verdicts = judge(group, gather_gram_matrices(model, [group], lambda: images)[group.number])
    assert sum(verdict.verdict != "keep" for verdict in verdicts.channels) <= 2
