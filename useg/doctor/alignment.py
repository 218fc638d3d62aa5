"""Check that masks match their images: find shifted, rotated, exchanged and unsupported masks.

The edge alignment of each pair is measured before (:mod:`useg.doctor.measure`). Masks that align
much worse than the others are read again, and each explanation is tried: a shift, a rotation or
mirroring, the mask of another image. The best one becomes a finding if with it the mask aligns as
well as the other masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.data.dataset import CodeMap, pick_evenly, read_pair_image
from useg.doctor.measure import (
    MAX_SHIFT_PIXELS,
    EdgeAlignment,
    Finding,
    MeasuredDataset,
    Measurement,
    Repair,
    find_strongest_shift,
    measure_edge_alignment,
    read_codes,
    shift_z_score,
    strength_at,
)
from useg.errors import UsageError, format_count

NO_FIT_KIND = "mask does not fit its image"

# The ways in which a mask may be rotated or mirrored against its image. The first four exchange
# width and height. A name continues the sentence "the mask is ...".
ORIENTATIONS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "transposed": lambda label: label.T,
    "rotated by 90 degrees": lambda label: np.rot90(label, -1),
    "rotated by 270 degrees": lambda label: np.rot90(label, 1),
    "transposed and rotated by 180 degrees": lambda label: label[::-1, ::-1].T,
    "rotated by 180 degrees": lambda label: label[::-1, ::-1],
    "mirrored left to right": lambda label: label[:, ::-1],
    "mirrored top to bottom": lambda label: label[::-1],
}

# With fewer pairs, typical values are not known.
_MIN_PAIRS = 6

# At most this many suspicious pairs are read again.
_MAX_SUSPECTS = 24

# An alignment is significant from this many standard deviations on.
_MIN_Z_SCORE = 4.0

# Pairs are listed for review from this many standard deviations on, and at most this many.
_MIN_SUSPICION = 5.0
_MAX_REVIEWED_PAIRS = 12

# Images are reduced by this factor to find large shifts.
_COARSE_FACTOR = 4

# Masks fit no images in particular if, over so many of them, their own image's edges exceed those
# of so many others by fewer standard deviations. On seven public data sets it is 6.9 and more, and
# at most 3.1, usually 1, when their masks are exchanged.
_MIN_COMPARED_MASKS = 8
_NUM_OTHER_IMAGES = 3
_MIN_OWN_Z_SCORE = 3.0

# Their images are searched among so many, or as many as have so many pixels together. A mask fits
# the best of them from so many standard deviations on.
_MAX_SEARCHED_IMAGES = 256
_MAX_SEARCHED_PIXELS = 200_000_000
_MIN_FOUND_Z_SCORE = 6.0


def shift_label(label: NDArray[Any], shift: tuple[int, int], fill: int) -> NDArray[Any]:
    """Move a label map ``(H, W)`` right and down; pixels that become free get ``fill``."""
    right, down = shift
    H, W = label.shape
    result = np.full_like(label, fill)
    target = (
        slice(max(0, down), H + min(0, down)),
        slice(max(0, right), W + min(0, right)),
    )
    source = (
        slice(max(0, -down), H - max(0, down)),
        slice(max(0, -right), W - max(0, right)),
    )
    result[target] = label[source]
    return result


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


def find_unsupported_boundaries(image: NDArray[Any], codes: CodeMap) -> NDArray[np.bool_]:
    """Mark class boundaries ``(H, W)`` near which the image does not change.

    There the largest step of the image within 2 pixels is among the smallest 30 % of all places.
    """
    band = image[..., image.shape[2] // 2].astype(np.float32)
    step = np.zeros(band.shape, np.float32)
    step[:, 1:] = np.abs(np.diff(band, axis=1))
    step[1:] = np.maximum(step[1:], np.abs(np.diff(band, axis=0)))
    boundary = np.zeros(codes.shape, bool)
    boundary[:, 1:] = codes[:, 1:] != codes[:, :-1]
    boundary[1:] |= codes[1:] != codes[:-1]
    nearby = np.lib.stride_tricks.sliding_window_view(np.pad(step, 2), (5, 5)).max((2, 3))
    unsupported: NDArray[np.bool_] = boundary & (nearby <= np.quantile(nearby, 0.3))
    return unsupported


def describe_shift(shift: tuple[int, int]) -> str:
    """``(3, -2)`` -> ``"3 pixels right and 2 pixels up"``."""
    right, down = shift
    parts = []
    if right:
        parts.append(format_count(abs(right), "pixel") + (" right" if right > 0 else " left"))
    if down:
        parts.append(format_count(abs(down), "pixel") + (" down" if down > 0 else " up"))
    return " and ".join(parts)


def shift_change(shift: tuple[int, int]) -> Callable[[Label], Label]:
    """Return the transform of a repair that shifts a mask; pixels that become free are ignored."""
    return lambda label: shift_label(label, shift, IGNORE)


@dataclass(frozen=True)
class _UsualAlignment:
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


def _find_usual_alignment(data: MeasuredDataset) -> _UsualAlignment | None:
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
    return _UsualAlignment(
        [each for each, _ in pairs],
        list(alignments),
        shift,
        strength=float(np.median([strength_at(one, shift) for one in alignments])),
        z_score=float(np.median([shift_z_score(one, shift) for one in alignments])),
    )


def check_common_shift(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that are all shifted alike against their images, by 2 pixels or more."""
    usual = data.once(_find_usual_alignment)
    if usual is None or usual.shift == (0, 0):
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
        "all masks are shifted against their images: "
        f"{format_count(len(usual.measurements), 'mask')} fit the edges of their images "
        f"best when moved {where}",
        "correct the export that made the masks",
        repairs,
        {"shift": usual.shift},
    )


def _find_common_turn(data: MeasuredDataset) -> str:
    """Return in which orientation all masks align well, if they do not as they are; or ``""``."""
    usual = data.once(_find_usual_alignment)
    if usual is None or usual.z_score >= _MIN_Z_SCORE or usual.shift != (0, 0):
        return ""
    chosen = pick_evenly(usual.measurements, _MAX_SUSPECTS // 2)
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
        if float(np.median([shift_z_score(one) for one in alignments])) >= _MIN_Z_SCORE:
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


def check_exchanged_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that all belong to other images, as when one folder was renumbered.

    Their class boundaries lie on the edges of their own images no more than on those of others.
    """
    usual = data.once(_find_usual_alignment)
    if (
        usual is None
        or usual.z_score >= _MIN_Z_SCORE
        or usual.shift != (0, 0)
        or data.once(_find_common_turn)
    ):
        return
    suspects = [
        _Suspect(each, each.alignment, *pixels)
        for each in pick_evenly(usual.measurements, _MAX_SUSPECTS // 2)
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
            "look at some images with their masks: file names may pair what does not belong "
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
        "give each image its own mask: file names pair what does not belong together",
    )


def _align(image: NDArray[Any], suspect: _Suspect) -> EdgeAlignment | None:
    """Return how well a mask lies on the edges of an image, if both have one size."""
    has_size = image.shape[:2] == suspect.codes.shape
    return measure_edge_alignment(image, suspect.codes) if has_size else None


def _find_right_images(
    data: MeasuredDataset, suspects: Sequence[_Suspect]
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
class _Suspect:
    """A pair that aligns worse than usual, with its pixels."""

    measurement: Measurement
    alignment: EdgeAlignment
    image: NDArray[Any]
    codes: CodeMap


def check_single_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find single masks that are shifted, rotated or mirrored, or belong to another image."""
    usual = data.once(_find_usual_alignment)
    if usual is None or usual.z_score < _MIN_Z_SCORE:
        return
    candidates = [
        (each, alignment)
        for each, alignment in zip(usual.measurements, usual.alignments, strict=True)
        if _is_suspicious(alignment, usual)
    ]
    suspects = [
        _Suspect(each, alignment, *pixels)
        for each, alignment in candidates[:_MAX_SUSPECTS]
        if (pixels := reread_pair(data, each)) is not None
    ]
    best_images = [_find_best_image(suspects, k) for k in range(len(suspects))]
    for k in range(len(suspects)):
        finding = _diagnose(data, suspects, best_images, k, usual)
        if finding:
            yield finding


def _is_suspicious(alignment: EdgeAlignment, usual: _UsualAlignment) -> bool:
    """Whether a mask aligns much weaker than usual, or better elsewhere."""
    expected, own_shift = strength_at(alignment, usual.shift), find_strongest_shift(alignment)
    is_weak = (
        expected - 1 < 0.5 * (usual.strength - 1)
        and shift_z_score(alignment, usual.shift) < 0.5 * usual.z_score
    )
    right, down = usual.shift
    exact = float(alignment[down + MAX_SHIFT_PIXELS, right + MAX_SHIFT_PIXELS])
    is_elsewhere = (
        _distance(own_shift, usual.shift) >= 2
        and float(alignment.max()) - 1 > 1.3 * (exact - 1)
        and shift_z_score(alignment, own_shift) >= _MIN_Z_SCORE
    )
    return is_weak or is_elsewhere


def _distance(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(abs(one[0] - other[0]), abs(one[1] - other[1]))


def _find_best_image(suspects: Sequence[_Suspect], k: int) -> tuple[int, float]:
    """Return which suspect's image the mask of suspect ``k`` fits best, and how well."""
    best = (k, 0.0)
    codes = suspects[k].codes
    for j, other in enumerate(suspects):
        if other.image.shape[:2] != codes.shape:
            continue
        alignment = measure_edge_alignment(other.image, codes)
        if alignment is not None and shift_z_score(alignment) > 3:
            best = max(best, (j, strength_at(alignment)), key=lambda found: found[1])
    return best


def _find_best_shift(image: NDArray[Any], codes: CodeMap) -> tuple[tuple[int, int], float]:
    """Return the shift of the mask, up to 32 pixels, with the strongest edges, and how strong."""
    starts = {(0, 0)}
    coarse = measure_edge_alignment(
        image[::_COARSE_FACTOR, ::_COARSE_FACTOR], codes[::_COARSE_FACTOR, ::_COARSE_FACTOR]
    )
    if coarse is not None:
        right, down = find_strongest_shift(coarse)
        starts.add((right * _COARSE_FACTOR, down * _COARSE_FACTOR))
    best = ((0, 0), 0.0)
    H, W = codes.shape
    for right, down in starts:
        inside = (
            slice(abs(down), H - abs(down) or None),
            slice(abs(right), W - abs(right) or None),
        )
        shifted = shift_label(codes, (right, down), 0)
        alignment = measure_edge_alignment(image[inside], shifted[inside])
        if alignment is None:
            continue
        more = find_strongest_shift(alignment)
        strength = strength_at(alignment, more)
        if strength > best[1] and shift_z_score(alignment, more) > 3:
            best = ((right + more[0], down + more[1]), strength)
    return best


def _find_best_turn(image: NDArray[Any], codes: CodeMap) -> tuple[str, float]:
    """Return the orientation of the same size that aligns best, and how well; ``""`` for none."""
    best = ("", 0.0)
    for name, change in ORIENTATIONS.items():
        if change(codes).shape != codes.shape:
            continue
        alignment = measure_edge_alignment(image, change(codes))
        if alignment is not None and shift_z_score(alignment) > _MIN_Z_SCORE:
            best = max(best, (name, strength_at(alignment)), key=lambda found: found[1])
    return best


def _diagnose(
    data: MeasuredDataset,
    suspects: Sequence[_Suspect],
    best_images: Sequence[tuple[int, float]],
    k: int,
    usual: _UsualAlignment,
) -> Finding | None:
    """Return the explanation that makes suspect ``k`` align as masks usually do, if any does."""
    suspect = suspects[k]
    own = strength_at(suspect.alignment, usual.shift)
    required = max(1 + 0.6 * (usual.strength - 1), 1 + 1.25 * (own - 1), 1.08)
    shift, by_shift = _find_best_shift(suspect.image, suspect.codes)
    turn, by_turn = _find_best_turn(suspect.image, suspect.codes)
    j, by_image = best_images[k]
    if j == k:
        by_image = 0.0
    best = max(by_shift, by_image, by_turn)
    if best < required:
        is_lost = shift_z_score(suspect.alignment, usual.shift) < 2
        if own - 1 < 0.3 * (usual.strength - 1) and is_lost:
            return _no_fit(data, suspect)
    elif best == by_image:
        return _mask_of_another_image(data, suspects, best_images, k)
    elif best == by_turn:
        return _turned(data, suspect, turn)
    elif _distance(shift, usual.shift) >= 2:
        return _shifted(data, suspect, shift, usual.shift)
    return None


def _no_fit(data: MeasuredDataset, suspect: _Suspect) -> Finding:
    pair = suspect.measurement.pair
    return Finding(
        NO_FIT_KIND,
        "warning",
        (pair.image, pair.mask),
        f"the class boundaries of mask '{data.name(pair.mask)}' are nowhere near edges of its "
        "image, unlike those of the other masks",
        "check that the mask belongs to this image",
    )


def _turned(data: MeasuredDataset, suspect: _Suspect, turn: str) -> Finding:
    pair = suspect.measurement.pair
    return Finding(
        "turned mask",
        "error",
        (pair.image, pair.mask),
        f"mask '{data.name(pair.mask)}' fits its image when it is {turn}",
        "save the mask in the image's orientation",
        (Repair(pair, f"mask {turn}", transform=orientation_change(turn)),),
        {"turn": turn},
    )


def _shifted(
    data: MeasuredDataset, suspect: _Suspect, shift: tuple[int, int], usual: tuple[int, int]
) -> Finding:
    """Describe the whole shift; the repair leaves the usual one to :func:`check_common_shift`."""
    pair = suspect.measurement.pair
    rest = (shift[0] - usual[0], shift[1] - usual[1])
    return Finding(
        "shifted mask",
        "error",
        (pair.image, pair.mask),
        f"mask '{data.name(pair.mask)}' is shifted against its image: it fits when moved "
        f"{describe_shift(shift)}",
        "correct the mask's position",
        (Repair(pair, f"mask moved {describe_shift(rest)}", transform=shift_change(rest)),),
        {"shift": shift},
    )


def _mask_of_another_image(
    data: MeasuredDataset,
    suspects: Sequence[_Suspect],
    best_images: Sequence[tuple[int, float]],
    k: int,
) -> Finding:
    pair, other = suspects[k].measurement.pair, suspects[best_images[k][0]].measurement
    owners = [j for j, (image, _) in enumerate(best_images) if image == k]
    if len(owners) == 1 and owners[0] != k:
        owner = suspects[owners[0]].measurement
        description = f"mask taken from '{data.pair_name(owner)}', whose mask fits this image"
        repair = Repair(pair, description, mask_source=owner.pair)
    else:
        description = "left out: its mask belongs to another image"
        repair = Repair(pair, description, leave_out=True, is_doubtful=True)
    return Finding(
        "mask of another image",
        "error",
        (pair.image, pair.mask),
        f"mask '{data.name(pair.mask)}' fits the image '{data.pair_name(other)}' and not its own",
        "give each image its own mask",
        (repair,),
        {"fits": other.pair.image},
    )


def check_suspicious_labels(data: MeasuredDataset) -> Iterator[Finding]:
    """List pairs whose labels deserve a review, the most suspicious first.

    Their class boundaries do not match edges of the image, or they have many specks.
    """
    usual = data.once(_find_usual_alignment)
    if usual is None:
        return
    pairs = [
        (each, each.mask)
        for each in data.complete
        if each.alignment is not None and each.mask is not None
    ]
    specks = np.array([mask.specks.number for _, mask in pairs])
    # The numbers of specks differ too much between masks for standard deviations.
    speck_excess = specks / (10 + 4 * np.quantile(specks, 0.9))
    suspicion = _MIN_SUSPICION * speck_excess
    if usual.z_score >= _MIN_Z_SCORE and usual.shift == (0, 0):
        support = [np.log(max(0.1, strength_at(one, usual.shift))) for one in usual.alignments]
        suspicion = np.maximum(suspicion, _robust_z_scores(-np.array(support), 0.03))
    order = [k for k in np.argsort(-suspicion, kind="stable") if suspicion[k] > _MIN_SUSPICION]
    order = order[:_MAX_REVIEWED_PAIRS]
    if not order:
        return
    has_specks = speck_excess > 1
    reasons = [
        f"'{data.name(pairs[k][0].pair.mask)}' ("
        + (
            format_count(int(specks[k]), "tiny spot")
            if has_specks[k]
            else "boundaries without edges"
        )
        + ")"
        for k in order
    ]
    more = f" and {len(order) - 3} more" if len(order) > 3 else ""
    positions = {pairs[k][0].pair.mask: pairs[k][1].specks.first for k in order if has_specks[k]}
    yield Finding(
        "labels to review",
        "warning",
        tuple(pairs[k][0].pair.mask for k in order),
        f"review these labels first: {', '.join(reasons[:3])}{more}",
        "open them and correct what is wrong",
        evidence={"specks": positions},
    )


def _robust_z_scores(values: NDArray[np.float64], min_deviation: float) -> NDArray[np.float64]:
    """Return the robust z-score of each value: its distance above the median in deviations."""
    median = np.median(values)
    deviation = 1.48 * float(np.median(np.abs(values - median)))
    return (values - median) / max(deviation, min_deviation)
