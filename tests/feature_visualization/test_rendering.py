from __future__ import annotations

import numpy as np
import pytest

from prune_viz.feature_visualization.rendering import GREY, colour_axes, draw_pictures, stretch
from prune_viz.network.inputs import InputStatistics

IMAGENET = InputStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CAFFE = InputStatistics((0.485, 0.456, 0.406), (1 / 255,) * 3)
THERMAL = InputStatistics((0.8, 0.4, 0.3), (0.2, 0.1, 0.05))
NEUTRAL = InputStatistics((0.5,) * 3, (0.2, 0.1, 0.05))


def _in_input_units(pixels: np.ndarray, statistics: InputStatistics) -> np.ndarray:
    """Stimuli that differ from the ground by `pixels`, shape (F, 3, H, W)."""
    return pixels / np.array(statistics.std).reshape(3, 1, 1)


@pytest.mark.parametrize("statistics", [IMAGENET, CAFFE, THERMAL, NEUTRAL])
def test_a_red_stimulus_is_red(statistics: InputStatistics) -> None:
    pixels = np.zeros((1, 3, 8, 8))
    pixels[:, 0, :, 4:] = 0.1
    shown = stretch(_in_input_units(pixels, statistics), statistics)[0]
    ground = 0.5 + np.array(statistics.mean) - np.mean(statistics.mean)
    np.testing.assert_allclose(shown[:, 0, 0], ground, atol=1e-6)
    np.testing.assert_allclose(shown[:, 0, 7], [1, *ground[1:]], atol=1e-6)


@pytest.mark.parametrize("statistics", [IMAGENET, CAFFE, THERMAL, NEUTRAL])
def test_colours_are_those_of_the_pixels(statistics: InputStatistics) -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 3, 20, 20)) * np.array([1e-3, 1, 50]).reshape(
        3, 1, 1, 1
    )
    shown = stretch(_in_input_units(pixels, statistics), statistics)
    tint = (np.array(statistics.mean) - np.mean(statistics.mean)).reshape(3, 1, 1)
    for one, drawn in zip(pixels, shown, strict=True):
        q = np.sort(np.abs(one).ravel())[int(np.ceil(0.995 * one.size)) - 1]
        expected = (0.5 + tint + 0.5 * np.clip(one / q, -1, 1)).clip(0, 1)
        np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_a_grey_pattern_stays_grey() -> None:
    pixels = np.random.default_rng(0).normal(size=(1, 1, 16, 16)).repeat(3, axis=1)
    values = _in_input_units(pixels, NEUTRAL)
    tile = draw_pictures(values, 16, colour_axes(values, NEUTRAL), NEUTRAL)[0].astype(int)
    assert np.ptp(tile, axis=-1).max() == 0
    assert tile.std() > 20
    plain = draw_pictures(values, 16, colour_axes(values))[0].astype(int)
    assert np.ptp(plain, axis=-1).max() > 50


def test_flat_stimuli_have_the_mean_background() -> None:
    values = np.zeros((2, 3, 4, 4))
    values[1, 0] = np.nan
    shown = stretch(values, THERMAL)
    np.testing.assert_allclose(shown, np.array([0.8, 0.4, 0.3]).reshape(3, 1, 1) + np.zeros((2, 3, 4, 4)))
    assert np.all(stretch(values, NEUTRAL) == 0.5)


def test_one_channel_is_drawn_as_without_statistics() -> None:
    values = np.random.default_rng(0).normal(size=(2, 1, 12, 12)).astype(np.float16)
    known = InputStatistics((0.13,), (0.3081,))
    drawn = draw_pictures(values, 48, colour_axes(values, known), known)
    assert np.abs(drawn.astype(int) - draw_pictures(values, 48, None)).max() <= 1


def test_the_middle_slice_has_its_colours() -> None:
    values = np.zeros((1, 3, 5, 8, 8))
    values[:, 0, 2] = 1
    tile = draw_pictures(values, 64, None, NEUTRAL)[0]
    assert tuple(tile[32, 32]) == (255, GREY, GREY)


@pytest.mark.parametrize("canvas", [(10, 12), (3, 10, 12)])
@pytest.mark.parametrize("channels", [2, 5])
def test_many_channels_are_weighed_in_pixels(channels: int, canvas: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=(4, channels, *canvas)).astype(np.float32)
    std = tuple(float(number) for number in np.linspace(0.1, 2, channels))
    known = InputStatistics((0.7,) * channels, std)
    pixels = values * np.array(std, dtype=np.float32).reshape(-1, *[1] * len(canvas))
    axes = colour_axes(values, known)
    assert axes is not None
    np.testing.assert_allclose(axes, colour_axes(pixels), atol=1e-6)
    assert np.abs(axes[:, 0]).argmax() == channels - 1  # the channel that varies most in pixels
    drawn = draw_pictures(values, 24, axes, known).astype(int)
    assert np.abs(drawn - draw_pictures(pixels, 24, axes)).max() <= 1


def test_signals_are_drawn_as_without_statistics() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 40))
    expected = draw_pictures(values, 32, colour_axes(values))
    assert np.array_equal(draw_pictures(values, 32, colour_axes(values, THERMAL), THERMAL), expected)
