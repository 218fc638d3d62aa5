"""Tiny untrained models, and images and label maps to use them on."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from useg.classes import IGNORE, ClassTable
from useg.images.tiff import GeoReference
from useg.inference import exported, runtimes
from useg.inference.predictor import Predictor
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter, describe_model


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


# Small networks of all kinds: with and without padding, and without expanding path.
NETWORKS: dict[str, dict[str, Any]] = {
    "same": {"encoder": "plain", "depth": 1, "padding": "same"},
    "valid": {"encoder": "plain", "depth": 2, "padding": "valid", "extra_conv": True},
    "fcn8s": {"encoder": "fcn8s"},
    "cnn": {"encoder": "cnn", "depth": 3},
}


def make_model_of(
    network: str = "same", channels: int = 3, pixels: str = "uint8", temperature: float = 1.5
) -> Segmenter:
    """An untrained model of one of ``NETWORKS``, for five classes at a working size of 48x40."""
    torch.manual_seed(0)
    settings = {"width": 4, "normalize": True, **NETWORKS[network]}
    model = Segmenter(
        {**settings, "channels": channels, "classes": 5},
        ClassTable(tuple("abcde")),
        [110.0] * channels,
        [60.0] * channels,
        WorkingSize((48, 40)),
        pixels,
        {"seed": 7},
        temperature,
    )
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def store(model: Segmenter) -> runtimes.StoredModel:
    """A model in memory, as :func:`useg.inference.runtimes.read_model` returns it from a file."""
    return runtimes.StoredModel(describe_model(model), Path("memory"), model)


def skip_if_missing(runtime: str) -> None:
    """Skip the test if this machine cannot compute with a runtime."""
    packages = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
    for package in packages.get(runtime.removesuffix("-bf16"), ()):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if runtime == "openvino-bf16" and not exported.has_bf16():
        pytest.skip("this processor has no bf16")


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
