"""Several sets of masks for the same images -> the ground truth among them, with the reasons.

The masks of a few images are compared. A set that has one shape in every image is a field of view;
one may show another in colours, number its objects, or cover a part of it. What remains open is an
error.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.data.dataset import pick_evenly
from useg.data.file_names import IMAGE_WORDS, MASK_WORDS, split_name
from useg.data.mask_content import SAME_SHAPE_IOU, compare_shapes, read_points
from useg.data.scribbles import edge_ratio
from useg.errors import DataError, UsageError, format_count
from useg.images.image_files import read_image, read_mask

# Images whose masks are compared.
_NUM_SAMPLES = 6

# Share of the points in which one set of masks follows from another.
_FOLLOWS = 0.995
# Scribbles cover less than this share of what the finished masks cover, and agree with them there.
_PARTIAL_AREA = 0.6
_PARTIAL_AGREEMENT = 0.97
# Sets of masks whose values follow from each other at this share of the points have the same
# classes.
_ALIKE = 0.7
# One of them is chosen if there are at least this many images, and if it fits the edges of each one
# better by this factor.
_MIN_EDGE_IMAGES = 4
_MIN_EDGE_GAIN = 1.05
# Of large images only the middle is compared.
_EDGE_WINDOW = 1500
# Strokes, also on the background, cover less than this share of the images.
_MAX_STROKES_AREA = 0.4
# More values than this in one mask are not classes where another set has few.
_MAX_CLASSES = 256
# Names of files that a model wrote.
PREDICTION_WORDS = frozenset(
    [
        *("pred", "preds", "predict", "predicted", "prediction", "predictions"),
        *("output", "outputs", "result", "results"),
    ]
)
# Names of files that are neither images nor masks of classes. They decide only what the pixels
# leave open.
OTHER_WORDS = PREDICTION_WORDS | frozenset(
    [
        *("object", "objects", "instance", "instances", "inst", "panoptic", "color", "colors"),
        *("superpixel", "superpixels", "visibility", "distance", "distances", "centers", "pseudo"),
        *("instanceids", "instancetrainids", "segmentationobject", "old", "backup"),
        *("colour", "colours", "colored", "colormap", "colormaps", "vis", "visualization"),
        *("overlay", "overlays", "preview", "previews", "thumb", "thumbs", "thumbnail"),
        *("thumbnails", "depth", "disparity", "dem", "dsm", "ndsm", "elevation", "elevations"),
        *("confidence", "certainty", "uncertainty", "heatmap", "heatmaps", "bbox", "bboxes"),
        *("boundary", "boundaries", "trimap", "trimaps"),
        *("edge", "edges", "scribble", "scribbles", "border", "borders", "contour", "contours"),
    ]
)
# Names of masks of classes, among several sets of masks.
_CLASS_WORDS = frozenset(
    ["semantic", "semantics", "class", "classes", "category", "categories", "segmentationclass"]
)
# A set of masks for a smaller share of the images is not the truth.
MIN_COVERAGE = 0.34


@dataclass(frozen=True)
class Candidate:
    """Masks that could be the truth: ``masks`` has the mask of each image, ``name`` is a glob."""

    name: str
    masks: Mapping[Path, Path]


@dataclass(frozen=True)
class TruthChoice:
    """The truth.

    Args:
        chosen: The masks that were taken.
        notes: Why, in sentences.
        field_of_view: Masks of one shape in every image, if there are any.
    """

    chosen: Candidate
    notes: tuple[str, ...] = ()
    field_of_view: Candidate | None = None


class OpenChoiceError(DataError):
    """Several sets of files could be the masks or the images, and measuring them did not decide.

    ``candidates`` are all sets of masks, ``left`` those that are as good as each other.
    """

    def __init__(
        self, message: str, candidates: Sequence[Candidate], left: Sequence[Candidate] = ()
    ) -> None:
        super().__init__(message)
        self.candidates = tuple(candidates)
        self.left = tuple(left)


class _MaskSet:
    """What a few masks of a candidate store, at the points of a grid."""

    def __init__(self, candidate: Candidate, points: Sequence[NDArray[np.int64] | None]) -> None:
        self.candidate = candidate
        # Why it is not the truth.
        self.reason = ""
        self.points = points

    @property
    def words(self) -> frozenset[str]:
        """The words and numbers in its glob, in lower case."""
        return frozenset(map(str.casefold, split_name(self.candidate.name)))

    @property
    def file_words(self) -> frozenset[str]:
        """The words and numbers that a few of its files share, in lower case."""
        stems = [path.stem for path in pick_evenly(list(self.candidate.masks.values()), 2)]
        return frozenset.intersection(
            *(frozenset(map(str.casefold, split_name(stem))) for stem in stems)
        )

    @property
    def suffix(self) -> str:
        """The suffix of its first file."""
        return min(self.candidate.masks.values()).suffix.lower()

    @cached_property
    def values(self) -> list[NDArray[np.int64]]:
        return [np.unique(points) for points in self.points if points is not None]

    @cached_property
    def all_values(self) -> NDArray[np.int64]:
        return np.unique(np.concatenate(self.values)) if self.values else np.zeros(0, np.int64)

    @property
    def most_values(self) -> int:
        return max(map(len, self.values), default=0)

    @cached_property
    def same_shape(self) -> float:
        """The lowest IoU of two masks' shapes; 0 if these are not shapes."""
        return compare_shapes(self.points)

    @property
    def counted_share(self) -> float:
        """The share of the points that are not ignored."""
        shares = [
            1 - float(_is_ignored(points, self).mean())
            for points in self.points
            if points is not None
        ]
        return float(np.mean(shares)) if shares else 0.0

    @property
    def is_colored(self) -> bool:
        return bool(len(self.all_values)) and int(self.all_values[-1]) >= 1 << 16

    @property
    def numbers_objects(self) -> bool:
        """Whether the values count up to a number of their own in each mask."""
        counts = [values[values > 0] for values in self.values]
        counts = [values for values in counts if len(values)]
        lasts = {int(values[-1]) for values in counts}
        full = [len(values) >= 0.8 * (values[-1] - values[0] + 1) for values in counts]
        return len(lasts) > 1 and max(lasts) > 3 and sum(full) * 2 > len(full)


def _sample_masks(candidate: Candidate, images: Sequence[Path]) -> _MaskSet:
    return _MaskSet(
        candidate,
        [
            read_points(candidate.masks[image]) if image in candidate.masks else None
            for image in images
        ],
    )


def _pairs(one: _MaskSet, other: _MaskSet) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the values of both at the same points, apart from those that are ignored in one."""
    pairs = []
    for a, b in zip(one.points, other.points, strict=True):
        if a is not None and b is not None and a.shape == b.shape:
            counts = ~(_is_ignored(a, one) | _is_ignored(b, other))
            pairs.append((a[counts], b[counts]))
    return pairs


def _is_ignored(points: NDArray[np.int64], mask_set: _MaskSet) -> NDArray[np.bool_]:
    # Beside other ids, 255 is for what does not count.
    ignored: NDArray[np.bool_] = points == (
        IGNORE if len(mask_set.all_values) > 2 and not mask_set.is_colored else -1
    )
    return ignored


def _follows(one: _MaskSet, other: _MaskSet) -> float:
    """Return the share of the points in which ``one``'s value follows from ``other``'s."""
    shares = [_purity(a, b) for a, b in _pairs(one, other)]
    return min(shares, default=0.0)


def _purity(values: NDArray[np.int64], given: NDArray[np.int64]) -> float:
    if not values.size:
        return 0.0
    _, a = np.unique(values, return_inverse=True)
    _, b = np.unique(given, return_inverse=True)
    joint, counts = np.unique(
        b.ravel().astype(np.int64) * (int(a.max()) + 1) + a.ravel(), return_counts=True
    )
    best = np.zeros(int(b.max()) + 1, np.int64)
    np.maximum.at(best, joint // (int(a.max()) + 1), counts)
    return float(best.sum() / values.size)


def _are_strokes(one: _MaskSet, other: _MaskSet) -> bool:
    """Return whether ``one`` has strokes of the classes of ``other``, also on the background."""
    pairs = _pairs(one, other)
    values, counts = np.unique(np.concatenate([a for a, _ in pairs]), return_counts=True)
    unlabelled = values[counts.argmax()]
    strokes = [(a[a != unlabelled], b[a != unlabelled]) for a, b in pairs]
    a, b = (np.concatenate(each) for each in zip(*strokes, strict=True))
    kinds, marked = np.unique(b, return_counts=True)
    full = [sum(int((all_b == kind).sum()) for _, all_b in pairs) for kind in kinds]
    return (
        a.size < _MAX_STROKES_AREA * counts.sum()
        and bool((marked < _PARTIAL_AREA * np.array(full)).all())
        and len(np.unique(a)) > 1
        and len(np.unique(a)) == len(np.unique(b))
        and min(_purity(a, b), _purity(b, a)) >= _PARTIAL_AGREEMENT
    )


def _is_part(one: _MaskSet, other: _MaskSet) -> bool:
    """Return whether ``one`` labels a part of what ``other`` labels, such as scribbles of it."""
    pairs = _pairs(one, other)
    if pairs and _are_strokes(one, other):
        return True
    marked = [(a, b, a != 0) for a, b in pairs if (a != 0).any()]
    if not marked or one.most_values < 2:
        return False
    area = sum(float(where.sum()) for _, _, where in marked)
    full = sum(float((b != 0).sum()) for _, b, _ in marked)
    agree = [_purity(b[where], a[where]) for a, b, where in marked]
    inside = [float((b[where] != 0).mean()) for _, b, where in marked]
    return area < _PARTIAL_AREA * full and min(*agree, *inside) >= _PARTIAL_AGREEMENT


def _are_two_things(one: _MaskSet, other: _MaskSet) -> bool:
    """Return whether two masks of two values are called by two things: lung and infection."""
    words = [
        Counter(word.casefold() for word in split_name(mask_set.candidate.name) if word.isalpha())
        for mask_set in (one, other)
    ]
    own = [{*(mine - theirs)} - MASK_WORDS - OTHER_WORDS for mine, theirs in (words, words[::-1])]
    return len(one.all_values) == len(other.all_values) == 2 and all(own)


def choose_truth(candidates: Sequence[Candidate]) -> TruthChoice:
    """Choose the truth among sets of masks for the same images.

    Args:
        candidates: At least two of them.

    Raises:
        OpenChoiceError: It stays open.
    """
    covered = {image for candidate in candidates for image in candidate.masks}
    most = max(len(candidate.masks) for candidate in candidates)
    full = [image for image in covered if all(image in each.masks for each in candidates)]
    images = pick_evenly(sorted(full or covered), _NUM_SAMPLES)
    mask_sets = [_sample_masks(candidate, images) for candidate in candidates]
    for mask_set in mask_sets:
        mask_set.reason = _find_defect(mask_set, mask_sets)
    for prefer in (
        partial(_prefer_by_coverage, most=most),
        _prefer_by_content,
        _prefer_by_name,
        partial(_prefer_by_edges, images=images),
    ):
        if len(left := _list_remaining(mask_sets)) > 1:
            prefer(left)
    left = _list_remaining(mask_sets)
    if len(left) != 1:
        raise OpenChoiceError(
            _describe_open_choice(mask_sets), candidates, [each.candidate for each in left]
        )
    chosen = left[0].candidate
    others = [
        f"{mask_set.candidate.name} {mask_set.reason}" for mask_set in mask_sets if mask_set.reason
    ]
    views = [mask_set.candidate for mask_set in mask_sets if mask_set.same_shape >= SAME_SHAPE_IOU]
    note = "; ".join((f"the masks are {chosen.name}", *others))
    return TruthChoice(chosen, (note,), views[0] if len(views) == 1 else None)


def _list_remaining(mask_sets: Sequence[_MaskSet]) -> list[_MaskSet]:
    return [mask_set for mask_set in mask_sets if not mask_set.reason]


def _prefer_by_coverage(left: Sequence[_MaskSet], most: int) -> None:
    """Leave out masks of few images, unless they may be one of the classes."""
    usual = [mask_set for mask_set in left if len(mask_set.candidate.masks) >= MIN_COVERAGE * most]
    for mask_set in left:
        if mask_set not in usual and not any(_may_be_classes(mask_set, other) for other in usual):
            mask_set.reason = (
                f"exists for only {format_count(len(mask_set.candidate.masks), 'image')}"
            )


def _prefer_by_content(left: Sequence[_MaskSet]) -> None:
    """Leave out masks that say the same as others or less."""
    for one, other in itertools.permutations(left, 2):
        if not one.reason and not other.reason:
            one.reason = _find_redundancy(one, other)


def _prefer_by_name(left: Sequence[_MaskSet]) -> None:
    """Leave out what is called objects, colours or the like, if one set of masks is not.

    Otherwise leave out what is not called classes or the like, if one set is. The names of files
    count if the globs do not decide. What is called images is left out first, if others are called
    masks.
    """
    left = _leave_out_called_images(left)
    if len(left) < 2:
        return
    for words in (
        [mask_set.words for mask_set in left],
        [mask_set.file_words for mask_set in left],
    ):
        shared = frozenset.intersection(*words)
        called = [sorted((own - shared) & OTHER_WORDS) for own in words]
        are_classes = [bool((own - shared) & _CLASS_WORDS) for own in words]
        if called.count([]) == 1:
            for mask_set, found in zip(left, called, strict=True):
                mask_set.reason = f"is called {found[0]!r}" if found else ""
            return
        if are_classes.count(True) == 1:
            for mask_set, is_class in zip(left, are_classes, strict=True):
                name = left[are_classes.index(True)].candidate.name
                mask_set.reason = "" if is_class else f"is not called classes, unlike {name}"
            return
    _prefer_called_masks(left)


def _leave_out_called_images(left: Sequence[_MaskSet]) -> Sequence[_MaskSet]:
    """Leave out what is called images, and not masks, if others are called masks."""
    shared = frozenset.intersection(*(mask_set.words for mask_set in left))
    own = [mask_set.words - shared for mask_set in left]
    images = [sorted(words & IMAGE_WORDS) for words in own]
    are_masks = [bool(words & MASK_WORDS) for words in own]
    if any(are_masks):
        for mask_set, found, is_mask in zip(left, images, are_masks, strict=True):
            mask_set.reason = f"is called {found[0]!r}" if found and not is_mask else ""
    return [mask_set for mask_set in left if not mask_set.reason]


def _prefer_called_masks(left: Sequence[_MaskSet]) -> None:
    """Leave out sets for fewer images than the only one that is called masks."""
    shared = frozenset.intersection(*(mask_set.words for mask_set in left))
    called = [mask_set for mask_set in left if (mask_set.words - shared) & MASK_WORDS]
    others = [mask_set for mask_set in left if mask_set not in called]
    counts = [len(mask_set.candidate.masks) for mask_set in others]
    if len(called) == 1 and max(counts) < len(called[0].candidate.masks):
        for mask_set, count in zip(others, counts, strict=True):
            mask_set.reason = f"is not called masks, and exists for only {count} images"


def _prefer_by_edges(left: Sequence[_MaskSet], images: Sequence[Path]) -> None:
    """Leave out masks of the same classes that fit the edges of every image less than others do.

    Measured: among masks that were moved by two pixels, made wavy, coarse or larger, the true ones
    fit best in every image of five of six data sets, and in half to all of one with few small
    defects. Masks with fewer classes fit as well, so those are not compared; neither is one mask
    per class, since things of one class may have weaker edges than those of another.
    """
    are_alike = all(
        len(one.all_values) == len(other.all_values) and _follows(one, other) >= _ALIKE
        for one, other in itertools.permutations(left, 2)
    )
    are_apart = any(_hardly_overlap(two) for two in itertools.combinations(left, 2))
    if not are_alike or len(images) < _MIN_EDGE_IMAGES or are_apart:
        return
    ratios = np.array(
        [[_measure_edge_fit(mask_set, image) for image in images] for mask_set in left]
    )
    medians = np.median(ratios, axis=1)
    best = int(medians.argmax())
    for mask_set, fits, median in zip(left, ratios, medians, strict=True):
        if mask_set is not left[best] and (fits * _MIN_EDGE_GAIN < ratios[best]).all():
            mask_set.reason = (
                f"fits the edges of the images less well than {left[best].candidate.name} "
                f"({median:.2f} against {medians[best]:.2f})"
            )


def _measure_edge_fit(mask_set: _MaskSet, image: Path) -> float:
    """Return how much more an image changes at the edges of its mask than elsewhere; or NaN."""
    try:
        pixels, mask = read_image(image), read_mask(mask_set.candidate.masks[image])
    except (UsageError, KeyError):
        return float("nan")
    areas = mask if mask.ndim == 2 else mask.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    if areas.shape != pixels.shape[:2]:
        return float("nan")
    middle = tuple(
        slice(max(0, (side - _EDGE_WINDOW) // 2), (side + _EDGE_WINDOW) // 2)
        for side in areas.shape
    )
    return edge_ratio(pixels[middle], areas[middle]) or float("nan")


def _find_defect(mask_set: _MaskSet, mask_sets: Sequence[_MaskSet]) -> str:
    """Return why a candidate is not the truth whatever the others are, or ``""``."""
    if not mask_set.values:
        return "cannot be read"
    if len(mask_set.all_values) == 1:
        return f"has the value {mask_set.all_values[0]} everywhere"
    if mask_set.same_shape >= SAME_SHAPE_IOU:
        return (
            f"has nearly the same shape in every image (IoU {mask_set.same_shape:.2f}), like a "
            "field of view"
        )
    fewest = min((other.most_values for other in mask_sets if other.most_values > 1), default=0)
    if mask_set.most_values > _MAX_CLASSES >= 4 * fewest:
        return f"has {mask_set.most_values:,} values in one image"
    return ""


def _find_redundancy(one: _MaskSet, other: _MaskSet) -> str:
    """Return why ``one`` says the same as ``other`` or less, or ``""``."""
    forward, back = _follows(one, other), _follows(other, one)
    name = other.candidate.name
    is_weaker = _find_own_other_words(other, one) and not _find_own_other_words(one, other)
    if forward >= _FOLLOWS and back >= _FOLLOWS:
        coverage = one.counted_share / max(1e-9, other.counted_share)
        if coverage < _PARTIAL_AREA and not is_weaker:
            return f"labels only a part of what {name} labels"
        ranks = [
            (bool(_find_own_other_words(*two)), two[0].is_colored, int(two[0].all_values[-1]))
            for two in ((one, other), (other, one))
        ]
        is_plainer = coverage * _PARTIAL_AREA < 1 and ranks[0] > ranks[1]
        if one.suffix > other.suffix and all((a == b).all() for a, b in _pairs(one, other)):
            return f"shows the same as {name} in another format"
        how = "in colours" if one.is_colored else "with other values"
        return f"shows the same as {name} {how}" if is_plainer else ""
    if back >= _FOLLOWS and one.numbers_objects and not (other.numbers_objects or is_weaker):
        return f"numbers the objects of {name}"
    if _is_part(one, other) and not _are_two_things(one, other) and not is_weaker:
        return f"labels only a part of what {name} labels"
    return ""


def _find_own_other_words(one: _MaskSet, other: _MaskSet) -> frozenset[str]:
    """Return the words that call one set of masks, and not the other, objects, colours etc."""
    return (one.words - other.words) & OTHER_WORDS


def _describe_open_choice(mask_sets: Sequence[_MaskSet]) -> str:
    listed = ", ".join(
        f"{mask_set.candidate.name} ({len(mask_set.candidate.masks)})" for mask_set in mask_sets
    )
    found = [
        f"{mask_set.candidate.name} "
        + (
            mask_set.reason
            or f"has up to {format_count(mask_set.most_values, 'value')} in one mask"
        )
        for mask_set in mask_sets
    ]
    return (
        f"there are {len(mask_sets)} sets of masks for the same images: {listed}. It is unclear "
        f"which of them is the ground truth: {'; '.join(found)}"
    )


def are_class_masks(candidates: Sequence[Candidate]) -> bool:
    """Return whether candidates look like one mask per class: of two values, hardly overlapping."""
    if len(candidates) < 2:
        return False
    counts = Counter(image for candidate in candidates for image in candidate.masks)
    most = max(counts.values())
    images = sorted(image for image, count in counts.items() if count == most > 1)
    mask_sets = [_sample_masks(each, pick_evenly(images, _NUM_SAMPLES)) for each in candidates]
    return bool(images) and _hardly_overlap(mask_sets)


def _may_be_classes(one: _MaskSet, other: _MaskSet) -> bool:
    """Return whether two sets may hold one class each: every image has one or both of them."""
    both = [
        a for a, b in zip(one.points, other.points, strict=True) if not (a is None or b is None)
    ]
    return bool(both) and _hardly_overlap((one, other))


def _hardly_overlap(mask_sets: Sequence[_MaskSet]) -> bool:
    """Return whether masks have two values each, and what is inside in one is not in another."""
    if any(len(mask_set.all_values) != 2 for mask_set in mask_sets):
        return False
    shared = total = 0
    for one, other in itertools.combinations(mask_sets, 2):
        for a, b in zip(one.points, other.points, strict=True):
            if a is not None and b is not None and a.shape == b.shape:
                inside = a != one.all_values[0], b != other.all_values[0]
                shared += int((inside[0] & inside[1]).sum())
                total += int(min(inside[0].sum(), inside[1].sum()))
    return shared * 20 <= total


def name_differences(globs: Sequence[str]) -> list[str]:
    """Return what differs between globs: names for the classes of their masks.

    >>> name_differences(["labels/water/*.png", "labels/weed_bed/*.png"])
    ['water', 'weed_bed']
    >>> name_differences(["2. Masks/1. Rust/*.png", "2. Masks/2. Dents/*.png"])
    ['Rust', 'Dents']
    """
    rows = [re.split(r"([/*.])", glob) for glob in globs]
    shared = set.intersection(*map(set, rows))
    names = ["".join(part for part in row if part not in shared).strip("_-. ") for row in rows]
    # Numbers before names only sort the folders.
    plain = [re.sub(r"^[0-9]+ +", "", name) for name in names]
    names = plain if len({*plain, ""}) > len(plain) else names
    return names if len({*names, ""}) > len(names) else list(globs)
