"""Find images whose classes look different, and masks that lack a class that the image shows.

A thumbnail's cells are counted by class, by band of rows and by level: brightness for negatives,
tint for red and blue. Images whose cells are more likely after a change of the levels were probably
changed that way: they are negatives, or have red and blue exchanged. A class was probably not drawn
in images without it, if their cells look as often like it as those of the others.
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
from useg.files import natural_key

# With fewer images, in all or in a folder or split, the usual appearance of the classes is unknown.
_MIN_IMAGES_OF_APPEARANCE, _MIN_IMAGES_OF_GROUP = 12, 3
# At most this many images and classes are compared.
_MAX_IMAGES_OF_APPEARANCE, _MAX_CLASSES_OF_APPEARANCE = 2000, 16
# Each class is compared in this many bands of rows, and at this many levels of brightness.
_NUM_BANDS, _NUM_TONES = 6, 8
# A class is compared in a band if the other images have at least this many of its cells there.
_MIN_COMPARED_CELLS = 24
# A cell gains or loses at most this much log-likelihood.
_MAX_GAIN_OF_CELL = 3.0
_MAX_ROUNDS_OF_APPEARANCE = 10

# A negative gains at least this much log-likelihood per cell, and at least this share of the median
# loss of the images that are not negatives.
_MIN_GAIN_OF_NEGATIVE, _MIN_GAIN_SHARE = 0.35, 0.7
# An image that loses less than this share of the median is unclear. If more than this share of all
# images is unclear, none is reported.
_UNCLEAR_GAIN_SHARE, _MAX_UNCLEAR_IMAGES = 0.25, 0.25

# The images of a folder or split have red and blue exchanged if the others would lose at least this
# much log-likelihood per cell by an exchange, if the images gain this share of it, ...
_MIN_GAIN_OF_EXCHANGE, _MIN_EXCHANGE_SHARE = 0.25, 0.5
# ... if at least this share of the images gains, and at most this share of the others.
_MIN_GAINING_IMAGES, _MAX_GAINING_OTHERS = 0.65, 0.2

# A class may be undrawn in a series of images (the first, the last, or those of a folder) if it is
# missing in all of them, which are at least this many and this share of all images, ...
_MIN_IMAGES_WITHOUT, _MIN_SHARE_WITHOUT = 5, 0.15
# ... and if at least this many others, and this share of the others, have it, in this many cells.
_MIN_IMAGES_WITH, _MIN_SHARE_WITH, _MIN_CELLS_OF_CLASS = 5, 0.5, 60
# The series alone is worth a note if it has this share of all images, and this share of the others
# has the class.
_MIN_STRIKING_SHARE, _MIN_STRIKING_SHARE_WITH = 0.25, 0.8
# The appearance of a cell is its tint, its brightness in this many levels, and its band of rows,
# one of this many.
_NUM_GREYS, _NUM_THIRDS = 8, 3
# A class is recognised by appearance if this share of its cells is.
_MIN_RECOGNISED = 0.3
# The series shows an undrawn class if it shows this share of what the others have, with this
# t-statistic.
_MIN_SHOWN, _MIN_T_OF_SHOWN = 0.5, 5.0


def find_negative_images(data: MeasuredDataset) -> tuple[Measurement, ...]:
    """Return the images in which classes are dark that are bright in the others."""
    images = pick_evenly(data.complete, _MAX_IMAGES_OF_APPEARANCE)
    if len(images) < _MIN_IMAGES_OF_APPEARANCE:
        return ()
    levels = []
    for each in images:
        assert each.image is not None
        grey = each.image.thumbnail.astype(np.float64)
        deviations = (grey - grey.mean()) / max(float(grey.std()), 1e-6)
        # From two standard deviations below the mean to two above it.
        levels.append(np.clip((deviations + 2) * (_NUM_TONES / 4), 0, _NUM_TONES - 1))
    counts = _count_tones(data, images, levels, _NUM_TONES)
    is_negative = np.zeros(len(images), bool)
    for _ in range(_MAX_ROUNDS_OF_APPEARANCE):
        turned = np.where(is_negative[:, None, None], counts[..., ::-1], counts)
        gains = _gain_by_change(turned, turned.sum(0) - turned, np.arange(_NUM_TONES)[::-1])
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
    turned = np.where(is_negative[:, None, None], counts[..., ::-1], counts)
    total = turned.sum(0)
    return tuple(
        images[k]
        for k in np.flatnonzero(is_clear)
        if not _may_be_exchanged_classes(counts[k], total - turned[k])
    )


def _may_be_exchanged_classes(own: NDArray[np.float32], others: NDArray[np.float32]) -> bool:
    """Whether two exchanged classes explain an image at least as well as a negative.

    Args:
        own, others: the cells of the image and of the others, from :func:`_count_tones`.
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
        "and vice versa",
        "if that is a mistake, invert them; if there will be new images of both kinds, train on "
        "both",
        evidence={"beside": beside},
    )


def check_exchanged_image_colors(data: MeasuredDataset) -> Iterator[Finding]:
    """Find folders or splits whose images have red and blue exchanged, unlike the others."""
    colored = [
        each for each in data.complete if each.image is not None and each.image.tints is not None
    ]
    images = pick_evenly(colored, _MAX_IMAGES_OF_APPEARANCE)
    if len(images) < _MIN_IMAGES_OF_APPEARANCE:
        return
    num_levels = len(TINT_LIMITS) + 1
    order = np.arange(num_levels**2).reshape(num_levels, num_levels).T.ravel()
    tints = [each.image.tints for each in images if each.image is not None]
    counts = _count_tones(data, images, tints, num_levels**2)
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
                "look at them; if the colours are wrong, save them in the order red, green, blue "
                "(OpenCV writes and expects blue, green, red)",
                evidence={"beside": beside},
            )
            return


def _count_tones(
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
    compared = np.argsort(-pixels, kind="stable")[:_MAX_CLASSES_OF_APPEARANCE]
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
        own: the cells of each image, from :func:`_count_tones`.
        others: those of the images that it is compared with.
        order: the level that each level becomes.
    """
    total = others.sum(2, keepdims=True)
    log_shares = np.log((others + 0.5) / (total + 0.5 * others.shape[2]))
    gain = np.clip(log_shares[..., order] - log_shares, -_MAX_GAIN_OF_CELL, _MAX_GAIN_OF_CELL)
    counted = own * (total >= _MIN_COMPARED_CELLS)
    means: NDArray[np.float32] = (counted * gain).sum((1, 2)) / counted.sum((1, 2)).clip(1)
    return means


def check_undrawn_classes(data: MeasuredDataset) -> Iterator[Finding]:
    """Find classes that a series of images lacks, although the images seem to show them."""
    images = pick_evenly(data.complete, _MAX_IMAGES_OF_APPEARANCE)
    if len(images) < _MIN_IMAGES_WITHOUT + _MIN_IMAGES_WITH or len(data.dataset.classes) < 2:
        return
    images = sorted(images, key=lambda each: natural_key(each.pair.image.name))
    pixels = np.array([data.counts[each.pair] for each in images])[:, : len(data.dataset.classes)]
    usual = int(pixels.sum(0).argmax())
    cells = None
    for k in np.flatnonzero(pixels.any(0)).tolist():
        has_class = pixels[:, k] > 0
        for lacks in _find_series_without(images, has_class) if k != usual else ():
            cells = _describe_cells(data, images) if cells is None else cells
            instead = _find_undrawn(*cells, k, lacks)
            is_striking = (
                lacks.mean() >= _MIN_STRIKING_SHARE
                and has_class[~lacks].mean() >= _MIN_STRIKING_SHARE_WITH
            )
            if instead is not None or is_striking:
                yield _undrawn_class(data, images, k, (has_class, lacks), instead)
                break


def _undrawn_class(
    data: MeasuredDataset,
    images: Sequence[Measurement],
    k: int,
    series: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    instead: int | None,
) -> Finding:
    has_class, lacks = series
    names = data.dataset.classes.names
    files = tuple(images[n].pair.image for n in np.flatnonzero(lacks).tolist())
    beside = images[int(has_class.argmax())].pair.image
    message = (
        f"{names[k]} is in {int(has_class.sum())} of {int((~lacks).sum())} images, such as "
        f"'{data.name(beside)}', but in none of {len(files)} others, such as "
        f"'{data.name(files[0])}'"
    )
    remedy = (
        f"look at them: if {names[k]} was not labelled in them, label it, or leave them out: give "
        "them the split gap in a split.csv"
    )
    if instead is None:
        return Finding(
            "class in a part of the images",
            "note",
            files,
            message,
            f"{remedy}; otherwise ignore this note",
        )
    return Finding(
        "class not drawn everywhere",
        "warning",
        files,
        f"{message}; judging by brightness, colour and height, these show just as much of it, but "
        f"their masks call it {names[instead]}",
        remedy,
        evidence={"beside": beside},
    )


def _find_series_without(
    images: Sequence[Measurement], has_class: NDArray[np.bool_]
) -> Iterator[NDArray[np.bool_]]:
    """Yield the images at the beginning, at the end, and in a folder that all lack a class."""
    number = len(images)
    least = max(_MIN_IMAGES_WITHOUT, _MIN_SHARE_WITHOUT * number)
    first, last = int(has_class.argmax()), number - int(has_class[::-1].argmax())
    series = [np.arange(number) < first, np.arange(number) >= last]
    folders = [each.pair.image.parent for each in images]
    series += [np.array([own == one for own in folders]) for one in dict.fromkeys(folders)]
    for lacks in series:
        others = has_class[~lacks]
        if (
            lacks.sum() >= least
            and not has_class[lacks].any()
            and others.sum() >= max(_MIN_IMAGES_WITH, _MIN_SHARE_WITH * len(others))
        ):
            yield lacks


def _describe_cells(
    data: MeasuredDataset, images: Sequence[Measurement]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the class of each cell, or -1, and the number of its appearance ``(N, cells)``."""
    num_classes, num_tints = len(data.dataset.classes), (len(TINT_LIMITS) + 1) ** 2
    rows, columns = THUMBNAIL_SHAPE
    thirds = np.repeat(np.arange(rows) * _NUM_THIRDS // rows, columns).reshape(THUMBNAIL_SHAPE)
    greys = np.array([each.image.thumbnail for each in images if each.image is not None])
    limits = np.quantile(greys, np.arange(1, _NUM_GREYS) / _NUM_GREYS)
    levels = np.searchsorted(limits, greys)
    classes = np.full((len(images), rows * columns), -1)
    appearance = np.zeros((len(images), rows * columns), np.int64)
    for n, each in enumerate(images):
        assert each.image is not None
        assert each.mask is not None
        ids = data.ids(each.mask.code_grid).ravel()
        classes[n] = np.where(ids < num_classes, ids, -1)
        tints = 0 if each.image.tints is None else each.image.tints.astype(np.int64)
        appearance[n] = ((thirds * _NUM_GREYS + levels[n]) * num_tints + tints).ravel()
    return classes, appearance


def _find_undrawn(
    classes: NDArray[np.int64], appearance: NDArray[np.int64], k: int, lacks: NDArray[np.bool_]
) -> int | None:
    """Return which class cells have instead of ``k`` in images that lack it; None if none do.

    The others are divided into halves: one shows how the class appears, and the other
    how many of its cells are recognised by that, and how many other cells are mistaken for it.
    """
    others = np.flatnonzero(~lacks)
    num_of_class = (classes[others] == k).sum()
    if num_of_class < _MIN_CELLS_OF_CLASS:
        return None
    num_appearances = int(appearance.max()) + 1
    recognised, mistaken = 0.0, np.zeros(len(classes))
    shown = np.zeros(classes.shape)
    for half in (0, 1):
        known, tested = others[half::2], others[1 - half :: 2]
        is_known = classes[known] >= 0
        total = np.bincount(appearance[known][is_known], minlength=num_appearances)
        of_class = np.bincount(appearance[known][classes[known] == k], minlength=num_appearances)
        share = (of_class / (total + 2.0))[appearance]
        recognised += float(share[tested][classes[tested] == k].sum())
        is_other = (classes >= 0) & (classes != k)
        mistaken[tested] = (share * is_other)[tested].sum(1)
        shown += share * is_other / 2
    if recognised < _MIN_RECOGNISED * num_of_class:
        return None
    excess = shown[lacks].sum(1) - mistaken[others].mean()
    error = np.hypot(
        excess.std(ddof=1) / len(excess) ** 0.5, mistaken[others].std(ddof=1) / len(others) ** 0.5
    )
    usual = recognised / len(others)
    if excess.mean() < max(_MIN_SHOWN * usual, _MIN_T_OF_SHOWN * max(float(error), 1e-6)):
        return None
    weights = np.bincount(classes[lacks].clip(0).ravel(), shown[lacks].ravel())
    return int(weights.argmax())
