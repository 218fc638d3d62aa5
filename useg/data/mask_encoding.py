"""A few masks -> how their files hold the classes: in alpha, as numbered objects, at half the size.

Each of these is a habit of some tool, and each looks like ordinary classes until several masks are
compared. The user is told what was found, and ``dataset.toml`` can overrule it. Few masks are
decoded: headers give the sizes, and the first masks usually show that their values are classes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.data.dataset import (
    COLOR_FLAG,
    CodeMap,
    MaskEncoding,
    Pair,
    is_reduced,
    pick_evenly,
    read_pair_image,
    read_pair_size,
    to_codes,
)
from useg.data.mask_content import MAX_JPEG_DISTANCE
from useg.data.mask_problems import describe_border, find_border
from useg.errors import DataError, UsageError
from useg.images.image_files import read_mask_and_alpha, read_no_data, read_size
from useg.machine import in_parallel
from useg.scoring.metrics import regions

# This many masks show how all of them are stored.
_NUM_MASKS_READ = 24

# An object is one region if its largest region has this share of its pixels.
_MIN_LARGEST_SHARE = 0.9
# This share of all objects are one region; hidden by others, some are torn.
_MIN_SINGLE_SHARE = 0.9
# Fewer objects in one mask could be classes, such as two lungs and a heart.
_MIN_OBJECTS = 4
# Between objects there is background.
_MIN_BACKGROUND_SHARE = 0.02
# This many ids that are one region each are objects, or the parts of one body.
_MIN_MANY_OBJECTS = 8
# The share of the variance of an id's place that is within the id: objects are anywhere.
_MIN_PLACE_VARIANCE = 0.5

_NUMBERED_OBJECTS = (
    "the masks number their objects: nearly every value except 0 is one connected region. All "
    "objects were joined into one class, foreground (useg.read_objects returns the numbers); set "
    "objects = false in dataset.toml to make each value a class"
)
_UNCLEAR_OBJECTS = (
    "nearly every value except 0 is one connected region, whose place differs from mask to mask; "
    "if the values number objects, set objects = true in dataset.toml, otherwise ignore this note"
)


# Instance ids are a class times this factor, plus a number.
_CLASS_FACTOR, _RED_FACTOR = 1000, 1 << 16
_IN_THOUSANDS = (
    f"{_CLASS_FACTOR} times a class plus the number of an object, as in Cityscapes' instanceIds; "
    f"save mask // {_CLASS_FACTOR} as masks of classes"
)
_IN_RED = (
    "a class in the red channel and the number of an object in the others, as in CARLA's instance "
    "segmentation; save the red channel as masks of classes"
)
# The numbers of one class are consecutive if they span at most this many times their count.
_MAX_NUMBER_GAPS = 1.5
# Channels up to this are ids; those of colours are spread over 0 to 255.
_MAX_RED_ID = 40
# Number of masks in which numbers of objects are sought, and least pixels of most numbers in each.
_NUM_MASKS_OF_NUMBERS = 8
_MIN_NUMBERED_PIXELS = 16

# Values up to this may only distinguish neighbouring objects. If so, the regions of all values are
# alike. At least this many regions are compared.
_MAX_NEIGHBOUR_VALUE = 8
_MIN_REGIONS_ALIKE = 40
# With numbers of objects that may be classes, fewer regions suffice, and their places are known to
# differ.
_MIN_COUNTED_REGIONS_ALIKE = 16
_MAX_REGIONS_OF_MASK = 60
# Regions are alike if the variance between values is at most this many times that expected by
# chance.
_MAX_VARIANCE_RATIO = 6.0

# Cut-outs have nearly the colours of the image at this share of their pixels; JPEG changes some.
_MIN_SHOWN_SHARE = 0.5

# Larger masks are read at every n-th pixel.
_MAX_SIDE_PIXELS = 600

# A larger ratio of the sizes has another reason.
_MAX_SCALE = 16


@dataclass(frozen=True)
class MaskHeader:
    """The headers of a mask and its image.

    Args:
        size: (width, height) of the mask.
        image_size: That of its image; (0, 0) if that cannot be read.
        nodata: The value that marks pixels without data in the mask's file, or None.
    """

    size: tuple[int, int]
    image_size: tuple[int, int]
    nodata: float | None


# The codes of a mask and its transparency (H, W), or None.
DecodedMask = tuple[CodeMap, NDArray[Any] | None]

# So many visible colours may be classes; the colours of a photograph are more.
_MAX_VISIBLE_COLORS = 64


class _Masks(Iterable[DecodedMask]):
    """Masks that are decoded when they are first asked for.

    Masks that cannot be read are left out: reading all masks reports them.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._decoded: list[DecodedMask] = []
        self._rest = _decode_all(pairs)

    def __iter__(self) -> Iterator[DecodedMask]:
        yield from self._decoded
        for mask in self._rest:
            self._decoded.append(mask)
            yield mask

    def close(self) -> None:
        """Decode no more of them."""
        self._rest.close()


def find_encoding(
    pairs: Sequence[Pair],
    objects: bool | None = None,
    alpha: bool | None = None,
    *,
    are_inferred: bool = True,
) -> tuple[MaskEncoding, tuple[str, ...]]:
    """Read some masks and find out how they hold the classes.

    Args:
        pairs: Pairs with mask files.
        objects: Whether masks number objects; None if no file says.
        alpha: Whether the classes are in the transparency, likewise.
        are_inferred: Whether the values of the masks become the classes, since no table is known.

    Returns:
        The encoding, and notes about what was found, in words.

    Raises:
        DataError: Each value combines a class with the number of an object, and no file says so.
    """
    chosen = pick_evenly(pairs, _NUM_MASKS_READ)
    masks = _Masks(chosen)
    notes = []
    if alpha is None and (alpha := are_classes_in_alpha(masks)):
        notes.append(
            "the masks have the same colour everywhere and differ in their transparency, so "
            "useg reads the classes from it; to read the colours, set alpha = false in dataset.toml"
        )
    if objects is None:
        objects, found = _find_numbered(masks, chosen, bool(alpha), are_inferred)
        notes += found
    if are_inferred and not objects:
        notes += describe_border(find_border(_stored(masks, bool(alpha))))
    masks.close()
    headers = [header for pair in chosen if (header := _read_header(pair)) is not None]
    scale = find_scale(headers)
    if scale > 1:
        notes.append(
            f"the images are {scale} times as wide and high as their masks, which are enlarged "
            "without smoothing; if this is intended, ignore this note"
        )
    nodata = sorted({int(value) for header in headers for value in _nodata_of(header)})
    return MaskEncoding(objects, bool(alpha), scale, tuple(nodata)), tuple(notes)


def _find_numbered(
    masks: _Masks, pairs: Sequence[Pair], alpha: bool, are_inferred: bool
) -> tuple[bool, list[str]]:
    """Return whether masks number objects, and notes; the arguments are those of find_encoding."""
    judgement, notes = classify_values(_stored(masks, alpha)), []
    if are_inferred and not alpha:
        notes += _describe_possible_numbers(judgement, masks, pairs)
    if judgement == "unclear" and are_inferred:
        if _are_regions_alike(masks, pairs, _MIN_COUNTED_REGIONS_ALIKE):
            judgement = "objects"
        else:
            notes.append(_UNCLEAR_OBJECTS)
    if judgement == "objects":
        _refuse_cutouts(masks, pairs)
        notes.append(_NUMBERED_OBJECTS)
    return judgement == "objects", notes


def _refuse_cutouts(masks: Iterable[DecodedMask], pairs: Sequence[Pair]) -> None:
    """Refuse masks that show their images where they are not black.

    Raises:
        DataError: Most pixels of a mask are those of its image.
    """
    for (codes, _), pair in zip(masks, pairs, strict=False):
        is_colored = codes > COLOR_FLAG
        try:
            image = read_pair_image(pair).astype(np.int64)
        except UsageError:
            continue
        if not is_colored.any() or image.shape != (*codes.shape, 3):
            return
        colors = codes[is_colored, None] >> np.array([16, 8, 0]) & IGNORE
        distances = np.abs(colors - image[is_colored]).sum(1)
        if np.mean(distances <= MAX_JPEG_DISTANCE) < _MIN_SHOWN_SHARE:
            return
        raise DataError(
            f"the masks, such as '{pair.mask}', show parts of their images on black, not "
            "classes; save masks with a number for each class, such as 0 where they are black and "
            "1 elsewhere"
        )


def _stored(masks: Iterable[DecodedMask], alpha: bool) -> Iterator[CodeMap]:
    for codes, transparency in masks:
        if not alpha:
            yield codes
        elif transparency is not None:
            yield transparency


def _decode_all(pairs: Sequence[Pair]) -> Generator[DecodedMask]:
    """Decode the first mask, which often suffices, and then the others in parallel."""
    found = chain(map(_decode_or_skip, pairs[:1]), in_parallel(_decode_or_skip, pairs[1:]))
    yield from (mask for mask in found if mask is not None)


def _decode_or_skip(pair: Pair) -> DecodedMask | None:
    try:
        mask, alpha = read_mask_and_alpha(pair.mask, page=pair.page)
    except UsageError:
        return None
    return to_codes(mask)[0], alpha


def _read_header(pair: Pair) -> MaskHeader | None:
    try:
        size, nodata = read_size(pair.mask, pair.page), read_no_data(pair.mask)
    except UsageError:
        # Reading all masks reports it.
        return None
    try:
        return MaskHeader(size, read_pair_size(pair), nodata)
    except UsageError:
        return MaskHeader(size, (0, 0), nodata)


def _nodata_of(header: MaskHeader) -> list[float]:
    """Return the value that means no data, unless it is negative or NaN: no class has such ones."""
    value = header.nodata
    return [value] if value is not None and value >= 0 and value.is_integer() else []


def are_classes_in_alpha(masks: Iterable[DecodedMask]) -> bool:
    """Whether the colours of all masks are one, and their transparency differs.

    The colours may also be those of a photograph, as programs leave them that remove backgrounds.
    """
    levels: set[int] = set()
    for _, alpha in masks:
        if alpha is None:
            return False
        levels |= set(np.unique(alpha).tolist())
    if len(levels) < 2:
        return levels == {0}
    colors = {int(code) for codes, _ in masks for code in np.unique(codes)}
    if len(colors) > max(4 * len(levels), 256):
        return not _show_few_colors(masks)
    return len(colors) == 1


def _show_few_colors(masks: Iterable[DecodedMask]) -> bool:
    """Whether the visible colours are few, so that they are classes, whatever lies below."""
    visible = {
        int(code)
        for codes, alpha in masks
        if alpha is not None
        for code in np.unique(codes[alpha > 0])
    }
    return 1 < len(visible) <= _MAX_VISIBLE_COLORS


def find_scale(headers: Iterable[MaskHeader]) -> int:
    """Return the factor between the sizes of all images and their masks; 1 if factors differ."""
    scales = set()
    for header in headers:
        scale = round(header.image_size[0] / header.size[0])
        scales.add(scale if is_reduced(header.size, header.image_size, scale) else 1)
    scale = min(scales, default=1)
    return scale if len(scales) == 1 and 1 <= scale <= _MAX_SCALE else 1


def _describe_possible_numbers(
    judgement: str, masks: Iterable[DecodedMask], pairs: Sequence[Pair]
) -> list[str]:
    """Say that values may only distinguish neighbouring objects, if their regions are alike.

    Raises:
        DataError: Values hold a class and the number of an object in one.
    """
    how = _describe_factor(judgement == "both", masks)
    if how:
        raise DataError(
            f"the values of the masks, such as those of '{pairs[0].mask}', seem to be {how}, or "
            "write objects = true (all objects are one class) or false (each value is a class) "
            "into dataset.toml"
        )
    if judgement != "classes" or not _are_regions_alike(masks, pairs):
        return []
    return [
        "the regions of all values but 0 look alike: they have the same sizes, places and "
        "brightness, so the values may only distinguish neighbouring objects; if so, set "
        "objects = true in dataset.toml, otherwise ignore this note"
    ]


def _describe_factor(are_both: bool, masks: Iterable[DecodedMask]) -> str:
    """Return how values hold a class and the number of an object, and what to do; or ``""``.

    Args:
        are_both: Whether they certainly do, in red or times :data:`_CLASS_FACTOR`.
        masks: The masks.
    """
    if are_both:
        is_colored = any(codes.max() >= COLOR_FLAG for codes, _ in islice(masks, 1))
        return _IN_RED if is_colored else _IN_THOUSANDS
    found: set[int] = set()
    sizes = []
    for codes, _ in islice(masks, _NUM_MASKS_OF_NUMBERS):
        step = max(1, max(codes.shape) // _MAX_SIDE_PIXELS)
        values, counts = np.unique(codes[::step, ::step], return_counts=True)
        # Ids, and most colours, show at once that they do not number objects.
        if values[-1] <= IGNORE or values[-1] >= COLOR_FLAG + (_MAX_RED_ID << 16):
            return ""
        found |= set(values.tolist())
        sizes += counts.tolist()
    # Smoothing makes many values too, of few pixels each.
    if not found or np.median(sizes) < _MIN_NUMBERED_PIXELS:
        return ""
    values = np.array(sorted(found))
    if values[-1] >= COLOR_FLAG:
        kinds = np.unique(values - COLOR_FLAG >> 16)
        if values[0] < COLOR_FLAG or len(kinds) < 3 or len(values) < 2 * len(kinds):
            return ""
        return _IN_RED
    kinds, numbers = np.divmod(values, IGNORE + 1)
    several = [numbers[kinds == kind] for kind in np.unique(kinds[kinds > 0])]
    follow = [np.ptp(each) < _MAX_NUMBER_GAPS * len(each) for each in several]
    is_both = len(several) > 1 and len(values) > 2 * len(several) and np.mean(follow) > 0.5
    if not is_both or numbers[kinds == 0].any():
        return ""
    return (
        "256 times a class plus the number of an object, as in Mapillary's instances; save "
        "mask // 256 as masks of classes"
    )


def _are_regions_alike(
    masks: Iterable[DecodedMask], pairs: Sequence[Pair], least: int = _MIN_REGIONS_ALIKE
) -> bool:
    """Whether nothing but their values tells the regions of different values apart.

    Neighbours that touch get different values of a few, as on a map, so each value has regions of
    any size, place and brightness. Classes differ in one of them. ``least`` regions are needed.
    """
    found: set[int] = set()
    for codes, _ in islice(masks, _NUM_MASKS_OF_NUMBERS):
        if int(codes.max(initial=0)) > _MAX_NEIGHBOUR_VALUE:
            return False
        found |= set(np.unique(codes).tolist())
    if not found >= {0, 1, 2}:
        return False
    is_counted = least < _MIN_REGIONS_ALIKE
    looked_at = pick_evenly(pairs, _NUM_MASKS_READ if is_counted else _NUM_MASKS_OF_NUMBERS)
    rows = [row for pair in looked_at for row in _describe_regions(pair)]
    if len(rows) < least or len(set(map(len, rows))) > 1:
        return False
    regions_of = np.delete(rows, (2, 3) if is_counted else (), axis=1)
    values = regions_of[:, 0]
    kinds = [kind for kind in np.unique(values) if (values == kind).sum() >= _MIN_OBJECTS]
    if len(kinds) < 2:
        return False
    groups = [regions_of[values == kind, 1:] for kind in kinds]
    features = np.concatenate(groups)
    between = sum(len(each) * (each.mean(0) - features.mean(0)) ** 2 for each in groups)
    within = sum(((each - each.mean(0)) ** 2).sum(0) for each in groups)
    ratio = between / (len(groups) - 1) / np.maximum(within / (len(features) - len(groups)), 1e-9)
    return bool(ratio.max() < _MAX_VARIANCE_RATIO)


def _describe_regions(pair: Pair) -> list[list[float]]:
    """Return value, size, place, filling of its box, and colours of each region of a mask."""
    try:
        codes = to_codes(read_mask_and_alpha(pair.mask, page=pair.page)[0])[0]
        image = read_pair_image(pair).astype(np.float64)
    except UsageError:
        return []
    if codes.shape != image.shape[:2]:
        return []
    numbers = regions(np.ascontiguousarray(codes))
    rows = []
    for number in np.unique(numbers[codes > 0])[:_MAX_REGIONS_OF_MASK]:
        y, x = np.nonzero(numbers == number)
        if len(y) < _MIN_NUMBERED_PIXELS:
            continue
        box = (np.ptp(y) + 1) * (np.ptp(x) + 1)
        pixels = image[y, x]
        place = [int(codes[y[0], x[0]]), np.log(len(y)), y.mean(), x.mean(), len(y) / box]
        rows.append([*place, *pixels.mean(0).tolist(), *pixels.std(0).tolist()])
    return rows


def classify_values(masks: Iterable[CodeMap]) -> str:
    """Return what the values of masks are: ``objects``, ``classes``, ``both`` or ``unclear``.

    With ``both``, each has a class and the number of an object, such as 2001 and 2002.

    In nearly every mask each value but 0 is one connected region. That also holds for the parts of
    a body, so the values must be numbers as well: 1 to n where n differs from mask to mask; or
    values that hardly any other mask has; or many values that lie anywhere.
    """
    found: list[_Objects] = []
    for codes in masks:
        objects = _list_objects(codes)
        found += [objects] if len(objects.ids) else []
        # Most masks show at once that their classes have several regions.
        if found and _single_share(found) < _MIN_SINGLE_SHARE - 0.3 / len(found):
            return "classes"
    most = max((len(objects.ids) for objects in found), default=0)
    if most < 2 or _single_share(found) < _MIN_SINGLE_SHARE:
        return "classes"
    if np.mean([objects.background for objects in found]) < _MIN_BACKGROUND_SHARE:
        return "classes"
    lie_anywhere = _place_variance(found) >= _MIN_PLACE_VARIANCE
    if lie_anywhere and _are_classes_and_numbers(found):
        return "both"
    if len(found) == 1:
        return "objects" if most >= 4 * _MIN_MANY_OBJECTS else "classes"
    if most >= _MIN_OBJECTS and _differ_between_masks(found):
        return "objects"
    if not (lie_anywhere and _count_up(found)):
        return "classes"
    num_objects = {len(objects.ids) for objects in found}
    is_sure = most >= _MIN_OBJECTS and (len(num_objects) > 2 or most >= _MIN_MANY_OBJECTS)
    return "objects" if is_sure else "unclear"


@dataclass(frozen=True)
class _Objects:
    """The objects of one mask.

    Args:
        ids: The values but 0, sorted.
        is_single: Whether each is one region.
        middles: The middle ``(y, x)`` of each, from 0 to 1.
        background: The share of the mask that is 0.
    """

    ids: NDArray[np.int64]
    is_single: NDArray[np.bool_]
    middles: NDArray[np.float64]
    background: float


def _differ_between_masks(found: Sequence[_Objects]) -> bool:
    """Whether most values are in one mask only."""
    ids = np.concatenate([objects.ids for objects in found])
    return len(np.unique(ids)) > 0.5 * len(ids)


def _count_up(found: Sequence[_Objects]) -> bool:
    """Whether the values are 1 to n, with few gaps, in nearly every mask."""
    return bool(np.mean([each.ids[-1] <= 1.1 * len(each.ids) for each in found]) >= 0.9)


def _single_share(found: Sequence[_Objects]) -> float:
    return float(np.concatenate([objects.is_single for objects in found]).mean())


def _list_objects(codes: CodeMap) -> _Objects:
    step = max(1, max(codes.shape) // _MAX_SIDE_PIXELS)
    codes = np.ascontiguousarray(codes[::step, ::step])
    numbers = regions(codes).ravel()
    flat = codes.ravel().astype(np.int64)
    sizes = np.bincount(numbers)
    owner = np.zeros(len(sizes), np.int64)
    owner[numbers] = flat
    values, place = np.unique(owner, return_inverse=True)
    totals = np.bincount(place, sizes)
    largest = np.zeros(len(values))
    np.maximum.at(largest, place, sizes)
    y, x = np.divmod(np.arange(len(flat)), codes.shape[1])
    pixel_place = place[numbers]
    middles = np.stack([np.bincount(pixel_place, axis) / totals for axis in (y, x)], axis=1)
    middles /= codes.shape
    is_object = (values > 0) & (values != COLOR_FLAG)
    return _Objects(
        values[is_object],
        (largest >= _MIN_LARGEST_SHARE * totals)[is_object],
        middles[is_object],
        float(totals[~is_object].sum() / len(flat)),
    )


def _are_classes_and_numbers(found: Sequence[_Objects]) -> bool:
    """Whether values are several classes times a factor, plus numbers that follow each other.

    In colours, the class is in the red channel.
    """
    ids = np.concatenate([objects.ids for objects in found])
    is_colored = ids.min() >= COLOR_FLAG
    kinds, numbers = np.divmod(ids % COLOR_FLAG, _RED_FACTOR if is_colored else _CLASS_FACTOR)
    if kinds.min() < 1 or len(np.unique(kinds)) < 2 or (is_colored and kinds.max() >= _MAX_RED_ID):
        return False
    of_kind = [np.unique(numbers[kinds == kind]) for kind in np.unique(kinds)]
    follow = [each.max() - each.min() < _MAX_NUMBER_GAPS * len(each) for each in of_kind]
    return bool(np.mean(follow) > 0.5 and max(map(len, of_kind)) > 1)


def _place_variance(found: Sequence[_Objects]) -> float:
    """Return which share of the variance of places is within the ids, in the freer direction.

    It is 1 if no id is in two masks.
    """
    ids = np.concatenate([objects.ids for objects in found])
    middles = np.concatenate([objects.middles for objects in found])
    _, place, repeats = np.unique(ids, return_inverse=True, return_counts=True)
    is_repeated = repeats[place] > 1
    if not is_repeated.any():
        return 1.0
    means = np.stack([np.bincount(place, middles[:, axis]) / repeats for axis in (0, 1)], axis=1)
    within = ((middles - means[place])[is_repeated] ** 2).mean(0)
    total = middles[is_repeated].var(0)
    return float((within / np.maximum(total, 1e-9)).max())
