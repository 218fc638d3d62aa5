"""A mask -> the values or colours that it stores, and how many pixels have each.

What a mask stores at a pixel is a *code*: a value, or a colour. The class table, the checks of
``useg inspect`` and its repairs all begin with the counts of codes.

Some masks store values and colours that are not classes: they come from smoothing, from JPEG, from
mistakes in painting, or from masks that were saved in another way than the rest. They are dropped
here.

Before it is known which files are masks, a few points or pixels of each show what it may be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Color, pack_color
from useg.data.dataset import (
    COLOR_FLAG,
    CodeMap,
    MaskEncoding,
    Pair,
    pick_evenly,
    read_stored_mask,
    to_codes,
)
from useg.data.published_classes import KNOWN_PALETTES, grey_levels, match_grey_palette
from useg.errors import UsageError
from useg.images.formats import STACK_SUFFIXES
from useg.images.image_files import read_image, read_mask, read_mask_and_alpha, read_palette
from useg.images.stacks import read_stack

# Ids are smaller than this; larger values are grey levels.
MIN_GREY_LEVEL = 14

# A run of one code that is this long is not a smeared edge between two others.
_MIN_INTERIOR_RUN_PIXELS = 4

# More values than this are a photograph if they hardly form any plain areas.
MAX_UNDOUBTED_VALUES = 64
# JPEG leaves plain areas within this distance of their colour (sum over three channels).
MAX_JPEG_DISTANCE = 60
# A mixture of two colours is at most this far from the straight line between them.
_MAX_MIXTURE_DISTANCE = 24
# Two levels are at least this far apart, and noise changes a level by at most this much.
_MIN_TWO_LEVEL_GAP = 100
_MAX_LEVEL_NOISE = 20
# Levels of soft edges lie between a lower and a higher level, are evenly spread over such a range,
# and cover less than the object itself.
_MIN_BETWEEN_SHARE = 0.95
_MIN_SOFT_RANGE = 200
_MAX_SOFT_GAPS = 1.1
_MAX_SOFT_SHARE = 0.4
# With fewer masks, a value that only one of them has is not suspicious.
_MIN_MASKS_OF_ODD_VALUES = 5
# A patch of a suspicious value covers at most this share of its mask.
_MAX_ODD_SHARE = 0.005
_LOSSY_SUFFIXES = (".jpg", ".jpeg")
# Intersection over union from which the shapes of two masks are nearly the same, and masks that are
# compared.
SAME_SHAPE_IOU = 0.9
_NUM_COMPARED_SHAPES = 6
# Points of a grid, in either direction, at which files are compared.
_GRID_POINTS = 256
# In a photograph, at least this share of neighbouring pixels differ, and in hardly any mask.
_MIN_NOISE = 0.2


@dataclass(frozen=True)
class MaskContent:
    """What one mask stores.

    Args:
        path: The mask file.
        codes: The codes that occur, sorted; none if all were dropped.
        counts: Pixels of each code.
        interior_counts: Those of them in horizontal runs of at least four.
        ramp_counts: Those of them on a short slope from a lower to a higher value.
        between_counts: Those of them on any slope between levels that are far apart.
        palette: The colour of each value as a code, if the file has a palette.
        band: The band of an RGB file that alone is not 0, or None for files of one band or colours.
    """

    path: Path
    codes: NDArray[np.int64]
    counts: NDArray[np.int64]
    interior_counts: NDArray[np.int64]
    ramp_counts: NDArray[np.int64]
    between_counts: NDArray[np.int64]
    palette: Mapping[int, int] = field(default_factory=dict)
    band: int | None = None

    @property
    def highest(self) -> int:
        """The highest code; 0 if there is none."""
        return int(self.codes[-1]) if len(self.codes) else 0

    @property
    def has_colors(self) -> bool:
        """Whether it stores colours."""
        return self.highest >= COLOR_FLAG

    def as_color(self, code: int) -> int:
        """Return a code as a colour: of the palette, of its band, or grey."""
        if code >= COLOR_FLAG:
            return code
        value = min(max(code, 0), 255)
        if self.band is not None:
            return COLOR_FLAG | value << 16 - 8 * self.band
        return self.palette.get(code, COLOR_FLAG | value * 0x010101)


def color_code(color: Sequence[int]) -> int:
    """Return the code of a colour (red, green, blue)."""
    return COLOR_FLAG | pack_color(color)


def channels_of(code: int) -> Color:
    """Return the colour (red, green, blue) of a code."""
    return code >> 16 & 255, code >> 8 & 255, code & 255


def find_runs(codes: CodeMap) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return where runs of equal codes begin in the flat mask, and their lengths."""
    flat = codes.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, len(flat))
    starts = np.append(0, ends[:-1])
    return starts, ends - starts


def count_codes(
    path: Path,
    codes: CodeMap,
    runs: tuple[NDArray[np.intp], NDArray[np.intp]] | None = None,
    palette: Mapping[int, int] | None = None,
    band: int | None = None,
) -> MaskContent:
    """Count the pixels of each code of a mask.

    A mask consists of long runs, and counting runs is many times faster than counting pixels.

    Args:
        path: The mask file.
        codes: Its codes ``(H, W)``.
        runs: What :func:`find_runs` returns for them, if that is known.
        palette: The colour of each value, as a code.
        band: As in :class:`MaskContent`.
    """
    starts, lengths = runs or find_runs(codes)
    found, place = _find_distinct(codes.ravel()[starts])
    interior = lengths * (lengths >= _MIN_INTERIOR_RUN_PIXELS)
    ramps, between = _count_slopes(codes, found)
    return MaskContent(
        path,
        codes=found.astype(np.int64),
        counts=np.bincount(place, lengths).astype(np.int64),
        interior_counts=np.bincount(place, interior).astype(np.int64),
        ramp_counts=ramps,
        between_counts=between,
        palette={int(code): palette[int(code)] for code in found if int(code) in palette}
        if palette
        else {},
        band=band,
    )


def _find_distinct(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return the distinct values, sorted, and the place of each value among them."""
    if values.dtype != np.uint8:
        return np.unique(values, return_inverse=True)
    # Sorting takes several times as long.
    occurs = np.bincount(values, minlength=256) > 0
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[values]


def _count_slopes(
    codes: CodeMap, found: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the pixels of each grey level on short slopes, which smoothing leaves, and on any."""
    if len(found) < 3 or not MIN_GREY_LEVEL <= found[-1] < COLOR_FLAG:
        return np.zeros(len(found), np.int64), np.zeros(len(found), np.int64)
    rows, columns = _find_slopes(codes), _find_slopes(np.ascontiguousarray(codes.T))
    counts = []
    for is_on_row, is_on_column in zip(rows, columns, strict=True):
        values, number = np.unique(codes[is_on_row | is_on_column.T], return_counts=True)
        counts.append(np.zeros(len(found), np.int64))
        counts[-1][np.searchsorted(found, values)] = number
    return counts[0], counts[1]


def _find_slopes(codes: CodeMap) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which pixels are in runs between a lower and a higher one of the same row.

    First those in short runs, and then all.
    """
    width = codes.shape[1]
    starts, lengths = find_runs(codes)
    values = codes.ravel()[starts].astype(np.int64)
    before, here, after = values[:-2], values[1:-1], values[2:]
    row = starts // width
    # A run may begin in the row before: what counts is where this one and the next begin.
    is_inside = (starts[1:-1] % width > 0) & (row[1:-1] == row[2:])
    rises = (before < here) & (here < after) | (before > here) & (here > after)
    is_between = np.zeros(len(starts), bool)
    is_between[1:-1] = rises & is_inside
    is_short = is_between & (lengths < _MIN_INTERIOR_RUN_PIXELS)
    return (
        np.repeat(is_short, lengths).reshape(codes.shape),
        np.repeat(is_between, lengths).reshape(codes.shape),
    )


def read_content(pair: Pair, encoding: MaskEncoding) -> MaskContent:
    """Read what a pair's mask stores.

    Raises:
        DataError: The file cannot be read.
    """
    codes, band = to_codes(read_stored_mask(pair, encoding))
    return count_codes(pair.mask, codes, palette=read_palette_codes(pair.mask), band=band)


def read_palette_codes(path: Path) -> dict[int, int]:
    """Return the colours of a palette file as codes; empty for other files."""
    colors = read_palette(path)
    return {} if colors is None else {v: color_code(color) for v, color in enumerate(colors)}


def sum_counts(
    masks: Sequence[MaskContent], *, as_colors: bool = False
) -> tuple[Counter[int], Counter[int], Counter[int], Counter[int]]:
    """Sum the pixels of each code over all masks: all, interior ones, on ramps, on any slope."""
    sums: tuple[Counter[int], Counter[int], Counter[int], Counter[int]]
    sums = (Counter(), Counter(), Counter(), Counter())
    for mask in masks:
        keys = [mask.as_color(c) if as_colors else c for c in mask.codes.tolist()]
        each = (mask.counts, mask.interior_counts, mask.ramp_counts, mask.between_counts)
        for total, counts in zip(sums, each, strict=True):
            for key, count in zip(keys, counts.tolist(), strict=True):
                total[key] += count
    return sums


def mixes_two_encodings(values: Iterable[frozenset[int]]) -> bool:
    """Return whether some masks store 1 and others 255 for one class: never both in one mask."""
    each = [found for found in values if found]
    return frozenset().union(*each) == {0, 1, IGNORE} and not any(
        {1, IGNORE} <= found for found in each
    )


def drop_other_encoding(masks: Sequence[MaskContent]) -> list[MaskContent]:
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
    return len(mask.codes) > MAX_UNDOUBTED_VALUES and bool(
        mask.interior_counts.sum() < 0.5 * mask.counts.sum()
    )


def are_smeared(masks: Sequence[MaskContent]) -> bool:
    """Whether smoothing, JPEG or noise made many of the codes."""
    totals, interior, ramps, between = sum_counts(masks)
    if len(totals) < 3 or max(totals) < MIN_GREY_LEVEL:
        return False
    return (
        _is_noise_of_two_levels(totals, interior)
        or _are_soft_edges(totals, between)
        or any(is_lossy(mask) for mask in masks)
        or _are_smoothed_levels(totals, interior, ramps)
        or _are_mostly_thin(masks, totals, interior)
    )


def _are_smoothed_levels(totals: Counter[int], interior: Counter[int], ramps: Counter[int]) -> bool:
    """Whether many codes lie on slopes between a lower and a higher level.

    The levels that were smoothed still have plain areas.
    """
    on_ramp = [code for code, count in totals.items() if ramps[code] > 0.5 * count]
    levels = totals.keys() - set(on_ramp)
    if sum(interior[code] for code in levels) < 0.5 * sum(totals[code] for code in levels):
        return False
    if len(on_ramp) >= max(2, 0.4 * (len(totals) - 2)):
        return True
    is_one_between_two = len(totals) == 3 and len(on_ramp) == 1
    if not is_one_between_two or max(totals) - min(totals) <= _MIN_TWO_LEVEL_GAP:
        return False
    count = totals[on_ramp[0]]
    return ramps[on_ramp[0]] >= 0.9 * count and count < 0.06 * totals.total()


def _are_mostly_thin(
    masks: Sequence[MaskContent], totals: Counter[int], interior: Counter[int]
) -> bool:
    """Whether many codes occur only as thin edges, and are neither ids nor colours of the scene."""
    num_thin = sum(interior[code] < 0.3 * count for code, count in totals.items())
    if len(totals) < 6 or num_thin < max(3, 0.4 * len(totals)):
        return False
    are_ids = max(totals) < min(200, 3 * len(totals))
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


def _are_soft_edges(totals: Counter[int], between: Counter[int]) -> bool:
    """Whether even levels lie along the edges of one object only, as a mean of annotators has.

    Regions of a class have other neighbours too, and cover more of the image.
    """
    levels = sorted(totals)
    inner, gaps = levels[1:-1], np.diff(levels)
    if len(inner) < 2 or levels[0] < 0 or levels[-1] >= COLOR_FLAG:
        return False
    soft = sum(totals[level] for level in inner)
    return (
        levels[-1] - levels[0] >= _MIN_SOFT_RANGE
        and bool(gaps.max() <= _MAX_SOFT_GAPS * gaps.min())
        and soft <= _MAX_SOFT_SHARE * (soft + min(totals[levels[0]], totals[levels[-1]]))
        and sum(between[level] for level in inner) >= _MIN_BETWEEN_SHARE * soft
    )


def is_lossy(mask: MaskContent) -> bool:
    """Whether a mask is a JPEG with more than two codes, of which compression made some."""
    return mask.path.suffix.lower() in _LOSSY_SUFFIXES and len(mask.codes) > 2


def _find_true_colors(masks: Sequence[MaskContent]) -> frozenset[int]:
    """Return the frequent colours, without those that JPEG or smoothing made.

    These are rarer and lie near a true colour, or between two of them.
    """
    totals, interior, _, between = sum_counts(masks)
    if _are_soft_edges(totals, between):
        ends = {min(totals), max(totals)}
        return frozenset(mask.as_color(code) for mask in masks for code in ends)
    totals, interior, *_ = sum_counts(masks, as_colors=True)
    min_count = 2e-4 * totals.total()
    true = np.zeros((0, 3))
    found: list[int] = []
    for code, count in totals.most_common():
        if count < min_count or len(found) >= MAX_UNDOUBTED_VALUES:
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


def keep_true_colors(masks: Sequence[MaskContent]) -> list[MaskContent]:
    """Return masks with only the colours that neither JPEG nor smoothing made."""
    colors = _find_true_colors(masks)
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


def drop_odd_codes(masks: Sequence[MaskContent]) -> list[MaskContent]:
    """Remove codes that only a patch of a single mask has, if all other codes are usual.

    It is a mistake in painting: 77 among 0, 1 and 2. Beside the other ids it may be a rare class.
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


def exchange_channels(code: int) -> int:
    """Return the code of a colour whose red and blue are exchanged.

    >>> channels_of(exchange_channels(color_code((1, 2, 3))))
    (3, 2, 1)
    """
    return color_code(channels_of(code)[::-1])


def find_exchanged(masks: Sequence[MaskContent]) -> frozenset[Path]:
    """Return the masks, at most half of them, that have the others' colours in the order BGR."""
    colors_of = {mask.path: {mask.as_color(code) for code in mask.codes.tolist()} for mask in masks}
    # Where a mask has both, these are two classes, which do not tell the order.
    both = {code for own in colors_of.values() for code in own if exchange_channels(code) in own}
    groups: tuple[set[Path], set[Path]] = (set(), set())
    colors: set[int] = set()
    for path, own in colors_of.items():
        own = own - both
        is_other = {exchange_channels(code) for code in own}
        colors |= own if not colors else set()
        groups[not own & colors and bool(is_other & colors)].add(path)
        colors |= own if own & colors else is_other if is_other & colors else set()
    is_ambiguous = any(exchange_channels(code) in colors for code in colors)
    if is_ambiguous or len(colors) < 2 or not groups[1]:
        return frozenset()
    return frozenset(groups[len(groups[1]) <= len(groups[0])])


def has_exchanged_channels(codes: Sequence[int], table: ClassTable) -> bool:
    """Whether unknown colours are those of classes if red and blue are exchanged."""
    return table.by_color and all(
        channels_of(exchange_channels(code)) in table.colors for code in codes
    )


def read_points(path: Path) -> NDArray[np.int64] | None:
    """Read a file's values, or packed colours, at the points of a grid; None if it is unreadable.

    The points lie at the same places of the picture whatever its size.
    """
    pixels: NDArray[Any]
    # Of a stack, the first page.
    for read in (read_mask, read_image, partial(read_mask, page=0)):
        with suppress(UsageError):
            pixels = read(path)
            break
    else:
        return None
    rows, columns = (
        np.arange(min(size, _GRID_POINTS)) * size // min(size, _GRID_POINTS)
        for size in pixels.shape[:2]
    )
    pixels = pixels[rows][:, columns]
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    codes = np.zeros(pixels.shape[:2], np.int64)
    for band in range(min(pixels.shape[2], 4)):
        values = pixels[..., band]
        if values.dtype.kind not in "iub":
            values = np.nan_to_num(values, nan=-1, posinf=-1, neginf=-1).clip(-(2**15), 2**15) * 64
        codes = codes << 16 | (values.astype(np.int64) & 0xFFFFFF)
    return codes


def is_photograph(path: Path) -> bool | None:
    """Return whether neighbouring pixels mostly differ, as in a photograph; None if unreadable."""
    try:
        is_stack = path.suffix.lower() in STACK_SUFFIXES
        pixels = read_image(path, page=_middle_page(path) if is_stack else None)
    except UsageError:
        return None
    strip = pixels[:: max(1, pixels.shape[0] // _GRID_POINTS)]
    if strip.shape[1] < 2:
        return None
    return bool((strip[:, 1:] != strip[:, :-1]).any(axis=2).mean() > _MIN_NOISE)


def has_transparent_part(path: Path) -> bool:
    """Return whether the transparency of a file differs from pixel to pixel."""
    try:
        alpha = read_mask_and_alpha(path)[1]
    except UsageError:
        return False
    return alpha is not None and bool(np.ptp(alpha))


def _middle_page(path: Path) -> int | None:
    """Return the page in the middle of a stack, which is seldom empty; None for one image."""
    pages = read_stack(path).find_images(num_bands=1)
    return pages[len(pages) // 2]


def is_two_valued(path: Path) -> bool:
    """Return whether a mask has at most two values."""
    points = read_points(path)
    return points is not None and len(np.unique(points)) <= 2


def compare_shapes(masks: Sequence[NDArray[np.int64] | None]) -> float:
    """Return the lowest IoU of the shapes in two of the masks; 0 if these are not shapes.

    Args:
        masks: What :func:`read_points` returns for each. They are shapes if they have two values in
            all, of which the lower one is outside.
    """
    readable = [points for points in masks if points is not None]
    values = sorted(set[int]().union(*(np.unique(points).tolist() for points in readable)))
    if len(values) != 2 or len(readable) < 2:
        return 0.0
    shapes = [points != values[0] for points in readable]
    return min(_iou(one, other) for one, other in combinations(shapes, 2))


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    if one.shape != other.shape:
        return 0.0
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def describe_constant_shape(masks: Iterable[Path]) -> str:
    """Return a sentence if masks have one shape in every image, like a field of view; or ``""``."""
    files = sorted(set(masks))
    points: list[NDArray[np.int64] | None] = []
    values: set[int] = set()
    for path in pick_evenly(files, _NUM_COMPARED_SHAPES):
        found = read_points(path)
        points.append(found)
        values |= set() if found is None else set(np.unique(found).tolist())
        if len(values) > 2:
            return ""
    iou = compare_shapes(points)
    if iou < SAME_SHAPE_IOU:
        return ""
    return (
        f"the masks mark nearly the same pixels in every image (IoU {iou:.2f}), like a field of "
        "view, which masks of classes rarely do; check that these files are the masks"
    )
