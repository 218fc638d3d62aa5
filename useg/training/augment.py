"""Changes the colours, light and sharpness of training crops, as other cameras and days would.

A model that has seen one street in one light has to label others. For each crop, :func:`draw_look`
draws how it looks, and :func:`apply_looks` changes a whole batch at once, on its device. Labels do
not change. How strongly is a :class:`LookRange`.

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

# The weights of red, green and blue in the brightness of a colour (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)

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
# Standard deviation of blur in pixels, and of noise as a share of the value range.
BLUR, NOISE = (0.4, 2.0), (0.01, 0.08)


@dataclass(frozen=True)
class LookRange:
    """How strongly the look of crops is changed.

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
        parts = (self.grayscale, self.shading, self.fog, self.blur, self.noise, self.exposure)
        return any((self.color_jitter, *parts))


NO_LOOKS = LookRange()


@dataclass(frozen=True)
class Look:
    """How one crop looks; the defaults change nothing.

    Args:
        colors: ``(C, C)``: each band after the change, as a sum of those before.
        gamma: exponent of the pixels as shares of the value range.
        shading: ``(points, points)`` logarithm of the light on a coarse grid; None for even light.
        fog: shares of the light that fog replaces at the top and the bottom.
        fog_color: brightness of the fog as a share of the value range.
        blur: standard deviation in pixels; 0 for none.
        noise: standard deviation of the noise, as a share of the value range.
        seed: of the noise.
    """

    colors: NDArray[np.float32]
    gamma: float = 1.0
    shading: NDArray[np.float32] | None = None
    fog: tuple[float, float] = (0.0, 0.0)
    fog_color: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    seed: int = 0


def draw_look(rng: np.random.Generator, channels: int, ranges: LookRange) -> Look:
    """Draw how a crop of so many bands looks."""

    def happens(share: float) -> bool:
        return bool(rng.random() < share)

    def spread(largest: float) -> float:
        return float(rng.uniform(-largest, largest)) * ranges.color_jitter

    shading, fog, fog_color = None, (0.0, 0.0), 0.0
    gamma = float(np.exp(spread(MAX_GAMMA)))
    gains = np.exp([spread(MAX_GAIN) for _ in range(channels)])
    saturation, hue = float(np.exp(spread(MAX_SATURATION))), spread(MAX_HUE)
    # Runs without other exposures draw the numbers that they always drew.
    if ranges.exposure and ranges.limit is not None and happens(ranges.exposure):
        gains *= np.exp(rng.uniform(*EXPOSURE) + rng.normal(0, CAST, channels))
    colors = np.diag(gains)
    if channels == 3:
        saturation = 0.0 if happens(ranges.grayscale) else saturation
        colors = _rotate_hue(hue) @ _saturate(saturation) @ colors
    if happens(ranges.shading):
        points = rng.normal(0, SHADING, (SHADING_POINTS, SHADING_POINTS))
        shading = points.astype(np.float32)
    if ranges.limit is not None and happens(ranges.fog):
        top = float(rng.uniform(0, MAX_FOG))
        fog, fog_color = (top, top * float(rng.random())), float(rng.uniform(*FOG_BRIGHTNESS))
    return Look(
        colors.astype(np.float32),
        gamma,
        shading,
        fog,
        fog_color,
        blur=float(rng.uniform(*BLUR)) if happens(ranges.blur) else 0.0,
        noise=float(rng.uniform(*NOISE)) if happens(ranges.noise) else 0.0,
        seed=int(rng.integers(1 << 31)),
    )


def _saturate(factor: float) -> NDArray[np.float64]:
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))


def _rotate_hue(angle: float) -> NDArray[np.float64]:
    """Return the rotation of colours around the axis of greys."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    around = np.full((3, 3), 1 / 3)
    rotation: NDArray[np.float64] = (
        np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * around
    )
    return rotation


def apply_looks(x: Tensor, looks: Sequence[Look], limit: float | None, scale: float) -> Tensor:
    """Change raw pixels ``(N, H, W, C)`` float32; one look per crop.

    Args:
        x: The pixels.
        looks: One for each crop.
        limit: Largest value of the pixels; None if there is none.
        scale: What noise is a share of: the value range.
    """
    device = x.device
    N, H, W, C = x.shape
    colors = torch.from_numpy(np.stack([look.colors for look in looks])).to(device)
    x = torch.bmm(x.reshape(N, H * W, C), colors.transpose(1, 2)).view(N, H, W, C)
    if limit is not None:
        x = x.clamp_(0, limit)
        gammas = torch.tensor([look.gamma for look in looks], device=device)
        x = x.div_(limit).pow_(gammas[:, None, None, None]).mul_(limit)
    for k, look in enumerate(looks):
        if look.shading is not None:
            grid = torch.from_numpy(look.shading).to(device)[None, None]
            field = F.interpolate(grid, (H, W), mode="bicubic", align_corners=True)[0, 0]
            x[k] *= field.exp_()[..., None]
        if limit is not None and any(look.fog):
            share = torch.linspace(*look.fog, H, device=device)[:, None, None]
            x[k] = x[k] * (1 - share) + share * (look.fog_color * limit)
        if look.blur:
            x[k] = _blur(x[k], look.blur)
        if look.noise:
            generator = torch.Generator(device).manual_seed(look.seed)
            noise = torch.randn((H, W, C), generator=generator, device=device)
            x[k] += noise.mul_(look.noise * scale)
    return x if limit is None else x.clamp_(0, limit)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Blur an image ``(H, W, C)`` with a Gaussian."""
    radius = max(1, round(2.5 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    x = image.permute(2, 0, 1)[:, None]  #                     (C, 1, H, W)
    x = F.pad(x, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1))
    x = F.conv2d(x, kernel.view(1, 1, -1, 1))
    return x[:, 0].permute(1, 2, 0)
