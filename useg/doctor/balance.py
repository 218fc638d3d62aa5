"""Check how the classes are distributed over the images and the splits, and how they look there.

A score says little of a class that is rare, that a split lacks, whose share differs between the
splits, or whose pixels are in the same region of every image. Some images may show all classes as
negatives, or with red and blue exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.data.dataset import pick_evenly
from useg.doctor.measure import (
    THUMBNAIL_SHAPE,
    TINT_LIMITS,
    Finding,
    MeasuredDataset,
    Measurement,
)
from useg.errors import format_count, join_names

# A class with a smaller share of the counted pixels is rare.
MAX_RARE_SHARE = 0.005

# With fewer images per split, a difference is not significant.
_MIN_IMAGES_PER_SPLIT = 5

# With fewer masks, it is not known that most have several classes.
_MIN_MASKS = 8

# With fewer images, a region may be constant by chance.
_MIN_IMAGES_OF_CONSTANT_REGION = 20

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


def sum_class_pixels(
    data: MeasuredDataset, measurements: Sequence[Measurement]
) -> NDArray[np.int64]:
    """Return the pixels ``(256,)`` of each class id in these pairs."""
    total = np.zeros(256, np.int64)
    for each in measurements:
        total += data.counts[each.pair]
    return total


def check_class_pixels(data: MeasuredDataset) -> Iterator[Finding]:
    """Find classes without pixels, rare classes, and classes that one split lacks."""
    names = data.dataset.classes.names
    total = sum_class_pixels(data, data.complete)
    pixels = total[: len(names)]
    if not pixels.sum():
        if total[IGNORE] and total.sum() == total[IGNORE]:
            yield Finding(
                "all ignored",
                "error",
                (),
                "every pixel of every mask is ignored, so there is nothing to learn",
                "check which values the masks have and what they mean; list those of the classes, "
                "and those that have no label as ignore, in classes.toml",
            )
        return
    if np.count_nonzero(pixels) == 1:
        yield Finding(
            "one class everywhere",
            "error",
            (),
            f"every pixel of every mask is {names[int(pixels.argmax())]}, so there is nothing to "
            "learn",
            "check which folder has the masks and what they store; name them in a dataset.toml or "
            "list their values in classes.toml",
        )
        return
    shares = pixels / pixels.sum()
    absent = [name for name, share in zip(names, shares, strict=True) if not share]
    if absent:
        yield Finding(
            "class without pixels",
            "warning",
            (),
            f"no pixel belongs to {join_names(absent)}",
            "add images that show it, or remove it from classes.toml",
        )
    rare = [
        f"{name} ({100 * share:.2f} %)"
        for name, share in zip(names, shares, strict=True)
        if 0 < share < MAX_RARE_SHARE
    ]
    if rare:
        yield Finding(
            "rare class",
            "warning",
            (),
            f"rare classes (below {100 * MAX_RARE_SHARE:.1f} % of the pixels): {join_names(rare)}",
            "expect low scores for them; add images that show them, and read the scores per class",
        )
    yield from _missing_classes(data)


def _missing_classes(data: MeasuredDataset) -> Iterator[Finding]:
    names = data.dataset.classes.names
    train, val = (
        sum_class_pixels(data, [each for each in data.complete if each.pair.split == split])
        for split in ("train", "val")
    )
    train, val = train[: len(names)], val[: len(names)]
    if not (train.sum() and val.sum()):
        return
    if missing := [names[k] for k in np.flatnonzero((train > 0) & (val == 0))]:
        yield Finding(
            "class missing from validation",
            "warning",
            (),
            f"the split val has no pixel of {join_names(missing)}, so there is no score for "
            f"{'it' if len(missing) == 1 else 'them'}",
            "hold out other images with a split.csv",
        )
    if missing := [names[k] for k in np.flatnonzero((val > 0) & (train == 0))]:
        yield Finding(
            "class missing from training",
            "warning",
            (),
            f"the split train has no pixel of {join_names(missing)}",
            "the model cannot learn them; move images that show them to train with a split.csv",
        )


def check_split_shares(data: MeasuredDataset) -> Iterator[Finding]:
    """Find classes whose share differs strongly between training and validation images."""
    names = data.dataset.classes.names
    shares = {}
    for split in ("train", "val"):
        pixels = [
            data.counts[each.pair][: len(names)]
            for each in data.complete
            if each.pair.split == split
        ]
        if len(pixels) < _MIN_IMAGES_PER_SPLIT:
            return
        shares[split] = np.array(pixels) / np.maximum(np.sum(pixels, axis=1, keepdims=True), 1)
    train, val = shares["train"].mean(0), shares["val"].mean(0)
    # Welch's t-test, as if neighbouring images were independent.
    error = np.sqrt(sum(part.var(0, ddof=1) / len(part) for part in shares.values()))
    low, high = np.minimum(train, val), np.maximum(train, val)
    is_significant = high - low > 6 * np.maximum(error, 1e-6)
    found = np.flatnonzero(is_significant & (high > 2 * low) & (high > 0.03))
    if len(found):
        described = [
            f"{names[k]} ({100 * train[k]:.1f} % of train, {100 * val[k]:.1f} % of val)"
            for k in found
        ]
        yield Finding(
            "splits differ",
            "warning",
            (),
            f"the splits differ in {join_names(described)}",
            "scores on such a split say little about other images; hold out blocks of several "
            "places, or report the difference with the score",
        )


def check_single_class_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a few masks with one class only while the others have several."""
    single = [
        (each.pair, int(data.ids(each.mask.codes)[0]))
        for each in data.complete
        if each.mask is not None and len(each.mask.codes) == 1
    ]
    if len(data.complete) < _MIN_MASKS or len(single) > max(1, len(data.complete) // 10):
        return
    for pair, k in single:
        if k == IGNORE:
            content = "is ignored everywhere"
        elif k >= 0:
            content = f"is {data.dataset.classes.names[k]} everywhere"
        else:
            content = "has one value everywhere"
        yield Finding(
            "mask of one class",
            "warning",
            (pair.mask,),
            f"mask '{data.name(pair.mask)}' {content}, while the others have several classes",
            "check whether its labels were lost",
        )


def check_constant_region(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a class with a fixed region in nearly every image, and hardly any pixels elsewhere.

    Examples are the hood of a camera car, a frame or a stamp.
    """
    grids = [data.ids(each.mask.code_grid) for each in data.complete if each.mask is not None]
    if len(grids) < _MIN_IMAGES_OF_CONSTANT_REGION:
        return
    for k, name in enumerate(data.dataset.classes.names):
        occurrences = np.zeros(THUMBNAIL_SHAPE, np.int64)
        for grid in grids:
            occurrences += grid == k
        region = occurrences >= 0.95 * len(grids)
        share = float(occurrences[region].sum() / max(1, occurrences.sum()))
        size = float(region.mean())
        at_border = region[0].any() or region[-1].any() or region[:, 0].any() or region[:, -1].any()
        if share >= 0.8 and 0.005 <= size <= 0.4 and at_border:
            yield Finding(
                "constant region",
                "warning",
                (),
                f"{100 * share:.0f} % of all {name} pixels are in one region that is the same in "
                f"nearly every image ({describe_region(region)}, {100 * size:.0f} % of the image), "
                "such as a camera car's hood, a frame or a stamp",
                f"the score of {name} says little about other {name}: exclude the region with "
                "useg evaluate --ignore-mask, or store an ignored value there",
                evidence={"region": region, "class": k},
            )


def describe_region(region: NDArray[np.bool_]) -> str:
    """Describe the position of a region of the thumbnail grid, such as ``"at the bottom"``."""
    num_rows, num_columns = THUMBNAIL_SHAPE
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    words = []
    if rows[0] >= num_rows / 2:
        words.append("bottom")
    elif rows[-1] < num_rows / 2:
        words.append("top")
    if columns[0] >= num_columns / 2:
        words.append("right")
    elif columns[-1] < num_columns / 2:
        words.append("left")
    return f"at the {' '.join(words)}" if words else "all over it"


def find_negative_images(data: MeasuredDataset) -> tuple[Measurement, ...]:
    """Return the images whose classes are dark where those of the others are bright."""
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
        f"in '{data.name(files[0])}', classes are dark that are bright in '{data.name(beside)}', "
        "and bright that are dark there",
        "invert them if that is a mistake; if both kinds are meant, both belong in training",
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
                "have red and blue exchanged: that way their classes have the colours that they "
                f"have in the others, such as '{data.name(beside)}'",
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
