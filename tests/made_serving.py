"""Small untrained models of every network family, saved as run folders."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from useg.classes import CARLA
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter, save_model

# Parameters of a test: the extension of each exported format whose package is installed.
FORMATS = [
    pytest.param(
        suffix,
        marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"),
    )
    for suffix, package in ((".onnx", "onnxruntime"), (".xml", "openvino"))
]

NETWORKS: dict[str, dict[str, Any]] = {
    "valid": {"encoder": "plain", "depth": 1, "padding": "valid", "extra_conv": True},
    "same": {
        "encoder": "plain",
        "depth": 4,
        "padding": "same",
        "up_kernel": 3,
        "extra_conv": True,
        "normalize": False,
    },
    "no skips": {"encoder": "plain", "depth": 1, "padding": "same", "skips": False},
    "cnn": {"encoder": "cnn", "depth": 2},
    "fcn8s": {"encoder": "fcn8s"},
    "lite0": {"encoder": "lite0"},
}


def make_network(name: str) -> Segmenter:
    """An untrained model of one of ``NETWORKS`` for CARLA's classes; always the same.

    Any other name is that of an encoder.
    """
    torch.manual_seed(0)
    chosen = NETWORKS.get(name, {"encoder": name})
    settings = {"width": 4, "normalize": True, **chosen, "channels": 3, "classes": 13}
    model = Segmenter(
        settings,
        CARLA,
        [110.0, 100.0, 90.0],
        [60.0] * 3,
        WorkingSize((48, 40)),
        "uint8",
        {"split": {"data.holdout": 0.3}},
    )
    model.temperature = 1.25
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def save_run(name: str, folder: Path) -> Path:
    """Save one of ``NETWORKS`` as a run folder."""
    folder.mkdir()
    save_model(make_network(name), folder / "model.safetensors")
    return folder
