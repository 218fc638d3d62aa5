"""Pictures that are the same, or nearly: copies, neighbours on both sides of a split, one image with two masks, frames of a film."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from useg.data.doctor.closer import read_again
from useg.data.doctor.finding import Cure, Finding, count
from useg.data.doctor.looks import Case, Look
from useg.data.splits import sequences

_SAME_DETAIL, _SAME_SHAPE = 0.9, 0.96  # correlation of thumbnails from which two pictures count as nearly the same
_FILMED = 0.15  # neighbours in a film are more alike than pictures far apart, by at least this correlation
_FILM = 5  # pictures
_CHUNK = 1024
_HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class _Twin:
    """``look`` is nearly ``other``, an earlier one; ``exact``: equal in every pixel; ``agree``: share of equal mask pixels."""

    look: Look
    other: Look
    exact: bool
    agree: float


def twins(case: Case) -> Iterator[Finding]:
    """Copies and near copies, within a split and across splits."""
    looks = [look for look in case.looks if look.image is not None and bool(look.image.shape.any())]
    filmed = {look.pair for group in films(case) for look in group}
    across, within = [], []
    for k, j in _nearest(looks, across=True):
        across.append(_compared(case, looks[k], looks[j]))
    for k, j in _nearest(looks, across=False):
        if not (looks[k].pair in filmed and looks[j].pair in filmed and _alike(looks[k], looks[j]) < 0.9999):
            within.append(_compared(case, looks[k], looks[j]))
    for twin in within:
        yield from _within(case, twin)
    yield from _across(case, across)


def _nearest(looks: list[Look], *, across: bool) -> Iterator[tuple[int, int]]:
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
        fits = held[rows][:, None] & train if across else (rows[:, None] > np.arange(len(looks))) & (split[rows][:, None] == split)
        alike = np.where(fits, detail[rows] @ detail.T, -1)
        alike[(alike < _SAME_DETAIL) | (shape[rows] @ shape.T < _SAME_SHAPE)] = -1
        if across:
            yield from ((start + int(row), int(j)) for row, j in np.argwhere(alike > 0))
        else:
            best = alike.argmax(1)
            yield from ((start + int(row), int(best[row])) for row in np.flatnonzero(alike.max(1) > 0))


def _alike(one: Look, other: Look) -> float:
    assert one.image is not None
    assert other.image is not None
    return float(one.image.detail @ other.image.detail)


def _compared(case: Case, look: Look, other: Look) -> _Twin:
    """Compare closely what the thumbnails say is alike; only pictures that may be equal are read again."""
    assert look.image is not None
    assert other.image is not None
    agree = 1.0
    if look.mask is not None and other.mask is not None:
        agree = float((look.mask.grid == other.mask.grid).mean())
    exact = look.image.size == other.image.size and np.allclose(look.image.thumb, other.image.thumb, rtol=1e-6)
    if exact:
        one, two = read_again(case, look), read_again(case, other)
        exact = one is not None and two is not None and np.array_equal(one[0], two[0])
        if one is not None and two is not None and one[1].shape == two[1].shape:
            agree = float((one[1] == two[1]).mean())
    return _Twin(look, other, bool(exact), agree)


def _within(case: Case, twin: _Twin) -> Iterator[Finding]:
    first, second = case.called(twin.other), case.called(twin.look)
    files = (twin.other.pair.image, twin.look.pair.image)
    alike = "the same picture" if twin.exact else "nearly the same picture"
    if twin.agree < 0.9 and (twin.exact or _alike(twin.look, twin.other) > 0.98):
        message = f"'{first}' and '{second}' are {alike}, but {1 - twin.agree:.0%} of their masks differ"
        cures = tuple(Cure(look.pair, "left out: the same picture has two different masks", leave_out=True) for look in (twin.other, twin.look))
        yield Finding("same image, different masks", "error", files, message, "keep the right mask and remove the other pair", cures)
        return
    kind = "exact duplicate" if twin.exact else "near duplicate"
    message = f"'{second}' and '{first}' are {alike}{f', both in {twin.look.pair.split}' if twin.look.pair.split else ''}"
    cure = Cure(twin.look.pair, f"left out: {alike} as '{first}'", leave_out=True)
    yield Finding(kind, "warning", files, message, "remove one: it counts twice", (cure,))


def _across(case: Case, found: list[_Twin]) -> Iterator[Finding]:
    """One finding for all: which training pictures show what the held-out ones ask for."""
    if not found:
        return
    exact = sum(twin.exact for twin in found)
    first = max(found, key=lambda twin: _alike(twin.look, twin.other))
    what = "the same picture as" if first.exact else "nearly the same picture as"
    more = f" (and so on: {count(len(found), 'such pair')}, {exact} of them equal in every pixel)" if len(found) > 1 else ""
    message = f"'{case.called(first.look)}' in {first.look.pair.split} is {what} '{case.called(first.other)}' in train{more}"
    gone = dict.fromkeys(twin.other.pair for twin in found)
    num_train = sum(look.pair.split == "train" for look in case.looks)
    if len(gone) <= max(1, num_train // 3):
        cures = tuple(Cure(pair, "moved from train to gap: nearly the same picture is held out", split="gap") for pair in gone)
    else:
        cures = tuple(
            Cure(twin.look.pair, f"moved from {twin.look.pair.split} to gap: training has nearly the same picture", split="gap") for twin in found
        )
    files = tuple(dict.fromkeys(path for twin in found for path in (twin.look.pair.image, twin.other.pair.image)))
    remedy = "the score measures memory: keep them on one side with a split.csv, or split by blocks"
    yield Finding("near duplicates across splits", "error", files, message, remedy, cures)


def films(case: Case) -> list[list[Look]]:
    """Return the sequences, by their names' running numbers, whose neighbours really are more alike than pictures far apart."""
    by_pair = {look.pair: look for look in case.looks if look.image is not None}
    found = []
    for group in sequences(case.dataset.pairs):
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


def film(case: Case) -> Iterator[Finding]:
    """Frames of a film or slices of a stack; validation that goes on where training stops."""
    groups = films(case)
    number = sum(map(len, groups))
    if number * 2 >= len(case.dataset.pairs):
        made = f"the splits were made so: {case.dataset.splits_by}" if case.dataset.splits_by else "the splits are not decided yet"
        message = (
            "the names carry running numbers, and neighbours look alike, as frames of a film or slices of a stack do: "
            f"{count(len(groups), 'sequence')} of {number} pictures"
        )
        yield Finding("looks like a film", "note", (), message, f"split by blocks or recordings, never at random ({made})")
    touching: list[tuple[Look, Look]] = []
    for group in groups:
        touching += [(b, a) if b.pair.split == "val" else (a, b) for a, b in pairwise(group) if {a.pair.split, b.pair.split} == {"train", "val"}]
    if touching:
        files = tuple(dict.fromkeys(val.pair.image for val, _ in touching))
        val, train = touching[0]
        places = "stands" if len(files) == 1 else "stand"
        message = (
            f"{count(len(files), 'validation image')} {places} next to a training image of the same sequence, such as '{case.called(val)}' "
            f"next to '{case.called(train)}'"
        )
        remedy = "the score may measure memory; choose the split blocks, or leave a gap with a split.csv"
        cures = tuple(Cure(train.pair, "moved from train to gap: its neighbour is held out", split="gap") for _, train in touching)
        yield Finding("validation beside training", "warning", files, message, remedy, cures, {"beside": train.pair.image})
