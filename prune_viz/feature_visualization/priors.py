"""What inputs are likely: the covariance that bounds a stimulus, as a linear map and a radius.

A stimulus is kept inside ``x' S^-1 x <= r^2``. Written ``x = S^(1/2) z`` this is the ball
``|z| <= r``, so a prior is the symmetric map ``S^(1/2)`` and the radius ``r``. Both follow the units of
the model's inputs (`prune_viz.network.inputs`): inputs in units ten times larger give ten times larger
stimuli.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prune_viz.network.inputs import InputStatistics
from prune_viz.utils.errors import UserError

NAMES = ("natural", "spectrogram", "none")
# Correlation of red, green and blue over natural photographs: grey varies most, hue little.
_RGB_CORRELATION = ((1.00, 0.91, 0.79), (0.91, 1.00, 0.91), (0.79, 0.91, 1.00))
_BAND_CORRELATION = 0.9  # of neighbouring bands of pictures with more than three, about that of red and green
PIXEL_DEVIATION = 0.25  # of the pixels of natural photographs, in [0, 1]
# Of natural inputs, by axes: signals are pink, of the same power in every octave; of pictures 0.8 shows best;
# volumes have the same slope an axis.
SPECTRUM_EXPONENTS = {1: 0.5, 2: 0.8, 3: 1.2}
SEPARABLE_EXPONENT = 0.5  # along each axis of a spectrogram, which is pink too
SCENE_EXPONENT = 1.2  # of whole photographs; nearer than 0.8 to what batch norms saw of them
RADIUS = 0.5  # in standard deviations of a natural input
FLATTEST = 1e-6  # of the strongest channel direction's variance; what a weaker one is raised to


def settings() -> list[object]:
    """What priors depend on beside their arguments, for the keys of results."""
    return [
        _RGB_CORRELATION,
        _BAND_CORRELATION,
        PIXEL_DEVIATION,
        list(SPECTRUM_EXPONENTS.items()),
        SEPARABLE_EXPONENT,
        SCENE_EXPONENT,
        RADIUS,
        FLATTEST,
    ]


class Prior(Protocol):
    """A symmetric map ``S^(1/2)`` over inputs of one shape, and the radius of the ball it maps."""

    @property
    def radius(self) -> float:
        """Largest ``|z|``."""

    def colour(self, white: Tensor) -> Tensor:
        """Map ``z``, shape (B, C, *canvas), to ``S^(1/2) z``, same shape."""

    def whiten(self, images: Tensor) -> Tensor:
        """Map ``S^(1/2) z`` back to ``z``: the inverse of `colour`."""


@dataclass(frozen=True)
class NoPrior:
    """S is the identity: every input of the same L2 norm is equally likely.

    Attributes
    ----------
    radius : float
        Bound on the L2 norm of the stimulus.
    """

    radius: float

    def colour(self, white: Tensor) -> Tensor:
        """Give `white` back."""
        return white

    def whiten(self, images: Tensor) -> Tensor:
        """Give `images` back."""
        return images


@dataclass(frozen=True)
class NaturalPrior:
    """S is the covariance of natural inputs: a falling spectrum times a channel covariance.

    Attributes
    ----------
    amplitude : Tensor, shape (*canvas[:-1], canvas[-1] // 2 + 1)
        Square root of the spectrum at the frequencies of a real FFT, mean square 1 over all frequencies.
    mix : Tensor or None, shape (C, C)
        Symmetric square root of the channel covariance; None where that is the identity.
    radius : float
        Bound on ``|z|``.
    """

    amplitude: Tensor
    mix: Tensor | None
    radius: float

    def colour(self, white: Tensor) -> Tensor:
        """Map white noise ``z`` to an input as likely under the prior."""
        return _mixed(_filtered(white, self.amplitude), self.mix)

    def whiten(self, images: Tensor) -> Tensor:
        """Map an input back to the white noise that `colour` makes it of."""
        inverse = None
        if self.mix is not None:
            inverse = torch.linalg.inv(self.mix.cpu().double()).to(self.mix)
        return _filtered(_mixed(images, inverse), 1 / self.amplitude)


def _filtered(images: Tensor, amplitude: Tensor) -> Tensor:
    """Scale the frequencies of (B, C, *canvas) over one to three axes."""
    axes = tuple(range(2, images.ndim))
    filtered: Tensor = torch.fft.irfftn(
        torch.fft.rfftn(images, dim=axes) * amplitude, s=images.shape[2:], dim=axes
    )
    return filtered


def _mixed(images: Tensor, mix: Tensor | None) -> Tensor:
    """Apply a (C, C) map to the channels of (B, C, *canvas)."""
    return images if mix is None else torch.einsum("dc,bc...->bd...", mix, images)


def natural_amplitude(canvas: tuple[int, ...], exponent: float | None = None) -> Tensor:
    """Amplitude spectrum ``1/f^a`` of natural images on a canvas, mean square 1.

    Parameters
    ----------
    canvas : tuple of int
        Spatial size; any number of axes.
    exponent : float, optional
        The slope a; photographs have 0.8 to 1.2 (Field 1987). By default that of `SPECTRUM_EXPONENTS`.

    Returns
    -------
    Tensor, shape (*canvas[:-1], canvas[-1] // 2 + 1)
        Amplitudes at the frequencies of `torch.fft.rfftn`. The constant is given the amplitude of the
        lowest other frequency.
    """
    exponent = SPECTRUM_EXPONENTS[len(canvas)] if exponent is None else exponent
    grids = [torch.fft.fftfreq(size) for size in canvas]
    squared = torch.stack(torch.meshgrid(*grids, indexing="ij")).square().sum(dim=0)
    lowest = 1.0 / max(canvas)
    return _of_mean_square_1(squared.clamp_min(lowest**2) ** (-exponent / 2))


def separable_amplitude(canvas: tuple[int, ...], exponent: float = SEPARABLE_EXPONENT) -> Tensor:
    """Amplitude spectrum that is a product of slopes ``1/f^a``, one along each axis, mean square 1.

    Parameters and result are those of `natural_amplitude`.
    """
    along = [torch.fft.fftfreq(size).abs().clamp_min(1.0 / size) ** -exponent for size in canvas]
    return _of_mean_square_1(torch.stack(torch.meshgrid(*along, indexing="ij")).prod(dim=0))


def _of_mean_square_1(amplitude: Tensor) -> Tensor:
    """Amplitudes at all frequencies, scaled, at those of a real FFT."""
    amplitude = amplitude / amplitude.square().mean().sqrt()
    return amplitude[..., : amplitude.shape[-1] // 2 + 1].contiguous()


def make_prior(
    name: str,
    channels: int,
    canvas: tuple[int, ...],
    device: torch.device | str = "cpu",
    statistics: InputStatistics | None = None,
    exponent: float | None = None,
) -> Prior:
    """Build a prior over inputs of a shape.

    Parameters
    ----------
    name : {"natural", "spectrogram", "none"}
        Which one. That of spectrograms is the natural one with a separable spectrum
        (`prune_viz.network.inputs.InputStatistics`).
    channels : int
        Input channels.
    canvas : tuple of int
        Spatial size; one to three axes, over which the spectrum falls alike.
    device : torch.device
        Where its tensors live.
    statistics : InputStatistics, optional
        What is known of the model's inputs.
    exponent : float, optional
        Slope of the spectrum where none was measured; by default that of `SPECTRUM_EXPONENTS`. Separable
        ones have `SEPARABLE_EXPONENT` then.

    Raises
    ------
    UserError
        If there is no such prior, or the statistics are of another number of channels.

    Notes
    -----
    How the channels of natural inputs vary is taken from the first of these that is known:

    - the measured covariance, with directions that hardly vary raised to `FLATTEST` of the strongest;
    - the normalisation: pixels vary by `PIXEL_DEVIATION`, so channel c by ``PIXEL_DEVIATION / std[c]``;
    - else each channel has variance 1.

    In the last two cases three channels are taken to be red, green and blue, correlated as in
    photographs, whatever the number of axes. More channels of pictures are taken to be bands in order,
    of which neighbours vary together. Other channels are independent. The spectrum is the measured one or
    ``1/f^exponent``.

    A natural input's standard deviation is the root of its mean variance over the channels. In these
    units the radius of ``none`` is that of noise of standard deviation 1 a pixel. That of ``natural``
    lets the likeliest pattern, the slowest along the strongest channel direction (grey, for
    photographs), reach a root mean square of `RADIUS`, and every other pattern as much as is equally
    likely.
    """
    check_name(name)
    pixels = channels * math.prod(canvas)
    covariance = _channel_covariance(channels, len(canvas), statistics)
    variance = float(covariance.diagonal().mean())
    if name == "none":
        return NoPrior(radius=math.sqrt(pixels * variance))
    if statistics is not None and statistics.exponent is not None:
        exponent = statistics.exponent
    if name == "spectrogram" or (statistics is not None and statistics.separable):
        known = statistics.exponent if statistics is not None and statistics.separable else None
        amplitude = separable_amplitude(canvas, SEPARABLE_EXPONENT if known is None else known).to(device)
    else:
        amplitude = natural_amplitude(canvas, exponent).to(device)
    mix = None
    strongest = float(amplitude.max()) ** 2
    if not torch.equal(covariance, torch.eye(channels, dtype=torch.float64)):
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp_min(FLATTEST * float(values.max()))
        mix = ((vectors * values.sqrt()) @ vectors.T).float().to(device)
        strongest *= float(values.max())
    return NaturalPrior(amplitude, mix, radius=RADIUS * math.sqrt(pixels * variance / strongest))


def check_name(name: str) -> None:
    """Raise `UserError` if there is no such prior."""
    if name not in NAMES:
        raise UserError(f"--prior is {', '.join(NAMES[:-1])} or {NAMES[-1]}, not {name!r}")


def are_photographs(shape: Sequence[int], statistics: InputStatistics | None = None) -> bool:
    """Whether inputs of a shape (C, *size) are taken to be photographs."""
    separable = statistics is not None and statistics.separable
    return len(shape) == 3 and shape[0] == 3 and not separable


def are_pictures(shape: Sequence[int], statistics: InputStatistics | None = None) -> bool:
    """Whether inputs of a shape (C, *size) are taken to be pictures, grey ones too."""
    separable = statistics is not None and statistics.separable
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1 and not separable


def scene_exponent(shape: Sequence[int]) -> float:
    """Slope of the spectrum of whole inputs of a shape (C, *size), as far as it is known."""
    return SCENE_EXPONENT if are_photographs(shape) else SPECTRUM_EXPONENTS[len(shape) - 1]


def _channel_covariance(channels: int, axes: int, statistics: InputStatistics | None) -> Tensor:
    """Covariance of an input's channels, float64, shape (C, C)."""
    if statistics is not None and len(statistics.mean) != channels:
        raise UserError(f"the input has {channels} channels, its statistics {len(statistics.mean)}")
    if statistics is not None and statistics.covariance is not None:
        return torch.tensor(statistics.covariance, dtype=torch.float64)
    covariance = torch.eye(channels, dtype=torch.float64)
    if channels == 3:
        covariance = torch.tensor(_RGB_CORRELATION, dtype=torch.float64)
    elif channels > 3 and axes == 2:
        bands = torch.arange(channels, dtype=torch.float64)
        covariance = _BAND_CORRELATION ** (bands[:, None] - bands).abs()
    if statistics is not None:
        deviation = PIXEL_DEVIATION / torch.tensor(statistics.std, dtype=torch.float64)
        covariance = deviation[:, None] * covariance * deviation
    return covariance


def tile(image: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat images, shape (N, C, *canvas), until they fill `size`: spectra know no borders."""
    for axis, wanted in enumerate(size, start=2):
        places = torch.arange(wanted, device=image.device) % image.shape[axis]
        image = image.index_select(axis, places)
    return image
