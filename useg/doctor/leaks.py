"""Pictures that are the same, or nearly: copies, neighbours on both sides of a split, one image with two masks, frames of a film."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from useg.data.splits import find_sequences
from useg.doctor.alignment import reread_pair
from useg.doctor.measure import (
    THUMBNAIL_SHAPE,
    Finding,
    MeasuredDataset,
    Measurement,
    Repair,
    join_with_and,
    pluralize,
)

_SAME_DETAIL, _SAME_SHAPE = (
    0.9,
    0.96,
)  # correlation of thumbnails from which two pictures count as nearly the same


_FILMED = 0.15  # neighbours in a film are more alike than pictures far apart, by at least this correlation


_FILM = 5  # pictures


_CHUNK = 1024


_HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class _Twin:
    """``look`` is nearly ``other``, an earlier one; ``exact``: equal in every pixel; ``agree``: share of equal mask pixels."""

    look: Measurement
    other: Measurement
    exact: bool
    agree: float


def check_duplicates(case: MeasuredDataset) -> Iterator[Finding]:
    """Copies and near copies, within a split and across splits."""
    looks = [look for look in case.looks if look.image is not None and bool(look.image.shape.any())]
    filmed = {look.pair for group in find_video_sequences(case) for look in group}
    across, within = [], []
    for k, j in _nearest(looks, across=True):
        across.append(_compared(case, looks[k], looks[j]))
    for k, j in _nearest(looks, across=False):
        if not (
            looks[k].pair in filmed
            and looks[j].pair in filmed
            and _alike(looks[k], looks[j]) < 0.9999
        ):
            within.append(_compared(case, looks[k], looks[j]))
    for twin in within:
        yield from _within(case, twin)
    yield from _across(case, across)


def _nearest(looks: list[Measurement], *, across: bool) -> Iterator[tuple[int, int]]:
    """Yield each picture that has a near twin with the nearest earlier one of its split, or, ``across``, with every such training picture."""
    if len(looks) < 2:
        return
    detail = np.stack([look.image.detail for look in looks if look.image])
    shape = np.stack([look.image.shape for look in looks if look.image])
    held = np.array([look.pair.split in _HELD_OUT for look in looks])
    train = np.array([look.pair.split == "train" for look in looks])
    split = np.array([look.pair.split for look in looks])
    for start in range(0, len(looks), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(looks)))
        fits = (
            held[rows][:, None] & train
            if across
            else (rows[:, None] > np.arange(len(looks))) & (split[rows][:, None] == split)
        )
        alike = np.where(fits, detail[rows] @ detail.T, -1)
        alike[(alike < _SAME_DETAIL) | (shape[rows] @ shape.T < _SAME_SHAPE)] = -1
        if across:
            yield from ((start + int(row), int(j)) for row, j in np.argwhere(alike > 0))
        else:
            best = alike.argmax(1)
            yield from (
                (start + int(row), int(best[row])) for row in np.flatnonzero(alike.max(1) > 0)
            )


def _alike(one: Measurement, other: Measurement) -> float:
    assert one.image is not None
    assert other.image is not None
    return float(one.image.detail @ other.image.detail)


def _compared(case: MeasuredDataset, look: Measurement, other: Measurement) -> _Twin:
    """Compare closely what the thumbnails say is alike; only pictures that may be equal are read again."""
    assert look.image is not None
    assert other.image is not None
    agree = 1.0
    if look.mask is not None and other.mask is not None:
        agree = float((look.mask.grid == other.mask.grid).mean())
    exact = look.image.size == other.image.size and np.allclose(
        look.image.thumb, other.image.thumb, rtol=1e-6
    )
    if exact:
        one, two = reread_pair(case, look), reread_pair(case, other)
        exact = one is not None and two is not None and np.array_equal(one[0], two[0])
        if one is not None and two is not None and one[1].shape == two[1].shape:
            agree = float((one[1] == two[1]).mean())
    return _Twin(look, other, bool(exact), agree)


def _within(case: MeasuredDataset, twin: _Twin) -> Iterator[Finding]:
    first, second = case.called(twin.other), case.called(twin.look)
    files = (twin.other.pair.image, twin.look.pair.image)
    alike = "the same picture" if twin.exact else "nearly the same picture"
    if twin.agree < 0.9 and (twin.exact or _alike(twin.look, twin.other) > 0.98):
        message = (
            f"'{first}' and '{second}' are {alike}, but {1 - twin.agree:.0%} of their masks differ"
        )
        cures = tuple(
            Repair(look.pair, "left out: the same picture has two different masks", leave_out=True)
            for look in (twin.other, twin.look)
        )
        yield Finding(
            "same image, different masks",
            "error",
            files,
            message,
            "keep the right mask and remove the other pair",
            cures,
        )
        return
    kind = "exact duplicate" if twin.exact else "near duplicate"
    message = f"'{second}' and '{first}' are {alike}{f', both in {twin.look.pair.split}' if twin.look.pair.split else ''}"
    cure = Repair(twin.look.pair, f"left out: {alike} as '{first}'", leave_out=True)
    yield Finding(kind, "warning", files, message, "remove one: it counts twice", (cure,))


def _across(case: MeasuredDataset, found: list[_Twin]) -> Iterator[Finding]:
    """One finding for all: which training pictures show what the held-out ones ask for."""
    if not found:
        return
    exact = sum(twin.exact for twin in found)
    first = max(found, key=lambda twin: _alike(twin.look, twin.other))
    what = "the same picture as" if first.exact else "nearly the same picture as"
    more = (
        f" (and so on: {pluralize(len(found), 'such pair')}, {exact} of them equal in every pixel)"
        if len(found) > 1
        else ""
    )
    message = f"'{case.called(first.look)}' in {first.look.pair.split} is {what} '{case.called(first.other)}' in train{more}"
    gone = dict.fromkeys(twin.other.pair for twin in found)
    num_train = sum(look.pair.split == "train" for look in case.looks)
    if len(gone) <= max(1, num_train // 3):
        cures = tuple(
            Repair(
                pair, "moved from train to gap: nearly the same picture is held out", split="gap"
            )
            for pair in gone
        )
    else:
        cures = tuple(
            Repair(
                twin.look.pair,
                f"moved from {twin.look.pair.split} to gap: training has nearly the same picture",
                split="gap",
            )
            for twin in found
        )
    files = tuple(
        dict.fromkeys(
            path for twin in found for path in (twin.look.pair.image, twin.other.pair.image)
        )
    )
    remedy = "the score measures memory: keep them on one side with a split.csv, or split by blocks"
    yield Finding("near duplicates across splits", "error", files, message, remedy, cures)


def find_video_sequences(case: MeasuredDataset) -> list[list[Measurement]]:
    """Return the sequences, by their names' running numbers, whose neighbours really are more alike than pictures far apart."""
    by_pair = {look.pair: look for look in case.looks if look.image is not None}
    found = []
    for group in find_sequences(case.dataset.pairs):
        looks = [by_pair[pair] for pair in group if pair in by_pair]
        if len(looks) < _FILM:
            continue
        vectors = np.stack([look.image.detail for look in looks if look.image])
        near = np.median((vectors[1:] * vectors[:-1]).sum(1))
        lag = max(2, len(looks) // 2)
        far = np.median(_lagged(vectors, lag))
        if near > min(far + _FILMED, 0.9) and near > 0.1:
            found.append(looks)
    return found


def _lagged(vectors: NDArray[np.float32], lag: int) -> NDArray[np.float32]:
    result: NDArray[np.float32] = (vectors[lag:] * vectors[:-lag]).sum(1)
    return result


def check_video_sequences(case: MeasuredDataset) -> Iterator[Finding]:
    """Frames of a film or slices of a stack; validation that goes on where training stops."""
    groups = find_video_sequences(case)
    number = sum(map(len, groups))
    if number * 2 >= len(case.dataset.pairs):
        made = (
            f"the splits were made so: {case.dataset.splits_by}"
            if case.dataset.splits_by
            else "the splits are not decided yet"
        )
        message = (
            "the names carry running numbers, and neighbours look alike, as frames of a film or slices of a stack do: "
            f"{pluralize(len(groups), 'sequence')} of {number} pictures"
        )
        yield Finding(
            "looks like a film",
            "note",
            (),
            message,
            f"split by blocks or recordings, never at random ({made})",
        )
    touching: list[tuple[Measurement, Measurement]] = []
    for group in groups:
        touching += [
            (b, a) if b.pair.split == "val" else (a, b)
            for a, b in pairwise(group)
            if {a.pair.split, b.pair.split} == {"train", "val"}
        ]
    if touching:
        files = tuple(dict.fromkeys(val.pair.image for val, _ in touching))
        val, train = touching[0]
        places = "stands" if len(files) == 1 else "stand"
        message = (
            f"{pluralize(len(files), 'validation image')} {places} next to a training image of the same sequence, such as '{case.called(val)}' "
            f"next to '{case.called(train)}'"
        )
        remedy = (
            "the score may measure memory; choose the split blocks, or leave a gap with a split.csv"
        )
        cures = tuple(
            Repair(train.pair, "moved from train to gap: its neighbour is held out", split="gap")
            for _, train in touching
        )
        yield Finding(
            "validation beside training",
            "warning",
            files,
            message,
            remedy,
            cures,
            {"beside": train.pair.image},
        )


MAX_RARE_SHARE = 0.005  # share of the counted pixels below which a class is called rare


def sum_class_pixels(
    case: MeasuredDataset, looks: tuple[Measurement, ...] | list[Measurement]
) -> NDArray[np.int64]:
    """Return the pixels ``(256,)`` of each class id in these pairs."""
    return (
        np.sum([case.counts[look.pair] for look in looks], axis=0, dtype=np.int64)
        if looks
        else np.zeros(256, np.int64)
    )


def check_class_pixels(case: MeasuredDataset) -> Iterator[Finding]:
    """Classes without pixels, rare classes, and classes that one side of the split lacks."""
    names = case.dataset.classes.names
    everything = sum_class_pixels(case, case.whole)[: len(names)]
    if not everything.sum():
        return
    shares = everything / everything.sum()
    absent = [name for name, pixels in zip(names, everything, strict=True) if not pixels]
    if absent:
        message = f"no pixel belongs to {join_with_and(absent)}"
        yield Finding(
            "class without pixels",
            "warning",
            (),
            message,
            "add images that show it, or take it out of classes.toml",
        )
    rare = [
        f"{name} ({share:.2%})"
        for name, share in zip(names, shares, strict=True)
        if 0 < share < MAX_RARE_SHARE
    ]
    if rare:
        message = f"rare: less than {MAX_RARE_SHARE:.1%} of the pixels are {join_with_and(rare)}"
        yield Finding(
            "rare class",
            "warning",
            (),
            message,
            "expect low scores there; add images that show them, and read the scores per class",
        )
    parts = {
        split: sum_class_pixels(case, [look for look in case.whole if look.pair.split == split])[
            : len(names)
        ]
        for split in ("train", "val")
    }
    if not all(part.sum() for part in parts.values()):
        return
    for split, other, remedy in (
        ("val", "train", "their scores cannot be measured; hold out other images with a split.csv"),
        (
            "train",
            "val",
            "they cannot be learnt; move images that show them to train with a split.csv",
        ),
    ):
        missing = [
            name
            for name, here, there in zip(names, parts[split], parts[other], strict=True)
            if there and not here
        ]
        if missing:
            kind = (
                "class missing from validation" if split == "val" else "class missing from training"
            )
            yield Finding(
                kind,
                "warning",
                (),
                f"the split {split} has no pixel of {join_with_and(missing)}",
                remedy,
            )


def check_split_shares(case: MeasuredDataset) -> Iterator[Finding]:
    """Classes of which validation pictures show far more, or far less, than training pictures."""
    names = case.dataset.classes.names
    shares = {}
    for split in ("train", "val"):
        counts = np.array(
            [
                case.counts[look.pair][: len(names)]
                for look in case.whole
                if look.pair.split == split
            ]
        )
        if len(counts) < 5:
            return
        shares[split] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    means = {split: part.mean(0) for split, part in shares.items()}
    error = np.sqrt(
        sum(part.var(0, ddof=1) / len(part) for part in shares.values())
    )  # Welch's test, neighbours taken for independent
    apart = np.abs(means["train"] - means["val"])
    low, high = np.minimum(means["train"], means["val"]), np.maximum(means["train"], means["val"])
    found = [
        k
        for k in range(len(names))
        if apart[k] > 6 * max(error[k], 1e-6) and high[k] > 2 * low[k] and high[k] > 0.03
    ]
    if found:
        said = [
            f"{names[k]} ({means['train'][k]:.1%} of train, {means['val'][k]:.1%} of val)"
            for k in found
        ]
        message = f"the splits differ in {join_with_and(said)}"
        remedy = "scores on such a split say little about other pictures; hold out blocks of several places, or say it beside the score"
        yield Finding("splits differ", "warning", (), message, remedy)


_MANY = 20  # pictures from which "always at the same place" means something


def check_constant_region(case: MeasuredDataset) -> Iterator[Finding]:
    """A class that lies at one fixed place in nearly every picture, and hardly elsewhere: a camera car's hood, a frame, a stamp."""
    grids = [case.ids(look.mask.grid) for look in case.whole if look.mask is not None]
    if len(grids) < _MANY:
        return
    for k, name in enumerate(case.dataset.classes.names):
        seen = np.zeros(THUMBNAIL_SHAPE, np.int64)
        for grid in grids:
            seen += grid == k
        region = seen >= 0.95 * len(grids)
        share = float(seen[region].sum() / max(1, seen.sum()))
        size = float(region.mean())
        at_border = region[0].any() or region[-1].any() or region[:, 0].any() or region[:, -1].any()
        if share >= 0.8 and 0.005 <= size <= 0.4 and at_border:
            message = (
                f"{share:.0%} of all {name} pixels are one region that is at the same place in nearly every picture "
                f"({describe_region(region)}, {size:.0%} of it), as a camera's own hood, a frame or a stamp is"
            )
            remedy = (
                f"the score of {name} says little about other {name}: "
                "leave that region out of the score with useg evaluate --ignore-mask, or give it an ignored value"
            )
            yield Finding(
                "constant region",
                "warning",
                (),
                message,
                remedy,
                evidence={"region": region, "class": k},
            )


def describe_region(region: NDArray[np.bool_]) -> str:
    """Say where in the picture a region of the grid lies: ``"at the bottom"``."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    upright = (
        "bottom"
        if rows[0] >= THUMBNAIL_SHAPE[0] / 2
        else "top"
        if rows[-1] < THUMBNAIL_SHAPE[0] / 2
        else ""
    )
    across = (
        "right"
        if columns[0] >= THUMBNAIL_SHAPE[1] / 2
        else "left"
        if columns[-1] < THUMBNAIL_SHAPE[1] / 2
        else ""
    )
    return (
        f"at the {' '.join(filter(None, (upright, across)))}"
        if upright or across
        else "all over it"
    )


def check_exposure(case: MeasuredDataset) -> Iterator[Finding]:
    """Pictures without content, and a few that are far darker or brighter than all others."""
    looks = [(look, look.image) for look in case.looks if look.image is not None]
    if len(looks) < 8:
        return
    means = np.array([float(image.thumb.mean()) for _, image in looks])
    ranges = np.array([float(np.ptp(image.thumb)) for _, image in looks])
    usual, middle = float(np.median(ranges)), float(np.median(means))
    spread = max(1.48 * float(np.median(np.abs(means - middle))), 0.1 * usual, 1e-6)
    blank = [k for k in range(len(looks)) if ranges[k] <= 0.02 * usual]
    odd = [
        k
        for k in range(len(looks))
        if k not in blank and abs(means[k] - middle) > 6 * spread and ranges[k] < 0.5 * usual
    ]
    if usual > 0 and blank and len(blank) <= max(1, len(looks) // 10):
        for k in blank:
            path = looks[k][0].pair.image
            cure = Repair(looks[k][0].pair, "left out: the image is blank", leave_out=True)
            message = f"'{case.name(path)}' is blank: one {'dark' if means[k] < middle else 'bright'} tone all over"
            yield Finding(
                "blank image",
                "error",
                (path,),
                message,
                "remove the pair, or take the right picture",
                (cure,),
            )
    if odd and len(odd) <= max(1, len(looks) // 20):
        files = tuple(looks[k][0].pair.image for k in odd)
        tone = "darker" if means[odd[0]] < middle else "brighter"
        more = f" ({pluralize(len(odd), 'such picture')})" if len(odd) > 1 else ""
        message = (
            f"'{case.name(files[0])}' is far {tone} than all others, with little contrast{more}"
        )
        yield Finding(
            "odd exposure", "warning", files, message, "check that it shows what its mask says"
        )
