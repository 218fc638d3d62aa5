"""Made pictures for folders as strangers bring them: a yard with its label map, and blobs.

The same seed makes the same picture. Each module of ``tests/strangers`` lays them out in the
folders, names and encodings that people have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import tifffile

WIDTH, HEIGHT = 48, 32

# The colours of the four classes of a yard: sky, house, lawn, ball.
COLORS = np.array([(120, 170, 230), (150, 90, 70), (90, 110, 80), (220, 190, 40)], np.uint8)
NAMES = ("sky", "house", "lawn", "ball")


def yard(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture ``(H, W, 3)`` of a house, a lawn and balls, and its label map ``(H, W)``."""
    rng = np.random.default_rng(seed)
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    left = rng.integers(2, WIDTH // 2)
    label[rng.integers(4, HEIGHT // 2) :, left : left + rng.integers(8, WIDTH // 2)] = 1
    label[rng.integers(HEIGHT // 2, HEIGHT - 6) :] = 2
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for _ in range(2):
        row, column = rng.integers(6, HEIGHT - 4), rng.integers(4, WIDTH - 4)
        label[(y - row) ** 2 + (x - column) ** 2 < rng.integers(9, 25)] = 3
    return paint(COLORS[label], rng), label


def blobs(seed: int, count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A noisy grey picture ``(H, W)`` of bright discs, and their numbers ``(H, W)`` from 1."""
    rng = np.random.default_rng(seed)
    numbers = np.zeros((HEIGHT, WIDTH), np.uint16)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for number in range(1, count + 1):
        row, column = rng.integers(4, HEIGHT - 4), rng.integers(4, WIDTH - 4)
        disc = (y - row) ** 2 + (x - column) ** 2 < rng.integers(8, 20)
        numbers[disc & (numbers == 0)] = number
    return paint(np.where(numbers > 0, 170, 50), rng), numbers


def paint(clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise to pixels."""
    return (clean + rng.integers(-9, 10, clean.shape)).clip(0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write pixels by tifffile (``.tif``) or Pillow; JPEGs at quality 95. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels)
    else:
        PIL.Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path
