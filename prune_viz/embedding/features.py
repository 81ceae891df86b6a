"""What filters are compared by: what their stimuli look like, and what they respond to.

Both parts are the same for a filter and its copy at another scale, and both are scaled so that unrelated
filters lie about the square root of 2 apart: a distance means the same in every layer and every network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prune_viz.utils.array_files import batches_of

BATCH = 128
# The spectrum's bins along each axis, by number of spatial axes. They are evenly spaced in
# asinh(frequency / FINE), so that the low frequencies, where stimuli have most of their power, get more.
BINS = {1: 32, 2: 12, 3: 6}
FINE = 1 / 24  # cycles per pixel
COLOURS = 4  # inputs of more channels have their spectra pooled
# Spread of a filter's responses, of their mean, below which it separates inputs no more than rounding does.
_LEAST_SPREAD = 1e-3
_LEAST_PEAK = 1e-6  # of the layer's median
_CHOICE = 16  # power of a response: a stimulus that excites by a tenth less counts for a fifth


def describe_stimuli(images: np.ndarray) -> np.ndarray:
    """Describe pictures so that shifting one around its canvas changes nothing.

    Parameters
    ----------
    images : ndarray, shape (F, C, *canvas)

    Returns
    -------
    ndarray of float32, shape (F, D)
        The square roots of the shares of the power at each frequency, on a grid in cycles per pixel that
        is the same for every canvas; how the channels vary together; and their means. D depends on C and
        the number of axes only.
    """
    sides = images.shape[2:]
    count = BINS[len(sides)]
    bins = [_binning(np.fft.fftfreq(side), count) for side in sides[:-1]]
    bins.append(_half_binning(sides[-1], count))
    return np.vstack(
        [
            _describe_batch(np.nan_to_num(batch.astype(np.float32)), bins)
            for batch in batches_of(images, BATCH)
        ]
    )


def _describe_batch(pictures: np.ndarray, bins: list[np.ndarray]) -> np.ndarray:
    axes = tuple(range(2, pictures.ndim))
    energy = (pictures**2).sum(axis=tuple(range(1, pictures.ndim)), keepdims=True)
    pictures = pictures / np.sqrt(np.maximum(energy, 1e-20))
    spectrum = np.fft.rfftn(pictures, axes=axes, norm="ortho")
    power = spectrum.real**2 + spectrum.imag**2
    if pictures.shape[1] > COLOURS:
        power = power.sum(axis=1, keepdims=True)
    for axis, weights in zip(axes, bins, strict=True):
        power = np.moveaxis(np.tensordot(power, weights, axes=(axis, 1)), -1, axis)
    flat = pictures.reshape(*pictures.shape[:2], -1)
    colour = flat @ flat.transpose(0, 2, 1) if flat.shape[1] <= COLOURS else (flat**2).sum(axis=2)
    means = flat.sum(axis=2) / np.sqrt(flat.shape[2])
    count = len(pictures)
    parts = [np.sqrt(power.clip(min=0)).reshape(count, -1), colour.reshape(count, -1), means]
    return np.hstack(parts).astype(np.float32)


def _warped(frequencies: np.ndarray) -> np.ndarray:
    """Frequencies in cycles per pixel, -1/2 to 1/2, on the scale on which bins are even, -1 to 1."""
    return np.asarray(np.arcsinh(frequencies / FINE) / np.arcsinh(0.5 / FINE))


def _binning(frequencies: np.ndarray, count: int) -> np.ndarray:
    """Weights (bins, frequencies): a frequency adds to the two bins around it, both ends being one."""
    places = (_warped(frequencies) + 1) / 2 * count
    lower = np.floor(places).astype(int)
    upper_share = places - lower
    weights = np.zeros((count, len(frequencies)), dtype=np.float32)
    columns = np.arange(len(frequencies))
    np.add.at(weights, (lower % count, columns), 1 - upper_share)
    np.add.at(weights, ((lower + 1) % count, columns), upper_share)
    return weights


def _half_binning(side: int, count: int) -> np.ndarray:
    """The same for the half of the frequencies that a real picture's spectrum has along its last axis."""
    frequencies = np.fft.rfftfreq(side)
    whole = _binning(frequencies, count)
    twice = np.where((frequencies == 0) | (frequencies == 0.5), 1, 2)
    half = count // 2
    # Bins from 0 up: the middle one of the whole is frequency 0, its first one is both ends.
    return np.asarray(twice * np.vstack([whole[half:], whole[:1]]), dtype=np.float32)


def responding(responses: np.ndarray) -> np.ndarray:
    """Which filters respond differently to inputs: not silent ones, nor those whose output is constant.

    Parameters
    ----------
    responses : ndarray, shape (N, F)
        ``[i, j]``: how strongly filter j of a layer fires on input i.

    Returns
    -------
    ndarray of bool, shape (F,)
    """
    if not len(responses):
        return np.zeros(responses.shape[1], dtype=bool)
    peak = responses.max(axis=0)
    loud = peak > _LEAST_PEAK * max(float(np.median(peak)), 1e-30)
    # A layer's only filter has one stimulus, on which nothing could differ.
    varied = responses.std(axis=0) > _LEAST_SPREAD * responses.mean(axis=0) if len(responses) > 1 else True
    return np.asarray(loud & varied)


def pictures_of(descriptors: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """What excites each filter most looks like: its own stimulus, and those to which it responds as strongly.

    The optimisations of two copies may end at different inputs that excite both; described by all of those,
    the copies look the same.

    Parameters
    ----------
    descriptors : ndarray, shape (F, D)
        From `describe_stimuli`.
    responses : ndarray, shape (F, F)
        ``[i, j]``: how strongly filter j fires on stimulus i, not negative.

    Returns
    -------
    ndarray of float32, shape (F, D)
    """
    weights = (responses / np.maximum(responses.max(axis=0), 1e-30)) ** _CHOICE
    weights = weights / np.maximum(weights.sum(axis=0), 1e-30)
    return np.asarray(weights.T.astype(np.float32) @ descriptors)


def response_profiles(responses: np.ndarray) -> np.ndarray:
    """What each filter responds to, whatever its scale and its constant part.

    Responses count by their square roots, or the few inputs that excite a filter most would be all there is.

    Parameters
    ----------
    responses : ndarray, shape (N, F)
        ``[i, j]``: how strongly filter j fires on input i, not negative.

    Returns
    -------
    ndarray of float32, shape (F, N)
        Square roots less their mean, of length 1, so that products are correlations; zero for a filter
        that always gives the same.
    """
    profiles = np.sqrt(responses.T.astype(np.float64))
    profiles = profiles - profiles.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(profiles, axis=1, keepdims=True)
    return np.asarray(profiles / np.maximum(lengths, 1e-12), dtype=np.float32)


def scaled_pictures(descriptors: np.ndarray) -> np.ndarray:
    """Descriptors, shape (F, D), less their mean and of total variance 1."""
    if not len(descriptors):
        return descriptors
    centred = descriptors - descriptors.mean(axis=0)
    total = float(np.sqrt((centred.astype(np.float64) ** 2).sum() / len(centred)))
    return np.asarray(centred / total if total > 1e-6 else centred)


def principal(parts: Sequence[np.ndarray], components: int) -> tuple[np.ndarray, float]:
    """Leading principal components of features, K of them at most a few hundred.

    Parameters
    ----------
    parts : sequence of ndarray, each shape (F_i, K)
        The features, some filters at a time.
    components : int
        How many, if there are as many features.

    Returns
    -------
    scores : ndarray of float32, shape (F, components)
        Of all filters, those of the first part first.
    variance : float
        Total variance of the features.
    """
    count = sum(map(len, parts))
    mean = np.sum([part.sum(axis=0, dtype=np.float64) for part in parts], axis=0) / max(count, 1)
    mean = mean.astype(np.float32)
    products = np.zeros((len(mean), len(mean)))
    for part in parts:
        centred = part - mean
        products += centred.T @ centred
    axes = np.linalg.eigh(products)[1][:, ::-1][:, :components].astype(np.float32)
    scores = np.vstack([(part - mean) @ axes for part in parts])
    return scores.astype(np.float32, copy=False), float(np.trace(products)) / max(count, 1)
