"""A model in training -> its predictions on the held-out samples at their native size, scored and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from useg.classes import IGNORE, ClassTable
from useg.data.augment import Crop, take
from useg.data.images import resize_image, write_picture
from useg.data.samples import CachedSample
from useg.models.segmenter import Segmenter, output_size
from useg.pictures import painted, side_by_side, to_picture
from useg.ranks import rank, summed, world
from useg.scoring.metrics import Confusion, confusion


def compute(model: nn.Module, x: Tensor, precision: torch.dtype | None) -> Tensor:
    """Return logits, under autocast to ``precision`` (None: fp32)."""
    with torch.autocast(x.device.type, precision, enabled=precision is not None):
        logits: Tensor = model(x)
    return logits


@dataclass(frozen=True)
class Validation:
    """What held-out samples say of a model.

    Args:
        counts: of all of them, ``(K, K)``, at native resolution.
        loss: the plain cross-entropy of their pixels at the working size, whatever loss is trained on; ``nan`` when all are ignored.
        predictions: label maps at native size of the samples that are drawn (by the first process).
    """

    counts: Confusion
    loss: float
    predictions: Mapping[int, NDArray[np.uint8]]


def validate(model: Segmenter, samples: Sequence[CachedSample], precision: torch.dtype | None) -> Validation:
    """Predict every sample, one at a time and whole; several processes share them out."""
    model.eval()
    counts, losses = np.zeros((len(model.classes),) * 2, np.int64), torch.zeros(2, dtype=torch.float64)
    predictions = {}
    shown = _shown(len(samples)) if rank() == 0 else set()
    own = set(range(rank(), len(samples), world()))
    with torch.inference_mode():
        for k in sorted(own | shown):
            sample = samples[k]
            assert sample.native is not None
            height, width = sample.label.shape
            image, _ = take(sample, Crop(0, 0), output_size(model, (width, height)), model.margin)  # mirrored up to what the network takes
            x = torch.from_numpy(image[None]).permute(0, 3, 1, 2).to(model.mean.device)
            logits = compute(model, x, precision)[..., :height, :width].float()
            if k in own:
                target = torch.from_numpy(sample.label[None].astype(np.int64)).to(x.device)
                loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
                losses += torch.tensor([loss.item(), (target != IGNORE).sum().item()])
            logits = F.interpolate(logits, sample.native.shape, mode="bilinear", align_corners=False)
            prediction = logits[0].argmax(0).to(torch.uint8).cpu().numpy()
            if k in own:
                counts += confusion(prediction, sample.native, len(model.classes))
            if k in shown:
                predictions[k] = prediction
    model.train()
    total, pixels = summed(losses).tolist()
    return Validation(summed(torch.from_numpy(counts)).numpy(), total / pixels if pixels else float("nan"), predictions)


def _shown(count: int) -> set[int]:
    """The first, the middle and the last sample are drawn."""
    return {0, count // 2, count - 1}


def draw(samples: Sequence[CachedSample], predictions: Mapping[int, NDArray[np.uint8]], classes: ClassTable, path: Path) -> None:
    """Draw image | truth | prediction of the samples that there are predictions of."""
    rows = []
    for k in sorted(predictions):
        truth = samples[k].native
        assert truth is not None
        height, width = truth.shape
        pictures = [resize_image(to_picture(samples[k].image), (width, height)), painted(truth, classes), painted(predictions[k], classes)]
        rows.append(side_by_side(pictures, ("image", "truth", "prediction")))
    width = max(row.shape[1] for row in rows)
    write_picture(path, np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]))
