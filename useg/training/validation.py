"""A model in training -> its predictions on the held-out samples at their native size, scored and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from useg.classes import ClassTable
from useg.data.augment import Crop, take
from useg.data.images import resize_image, write_picture
from useg.data.samples import CachedSample
from useg.models.segmenter import Segmenter
from useg.pictures import painted, side_by_side, to_picture
from useg.scoring.metrics import Confusion, confusion


def compute(model: Segmenter, x: Tensor, precision: torch.dtype | None) -> Tensor:
    """Return logits, under autocast to ``precision`` (None: fp32)."""
    with torch.autocast(x.device.type, precision, enabled=precision is not None):
        logits: Tensor = model(x)
    return logits


def validate(model: Segmenter, samples: Sequence[CachedSample], precision: torch.dtype | None) -> tuple[Confusion, list[NDArray[np.uint8]]]:
    """Predict every sample, one at a time and whole.

    Returns:
        Summed counts (K, K) at native resolution, and the label maps at each sample's native size.
    """
    model.eval()
    counts = np.zeros((len(model.classes),) * 2, np.int64)
    predictions = []
    with torch.inference_mode():
        for sample in samples:
            assert sample.native is not None
            height, width = sample.label.shape
            size = (_whole(model, width), _whole(model, height))
            image, _ = take(sample, Crop(0, 0), size, model.margin)
            x = torch.from_numpy(image[None]).permute(0, 3, 1, 2).to(model.mean.device)
            logits = compute(model, x, precision)[..., :height, :width].float()
            logits = F.interpolate(logits, sample.native.shape, mode="bilinear", align_corners=False)
            predictions.append(logits[0].argmax(0).to(torch.uint8).cpu().numpy())
            counts += confusion(predictions[-1], sample.native, len(model.classes))
    model.train()
    return counts, predictions


def _whole(model: Segmenter, length: int) -> int:
    """Pixels that come out of one pass over ``length`` pixels, mirrored up to a size that the network takes."""
    return model.valid_size(length + 2 * model.margin) - 2 * model.margin


def draw(samples: Sequence[CachedSample], predictions: Sequence[NDArray[np.uint8]], classes: ClassTable, path: Path) -> None:
    """Draw image | truth | prediction of the first, the middle and the last sample."""
    rows = []
    for k in sorted({0, len(samples) // 2, len(samples) - 1}):
        truth = samples[k].native
        assert truth is not None
        height, width = truth.shape
        pictures = [resize_image(to_picture(samples[k].image), (width, height)), painted(truth, classes), painted(predictions[k], classes)]
        rows.append(side_by_side(pictures, ("image", "truth", "prediction")))
    width = max(row.shape[1] for row in rows)
    write_picture(path, np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]))
