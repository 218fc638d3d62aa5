"""Unlabelled images of the place where a model will work -> colours for training crops.

useg reads the colours of the images before a run starts, and refuses images that cannot come from
such a place. Later it scores the model on held-out images twice: with their own colours, and with
colours matched to the images without masks (histogram matching). If the new colours reduce the
score by much, half of the training crops are recoloured from then on; their masks stay the same.
Otherwise the run is bit for bit the same as without these images. useg never trains on
predictions, because measurements showed more harm than help (docs/new_images.md).
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from useg.data.cache import CachedSample
from useg.data.dataset import pick_evenly
from useg.data.pairing import find_masks
from useg.errors import DataError, SettingsError, format_count
from useg.images.image_files import Image, list_image_files, read_image
from useg.machine import in_parallel
from useg.models.geometry import fit_bands
from useg.scoring.metrics import class_ious, mean_present, tally
from useg.training.augment import NUM_QUANTILES, match_colours, measure_colours
from useg.training.checkpoint import LogRow
from useg.training.plan import Plan
from useg.training.schedule import Schedule
from useg.training.trainer import Trainer, validate

# Unlabelled images: the most that are used, and the fewest that are enough.
MAX_UNLABELLED, MIN_UNLABELLED = 64, 4

# Held-out images that are scored in both colours.
MAX_SCORED = 24

# The colours matter if they lower the mIoU of the model by this share. If they lower it less,
# training with them did not help.
MIN_LOSS_SHARE = 1 / 8

# The scores are compared after this share of the run, and not before its images are at full size.
COMPARED_AT = 0.4

# In images, neighbouring pixels are alike: their correlation is at least this share of that of the
# training images. In noise it is about 0.
MIN_CORRELATION_SHARE = 0.5


@dataclass(frozen=True)
class ColourComparison:
    """How much the colours of images without masks lower the score of a model.

    Args:
        own: Mean IoU on held-out images.
        matched: The same in the colours of the images without masks.
    """

    own: float
    matched: float

    @property
    def matters(self) -> bool:
        """Whether the colours cost so much that the model should learn them."""
        return self.own - self.matched >= MIN_LOSS_SHARE * self.own > 0

    def __str__(self) -> str:
        return (
            f"held-out images score mIoU {100 * self.matched:.1f} % if they are recoloured like "
            f"the unlabelled images, and {100 * self.own:.1f} % as they are"
        )


def describe_comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the comparisons of a run, from the rows of its log: the last, and what was before.

    A run that repeats another one has no comparison before the colours were learned.
    """
    first, last = rows[0], rows[-1]
    learned = "crops took these colours" if last["learned"] else "too little to learn them"
    before = f" (before: {100 * first['matched']:.1f} %)" if len(rows) > 1 else ""
    return f"{ColourComparison(last['own'], last['matched'])}; {learned}{before}"


def read_colours(
    folder: str | os.PathLike[str], plan: Plan, train: Sequence[CachedSample]
) -> NDArray[np.float32]:
    """Return the colours of images without masks, ``(P, C, NUM_QUANTILES)``.

    Args:
        folder: A folder of images, 4 or more; masks beside them are not used.
        plan: Bands, number type and working size of the run.
        train: The training samples, which show what images of this kind are like.

    Raises:
        DataError: There are too few images, they do not fit, or they are unlike any photograph.
    """
    if not os.path.isdir(folder):
        raise DataError(
            f"{os.fspath(folder)} is not a folder; give a folder of unlabelled images, or omit them"
        )
    files = list_image_files(Path(folder))
    masks = set(find_masks(files, Path(folder)))
    paths = pick_evenly([path for path in files if path not in masks], MAX_UNLABELLED)
    if len(paths) < MIN_UNLABELLED:
        raise DataError(
            f"{os.fspath(folder)} has {format_count(len(paths), 'image')}, but {MIN_UNLABELLED} or "
            "more are needed; add images of the same place, or omit them"
        )

    def read(path: Path) -> Image:
        image = fit_bands(read_image(path), plan.channels, plan.pixels, str(path))
        return plan.working.prepare(image)

    found = [
        (measure_colours(each), _neighbour_correlation(each)) for each in in_parallel(read, paths)
    ]
    known = [
        (measure_colours(sample.image), _neighbour_correlation(sample.image))
        for sample in pick_evenly(train, MAX_UNLABELLED)
    ]
    way_out = "give images of the place where the model will work, or omit them"
    correlation, usual = (float(np.median([each for _, each in part])) for part in (found, known))
    if correlation < MIN_CORRELATION_SHARE * usual:
        raise DataError(
            f"the images in {os.fspath(folder)} are noise: the correlation of neighbouring pixels "
            f"is {correlation:.2f}, compared with {usual:.2f} in the training images; {way_out}"
        )
    flat, usually_flat = (
        np.mean([_is_flat(colours) for colours, _ in part]) for part in (found, known)
    )
    if flat > 0.5 > usually_flat:
        raise DataError(
            f"most images in {os.fspath(folder)} are blank: at least half of their pixels have the "
            f"same value; {way_out}"
        )
    return np.stack([colours for colours, _ in found])


def _neighbour_correlation(image: Image) -> float:
    """Return the correlation of neighbouring pixels, the mean of all bands; 1 for a flat image."""
    pixels = image.astype(np.float64)
    variance = pixels.var((0, 1))
    steps = [(np.diff(pixels, axis=axis) ** 2).mean((0, 1)) for axis in (0, 1)]
    varies = variance > 0
    if not varies.any():
        return 1.0
    correlation = 1 - np.mean(steps, 0)[varies] / (2 * variance[varies])
    return float(correlation.mean())


def _is_flat(colours: NDArray[np.float32]) -> bool:
    """Whether half of an image's pixels have one value in each band."""
    half = NUM_QUANTILES // 2
    return bool((colours[:, half:] == colours[:, :-half]).any(1).all())


class Unlabelled:
    """The images without masks of a run: when their colours are compared, and what follows.

    Args:
        colours: Their colours ``(P, C, NUM_QUANTILES)``.
        from_step: The first step whose crops take them; None if that is not decided, or never.
        scored: Some held-out images.
    """

    def __init__(
        self,
        colours: NDArray[np.float32],
        from_step: int | None,
        scored: Sequence[CachedSample],
    ) -> None:
        self.colours, self.from_step, self.scored = colours, from_step, scored
        # How long the comparison after the last step will take.
        self.comparison_seconds = 0.0

    def is_matched(self, number: int) -> bool:
        """Return whether crops of batch ``number`` (from 0) take the colours."""
        return self.from_step is not None and number >= self.from_step - 1

    def is_due(self, step: int, schedule: Schedule) -> bool:
        """Return whether to compare after this step: once; and at the end, if they are learned."""
        if self.from_step is not None:
            return step == schedule.steps and bool(self.scored)
        place = max(COMPARED_AT, schedule.coarse) * schedule.planned_steps
        is_reached = schedule.position(step - 1) < place <= schedule.position(step)
        return is_reached and step < schedule.steps

    def compare(self, trainer: Trainer, row: LogRow, schedule: Schedule) -> str:
        """Score the model in both colours; if they matter, crops take them from now on.

        Args:
            trainer: What is trained.
            row: The row of this step in the log; it receives the scores.
            schedule: Of the run.

        Returns:
            What was found, in a sentence.
        """
        began, step = time.perf_counter(), row["step"]
        found = compare_colours(trainer, self.scored, self.colours)
        is_last = step == schedule.steps
        row["unlabelled"] = {**asdict(found), "learned": is_last or found.matters}
        if is_last:
            return str(found)
        if not found.matters:
            return (
                f"{found}: these colours hardly reduce the score, so the run continues without "
                "recoloured crops"
            )
        self.comparison_seconds = time.perf_counter() - began
        # The batch of the next step has been cut.
        self.from_step = step + 2
        return f"{found}: from now on, half of the crops are recoloured"


def compare_colours(
    trainer: Trainer, samples: Sequence[CachedSample], colours: NDArray[np.float32]
) -> ColourComparison:
    """Score a model on samples in their own colours and in others ``(P, C, NUM_QUANTILES)``."""
    ious = []
    for change in (lambda sample, new: sample, _match):
        counts = [
            validate(trainer, [change(sample, colours[k % len(colours)])]).counts
            for k, sample in enumerate(samples)
        ]
        ious.append(float(mean_present(class_ious(tally(np.sum(counts, axis=0))))))
    return ColourComparison(*ious)


def _match(sample: CachedSample, colours: NDArray[np.float32]) -> CachedSample:
    image = torch.from_numpy(sample.image.astype(np.float32))
    matched = match_colours(image, measure_colours(sample.image), colours)
    return replace(sample, image=matched.numpy())


def prepare_unlabelled(trainer: Trainer, plan: Plan) -> Unlabelled | None:
    """Read the images without masks of a run; None if it has none.

    Raises:
        SettingsError: Augmentation is turned off.
        DataError: No image is held out, or the images cannot be used.
    """
    settings = trainer.settings
    folder, from_step = settings.data.unlabelled, settings.train.unlabelled_from
    if folder is None:
        return None
    if not settings.train.augment:
        raise SettingsError(
            "unlabelled images are only used to recolour crops, but train.augment = false disables "
            "this; omit one of the two settings"
        )
    if not trainer.val and from_step is None:
        raise DataError(
            "useg needs held-out images to measure whether unlabelled images help; hold some "
            "images out (data.holdout), or omit the unlabelled images"
        )
    colours = read_colours(folder, plan, trainer.batches.samples)
    trainer.batches = replace(trainer.batches, colours=colours)
    trainer.identity += (
        f"\n{len(colours)} images without masks, {zlib.crc32(colours.tobytes()):08x}"
    )
    return Unlabelled(colours, from_step, pick_evenly(trainer.val, MAX_SCORED))
