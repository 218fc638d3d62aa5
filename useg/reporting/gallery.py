"""An evaluation -> the images worth a look, and a small picture of every image with its errors in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from useg.classes import IGNORE, Label
from useg.data.dataset import Dataset, pair_name, read_sample
from useg.data.images import Sample
from useg.pictures import WRONG, to_picture
from useg.reporting.html import jpeg
from useg.reporting.spelling import listed
from useg.scoring.metrics import class_ious

if TYPE_CHECKING:  # torch comes with them, and a page needs none
    from useg.inference.predictor import Predictor
    from useg.reporting.counting import Asked
    from useg.reporting.evaluate import Evaluation, ImageScore

MOST = 12  # cases of a page
THUMBNAIL = 160  # pixels: the longest side of a small picture


@dataclass(frozen=True)
class Case:
    """One image of the gallery.

    Args:
        reason: why it is shown, such as ``"worst"`` or ``"worst in Poles"``; may be empty.
        name: what it is called.
        mean_iou: over its own classes.
        ious: of each class, ``nan`` where it is not in the truth.
        image: ``(H, W, C)``.
        label: ``(H, W)``, as it was scored.
        prediction: ``(H, W)``.
    """

    reason: str
    name: str
    mean_iou: float
    ious: tuple[float, ...]
    image: NDArray[Any]
    label: Label
    prediction: Label


def image_names(evaluation: Evaluation) -> list[str]:
    """Return what the images are called in a report: their paths below the folder that they have in common."""
    names = [pair_name(image.pair) for image in evaluation.images]
    common = len(commonpath([Path(name).parent for name in names]).rstrip("/") + "/") if names else 0
    return [name[common:] if common > 1 else name for name in names]


def image_ious(image: ImageScore) -> tuple[float, ...]:
    """Return the IoU of each class in one image, ``nan`` where it is not in the truth."""
    return tuple(class_ious(image.tally).tolist())


def choose(evaluation: Evaluation, most: int = MOST) -> list[tuple[str, int]]:
    """Choose images to show: best, median and worst, for each class the one with most errors in it, and further weak ones while there is room.

    Args:
        evaluation: of any number of images.
        most: how many to show.

    Returns:
        (reason, index into ``evaluation.images``), best first; each image once.
    """
    images = evaluation.images
    ranked = sorted((k for k, image in enumerate(images) if not math.isnan(image.mean_iou)), key=lambda k: -images[k].mean_iou)
    if not ranked:
        return []
    ranks = {ranked[len(ranked) // 2]: "median", ranked[-1]: "worst", ranked[0]: "best"}
    classes: dict[int, list[str]] = {k: [] for k in ranks}
    for name, k in [*_worst_of_classes(evaluation), *(("", k) for k in ranked[:0:-1])]:
        if k in classes or len(classes) < most:
            classes.setdefault(k, []).extend([name] if name else [])
    words = {k: (ranks.get(k, ""), f"worst in {listed(names)}" if names else "") for k, names in classes.items()}
    return [("; ".join(filter(None, words[k])), k) for k in ranked if k in classes]


def _worst_of_classes(evaluation: Evaluation) -> list[tuple[str, int]]:
    """The name of each class, the worst first, and the image with most of its pixels missed or wrongly called so."""
    hits, truth, predicted = np.moveaxis(evaluation.tallies, 1, 0)
    errors = truth + predicted - 2 * hits
    classes = sorted((entry for entry in evaluation.scores.classes if entry.pixels), key=lambda entry: entry.iou)
    return [(entry.name, int(errors[:, entry.id].argmax())) for entry in classes if errors.size and errors[:, entry.id].any()]


def read_cases(chosen: Sequence[tuple[str, int]], evaluation: Evaluation, predictor: Predictor, dataset: Dataset, asked: Asked) -> list[Case]:
    """Read and predict the chosen images again.

    Raises:
        UsageError: a file that cannot be read any more.
    """
    from useg.reporting.counting import judged

    cases, names = [], image_names(evaluation)
    for reason, k in chosen:
        image = evaluation.images[k]
        sample = judged(read_sample(image.pair, dataset), asked, str(image.pair.mask))
        prediction = predictor(sample.image, asked.tile)
        cases.append(Case(reason, names[k], image.mean_iou, image_ious(image), sample.image, sample.label, prediction))
    return cases


def thumbnail(sample: Sample, prediction: Label) -> bytes:
    """Draw an image small, its wrong pixels in the colour of errors: JPEG of a few kilobytes."""
    picture, wrong = to_picture(sample.image), (prediction != sample.label) & (sample.label != IGNORE)
    height, width = sample.label.shape
    factor = min(1.0, THUMBNAIL / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small, errors = (Pillow.fromarray(part).resize(size, Pillow.Resampling.BOX) for part in (picture, np.uint8(200) * wrong))
    small.paste(WRONG, mask=errors)
    return jpeg(small, 62)


def keep(thumbnails: list[bytes]) -> Callable[[Sample, Label], None]:
    """Return what draws each image that an evaluation sees, and appends it."""
    return lambda sample, prediction: thumbnails.append(thumbnail(sample, prediction))
