"""What inputs are likely: the covariance that bounds a stimulus, as a linear map and a radius.

A stimulus is kept inside ``x' S^-1 x <= r^2``. Written ``x = S^(1/2) z`` this is the ball
``|z| <= r``, so a prior is the symmetric map ``S^(1/2)`` and the radius ``r``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Correlation of red, green and blue over natural photographs: grey varies most, hue little.
_RGB_CORRELATION = ((1.00, 0.91, 0.79), (0.91, 1.00, 0.91), (0.79, 0.91, 1.00))
SPECTRUM_EXPONENT = 1.0
RADIUS = 0.5


class Prior(Protocol):
    """A symmetric map ``S^(1/2)`` over inputs of one shape, and the radius of the ball it maps."""

    @property
    def radius(self) -> float:
        """Largest ``|z|``."""

    def colour(self, white: Tensor) -> Tensor:
        """Map ``z``, shape (B, C, *canvas), to ``S^(1/2) z``, same shape."""


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


@dataclass(frozen=True)
class NaturalPrior:
    """S is the covariance of natural images: a ``1/f^(2a)`` spectrum times a colour correlation.

    Attributes
    ----------
    amplitude : Tensor, shape (*canvas[:-1], canvas[-1] // 2 + 1)
        Square root of the spectrum at the frequencies of a real FFT, mean square 1 over all frequencies.
    mix : Tensor or None, shape (C, C)
        Symmetric square root of the colour correlation; None where channels are independent.
    radius : float
        Bound on ``|z|``.
    """

    amplitude: Tensor
    mix: Tensor | None
    radius: float

    def colour(self, white: Tensor) -> Tensor:
        """Map white noise ``z`` to an input as likely under the prior."""
        axes = tuple(range(2, white.ndim))
        shape = white.shape[2:]
        coloured: Tensor = torch.fft.irfftn(
            torch.fft.rfftn(white, dim=axes) * self.amplitude, s=shape, dim=axes
        )
        if self.mix is not None:
            coloured = torch.einsum("dc,bc...->bd...", self.mix, coloured)
        return coloured


def natural_amplitude(canvas: tuple[int, ...], exponent: float = SPECTRUM_EXPONENT) -> Tensor:
    """Amplitude spectrum ``1/f^a`` of natural images on a canvas, mean square 1.

    Parameters
    ----------
    canvas : tuple of int
        Spatial size; any number of axes.
    exponent : float
        The slope a; photographs have 0.8 to 1.2 (Field 1987).

    Returns
    -------
    Tensor, shape (*canvas[:-1], canvas[-1] // 2 + 1)
        Amplitudes at the frequencies of `torch.fft.rfftn`. The constant is given the amplitude of the
        lowest other frequency.
    """
    grids = [torch.fft.fftfreq(size) for size in canvas]
    squared = torch.stack(torch.meshgrid(*grids, indexing="ij")).square().sum(dim=0)
    lowest = 1.0 / max(canvas)
    amplitude = squared.clamp_min(lowest**2) ** (-exponent / 2)
    amplitude = amplitude / amplitude.square().mean().sqrt()
    return amplitude[..., : canvas[-1] // 2 + 1].contiguous()


def make_prior(
    name: str, channels: int, canvas: tuple[int, ...], device: torch.device | str = "cpu"
) -> Prior:
    """Build a prior over inputs of a shape.

    Parameters
    ----------
    name : {"natural", "none"}
        Which one.
    channels : int
        Input channels; three are taken to be red, green, blue.
    canvas : tuple of int
        Spatial size.
    device : torch.device
        Where its tensors live.

    Notes
    -----
    The radius of ``none`` is that of noise of standard deviation 1 a pixel. That of ``natural`` lets the
    likeliest pattern, the slowest grey one, reach a root mean square of `RADIUS`, and every other
    pattern as much as is equally likely.
    """
    pixels = channels * math.prod(canvas)
    if name == "none":
        return NoPrior(radius=math.sqrt(pixels))
    amplitude = natural_amplitude(canvas).to(device)
    mix = None
    strongest = float(amplitude.max()) ** 2
    if channels == 3:
        values, vectors = torch.linalg.eigh(torch.tensor(_RGB_CORRELATION, dtype=torch.float64))
        mix = ((vectors * values.sqrt()) @ vectors.T).float().to(device)
        strongest *= float(values.max())
    return NaturalPrior(amplitude, mix, radius=RADIUS * math.sqrt(pixels / strongest))
