"""The content of all masks -> the class table, where no file defines the classes.

Values that only smoothing or JPEG made, or that stand in one mask by a slip, do not become classes.
Training and ``useg inspect`` both decide here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Color, spread_colors
from useg.data.class_mapping import TWO_CLASSES, name_color, name_value
from useg.data.class_names import NamedClasses, find_class_names, means_unlabelled
from useg.data.dataset import MaskEncoding, Pair
from useg.data.mask_content import (
    COLOR_FLAG,
    MIN_GREY_LEVEL,
    MaskContent,
    channels_of,
    color_code,
    read_content,
)
from useg.data.schemes import (
    KNOWN_PALETTES,
    VOC_BORDER,
    describe_ids,
    grey_levels,
    match_grey_palette,
    voc_colors,
)
from useg.errors import DataError, UsageError, format_count
from useg.machine import in_parallel

# A class table can hold so many.
MAX_CLASS_VALUES = 255

# More values than this are a photograph if they hardly form any plain areas.
_MAX_UNDOUBTED_VALUES = 64

# JPEG leaves plain areas within this distance of their colour (sum over three channels).
MAX_JPEG_DISTANCE = 60

# A mixture of two colours is at most this far from the straight line between them.
_MAX_MIXTURE_DISTANCE = 24


# Such a high id beside usual ones may be no class.
_MIN_HIGH_ID, _MAX_USUAL_ID = 250, 40

# Two levels are at least so far apart, and noise changes a level by at most so much.
_MIN_TWO_LEVEL_GAP = 100
_MAX_LEVEL_NOISE = 20

# With fewer masks, a value in one of them is not odd.
_MIN_MASKS_OF_ODD_VALUES = 5
# A patch of an odd value covers at most this share of its mask.
_MAX_ODD_SHARE = 0.005

# Pascal VOC's colours.
_VOC_CODES = {VOC_BORDER, *(color_code(color) - COLOR_FLAG for color in voc_colors(255))}

_LOSSY_SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class ClassDecision:
    """The class table of a data set, and what a user should know about it.

    Args:
        table: The classes.
        problem: Why nobody can train on it, in a sentence with a way out; usually empty.
        notes: What was decided, in words.
    """

    table: ClassTable
    problem: str = ""
    notes: tuple[str, ...] = ()


def infer_classes(
    pairs: Sequence[Pair],
    encoding: MaskEncoding,
    ignore: Sequence[int] = (),
    *,
    root: Path | None = None,
    skip_unreadable: bool = False,
) -> ClassDecision:
    """Read all masks and derive the class table from their values.

    Args:
        pairs: The pairs, at least one.
        encoding: How their masks hold the classes.
        ignore: Values that are not classes.
        root: The data set's folder, where files may name the classes.
        skip_unreadable: Skip damaged files, and masks with unknown values, instead of raising an
            error.

    Raises:
        DataError: A file is damaged, no class table can be derived, or a mask does not fit it.
    """
    found = in_parallel(lambda pair: _read_or_skip(pair, encoding, skip_unreadable), pairs)
    masks = [mask for mask in found if mask is not None]
    decision = decide_classes(masks, ignore, encoding, root)
    if not skip_unreadable:
        if decision.problem:
            raise DataError(decision.problem)
        _refuse_two_encodings(masks)
        for mask in masks:
            _refuse_unknown(mask, decision.table)
    return decision


def _read_or_skip(pair: Pair, encoding: MaskEncoding, skip: bool) -> MaskContent | None:
    try:
        return read_content(pair, encoding)
    except UsageError:
        if skip:
            return None
        raise


def decide_classes(
    masks: Sequence[MaskContent],
    ignore: Sequence[int] = (),
    encoding: MaskEncoding = MaskEncoding(),  # noqa: B008 - it is frozen
    root: Path | None = None,
) -> ClassDecision:
    """Derive the class table from the content of all masks.

    Colours become classes by colour. A palette gives ids their colours. Two values, such as 0 and
    255, become background and foreground. 255 beside ids is ignored, and so are negative numbers
    and values that the files call no data. Otherwise the values are the class ids.

    Colours and grey levels that only smoothing or JPEG made, codes that a few masks use instead of
    the others' ids, and a value that only a patch of one mask has do not become classes.

    If a file in ``root`` names classes that the masks fit, these are the classes, in its order.
    """
    if not masks:
        return ClassDecision(ClassTable((name_value(0),)))
    decision = _decide_by_content(masks, ignore, encoding)
    decision = replace(decision, notes=(*decision.notes, *_describe_empty(masks)))
    if root is None or encoding.objects or decision.problem:
        return decision
    palette = _join_palettes(masks) or {}
    for named in find_class_names(root):
        if _counts_from_one(decision.table, named):
            note = (
                f"'{named.file.relative_to(root)}' counts its classes from 1 and the masks count "
                "from 0, so its names were not taken; name the classes in a classes.toml"
            )
            return replace(decision, notes=(*decision.notes, note))
        table = name_classes(decision.table, named, palette)
        if table is not None:
            is_swapped = table.by_color and not {each.color for each in named.classes} & {
                color for color in table.colors if color[::-1] != color
            }
            how = " if red and blue are exchanged" if is_swapped and named.has_colors else ""
            if not named.has_ids and not named.has_colors:
                rows = zip(table.values, table.names, strict=True)
                how = f" in its order ({_join([f'{value} {name}' for value, name in rows])})"
            note = (
                f"the classes are named by '{named.file.relative_to(root)}'{how}; a classes.toml "
            )
            return _ignore_unlabelled(
                replace(decision, table=table, notes=(*decision.notes, note + "overrules it"))
            )
    hint = "" if decision.table.by_color else describe_ids(decision.table.values)
    return replace(decision, notes=(*decision.notes, *filter(None, (hint,))))


def _counts_from_one(table: ClassTable, named: NamedClasses) -> bool:
    """Whether a file lists 1 to n and masks have 0 to n - 1, so that 0 may be a class or none."""
    number = len(named.classes)
    return (
        named.has_ids
        and not table.by_color
        and table.values == tuple(range(number))
        and {each.id for each in named.classes} == set(range(1, number + 1))
    )


def _describe_empty(masks: Sequence[MaskContent]) -> list[str]:
    """Say that masks without annotations are background, which unfinished ones are not."""
    empty = [mask.path.name for mask in masks if not (mask.codes & (COLOR_FLAG - 1)).any()]
    if not empty or len(empty) == len(masks):
        return []
    return [describe_unfinished(empty, f"{len(masks)} masks are 0 everywhere")]


def describe_unfinished(empty: Sequence[str], are_empty: str) -> str:
    """Say that images without annotations count as background, and what to do if that is wrong.

    Args:
        empty: The files.
        are_empty: Of how many they are, and what they lack.
    """
    return (
        f"{len(empty)} of {are_empty}, such as '{empty[0]}', and count as background; if they are "
        'not finished, set empty = "ignore" in dataset.toml, otherwise nothing to do'
    )


def _decide_by_content(
    masks: Sequence[MaskContent], ignore: Sequence[int], encoding: MaskEncoding
) -> ClassDecision:
    kept = [mask for mask in _drop_other_encoding(masks) if not looks_like_photograph(mask)]
    if 2 * len(kept) < len(masks):
        return ClassDecision(_table_of_frequent_values(masks), _describe_photographs(masks))
    lossless = [mask for mask in kept if not _is_lossy(mask)]
    kept = lossless if 2 * len(lossless) >= len(kept) else kept
    notes: list[str] = []
    if are_smeared(kept):
        kept = _keep_codes(kept, _find_true_colors(kept))
    else:
        kept = _drop_odd_codes(kept)
    if _store_colors(kept):
        return _decide_by_color(kept, ignore)
    values = {code for mask in kept for code in mask.codes.tolist() if code >= 0} - set(ignore)
    nodata = _ignored_nodata(values, encoding)
    if nodata:
        notes.append(
            f"the files say that {_join(nodata)} means no data, so that value is ignored; to train "
            "it as a class, list it in classes.toml"
        )
    return _decide_by_value(values - set(nodata), kept, ignore, nodata, notes)


def name_classes(
    table: ClassTable, named: NamedClasses, palette: Mapping[int, int]
) -> ClassTable | None:
    """Return the classes of a file as a table, or None if the masks do not fit it.

    Args:
        table: The classes as the masks show them.
        named: The classes that the file lists.
        palette: The colour of each value, as a code, if the masks have a palette.
    """
    if table.by_color and named.has_colors:
        swapped = [replace(each, color=each.color and each.color[::-1]) for each in named.classes]
        return _name_colors(table, named) or _name_colors(
            table, replace(named, classes=tuple(swapped))
        )
    if table.by_color:
        return None
    ids = _find_ids(table, named, palette)
    if ids is None:
        return None
    rows = [
        (each.name, number, each.color) for each, number in zip(named.classes, ids, strict=True)
    ]
    used = set(table.values)
    if 0 in used and 0 not in ids:
        rows.insert(0, ("background", 0, (0, 0, 0)))
    if len(rows) > MAX_CLASS_VALUES:
        rows = [row for row in rows if row[1] in used]
    spread = spread_colors(len(rows))
    colors = [color or spread[k] for k, (_, _, color) in enumerate(rows)]
    values = tuple(number for _, number, _ in rows)
    ignore = tuple(value for value in table.ignore if value not in values)
    return ClassTable(
        tuple(name for name, _, _ in rows),
        tuple(colors) if len(set(colors)) == len(colors) else spread,
        values,
        ignore,
    )


def _name_colors(table: ClassTable, named: NamedClasses) -> ClassTable | None:
    rows = [(each.name, each.color) for each in named.classes if each.color]
    missing = set(table.colors) - {color for _, color in rows}
    if len(table) - len(missing) < min(2, len(rows)) or missing - {(0, 0, 0)}:
        return None
    rows = [*(("background", color) for color in missing), *rows]
    codes = {color_code(color) - COLOR_FLAG for _, color in rows}
    if len(rows) > MAX_CLASS_VALUES:
        rows = [row for row in rows if row[1] in table.colors]
    return ClassTable(
        tuple(name for name, _ in rows),
        tuple(color for _, color in rows),
        ignore=tuple(code for code in table.ignore if code not in codes),
        by_color=True,
    )


def _find_ids(
    table: ClassTable, named: NamedClasses, palette: Mapping[int, int]
) -> list[int] | None:
    """Return the value that masks store for each class of a file; None if they do not fit."""
    used, number = set(table.values), len(named.classes)
    if named.has_ids:
        ids = [each.id or 0 for each in named.classes]
        if used - {0} <= set(ids) and min(ids) >= 0 and max(ids) < 1 << 16:
            return ids
        # The file may count 0 and 1 where the masks have 0 and 255.
        is_binary = len(used) == number == 2
        return [sorted(used)[sorted(ids).index(each)] for each in ids] if is_binary else None
    if any(each.id is not None for each in named.classes):
        return None
    if named.has_colors and used <= palette.keys():
        values = {channels_of(palette[value]): value for value in sorted(palette, reverse=True)}
        if {channels_of(palette[value]) for value in used} <= {c.color for c in named.classes}:
            ids = [values.get(each.color or (0, 0, 0), -1) for each in named.classes]
            free = iter(sorted(set(range(256)) - set(ids)))
            return [number if number >= 0 else next(free) for number in ids]
    if len(used) == 2 and number in (1, 2) and max(used) > 1:
        return sorted(used)[-number:]
    first = 1 if max(used) == number and 0 in used else 0
    fits = len(used) > 1 and max(used) < first + number
    return list(range(first, first + number)) if fits else None


def _ignore_unlabelled(decision: ClassDecision) -> ClassDecision:
    """Ignore the classes whose name says that they have no label, if two others are left."""
    table = decision.table
    kept = [k for k, name in enumerate(table.names) if not means_unlabelled(name)]
    if not 2 <= len(kept) < len(table):
        return decision
    dropped = [k for k in range(len(table)) if k not in kept]
    stored = [color_code(color) - COLOR_FLAG for color in table.colors]
    stored = stored if table.by_color else list(table.values)
    names = _join([f"'{table.names[k]}'" for k in dropped])
    note = (
        f"{names} {'is' if len(dropped) == 1 else 'are'} ignored, since the name says that such "
        "pixels have no label; to train it as a class, list it in classes.toml"
    )
    table = replace(
        table,
        names=tuple(table.names[k] for k in kept),
        colors=tuple(table.colors[k] for k in kept),
        values=tuple(range(len(kept)) if table.by_color else (table.values[k] for k in kept)),
        ignore=tuple(dict.fromkeys((*table.ignore, *(stored[k] for k in dropped)))),
    )
    return ClassDecision(table, decision.problem, (*decision.notes, note))


def _decide_by_value(
    values: set[int],
    masks: Sequence[MaskContent],
    ignore: Sequence[int],
    nodata: Sequence[int],
    notes: list[str],
) -> ClassDecision:
    has_ignored = has_ignored_255(values)
    ids = sorted(values - {IGNORE}) if has_ignored else sorted(values)
    ignored = tuple(dict.fromkeys((*([IGNORE] if has_ignored else ()), *nodata, *ignore)))
    if len(ids) > MAX_CLASS_VALUES:
        table = _table_of_frequent_values(masks)
        return ClassDecision(replace(table, ignore=ignored), _describe_too_many(masks, len(ids)))
    ids = ids or [0]
    high = [value for value in ids if _MIN_HIGH_ID <= value < IGNORE]
    if high and len(ids) > len(high) and max(set(ids) - set(high)) <= _MAX_USUAL_ID:
        notes.append(
            f"{_join(high)} beside ids up to {max(set(ids) - set(high))} may mean that pixels have "
            f"no label; if so, set ignore = [{', '.join(map(str, high))}] in dataset.toml, "
            "otherwise nothing to do"
        )
    colors = _palette_colors(ids, masks)
    if len(values) == 2:
        table = ClassTable(TWO_CLASSES, colors, tuple(ids), ignored)
    else:
        table = ClassTable(tuple(map(name_value, ids)), colors, tuple(ids), ignored)
    return ClassDecision(table, notes=tuple(notes))


def _decide_by_color(masks: Sequence[MaskContent], ignore: Sequence[int]) -> ClassDecision:
    exchanged = _find_exchanged(masks)
    masks = [mask for mask in masks if mask.path not in exchanged]
    codes = sorted(
        {mask.as_color(code) - COLOR_FLAG for mask in masks for code in mask.codes.tolist()}
    )
    codes = [code for code in codes if code not in ignore]
    notes: tuple[str, ...] = ()
    if VOC_BORDER in codes and len(codes) > 2 and set(codes) <= _VOC_CODES:
        codes.remove(VOC_BORDER)
        ignore = (*ignore, VOC_BORDER)
        notes = (
            "#e0e0c0 is ignored, since it is the border that Pascal VOC draws around objects; to "
            "train it as a class, list it in classes.toml",
        )
    if len(codes) > MAX_CLASS_VALUES:
        return ClassDecision(
            replace(_table_of_frequent_values(masks), ignore=tuple(ignore)),
            _describe_too_many(masks, len(codes)),
        )
    colors = tuple(map(channels_of, codes or [0]))
    two = len(codes) == 2 and colors[0] == (0, 0, 0)
    names = TWO_CLASSES if two else tuple(map(name_color, codes))
    return ClassDecision(
        ClassTable(names or (name_color(0),), colors, ignore=tuple(ignore), by_color=True),
        notes=notes,
    )


def exchange_channels(code: int) -> int:
    """Return the code of a colour whose red and blue are exchanged.

    >>> channels_of(exchange_channels(color_code((1, 2, 3))))
    (3, 2, 1)
    """
    return color_code(channels_of(code)[::-1])


def _find_exchanged(masks: Sequence[MaskContent]) -> frozenset[Path]:
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


def _ignored_nodata(values: set[int], encoding: MaskEncoding) -> list[int]:
    """Return the values that mean no data; not if fewer than two classes would be left."""
    nodata = sorted(values & set(encoding.nodata))
    return nodata if len(values) - len(nodata) > 1 else []


def has_ignored_255(values: Iterable[int]) -> bool:
    """Return whether 255 is ignored: beside ids (0, 1, 2, 255), not beside levels (0, 128, 255).

    >>> has_ignored_255({0, 1, 2, 255}), has_ignored_255({0, 128, 255})
    (True, False)
    """
    ids = sorted(set(values) - {IGNORE})
    if IGNORE not in values or len(ids) < 2:
        return False
    if ids[-1] <= max(40, 2 * len(ids)):
        return True
    # Grey levels are spread evenly; sparse ids are not.
    gaps = np.diff([*ids, IGNORE])
    return len(ids) >= 4 and ids[-1] < IGNORE - 1 and bool(gaps.max() > 4 * gaps.min())


def _store_colors(masks: Sequence[MaskContent]) -> bool:
    """Whether masks store colours: real ones, palettes that disagree, or different single bands."""
    bands = {mask.band for mask in masks if mask.band is not None and mask.codes[-1] > 0}
    return any(mask.has_colors for mask in masks) or len(bands) > 1 or _join_palettes(masks) is None


def _join_palettes(masks: Iterable[MaskContent]) -> dict[int, int] | None:
    """Join the files' palettes; None if one value has two colours in different files."""
    joined: dict[int, int] = {}
    for mask in masks:
        for value, color in mask.palette.items():
            if joined.setdefault(value, color) != color:
                return None
    return joined


def _palette_colors(values: Sequence[int], masks: Sequence[MaskContent]) -> tuple[Color, ...]:
    """Return the palette's colours of these values, or colours of our own."""
    palette = _join_palettes(masks) or {}
    colors = tuple(channels_of(palette[value]) for value in values if value in palette)
    is_complete = len(set(colors)) == len(values)
    return colors if is_complete else spread_colors(len(values))


def _sum_counts(
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


def _table_of_frequent_values(masks: Sequence[MaskContent]) -> ClassTable:
    frequent = _sum_counts(masks)[0].most_common(_MAX_UNDOUBTED_VALUES)
    values = tuple(sorted(code for code, _ in frequent if 0 <= code < COLOR_FLAG >> 8)) or (0,)
    return ClassTable(tuple(map(name_value, values)), values=values)


# Values that are no classes


def mixes_two_encodings(values: Iterable[frozenset[int]]) -> bool:
    """Return whether some masks store 1 and others 255 for one class: never both in one mask."""
    each = [found for found in values if found]
    return frozenset().union(*each) == {0, 1, IGNORE} and not any(
        {1, IGNORE} <= found for found in each
    )


def _drop_other_encoding(masks: Sequence[MaskContent]) -> list[MaskContent]:
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
    return len(mask.codes) > _MAX_UNDOUBTED_VALUES and bool(
        mask.interior_counts.sum() < 0.5 * mask.counts.sum()
    )


def are_smeared(masks: Sequence[MaskContent]) -> bool:
    """Whether smoothing or JPEG made many of the codes.

    Smoothed grey levels lie on slopes between a lower and a higher level. Other codes that are not
    in the scene occur only as thin edges.
    """
    totals, interior, ramps = _sum_counts(masks)
    if len(totals) < 3 or max(totals) < MIN_GREY_LEVEL:
        return False
    if _is_noise_of_two_levels(totals, interior):
        return True
    if any(_is_lossy(mask) for mask in masks):
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


def _is_lossy(mask: MaskContent) -> bool:
    return mask.path.suffix.lower() in _LOSSY_SUFFIXES and len(mask.codes) > 2


def _find_true_colors(masks: Sequence[MaskContent]) -> frozenset[int]:
    """Return the frequent colours, without those that JPEG or smoothing made.

    These are rarer and lie near a true colour, or between two of them.
    """
    totals, interior, _ = _sum_counts(masks, as_colors=True)
    min_count = 2e-4 * totals.total()
    true = np.zeros((0, 3))
    found: list[int] = []
    for code, count in totals.most_common():
        if count < min_count or len(found) >= _MAX_UNDOUBTED_VALUES:
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


def _keep_codes(masks: Sequence[MaskContent], colors: frozenset[int]) -> list[MaskContent]:
    """Return masks with these colours only."""
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


def _drop_odd_codes(masks: Sequence[MaskContent]) -> list[MaskContent]:
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


def _refuse_two_encodings(masks: Sequence[MaskContent]) -> None:
    codes_of = [frozenset(mask.codes.tolist()) for mask in masks]
    if mixes_two_encodings(codes_of):
        one, other = (
            next(mask.path for mask, codes in zip(masks, codes_of, strict=True) if value in codes)
            for value in (1, IGNORE)
        )
        raise DataError(
            f"some masks have 0 and 1, such as '{one}', and others 0 and 255, such as '{other}', "
            "so one class seems to have two values; run useg inspect DATA --fix OUT, which writes "
            "a clean copy, or list 1 as a class and 255 under ignore in classes.toml"
        )


def _refuse_unknown(mask: MaskContent, table: ClassTable) -> None:
    """Refuse a mask with codes that are no classes."""
    unknown = [code for code in mask.codes.tolist() if _is_unknown(code, mask, table)]
    if not unknown:
        return
    shown = [f"#{code - COLOR_FLAG:06x}" if code >= COLOR_FLAG else str(code) for code in unknown]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    pixels = int(mask.counts[np.isin(mask.codes, unknown)].sum())
    cause = (
        "its red and blue look exchanged"
        if has_exchanged_channels(unknown, table)
        else "it looks like a photograph"
        if looks_like_photograph(mask)
        else "a JPEG alters values"
        if _is_lossy(mask)
        else "smoothing, resizing or a slip of the hand adds such values"
    )
    raise DataError(
        f"mask '{mask.path}' has {format_count(len(unknown), 'value')} that no class has "
        f"({', '.join(shown[:4])}{more}; {format_count(pixels, 'pixel')}): {cause}. The classes "
        f"are {_describe_classes(table)}. Run useg inspect DATA --fix OUT, which writes a mended "
        "copy, or list the true values in classes.toml"
    )


def has_exchanged_channels(codes: Sequence[int], table: ClassTable) -> bool:
    """Whether unknown colours are those of classes if red and blue are exchanged."""
    return table.by_color and all(
        channels_of(exchange_channels(code)) in table.colors for code in codes
    )


def _is_unknown(code: int, mask: MaskContent, table: ClassTable) -> bool:
    if code < 0:
        return False
    if table.by_color:
        color = mask.as_color(code) - COLOR_FLAG
        return channels_of(color) not in table.colors and color not in table.ignore
    return code not in table.values and code not in table.ignore


def _describe_classes(table: ClassTable) -> str:
    stored = [f"#{color_code(c) - COLOR_FLAG:06x}" for c in table.colors]
    return _join(stored if table.by_color else table.values)


def _join(items: Sequence[object]) -> str:
    shown = [str(item) for item in items[:8]] + (["others"] if len(items) > 8 else [])
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _describe_photographs(masks: Sequence[MaskContent]) -> str:
    worst = max(masks, key=lambda mask: len(mask.codes))
    total = len({code for mask in masks for code in mask.codes.tolist()})
    return (
        f"the masks have {total} different values or colours ('{worst.path}' alone has "
        f"{len(worst.codes)}) and hardly any plain areas, so they look like photographs; check "
        "which folder has the masks, and name it in a dataset.toml"
    )


def _describe_too_many(masks: Sequence[MaskContent], number: int) -> str:
    worst = max(masks, key=lambda mask: len(mask.codes))
    return (
        f"the masks have {number} different values or colours ('{worst.path}' alone has "
        f"{len(worst.codes)}), but a model can have {MAX_CLASS_VALUES} classes at most; if they "
        "number objects, set objects = true in dataset.toml, otherwise list the classes in "
        "classes.toml"
    )
