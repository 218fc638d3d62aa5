"""Pairs on disk -> every sample decoded once at the working size, in a memory-mapped scratch file.

Decoding and reducing a photograph takes longer than a small network needs to learn from it, so it happens once, in parallel.
The scratch file has no name: it vanishes with the run, also when the run is killed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import Dataset, Pair, read_sample
from useg.data.images import Image, resize_image, resize_label
from useg.errors import UsageError


@dataclass(frozen=True)
class WorkingSize:
    """At what size a model looks at a picture.

    Args:
        frame: (width, height) to which every whole picture is brought, its proportions kept (a camera: the frame is the scene), or None.
        scale: factor applied to every picture when ``frame`` is None (microscopes, satellites: a pixel has a size in the world).
    """

    frame: tuple[int, int] | None = None
    scale: float = 1.0

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) at which a picture of ``width`` x ``height`` is looked at."""
        scale = self.scale if self.frame is None else (self.frame[0] * self.frame[1] / (width * height)) ** 0.5
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True)
class CachedSample:
    """One sample: ``image`` (h, w, C) and ``label`` (h, w) at the working size, ``native`` (H, W) the label as stored (None unless asked for)."""

    image: Image
    label: NDArray[np.uint8]
    native: NDArray[np.uint8] | None


def fit_bands(image: Image, channels: int, pixels: str, source: str) -> Image:
    """Give ``image`` (H, W, C) the bands that a model takes; grey becomes RGB by repeating, nothing else is guessed.

    Raises:
        UsageError: another number of bands, or another number type than ``pixels`` (``"uint8"``, ``"uint16"``, ``"float32"``).
    """
    if image.dtype != np.dtype(pixels):
        raise UsageError(f"{source} holds {image.dtype} pixels, but the others (or the model) have {pixels}; convert it to {pixels} first")
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] != channels:
        raise UsageError(f"{source} has {image.shape[2]} bands, but {channels} are needed; give pictures with {channels}")
    return image


def build_cache(
    dataset: Dataset,
    pairs: Sequence[Pair],
    working: WorkingSize,
    channels: int,
    pixels: str,
    *,
    native: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> list[CachedSample]:
    """Decode ``pairs`` in parallel.

    Args:
        dataset: where they come from; knows how its masks store classes.
        pairs: what to decode.
        working: at which size.
        channels: bands that every image must have.
        pixels: number type that every image must have.
        native: keep the labels at their native size as well.
        progress: called once per decoded pair.

    Raises:
        UsageError: a file that cannot be read, sizes that differ, a value outside the classes, other bands or number types.
    """

    def decode(pair: Pair) -> CachedSample:
        sample = read_sample(pair, dataset)
        image = fit_bands(sample.image, channels, pixels, str(pair.image))
        size = working.of(image.shape[1], image.shape[0])
        cached = CachedSample(
            _to_scratch(resize_image(image, size)), _to_scratch(resize_label(sample.label, size)), _to_scratch(sample.label) if native else None
        )
        progress()
        return cached

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(decode, pairs))


def _to_scratch(values: NDArray[Any]) -> NDArray[Any]:
    """Copy an array into a nameless memory-mapped file, so that the system may page it out: a set larger than memory still trains."""
    with tempfile.TemporaryFile() as file:
        scratch = np.memmap(file, values.dtype, "w+", shape=values.shape)
    scratch[...] = values
    return scratch


def pixel_statistics(samples: Sequence[CachedSample]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each band over all pixels, in raw pixel units; a constant band has deviation 1."""
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for sample in samples:
        values = np.asarray(sample.image, np.float32).reshape(-1, sample.image.shape[2])
        count += len(values)
        total = total + values.sum(0, dtype=np.float64)
        squares = squares + np.square(values).sum(0, dtype=np.float64)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return [float(value) for value in mean], [float(value) if value > 1e-6 else 1.0 for value in std]


def class_shares(samples: Sequence[CachedSample], num_classes: int) -> NDArray[np.float64]:
    """Return each class's share of the counted pixels, ``(K,)``, summing to 1 (all 0 when every pixel is ignored)."""
    counts = np.zeros(256, np.int64)
    for sample in samples:
        counts += np.bincount(sample.label.ravel(), minlength=256)
    shares: NDArray[np.float64] = counts[:num_classes] / max(1, counts[:num_classes].sum())
    return shares
