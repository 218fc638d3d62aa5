"""Find masks whose classes are exchanged: foreground and background, red and blue, or others.

Such a mask has no unknown value. It differs from the other masks in where its classes are and how
bright they are. So do masks whose classes were renumbered, each mask on its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.doctor.appearance import find_negative_images
from useg.doctor.measure import (
    THUMBNAIL_SHAPE,
    Finding,
    MeasuredDataset,
    Measurement,
    Repair,
)
from useg.errors import format_count, join_names

# What masks differ in at least: share of foreground, of that at the border, and brightness.
_MIN_DEVIATIONS = (0.08, 0.12, 0.35)
# Standard deviations by which a swapped mask must be more similar to the others.
_MIN_SWAP_EVIDENCE = 4
_MAX_ROUNDS = 5

# With fewer masks, typical values are not known.
_MIN_MASKS = 8

# Two classes look exchanged in a mask if the exchange makes its pixels more likely, given where the
# classes are in the other masks and how bright. A place is one of this many bands of rows and one
# of this many levels of brightness.
_NUM_ROWS, _NUM_LEVELS = 6, 8
# A cell of the thumbnail gains or loses at most this much log-likelihood.
_MAX_CELL_GAIN = 3
_MIN_PROBABILITY = 1e-4
# Least gain of an exchanged mask: of all its cells together, and of a cell on average.
_MIN_GAIN, _MIN_MEAN_GAIN = 100, 0.5
# Least number of cells in which each of the two classes gains. Without a fault, no mask of seven
# public data sets had as many in 6,900 trials. Exchanged red and blue are common, so for them the
# cells of both together count.
_MIN_CELLS = 16
# The exchanged masks are those of a folder or split if at most this share, of the masks with these
# classes, is exchanged outside of it or not exchanged inside.
_MAX_OTHERS_IN_GROUP = 0.1
# In a folder or split, this share of the masks with enough cells of both classes must gain in both,
# if there are at least this many of them; otherwise all masks must.
_MIN_CLEAR_IN_GROUP, _MIN_JUDGED_IN_GROUP = 0.65, 3
# Pairs are made of the most frequent classes, at most this many, each in this share of the masks.
_MAX_COMPARED_CLASSES, _MIN_SHARE_OF_MASKS = 8, 0.25

RENUMBERED_KIND = "classes renumbered in each mask"
# Masks may be renumbered if at least this many lack a class.
_MIN_MASKS_WITH_FEWER = 4
# Data sets of more classes are not checked.
_MAX_RENUMBERED_CLASSES = 10
# It is likely if this share of them fits better with other classes, ...
_MIN_SHARE_RENUMBERED = 0.4
# ... compared with the masks that have all classes, of which there must be this many, ...
_MIN_COMPLETE_MASKS = 3
# ... and if the log-likelihood of each grows by this much.
_MIN_GAIN_OF_RENUMBERED = 20
# Otherwise it is worth a note if this many lack two classes: the last one alone may well be rare.
_MIN_MASKS_WITHOUT_TWO = 2


def check_inverted_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a few binary masks whose foreground and background are swapped."""
    binary = [each for each in data.complete if each.mask is not None and len(each.mask.codes) == 2]
    if len(data.dataset.classes) != 2 or len(binary) < _MIN_MASKS:
        return
    features = np.array([_foreground_features(data, each) for each in binary])
    swapped = np.array([1, 1, 0]) - features
    median = np.median(features, axis=0)
    deviation = 1.48 * np.median(np.abs(features - median), axis=0)
    deviation = np.maximum(deviation, _MIN_DEVIATIONS)
    own, other = (
        np.minimum(np.abs(part - median) / deviation, 6).sum(1) for part in (features, swapped)
    )
    found = np.flatnonzero(own - other > _MIN_SWAP_EVIDENCE)
    if len(found) > len(binary) // 3 or not len(found):
        yield from _masks_of_two_kinds(data, binary, features)
        return
    for k in found:
        pair = binary[k].pair
        description = "mask: foreground and background swapped back"
        yield Finding(
            "inverted mask",
            "error",
            (pair.mask,),
            f"mask '{data.name(pair.mask)}' has foreground and background swapped: "
            f"{100 * features[k, 0]:.0f} % of it is foreground, {100 * median[0]:.0f} % is usual",
            "swap its two values",
            (Repair(pair, description, transform=swap_foreground),),
        )


def _masks_of_two_kinds(
    data: MeasuredDataset, binary: Sequence[Measurement], features: NDArray[np.float64]
) -> Iterator[Finding]:
    """Report that many masks are like the others with foreground and background swapped."""
    swapped = np.array([1, 1, 0]) - features
    is_swapped = np.zeros(len(features), bool)
    median = features[0]
    for _ in range(_MAX_ROUNDS):
        own, other = (
            np.abs((part - median) / _MIN_DEVIATIONS).sum(1) for part in (features, swapped)
        )
        is_swapped = other < own
        median = np.median(np.where(is_swapped[:, None], swapped, features), axis=0)
    num_swapped = int(is_swapped.sum())
    if min(num_swapped, len(features) - num_swapped) < len(features) // 4:
        return
    # Objects are rarely at the image border.
    if features[is_swapped, 1].mean() < features[~is_swapped, 1].mean():
        is_swapped, num_swapped = ~is_swapped, len(features) - num_swapped
    alike = np.where(is_swapped[:, None], swapped, features)
    deviation = np.maximum(
        1.48 * np.median(np.abs(alike - np.median(alike, axis=0)), axis=0), _MIN_DEVIATIONS
    )
    near, far = (
        np.minimum(np.abs(part - np.median(alike, axis=0)) / deviation, 6).sum(1)
        for part in (alike, np.array([1, 1, 0]) - alike)
    )
    if float((far - near > _MIN_SWAP_EVIDENCE).mean()) < 0.9:
        return
    pairs = [each.pair for each, is_odd in zip(binary, is_swapped, strict=True) if is_odd]
    usual = next(each.pair for each, is_odd in zip(binary, is_swapped, strict=True) if not is_odd)
    yield Finding(
        "masks of two kinds",
        "error",
        tuple(pair.mask for pair in pairs),
        f"{num_swapped} of {len(features)} masks, such as '{data.name(pairs[0].mask)}', look like "
        f"the others, such as '{data.name(usual.mask)}', with foreground and background swapped",
        "swap the two values in the masks of one kind",
        tuple(
            Repair(pair, "mask: foreground and background swapped back", transform=swap_foreground)
            for pair in pairs
        ),
    )


def check_exchanged_classes(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a few masks in which two classes, or red and blue, are exchanged.

    Where red and blue are both classes, colours do not show that a mask stores them as blue, green,
    red. Nor do values if a mask was saved with another order of the classes.
    """
    table, masks = data.dataset.classes, data.complete
    if len(table) < 3 or len(masks) < _MIN_MASKS:
        return
    counts = _count_places(data, masks)
    places = [(each.pair.split, each.pair.mask.parent) for each in masks]
    groups = [
        np.array([own[k] == one for own in places])
        for k in (0, 1)
        for one in dict.fromkeys(own[k] for own in places)
    ]
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    exchanged = _exchange_colors(table)
    if exchanged:
        masks_of_colors = _find_exchanged(counts, exchanged, groups, by_color=True)
        found = dict.fromkeys(masks_of_colors, (np.inf, exchanged))
    frequent = np.argsort(-(counts.sum(2) > 0).mean(0), kind="stable")[:_MAX_COMPARED_CLASSES]
    common = [k for k in frequent if (counts[:, k].any(1)).mean() >= _MIN_SHARE_OF_MASKS]
    for one, other in itertools.combinations(common, 2):
        partner = {int(one): int(other), int(other): int(one)}
        order = tuple(partner.get(k, k) for k in range(len(table)))
        for k, gain in _find_exchanged(counts, order, groups, by_color=False).items():
            found[k] = max(found.get(k, (0.0, ())), (gain, order))
    negatives = {each.pair for each in data.once(find_negative_images)}
    for k, (_, best) in sorted(found.items()):
        # The classes of a negative are where they belong, but as bright as others.
        if masks[k].pair in negatives:
            continue
        yield _exchanged_classes(data, masks[k], best, by_color=best == exchanged)


def _exchanged_classes(
    data: MeasuredDataset, each: Measurement, order: tuple[int, ...], *, by_color: bool
) -> Finding:
    names, pair = data.dataset.classes.names, each.pair
    moved = [names[k] for k, other in enumerate(order) if k != other]
    ids = np.arange(256, dtype=np.uint8)
    ids[: len(order)] = order
    what = "red and blue" if by_color else join_names(moved)
    return Finding(
        "red and blue exchanged" if by_color else "classes exchanged",
        "error",
        (pair.mask,),
        f"mask '{data.name(pair.mask)}' seems to have {what} exchanged: judging by position and "
        f"brightness, it has {names[order[names.index(moved[0])]]} where the other masks have "
        f"{moved[0]}",
        "compare it with its image; if it is wrong, save it with the values of the other masks",
        (Repair(pair, f"mask: {what} exchanged back", transform=lambda label: ids[label]),),
    )


def _exchange_colors(table: ClassTable) -> tuple[int, ...]:
    """Return the class of each colour when red and blue are exchanged; () if nothing changes."""
    colors = table.colors
    if not table.by_color or any(color[::-1] not in colors for color in colors):
        return ()
    order = tuple(colors.index(color[::-1]) for color in colors)
    return order if order != tuple(range(len(colors))) else ()


def _count_places(data: MeasuredDataset, masks: Sequence[Measurement]) -> NDArray[np.float64]:
    """Count each class's cells at each place ``(N, K, P)``: a band of rows and a grey level."""
    num_classes, num_places = len(data.dataset.classes), _NUM_ROWS * _NUM_LEVELS
    counts = np.zeros((len(masks), num_classes, num_places))
    rows, columns = THUMBNAIL_SHAPE
    bands = np.repeat(np.arange(rows) * _NUM_ROWS // rows, columns).reshape(THUMBNAIL_SHAPE)
    for k, each in enumerate(masks):
        assert each.image is not None
        assert each.mask is not None
        grey = each.image.thumbnail.astype(np.float64)
        deviations = (grey - grey.mean()) / max(float(grey.std()), 1e-6)
        # From two standard deviations below the mean to two above it.
        levels = np.clip((deviations + 2) * (_NUM_LEVELS / 4), 0, _NUM_LEVELS - 1).astype(np.intp)
        ids = data.ids(each.mask.code_grid)
        known = (ids >= 0) & (ids < num_classes)
        places = (ids * num_places + bands * _NUM_LEVELS + levels)[known]
        counts[k] = np.bincount(places, minlength=counts[k].size).reshape(counts[k].shape)
    return counts


def _find_exchanged(
    counts: NDArray[np.float64],
    order: tuple[int, ...],
    groups: Sequence[NDArray[np.bool_]],
    *,
    by_color: bool,
) -> dict[int, float]:
    """Return the masks that are like the others in this order of the classes.

    They are at most a third, or half of them if red and blue are exchanged, or if they are those of
    a folder or split.

    Args:
        counts: from :func:`_count_places`.
        order: the class that each class becomes.
        groups: the masks of each folder and split.
        by_color: whether this exchanges red and blue.

    Returns:
        What each of these masks gains in log-likelihood.
    """
    # Where a whole folder or split differs, no single mask may gain before all of it is exchanged.
    starts = (np.zeros(len(counts), bool), *groups)
    states = [_exchange_until_stable(counts, order, start) for start in starts]
    is_exchanged = max(states, key=lambda state: -_gain_by_order(counts, order, state)[0].sum())
    gains, cells = _gain_by_order(counts, order, is_exchanged)
    has_classes = cells.any(1)
    is_group = any(
        (is_exchanged ^ group)[has_classes].sum() <= _MAX_OTHERS_IN_GROUP * is_exchanged.sum()
        for group in groups
    )
    most = len(counts) / (2 if by_color or is_group else 3)
    if not 0 < is_exchanged.sum() <= most:
        return {}
    total, mean = -gains.sum(1), -gains / np.maximum(cells, 1)
    overall = total / np.maximum(cells.sum(1), 1)
    is_seen = cells.sum(1) >= _MIN_CELLS
    is_sure = (total >= _MIN_GAIN) & (overall >= _MIN_MEAN_GAIN)
    num_clear = ((cells >= _MIN_CELLS) & (mean >= _MIN_MEAN_GAIN)).sum(1)
    is_clear = ((num_clear >= 2) | by_color)[is_exchanged]
    is_judged = ((cells >= _MIN_CELLS).sum(1) >= 2)[is_exchanged]
    are_clear = bool(is_clear.all())
    if is_group and is_judged.sum() >= _MIN_JUDGED_IN_GROUP:
        are_clear |= bool(is_clear[is_judged].mean() >= _MIN_CLEAR_IN_GROUP)
    fits = np.quantile(overall[is_seen], 0.1) >= _MIN_MEAN_GAIN if is_seen.any() else False
    if not (fits and are_clear and is_sure[is_exchanged].all()):
        return {}
    return {int(k): float(total[k]) for k in np.flatnonzero(is_exchanged)}


def _exchange_until_stable(
    counts: NDArray[np.float64], order: tuple[int, ...], is_exchanged: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Exchange masks as long as they gain by it; return the exchanged ones, or all the others."""
    for _ in range(2 * _MAX_ROUNDS):
        change = _gain_by_order(counts, order, is_exchanged)[0].sum(1) > 0
        if not change.any():
            break
        is_exchanged = is_exchanged ^ change
    return ~is_exchanged if 2 * is_exchanged.sum() > len(counts) else is_exchanged


def _gain_by_order(
    counts: NDArray[np.float64], order: tuple[int, ...], is_exchanged: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the classes ``(N, M)`` of each mask gain if they are exchanged, and their cells.

    A mask's own cells do not count for the probabilities that it is compared with.
    """
    moved = [k for k, other in enumerate(order) if k != other]
    partners = [moved.index(order[k]) for k in moved]
    own = counts[:, moved]
    own = np.where(is_exchanged[:, None, None], own[:, partners], own)
    rest = own.sum(0) - own
    share = rest / np.maximum(counts.sum() - counts.sum((1, 2)), 1)[:, None, None]
    share += _MIN_PROBABILITY
    log_share = np.log(share / share.sum(2, keepdims=True))
    gain = np.clip(log_share[:, partners] - log_share, -_MAX_CELL_GAIN, _MAX_CELL_GAIN)
    return (gain * own).sum(2), own.sum(2)


def check_renumbered_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that were renumbered one by one: to 0 to k - 1, or stretched to 0 to 255.

    Then every mask has the first values, or the first and the last one, however many it has; and
    one that lacks a class fits the others better if its values are other classes.
    """
    table, masks = data.dataset.classes, data.complete
    num_classes = len(table)
    is_usual = 3 <= num_classes <= _MAX_RENUMBERED_CLASSES and not table.by_color
    if not is_usual or len(masks) < _MIN_MASKS:
        return
    has_class = np.array([data.counts[each.pair][:num_classes] > 0 for each in masks])
    number = has_class.sum(1)
    has_fewer = (number > 1) & (number < num_classes)
    if not has_fewer.sum() >= _MIN_MASKS_WITH_FEWER:
        return
    are_first = table.values == tuple(range(num_classes)) and bool(
        (has_class == (np.arange(num_classes) < number[:, None])).all()
    )
    are_ends = (table.values[0], table.values[-1]) == (0, IGNORE) and bool(
        has_class[number > 1][:, [0, -1]].all()
    )
    if not are_first and not are_ends:
        return
    fit_better = has_fewer & _fit_other_classes(_count_places(data, masks), has_class)
    least = max(_MIN_MASKS_WITH_FEWER, _MIN_SHARE_RENUMBERED * has_fewer.sum())
    is_likely = bool(fit_better.sum() >= least)
    lacks_two = has_fewer & (number < num_classes - 1)
    if is_likely or (are_first and lacks_two.sum() >= _MIN_MASKS_WITHOUT_TWO):
        odd = fit_better if is_likely else has_fewer
        files = [each.pair.mask for each, is_odd in zip(masks, odd, strict=True) if is_odd]
        yield _renumbered_masks(data, files, are_first=are_first, is_likely=is_likely)


def _renumbered_masks(
    data: MeasuredDataset, files: Sequence[Path], *, are_first: bool, is_likely: bool
) -> Finding:
    values = "0, 1, 2 and so on without a gap" if are_first else "0 and 255"
    masks = f"{format_count(len(files), 'mask')}, such as '{data.name(files[0])}',"
    message = f"every mask has the values {values}, but {masks} have fewer values than the others"
    remedy = (
        "save each class with the same value in all masks: np.unique(return_inverse=True), "
        "LabelEncoder and stretching to 0-255 number the classes of each mask separately"
    )
    if is_likely:
        message += "; judging by position and brightness, their values mean different classes"
        return Finding(RENUMBERED_KIND, "warning", tuple(files), message, remedy)
    message += ": each mask may have been renumbered on its own"
    return Finding(RENUMBERED_KIND, "note", (), message, f"{remedy}; otherwise ignore this note")


def _fit_other_classes(
    counts: NDArray[np.float64], has_class: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return which masks fit those of all classes better if their values are other classes.

    The order of the classes stays the same, since renumbering keeps it.

    Args:
        counts: from :func:`_count_places`.
        has_class: the classes ``(N, K)`` of each mask.
    """
    num_classes = has_class.shape[1]
    better = np.zeros(len(counts), bool)
    is_complete = has_class.all(1)
    if is_complete.sum() < _MIN_COMPLETE_MASKS:
        return better
    total = counts[is_complete].sum(0)
    share = total / max(total.sum(), 1) + _MIN_PROBABILITY
    log_share = np.log(share / share.sum(1, keepdims=True))
    gain = np.clip(log_share[None] - log_share[:, None], -_MAX_CELL_GAIN, _MAX_CELL_GAIN)
    for n in np.flatnonzero(~is_complete):
        own = np.flatnonzero(has_class[n])
        gains = np.einsum("ip,ijp->ij", counts[n, own], gain[own])
        cells = counts[n, own].sum(1)
        orders = np.array(list(itertools.combinations(range(num_classes), len(own))))
        gained = gains[np.arange(len(own)), orders].sum(1)
        best = int(gained.argmax())
        moved = cells[orders[best] != own].sum()
        better[n] = (
            gained[best] >= max(_MIN_GAIN_OF_RENUMBERED, _MIN_MEAN_GAIN * moved)
            and moved >= _MIN_CELLS
        )
    return better


def swap_foreground(label: Label) -> Label:
    """Exchange the classes 0 and 1; ignored pixels stay ignored."""
    return np.where(label <= 1, 1 - label, label).astype(np.uint8)


def _foreground_features(data: MeasuredDataset, each: Measurement) -> tuple[float, float, float]:
    """Return the foreground's share of a mask, of its border, and its relative brightness.

    The brightness is relative to the background, in standard deviations of the image.
    """
    assert each.mask is not None
    assert each.image is not None
    grid = data.ids(each.mask.code_grid) == 1
    border = np.concatenate((grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]))
    pixels = data.counts[each.pair]
    share = float(pixels[1] / max(1, pixels[:2].sum()))
    thumbnail = each.image.thumbnail
    brighter = 0.0
    if 0 < grid.sum() < grid.size:
        brighter = float(thumbnail[grid].mean() - thumbnail[~grid].mean())
    brighter /= max(float(thumbnail.std()), 1e-6)
    return share, float(border.mean()), float(np.clip(brighter, -3, 3))
