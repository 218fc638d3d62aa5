"""Semantic segmentation: train a U-Net on your images and masks, score it, use it anywhere.

>>> import useg
>>> run = useg.train("data", "run", minutes=10)  # doctest: +SKIP
>>> model = useg.load("run")  # doctest: +SKIP
>>> prediction = model(image)  # (H, W, 3) uint8 in, (H, W) uint8 label map out  # doctest: +SKIP
"""

from __future__ import annotations

import importlib

# As in typing, whose import would take most of the time of this one.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from useg.api import train
    from useg.classes import ClassTable
    from useg.cross_validation import CrossValidation, train_folds
    from useg.data.dataset import Dataset, Pair, read_objects, read_sample
    from useg.data.splits import open_dataset
    from useg.errors import (
        DataError,
        MachineError,
        MissingPackageError,
        ModelError,
        SettingsError,
        UsageError,
    )
    from useg.images.image_files import Sample
    from useg.inference.adapt import Adaptation, adapt
    from useg.inference.bench import bench
    from useg.inference.outputs import OutputOptions
    from useg.inference.predict_files import Outcome, predict
    from useg.inference.predictor import Predictor, load
    from useg.inference.video import predict_video
    from useg.models.describe import describe
    from useg.models.drawing import drawing
    from useg.models.segmenter import Segmenter
    from useg.models.unet import UNet
    from useg.objects.table import FoundObjects
    from useg.reporting.evaluate import Extras
    from useg.reporting.evaluation_result import Comparison, Evaluation
    from useg.reporting.report import compare, evaluate
    from useg.serving.export import export
    from useg.training.loop import Run

__version__ = "0.1.0"

# Public names are imported on first use: `import useg` takes no time and does not load torch.
_PUBLIC = {
    "Adaptation": "useg.inference.adapt",
    "ClassTable": "useg.classes",
    "Comparison": "useg.reporting.evaluation_result",
    "CrossValidation": "useg.cross_validation",
    "DataError": "useg.errors",
    "Dataset": "useg.data.dataset",
    "Evaluation": "useg.reporting.evaluation_result",
    "Extras": "useg.reporting.evaluate",
    "FoundObjects": "useg.objects.table",
    "MachineError": "useg.errors",
    "MissingPackageError": "useg.errors",
    "ModelError": "useg.errors",
    "Outcome": "useg.inference.predict_files",
    "OutputOptions": "useg.inference.outputs",
    "Pair": "useg.data.dataset",
    "Predictor": "useg.inference.predictor",
    "Run": "useg.training.loop",
    "Sample": "useg.images.image_files",
    "Segmenter": "useg.models.segmenter",
    "SettingsError": "useg.errors",
    "UNet": "useg.models.unet",
    "UsageError": "useg.errors",
    "adapt": "useg.inference.adapt",
    "bench": "useg.inference.bench",
    "compare": "useg.reporting.report",
    "describe": "useg.models.describe",
    "drawing": "useg.models.drawing",
    "evaluate": "useg.reporting.report",
    "export": "useg.serving.export",
    "load": "useg.inference.predictor",
    "open_dataset": "useg.data.splits",
    "predict": "useg.inference.predict_files",
    "predict_video": "useg.inference.video",
    "read_objects": "useg.data.dataset",
    "read_sample": "useg.data.dataset",
    "train": "useg.api",
    "train_folds": "useg.cross_validation",
}

__all__ = [
    "Adaptation",
    "ClassTable",
    "Comparison",
    "CrossValidation",
    "DataError",
    "Dataset",
    "Evaluation",
    "Extras",
    "FoundObjects",
    "MachineError",
    "MissingPackageError",
    "ModelError",
    "Outcome",
    "OutputOptions",
    "Pair",
    "Predictor",
    "Run",
    "Sample",
    "Segmenter",
    "SettingsError",
    "UNet",
    "UsageError",
    "adapt",
    "bench",
    "compare",
    "describe",
    "drawing",
    "evaluate",
    "export",
    "load",
    "open_dataset",
    "predict",
    "predict_video",
    "read_objects",
    "read_sample",
    "train",
    "train_folds",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'useg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
