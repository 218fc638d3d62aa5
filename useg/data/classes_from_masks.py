"""The content of all masks -> the class table, where no file defines the classes.

Values that come from smoothing, JPEG or a mistake in a single mask do not become classes
(:mod:`useg.data.mask_content`). Training and ``useg inspect`` both decide here.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from useg.classes import IGNORE, ClassTable, Color, pack_color, spread_colors
from useg.data.class_mapping import TWO_CLASSES, name_color, name_value
from useg.data.class_names import (
    MAX_CLASS_VALUES,
    NamedClasses,
    counts_from_one,
    find_class_names,
    find_contradiction,
    means_unlabelled,
    name_classes,
)
from useg.data.dataset import COLOR_FLAG, MaskEncoding, Pair
from useg.data.file_names import split_name
from useg.data.mask_content import (
    MAX_UNDOUBTED_VALUES,
    MIN_GREY_LEVEL,
    MaskContent,
    are_smeared,
    channels_of,
    drop_odd_codes,
    drop_other_encoding,
    find_exchanged,
    has_exchanged_channels,
    is_lossy,
    keep_true_colors,
    looks_like_photograph,
    mixes_two_encodings,
    read_content,
    sum_counts,
)
from useg.data.published_classes import (
    VOC_BORDER,
    describe_ids,
    find_displayed_levels,
    name_colors,
    voc_colors,
)
from useg.errors import DataError, UsageError, format_count, join_names
from useg.machine import in_parallel

# An id this high among usual ones may not be a class.
_MIN_HIGH_ID, _MAX_USUAL_ID = 250, 40
# Ignored values of a smaller share of the pixels are hardly a class.
_MIN_NOTED_SHARE = 0.05
# Values from here down, such as -9999, are never classes.
_MAX_NO_DATA = -99

# Most values that a message lists.
_MAX_LISTED = 8

# Colours may number objects if there are at least this many masks and this many colours.
_MIN_MASKS_OF_NUMBERS, _MIN_NUMBERS = 4, 8
_COLORS_MAY_NUMBER = (
    "most colours occur in one mask only, so they may number objects; if so, save masks of "
    "classes, otherwise ignore this note"
)

# A colour that displays a level differs from it by less than this.
_MAX_COLOR_STEP_ERROR = 5

# Words for two states of a place: before and after an event.
_STATES = (("pre", "post"), ("before", "after"))

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
    255, become background and foreground. 255 among ids is ignored, and so are negative numbers
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
    listed = find_class_names(root)
    for named in listed:
        if counts_from_one(decision.table, named):
            note = (
                f"'{named.file.relative_to(root)}' counts its classes from 1 and the masks count "
                "from 0, so its names were not used; name the classes in a classes.toml"
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
    hints = describe_ids(decision.table.values), _describe_unused(listed, decision.table)
    return replace(decision, notes=(*decision.notes, *filter(None, hints)))


def _describe_unused(listed: Sequence[NamedClasses], table: ClassTable) -> str:
    """Say that a file that lists names alone does not fit the masks; ``""`` if there is none."""
    for named in listed:
        if len(named.classes) > 1 and not named.has_ids and not named.has_colors:
            return (
                f"'{named.file.name}' lists {len(named.classes)} classes and the masks have the "
                f"values {_join(table.values)}, so its names were not used; name the "
                "classes in a classes.toml"
            )
    return ""


def _describe_naming(table: ClassTable, named: NamedClasses) -> str:
    """Say how a file names classes if not by their own ids or colours, as an addition."""
    if not named.has_ids and not named.has_colors:
        rows = zip(table.values, table.names, strict=True)
        return f" in its order ({_join([f'{value} {name}' for value, name in rows])})"
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
        f"never contain {last[0]} ('{last[1]}'). The values in the masks may be lower by one than "
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
        'not finished, set empty = "ignore" in dataset.toml, otherwise ignore this note'
    )


def _decide_by_content(
    masks: Sequence[MaskContent], ignore: Sequence[int], encoding: MaskEncoding
) -> ClassDecision:
    kept = [mask for mask in drop_other_encoding(masks) if not looks_like_photograph(mask)]
    if 2 * len(kept) < len(masks):
        return ClassDecision(_table_of_frequent_values(masks), _describe_photographs(masks))
    lossless = [mask for mask in kept if not is_lossy(mask)]
    kept = lossless if 2 * len(lossless) >= len(kept) else kept
    notes: list[str] = []
    kept = keep_true_colors(kept) if are_smeared(kept) else drop_odd_codes(kept)
    if _store_colors(kept):
        decision = _decide_by_color(kept, ignore)
        problem = decision.problem or _describe_ids_and_colors(kept) or _describe_stretched(kept)
        return replace(decision, problem=problem)
    values = {code for mask in kept for code in mask.codes.tolist() if code >= 0} - set(ignore)
    nodata = _ignored_nodata(values, encoding)
    if nodata:
        notes.append(
            f"the files say that {_join(nodata)} means no data, so that value is ignored; to train "
            "it as a class, list it in classes.toml"
        )
    decision = _decide_by_value(values - set(nodata), kept, ignore, nodata, notes)
    describe = (_describe_two_scales, _describe_stretched, _describe_lossy_ids)
    problem = decision.problem or next(filter(None, (each(kept) for each in describe)), "")
    return replace(decision, problem=problem)


def _describe_stretched(masks: Sequence[MaskContent]) -> str:
    """Say that each mask was stretched to 0 to 255 alone, so that values mean different classes.

    Then each has equal steps, and one has values that another with more steps lacks.
    """
    steps: dict[tuple[int, ...], MaskContent] = {}
    for mask in masks:
        values = sorted(_find_levels(mask))
        last = len(values) - 1
        if last < 1:
            continue
        slack = _MAX_COLOR_STEP_ERROR if mask.has_colors else 1
        if any(abs(value - k * 255 / last) >= slack for k, (value, _) in enumerate(values)):
            return ""
        steps.setdefault(tuple(code for _, code in values), mask)
    are_colors = any(mask.has_colors for mask in masks)
    several = sorted((codes for codes in steps if len(codes) > 2), key=len)
    few, many = (several[0], several[-1]) if several else ((), ())
    if len(few) == len(many) or set(few) <= set(many):
        return ""
    what, else_what = (
        _join([f"#{code - COLOR_FLAG:06x}" if code >= COLOR_FLAG else code for code in codes])
        for codes in (few, many)
    )
    return (
        f"the {'colours' if are_colors else 'values'} of '{steps[few].path}' are {what}, and those "
        f"of '{steps[many].path}' {else_what}: each mask seems to be stretched to "
        f"{'a range of colours' if are_colors else '0 to 255'} alone, as for display, so one value "
        "means different classes; save the ids themselves"
    )


def _find_levels(mask: MaskContent) -> Iterator[tuple[float, int]]:
    """Yield the grey level of each code, or the one that its colour displays, with the code."""
    codes = [code for code in mask.codes.tolist() if code >= 0]
    if not mask.has_colors:
        yield from ((code, code) for code in codes)
    elif len(codes) <= MAX_CLASS_VALUES and codes[0] >= COLOR_FLAG:
        levels = find_displayed_levels([channels_of(code) for code in codes])
        yield from zip(levels, codes, strict=True) if levels else ()


def _ignore_unlabelled(decision: ClassDecision) -> ClassDecision:
    """Ignore the classes whose name means "unlabelled", if two others are left."""
    table = decision.table
    kept = [k for k, name in enumerate(table.names) if not means_unlabelled(name)]
    if not 2 <= len(kept) < len(table):
        return decision
    dropped = [k for k in range(len(table)) if k not in kept]
    stored = table.stored
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
    if ids[-1] >= 1 << 16:
        path = next(mask.path for mask in masks if ids[-1] in mask.codes)
        raise DataError(
            f"mask '{path}' has the value {ids[-1]}, but ids of classes are at most 65535; if the "
            "values number objects, write objects = true into dataset.toml, otherwise save the "
            "masks with lower ids"
        )
    high = [value for value in ids if value >= _MIN_HIGH_ID and value != IGNORE]
    if high and len(ids) > len(high) and max(set(ids) - set(high)) <= _MAX_USUAL_ID:
        notes.append(
            f"{_join(high)} beside ids up to {max(set(ids) - set(high))} may mean that pixels have "
            f"no label; if so, set ignore = [{', '.join(map(str, high))}] in dataset.toml, "
            "otherwise ignore this note"
        )
    notes += [*_describe_ignored(masks, ids), *_describe_shifted(masks), *_describe_states(masks)]
    colors = _palette_colors(ids, masks)
    if len(values) == 2:
        table = ClassTable(TWO_CLASSES, colors, tuple(ids), ignored)
    else:
        table = ClassTable(tuple(map(name_value, ids)), colors, tuple(ids), ignored)
    return ClassDecision(table, notes=tuple(notes))


def _describe_ignored(masks: Sequence[MaskContent], ids: Sequence[int]) -> Iterator[str]:
    """Say that ignored values may be a class: negative ones, and 255 if no pixel has 0."""
    codes = np.concatenate([mask.codes for mask in masks])
    counts = np.concatenate([mask.counts for mask in masks])
    may_be_background = 0 not in ids and IGNORE not in ids
    for what, chosen in (
        ("negative values or NaN", (codes < 0) & (codes > _MAX_NO_DATA)),
        ("the value 255", (codes == IGNORE) & may_be_background),
    ):
        share = counts[chosen].sum() / max(1, counts.sum())
        if share >= _MIN_NOTED_SHARE:
            yield (
                f"{100 * share:.0f} % of the pixels have {what} and are ignored; if this is a "
                "class, such as the background, give it another number, otherwise ignore this note"
            )


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
    # Beside 255, 254 may be no class either.
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
        if is_lossy(mask)
        else "smoothing, resizing or a drawing mistake adds such values"
    )
    raise DataError(
        f"mask '{mask.path}' has {format_count(len(unknown), 'value')} that no class has "
        f"({', '.join(shown[:4])}{more}; {format_count(pixels, 'pixel')}): {cause}. The classes "
        f"are {_describe_classes(table)}. Run useg inspect DATA --fix OUT, which writes a "
        "repaired copy, or list the true values in classes.toml"
    )


def _is_unknown(code: int, mask: MaskContent, table: ClassTable) -> bool:
    if code < 0:
        return False
    if table.by_color:
        color = mask.as_color(code) - COLOR_FLAG
        return channels_of(color) not in table.colors and color not in table.ignore
    return code not in table.values and code not in table.ignore


def _describe_classes(table: ClassTable) -> str:
    return _join([f"#{code:06x}" for code in table.stored] if table.by_color else table.stored)


def _join(items: Sequence[object]) -> str:
    return join_names(items, _MAX_LISTED)


def _describe_photographs(masks: Sequence[MaskContent]) -> str:
    worst = max(masks, key=lambda mask: len(mask.codes))
    total = len({code for mask in masks for code in mask.codes.tolist()})
    return (
        f"the masks have {total} different values or colours ('{worst.path}' alone has "
        f"{len(worst.codes)}) and hardly any plain areas, so they look like photographs; check "
        "which folder has the masks, and name it in a dataset.toml"
    )


def _describe_ids_and_colors(masks: Sequence[MaskContent]) -> str:
    """Return a problem if some masks have ids and others colours, or ``""``."""
    with_ids = [mask for mask in masks if _has_low_ids(mask) and not mask.palette]
    colored = [mask for mask in masks if mask.has_colors]
    if not with_ids or not colored:
        return ""
    return _describe_two_ways(with_ids[0], colored[0], "ids", "colours")


def _describe_shifted(masks: Sequence[MaskContent]) -> Iterator[str]:
    """Say that the masks of one folder may count their classes from another number."""
    found: dict[Path, set[int]] = defaultdict(set)
    for mask in masks:
        found[mask.path.parent] |= set(mask.codes.tolist()) - {IGNORE}
    for one, other in itertools.permutations(found, 2):
        if len(found[one]) > 2 and {value + 1 for value in found[one]} == found[other]:
            yield (
                f"the masks in '{one}' have the values {_join(sorted(found[one]))}, and those in "
                f"'{other}' {_join(sorted(found[other]))}, so one value may mean different classes "
                "in them; if so, save all masks with the same values, otherwise ignore this note"
            )
            return


def _describe_states(masks: Sequence[MaskContent]) -> Iterator[str]:
    """Say that masks of the state before may have fewer classes than those of the state after."""
    words = [frozenset(map(str.casefold, split_name(mask.path.stem))) for mask in masks]
    for states in _STATES:
        groups = [
            [mask for mask, own in zip(masks, words, strict=True) if state in own]
            for state in states
        ]
        before, after = (
            sorted({code for mask in group for code in mask.codes.tolist()} - {IGNORE})
            for group in groups
        )
        if min(map(len, groups)) > 1 and 1 < len(before) < len(after) and {*before} < {*after}:
            shared = _join([value for value in before if value])
            yield (
                f"masks called '{states[0]}' have the values {_join(before)}, and those called "
                f"'{states[1]}' {_join(after)}, so {shared} may mean another class in them; if so, "
                "choose the images and masks of one kind in dataset.toml, otherwise ignore this "
                "note"
            )


def _describe_two_scales(masks: Sequence[MaskContent]) -> str:
    """Return a problem if some masks have ids and others as many grey levels, or ``""``."""
    groups = [[mask for mask in masks if _has_low_ids(mask) == is_low] for is_low in (True, False)]
    low, high = ({code for mask in group for code in mask.codes.tolist()} - {0} for group in groups)
    levels = np.array(sorted(high))
    if min(len(low), len(high)) < 2 or len(low) != len(high) or low & high:
        return ""
    if min(high) < MIN_GREY_LEVEL or np.ptp(np.diff([0, *levels])) > 1:
        return ""
    other = next(mask for mask in groups[1] if mask.highest > 0)
    return _describe_two_ways(groups[0][0], other, "ids", "grey levels")


def _describe_lossy_ids(masks: Sequence[MaskContent]) -> str:
    """Return a problem if most masks are JPEG files of ids, which JPEG mixes up, or ``""``."""
    lossy = [mask for mask in masks if is_lossy(mask) and _has_low_ids(mask)]
    if 2 * len(lossy) <= len(masks):
        return ""
    return (
        f"the masks, such as '{lossy[0].path}', are JPEG files of the values "
        f"{_join(lossy[0].codes.tolist())}; JPEG alters values by one or more, so neighbouring ids "
        "are mixed up; export the masks as PNG"
    )


def _has_low_ids(mask: MaskContent) -> bool:
    return 0 < mask.highest < MIN_GREY_LEVEL


def _describe_two_ways(one: MaskContent, other: MaskContent, how: str, else_how: str) -> str:
    return (
        f"some masks have {how} ({_join(one.codes.tolist())}), such as '{one.path}', and others "
        f"{else_how}, such as '{other.path}', so each class seems to have two values; save all "
        "masks in the same way"
    )


def _describe_too_many(masks: Sequence[MaskContent], number: int) -> str:
    worst = max(masks, key=lambda mask: len(mask.codes))
    return (
        f"the masks have {number} different values or colours ('{worst.path}' alone has "
        f"{len(worst.codes)}), but a model can have {MAX_CLASS_VALUES} classes at most; if they "
        "number objects, set objects = true in dataset.toml, otherwise list the classes in "
        "classes.toml"
    )
