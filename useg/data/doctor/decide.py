"""Looks at every mask -> the class table, where nobody wrote one: damaged masks do not decide what the classes are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import CAMVID, CARLA, CITYSCAPES, ClassTable, Color
from useg.data.dataset import Dataset
from useg.data.doctor.looks import COLOR, Case, Look, MaskLook, translated
from useg.data.values import MOST, Seen, mixes_two_codes, table_of
from useg.errors import UsageError

UNDECIDED = ClassTable(("not decided",), values=((1 << 16) - 1,))  # what a data set has that says nothing of its classes, before its masks are seen
_NEAR = 60  # sum of the differences of three bands: JPEG leaves plain areas that near to their colour
_BETWEEN = 24  # the same, off the straight line between two colours


def undecided(masks: Sequence[tuple[Path, int | None]], ignore: Sequence[int] = (), *, skip_unreadable: bool = True) -> ClassTable:
    """Put the class table off until the masks were seen: for :func:`useg.data.layouts.find`, so that each file is read once."""
    return replace(UNDECIDED, ignore=tuple(ignore))


def decide(dataset: Dataset, looks: Sequence[Look]) -> Case:
    """Complete what was seen by a class table.

    A table that the data set says itself is kept. Otherwise it is derived from the masks; colours and grey levels that only smoothing or JPEG
    made, and codes that a few masks use instead of the others' ids, are left out of it, so that they stand out later.
    """
    if dataset.classes.names != UNDECIDED.names:
        return Case(dataset, tuple(looks))
    masks = [(look, look.mask) for look in looks if look.mask is not None]
    foreign = _in_other_codes([mask for _, mask in masks])
    seen = [_seen(look, mask) for look, mask in masks if id(mask) not in foreign]
    true = _true_colors([mask for _, mask in masks]) if _smeared([mask for _, mask in masks]) else None
    if true is not None:
        seen = [_without(found, true) for found in seen]
    try:
        table = table_of(seen, dataset.classes.ignore)
    except UsageError:
        counts, _ = _totals([mask for _, mask in masks])
        values = tuple(sorted(code for code, _ in counts.most_common(MOST) if 0 <= code < COLOR >> 8)) or (0,)
        table = ClassTable(tuple(f"class {value}" for value in values), values=values)
    table = replace(table, ignore=tuple(dict.fromkeys((*table.ignore, *dataset.classes.ignore))))
    decided = replace(dataset, classes=table)
    return Case(decided, tuple(_as_colors(look) for look in looks) if table.by_color else tuple(looks), guessed=True)


def greys_of(colors: Sequence[Color]) -> dict[int, int]:
    """Return grey level -> id for a palette: what ``convert("L")`` makes of its colours (ITU-R 601-2); of equal levels the first id."""
    greys: dict[int, int] = {}
    for k, (r, g, b) in enumerate(colors):
        greys.setdefault((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16, k)
    return greys


def voc_colors(number: int = 21) -> tuple[Color, ...]:
    """Return the palette of Pascal VOC, whose colours are the bits of the ids, spread over three bands from the highest bit down."""

    def band(k: int, shift: int) -> int:
        return sum(((k >> (3 * bit + shift)) & 1) << (7 - bit) for bit in range(3))

    return tuple((band(k, 0), band(k, 1), band(k, 2)) for k in range(number))


PALETTES: dict[str, Sequence[Color]] = {
    "Pascal VOC": voc_colors(),
    "CamVid": CAMVID.colors,
    "CARLA": CARLA.colors,
    "Cityscapes": CITYSCAPES.colors,
}


def palette_of_greys(values: frozenset[int], palettes: dict[str, Sequence[Color]] = PALETTES) -> str:
    """Name the palette whose colours have exactly such grey levels, or return ``""``; few or small values are no evidence."""
    if len(values - {0}) < 2 or max(values) < 2 * len(values) or values <= {0, 127, 128, 255}:
        return ""
    return next((name for name, colors in palettes.items() if values - {220} <= greys_of(colors).keys()), "")


def _in_other_codes(masks: Sequence[MaskLook]) -> set[int]:
    """Masks that hold 0/255 or a palette's grey levels while the others hold ids; as the ids of the objects."""
    sets = {id(mask): frozenset(mask.codes.tolist()) for mask in masks}
    plain = frozenset[int]().union(*(codes for codes in sets.values() if max(codes, default=0) < 14))
    other = {key for key, codes in sets.items() if max(codes, default=0) >= 14}
    if len(plain) < 2 or not other:
        return set()
    if mixes_two_codes(sets.values()):
        return other
    return {key for key in other if (name := palette_of_greys(sets[key])) and {greys_of(PALETTES[name]).get(code, 0) for code in sets[key]} <= plain}


def _seen(look: Look, mask: MaskLook) -> Seen:
    codes = frozenset(mask.codes.tolist())
    packed = frozenset(_color(code, mask) - COLOR for code in codes)
    triples = {v: (code >> 16 & 255, code >> 8 & 255, code & 255) for v, code in mask.palette.items()}
    return Seen(look.pair.mask, None if max(codes, default=0) >= COLOR else codes, packed, triples)


def _color(code: int, mask: MaskLook) -> int:
    """A code as a colour: a palette is looked up, a grey level has three equal bands."""
    return code if code >= COLOR else mask.palette.get(code, COLOR | min(max(code, 0), 255) * 0x010101)


def _as_colors(look: Look) -> Look:
    if look.mask is None or bool((look.mask.codes >= COLOR).all()):
        return look
    mask = look.mask
    colors = {int(code): _color(int(code), mask) for code in mask.codes}
    codes, place = np.unique(list(colors.values()), return_inverse=True)
    grid = translated(mask.grid, colors, COLOR)
    counts, inner = (np.bincount(place, part).astype(np.int64) for part in (mask.counts, mask.inner))
    return replace(look, mask=replace(mask, codes=codes, counts=counts, inner=inner, grid=grid))


def _totals(masks: Sequence[MaskLook], *, as_colors: bool = False) -> tuple[Counter[int], Counter[int]]:
    """Count each code's pixels in all masks, and those of them that lie inside, away from every edge."""
    totals: Counter[int] = Counter()
    inner: Counter[int] = Counter()
    for mask in masks:
        for code, number, inside in zip(mask.codes.tolist(), mask.counts.tolist(), mask.inner.tolist(), strict=True):
            key = _color(code, mask) if as_colors else code
            totals[key] += number
            inner[key] += inside
    return totals, inner


def _smeared(masks: Sequence[MaskLook]) -> bool:
    """Colours, or grey levels far apart, of which many occur as thin edges only."""
    totals, inner = _totals(masks)
    if len(totals) < 6 or (max(totals) < COLOR and max(totals) < 3 * len(totals) and max(totals) < 200):
        return False
    thin = [code for code, number in totals.items() if inner[code] < 0.3 * number]
    return len(thin) >= max(3, 0.4 * len(totals))


def _true_colors(masks: Sequence[MaskLook]) -> frozenset[int]:
    """Take the frequent codes; a rarer one near a true colour or between two of them came from JPEG or from smoothing."""
    totals, inner = _totals(masks, as_colors=True)
    least = 2e-4 * totals.total()
    true = np.zeros((0, 3))
    found: list[int] = []
    for code, number in totals.most_common():
        if number < least or len(found) >= MOST:
            break
        color = np.array((code >> 16 & 255, code >> 8 & 255, code & 255), float)
        solid = inner[code] >= 0.5 * number and number >= 20 * least
        if (np.abs(true - color).sum(1) <= _NEAR).any() or (not solid and _between(color, true)):
            continue
        true = np.vstack((true, color))
        found.append(code)
    return frozenset(found)


def _between(color: NDArray[np.float64], true: NDArray[np.float64]) -> bool:
    """Tell whether a colour lies on the straight line between two others."""
    one, other = (true[places] for places in np.triu_indices(len(true), 1))
    along = other - one
    share = np.clip(((color - one) * along).sum(1) / np.maximum(1, (along * along).sum(1)), 0, 1)
    return bool((np.abs(one + share[:, None] * along - color).sum(1) <= _BETWEEN).any())


def _without(seen: Seen, true: frozenset[int]) -> Seen:
    codes = frozenset(code for code in seen.codes if COLOR | code in true)
    values = None if seen.values is None else frozenset(v for v in seen.values if COLOR | v * 0x010101 in true)
    return Seen(seen.path, values, codes, seen.colors)
