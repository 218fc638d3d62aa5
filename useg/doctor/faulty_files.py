"""Checks of files: unpaired, unreadable or misnamed ones, wrong sizes, odd or blank images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import Label
from useg.data.dataset import MISSING_ADVICE, Pair
from useg.data.duplicates import ORIENTATIONS
from useg.doctor.alignment import find_best_orientation, orientation_change
from useg.doctor.measure import (
    Finding,
    ImageMeasurement,
    MaskMeasurement,
    MeasuredDataset,
    Measurement,
    Repair,
)
from useg.errors import format_count, join_names
from useg.images.formats import GIT_LFS_START
from useg.images.image_files import resize_label
from useg.parsing import open_file

# How the files of each format begin.
_MAGIC_BYTES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
}

_FORMAT_OF_SUFFIX = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WebP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}

FORMAT_SUFFIX = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "WebP": ".webp",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif",
}

_MARKUP_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")

# Minimum size of a data set in which images of unusual sizes, at most 2 % of it, are listed.
_MIN_IMAGES_WITH_ODD_SIZES = 10
_IMAGES_PER_ODD_SIZE = 50


def detect_file_format(path: Path) -> str:
    """Detect the format of a file by its first bytes.

    It is an image format, ``"text"``, ``"web page"``, ``"Git LFS pointer"``, ``"empty"``, or ``""``
    if unknown.
    """
    with open_file(path) as file:
        start = file.read(256)
    if not start:
        return "empty"
    if start.startswith(GIT_LFS_START):
        return "Git LFS pointer"
    if start.lstrip().lower().startswith(_MARKUP_STARTS):
        return "web page"
    for magic, name in _MAGIC_BYTES.items():
        if start.startswith(magic):
            return name
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
    return "text" if is_text else ""


def check_unpaired_files(data: MeasuredDataset) -> Iterator[Finding]:
    """Find images without a mask and masks without an image."""
    yield from _unpaired(data, data.dataset.images, "image", "mask")
    yield from _unpaired(data, data.dataset.masks, "mask", "image")


def _unpaired(
    data: MeasuredDataset, files: tuple[Path, ...], present: str, missing: str
) -> Iterator[Finding]:
    if not files:
        return
    message = f"'{data.name(files[0])}' has no {missing}"
    if len(files) > 1:
        message = f"{len(files)} {present}s have no {missing}, such as '{data.name(files[0])}'"
    repairs = tuple(
        Repair(None, f"'{data.name(path)}' left out: it has no {missing}", leave_out=True)
        for path in files
    )
    yield Finding(
        f"{present} without {missing}",
        "error",
        files,
        message,
        f"add the {missing} under the same name or remove the {present}"
        + (f"; {MISSING_ADVICE}" if present == "image" else ""),
        repairs,
    )


def check_skipped(data: MeasuredDataset) -> Iterator[Finding]:
    """List the annotation files and shapes that were not read."""
    for passed in data.dataset.skipped:
        # Messages of useg end with a remedy.
        message, _, remedy = passed.reason.rpartition("; ")
        message = message.replace(str(passed.file), data.name(passed.file))
        yield Finding("passed over", "warning", (passed.file,), message, remedy)


def check_unreadable_files(data: MeasuredDataset) -> Iterator[Finding]:
    """Find damaged, truncated and empty files, and text files with the name of an image."""
    for each in data.measurements:
        if each.read_error is None:
            continue
        path, error = each.read_error
        name = data.name(path)
        # Annotation files are text files anyway: the error explains what is wrong.
        is_image = path.is_file() and (each.pair.truth is None or path != each.pair.mask)
        file_format = detect_file_format(path) if is_image else ""
        if file_format == "empty":
            message = f"'{name}' is empty (0 bytes): a copy or download failed"
            remedy = "copy it again, or remove it"
        elif file_format in ("text", "web page"):
            noun = "text file" if file_format == "text" else file_format
            message = f"'{name}' is a {noun} with the name of an image, as after a failed download"
            remedy = "download it again, or remove it"
        else:
            # Errors of useg end with a remedy.
            message, _, remedy = str(error).rpartition("; ")
            message = message.replace(str(path), name)
        repair = Repair(each.pair, f"left out: '{name}' cannot be read", leave_out=True)
        yield Finding("unreadable file", "error", (path,), message, remedy, (repair,))


def check_file_suffixes(data: MeasuredDataset) -> Iterator[Finding]:
    """Find images whose suffix does not match the format of their content."""
    readable = [each.pair for each in data.measurements if each.read_error is None]
    wrong = {}
    for path in dict.fromkeys(path for pair in readable for path in (pair.image, pair.mask)):
        expected = _FORMAT_OF_SUFFIX.get(path.suffix.lower())
        found = detect_file_format(path) if expected else ""
        if found in FORMAT_SUFFIX and found != expected:
            wrong[path] = found
    if not wrong:
        return
    first, found = next(iter(wrong.items()))
    more = f" (and {format_count(len(wrong) - 1, 'other')})" if len(wrong) > 1 else ""
    repairs = tuple(
        Repair(
            each.pair,
            f"image renamed to {FORMAT_SUFFIX[wrong[each.pair.image]]}, the suffix of its format",
        )
        for each in data.measurements
        if each.pair.image in wrong
    )
    yield Finding(
        "mislabelled file",
        "warning",
        tuple(wrong),
        f"'{data.name(first)}' is a {found} file despite its name{more}",
        "rename it: useg recognises formats by content, but other programs may trust the name",
        repairs,
    )


def check_mask_sizes(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks whose size differs from the image: transposed, resized, or of another image."""
    for each in data.measurements:
        if each.image is not None and each.mask is not None and not each.is_complete:
            yield _size_mismatch(data, each, each.image, each.mask)


def _size_mismatch(
    data: MeasuredDataset, each: Measurement, image: ImageMeasurement, mask: MaskMeasurement
) -> Finding:
    (W, H), (w, h) = image.size, mask.size
    pair = each.pair
    files = (pair.image, pair.mask)
    message = (
        f"image '{data.name(pair.image)}' is {W}x{H} pixels, "
        f"but its mask '{data.name(pair.mask)}' is {w}x{h}"
    )
    if (w, h) == (H, W):
        turn = find_best_orientation(data, each, list(ORIENTATIONS)[:4])
        return Finding(
            "transposed mask",
            "error",
            files,
            f"{message}: width and height are swapped, and the edges fit when the mask is {turn}",
            "save the mask in the image's orientation",
            (Repair(pair, f"mask {turn}", transform=orientation_change(turn)),),
            {"turn": turn},
        )
    if abs(w * H - h * W) <= max(W, H, w, h):
        message += ", with the same aspect ratio"
        description = f"mask resized from {w}x{h} to {W}x{H}, nearest neighbour"
        repair = Repair(pair, description, transform=_resize_change((W, H)))
    else:
        description = f"left out: the image is {W}x{H}, the mask {w}x{h}"
        repair = Repair(pair, description, leave_out=True)
    remedy = "check that they belong together, or resize the mask (nearest neighbour)"
    return Finding("size mismatch", "error", files, message, remedy, (repair,))


def _resize_change(size: tuple[int, int]) -> Callable[[Label], Label]:
    return lambda label: resize_label(label, size)


def check_mixed_images(data: MeasuredDataset) -> Iterator[Finding]:
    """Find images of different sizes, numbers of bands, or number types."""
    sizes: dict[tuple[int, int], list[Measurement]] = {}
    bands: dict[int, list[Measurement]] = {}
    dtypes: dict[str, list[Measurement]] = {}
    for each in data.measurements:
        if each.image is not None:
            sizes.setdefault(each.image.size, []).append(each)
            bands.setdefault(each.image.bands, []).append(each)
            dtypes.setdefault(each.image.dtype, []).append(each)
    yield from _mixed_sizes(data, sizes)
    yield from _mixed_bands(data, bands)
    yield from _mixed_dtypes(data, dtypes)


def _mixed_sizes(
    data: MeasuredDataset, groups: dict[tuple[int, int], list[Measurement]]
) -> Iterator[Finding]:
    if len(groups) < 2:
        return
    number = sum(map(len, groups.values()))
    usual = max(groups, key=lambda size: len(groups[size]))
    odd = [(each, size) for size, group in groups.items() if size != usual for each in group]
    is_rare = len(odd) <= max(1, number // _IMAGES_PER_ODD_SIZE)
    if number >= _MIN_IMAGES_WITH_ODD_SIZES and is_rare:
        files = tuple(each.pair.image for each, _ in odd)
        w, h = odd[0][1]
        yield Finding(
            "odd size",
            "warning",
            files,
            f"'{data.name(files[0])}' is {w}x{h}, while {number - len(odd)} of {number} images are "
            f"{usual[0]}x{usual[1]}",
            "check where it comes from; useg resizes it to the working size like the others",
        )
        return
    smallest, largest = (
        f"{w}x{h}" for w, h in (choose(groups, key=lambda s: s[0] * s[1]) for choose in (min, max))
    )
    yield Finding(
        "mixed sizes",
        "note",
        (),
        f"the images have {len(groups)} different sizes, from {smallest} to {largest}",
        "nothing to do: useg resizes each to the working size",
    )


def _mixed_bands(data: MeasuredDataset, groups: dict[int, list[Measurement]]) -> Iterator[Finding]:
    if len(groups) < 2:
        return
    rarest = min(groups.values(), key=len)
    files = tuple(each.pair.image for each in rarest)
    counts = sorted(groups, key=str)
    is_grey = counts == [1, 3]
    yield Finding(
        "mixed bands",
        "warning" if is_grey else "error",
        files,
        f"the images have {join_names(counts)} bands, such as '{data.name(files[0])}'",
        "check that this is intended; useg repeats the band of grey images three times"
        if is_grey
        else "save all images with the same number of bands",
        () if is_grey else _leave_out_unusual(groups, "bands"),
    )


def _mixed_dtypes(data: MeasuredDataset, groups: dict[str, list[Measurement]]) -> Iterator[Finding]:
    if len(groups) < 2:
        return
    rarest = min(groups.values(), key=len)
    files = tuple(each.pair.image for each in rarest)
    yield Finding(
        "mixed number types",
        "error",
        files,
        f"the images have {join_names(sorted(groups))} pixels, such as '{data.name(files[0])}'",
        "convert them to one number type",
        _leave_out_unusual(groups, "pixels"),
    )


def _leave_out_unusual(groups: Mapping[Any, list[Measurement]], noun: str) -> tuple[Repair, ...]:
    usual = max(groups, key=lambda value: len(groups[value]))
    description = f"left out: it does not have {usual} {noun} as most images do"
    return tuple(
        Repair(each.pair, description, leave_out=True)
        for value, group in groups.items()
        if value != usual
        for each in group
    )


# With fewer images, the typical exposure is not known.
_MIN_IMAGES_OF_EXPOSURE = 8

# Images have another scale, such as 0 to 1 instead of 0 to 255, if their brightest values differ by
# at least this factor, and no image lies between.
_MIN_SCALE_STEP = 30
# An image counts only if its values differ by at least this share of its brightest.
_MIN_CONTRAST = 0.3


def check_exposure(data: MeasuredDataset) -> Iterator[Finding]:
    """Find blank images, and a few that are far darker or brighter than all others."""
    images: list[tuple[Pair, ImageMeasurement]] = [
        (each.pair, each.image) for each in data.measurements if each.image is not None
    ]
    if len(images) < _MIN_IMAGES_OF_EXPOSURE:
        return
    means = np.array([float(image.thumbnail.mean()) for _, image in images])
    ranges = np.array([float(np.ptp(image.thumbnail)) for _, image in images])
    usual_range, median = float(np.median(ranges)), float(np.median(means))
    deviation = 1.48 * float(np.median(np.abs(means - median)))
    deviation = max(deviation, 0.1 * usual_range, 1e-6)
    yield from _mixed_scales(data, [image for _, image in images], [pair for pair, _ in images])
    is_blank = ranges <= 0.02 * usual_range
    is_odd = ~is_blank & (np.abs(means - median) > 6 * deviation) & (ranges < 0.5 * usual_range)
    blank, odd = np.flatnonzero(is_blank), np.flatnonzero(is_odd)
    if usual_range > 0 and 0 < len(blank) <= max(1, len(images) // 10):
        for k in blank:
            yield _blank_image(data, images[k][0], is_dark=means[k] < median)
    if 0 < len(odd) <= max(1, len(images) // 20):
        files = tuple(images[k][0].image for k in odd)
        tone = "darker" if means[odd[0]] < median else "brighter"
        more = f" ({format_count(len(odd), 'such image')})" if len(odd) > 1 else ""
        yield Finding(
            "odd exposure",
            "warning",
            files,
            f"'{data.name(files[0])}' is much {tone} than all others and has little contrast{more}",
            "check that the image and its mask belong together",
        )


def _mixed_scales(
    data: MeasuredDataset, images: Sequence[ImageMeasurement], pairs: Sequence[Pair]
) -> Iterator[Finding]:
    """Report images with values from 0 to 1 among others up to 255, or 8 among 16 bits."""
    highest = np.array([float(image.thumbnail.max()) for image in images])
    order = np.argsort(highest)
    # Images without contrast, such as empty ones, have no scale.
    order = np.array(
        [k for k in order if np.ptp(images[k].thumbnail) >= _MIN_CONTRAST * highest[k] > 0], np.intp
    )
    if len(order) < _MIN_IMAGES_OF_EXPOSURE or all(image.dtype == "uint8" for image in images):
        return
    steps = highest[order[1:]] / highest[order[:-1]]
    place = int(steps.argmax())
    low, high = highest[order[place]], highest[order[place + 1]]
    if steps[place] < _MIN_SCALE_STEP or not (low <= 1 or low <= 255 < high / _MIN_SCALE_STEP):
        return
    parts = order[: place + 1], order[place + 1 :]
    files = tuple(pairs[k].image for k in min(parts, key=len))
    name = data.name(pairs[parts[0][0]].image)
    yield Finding(
        "mixed scales",
        "error",
        files,
        f"{format_count(len(parts[0]), 'image')}, such as '{name}', have values up to about "
        f"{low:,.{2 * (low <= 1)}f}, but {len(parts[1])} others reach {high:,.0f} or more, "
        "so they seem to use two scales",
        "save all images with the same range of values, such as 0 to 255",
    )


def _blank_image(data: MeasuredDataset, pair: Pair, *, is_dark: bool) -> Finding:
    return Finding(
        "blank image",
        "error",
        (pair.image,),
        f"'{data.name(pair.image)}' is blank: it is uniformly {'dark' if is_dark else 'bright'}",
        "remove the pair, or supply the right image",
        (Repair(pair, "left out: the image is blank", leave_out=True, is_doubtful=True),),
    )
