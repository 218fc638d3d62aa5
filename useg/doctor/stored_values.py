"""Looks at every mask -> the class table, where nobody wrote one: damaged masks do not decide what the classes are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import CAMVID, CARLA, CITYSCAPES, IGNORE, ClassTable, Color, Label
from useg.data.dataset import Dataset, read_label
from useg.data.masks import MAX_CLASS_VALUES, MaskContent, derive_class_table, mixes_two_encodings
from useg.doctor.damage import detect_file_format
from useg.doctor.measure import (
    COLOR_FLAG,
    Finding,
    MaskMeasurement,
    MeasuredDataset,
    Measurement,
    Repair,
    join_with_and,
    map_codes,
    pluralize,
)
from useg.errors import UsageError

PLACEHOLDER_CLASSES = ClassTable(
    ("not decided",), values=((1 << 16) - 1,)
)  # what a data set has that says nothing of its classes, before its masks are seen


_NEAR = (
    60  # sum of the differences of three bands: JPEG leaves plain areas that near to their colour
)


_BETWEEN = 24  # the same, off the straight line between two colours


def defer_classes(
    masks: Sequence[tuple[Path, int | None]],
    ignore: Sequence[int] = (),
    *,
    skip_unreadable: bool = True,
) -> ClassTable:
    """Put the class table off until the masks were seen: for :func:`useg.data.layouts.find_dataset`, so that each file is read once."""
    return replace(PLACEHOLDER_CLASSES, ignore=tuple(ignore))


def decide_classes(dataset: Dataset, looks: Sequence[Measurement]) -> MeasuredDataset:
    """Complete what was seen by a class table.

    A table that the data set says itself is kept. Otherwise it is derived from the masks; colours and grey levels that only smoothing or JPEG
    made, and codes that a few masks use instead of the others' ids, are left out of it, so that they stand out later.
    """
    if dataset.classes.names != PLACEHOLDER_CLASSES.names:
        return MeasuredDataset(dataset, tuple(looks))
    masks = [(look, look.mask) for look in looks if look.mask is not None]
    foreign = _in_other_codes([mask for _, mask in masks])
    seen = [_seen(look, mask) for look, mask in masks if id(mask) not in foreign]
    true = (
        _true_colors([mask for _, mask in masks]) if _smeared([mask for _, mask in masks]) else None
    )
    if true is not None:
        seen = [_without(found, true) for found in seen]
    try:
        table = derive_class_table(seen, dataset.classes.ignore)
    except UsageError:
        counts, _ = _totals([mask for _, mask in masks])
        values = tuple(
            sorted(
                code
                for code, _ in counts.most_common(MAX_CLASS_VALUES)
                if 0 <= code < COLOR_FLAG >> 8
            )
        ) or (0,)
        table = ClassTable(tuple(f"class {value}" for value in values), values=values)
    table = replace(table, ignore=tuple(dict.fromkeys((*table.ignore, *dataset.classes.ignore))))
    decided = replace(dataset, classes=table)
    return MeasuredDataset(
        decided,
        tuple(_as_colors(look) for look in looks) if table.by_color else tuple(looks),
        guessed=True,
    )


def grey_levels(colors: Sequence[Color]) -> dict[int, int]:
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


KNOWN_PALETTES: dict[str, Sequence[Color]] = {
    "Pascal VOC": voc_colors(),
    "CamVid": CAMVID.colors,
    "CARLA": CARLA.colors,
    "Cityscapes": CITYSCAPES.colors,
}


def match_grey_palette(
    values: frozenset[int], palettes: dict[str, Sequence[Color]] = KNOWN_PALETTES
) -> str:
    """Name the palette whose colours have exactly such grey levels, or return ``""``; few or small values are no evidence."""
    if len(values - {0}) < 2 or max(values) < 2 * len(values) or values <= {0, 127, 128, 255}:
        return ""
    return next(
        (name for name, colors in palettes.items() if values - {220} <= grey_levels(colors).keys()),
        "",
    )


def _in_other_codes(masks: Sequence[MaskMeasurement]) -> set[int]:
    """Masks that hold 0/255 or a palette's grey levels while the others hold ids; as the ids of the objects."""
    sets = {id(mask): frozenset(mask.codes.tolist()) for mask in masks}
    plain = frozenset[int]().union(
        *(codes for codes in sets.values() if max(codes, default=0) < 14)
    )
    other = {key for key, codes in sets.items() if max(codes, default=0) >= 14}
    if len(plain) < 2 or not other:
        return set()
    if mixes_two_encodings(sets.values()):
        return other
    return {
        key
        for key in other
        if (name := match_grey_palette(sets[key]))
        and {grey_levels(KNOWN_PALETTES[name]).get(code, 0) for code in sets[key]} <= plain
    }


def _seen(look: Measurement, mask: MaskMeasurement) -> MaskContent:
    codes = frozenset(mask.codes.tolist())
    packed = frozenset(_color(code, mask) - COLOR_FLAG for code in codes)
    triples = {
        v: (code >> 16 & 255, code >> 8 & 255, code & 255) for v, code in mask.palette.items()
    }
    return MaskContent(
        look.pair.mask, None if max(codes, default=0) >= COLOR_FLAG else codes, packed, triples
    )


def _color(code: int, mask: MaskMeasurement) -> int:
    """A code as a colour: a palette is looked up, a grey level has three equal bands."""
    return (
        code
        if code >= COLOR_FLAG
        else mask.palette.get(code, COLOR_FLAG | min(max(code, 0), 255) * 0x010101)
    )


def _as_colors(look: Measurement) -> Measurement:
    if look.mask is None or bool((look.mask.codes >= COLOR_FLAG).all()):
        return look
    mask = look.mask
    colors = {int(code): _color(int(code), mask) for code in mask.codes}
    codes, place = np.unique(list(colors.values()), return_inverse=True)
    grid = map_codes(mask.grid, colors, COLOR_FLAG)
    counts, inner = (
        np.bincount(place, part).astype(np.int64) for part in (mask.counts, mask.inner)
    )
    return replace(look, mask=replace(mask, codes=codes, counts=counts, inner=inner, grid=grid))


def _totals(
    masks: Sequence[MaskMeasurement], *, as_colors: bool = False
) -> tuple[Counter[int], Counter[int]]:
    """Count each code's pixels in all masks, and those of them that lie inside, away from every edge."""
    totals: Counter[int] = Counter()
    inner: Counter[int] = Counter()
    for mask in masks:
        for code, number, inside in zip(
            mask.codes.tolist(), mask.counts.tolist(), mask.inner.tolist(), strict=True
        ):
            key = _color(code, mask) if as_colors else code
            totals[key] += number
            inner[key] += inside
    return totals, inner


def _smeared(masks: Sequence[MaskMeasurement]) -> bool:
    """Colours, or grey levels far apart, of which many occur as thin edges only."""
    totals, inner = _totals(masks)
    if len(totals) < 6 or (
        max(totals) < COLOR_FLAG and max(totals) < 3 * len(totals) and max(totals) < 200
    ):
        return False
    thin = [code for code, number in totals.items() if inner[code] < 0.3 * number]
    return len(thin) >= max(3, 0.4 * len(totals))


def _true_colors(masks: Sequence[MaskMeasurement]) -> frozenset[int]:
    """Take the frequent codes; a rarer one near a true colour or between two of them came from JPEG or from smoothing."""
    totals, inner = _totals(masks, as_colors=True)
    least = 2e-4 * totals.total()
    true = np.zeros((0, 3))
    found: list[int] = []
    for code, number in totals.most_common():
        if number < least or len(found) >= MAX_CLASS_VALUES:
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


def _without(seen: MaskContent, true: frozenset[int]) -> MaskContent:
    codes = frozenset(code for code in seen.codes if COLOR_FLAG | code in true)
    values = (
        None
        if seen.values is None
        else frozenset(v for v in seen.values if COLOR_FLAG | v * 0x010101 in true)
    )
    return MaskContent(seen.path, values, codes, seen.colors)


_UNSURE = 254  # the id that a mask's smeared pixels have until their neighbours decide


_FEW = 8  # masks: fewer show no custom to deviate from


def check_mask_values(case: MeasuredDataset) -> Iterator[Finding]:
    """Masks with codes that the class table does not have: what they are, and what each stands for."""
    for look in case.looks:
        if look.mask is None:
            continue
        unknown = look.mask.codes[case.ids(look.mask.codes) < 0]
        if len(unknown):
            yield (
                _two_codes(case, look, look.mask)
                or _greys(case, look, look.mask)
                or _smeared_stored(case, look, look.mask, unknown)
                or _unknown(case, look)
            )


def _two_codes(case: MeasuredDataset, look: Measurement, mask: MaskMeasurement) -> Finding | None:
    own, table = set(mask.codes.tolist()), case.dataset.classes
    high = max(table.values) if len(table) == 2 and not table.by_color else 0
    if (
        high not in (1, IGNORE)
        or min(table.values) != 0
        or not own <= {0, IGNORE if high == 1 else 1}
    ):
        return None
    other = IGNORE if high == 1 else 1
    message = f"the mask '{case.name(look.pair.mask)}' holds 0 and {other} where the others hold 0 and {high}: one class has two values"
    cure = Repair(look.pair, f"mask: {other} became class 1", ids={other: 1})
    return Finding(
        "two values for one class",
        "error",
        (look.pair.mask,),
        message,
        f"save it with {high} in place of {other}",
        (cure,),
    )


def _greys(case: MeasuredDataset, look: Measurement, mask: MaskMeasurement) -> Finding | None:
    table = case.dataset.classes
    own = frozenset(mask.codes.tolist())
    if table.by_color or max(own) >= COLOR_FLAG:
        return None
    name = match_grey_palette(
        own, {"the data set's own palette": table.colors} | dict(KNOWN_PALETTES)
    )
    if not name:
        return None
    greys = grey_levels(KNOWN_PALETTES.get(name, table.colors))
    ids = {
        code: int(case.ids(np.array([greys.get(code, IGNORE)]))[0])
        if name in KNOWN_PALETTES
        else greys[code]
        for code in own
    }
    if min(ids.values()) < 0:
        return None
    shown = join_with_and(sorted(own)[:5])
    message = f"the mask '{case.name(look.pair.mask)}' holds {shown}: the grey levels of {name}'s colours, not ids (as .convert(\"L\") leaves them)"
    cure = Repair(
        look.pair,
        "mask: grey levels of a palette became ids "
        + join_with_and([ids[code] for code in sorted(own)]),
        ids=ids,
    )
    return Finding(
        "grey levels of a palette",
        "error",
        (look.pair.mask,),
        message,
        "save the palette picture's indices instead",
        (cure,),
    )


def _smeared_stored(
    case: MeasuredDataset, look: Measurement, mask: MaskMeasurement, unknown: NDArray[np.int64]
) -> Finding | None:
    table = case.dataset.classes
    rank = {
        int(code): int(k)
        for code, k in zip(mask.codes, case.ids(mask.codes), strict=True)
        if k >= 0
    }
    stored = _points(np.array(list(rank), np.int64)) if rank else np.zeros((0, 3))
    jpeg = look.pair.truth is None and detect_file_format(look.pair.mask) == "JPEG"
    gaps = np.diff(np.sort(stored[:, 0])) if len(stored) > 1 else np.array([0])
    if not table.by_color and (
        len(table) < 2 or min(np.diff(sorted(table.values))) < 20 or not gaps.size
    ):
        return None  # neighbouring ids: nobody can say which one a value in between was
    bad = np.isin(mask.codes, unknown)
    share = float(mask.counts[bad].sum() / mask.counts.sum())
    solid = float(mask.inner[bad].sum() / max(1, mask.counts[bad].sum()))
    if not jpeg and (len(unknown) < 3 or share > 0.6 or solid > 0.7):
        return None
    colors = (
        np.array(table.colors, float)
        if table.by_color
        else np.repeat(np.array(table.values, float)[:, None], 3, axis=1)
    )
    apart = np.abs(_points(unknown)[:, None] - colors[None]).sum(2)
    present = {k for code, k in rank.items() if k != IGNORE}
    plain = len(table) == 2 or len(present) <= 2
    ids = {
        int(code): int(row.argmin()) if plain or row.min() <= 60 else _UNSURE
        for code, row in zip(unknown, apart, strict=True)
    }
    what = (
        "JPEG compression, which blurs values"
        if jpeg
        else "smoothing (anti-aliasing or resizing) along the edges"
    )
    message = f"the mask '{case.name(look.pair.mask)}' holds {pluralize(len(unknown), 'code')} that no class has, on {share:.1%} of its pixels, made by {what}"
    cure = Repair(
        look.pair,
        f"mask: {pluralize(len(unknown), 'smeared code')} snapped to the nearest class",
        ids=ids,
        change=fill_unsure_pixels,
    )
    kind = "mask damaged by JPEG" if jpeg else "smeared mask"
    return Finding(
        kind,
        "error",
        (look.pair.mask,),
        message,
        "save masks as PNG, and resize them by the nearest pixel",
        (cure,),
    )


def _unknown(case: MeasuredDataset, look: Measurement) -> Finding:
    """Say it as training would; this reads the mask again, to name the place."""
    assert look.mask is not None
    path, name = look.pair.mask, case.name(look.pair.mask)
    try:
        read_label(look.pair, case.dataset)
        message, remedy = f"mask '{name}' cannot be used", "check it"
    except UsageError as error:
        message, _, remedy = str(error).replace(str(path), name).rpartition("; ")
    bad = case.ids(look.mask.codes) < 0
    ids = dict.fromkeys(look.mask.codes[bad].tolist(), IGNORE)
    shown = join_with_and(
        [f"#{code - COLOR_FLAG:06x}" if code >= COLOR_FLAG else code for code in list(ids)[:4]]
    )
    cure = Repair(
        look.pair,
        f"mask: {shown}{' and others' * (len(ids) > 4)}, which no class has, became ignored",
        ids=ids,
    )
    return Finding("unknown value", "error", (path,), message, remedy, (cure,))


def fill_unsure_pixels(label: Label) -> Label:
    """Give pixels that are not sure the class of the nearest sure one."""
    label = label.copy()
    for _ in range(64):
        unsure = label == _UNSURE
        if not unsure.any():
            break
        padded = np.pad(label, 1, constant_values=_UNSURE)
        for part in (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]):
            take = unsure & (label == _UNSURE) & (part != _UNSURE)
            label[take] = part[take]
    return label


def describe_stored_values(case: MeasuredDataset) -> Iterator[Finding]:
    """How all masks of a set without a class table are read, where that is worth a word."""
    table = case.dataset.classes
    if not case.guessed:
        return
    remedy = "nothing needs doing; a classes.toml gives the classes names"
    if table.by_color:
        colors = join_with_and([f"({r}, {g}, {b})" for r, g, b in table.colors[:6]])
        more = f" and {len(table) - 6} more" if len(table) > 6 else ""
        yield Finding(
            "colour masks",
            "note",
            (),
            f"the masks store {pluralize(len(table), 'colour')}: {colors}{more}; each became a class",
            remedy,
        )
    elif len(table) == 2 and table.values != (0, 1):
        low, high = table.values
        message = (
            f"the masks hold the two grey levels {low} and {high}, which became the classes 0 and 1"
        )
        yield Finding("two grey levels", "note", (), message, remedy)
    elif name := match_grey_palette(frozenset(table.values)):
        ids = [grey_levels(KNOWN_PALETTES[name]).get(value, IGNORE) for value in table.values]
        message = f'the masks hold {join_with_and(table.values)}: the grey levels of {name}\'s palette colours {join_with_and(ids)} (as .convert("L") leaves them)'
        yield Finding(
            "grey levels of a palette",
            "warning",
            (),
            message,
            "save the palette pictures' indices; colours of one grey level have become one class",
        )
    elif table.values != tuple(range(len(table))) and len(table) > 2:
        missing = sorted(set(range(max(table.values))) - set(table.values) - set(table.ignore))
        if missing:
            shown = join_with_and([*missing[:8], "others"] if len(missing) > 8 else missing)
            message = f"the masks hold the ids {join_with_and(table.values)}; between them {shown} never occur"
            yield Finding(
                "ids skipped",
                "note",
                (),
                message,
                "list the classes in classes.toml if they exist elsewhere; otherwise nothing needs doing",
            )


def check_single_class_masks(case: MeasuredDataset) -> Iterator[Finding]:
    """A few masks that hold one class only while the others hold several."""
    alone = [look for look in case.whole if look.mask is not None and len(look.mask.codes) == 1]
    if not alone or len(case.whole) < _FEW or len(alone) > max(1, len(case.whole) // 10):
        return
    for look in alone:
        assert look.mask is not None
        k = int(case.ids(look.mask.codes)[0])
        what = (
            "is ignored everywhere"
            if k == IGNORE
            else f"is {case.dataset.classes.names[k]} everywhere"
            if k >= 0
            else "holds one value everywhere"
        )
        message = (
            f"the mask '{case.name(look.pair.mask)}' {what}, while the others hold several classes"
        )
        remedy = "check that nothing was to be labelled there, or that its labels were not lost"
        yield Finding("mask of one class", "warning", (look.pair.mask,), message, remedy)


def check_inverted_masks(case: MeasuredDataset) -> Iterator[Finding]:
    """Binary masks of which a few have foreground and background swapped."""
    looks = [look for look in case.whole if look.mask is not None and len(look.mask.codes) == 2]
    if len(case.dataset.classes) != 2 or len(looks) < _FEW:
        return
    traits = np.array([_traits(case, look) for look in looks])
    swapped = np.array([1, 1, 0]) - traits
    middle = np.median(traits, axis=0)
    spread = np.maximum(1.48 * np.median(np.abs(traits - middle), axis=0), (0.08, 0.12, 0.35))
    own, other = (
        np.minimum(np.abs(part - middle) / spread, 6).sum(1) for part in (traits, swapped)
    )
    found = np.flatnonzero(own - other > 4)
    if len(found) > len(looks) // 3:
        return
    for k in found:
        look = looks[k]
        name, now = (
            case.name(look.pair.mask),
            f"{traits[k, 0]:.0%} of it is foreground, {middle[0]:.0%} is usual",
        )
        message = (
            f"the mask '{name}' has foreground and background swapped against the others: {now}"
        )
        cure = Repair(
            look.pair, "mask: foreground and background swapped back", change=swap_foreground
        )
        yield Finding(
            "inverted mask", "error", (look.pair.mask,), message, "swap its two values", (cure,)
        )


def swap_foreground(label: Label) -> Label:
    """Exchange the classes 0 and 1; what is ignored stays so."""
    return np.where(label <= 1, 1 - label, label).astype(np.uint8)


def _traits(case: MeasuredDataset, look: Measurement) -> tuple[float, float, float]:
    """The foreground's share of the mask and of its border, and how much brighter it is than the background, in standard deviations."""
    assert look.mask is not None
    assert look.image is not None
    grid = case.ids(look.mask.grid) == 1
    border = np.concatenate((grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]))
    share = float(case.counts[look.pair][1] / max(1, case.counts[look.pair][:2].sum()))
    thumb = look.image.thumb
    apart = float(thumb[grid].mean() - thumb[~grid].mean()) if 0 < grid.sum() < grid.size else 0.0
    return share, float(border.mean()), float(np.clip(apart / max(float(thumb.std()), 1e-6), -3, 3))


def _points(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Codes as points ``(N, 3)`` in colour space; a value is a grey."""
    grey = np.where(codes >= COLOR_FLAG, codes - COLOR_FLAG, codes * 0x010101)
    return np.stack([grey >> 16 & 255, grey >> 8 & 255, grey & 255], axis=1).astype(float)
