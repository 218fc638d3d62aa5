"""A few masks and their images -> whether the masks are scribbles or outlines, and not areas.

Scribbles are a few strokes inside of objects; all other pixels have one value. As a class, that
value would be wrong at nearly every pixel. Masks of thin objects such as vessels look similar, but
they end where the image changes, and strokes end anywhere. Outlines are thin closed lines, of which
one side is an object and the other is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.data.class_names import find_class_names
from useg.data.classes_from_masks import has_ignored_255
from useg.data.dataset import (
    COLOR_FLAG,
    CodeMap,
    MaskEncoding,
    Pair,
    pick_evenly,
    read_pair_image,
    read_stored_mask,
    to_codes,
)
from useg.data.mask_content import channels_of, find_runs
from useg.errors import DataError, UsageError
from useg.machine import in_parallel
from useg.scoring.metrics import regions

# Masks that are examined.
_NUM_MASKS_READ = 8
# This many of them have strokes on the same value.
_MIN_ALIKE_SHARE = 0.8
# The value of unlabelled pixels has at least this share of a mask.
_MIN_UNLABELLED_SHARE = 0.6
# Strokes of two classes seldom meet: share of all places where the value changes.
_MAX_MEETING_SHARE = 0.12
# Maximum width of a stroke: share of the shorter side of the mask, and pixels in small ones.
_MAX_WIDTH_SHARE = 0.06
_MAX_WIDTH_PIXELS = 6
# Steps of the image are compared over these distances: lines are thin, and edges are blurred.
_STEP_PIXELS = (1, 3)
# Blocks in which an image is compared with itself.
_BLOCK_PIXELS = 16
# Changes of the image where the mask changes, relative to those around.
_MAX_EDGE_RATIO = 1.15
# Outlines enclose this many times their own area. This share of their sides is inside, and nearly
# all that is outside is one region, unlike what lies between roads or vessels.
_MIN_ENCLOSED = 1.5
_INNER_SIDES = (0.3, 0.6)
_MIN_SURROUNDING_SHARE = 0.9


@dataclass(frozen=True)
class Scribbles:
    """The codes of scribbles: that of unlabelled pixels, and those of the strokes."""

    unlabelled: int
    strokes: frozenset[int]


def find_scribbles(pairs: Sequence[Pair], encoding: MaskEncoding) -> Scribbles | None:
    """Return what masks hold if they are scribbles, else None.

    Args:
        pairs: Pairs with mask files.
        encoding: How the masks hold the classes.
    """
    chosen = pick_evenly(pairs, _NUM_MASKS_READ)
    # Most masks show at once that they are full.
    first = [_read_strokes(pair, encoding) for pair in chosen[:1]]
    if not any(first):
        return None
    found = [*first, *in_parallel(lambda pair: _read_strokes(pair, encoding), chosen[1:])]
    read = [each for each in found if each is not None]
    ((code, count),) = Counter(each.unlabelled for each in read).most_common(1)
    if count < _MIN_ALIKE_SHARE * len(found):
        return None
    ratios = [ratio for pair in chosen if (ratio := _edge_ratio(pair, encoding, code)) is not None]
    if not ratios or float(np.median(ratios)) >= _MAX_EDGE_RATIO:
        return None
    strokes = frozenset().union(*(each.strokes for each in read if each.unlabelled == code))
    return Scribbles(code, strokes)


def describe_scribbles(pairs: Sequence[Pair], encoding: MaskEncoding, folder: Path) -> str:
    """Return a note if the masks are strokes of one class, or ``""``.

    Args:
        pairs: All pairs.
        encoding: How their masks hold the classes.
        folder: The data set's folder, where files may name the value of unlabelled pixels.

    Raises:
        DataError: The masks are scribbles of classes, and no setting says what the rest is; or
            they are outlines.
    """
    pairs = [pair for pair in pairs if pair.truth is None]
    _refuse_outlines(pairs, encoding, folder)
    found = find_scribbles(pairs, encoding)
    if found is None or encoding.objects or found.unlabelled in encoding.nodata:
        return ""
    values = {found.unlabelled, *found.strokes}
    if found.unlabelled < 0 or (found.unlabelled == IGNORE and has_ignored_255(values)):
        return ""
    stored = found.unlabelled % COLOR_FLAG
    shown = f"0x{stored:06x}" if found.unlabelled >= COLOR_FLAG else str(stored)
    begin = (
        f"the masks look like scribbles: a few strokes on pixels of the value {shown}, and the "
        "strokes end where the images have no edges"
    )
    if len(found.strokes) < 2:
        return (
            f"{begin}; if pixels of {shown} are not labelled, scribble on the background too, with "
            f"another value, and write ignore = [{shown}] into dataset.toml, otherwise ignore "
            "this note"
        )
    named = (each for named in find_class_names(folder) for each in named.classes)
    color = channels_of(stored) if found.unlabelled >= COLOR_FLAG else ()
    if any(each.color == color if color else each.id == stored for each in named):
        return ""
    raise DataError(
        f"{begin}. If these pixels are not labelled, write ignore = [{shown}] into "
        f"{folder / 'dataset.toml'}, and nothing is learned from them; if they are a class, write "
        "ignore = [] into it"
    )


def _refuse_outlines(pairs: Sequence[Pair], encoding: MaskEncoding, folder: Path) -> None:
    """Refuse masks of outlines, whose areas would be background.

    Raises:
        DataError: Most masks are outlines.
    """
    chosen = pick_evenly(pairs, _NUM_MASKS_READ)
    num_read = num_outlines = 0
    for pair in chosen:
        codes = _read(pair, encoding)
        is_outline = None if codes is None else _is_outline(codes)
        # Most masks show at once that they have areas.
        if is_outline is False:
            return
        num_read += codes is not None
        num_outlines += is_outline is True
    if 2 * num_outlines <= num_read:
        return
    raise DataError(
        f"the masks, such as '{chosen[0].mask}', seem to be outlines: thin closed lines around "
        "areas of the same value as the background. Fill the outlines and save them as masks; if "
        f"the lines are the class to learn, write ignore = [] into {folder / 'dataset.toml'}"
    )


def _is_outline(codes: CodeMap) -> bool | None:
    """Return whether a mask has only thin closed lines.

    None: it has one value everywhere, or the border of the image may cut the lines.
    """
    values, counts = np.unique(codes, return_counts=True)
    if len(values) == 1:
        return None
    is_line = codes == values[counts.argmin()]
    area = int(counts.min())
    if len(values) > 2 or _MIN_ENCLOSED * area > counts.max():
        return False
    steps = is_line[1:] != is_line[:-1], is_line[:, 1:] != is_line[:, :-1]
    sides = int(steps[0].sum() + steps[1].sum())
    widest = max(_MAX_WIDTH_PIXELS, _MAX_WIDTH_SHARE * min(codes.shape))
    if 2 * area > widest * sides:
        return False
    numbers = regions(is_line)
    sizes = np.bincount(numbers.ravel(), ~is_line.ravel())
    is_outside = np.zeros(len(sizes), bool)
    for side in (numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]):
        is_outside[side] = True
    enclosed, outside = sizes[~is_outside].sum(), sizes[is_outside]
    if outside.max() < _MIN_SURROUNDING_SHARE * outside.sum():
        return None
    is_inside = ~is_line & ~is_outside[numbers]
    inner = int(
        (steps[0] & (is_inside[1:] | is_inside[:-1])).sum()
        + (steps[1] & (is_inside[:, 1:] | is_inside[:, :-1])).sum()
    )
    is_closed = _INNER_SIDES[0] <= inner / sides <= _INNER_SIDES[1]
    return bool(is_closed and enclosed >= _MIN_ENCLOSED * area)


def _read(pair: Pair, encoding: MaskEncoding) -> CodeMap | None:
    try:
        return to_codes(read_stored_mask(pair, encoding))[0]
    except UsageError:
        # Reading all masks reports it.
        return None


def _read_strokes(pair: Pair, encoding: MaskEncoding) -> Scribbles | None:
    """Return the strokes of a mask; None if it has large areas of several values."""
    codes = _read(pair, encoding)
    if codes is None:
        return None
    starts, lengths = find_runs(codes)
    values, place = np.unique(codes.ravel()[starts], return_inverse=True)
    counts = np.bincount(place, lengths)
    code = int(values[counts.argmax()])
    area = float(codes.size - counts.max())
    if counts.max() < _MIN_UNLABELLED_SHARE * codes.size or not area:
        return None
    changes = meetings = 0
    for one, other in ((codes[1:], codes[:-1]), (codes[:, 1:], codes[:, :-1])):
        differs = one != other
        changes += int(differs.sum())
        meetings += int((differs & (one != code) & (other != code)).sum())
    widest = max(_MAX_WIDTH_PIXELS, _MAX_WIDTH_SHARE * min(codes.shape))
    if meetings > _MAX_MEETING_SHARE * changes or 2 * area > widest * changes:
        return None
    return Scribbles(code, frozenset(int(value) for value in values) - {code})


def _edge_ratio(pair: Pair, encoding: MaskEncoding, code: int) -> float | None:
    """Return how much more an image changes at the ends of strokes than elsewhere."""
    codes = _read(pair, encoding)
    try:
        image = read_pair_image(pair)
    except UsageError:
        return None
    if codes is None or image.shape[:2] != codes.shape:
        return None
    is_marked = codes != code
    return edge_ratio(image, is_marked, _around(is_marked))


def edge_ratio(
    image: NDArray[Any], areas: NDArray[Any], near: NDArray[np.bool_] | None = None
) -> float | None:
    """Return how much more an image changes between areas than it does anywhere.

    Args:
        image: ``(H, W, C)``.
        areas: Class, code or truth value of each pixel ``(H, W)``.
        near: Where the image is compared with itself ``(H, W)``; None: everywhere.

    Returns:
        The ratio of the mean roots of its steps; None if there is one area, or the image is plain.
    """
    ratios = [_compare_steps(image, areas, near, distance) for distance in _STEP_PIXELS]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _around(is_marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the surroundings of marks: the blocks with marks, and the blocks beside them."""
    H, W = is_marked.shape
    padded = np.pad(is_marked, ((0, -H % _BLOCK_PIXELS), (0, -W % _BLOCK_PIXELS)))
    rows, columns = (side // _BLOCK_PIXELS for side in padded.shape)
    blocks = padded.reshape(rows, _BLOCK_PIXELS, columns, _BLOCK_PIXELS).any((1, 3))
    beside = np.lib.stride_tricks.sliding_window_view(np.pad(blocks, 1), (3, 3)).any((2, 3))
    return beside.repeat(_BLOCK_PIXELS, 0).repeat(_BLOCK_PIXELS, 1)[:H, :W]


def _compare_steps(
    image: NDArray[Any], areas: NDArray[Any], near: NDArray[np.bool_] | None, distance: int
) -> float | None:
    at_ends, around = [], []
    for axis in (0, 1):
        pixels = image.swapaxes(0, axis).astype(np.float32)
        ends = areas.swapaxes(0, axis)
        steps = np.sqrt(np.abs(pixels[distance:] - pixels[:-distance]).mean(2))
        # The change lies in the middle of a step.
        first = distance // 2
        last = len(ends) - first
        at_ends.append(steps[ends[first : last - 1] != ends[first + 1 : last]])
        whole = steps if near is None else steps[near.swapaxes(0, axis)[first : last - 1]]
        around.append(whole.ravel())
    here, all_steps = np.concatenate(at_ends), np.concatenate(around)
    return float(here.mean() / all_steps.mean()) if here.size and all_steps.any() else None
