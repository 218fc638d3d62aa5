"""Tiny untrained models and random pictures: what many tests label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from useg.classes import ClassTable
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
