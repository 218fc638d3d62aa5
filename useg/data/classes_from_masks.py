"""The content of all masks -> the class table, where no file defines the classes.

Values that come from smoothing, JPEG or a mistake in a single mask do not become classes
(:mod:`useg.data.mask_content`). Training and ``useg inspect`` both decide here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from useg.classes import IGNORE, MAX_CLASSES, ClassTable, Color, pack_color, spread_colors
from useg.data.class_mapping import TWO_CLASSES, name_color, name_value
from useg.data.class_names import (
    NamedClasses,
    find_class_names,
    find_contradiction,
    means_unlabelled,
)
from useg.data.dataset import COLOR_FLAG, MaskEncoding, Pair
from useg.data.mask_content import (
    MAX_UNDOUBTED_VALUES,
    MaskContent,
    are_smeared,
    channels_of,
    drop_odd_codes,
    drop_other_encoding,
    find_exchanged,
    is_lossy,
    keep_true_colors,
    looks_like_photograph,
    read_content,
    sum_counts,
)
from useg.data.mask_problems import (
    describe_empty,
    describe_ids_and_colors,
    describe_ignored,
    describe_lossy_ids,
    describe_photographs,
    describe_shifted,
    describe_states,
    describe_stretched,
    describe_too_many,
    describe_two_scales,
    join_some,
    refuse_two_encodings,
    refuse_unknown,
)
from useg.data.published_classes import (
    VOC_BORDER,
    describe_ids,
    name_colors,
    voc_colors,
)
from useg.errors import DataError, UsageError
from useg.machine import in_parallel

# An id this high among usual ones may not be a class.
_MIN_HIGH_ID, _MAX_USUAL_ID = 250, 40

# Colours may number objects if there are at least this many masks and this many colours.
_MIN_MASKS_OF_NUMBERS, _MIN_NUMBERS = 4, 8
_COLORS_MAY_NUMBER = (
    "most colours occur in one mask only, so they may number objects; if so, save masks of "
    "classes, otherwise ignore this note"
)

# Pascal VOC's colours.
_VOC_CODES = {VOC_BORDER, *(pack_color(color) for color in voc_colors(255))}


@dataclass(frozen=True)
class ClassDecision:
    """The class table of a data set, and what a user should know about it.

    Args:
        table: The classes.
        problem: Why training on it is impossible, and a remedy; usually empty.
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
        refuse_two_encodings(masks)
        for mask in masks:
            refuse_unknown(mask, decision.table)
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
    255, become background and foreground. 255 among ids is ignored, and so are negative numbers
    and values that the files call no data. Otherwise the values are the class ids.

    Colours and grey levels that only smoothing or JPEG made, codes that a few masks use instead of
    the others' ids, and a value that only a patch of one mask has do not become classes.

    If a file in ``root`` names classes that the masks fit, these are the classes, in its order.
    """
    if not masks:
        return ClassDecision(ClassTable((name_value(0),)))
    decision = _decide_by_content(masks, ignore, encoding)
    decision = replace(decision, notes=(*decision.notes, *describe_empty(masks)))
    if root is None or encoding.objects or decision.problem:
        return decision
    palette = _join_palettes(masks) or {}
    listed = find_class_names(root)
    for named in listed:
        if counts_from_one(decision.table, named):
            note = (
                f"'{named.file.relative_to(root)}' numbers its classes from 1, but the masks "
                "number them from 0, so its names were not used; name the classes in a classes.toml"
            )
            return replace(decision, notes=(*decision.notes, note))
        table = name_classes(decision.table, named, palette)
        if table is None:
            continue
        other = find_contradiction(named, listed, {mask.path.parent for mask in masks})
        if other is not None:
            return replace(decision, problem=_describe_contradiction(named.file, other.file))
        if _may_count_from_one(decision.table, named):
            return replace(decision, problem=_describe_shift(named))
        note = (
            f"the classes are named by '{named.file.relative_to(root)}'"
            f"{_describe_naming(table, named)}; a classes.toml overrides it"
        )
        return _ignore_unlabelled(replace(decision, table=table, notes=(*decision.notes, note)))
    if decision.table.by_color:
        return _name_known_colors(decision)
    hints = describe_ids(decision.table.values), _describe_unused(listed, decision.table, root)
    return replace(decision, notes=(*decision.notes, *filter(None, hints)))


def _describe_unused(listed: Sequence[NamedClasses], table: ClassTable, root: Path) -> str:
    """Say that a file that lists only names does not fit the masks; ``""`` if there is none."""
    for named in listed:
        if len(named.classes) > 1 and not named.has_ids and not named.has_colors:
            return (
                f"'{named.file.relative_to(root)}' lists {len(named.classes)} classes and the "
                f"masks have the values {join_some(table.values)}, so its names were not used; "
                "name the classes in a classes.toml"
            )
    return ""


def _describe_naming(table: ClassTable, named: NamedClasses) -> str:
    """Say how a file names classes if not by their own ids or colours, as an addition."""
    if not named.has_ids and not named.has_colors:
        rows = zip(table.values, table.names, strict=True)
        return f" in its order ({join_some([f'{value} {name}' for value, name in rows])})"
    listed = {each.color for each in named.classes}
    unequal = {color for color in table.colors if color[::-1] != color}
    is_swapped = table.by_color and named.has_colors and not listed & unequal
    return " if red and blue are exchanged" if is_swapped else ""


def _may_count_from_one(table: ClassTable, named: NamedClasses) -> bool:
    """Whether a file calls 0 unlabelled, but 255 is, and its last id never occurs."""
    ids = {each.id: each.name for each in named.classes if each.id is not None}
    return (
        named.has_ids
        and not table.by_color
        and IGNORE in table.ignore
        and means_unlabelled(ids.get(0, ""))
        and {0} < set(table.values) <= ids.keys() - {max(ids)}
    )


def _describe_shift(named: NamedClasses) -> str:
    last = max((each.id or 0, each.name) for each in named.classes)
    return (
        f"'{named.file}' lists 0 as unlabelled, but the masks mark unlabelled pixels with 255 and "
        f"never contain {last[0]} ('{last[1]}'). The values in the masks may be one lower than "
        "those in the file, as in COCO-Stuff; list the classes with the values of the masks in "
        "classes.toml"
    )


def _describe_contradiction(file: Path, other: Path) -> str:
    return (
        f"'{file}' and '{other}' give the same values or colours of masks different names, so one "
        "value seems to mean different classes in different images; save all masks with one table "
        "of classes, or list the classes in classes.toml"
    )


def _name_known_colors(decision: ClassDecision) -> ClassDecision:
    """Name the classes if all colours are those of one published data set."""
    source, names = name_colors(decision.table.colors)
    if not source:
        return decision
    note = (
        f"the class names come from the colours, which are those of {source}; a classes.toml "
        "overrides it"
    )
    table = replace(decision.table, names=names)
    return _ignore_unlabelled(replace(decision, table=table, notes=(*decision.notes, note)))


def _decide_by_content(
    masks: Sequence[MaskContent], ignore: Sequence[int], encoding: MaskEncoding
) -> ClassDecision:
    kept = [mask for mask in drop_other_encoding(masks) if not looks_like_photograph(mask)]
    if 2 * len(kept) < len(masks):
        return ClassDecision(_table_of_frequent_values(masks), describe_photographs(masks))
    lossless = [mask for mask in kept if not is_lossy(mask)]
    kept = lossless if 2 * len(lossless) >= len(kept) else kept
    notes: list[str] = []
    kept = keep_true_colors(kept) if are_smeared(kept) else drop_odd_codes(kept)
    if _store_colors(kept):
        decision = _decide_by_color(kept, ignore)
        problem = decision.problem or describe_ids_and_colors(kept) or describe_stretched(kept)
        return replace(decision, problem=problem)
    values = {code for mask in kept for code in mask.codes.tolist() if code >= 0} - set(ignore)
    nodata = _ignored_nodata(values, encoding)
    if nodata:
        notes.append(
            f"the files declare {join_some(nodata)} as nodata, so that value is ignored; to "
            "train it as a class, list it in classes.toml"
        )
    decision = _decide_by_value(values - set(nodata), kept, ignore, nodata, notes)
    describe = (describe_two_scales, describe_stretched, describe_lossy_ids)
    problem = decision.problem or next(filter(None, (each(kept) for each in describe)), "")
    return replace(decision, problem=problem)


def _ignore_unlabelled(decision: ClassDecision) -> ClassDecision:
    """Ignore the classes whose name means "unlabelled", if two others are left."""
    table = decision.table
    kept = [k for k, name in enumerate(table.names) if not means_unlabelled(name)]
    if not 2 <= len(kept) < len(table):
        return decision
    dropped = [k for k in range(len(table)) if k not in kept]
    stored = table.stored
    names = join_some([f"'{table.names[k]}'" for k in dropped])
    note = (
        f"{names} {'is' if len(dropped) == 1 else 'are'} ignored, because the name says that "
        "these pixels have no label; to train it as a class, list it in classes.toml"
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
    if len(ids) > MAX_CLASSES:
        table = _table_of_frequent_values(masks)
        return ClassDecision(replace(table, ignore=ignored), describe_too_many(masks, len(ids)))
    ids = ids or [0]
    if ids[-1] >= 1 << 16:
        path = next(mask.path for mask in masks if ids[-1] in mask.codes)
        raise DataError(
            f"mask '{path}' has the value {ids[-1]}, but class ids must be at most 65535; if the "
            "values number objects, write objects = true into dataset.toml, otherwise save the "
            "masks with lower ids"
        )
    high = [value for value in ids if value >= _MIN_HIGH_ID and value != IGNORE]
    if high and len(ids) > len(high) and max(set(ids) - set(high)) <= _MAX_USUAL_ID:
        notes.append(
            f"{join_some(high)} beside ids up to {max(set(ids) - set(high))} may mean that pixels "
            f"have no label; if so, set ignore = [{', '.join(map(str, high))}] in dataset.toml, "
            "otherwise ignore this note"
        )
    notes += [*describe_ignored(masks, ids), *describe_shifted(masks), *describe_states(masks)]
    colors = _palette_colors(ids, masks)
    if len(values) == 2:
        table = ClassTable(TWO_CLASSES, colors, tuple(ids), ignored)
    else:
        table = ClassTable(tuple(map(name_value, ids)), colors, tuple(ids), ignored)
    return ClassDecision(table, notes=tuple(notes))


def _decide_by_color(masks: Sequence[MaskContent], ignore: Sequence[int]) -> ClassDecision:
    exchanged = find_exchanged(masks)
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
    occurrences = Counter(code for mask in masks for code in mask.codes.tolist())
    if len(masks) >= _MIN_MASKS_OF_NUMBERS and len(codes) >= _MIN_NUMBERS:
        num_single = sum(count == 1 for count in occurrences.values())
        notes += (_COLORS_MAY_NUMBER,) if 2 * num_single > len(codes) else ()
    if len(codes) > MAX_CLASSES:
        return ClassDecision(
            replace(_table_of_frequent_values(masks), ignore=tuple(ignore)),
            describe_too_many(masks, len(codes)),
        )
    colors = tuple(map(channels_of, codes or [0]))
    two = len(codes) == 2 and colors[0] == (0, 0, 0)
    names = TWO_CLASSES if two else tuple(map(name_color, codes))
    return ClassDecision(
        ClassTable(names or (name_color(0),), colors, ignore=tuple(ignore), by_color=True),
        notes=notes,
    )


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
    usual = [value for value in ids if value < _MIN_HIGH_ID]
    # Beside 255, 254 may not be a class either.
    ids = usual if len(usual) > 2 else ids
    if IGNORE not in values or len(ids) < 2:
        return False
    if ids[-1] <= max(40, 2 * len(ids)):
        return True
    # Grey levels are spread evenly; sparse ids are not.
    gaps = np.diff([*ids, IGNORE])
    return len(ids) >= 4 and ids[-1] < IGNORE - 1 and bool(gaps.max() > 4 * gaps.min())


def _store_colors(masks: Sequence[MaskContent]) -> bool:
    """Whether masks store colours: real ones, palettes that disagree, or different single bands."""
    bands = {mask.band for mask in masks if mask.band is not None and mask.highest > 0}
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


def _table_of_frequent_values(masks: Sequence[MaskContent]) -> ClassTable:
    frequent = sum_counts(masks)[0].most_common(MAX_UNDOUBTED_VALUES)
    values = tuple(sorted(code for code, _ in frequent if 0 <= code < COLOR_FLAG >> 8)) or (0,)
    return ClassTable(tuple(map(name_value, values)), values=values)


def counts_from_one(table: ClassTable, named: NamedClasses) -> bool:
    """Whether a file lists 1 to n and masks have 0 to n - 1, so that 0 may be a class or none."""
    number = len(named.classes)
    return (
        named.has_ids
        and not table.by_color
        and table.values == tuple(range(number))
        and {each.id for each in named.classes} == set(range(1, number + 1))
    )


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
    if len(rows) > MAX_CLASSES:
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
    codes = {pack_color(color) for _, color in rows}
    if len(rows) > MAX_CLASSES:
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
    if named.has_ids:
        return _fit_listed_ids(table, named)
    if any(each.id is not None for each in named.classes):
        return None
    return _fit_palette(table, named, palette) or _fit_order(table, named)


def _fit_listed_ids(table: ClassTable, named: NamedClasses) -> list[int] | None:
    """Return the ids of a file if the masks have no others except 0."""
    used, ids = set(table.values), [each.id or 0 for each in named.classes]
    if used - {0} <= set(ids) and min(ids) >= 0 and max(ids) < 1 << 16:
        return ids
    if len(used) == len(ids) == 2 and min(ids) == 0:
        # The file counts 0 and 1 where the masks have 0 and 255.
        value_of = dict(zip(sorted(ids), sorted(used), strict=True))
        return [value_of[each] for each in ids]
    return None


def _fit_palette(
    table: ClassTable, named: NamedClasses, palette: Mapping[int, int]
) -> list[int] | None:
    """Return the values that the palette of the masks gives the colours of a file."""
    if not named.has_colors or not palette.keys() >= set(table.values):
        return None
    if not {channels_of(palette[value]) for value in table.values} <= {
        each.color for each in named.classes
    }:
        return None
    # Of the values of one colour, the lowest counts.
    values = {channels_of(palette[value]): value for value in sorted(palette, reverse=True)}
    ids = [values.get(each.color or (0, 0, 0)) for each in named.classes]
    free = iter(sorted(set(range(256)) - set(ids)))
    return [next(free) if value is None else value for value in ids]


def _fit_order(table: ClassTable, named: NamedClasses) -> list[int] | None:
    """Return values in the order of a file: from 0 on, or from 1 on if its number is a value."""
    used, number = set(table.values), len(named.classes)
    if len(used) == 2 and number in (1, 2) and max(used) > 1:
        return sorted(used)[-number:]
    first = 1 if max(used) == number else 0
    fits = len(used) > 1 and max(used) < first + number
    return list(range(first, first + number)) if fits else None
