"""The content of masks -> the same without values and colours that are no classes.

Smoothing and JPEG make such values, a slip of the hand does, and so do masks that were saved in
another way than the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable
from useg.data.mask_content import COLOR_FLAG, MIN_GREY_LEVEL, MaskContent, channels_of, color_code
from useg.data.schemes import KNOWN_PALETTES, grey_levels, match_grey_palette

# More values than this are a photograph if they hardly form any plain areas.
MAX_UNDOUBTED_VALUES = 64
# JPEG leaves plain areas within this distance of their colour (sum over three channels).
MAX_JPEG_DISTANCE = 60
# A mixture of two colours is at most this far from the straight line between them.
_MAX_MIXTURE_DISTANCE = 24
# Two levels are at least so far apart, and noise changes a level by at most so much.
_MIN_TWO_LEVEL_GAP = 100
_MAX_LEVEL_NOISE = 20
# With fewer masks, a value in one of them is not odd.
_MIN_MASKS_OF_ODD_VALUES = 5
# A patch of an odd value covers at most this share of its mask.
_MAX_ODD_SHARE = 0.005
_LOSSY_SUFFIXES = (".jpg", ".jpeg")


def sum_counts(
    masks: Sequence[MaskContent], *, as_colors: bool = False
) -> tuple[Counter[int], Counter[int], Counter[int]]:
    """Sum the pixels of each code over all masks: all, interior ones, those on slopes."""
    sums: tuple[Counter[int], Counter[int], Counter[int]] = (Counter(), Counter(), Counter())
    for mask in masks:
        keys = [mask.as_color(c) if as_colors else c for c in mask.codes.tolist()]
        for total, counts in zip(
            sums, (mask.counts, mask.interior_counts, mask.ramp_counts), strict=True
        ):
            for key, count in zip(keys, counts.tolist(), strict=True):
                total[key] += count
    return sums


def mixes_two_encodings(values: Iterable[frozenset[int]]) -> bool:
    """Return whether some masks store 1 and others 255 for one class: never both in one mask."""
    each = [found for found in values if found]
    return frozenset().union(*each) == {0, 1, IGNORE} and not any(
        {1, IGNORE} <= found for found in each
    )


def drop_other_encoding(masks: Sequence[MaskContent]) -> list[MaskContent]:
    """Leave out masks with 0/255 or a palette's grey levels if the others hold ids."""
    codes_of = [frozenset(mask.codes.tolist()) for mask in masks]
    ids = [codes for codes in codes_of if max(codes, default=0) < MIN_GREY_LEVEL]
    plain = frozenset[int]().union(*ids)
    if len(plain) < 2 or len(ids) == len(masks):
        return list(masks)
    mixed = mixes_two_encodings(codes_of)
    return [
        mask
        for mask, codes in zip(masks, codes_of, strict=True)
        if max(codes, default=0) < MIN_GREY_LEVEL or not (mixed or _are_greys_of_ids(codes, plain))
    ]


def _are_greys_of_ids(codes: frozenset[int], ids: frozenset[int]) -> bool:
    name = match_grey_palette(codes)
    if not name:
        return False
    greys = grey_levels(KNOWN_PALETTES[name])
    return {greys.get(code, 0) for code in codes} <= ids


def looks_like_photograph(mask: MaskContent) -> bool:
    """Whether a mask has many codes, and hardly any plain areas."""
    return len(mask.codes) > MAX_UNDOUBTED_VALUES and bool(
        mask.interior_counts.sum() < 0.5 * mask.counts.sum()
    )


def are_smeared(masks: Sequence[MaskContent]) -> bool:
    """Whether smoothing or JPEG made many of the codes.

    Smoothed grey levels lie on slopes between a lower and a higher level. Other codes that are not
    in the scene occur only as thin edges.
    """
    totals, interior, ramps = sum_counts(masks)
    if len(totals) < 3 or max(totals) < MIN_GREY_LEVEL:
        return False
    if _is_noise_of_two_levels(totals, interior):
        return True
    if any(is_lossy(mask) for mask in masks):
        return True
    on_ramp = [code for code, count in totals.items() if ramps[code] > 0.5 * count]
    others = totals.keys() - set(on_ramp)
    # The levels that were smoothed still have plain areas.
    if sum(interior[code] for code in others) >= 0.5 * sum(totals[code] for code in others):
        if len(on_ramp) >= max(2, 0.4 * (len(totals) - 2)):
            return True
        if len(totals) == 3 and len(on_ramp) == 1 and max(totals) - min(totals) > 100:
            count = totals[on_ramp[0]]
            return ramps[on_ramp[0]] >= 0.9 * count and count < 0.06 * totals.total()
    num_thin = sum(interior[code] < 0.3 * count for code, count in totals.items())
    if len(totals) < 6 or num_thin < max(3, 0.4 * len(totals)):
        return False
    are_ids = max(totals) < COLOR_FLAG and max(totals) < 3 * len(totals) and max(totals) < 200
    return not are_ids and 2 * len(_find_true_colors(masks)) <= len(totals)


def _is_noise_of_two_levels(totals: Counter[int], interior: Counter[int]) -> bool:
    """Whether all codes are near the lowest or the highest, and all but two form no areas.

    Noise changes both levels: beside 255, which is ignored, thin things may have a low id.
    """
    low, high = min(totals), max(totals)
    if low < 0 or high >= COLOR_FLAG or high - low < _MIN_TWO_LEVEL_GAP:
        return False
    sides = (
        [code for code in totals if code - low <= _MAX_LEVEL_NOISE],
        [code for code in totals if high - code <= _MAX_LEVEL_NOISE],
    )
    if min(map(len, sides)) < 2:
        return False
    levels = {max(side, key=lambda code: totals[code]) for side in sides}
    others = totals.keys() - levels
    in_areas = sum(interior[code] for code in others)
    return sum(map(len, sides)) == len(totals) and in_areas < 0.3 * sum(
        totals[code] for code in others
    )


def is_lossy(mask: MaskContent) -> bool:
    """Whether a mask is a JPEG with more than two codes, of which compression made some."""
    return mask.path.suffix.lower() in _LOSSY_SUFFIXES and len(mask.codes) > 2


def _find_true_colors(masks: Sequence[MaskContent]) -> frozenset[int]:
    """Return the frequent colours, without those that JPEG or smoothing made.

    These are rarer and lie near a true colour, or between two of them.
    """
    totals, interior, _ = sum_counts(masks, as_colors=True)
    min_count = 2e-4 * totals.total()
    true = np.zeros((0, 3))
    found: list[int] = []
    for code, count in totals.most_common():
        if count < min_count or len(found) >= MAX_UNDOUBTED_VALUES:
            break
        color = np.array(channels_of(code), float)
        is_near = bool((np.abs(true - color).sum(1) <= MAX_JPEG_DISTANCE).any())
        is_solid = interior[code] >= 0.5 * count and count >= 20 * min_count
        if is_near or (not is_solid and _is_mixture(color, true)):
            continue
        true = np.vstack((true, color))
        found.append(code)
    return frozenset(found)


def _is_mixture(color: NDArray[np.float64], true: NDArray[np.float64]) -> bool:
    """Whether a colour lies on the straight line between two true colours."""
    one, other = (true[places] for places in np.triu_indices(len(true), 1))
    along = other - one
    share = np.clip(((color - one) * along).sum(1) / np.maximum(1, (along * along).sum(1)), 0, 1)
    distance = np.abs(one + share[:, None] * along - color).sum(1)
    return bool((distance <= _MAX_MIXTURE_DISTANCE).any())


def keep_true_colors(masks: Sequence[MaskContent]) -> list[MaskContent]:
    """Return masks with only the colours that neither JPEG nor smoothing made."""
    colors = _find_true_colors(masks)
    return [
        _select(mask, [mask.as_color(code) in colors for code in mask.codes.tolist()])
        for mask in masks
    ]


def _select(mask: MaskContent, keep: Sequence[bool]) -> MaskContent:
    places = np.flatnonzero(keep)
    return replace(
        mask,
        codes=mask.codes[places],
        counts=mask.counts[places],
        interior_counts=mask.interior_counts[places],
        ramp_counts=mask.ramp_counts[places],
    )


def drop_odd_codes(masks: Sequence[MaskContent]) -> list[MaskContent]:
    """Remove codes that only a patch of a single mask has, if all other codes are usual.

    It is a slip of the hand: 77 among 0, 1 and 2. Beside the other ids it may be a rare class.
    """
    occurrences = Counter(code for mask in masks for code in mask.codes.tolist())
    odd = {
        code
        for mask in masks
        for code, count in zip(mask.codes.tolist(), mask.counts.tolist(), strict=True)
        if occurrences[code] == 1 and count <= _MAX_ODD_SHARE * mask.counts.sum()
    }
    usual = [code for code in occurrences if code not in odd]
    if (
        len(masks) < _MIN_MASKS_OF_ODD_VALUES
        or not usual
        or len(odd) > max(1, len(usual) // 10)
        or min(occurrences[code] for code in usual) < 3
    ):
        return list(masks)
    odd -= {IGNORE, max(usual) + 1, min(usual) - 1}
    return [_select(mask, [code not in odd for code in mask.codes.tolist()]) for mask in masks]


def exchange_channels(code: int) -> int:
    """Return the code of a colour whose red and blue are exchanged.

    >>> channels_of(exchange_channels(color_code((1, 2, 3))))
    (3, 2, 1)
    """
    return color_code(channels_of(code)[::-1])


def find_exchanged(masks: Sequence[MaskContent]) -> frozenset[Path]:
    """Return the masks, at most half of them, that have the others' colours in the order BGR."""
    groups: tuple[set[Path], set[Path]] = (set(), set())
    colors: set[int] = set()
    for mask in masks:
        own = {mask.as_color(code) for code in mask.codes.tolist()}
        own = {code for code in own if exchange_channels(code) != code}
        is_other = {exchange_channels(code) for code in own}
        colors |= own if not colors else set()
        groups[not own & colors and bool(is_other & colors)].add(mask.path)
        colors |= own if own & colors else is_other if is_other & colors else set()
    is_ambiguous = any(exchange_channels(code) in colors for code in colors)
    if is_ambiguous or len(colors) < 2 or not groups[1]:
        return frozenset()
    return frozenset(groups[len(groups[1]) <= len(groups[0])])


def has_exchanged_channels(codes: Sequence[int], table: ClassTable) -> bool:
    """Whether unknown colours are those of classes if red and blue are exchanged."""
    return table.by_color and all(
        channels_of(exchange_channels(code)) in table.colors for code in codes
    )
