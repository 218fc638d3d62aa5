"""Tiny untrained models, and images and label maps to use them on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from useg.classes import IGNORE, ClassTable
from useg.images.tiff import GeoReference
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter


def make_model(
    padding: str = "same",
    channels: int = 3,
    working: WorkingSize | None = None,
    pixels: str = "uint8",
    seed: int = 0,
) -> Segmenter:
    """An untrained U-Net of depth 2 for the classes a, b, c and d; the same seed gives the same."""
    torch.manual_seed(seed)
    settings = {
        "encoder": "plain",
        "channels": channels,
        "classes": 4,
        "width": 2,
        "depth": 2,
        "padding": padding,
        "normalize": False,
    }
    classes = ClassTable(("a", "b", "c", "d"))
    mean, std = [100.0] * channels, [50.0] * channels
    return Segmenter(settings, classes, mean, std, working, pixels).eval()


def make_runtime(model: Segmenter) -> runtimes.Runtime:
    """A model in memory, computed by PyTorch."""
    return runtimes.runtime_of_model(model, Path("memory"))


def make_predictor(model: Segmenter) -> Predictor:
    """A predictor of a model in memory."""
    return Predictor(make_runtime(model))


def random_image(height: int, width: int, bands: int = 3) -> np.ndarray:
    """Random pixels ``(height, width, bands)`` uint8; the same height gives the same."""
    return np.random.default_rng(height).integers(0, 256, (height, width, bands), np.uint8)


def textured_image(height: int, width: int, bands: int = 3) -> np.ndarray:
    """Squares of 16 pixels with noise, ``(height, width, bands)`` uint8."""
    rng = np.random.default_rng(height * width)
    squares = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, bands))
    coarse = squares.repeat(16, 0).repeat(16, 1)[:height, :width]
    return np.clip(coarse + rng.integers(-30, 30, coarse.shape), 0, 255).astype(np.uint8)


def small_label_maps(max_side: int = 9) -> st.SearchStrategy[np.ndarray]:
    """Label maps of three classes and ignored pixels."""
    sides = st.tuples(st.integers(1, max_side), st.integers(1, max_side))
    return arrays.arrays(np.uint8, sides, elements=st.sampled_from([0, 1, 2, IGNORE]))


# A label map with the class "background", and names that XML has to escape.
BACKGROUND_TABLE = ClassTable(("background", 'räder & "wheels" <5', "car"))
BACKGROUND_LABEL = np.uint8([[0, 0, 1, 1], [0, 2, 2, 1], [2, 0, 0, 1]])

# Pixels of 10 metres in a zone of UTM.
UTM = GeoReference(
    (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0),
    "EPSG:32632",
    (
        (33550, "d", 3, (10.0, 10.0, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 500_000.0, 5_000_000.0, 0.0), True),
        (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632), True),
    ),
)


def rasterio_open(path: Path) -> Any:
    """Open a file with rasterio, or skip the test."""
    rasterio = pytest.importorskip("rasterio")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path)
