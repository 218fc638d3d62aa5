"""Photometric augmentation: random changes of colours, light and sharpness of training crops.

A model trained on one street in one light also has to label other streets. :func:`draw_change`
draws the changes of a crop, within a :class:`PhotometricRange`, and :func:`apply_changes`
applies them to a whole batch on its device. Labels do not change. A crop may also take the colours
of another image (:func:`match_colours`).

Sources: colour jitter, grayscale, blur and noise as in SimCLR (Chen and others 2020, appendix A),
fog as in the corruptions of Hendrycks and Dietterich (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from useg.device import move_arrays

# The weights of red, green and blue in the brightness of a colour (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)

# Components of the matrices that change colours.
_IDENTITY, _GRAY = np.eye(3), np.tile(LUMA, (3, 1))
# Rodrigues' rotation around the axis of greys: the matrix of the cross product with the axis, and
# the projection onto it.
_CROSS_PRODUCT = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
_PROJECTION = np.full((3, 3), 1 / 3)

# Largest changes at full strength: natural logarithm of the exponent, of the gain of each band and
# of the saturation; and the rotation of the hue in radians.
MAX_GAMMA, MAX_GAIN, MAX_SATURATION, MAX_HUE = 0.6, 0.25, 0.7, 0.25
# Natural logarithm of the factor of another exposure, and the standard deviation of the logarithm
# of its cast of colour: from a seventh of the light, as at night, to twice as much.
EXPOSURE, CAST = (-2.0, 0.7), 0.15
# Standard deviation of the logarithm of uneven light, on a grid of this many points.
SHADING, SHADING_POINTS = 0.35, 3
# Share of the light that fog replaces, and its brightness.
MAX_FOG, FOG_BRIGHTNESS = 0.7, (0.5, 0.95)
# The colours of an image are described by this many quantiles of each band, of about this many
# sampled pixels.
NUM_QUANTILES, SAMPLED_PIXELS = 33, 4096
# Standard deviation of blur in pixels, and of noise as a share of the value range.
BLUR, NOISE = (0.4, 2.0), (0.01, 0.08)


@dataclass(frozen=True)
class PhotometricRange:
    """The strength of photometric augmentation.

    Args:
        color_jitter: strength of changes of gamma, gain of each band, saturation and hue, 0 to 1.
        grayscale, shading, fog, blur, noise: share of the crops that lose their colour, get uneven
            light, fog, blur or noise, 0 to 1.
        exposure: share of the crops that become much darker or brighter, 0 to 1.
        limit: largest value of the pixels, such as 255; None for pixels without a fixed range,
            which keep their gamma and exposure and get no fog.
    """

    color_jitter: float = 0.0
    grayscale: float = 0.0
    shading: float = 0.0
    fog: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    exposure: float = 0.0
    limit: float | None = None

    def __bool__(self) -> bool:
        """Whether anything changes."""
        return any(value for name, value in vars(self).items() if name != "limit")


NO_PHOTOMETRIC = PhotometricRange()


@dataclass(frozen=True)
class PixelChange:
    """The changes of one crop; the defaults change nothing.

    Args:
        colors: ``(C, C)``: each band after the change, as a sum of those before.
        gamma: exponent of the pixels as shares of the value range.
        shading: ``(points, points)`` logarithm of the light on a coarse grid; None for even light.
        fog: shares of the light that fog replaces at the top and the bottom.
        fog_color: brightness of the fog as a share of the value range.
        blur: standard deviation in pixels; 0 for none.
        noise: standard deviation of the noise, as a share of the value range.
        seed: of the noise.
        matched: colours before and after, each as :func:`measure_colours` returns them, to match
            before all other changes; None for none.
    """

    colors: NDArray[np.float32]
    gamma: float = 1.0
    shading: NDArray[np.float32] | None = None
    fog: tuple[float, float] = (0.0, 0.0)
    fog_color: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    seed: int = 0
    matched: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None


PixelChanges = Sequence[PixelChange]


def draw_change(rng: np.random.Generator, channels: int, ranges: PhotometricRange) -> PixelChange:
    """Draw the changes of a crop with ``channels`` bands."""

    def happens(share: float) -> bool:
        return bool(rng.random() < share)

    def spread(largest: float) -> float:
        return draw_uniform(rng, -largest, largest) * ranges.color_jitter

    shading, fog, fog_color = None, (0.0, 0.0), 0.0
    gamma = float(np.exp(spread(MAX_GAMMA)))
    gains = np.exp([spread(MAX_GAIN) for _ in range(channels)])
    saturation, hue = float(np.exp(spread(MAX_SATURATION))), spread(MAX_HUE)
    # Runs without exposure changes draw the same random numbers as before.
    if ranges.exposure and ranges.limit is not None and happens(ranges.exposure):
        gains *= np.exp(draw_uniform(rng, *EXPOSURE) + rng.normal(0, CAST, channels))
    colors = np.diag(gains)
    if channels == 3:
        saturation = 0.0 if happens(ranges.grayscale) else saturation
        saturate = saturation * _IDENTITY + (1 - saturation) * _GRAY
        cos, sin = np.cos(hue), np.sin(hue)
        rotate = cos * _IDENTITY + sin * _CROSS_PRODUCT + (1 - cos) * _PROJECTION
        colors = rotate @ saturate @ colors
    if happens(ranges.shading):
        shading = rng.normal(0, SHADING, (SHADING_POINTS,) * 2).astype(np.float32)
    if ranges.limit is not None and happens(ranges.fog):
        top = draw_uniform(rng, 0, MAX_FOG)
        fog, fog_color = (top, top * rng.random()), draw_uniform(rng, *FOG_BRIGHTNESS)
    return PixelChange(
        colors.astype(np.float32),
        gamma,
        shading,
        fog,
        fog_color,
        blur=draw_uniform(rng, *BLUR) if happens(ranges.blur) else 0.0,
        noise=draw_uniform(rng, *NOISE) if happens(ranges.noise) else 0.0,
        seed=int(rng.integers(1 << 31)),
    )


def draw_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw the same number as ``rng.uniform``, in a third of the time."""
    return low + (high - low) * rng.random()


def apply_changes(
    x: Tensor, changes: PixelChanges, limit: float | None, scale: float, *, at_once: bool = False
) -> Tensor:
    """Change raw pixels ``(N, H, W, C)`` float32: photometric augmentation.

    Args:
        x: The pixels.
        changes: Those of each crop.
        limit: Largest value of the pixels; None if there is none.
        scale: What noise is a share of: the value range.
        at_once: Whether what some crops need is computed for all of them at once, which a GPU does
            as fast as for one; else each crop gets only what it needs. The results are equal.
    """
    N, H, W, C = x.shape
    for k, change in enumerate(changes):
        if change.matched:
            x[k] = match_colours(x[k], *change.matched)
    gammas = np.array([change.gamma for change in changes], np.float32)[:, None, None, None]
    colors, gamma = move_arrays([np.stack([change.colors for change in changes]), gammas], x.device)
    x = torch.bmm(x.reshape(N, H * W, C), colors.transpose(1, 2)).view(N, H, W, C)
    if limit is not None:
        x = x.clamp_(0, limit).div_(limit).pow_(gamma).mul_(limit)
    for part in [slice(N)] if at_once else [slice(k, k + 1) for k in range(N)]:
        _apply_local_changes(x[part], changes[part], limit)
    for k, change in enumerate(changes):
        if change.noise:
            generator = torch.Generator(x.device).manual_seed(change.seed)
            noise = torch.randn((H, W, C), generator=generator, device=x.device)
            x[k] += noise.mul_(change.noise * scale)
    return x if limit is None else x.clamp_(0, limit)


def _apply_local_changes(x: Tensor, changes: PixelChanges, limit: float | None) -> None:
    """Give crops ``(n, H, W, C)`` uneven light, fog and blur, in place."""
    n, H, W, _ = x.shape
    if any(change.shading is not None for change in changes):
        grids = np.zeros((n, 1, SHADING_POINTS, SHADING_POINTS), np.float32)
        for k, change in enumerate(changes):
            grids[k] = 0 if change.shading is None else change.shading
        (grid,) = move_arrays([grids], x.device)
        field = F.interpolate(grid, (H, W), mode="bicubic", align_corners=True)
        x *= field.exp_()[:, 0, :, :, None]
    if limit is not None and any(any(change.fog) for change in changes):
        shares, colors = np.zeros((n, H, 1, 1), np.float32), np.zeros((n, 1, 1, 1), np.float32)
        for k, change in enumerate(changes):
            if any(change.fog):
                shares[k, :, 0, 0] = torch.linspace(*change.fog, H).numpy()
                colors[k] = change.fog_color * limit
        share, color = move_arrays([shares, colors], x.device)
        x.copy_(x * (1 - share) + share * color)
    if any(change.blur for change in changes):
        x.copy_(_blur(x, [change.blur for change in changes]))


def _blur(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blur crops ``(n, H, W, C)`` with Gaussians; those with a deviation of 0 do not change."""
    radii = [max(1, round(2.5 * sigma)) for sigma in sigmas]
    n, radius = len(x), max(radii)
    kernels = np.zeros((n, 2 * radius + 1), np.float32)
    kernels[:, radius] = 1
    for kernel, own, sigma in zip(kernels, radii, sigmas, strict=True):
        if sigma:
            offsets = torch.arange(-own, own + 1, dtype=torch.float32)
            weights = torch.exp(-(offsets**2) / (2 * sigma**2))
            kernel[radius - own : radius + own + 1] = (weights / weights.sum()).numpy()
    (weight,) = move_arrays([kernels], x.device)
    x = x.permute(3, 0, 1, 2)  #                               (C, n, H, W)
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, weight.view(n, 1, 1, -1), groups=n)
    x = F.conv2d(x, weight.view(n, 1, -1, 1), groups=n)
    return x.permute(1, 2, 3, 0)


def measure_colours(image: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the quantiles of each band of an image ``(H, W, C)``: ``(C, NUM_QUANTILES)``."""
    pixels = image.reshape(-1, image.shape[2])
    sampled: NDArray[np.float32] = pixels[:: -(-len(pixels) // SAMPLED_PIXELS)].astype(np.float32)
    quantiles = np.quantile(sampled, np.linspace(0, 1, NUM_QUANTILES), axis=0)
    return np.ascontiguousarray(quantiles.T, np.float32)


def match_colours(x: Tensor, old: NDArray[np.float32], new: NDArray[np.float32]) -> Tensor:
    """Match the colours of raw pixels ``(H, W, C)`` to others: histogram matching, band by band.

    Args:
        x: The pixels of an image, or of a part of it.
        old, new: Colours of the whole image, and those to give it, ``(C, NUM_QUANTILES)``.
    """
    H, W, C = x.shape
    # Equal quantiles are spread a little, so that the mapping from old to new ones is unique.
    spread = np.maximum(old[:, -1:] - old[:, :1], 1) * np.linspace(0, 1e-3, NUM_QUANTILES)
    knots, values = move_arrays([old + spread.astype(np.float32), new], x.device)
    pixels = x.reshape(H * W, C).T.contiguous()
    right = torch.searchsorted(knots, pixels).clamp_(1, NUM_QUANTILES - 1)
    low, high = knots.gather(1, right - 1), knots.gather(1, right)
    share = ((pixels - low) / (high - low)).clamp_(0, 1)
    matched = torch.lerp(values.gather(1, right - 1), values.gather(1, right), share)
    return matched.T.reshape(H, W, C)
