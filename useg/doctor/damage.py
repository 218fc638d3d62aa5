"""Files without partner, files that cannot be read or are not what their name says, masks of another size than their image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from useg.classes import Label
from useg.doctor.alignment import find_best_orientation
from useg.doctor.measure import (
    ORIENTATIONS,
    Finding,
    MeasuredDataset,
    Measurement,
    Repair,
    join_with_and,
    orientation_change,
    pluralize,
)
from useg.images.files import resize_label

_STARTS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
}


_SUFFIXES = {
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


def detect_file_format(path: Path) -> str:
    """Return the format that a file's first bytes tell: a picture format, ``"text"``, ``"web page"``, ``"empty"`` or ``""`` when unknown."""
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        return "empty"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "web page"
    known = next((name for magic, name in _STARTS.items() if start.startswith(magic)), "")
    return known or ("text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start) else "")


def check_unpaired_files(case: MeasuredDataset) -> Iterator[Finding]:
    """Images without mask, masks without image."""
    for alone, what, other in (
        (case.dataset.images, "image", "mask"),
        (case.dataset.masks, "mask", "image"),
    ):
        if alone:
            first = case.name(alone[0])
            message = (
                f"{len(alone)} {what}s have no {other}, such as '{first}'"
                if len(alone) > 1
                else f"'{first}' has no {other}"
            )
            cures = tuple(
                Repair(None, f"'{case.name(path)}' left out: it has no {other}", leave_out=True)
                for path in alone
            )
            yield Finding(
                f"{what} without {other}",
                "error",
                alone,
                message,
                f"add the {other} under the same name or remove the {what}",
                cures,
            )


def check_unreadable_files(case: MeasuredDataset) -> Iterator[Finding]:
    """Damaged, cut off, empty files, and texts under a picture's name."""
    for look in case.looks:
        if look.trouble is None:
            continue
        path, error = look.trouble
        message, _, remedy = str(error).rpartition("; ")  # our errors end with what to do
        name = case.name(path)
        inside = detect_file_format(path) if path.is_file() else ""
        if inside == "empty":
            message, remedy = (
                f"'{name}' is empty (0 bytes): its copy or download failed",
                "copy it again, or remove it",
            )
        elif inside in ("text", "web page"):
            message, remedy = (
                f"'{name}' is a {inside} under a picture's name, as a failed download leaves it",
                "download it again, or remove it",
            )
        cure = Repair(look.pair, f"left out: '{name}' cannot be read", leave_out=True)
        yield Finding(
            "unreadable file", "error", (path,), message.replace(str(path), name), remedy, (cure,)
        )


def check_file_suffixes(case: MeasuredDataset) -> Iterator[Finding]:
    """Pictures whose suffix says another format than their content."""
    paths = dict.fromkeys(
        path
        for look in case.looks
        if look.trouble is None
        for path in (look.pair.image, look.pair.mask)
    )
    wrong = {
        path: inside
        for path in paths
        if path.suffix.lower() in _SUFFIXES
        and (inside := detect_file_format(path)) in FORMAT_SUFFIX
    }
    wrong = {
        path: inside for path, inside in wrong.items() if inside != _SUFFIXES[path.suffix.lower()]
    }
    if wrong:
        first, inside = next(iter(wrong.items()))
        more = f" (and {pluralize(len(wrong) - 1, 'other')})" if len(wrong) > 1 else ""
        message = f"'{case.name(first)}' is a {inside} file whatever its name says{more}"
        cures = tuple(
            Repair(look.pair, f"image named {FORMAT_SUFFIX[wrong[look.pair.image]]}, which it is")
            for look in case.looks
            if look.pair.image in wrong
        )
        yield Finding(
            "mislabelled file",
            "warning",
            tuple(wrong),
            message,
            "useg reads it by its content; other programs may not: rename it",
            cures,
        )


def check_mask_sizes(case: MeasuredDataset) -> Iterator[Finding]:
    """Masks of another size than their image: turned, scaled, or of another picture."""
    for look in case.looks:
        if look.image is None or look.mask is None or look.whole:
            continue
        (W, H), (w, h) = look.image.size, look.mask.size
        image, mask = case.name(look.pair.image), case.name(look.pair.mask)
        files = (look.pair.image, look.pair.mask)
        message = f"image '{image}' is {W}x{H} pixels, but its mask '{mask}' is {w}x{h}"
        if (w, h) == (H, W):
            turn = find_best_orientation(case, look, list(ORIENTATIONS)[:4])
            said = f"{message}: width and height are swapped; the edges fit when it is {turn}"
            cure = Repair(look.pair, f"mask {turn}", change=orientation_change(ORIENTATIONS[turn]))
            yield Finding(
                "transposed mask",
                "error",
                files,
                said,
                "save the mask in the image's orientation",
                (cure,),
                {"turn": turn},
            )
        elif abs(w * H - h * W) <= max(W, H, w, h):
            said = f"{message}, of the same proportions"
            cure = Repair(
                look.pair,
                f"mask resized from {w}x{h} to {W}x{H}, nearest pixel",
                change=_resizer((W, H)),
            )
            yield Finding(
                "size mismatch",
                "error",
                files,
                said,
                "check that they belong together, or resize the mask (nearest neighbour)",
                (cure,),
            )
        else:
            cure = Repair(look.pair, f"left out: image {W}x{H}, mask {w}x{h}", leave_out=True)
            yield Finding(
                "size mismatch",
                "error",
                files,
                message,
                "check that they belong together, or resize the mask (nearest neighbour)",
                (cure,),
            )


def check_mixed_images(case: MeasuredDataset) -> Iterator[Finding]:
    """Images of different sizes, bands or number types."""
    seen = [look for look in case.looks if look.image is not None]
    found = [(look, look.image) for look in seen if look.image is not None]
    groups: dict[str, dict[object, list[Measurement]]] = {"size": {}, "bands": {}, "dtype": {}}
    for look, image in found:
        for name, value in (("size", image.size), ("bands", image.bands), ("dtype", image.dtype)):
            groups[name].setdefault(value, []).append(look)
    yield from _mixed_sizes(
        case, {key: value for key, value in groups["size"].items() if isinstance(key, tuple)}
    )
    for name, kind in (("bands", "mixed bands"), ("dtype", "mixed number types")):
        if len(groups[name]) > 1:
            values = sorted(groups[name], key=str)
            odd = min(groups[name].values(), key=len)
            grey = values == [1, 3]
            what = (
                f"{join_with_and(values)} bands"
                if name == "bands"
                else f"{join_with_and(values)} pixels"
            )
            usual = max(groups[name], key=lambda value: len(groups[name][value]))
            remedy = (
                "convert them to one number type"
                if name == "dtype"
                else "give pictures with the same bands"
            )
            remedy = (
                "grey ones are repeated to three bands; check that this is meant"
                if grey
                else remedy
            )
            others = [
                look for value, looks in groups[name].items() if value != usual for look in looks
            ]
            cures = (
                ()
                if grey
                else tuple(
                    Repair(look.pair, f"left out: not {usual} {name} as most", leave_out=True)
                    for look in others
                )
            )
            files = tuple(look.pair.image for look in odd)
            verb = "have" if name == "bands" else "hold"
            yield Finding(
                kind,
                "warning" if grey else "error",
                files,
                f"the images {verb} {what}, such as '{case.name(files[0])}'",
                remedy,
                cures,
            )


def _mixed_sizes(
    case: MeasuredDataset, groups: dict[tuple[int, int], list[Measurement]]
) -> Iterator[Finding]:
    if len(groups) < 2:
        return
    number = sum(map(len, groups.values()))
    usual = max(groups, key=lambda size: len(groups[size]))
    odd = [look for size, looks in groups.items() if size != usual for look in looks]
    low, high = (
        f"{w}x{h}"
        for w, h in (min(groups, key=lambda s: s[0] * s[1]), max(groups, key=lambda s: s[0] * s[1]))
    )
    if number >= 10 and len(odd) <= max(1, number // 50):
        files = tuple(look.pair.image for look in odd)
        first = odd[0].image
        assert first is not None
        message = f"'{case.name(files[0])}' is {first.size[0]}x{first.size[1]}, while {number - len(odd)} of {number} images are {usual[0]}x{usual[1]}"
        yield Finding(
            "odd size",
            "warning",
            files,
            message,
            "check where it comes from; it is brought to the working size like the others",
        )
    else:
        message = f"the images have {len(groups)} different sizes, from {low} to {high}"
        yield Finding(
            "mixed sizes",
            "note",
            (),
            message,
            "nothing needs doing: each is brought to the working size",
        )


def _resizer(size: tuple[int, int]) -> Callable[[Label], Label]:
    return lambda label: resize_label(label, size)
