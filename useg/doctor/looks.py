"""Find images in which the classes look different: negatives, or red and blue exchanged.

A thumbnail's cells are counted by class, by band of rows and by level: brightness for negatives,
tint for red and blue. Images whose cells are more likely after a change of the levels were probably
changed that way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import pick_evenly
from useg.doctor.balance import sum_class_pixels
from useg.doctor.measure import (
    THUMBNAIL_SHAPE,
    TINT_LIMITS,
    Finding,
    MeasuredDataset,
    Measurement,
)
from useg.errors import format_count

# With fewer images, it is not known how classes usually look; more are not compared, and no more
# classes than these. Each is compared in so many bands of rows of the image. A cell's brightness
# has so many levels.
_MIN_IMAGES_OF_LOOKS, _MIN_IMAGES_OF_GROUP = 12, 3
_MAX_IMAGES_OF_LOOKS, _MAX_CLASSES_OF_LOOKS = 2000, 16
_NUM_BANDS, _NUM_TONES = 6, 8
# Classes count in a band if the other images have so many cells of them there. The log-likelihood
# that a cell gains or loses is at most this.
_MIN_COMPARED_CELLS, _MAX_GAIN_OF_CELL = 24, 3.0
_MAX_ROUNDS_OF_LOOKS = 10
# A negative gains at least so much a cell, and this share of what the others would lose. No more
# than a part of the images may lose less than a quarter of that.
_MIN_GAIN_OF_NEGATIVE, _MIN_GAIN_SHARE = 0.35, 0.7
_UNCLEAR_GAIN_SHARE, _MAX_UNCLEAR_IMAGES = 0.25, 0.25
# The images of a folder have red and blue exchanged if so many of them, and hardly any others, gain
# by an exchange, and on average half as much as the others would lose.
_MIN_GAIN_OF_EXCHANGE, _MIN_EXCHANGE_SHARE = 0.25, 0.5
_MIN_GAINING_IMAGES, _MAX_GAINING_OTHERS = 0.65, 0.2


def find_negative_images(data: MeasuredDataset) -> tuple[Measurement, ...]:
    """Return the images in which classes are dark that are bright in the others."""
    images = pick_evenly(data.complete, _MAX_IMAGES_OF_LOOKS)
    if len(images) < _MIN_IMAGES_OF_LOOKS:
        return ()
    levels = []
    for each in images:
        assert each.image is not None
        grey = each.image.thumbnail.astype(np.float64)
        deviations = (grey - grey.mean()) / max(float(grey.std()), 1e-6)
        # From two standard deviations below the mean to two above it.
        levels.append(np.clip((deviations + 2) * (_NUM_TONES / 4), 0, _NUM_TONES - 1))
    counts = _count_looks(data, images, levels, _NUM_TONES)
    is_negative = np.zeros(len(images), bool)
    for _ in range(_MAX_ROUNDS_OF_LOOKS):
        looks = np.where(is_negative[:, None, None], counts[..., ::-1], counts)
        gains = _gain_by_change(looks, looks.sum(0) - looks, np.arange(_NUM_TONES)[::-1])
        if not (gains > 0).any():
            break
        is_negative ^= gains > 0
    if 2 * is_negative.sum() > len(images):
        is_negative = ~is_negative
    usual = float(np.median(-gains))
    is_unclear = -gains < _UNCLEAR_GAIN_SHARE * usual
    if usual < _MIN_GAIN_OF_NEGATIVE or is_unclear.mean() > _MAX_UNCLEAR_IMAGES:
        return ()
    is_clear = is_negative & (-gains >= max(_MIN_GAIN_SHARE * usual, _MIN_GAIN_OF_NEGATIVE))
    looks = np.where(is_negative[:, None, None], counts[..., ::-1], counts)
    total = looks.sum(0)
    return tuple(
        images[k]
        for k in np.flatnonzero(is_clear)
        if not _may_be_exchanged_classes(counts[k], total - looks[k])
    )


def _may_be_exchanged_classes(own: NDArray[np.float32], others: NDArray[np.float32]) -> bool:
    """Whether two exchanged classes explain the looks of an image at least as well as a negative.

    Args:
        own, others: the cells of the image and of the others, from :func:`_count_looks`.
    """
    log_shares = np.log((others + 0.5) / (others.sum(1, keepdims=True) + 0.5 * _NUM_TONES))
    by_negative = float((own * (log_shares[:, ::-1] - log_shares)).sum())
    own, log_shares = (part.reshape(-1, _NUM_BANDS * _NUM_TONES) for part in (own, log_shares))
    likelihood = own @ log_shares.T
    same = np.diagonal(likelihood)
    by_exchange = likelihood + likelihood.T - same - same[:, None]
    return float(by_exchange.max()) >= by_negative


def check_negative_images(data: MeasuredDataset) -> Iterator[Finding]:
    """Find images that are negatives of the others."""
    negatives = data.once(find_negative_images)
    if not negatives:
        return
    files = tuple(each.pair.image for each in negatives)
    pairs = {each.pair for each in negatives}
    beside = next(each.pair.image for each in data.complete if each.pair not in pairs)
    what = "looks like a negative" if len(files) == 1 else "look like negatives"
    yield Finding(
        "negative images",
        "warning",
        files,
        f"{len(files)} of {format_count(len(data.complete), 'image')} {what} of the others: "
        f"classes that are bright in '{data.name(beside)}' are dark in '{data.name(files[0])}', "
        "and the other way round",
        "if that is a mistake, invert them; if new images will be of both kinds, keep both in "
        "training",
        evidence={"beside": beside},
    )


def check_exchanged_image_colors(data: MeasuredDataset) -> Iterator[Finding]:
    """Find folders or splits whose images have red and blue exchanged, unlike the others."""
    colored = [
        each for each in data.complete if each.image is not None and each.image.tints is not None
    ]
    images = pick_evenly(colored, _MAX_IMAGES_OF_LOOKS)
    if len(images) < _MIN_IMAGES_OF_LOOKS:
        return
    num_levels = len(TINT_LIMITS) + 1
    order = np.arange(num_levels**2).reshape(num_levels, num_levels).T.ravel()
    tints = [each.image.tints for each in images if each.image is not None]
    counts = _count_looks(data, images, tints, num_levels**2)
    folders = [each.pair.image.parent for each in images]
    splits = [each.pair.split for each in images]
    groups = [[own == one for own in folders] for one in dict.fromkeys(folders)]
    groups += [[own == one for own in splits] for one in ("val", "test")]
    for group in map(np.array, groups):
        others = counts[~group]
        if group.sum() < _MIN_IMAGES_OF_GROUP or 2 * group.sum() > len(images):
            continue
        total = others.sum(0)
        gains = _gain_by_change(counts[group], total[None], order)
        losses = -_gain_by_change(others, total - others, order)
        usual = float(np.median(losses))
        if (
            usual >= _MIN_GAIN_OF_EXCHANGE
            and float(np.median(gains)) >= _MIN_EXCHANGE_SHARE * usual
            and float((gains > 0).mean()) >= _MIN_GAINING_IMAGES
            and float((losses < 0).mean()) <= _MAX_GAINING_OTHERS
        ):
            files = tuple(images[k].pair.image for k in np.flatnonzero(group))
            beside = images[int(np.flatnonzero(~group)[0])].pair.image
            yield Finding(
                "red and blue of images exchanged",
                "warning",
                files,
                f"{format_count(len(files), 'image')}, such as '{data.name(files[0])}', seem to "
                "have red and blue exchanged: once exchanged back, their classes have the same "
                f"colours as in the other images, such as '{data.name(beside)}'",
                "view them; if the colours are wrong, save them in the order red, green, blue "
                "(OpenCV writes and expects blue, green, red)",
                evidence={"beside": beside},
            )
            return


def _count_looks(
    data: MeasuredDataset,
    images: Sequence[Measurement],
    levels: Sequence[NDArray[Any] | None],
    num_levels: int,
) -> NDArray[np.float32]:
    """Count the cells of each class in each band of rows, by level.

    Returns:
        Numbers of cells ``(N, classes * bands, levels)``.
    """
    pixels = sum_class_pixels(data, images)[: len(data.dataset.classes)]
    compared = np.argsort(-pixels, kind="stable")[:_MAX_CLASSES_OF_LOOKS]
    rows, columns = THUMBNAIL_SHAPE
    bands = np.repeat(np.arange(rows) * _NUM_BANDS // rows, columns).reshape(THUMBNAIL_SHAPE)
    counts = np.zeros((len(images), len(compared) * _NUM_BANDS, num_levels), np.float32)
    # One row more, for pixels that do not count.
    places_of_ids = np.full(257, -1)
    places_of_ids[compared] = np.arange(len(compared))
    for k, (each, level) in enumerate(zip(images, levels, strict=True)):
        assert each.mask is not None
        assert level is not None
        classes = places_of_ids[data.ids(each.mask.code_grid)]
        known = classes >= 0
        places = ((classes * _NUM_BANDS + bands) * num_levels + level.astype(np.intp))[known]
        counts[k] = np.bincount(places, minlength=counts[k].size).reshape(counts[k].shape)
    return counts


def _gain_by_change(
    own: NDArray[np.float32], others: NDArray[np.float32], order: NDArray[np.intp]
) -> NDArray[np.float32]:
    """Return the log-likelihood ``(N,)`` that a cell of each image gains on average by a change.

    Args:
        own: the cells of each image, from :func:`_count_looks`.
        others: those of the images that it is compared with.
        order: the level that each level becomes.
    """
    total = others.sum(2, keepdims=True)
    log_shares = np.log((others + 0.5) / (total + 0.5 * others.shape[2]))
    gain = np.clip(log_shares[..., order] - log_shares, -_MAX_GAIN_OF_CELL, _MAX_GAIN_OF_CELL)
    counted = own * (total >= _MIN_COMPARED_CELLS)
    means: NDArray[np.float32] = (counted * gain).sum((1, 2)) / counted.sum((1, 2)).clip(1)
    return means
