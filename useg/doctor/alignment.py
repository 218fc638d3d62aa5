"""Check whether the masks as a whole match their images: not shifted, scaled, turned, exchanged.

The edge alignment of each pair is measured before (:mod:`useg.doctor.edges`). What is usual in the
data set is found here; single masks that align worse are checked by
:mod:`useg.doctor.single_masks`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.data.dataset import CodeMap, pick_evenly, read_pair_image
from useg.data.duplicates import ORIENTATIONS
from useg.doctor.edges import (
    MAX_SHIFT_PIXELS,
    PLACEMENTS,
    EdgeAlignment,
    MaskPlacement,
    describe_placement,
    describe_shift,
    find_strongest_shift,
    measure_edge_alignment,
    measure_enclosure,
    measure_placements,
    place_label,
    shift_label,
    shift_z_score,
    strength_at,
)
from useg.doctor.mask_codes import read_codes
from useg.doctor.measure import Finding, MeasuredDataset, Measurement, Repair
from useg.errors import UsageError, format_count

# With fewer pairs, typical values are not known.
_MIN_PAIRS = 6

# At most this many suspicious pairs are read again.
MAX_SUSPECTS = 24

# An alignment is significant from this many standard deviations on.
MIN_Z_SCORE = 4.0

# All masks have another place or scale if half of them choose it, and if the other half, at least
# this many, prove it: there the edges are stronger by this much on average, in this share of the
# masks, with this t-statistic.
_MIN_PLACED_MASKS = 4
_MIN_PLACED_GAIN, _MIN_PLACED_MASKS_SHARE, _MIN_PLACED_T = 0.05, 0.85, 5.0
# Its scale differs from 1 by at least this factor, or its place by this share of the width.
_MIN_SCALE, _MIN_SHIFT = 1.04, 0.015
# Masks that align better than this as they are need no other place.
_MAX_Z_SCORE_AS_THEY_ARE = 5.0
# Where a small shift helps too, another placement must have a z-score that is higher by this much.
_MIN_MORE_THAN_SHIFT = 1.5

# A scale up to this factor may also mean outlines that are drawn too wide or too narrow, if this
# share of the boundaries has the most frequent class outside, as around single objects.
_MAX_SCALE_OF_OUTLINES, _MIN_ENCLOSURE = 1.25, 0.8

# Masks match no image in particular if the edges of their own images are not stronger than those of
# other images. At least this many masks are compared, each with this many other images, and the
# z-score of the difference is lower than this. On seven public data sets it is 6.9 or more, and
# with exchanged masks at most 3.1, usually 1.
_MIN_COMPARED_MASKS = 8
_NUM_OTHER_IMAGES = 3
_MIN_OWN_Z_SCORE = 3.0

# Two numbers at the end of a name, such as the row and the column of a tile.
_TWO_LAST_NUMBERS = re.compile(r"([0-9]+)([^0-9]+)([0-9]+)([^0-9]*)$")
# Rows and columns are exchanged if the edges of the tile with exchanged numbers are stronger than
# those of the mask's own tile by this factor.
_MIN_TILE_GAIN = 2.0

# The right image of a mask is searched among this many images, or fewer large ones, which have this
# many pixels together.
_MAX_SEARCHED_IMAGES = 256
_MAX_SEARCHED_PIXELS = 200_000_000
# It is found if its z-score is at least this.
_MIN_FOUND_Z_SCORE = 6.0


def orientation_change(name: str) -> Callable[[Label], Label]:
    """Return the transform of a repair that applies one of the ``ORIENTATIONS``."""
    return lambda label: np.ascontiguousarray(ORIENTATIONS[name](label))


def reread_pair(data: MeasuredDataset, each: Measurement) -> tuple[NDArray[Any], CodeMap] | None:
    """Read a pair's image ``(H, W, C)`` and its mask's codes ``(H, W)``; None if that fails now."""
    try:
        return read_pair_image(each.pair), read_codes(each.pair, data.dataset)
    except UsageError:
        return None


def _turn(codes: CodeMap, name: str) -> CodeMap:
    return ORIENTATIONS[name](codes) if name else codes


def find_best_orientation(data: MeasuredDataset, each: Measurement, names: Sequence[str]) -> str:
    """Return which of the orientations aligns a mask best; the first one if nothing shows it.

    The name ``""`` means no change.
    """
    pixels = reread_pair(data, each)
    if pixels is None:
        return names[0]
    image, codes = pixels
    found = {
        name: strength_at(alignment)
        for name in names
        if (alignment := measure_edge_alignment(image, _turn(codes, name))) is not None
    }
    return max(found, key=lambda name: found[name]) if found else names[0]


def shift_change(shift: tuple[int, int]) -> Callable[[Label], Label]:
    """Return the transform of a repair that shifts a mask; pixels that become free are ignored."""
    return lambda label: shift_label(label, shift, IGNORE)


def placement_change(placement: MaskPlacement) -> Callable[[Label], Label]:
    """Return the transform of a repair that scales or moves a mask; the rest is ignored."""
    return lambda label: place_label(label, placement, IGNORE)


@dataclass(frozen=True)
class UsualAlignment:
    """The typical alignment in a data set.

    Args:
        measurements, alignments: the pairs whose alignment was measured.
        shift: where the masks lie best; (0, 0) unless a shift is evident.
        strength: median edge strength at that shift.
        z_score: median number of standard deviations by which that shift stands out.
    """

    measurements: Sequence[Measurement]
    alignments: Sequence[EdgeAlignment]
    shift: tuple[int, int]
    strength: float
    z_score: float


def find_usual_alignment(data: MeasuredDataset) -> UsualAlignment | None:
    """Return how the masks of a data set usually align; None if too few could be measured."""
    pairs = [(each, each.alignment) for each in data.complete if each.alignment is not None]
    if len(pairs) < _MIN_PAIRS:
        return None
    alignments = np.stack([alignment for _, alignment in pairs])
    mean = np.mean(alignments, axis=0)
    shift = find_strongest_shift(mean)
    center = MAX_SHIFT_PIXELS
    at_shift = alignments[:, shift[1] + center, shift[0] + center]
    share_better = float((at_shift > alignments[:, center, center]).mean())
    gain, gain_unshifted = float(mean.max()) - 1, float(mean[center, center]) - 1
    is_evident = (
        max(abs(shift[0]), abs(shift[1])) >= 2
        and share_better >= 0.75
        and shift_z_score(mean, shift) >= 6
        and gain >= 1.3 * gain_unshifted
    )
    if not is_evident:
        shift = (0, 0)
    return UsualAlignment(
        [each for each, _ in pairs],
        list(alignments),
        shift,
        strength=float(np.median([strength_at(one, shift) for one in alignments])),
        z_score=float(np.median([shift_z_score(one, shift) for one in alignments])),
    )


def check_common_shift(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that are all shifted alike against their images, by 2 pixels or more."""
    usual = data.once(find_usual_alignment)
    if usual is None or usual.shift == (0, 0) or data.once(find_common_placement):
        return
    where = describe_shift(usual.shift)
    repairs = tuple(
        Repair(each.pair, f"mask moved {where}", transform=shift_change(usual.shift))
        for each in data.complete
    )
    yield Finding(
        "shifted masks",
        "error",
        tuple(each.pair.mask for each in usual.measurements),
        "all masks are shifted relative to their images: "
        f"{format_count(len(usual.measurements), 'mask')} fit the edges of their images "
        f"best when moved {where}",
        "correct the export that made the masks",
        repairs,
        {"shift": usual.shift},
    )


@dataclass(frozen=True)
class _CommonPlacement:
    """The placement with which masks fit their images.

    Args:
        placement: the placement.
        masks: the pairs in which it was measured.
        is_sure: no outlines that are drawn too wide or too narrow explain it.
    """

    placement: MaskPlacement
    masks: Sequence[Measurement]
    is_sure: bool


def find_common_placement(data: MeasuredDataset) -> _CommonPlacement | None:
    """Return the placement with which all masks align well, if they do not as they are."""
    usual = data.once(find_usual_alignment)
    if usual is None or (usual.z_score >= _MAX_Z_SCORE_AS_THEY_ARE and usual.shift == (0, 0)):
        return None
    measured = [
        (each, strengths)
        for each in pick_evenly(usual.measurements, MAX_SUSPECTS)
        if (pixels := reread_pair(data, each)) is not None
        and (strengths := measure_placements(*pixels)) is not None
    ]
    if len(measured) < 2 * _MIN_PLACED_MASKS:
        return None
    best = _choose_placement(np.array([strengths for _, strengths in measured]))
    # A small shift is known to the pixel.
    if not best or (usual.shift != (0, 0) and any(PLACEMENTS[best].shift)):
        return None
    placement, masks = PLACEMENTS[best], [each for each, _ in measured]
    z_scores, enclosures = [], []
    for image, codes in filter(None, (reread_pair(data, each) for each in masks)):
        enclosures.append(measure_enclosure(codes))
        alignment = measure_edge_alignment(image, place_label(codes, placement, int(codes[0, 0])))
        z_scores.append(0.0 if alignment is None else shift_z_score(alignment))
    needed = max(MIN_Z_SCORE, usual.z_score + _MIN_MORE_THAN_SHIFT * (usual.shift != (0, 0)))
    if not z_scores or float(np.median(z_scores)) < needed:
        return None
    scale = placement.across
    may_be_outlines = (
        1 != scale == placement.down
        and placement.anchor == 0.5
        and max(scale, 1 / scale) <= _MAX_SCALE_OF_OUTLINES
        and float(np.median(enclosures)) >= _MIN_ENCLOSURE
    )
    return _CommonPlacement(placement, masks, is_sure=not may_be_outlines)


def _choose_placement(strengths: NDArray[np.float64]) -> int:
    """Return which of the ``PLACEMENTS`` half of the masks choose and the others prove, or 0.

    Args:
        strengths: from :func:`measure_placements`, ``(N, len(PLACEMENTS))``.
    """
    choosing, testing = strengths[::2], strengths[1::2]
    is_known = np.isfinite(choosing)
    mean = np.where(is_known, choosing, 0).sum(0) / is_known.sum(0).clip(1)
    best = int(np.where(is_known.mean(0) >= 0.8, mean, 0).argmax())
    placement = PLACEMENTS[best]
    scale = max(abs(np.log(placement.across)), abs(np.log(placement.down)))
    gains = testing[:, best] - testing[:, 0]
    gains = gains[np.isfinite(gains)]
    is_small = scale < np.log(_MIN_SCALE) and max(map(abs, placement.shift)) < _MIN_SHIFT
    if is_small or len(gains) < _MIN_PLACED_MASKS:
        return 0
    error = max(float(gains.std(ddof=1)) / len(gains) ** 0.5, 1e-3)
    is_proven = (
        float(gains.mean()) >= max(_MIN_PLACED_GAIN, _MIN_PLACED_T * error)
        and float((gains > 0).mean()) >= _MIN_PLACED_MASKS_SHARE
    )
    return best if is_proven else 0


def check_common_placement(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that are all enlarged, reduced, stretched or moved far against their images.

    It happens when only masks or only images were cropped, or padded to another aspect ratio.
    """
    common = data.once(find_common_placement)
    if common is None:
        return
    how, placement = describe_placement(common.placement), common.placement
    masks = tuple(each.pair.mask for each in common.masks)
    fit = f"{format_count(len(masks), 'mask')} fit the edges of their images best when {how}"
    if not common.is_sure:
        size, width = ("larger", "wide") if placement.down < 1 else ("smaller", "narrow")
        yield Finding(
            "outlines too wide or too narrow",
            "warning",
            masks,
            f"the masks are {size} than what the images show: {fit}",
            "look at some images with their masks: the masks have another scale, or their outlines "
            f"are drawn too {width}",
        )
        return
    what = "are shifted relative to" if any(placement.shift) else "have a different scale from"
    yield Finding(
        "misplaced masks",
        "error",
        masks,
        f"all masks {what} their images: {fit}",
        "crop, resize and pad images and masks in the same way",
        tuple(
            Repair(each.pair, f"mask {how}", transform=placement_change(placement))
            for each in data.complete
        ),
    )


def _find_common_turn(data: MeasuredDataset) -> str:
    """Return in which orientation all masks align well, if they do not as they are; or ``""``."""
    usual = data.once(find_usual_alignment)
    if usual is None or usual.z_score >= MIN_Z_SCORE or usual.shift != (0, 0):
        return ""
    if data.once(find_common_placement) or data.once(find_exchanged_tiles):
        return ""
    chosen = pick_evenly(usual.measurements, MAX_SUSPECTS // 2)
    pixels = [found for each in chosen if (found := reread_pair(data, each)) is not None]
    best = ("", usual.strength)
    for name, change in ORIENTATIONS.items():
        alignments = [
            alignment
            for image, codes in pixels
            if change(codes).shape == codes.shape
            and (alignment := measure_edge_alignment(image, change(codes))) is not None
        ]
        if len(alignments) < max(_MIN_PAIRS, 0.8 * len(pixels)):
            continue
        strength = float(np.median([strength_at(one) for one in alignments]))
        if float(np.median([shift_z_score(one) for one in alignments])) >= MIN_Z_SCORE:
            best = max(best, (name, strength), key=lambda found: found[1])
    name, strength = best
    return name if strength - 1 >= 1.5 * (usual.strength - 1) else ""


def check_common_turn(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that are all rotated or mirrored alike, as by a program without EXIF rotation."""
    name = data.once(_find_common_turn)
    if not name:
        return
    turned = [
        each for each in data.complete if find_best_orientation(data, each, ("", name)) == name
    ]
    yield Finding(
        "turned masks",
        "error",
        tuple(each.pair.mask for each in turned),
        f"{len(turned)} of {format_count(len(data.complete), 'mask')} fit the edges of their "
        f"images better when they are {name}",
        "correct the export that made the masks, which may ignore the rotation in EXIF tags",
        tuple(
            Repair(each.pair, f"mask {name}", transform=orientation_change(name)) for each in turned
        ),
    )


def find_exchanged_tiles(data: MeasuredDataset) -> list[tuple[Measurement, Measurement]]:
    """Return the tiles of a grid, each with the one whose mask fits it, if rows are columns.

    Images are numbered by row and column, and masks by column and row: ``tile_2_5`` has the mask
    of ``tile_5_2``. Empty unless these masks fit, and their own do not.
    """
    names = {data.pair_name(each): each for each in data.complete}
    partners = [
        (each, names[exchanged])
        for name, each in names.items()
        if (exchanged := _TWO_LAST_NUMBERS.sub(r"\3\2\1\4", name)) != name and exchanged in names
    ]
    known = [each.alignment for each, _ in partners if each.alignment is not None]
    if len(known) < _MIN_PAIRS or 2 * len(partners) < len(data.complete):
        return []
    if shift_z_score(np.mean(known, axis=0)) >= _MIN_FOUND_Z_SCORE:
        return []
    own, fits = [], []
    for each, other in pick_evenly(partners, MAX_SUSPECTS):
        pixels, pixels_of_other = reread_pair(data, each), reread_pair(data, other)
        if each.alignment is None or pixels is None or pixels_of_other is None:
            continue
        image, codes = pixels[0], pixels_of_other[1]
        fit = measure_edge_alignment(image, codes) if image.shape[:2] == codes.shape else None
        if fit is not None:
            own.append(each.alignment)
            fits.append(fit)
    if len(fits) < _MIN_PAIRS:
        return []
    gains = np.array(
        [strength_at(fit) - strength_at(one) for fit, one in zip(fits, own, strict=True)]
    )
    error = max(float(gains.std(ddof=1)) / len(gains) ** 0.5, 1e-3)
    fit, usual = np.mean(fits, axis=0), np.mean(own, axis=0)
    is_sure = shift_z_score(fit) >= _MIN_FOUND_Z_SCORE or gains.mean() >= _MIN_PLACED_T * error
    is_clear = strength_at(fit) - 1 >= _MIN_TILE_GAIN * max(0.0, strength_at(usual) - 1)
    return partners if is_sure and is_clear else []


def check_exchanged_tiles(data: MeasuredDataset) -> Iterator[Finding]:
    """Find tiles of a grid whose rows and columns are exchanged between images and masks."""
    partners = data.once(find_exchanged_tiles)
    if not partners:
        return
    each, other = partners[0]
    yield Finding(
        "rows and columns of tiles exchanged",
        "error",
        tuple(one.pair.mask for one, _ in partners),
        "the masks do not fit their images, but they do if row and column are swapped in the names "
        f"of the tiles: '{data.name(other.pair.mask)}' fits '{data.pair_name(each)}'",
        "number the tiles of images and masks in the same way",
        tuple(
            Repair(one.pair, f"mask: that of {data.pair_name(two)}", mask_source=two.pair)
            for one, two in partners
        ),
    )


def check_exchanged_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that all belong to other images, as when one folder was renumbered.

    Their class boundaries lie on the edges of their own images no more than on those of others.
    """
    usual = data.once(find_usual_alignment)
    if (
        usual is None
        or usual.z_score >= MIN_Z_SCORE
        or usual.shift != (0, 0)
        or data.once(find_common_placement)
        or data.once(_find_common_turn)
        or data.once(find_exchanged_tiles)
    ):
        return
    suspects = [
        Suspect(each, each.alignment, *pixels)
        for each in pick_evenly(usual.measurements, MAX_SUSPECTS // 2)
        if each.alignment is not None and (pixels := reread_pair(data, each)) is not None
    ]
    others = [
        alignment
        for k, suspect in enumerate(suspects)
        for step in range(1, _NUM_OTHER_IMAGES + 1)
        if (alignment := _align(suspects[(k + step) % len(suspects)].image, suspect)) is not None
    ]
    if min(len(suspects), len(others)) < _MIN_COMPARED_MASKS:
        return
    own = np.mean([suspect.alignment for suspect in suspects], axis=0)
    if shift_z_score(1 + own - np.mean(others, axis=0)) >= _MIN_OWN_Z_SCORE:
        return
    found = _find_right_images(data, suspects)
    if len(found) < max(2, len(suspects) // 4):
        yield Finding(
            "masks fit no images",
            "warning",
            (),
            "the masks match the edges in their own images no better than the edges in other "
            "images",
            "look at some images with their masks: the names may pair files that do not belong "
            "together",
        )
        return
    suspect, image = suspects[next(iter(found))], next(iter(found.values()))
    yield Finding(
        "masks of other images",
        "error",
        (image.pair.image, suspect.measurement.pair.mask),
        "the masks do not fit their images, and at least "
        f"{format_count(len(found), 'mask')} of {len(suspects)} fit another image: "
        f"'{data.name(suspect.measurement.pair.mask)}' fits '{data.pair_name(image)}'",
        "give each image its own mask: the names pair files that do not belong together",
    )


def _align(image: NDArray[Any], suspect: Suspect) -> EdgeAlignment | None:
    """Return how well a mask lies on the edges of an image, if both have one size."""
    has_size = image.shape[:2] == suspect.codes.shape
    return measure_edge_alignment(image, suspect.codes) if has_size else None


def _find_right_images(
    data: MeasuredDataset, suspects: Sequence[Suspect]
) -> dict[int, Measurement]:
    """Return the images whose edges masks fit, the clearest first, by the indices of the masks."""
    pixels = max(suspect.codes.size for suspect in suspects)
    number = min(_MAX_SEARCHED_IMAGES, max(1, _MAX_SEARCHED_PIXELS // pixels))
    best: dict[int, tuple[float, Measurement]] = {}
    for each in pick_evenly(data.complete, number):
        try:
            image = read_pair_image(each.pair)
        except UsageError:
            continue
        for k, suspect in enumerate(suspects):
            alignment = _align(image, suspect)
            z_score = 0.0 if alignment is None else shift_z_score(alignment)
            if z_score >= best.get(k, (_MIN_FOUND_Z_SCORE, each))[0]:
                best[k] = (z_score, each)
    order = sorted(best, key=lambda k: -best[k][0])
    return {k: best[k][1] for k in order if best[k][1] is not suspects[k].measurement}


@dataclass(frozen=True)
class Suspect:
    """A pair that aligns worse than usual, with its pixels."""

    measurement: Measurement
    alignment: EdgeAlignment
    image: NDArray[Any]
    codes: CodeMap
