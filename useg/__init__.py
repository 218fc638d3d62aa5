"""Semantic segmentation: train a U-Net on your images and masks, score it, use it anywhere.

>>> import useg
>>> run = useg.train("data", "run", minutes=10)  # doctest: +SKIP
>>> model = useg.load("run")  # doctest: +SKIP
>>> prediction = model(image)  # (H, W, 3) uint8 in, (H, W) uint8 label map out  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from useg.api import train
    from useg.classes import ClassTable
    from useg.errors import (
        DataError,
        MachineError,
        MissingPackageError,
        ModelError,
        SettingsError,
        UsageError,
    )
    from useg.inference.files import predict
    from useg.inference.predictor import Predictor, load
    from useg.models.describe import describe
    from useg.models.drawing import drawing
    from useg.models.segmenter import Segmenter
    from useg.models.unet import UNet
    from useg.reporting.evaluate import Extras
    from useg.reporting.report import compare, evaluate

__version__ = "0.1.0"

# Public names are imported on first use: `import useg` takes no time and does not load torch.
_PUBLIC = {
    "ClassTable": "useg.classes",
    "DataError": "useg.errors",
    "Extras": "useg.reporting.evaluate",
    "MachineError": "useg.errors",
    "MissingPackageError": "useg.errors",
    "ModelError": "useg.errors",
    "Predictor": "useg.inference.predictor",
    "Segmenter": "useg.models.segmenter",
    "SettingsError": "useg.errors",
    "UNet": "useg.models.unet",
    "UsageError": "useg.errors",
    "compare": "useg.reporting.report",
    "describe": "useg.models.describe",
    "drawing": "useg.models.drawing",
    "evaluate": "useg.reporting.report",
    "load": "useg.inference.predictor",
    "predict": "useg.inference.files",
    "train": "useg.api",
}

__all__ = [
    "ClassTable",
    "DataError",
    "Extras",
    "MachineError",
    "MissingPackageError",
    "ModelError",
    "Predictor",
    "Segmenter",
    "SettingsError",
    "UNet",
    "UsageError",
    "compare",
    "describe",
    "drawing",
    "evaluate",
    "load",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'useg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
