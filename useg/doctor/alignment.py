"""A suspicious pair -> read again and looked at closely: turned, mirrored, moved further, or the mask of another image?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.data.dataset import read_pair_image
from useg.doctor.measure import (
    MAX_SHIFT_PIXELS,
    ORIENTATIONS,
    EdgeAlignment,
    Finding,
    MeasuredDataset,
    Measurement,
    Repair,
    find_strongest_shift,
    measure_edge_alignment,
    orientation_change,
    pluralize,
    read_codes,
    shift_label,
    shift_z_score,
    strength_at,
)
from useg.errors import UsageError

_COARSE = 4  # the factor by which pictures are reduced to find large shifts


def reread_pair(
    case: MeasuredDataset, look: Measurement
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Read a pair's image ``(H, W, C)`` and what its mask stores ``(H, W)``; None when that fails now."""
    try:
        return read_pair_image(look.pair), read_codes(look.pair, case.dataset)
    except UsageError:
        return None


def find_best_orientation(case: MeasuredDataset, look: Measurement, names: Sequence[str]) -> str:
    """Return which of the turns makes the mask fit its image best; the first when nothing shows it."""
    pixels = reread_pair(case, look)
    if pixels is None:
        return names[0]
    fits = {
        name: fitted
        for name in names
        if (fitted := measure_edge_alignment(pixels[0], ORIENTATIONS[name](pixels[1]))) is not None
    }
    return max(fits, key=lambda name: strength_at(fits[name])) if fits else names[0]


def find_best_shift(image: NDArray[Any], codes: NDArray[Any]) -> tuple[tuple[int, int], float]:
    """Return the shift ``(right, down)`` of the mask, up to 32 pixels, with which it fits best, and how well: ``(shift, strength)``."""
    coarse = measure_edge_alignment(image[::_COARSE, ::_COARSE], codes[::_COARSE, ::_COARSE])
    starts = {(0, 0)}
    if coarse is not None:
        right, down = find_strongest_shift(coarse)
        starts.add((right * _COARSE, down * _COARSE))
    best = ((0, 0), 0.0)
    for right, down in starts:
        H, W = codes.shape
        rows, columns = (
            slice(abs(down), H - abs(down) or None),
            slice(abs(right), W - abs(right) or None),
        )
        fitted = measure_edge_alignment(
            image[rows, columns], shift_label(codes, (right, down), 0)[rows, columns]
        )
        if fitted is not None:
            further = find_strongest_shift(fitted)
            strength = strength_at(fitted, further)
            if strength > best[1] and shift_z_score(fitted, further) > 3:
                best = ((right + further[0], down + further[1]), strength)
    return best


def find_best_image(
    pixels: Sequence[tuple[NDArray[Any], NDArray[Any]] | None], which: int
) -> tuple[int, float]:
    """Return which image the mask of pair ``which`` fits best, and how well."""
    own = pixels[which]
    best = (which, 0.0)
    for k, other in enumerate(pixels):
        if own is None or other is None or other[0].shape[:2] != own[1].shape:
            continue
        fitted = measure_edge_alignment(other[0], own[1])
        if fitted is not None and strength_at(fitted) > best[1] and shift_z_score(fitted) > 3:
            best = (k, strength_at(fitted))
    return best


def find_unsupported_boundaries(image: NDArray[Any], codes: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark class boundaries ``(H, W)`` near which the image does not change: the largest step within 2 pixels is no more than its noise."""
    band = image[..., image.shape[2] // 2].astype(np.float32)
    step = np.zeros(band.shape, np.float32)
    step[:, 1:] = np.abs(np.diff(band, axis=1))
    step[1:] = np.maximum(step[1:], np.abs(np.diff(band, axis=0)))
    boundary = np.zeros(codes.shape, bool)
    boundary[:, 1:] = codes[:, 1:] != codes[:, :-1]
    boundary[1:] |= codes[1:] != codes[:-1]
    nearest = np.lib.stride_tricks.sliding_window_view(np.pad(step, 2), (5, 5)).max((2, 3))
    lost: NDArray[np.bool_] = boundary & (nearest <= np.quantile(nearest, 0.3))
    return lost


NO_FIT_KIND = "mask does not fit its image"


_FEW = 6  # pairs: fewer show no custom


_SUSPECTS = 24  # pairs read again, at most


_LIMIT = 5.0  # standard deviations from which on a pair is listed for review


_REVIEWED = 12  # pairs listed for review, at most


_CLEAR = 4.0  # standard deviations by which a fit stands out, at least, to mean anything


@dataclass(frozen=True)
class _Fitted:
    """The pairs with a fit, and what is usual among them: where the masks lie, how strong the edges there are, how clearly."""

    looks: Sequence[Measurement]
    fits: Sequence[EdgeAlignment]
    shift: tuple[int, int]
    strength: float
    clear: float


def check_common_shift(case: MeasuredDataset) -> Iterator[Finding]:
    """All masks moved alike against their images, by 2 pixels or more."""
    fitted = _fitted(case)
    if fitted is None or fitted.shift == (0, 0):
        return
    where = describe_shift(fitted.shift)
    message = f"the masks lie beside their images: moved {where}, {pluralize(len(fitted.looks), 'mask')} fit the edges of their images best"
    cures = tuple(
        Repair(look.pair, f"mask moved {where}", change=shift_change(fitted.shift))
        for look in case.whole
    )
    files = tuple(look.pair.mask for look in fitted.looks)
    yield Finding(
        "shifted masks",
        "error",
        files,
        message,
        "correct the export that made them",
        cures,
        {"shift": fitted.shift},
    )


def check_single_masks(case: MeasuredDataset) -> Iterator[Finding]:
    """Single masks that are moved, turned, or those of another image."""
    fitted = _fitted(case)
    if fitted is None or fitted.clear < _CLEAR:
        return
    suspects = [
        look
        for look, one in zip(fitted.looks, fitted.fits, strict=True)
        if _suspicious(one, fitted)
    ][:_SUSPECTS]
    pixels = [reread_pair(case, look) for look in suspects]
    partners = [find_best_image(pixels, k) for k in range(len(suspects))]
    for k, look in enumerate(suspects):
        yield from _diagnosis(case, look, pixels, partners, k, suspects, fitted)


def _fitted(case: MeasuredDataset) -> _Fitted | None:
    pairs = [(look, look.fit) for look in case.whole if look.fit is not None]
    if len(pairs) < _FEW:
        return None
    fits = np.stack([one for _, one in pairs])
    usual = np.mean(fits, axis=0)
    shift = find_strongest_shift(usual)
    better = float(
        (
            fits[:, shift[1] + MAX_SHIFT_PIXELS, shift[0] + MAX_SHIFT_PIXELS]
            > fits[:, MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS]
        ).mean()
    )
    is_clear = shift_z_score(usual, shift) >= 6 and float(usual.max()) - 1 >= 1.3 * (
        float(usual[MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS]) - 1
    )
    if max(abs(shift[0]), abs(shift[1])) < 2 or better < 0.75 or not is_clear:
        shift = (0, 0)
    strength = float(np.median([strength_at(one, shift) for one in fits]))
    clear = float(np.median([shift_z_score(one, shift) for one in fits]))
    return _Fitted([look for look, _ in pairs], list(fits), shift, strength, clear)


def _suspicious(one: EdgeAlignment, fitted: _Fitted) -> bool:
    here, own = strength_at(one, fitted.shift), find_strongest_shift(one)
    weak = (
        here - 1 < 0.5 * (fitted.strength - 1)
        and shift_z_score(one, fitted.shift) < 0.5 * fitted.clear
    )
    away = max(abs(own[0] - fitted.shift[0]), abs(own[1] - fitted.shift[1]))
    stray = (
        away >= 2
        and float(one.max()) - 1
        > 1.3
        * (float(one[fitted.shift[1] + MAX_SHIFT_PIXELS, fitted.shift[0] + MAX_SHIFT_PIXELS]) - 1)
        and shift_z_score(one, own) >= _CLEAR
    )
    return weak or stray


def _diagnosis(
    case: MeasuredDataset,
    look: Measurement,
    pixels: Sequence[tuple[NDArray[Any], NDArray[Any]] | None],
    partners: Sequence[tuple[int, float]],
    k: int,
    suspects: Sequence[Measurement],
    fitted: _Fitted,
) -> Iterator[Finding]:
    """Try what could have happened to a mask, and believe the best when it makes the mask fit as well as masks here usually do."""
    read = pixels[k]
    if read is None or look.fit is None:
        return
    image, codes = read
    own = strength_at(look.fit, fitted.shift)
    enough = max(1 + 0.6 * (fitted.strength - 1), 1 + 1.25 * (own - 1), 1.08)
    shift, by_shift = find_best_shift(image, codes)
    turns = {
        name: turn(codes) for name, turn in ORIENTATIONS.items() if turn(codes).shape == codes.shape
    }
    turned = {
        name: strength_at(one)
        for name, codes in turns.items()
        if (one := measure_edge_alignment(image, codes)) is not None and shift_z_score(one) > _CLEAR
    }
    turn = max(turned, key=lambda name: turned[name]) if turned else ""
    partner, by_partner = partners[k]
    best = max(by_shift, by_partner if partner != k else 0.0, turned.get(turn, 0.0))
    files, name = (look.pair.image, look.pair.mask), case.name(look.pair.mask)
    if best < enough:
        if own - 1 < 0.3 * (fitted.strength - 1) and shift_z_score(look.fit, fitted.shift) < 2:
            message = f"the edges in the mask '{name}' lie nowhere near edges of its image, unlike those of the other masks"
            yield Finding(
                NO_FIT_KIND, "warning", files, message, "check that the mask belongs to this image"
            )
    elif best == by_partner and partner != k:
        yield _exchanged(case, suspects, partners, k)
    elif best == turned.get(turn):
        cure = Repair(look.pair, f"mask {turn}", change=orientation_change(ORIENTATIONS[turn]))
        message = f"the mask '{name}' fits its image when it is {turn}"
        yield Finding(
            "turned mask",
            "error",
            files,
            message,
            "save the mask in the image's orientation",
            (cure,),
            {"turn": turn},
        )
    elif max(abs(shift[0] - fitted.shift[0]), abs(shift[1] - fitted.shift[1])) >= 2:
        further = (shift[0] - fitted.shift[0], shift[1] - fitted.shift[1])
        cure = Repair(
            look.pair, f"mask moved {describe_shift(further)}", change=shift_change(further)
        )
        message = (
            f"the mask '{name}' lies beside its image: it fits when moved {describe_shift(shift)}"
        )
        yield Finding(
            "shifted mask", "error", files, message, "correct its place", (cure,), {"shift": shift}
        )


def _exchanged(
    case: MeasuredDataset,
    suspects: Sequence[Measurement],
    partners: Sequence[tuple[int, float]],
    k: int,
) -> Finding:
    look, other = suspects[k], suspects[partners[k][0]]
    message = f"the mask '{case.name(look.pair.mask)}' fits the image '{case.called(other)}' and not its own"
    owner = [j for j, (partner, _) in enumerate(partners) if partner == k]
    if len(owner) == 1 and owner[0] != k:
        right = suspects[owner[0]]
        cure = Repair(
            look.pair,
            f"mask taken from '{case.called(right)}', whose mask fits this image",
            source=right.pair,
        )
    else:
        cure = Repair(look.pair, "left out: its mask is that of another image", leave_out=True)
    files = (look.pair.image, look.pair.mask)
    return Finding(
        "mask of another image",
        "error",
        files,
        message,
        "give each image its own mask",
        (cure,),
        {"fits": other.pair.image},
    )


def check_suspicious_labels(case: MeasuredDataset) -> Iterator[Finding]:
    """Pairs whose labels deserve a second look, the most suspicious first: boundaries that no edge supports, many specks."""
    looks = [look for look in case.whole if look.fit is not None and look.mask is not None]
    if len(looks) < _FEW:
        return
    fitted = _fitted(case)
    assert fitted is not None
    support = np.array(
        [
            np.log(max(0.1, strength_at(look.fit, fitted.shift)))
            for look in looks
            if look.fit is not None
        ]
    )
    specks = np.array([look.mask.specks.number for look in looks if look.mask])
    spotted = specks / (
        10 + 4 * np.quantile(specks, 0.9)
    )  # above 1 it is far more than usual; their numbers differ too much for deviations
    suspicion = _LIMIT * spotted
    if fitted.clear >= _CLEAR and fitted.shift == (0, 0):
        suspicion = np.maximum(suspicion, _above(-support, 0.03))
    order = [int(k) for k in np.argsort(-suspicion, kind="stable") if suspicion[k] > _LIMIT][
        :_REVIEWED
    ]
    if not order:
        return
    why = [
        pluralize(int(specks[k]), "tiny spot")
        if spotted[k] > 1
        else "edges that the image does not have"
        for k in order
    ]
    reasons = [
        f"'{case.name(looks[k].pair.mask)}' ({reason})"
        for k, reason in zip(order, why, strict=True)
    ]
    files = tuple(looks[k].pair.mask for k in order)
    more = f" and {len(order) - 3} more" if len(order) > 3 else ""
    message = f"labels to look at first: {', '.join(reasons[:3])}{more}"
    places = {
        looks[k].pair.mask: mask.specks.place
        for k in order
        if (mask := looks[k].mask) is not None and spotted[k] > 1
    }
    yield Finding(
        "labels to review",
        "warning",
        files,
        message,
        "look at them and correct what is wrong",
        evidence={"specks": places},
    )


def _above(values: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """By how many robust standard deviations each value lies above the middle."""
    middle = np.median(values)
    return (values - middle) / max(1.48 * float(np.median(np.abs(values - middle))), least)


def describe_shift(shift: tuple[int, int]) -> str:
    """``(3, -2)`` -> ``"3 pixels right and 2 pixels up"``."""
    right, down = shift
    parts = [pluralize(abs(right), "pixel") + (" right" if right > 0 else " left")] * (right != 0)
    return " and ".join(
        parts + [pluralize(abs(down), "pixel") + (" down" if down > 0 else " up")] * (down != 0)
    )


def shift_change(shift: tuple[int, int]) -> Callable[[Label], Label]:
    """Return what moves a label map; what nothing moved into is ignored."""
    return lambda label: shift_label(label, shift, IGNORE)
