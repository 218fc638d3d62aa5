"""Check how the pixels of the classes are distributed over the images and the splits.

A score says little of a class that is rare, that a split lacks, whose share differs between the
splits, or whose pixels are in the same region of every image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.doctor.measure import (
    THUMBNAIL_SHAPE,
    Finding,
    MeasuredDataset,
    Measurement,
)
from useg.errors import format_count, join_names

# A class with a smaller share of the counted pixels is rare.
MAX_RARE_SHARE = 0.005

# With fewer images per split, a difference is not significant.
_MIN_IMAGES_PER_SPLIT = 5

# Splits differ in colour if each has at least this many images, and if their shares of grey images
# differ by at least this much.
_MIN_IMAGES_OF_COLOR, _MIN_GREY_DIFFERENCE = 3, 0.5

# With fewer masks, it is not known that most have several classes.
_MIN_MASKS = 8

# The sizes of two splits differ if this share of the one is smaller by this factor than this share
# of the other.
_MIN_SIZE_RATIO, _USUAL_SHARE = 1.5, 0.9

# Masks have a frame if all have one, and if this share of them has the smallest width.
_MIN_FRAMED = 0.5
# A frame is at most this many pixels wide, or this share of the shorter side of the masks.
_MAX_FRAME_PIXELS, _MAX_FRAME_SHARE = 3, 0.1
# At two sides, objects touch at least this share of the frame, as if it cut them off.
_MIN_CUT = 0.05

# A class is a band in a mask in which it has at least this many runs, ...
_MIN_BAND_RUNS = 20
# ... if this share of them lies between the same two other classes, ...
_MIN_BETWEEN = 0.75
# ... and if these have a mean length of at most this many pixels, or this share of the width.
_MAX_BAND_PIXELS, _MAX_BAND_SHARE = 6, 0.03

# With fewer images, a region may be constant by chance.
_MIN_IMAGES_OF_CONSTANT_REGION = 20


def sum_class_pixels(
    data: MeasuredDataset, measurements: Sequence[Measurement]
) -> NDArray[np.int64]:
    """Return the pixels ``(256,)`` of each class id in these pairs."""
    total = np.zeros(256, np.int64)
    for each in measurements:
        total += data.counts[each.pair]
    return total


def check_class_pixels(data: MeasuredDataset) -> Iterator[Finding]:
    """Find classes without pixels, rare classes, and classes that one split lacks."""
    names = data.dataset.classes.names
    total = sum_class_pixels(data, data.complete)
    pixels = total[: len(names)]
    if not pixels.sum():
        if total[IGNORE] and total.sum() == total[IGNORE]:
            yield Finding(
                "all ignored",
                "error",
                (),
                "every pixel of every mask is ignored, so there is nothing to learn",
                "check which values the masks have and what they mean; list those of the classes, "
                "and those that have no label as ignore, in classes.toml",
            )
        return
    if np.count_nonzero(pixels) == 1:
        yield Finding(
            "one class everywhere",
            "error",
            (),
            f"every pixel of every mask is {names[int(pixels.argmax())]}, so there is nothing to "
            "learn",
            "check which folder has the masks and what they store; name them in a dataset.toml or "
            "list their values in classes.toml",
        )
        return
    shares = pixels / pixels.sum()
    absent = [name for name, share in zip(names, shares, strict=True) if not share]
    if absent:
        yield Finding(
            "class without pixels",
            "warning",
            (),
            f"no mask contains {join_names(absent)}",
            "add images that show it, or remove it from classes.toml",
        )
    rare = [
        f"{name} ({100 * share:.2f} %)"
        for name, share in zip(names, shares, strict=True)
        if 0 < share < MAX_RARE_SHARE
    ]
    if rare:
        yield Finding(
            "rare class",
            "warning",
            (),
            f"rare classes (below {100 * MAX_RARE_SHARE:.1f} % of the pixels): {join_names(rare)}",
            "expect low scores for them; add images that show them, and read the scores per class",
        )
    yield from _missing_classes(data, pixels)


def _missing_classes(data: MeasuredDataset, pixels: NDArray[np.int64]) -> Iterator[Finding]:
    names = data.dataset.classes.names
    train, val = (
        sum_class_pixels(data, [each for each in data.complete if each.pair.split == split])
        for split in ("train", "val")
    )
    train, val = train[: len(names)], val[: len(names)]
    if not (train.sum() and val.sum()):
        return
    if missing := [names[k] for k in np.flatnonzero((train > 0) & (val == 0))]:
        yield Finding(
            "class missing from validation",
            "warning",
            (),
            f"the split val has no pixel of {join_names(missing)}, so there is no score for "
            f"{'it' if len(missing) == 1 else 'them'}",
            "hold out other images with a split.csv",
        )
    if missing := [names[k] for k in np.flatnonzero((pixels > 0) & (train == 0))]:
        yield Finding(
            "class missing from training",
            "warning",
            (),
            f"the split train has no pixel of {join_names(missing)}",
            "the model cannot learn them; move images that show them to train with a split.csv",
        )


def check_split_shares(data: MeasuredDataset) -> Iterator[Finding]:
    """Find classes whose share differs strongly between training and validation images."""
    names = data.dataset.classes.names
    shares = {}
    for split in ("train", "val"):
        pixels = [
            data.counts[each.pair][: len(names)]
            for each in data.complete
            if each.pair.split == split
        ]
        if len(pixels) < _MIN_IMAGES_PER_SPLIT:
            return
        shares[split] = np.array(pixels) / np.maximum(np.sum(pixels, axis=1, keepdims=True), 1)
    train, val = shares["train"].mean(0), shares["val"].mean(0)
    # Welch's t-test, as if neighbouring images were independent.
    error = np.sqrt(sum(part.var(0, ddof=1) / len(part) for part in shares.values()))
    low, high = np.minimum(train, val), np.maximum(train, val)
    is_significant = high - low > 6 * np.maximum(error, 1e-6)
    found = np.flatnonzero(is_significant & (high > 2 * low) & (high > 0.03))
    if len(found):
        described = [
            f"{names[k]} ({100 * train[k]:.1f} % of train, {100 * val[k]:.1f} % of val)"
            for k in found
        ]
        yield Finding(
            "splits differ",
            "warning",
            (),
            f"the splits differ in {join_names(described)}",
            "scores on such a split say little about other images; hold out blocks of several "
            "places, or mention the difference beside the score",
        )


def check_grey_split(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a split whose images are grey while those for training have colours, or vice versa."""
    splits: dict[str, list[Measurement]] = {}
    for each in data.complete:
        if each.image is not None and (each.image.is_grey or each.image.tints is not None):
            splits.setdefault(each.pair.split, []).append(each)
    train = splits.get("train", [])
    for split in ("val", "test"):
        held_out = splits.get(split, [])
        if min(len(train), len(held_out)) < _MIN_IMAGES_OF_COLOR:
            continue
        shares = [
            sum(each.image.is_grey for each in part if each.image is not None) / len(part)
            for part in (train, held_out)
        ]
        if abs(shares[0] - shares[1]) < _MIN_GREY_DIFFERENCE:
            continue
        is_grey = shares[1] > shares[0]
        files = tuple(
            each.pair.image
            for each in held_out
            if each.image is not None and each.image.is_grey == is_grey
        )
        yield Finding(
            "colours of splits differ",
            "warning",
            files,
            f"{100 * shares[0]:.0f} % of the images in train are grey, but {100 * shares[1]:.0f} % "
            f"of those in {split}, such as '{data.name(files[0])}'",
            f"save all images in the same way, or put both kinds into train; otherwise the scores "
            f"on {split} are those of a model that has never seen such images",
        )


def check_split_sizes(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a split whose images are all much smaller or larger than those for training."""
    splits: dict[str, list[Measurement]] = {}
    for each in data.complete:
        splits.setdefault(each.pair.split, []).append(each)
    for split in ("val", "test"):
        parts = [splits.get(name, []) for name in ("train", split)]
        if min(map(len, parts)) < _MIN_IMAGES_OF_COLOR:
            continue
        sides = [
            [each.image.size[0] * each.image.size[1] for each in part if each.image is not None]
            for part in parts
        ]
        train, held_out = (np.sqrt(np.array(areas, float)) for areas in sides)
        is_smaller = bool(np.median(held_out) < np.median(train))
        low, high = (held_out, train) if is_smaller else (train, held_out)
        nearly_largest = np.quantile(low, _USUAL_SHARE)
        nearly_smallest = np.quantile(high, 1 - _USUAL_SHARE)
        if nearly_smallest < _MIN_SIZE_RATIO * nearly_largest:
            continue
        ratio = float(np.median(high) / np.median(low))
        files = tuple(each.pair.image for each in parts[1])
        yield Finding(
            "sizes of splits differ",
            "warning",
            files,
            f"the images in {split}, such as '{data.name(files[0])}', are "
            f"{ratio:.1f} times {'smaller' if is_smaller else 'larger'} in width and height than "
            "those in train",
            f"if they show the same things, their scale differs, and the scores on {split} apply "
            "to this scale only: save all images at one scale; if they are crops, ignore this "
            "warning",
        )


def check_frames(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that all have a frame of one class, where objects are cut off."""
    masks = [each for each in data.complete if each.mask is not None and len(each.mask.codes) > 1]
    frames = [each.mask.frame for each in masks if each.mask is not None]
    if len(frames) < _MIN_MASKS or min(frame.width for frame in frames) < 1:
        return
    width = min(frame.width for frame in frames)
    ids = set(data.ids(np.array([frame.code for frame in frames])).tolist())
    cut = [frame.cut for frame in frames if frame.width == width]
    side = min(min(each.mask.size) for each in masks if each.mask is not None)
    is_thin = width <= max(_MAX_FRAME_PIXELS, _MAX_FRAME_SHARE * side)
    is_common = len(cut) >= _MIN_FRAMED * len(frames) and len(ids) == 1
    if not (is_thin and is_common and np.mean(cut) >= _MIN_CUT):
        return
    k = ids.pop()
    if 0 <= k < len(data.dataset.classes):
        yield Finding(
            "frame around masks",
            "warning",
            tuple(each.pair.mask for each in masks),
            f"the outermost {format_count(width, 'pixel')} of every mask, such as "
            f"'{data.name(masks[0].pair.mask)}', are {data.dataset.classes.names[k]}, like a frame "
            "that cuts off everything else",
            "if the images show other classes there, store an ignored value (255) in the frame, or "
            "crop images and masks",
        )


def check_bands(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a class that is a thin band between two others, which may mean "not classified"."""
    masks = [each.mask for each in data.complete if each.mask is not None]
    table = data.dataset.classes
    for k, name in enumerate(table.names if len(table) > 2 else ()):
        found = [
            (band, mask.size[0])
            for mask in masks
            for code, band in mask.bands.items()
            if data.class_ids.get(code) == k and band.runs >= _MIN_BAND_RUNS
        ]
        sides = {tuple(sorted(data.class_ids.get(c, -1) for c in band.sides)) for band, _ in found}
        if len(found) < _MIN_MASKS or len(found) < len(masks) / 2 or len(sides) > 1:
            continue
        (low, high) = sides.pop()
        thin = [
            band.between >= _MIN_BETWEEN * band.runs
            and band.pixels <= band.between * max(_MAX_BAND_PIXELS, _MAX_BAND_SHARE * width)
            for band, width in found
        ]
        if np.mean(thin) >= _USUAL_SHARE and 0 <= low < high < len(table):
            yield Finding(
                "thin band",
                "note",
                (),
                f"{name} is a thin band between {table.names[low]} and {table.names[high]}, so it "
                "may mean that the border is not classified",
                f'if so, write ignore = ["{name}"] into dataset.toml; otherwise ignore this note',
            )


def check_single_class_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a few masks with one class only while the others have several."""
    single = [
        (each.pair, int(data.ids(each.mask.codes)[0]))
        for each in data.complete
        if each.mask is not None and len(each.mask.codes) == 1
    ]
    if len(data.complete) < _MIN_MASKS or len(single) > max(1, len(data.complete) // 10):
        return
    for pair, k in single:
        if k == IGNORE:
            content = "is ignored everywhere"
        elif k >= 0:
            content = f"is {data.dataset.classes.names[k]} everywhere"
        else:
            content = "has one value everywhere"
        yield Finding(
            "mask of one class",
            "warning",
            (pair.mask,),
            f"mask '{data.name(pair.mask)}' {content}, while the others have several classes",
            "check whether its labels were lost",
        )


def check_constant_region(data: MeasuredDataset) -> Iterator[Finding]:
    """Find a class with a fixed region in nearly every image, and hardly any pixels elsewhere.

    Examples are the hood of a camera car, a frame or a stamp.
    """
    grids = [data.ids(each.mask.code_grid) for each in data.complete if each.mask is not None]
    if len(grids) < _MIN_IMAGES_OF_CONSTANT_REGION:
        return
    for k, name in enumerate(data.dataset.classes.names):
        occurrences = np.zeros(THUMBNAIL_SHAPE, np.int64)
        for grid in grids:
            occurrences += grid == k
        region = occurrences >= 0.95 * len(grids)
        share = float(occurrences[region].sum() / max(1, occurrences.sum()))
        size = float(region.mean())
        at_border = region[0].any() or region[-1].any() or region[:, 0].any() or region[:, -1].any()
        if share >= 0.8 and 0.005 <= size <= 0.4 and at_border:
            yield Finding(
                "constant region",
                "warning",
                (),
                f"{100 * share:.0f} % of all {name} pixels are in one region that is the same in "
                f"nearly every image ({describe_region(region)}, {100 * size:.0f} % of the image), "
                "such as a camera car's hood, a frame or a stamp",
                f"the score of {name} says little about {name} elsewhere: exclude the region with "
                "useg evaluate --ignore-mask, or store an ignored value there",
                evidence={"region": region, "class": k},
            )


def describe_region(region: NDArray[np.bool_]) -> str:
    """Describe the position of a region of the thumbnail grid, such as ``"at the bottom"``."""
    num_rows, num_columns = THUMBNAIL_SHAPE
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    words = []
    if rows[0] >= num_rows / 2:
        words.append("bottom")
    elif rows[-1] < num_rows / 2:
        words.append("top")
    if columns[0] >= num_columns / 2:
        words.append("right")
    elif columns[-1] < num_columns / 2:
        words.append("left")
    return f"at the {' '.join(words)}" if words else "all over it"
