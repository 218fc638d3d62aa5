"""The content of all masks -> why their values may not be classes: notes, problems and refusals.

A note says what a user should check. A problem makes training impossible until it is solved.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, MAX_CLASSES, ClassTable
from useg.data.dataset import COLOR_FLAG, CodeMap
from useg.data.file_names import split_name
from useg.data.mask_content import (
    MIN_GREY_LEVEL,
    MaskContent,
    channels_of,
    find_runs,
    has_exchanged_channels,
    is_lossy,
    looks_like_photograph,
    mixes_two_encodings,
    read_points,
)
from useg.data.published_classes import VOC_BORDER, find_displayed_levels
from useg.errors import DataError, format_count, join_names

# Ignored values of a smaller share of the pixels are hardly a class.
_MIN_NOTED_SHARE = 0.05

# Values from here down, such as -9999, are never classes.
_MAX_NO_DATA = -99

# Most values that a message lists.
_MAX_LISTED = 8

# A colour that displays a level differs from it by less than this.
_MAX_COLOR_STEP_ERROR = 5

# Words for two states of a place: before and after an event.
_STATES = (("pre", "post"), ("before", "after"))

# A border takes part in this share of all changes of the code, and is at most this many pixels
# wide.
_MIN_BORDER_SHARE = 0.98
_MAX_BORDER_WIDTH = 6
_MAX_BORDERED_CODES = 64

# As many classes as ADE20K's benchmark has, and the masks that are read to recognise it.
_NUM_ADE20K_CLASSES, _NUM_ADE20K_MASKS = 150, 12


def describe_empty(masks: Sequence[MaskContent]) -> list[str]:
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


def describe_ignored(masks: Sequence[MaskContent], ids: Sequence[int]) -> Iterator[str]:
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


def describe_shifted(masks: Sequence[MaskContent]) -> Iterator[str]:
    """Say that the masks of one folder may count their classes from another number."""
    found: dict[Path, set[int]] = defaultdict(set)
    for mask in masks:
        found[mask.path.parent] |= set(mask.codes.tolist()) - {IGNORE}
    for one, other in itertools.permutations(found, 2):
        if len(found[one]) > 2 and {value + 1 for value in found[one]} == found[other]:
            yield (
                f"the masks in '{one}' have the values {join_some(sorted(found[one]))}, and those "
                f"in '{other}' {join_some(sorted(found[other]))}, so one value may mean different "
                "classes in them; if so, save all masks with the same values, otherwise ignore "
                "this note"
            )
            return


def describe_states(masks: Sequence[MaskContent]) -> Iterator[str]:
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
            shared = join_some([value for value in before if value])
            yield (
                f"masks called '{states[0]}' have the values {join_some(before)}, and those called "
                f"'{states[1]}' {join_some(after)}, so {shared} may mean different classes; if "
                "so, choose the images and masks of one kind in dataset.toml, otherwise ignore "
                "this note"
            )


def describe_border(border: int | None) -> list[str]:
    """Say that a code may be a drawn border, unless it is ignored anyway."""
    if border is None or border in (IGNORE, COLOR_FLAG | VOC_BORDER):
        return []
    shown = f"0x{border - COLOR_FLAG:06x}" if border >= COLOR_FLAG else str(border)
    return [
        f"pixels of the value {shown} form thin lines between all areas, like a drawn border; if "
        f"they are not a class, set ignore = [{shown}] in dataset.toml, otherwise ignore this note"
    ]


def find_border(masks: Iterable[CodeMap]) -> int | None:
    """Return the code of thin lines without which areas of other codes hardly ever meet, or None.

    Three codes or more are needed, so that thin things on a background are not a border.
    """
    border = None
    for codes in masks:
        starts, lengths = find_runs(codes)
        values, place = np.unique(codes.ravel()[starts], return_inverse=True)
        if len(values) > 2:
            found = _border_of(codes, values, np.bincount(place, lengths))
            # Most masks show at once that their areas meet.
            if found is None or border not in (None, found):
                return None
            border = found
        elif border is None:
            return None
    return border


def _border_of(codes: CodeMap, values: NDArray[Any], counts: NDArray[Any]) -> int | None:
    """Return the code between all areas of a mask, or None."""
    pairs = [
        np.stack([one[differs], other[differs]])
        for one, other in ((codes[1:], codes[:-1]), (codes[:, 1:], codes[:, :-1]))
        if (differs := one != other).any()
    ]
    if not pairs or len(values) > _MAX_BORDERED_CODES:
        return None
    changes = np.concatenate(pairs, axis=1)
    touched = np.array([(changes == value).any(0).sum() for value in values])
    k = int(touched.argmax())
    is_between = touched[k] >= _MIN_BORDER_SHARE * changes.shape[1]
    # Lines have two sides.
    is_thin = 2 * counts[k] <= min(_MAX_BORDER_WIDTH * touched[k], codes.size)
    return int(values[k]) if is_between and is_thin else None


def describe_photographs(masks: Sequence[MaskContent]) -> str:
    """Return the problem that most masks look like photographs."""
    worst = max(masks, key=lambda mask: len(mask.codes))
    total = len({code for mask in masks for code in mask.codes.tolist()})
    return (
        f"the masks have {total} different values or colours ('{worst.path}' alone has "
        f"{len(worst.codes)}) and hardly any plain areas, so they look like photographs; check "
        "which folder has the masks, and name it in a dataset.toml"
    )


def describe_too_many(masks: Sequence[MaskContent], number: int) -> str:
    """Return the problem that the masks have more values or colours than a model has classes."""
    worst = max(masks, key=lambda mask: len(mask.codes))
    return (
        f"the masks have {number} different values or colours ('{worst.path}' alone has "
        f"{len(worst.codes)}), but a model can have {MAX_CLASSES} classes at most; if they "
        "number objects, set objects = true in dataset.toml, otherwise list the classes in "
        "classes.toml"
    )


def describe_ids_and_colors(masks: Sequence[MaskContent]) -> str:
    """Return a problem if some masks have ids and others colours, or ``""``."""
    with_ids = [mask for mask in masks if _has_low_ids(mask) and not mask.palette]
    colored = [mask for mask in masks if mask.has_colors]
    if not with_ids or not colored:
        return ""
    return _describe_two_ways(with_ids[0], colored[0], "colours")


def describe_two_scales(masks: Sequence[MaskContent]) -> str:
    """Return a problem if some masks have ids and others as many grey levels, or ``""``.

    The ids may also count from 1, such as 1 and 2 beside 0 and 255.
    """
    groups = [[mask for mask in masks if _has_low_ids(mask) == is_low] for is_low in (True, False)]
    low, high = ({code for mask in group for code in mask.codes.tolist()} for group in groups)
    levels = high - {0}
    first = low & {0}
    if len(low - first) != len(high - first) or len(low - first) < 2 or low & levels:
        return ""
    if min(levels) < MIN_GREY_LEVEL or np.ptp(np.diff([0, *sorted(levels)])) > 1:
        return ""
    other = next(mask for mask in groups[1] if mask.highest > 0)
    return _describe_two_ways(groups[0][0], other, "grey levels")


def _has_low_ids(mask: MaskContent) -> bool:
    return 0 < mask.highest < MIN_GREY_LEVEL


def _describe_two_ways(with_ids: MaskContent, other: MaskContent, others_have: str) -> str:
    return (
        f"some masks have ids ({join_some(with_ids.codes.tolist())}), such as '{with_ids.path}', "
        f"and others {others_have}, such as '{other.path}', so each class seems to have two "
        "values; save all masks in the same way"
    )


def describe_lossy_ids(masks: Sequence[MaskContent]) -> str:
    """Return a problem if most masks are JPEG files of ids, which JPEG mixes up, or ``""``."""
    lossy = [mask for mask in masks if is_lossy(mask) and _has_low_ids(mask)]
    if 2 * len(lossy) <= len(masks):
        return ""
    return (
        f"the masks, such as '{lossy[0].path}', are JPEG files of the values "
        f"{join_some(lossy[0].codes.tolist())}; JPEG alters values by one or more, so neighbouring "
        "ids are mixed up; export the masks as PNG"
    )


def describe_stretched(masks: Sequence[MaskContent]) -> str:
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
        join_some([f"#{code - COLOR_FLAG:06x}" if code >= COLOR_FLAG else code for code in codes])
        for codes in (few, many)
    )
    return (
        f"the {'colours' if are_colors else 'values'} of '{steps[few].path}' are {what}, and those "
        f"of '{steps[many].path}' {else_what}: each mask seems to be stretched to "
        f"{'a range of colours' if are_colors else '0 to 255'} separately, as for display, so one "
        "value means different classes; save the ids themselves"
    )


def _find_levels(mask: MaskContent) -> Iterator[tuple[float, int]]:
    """Yield the grey level of each code, or the one that its colour displays, with the code."""
    codes = [code for code in mask.codes.tolist() if code >= 0]
    if not mask.has_colors:
        yield from ((code, code) for code in codes)
    elif len(codes) <= MAX_CLASSES and codes[0] >= COLOR_FLAG:
        levels = find_displayed_levels([channels_of(code) for code in codes])
        yield from zip(levels, codes, strict=True) if levels else ()


def refuse_two_encodings(masks: Sequence[MaskContent]) -> None:
    """Refuse masks if some store a class as 1 and others as 255.

    Raises:
        DataError: There are masks of both kinds.
    """
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


def refuse_unknown(mask: MaskContent, table: ClassTable) -> None:
    """Refuse a mask with codes that are not classes.

    Raises:
        DataError: The mask has such codes; the likely cause is named.
    """
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
    return join_some([f"#{code:06x}" for code in table.stored] if table.by_color else table.stored)


def join_some(items: Sequence[object]) -> str:
    """Join items for a message, which names only the first of many."""
    return join_names(items, _MAX_LISTED)


def refuse_ade20k(root: Path, masks: Iterable[Path]) -> None:
    """Refuse the masks of the full ADE20K, whose colours hold a class and the number of an object.

    They are called ``a_seg.png`` and lie beside ``a_atr.txt``, ``a.json`` or ``a_parts_1.png``.

    Raises:
        DataError: These are such masks. The message has lines of Python that convert them.
    """
    paths = sorted({path for path in masks if path.stem.endswith("_seg")})[:_NUM_ADE20K_MASKS]
    if not paths or not all(map(_is_of_ade20k, paths)):
        return
    raise DataError(
        f"masks such as '{paths[0]}' are those of the full ADE20K: their red and green channels "
        "hold the class of each pixel, as R // 10 * 256 + G, and the blue one numbers the objects. "
        "Files with _parts_1 and so on show parts of the objects. These lines of Python write "
        f"masks of the {_NUM_ADE20K_CLASSES} most frequent classes, with their images and names, "
        "to the folder OUT:\n"
        "import collections, json, numpy, pathlib, PIL.Image, shutil\n"
        "def read(path):\n"
        "    pixels = numpy.array(PIL.Image.open(path).convert('RGB')).astype(int)\n"
        "    return pixels[..., 0] // 10 * 256 + pixels[..., 1]\n"
        f"folder = pathlib.Path({str(root)!r})\n"
        "counts, names = collections.Counter(), {}\n"
        "for path in folder.rglob('*_seg.png'):\n"
        "    for number, count in zip(*numpy.unique(read(path), return_counts=True)):\n"
        "        counts[int(number)] += int(count) * (number > 0)\n"
        "    about = path.with_name(path.name.replace('_seg.png', '.json'))\n"
        "    text = about.read_text('latin-1') if about.exists() else '{}'\n"
        "    for each in json.loads(text).get('annotation', {}).get('object', []):\n"
        "        names[each.get('name_ndx')] = each.get('name')\n"
        f"kept = [each for each, count in counts.most_common({_NUM_ADE20K_CLASSES}) if count]\n"
        "for path in folder.rglob('*_seg.png'):\n"
        "    numbers, stem = read(path), path.name.removesuffix('_seg.png')\n"
        "    mask = sum((numbers == kept[k]) * (k + 1) for k in range(len(kept)))\n"
        "    for place in 'images', 'masks':\n"
        "        target = pathlib.Path('OUT', place) / path.relative_to(folder).parent\n"
        "        target.mkdir(parents=True, exist_ok=True)\n"
        "        if place == 'images':\n"
        "            shutil.copy(path.with_name(stem + '.jpg'), target)\n"
        "        else:\n"
        "            PIL.Image.fromarray(mask.astype('uint8')).save(target / (stem + '.png'))\n"
        "listed = {'other': 0, **{names.get(kept[k]) or f'class {kept[k]}': k + 1\n"
        "          for k in range(len(kept))}}\n"
        "pathlib.Path('OUT', 'classes.json').write_text(json.dumps(listed))"
    )


def _is_of_ade20k(path: Path) -> bool:
    stem = path.name.removesuffix("_seg.png")
    beside = (f"{stem}_atr.txt", f"{stem}.json", f"{stem}_parts_1.png")
    points = read_points(path) if any(path.with_name(name).exists() for name in beside) else None
    # The red channel of a colour is above the others.
    return points is not None and bool(points.max() >= 1 << 16 and ((points >> 32) % 10 == 0).all())
