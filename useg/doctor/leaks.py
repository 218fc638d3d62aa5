"""Check for images that occur twice, and for leaks between splits: copies, crops, video frames.

Scores are too high if held-out images have near duplicates in the training set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import Pair
from useg.data.duplicates import (
    MAX_COMPARED_PAIRS,
    MIN_REPORTED_CORRELATION,
    find_near_duplicates,
    find_overlaps,
    find_turned_copies,
)
from useg.data.splits import find_sequences
from useg.doctor.alignment import reread_pair
from useg.doctor.measure import (
    Finding,
    MeasuredDataset,
    Measurement,
    Repair,
)
from useg.errors import format_count

# Frames of a video are duplicates only from this correlation on: neighbours are always similar.
_MIN_FRAME_CORRELATION = 0.9999

# Masks of one image contradict each other if a smaller share of their pixels agrees.
_MIN_MASK_AGREEMENT = 0.9

_HELD_OUT_SPLITS = ("val", "test")

# A numbered sequence of that many images is a video if neighbours correlate by that much more than
# images far apart.
_MIN_VIDEO_IMAGES = 5
_MIN_VIDEO_CORRELATION_GAIN = 0.15


@dataclass(frozen=True)
class _Duplicate:
    """A near duplicate of another image.

    Args:
        measurement: the pair.
        original: the other pair: an earlier one, or one of the training split.
        correlation: of the two images.
        is_exact: all pixels of the images are equal.
        mask_agreement: share of equal mask pixels.
    """

    measurement: Measurement
    original: Measurement
    correlation: float
    is_exact: bool
    mask_agreement: float


def check_duplicates(data: MeasuredDataset) -> Iterator[Finding]:
    """Find exact and near duplicates within a split and across splits.

    Near duplicates are defined in :mod:`useg.data.duplicates`, and splits of useg keep them
    together. Only pairs with a higher correlation are reported.
    """
    measured = [(each, each.image) for each in data.measurements if each.image is not None]
    if len(measured) < 2:
        return
    signatures = np.stack([image.signature for _, image in measured])
    splits = np.array([each.pair.split for each, _ in measured])
    frames = {each.pair for group in data.once(find_video_sequences) for each in group}
    across = []
    for k, earlier, correlations in find_near_duplicates(signatures, MIN_REPORTED_CORRELATION):
        each = measured[k][0]
        is_same_split = splits[earlier] == splits[k]
        if is_same_split.any():
            best = int(np.where(is_same_split, correlations, -1).argmax())
            original, correlation = measured[earlier[best]][0], float(correlations[best])
            are_frames = each.pair in frames and original.pair in frames
            if not are_frames or correlation >= _MIN_FRAME_CORRELATION:
                yield _within_split(data, _compare(data, each, original, correlation))
        is_leak = _is_held_out(splits[k]) & (splits[earlier] == "train")
        is_leak |= (splits[k] == "train") & _is_held_out(splits[earlier])
        across += [
            (*sorted((k, int(earlier[n])), key=lambda i: splits[i] == "train"), correlations[n])
            for n in np.flatnonzero(is_leak)
        ]
    if across:
        found = [
            _compare(data, measured[held_out][0], measured[train][0], float(correlation))
            for held_out, train, correlation in sorted(across)
        ]
        yield _across_splits(data, found)


def _is_held_out(split: NDArray[np.str_]) -> NDArray[np.bool_]:
    return np.isin(split, _HELD_OUT_SPLITS)


def _compare(
    data: MeasuredDataset, each: Measurement, original: Measurement, correlation: float
) -> _Duplicate:
    """Compare near duplicates pixel by pixel, but only read files that may be equal."""
    assert each.image is not None
    assert original.image is not None
    agreement = 1.0
    if each.mask is not None and original.mask is not None:
        agreement = float((each.mask.code_grid == original.mask.code_grid).mean())
    is_exact = each.image.size == original.image.size and np.allclose(
        each.image.thumbnail, original.image.thumbnail, rtol=1e-6
    )
    if is_exact:
        one, other = reread_pair(data, each), reread_pair(data, original)
        is_exact = one is not None and other is not None and np.array_equal(one[0], other[0])
        if one is not None and other is not None and one[1].shape == other[1].shape:
            agreement = float((one[1] == other[1]).mean())
    return _Duplicate(each, original, correlation, bool(is_exact), agreement)


def _within_split(data: MeasuredDataset, found: _Duplicate) -> Finding:
    pair, original = found.measurement.pair, found.original.pair
    name, original_name = data.pair_name(found.measurement), data.pair_name(found.original)
    files = (original.image, pair.image)
    similarity = "the same image" if found.is_exact else "nearly the same image"
    if found.mask_agreement < _MIN_MASK_AGREEMENT:
        description = "left out: the same image has two different masks"
        return Finding(
            "same image, different masks",
            "error" if found.is_exact else "warning",
            files,
            f"'{original_name}' and '{name}' are {similarity}, but "
            f"{100 * (1 - found.mask_agreement):.0f} % of their masks differ",
            "keep the right mask and remove the other pair",
            tuple(
                Repair(each, description, leave_out=True, is_doubtful=True)
                for each in (original, pair)
            ),
            {"pairs": ((original, pair),)},
        )
    where = f", both in {pair.split}" if pair.split else ""
    return Finding(
        "exact duplicate" if found.is_exact else "near duplicate",
        "warning",
        files,
        f"'{name}' and '{original_name}' are {similarity}{where}",
        "remove one of them: otherwise it counts twice"
        if found.is_exact
        else "compare them: if they are copies, remove one, or it counts twice",
        (
            Repair(
                pair,
                f"left out: {similarity} as '{original_name}'",
                leave_out=True,
                is_doubtful=not found.is_exact,
            ),
        ),
        {"pairs": ((original, pair),)},
    )


def check_hidden_copies(data: MeasuredDataset) -> Iterator[Finding]:
    """Find held-out images that are crops, or mirrored or rotated copies, of training images.

    Crops are found by equal pixels. Frames of one video are left to :func:`check_video_sequences`.
    """
    frames = {each.pair for group in data.once(find_video_sequences) for each in group}
    held_out, training = (
        [
            (each, each.image)
            for each in data.measurements
            if each.image is not None and each.pair.split in splits
        ]
        for splits in (_HELD_OUT_SPLITS, ("train",))
    )

    def list_copies(found: Sequence[tuple[int, int, float]]) -> list[_Duplicate]:
        both = ((held_out[k][0], training[n][0], share) for k, n, share in found)
        return [
            _Duplicate(one, other, share, False, 1.0)
            for one, other, share in both
            if not {one.pair, other.pair} <= frames
        ]

    overlaps = list_copies(
        find_overlaps(*([image.landmarks for _, image in side] for side in (held_out, training)))
    )
    if overlaps:
        yield _hidden_copies(
            data,
            overlaps,
            "overlap across splits",
            "show the same pixels at different places, like crops or overlapping tiles of one "
            "image",
            "an overlapping image",
        )
    if not held_out or not training or len(data.measurements) > MAX_COMPARED_PAIRS:
        return
    one, other = (np.stack([image.signature for _, image in side]) for side in (held_out, training))
    turned = list_copies(find_turned_copies(one, other, MIN_REPORTED_CORRELATION))
    if turned:
        yield _hidden_copies(
            data,
            turned,
            "turned copies across splits",
            "are nearly the same image, mirrored or rotated",
            "a mirrored or rotated copy",
        )


def _hidden_copies(
    data: MeasuredDataset, found: Sequence[_Duplicate], kind: str, how: str, what: str
) -> Finding:
    """Report held-out images that are copies of training images in another form."""
    first = max(found, key=lambda each: each.correlation)
    more = f" ({format_count(len(found), 'such pair')})" if len(found) > 1 else ""
    return Finding(
        kind,
        "warning" if data.dataset.splits_by.startswith(_OWN_SPLITS) else "error",
        tuple(
            dict.fromkeys(
                path
                for each in found
                for path in (each.measurement.pair.image, each.original.pair.image)
            )
        ),
        f"'{data.pair_name(first.measurement)}' in {first.measurement.pair.split} and "
        f"'{data.pair_name(first.original)}' in train {how}{more}",
        "the score would measure memorisation: keep all copies and crops of an image in one split "
        "with a split.csv",
        tuple(_separate(data, found, what)),
    )


# How the description of a split made by useg begins.
_OWN_SPLITS = ("blocks", "groups", "random", "stratified")


def _across_splits(data: MeasuredDataset, found: Sequence[_Duplicate]) -> Finding:
    """Report all held-out images that have near duplicates in training, in one finding."""
    first = max(found, key=lambda each: each.correlation)
    similarity = "the same image as" if first.is_exact else "nearly the same image as"
    num_exact = sum(each.is_exact for each in found)
    more = f" ({format_count(len(found), 'such pair')}, {num_exact} of them equal in every pixel)"
    files = dict.fromkeys(
        path for each in found for path in (each.measurement.pair.image, each.original.pair.image)
    )
    # The user did not choose a split that useg made, so training need not stop for it.
    is_own = data.dataset.splits_by.startswith(_OWN_SPLITS) and not num_exact
    return Finding(
        "near duplicates across splits",
        "warning" if is_own else "error",
        tuple(files),
        f"'{data.pair_name(first.measurement)}' in {first.measurement.pair.split} is {similarity} "
        f"'{data.pair_name(first.original)}' in train{more if len(found) > 1 else ''}",
        "the score would measure memorisation: keep them in one split with a split.csv, or split "
        "by blocks",
        tuple(_separate(data, found)),
        {
            "pairs": tuple(
                (each.original.pair, each.measurement.pair)
                for each in sorted(found, key=lambda each: -each.correlation)
            )
        },
    )


def _separate(
    data: MeasuredDataset, found: Sequence[_Duplicate], what: str = "nearly the same image"
) -> Iterator[Repair]:
    """Move the training images to the gap; if these are over a third, the held-out images."""
    training = dict.fromkeys(each.original.pair for each in found)
    num_train = sum(each.pair.split == "train" for each in data.measurements)
    if len(training) <= max(1, num_train // 3):
        description = f"moved from train to gap: {what} is held out"
        yield from (Repair(pair, description, split="gap") for pair in training)
    else:
        for each in found:
            pair = each.measurement.pair
            description = f"moved from {pair.split} to gap: training has {what}"
            yield Repair(pair, description, split="gap")


def find_video_sequences(data: MeasuredDataset) -> list[list[Measurement]]:
    """Return sequences of numbered files in which neighbours are more similar than others."""
    by_pair = {each.pair: each for each in data.measurements if each.image is not None}
    found = []
    for group in find_sequences(data.dataset.pairs):
        frames = [by_pair[pair] for pair in group if pair in by_pair]
        if len(frames) < _MIN_VIDEO_IMAGES:
            continue
        detail = np.stack([each.image.thumbnail_detail for each in frames if each.image])
        near = _median_correlation(detail, 1)
        far = _median_correlation(detail, max(2, len(frames) // 2))
        if near > min(far + _MIN_VIDEO_CORRELATION_GAIN, 0.9) and near > 0.1:
            found.append(frames)
    return found


def _median_correlation(vectors: NDArray[np.float32], lag: int) -> float:
    """Return the median correlation of vectors ``(N, D)`` that are ``lag`` rows apart."""
    return float(np.median((vectors[lag:] * vectors[:-lag]).sum(1)))


def check_video_sequences(data: MeasuredDataset) -> Iterator[Finding]:
    """Find video frames or slices of a stack, and splits that separate neighbours."""
    groups = data.once(find_video_sequences)
    number = sum(map(len, groups))
    splits_by = data.dataset.splits_by
    if number * 2 >= len(data.dataset.pairs):
        yield Finding(
            "looks like a film",
            "note",
            (),
            "file names are numbered and neighbours look alike, as in the frames of a "
            f"video or the slices of a stack: {format_count(len(groups), 'sequence')}, "
            f"{number} images",
            "split by blocks or recordings, never at random "
            f"({f'current split: {splits_by}' if splits_by else 'not split yet'})",
        )
    touching: list[tuple[Pair, Pair]] = []
    for group in groups:
        for one, other in pairwise(each.pair for each in group):
            if {one.split, other.split} == {"train", "val"}:
                touching.append((other, one) if other.split == "val" else (one, other))
    if touching:
        yield _touching_splits(data, touching)


def _touching_splits(data: MeasuredDataset, touching: Sequence[tuple[Pair, Pair]]) -> Finding:
    """Report (validation, training) pairs that are neighbours in a sequence."""
    files = tuple(dict.fromkeys(val.image for val, _ in touching))
    val, train = touching[0]
    description = "moved from train to gap: its neighbour is held out"
    return Finding(
        "validation beside training",
        "warning",
        files,
        f"{format_count(len(files), 'validation image')} {'is' if len(files) == 1 else 'are'} next "
        f"to a training image of the same sequence, such as '{data.name(val.image)}' next to "
        f"'{data.name(train.image)}'",
        "the score may measure memorisation: split by blocks, or leave a gap with a split.csv",
        tuple(Repair(train, description, split="gap") for _, train in touching),
        {"beside": train.image},
    )
