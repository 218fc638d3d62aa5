"""A DATA folder -> a survey of what is in it and what is wrong with it, and its page (no torch needed)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.config import Settings
from useg.data.dataset import Dataset, Pair, pair_name, read_pair_image, read_sample
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.doctor.alignment import find_unsupported_boundaries
from useg.doctor.fix import check_output_folder, read_repaired_label, write_clean_copy
from useg.doctor.measure import Finding, class_ids_by_code, map_codes, read_codes
from useg.doctor.stored_values import defer_classes
from useg.doctor.survey import Survey, survey_dataset
from useg.errors import UsageError
from useg.images.files import Image, resize_image, resize_label
from useg.pictures import Picture, overlay, to_picture
from useg.reporting.html import embed_photo, write_page
from useg.reporting.text import format_percent

_MOST_FILES = 6


def write_survey_page(
    path: Path,
    survey: Mapping[str, Any],
    pictures: Sequence[tuple[str, Picture]],
    evidence: Sequence[Sequence[tuple[str, Picture]]] = (),
) -> None:
    """Write the page.

    Args:
        path: the ``.html`` file; it appears whole or not at all.
        survey: ``num_pairs``, ``layout``, ``sizes``, ``splits``, ``classes`` and ``findings`` as in ``useg inspect --json``.
        pictures: (caption, picture) of sample overlays, best with a legend.
        evidence: for each finding, in their order, the pictures that show it; or none at all.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    classes = survey["classes"]
    facts = {
        "Layout": survey["layout"],
        "Sizes": _counted(survey["sizes"]),
        "Bands": _counted(survey.get("bands", {})),
    }
    facts |= {
        "Pixel type": _counted(survey.get("dtypes", {})),
        "Splits": _counted(survey["splits"]),
        "Split by": survey.get("splits_by", ""),
    }
    if survey.get("ignore_share"):
        facts["Ignored"] = f"{format_percent(survey['ignore_share'])} of all pixels"
    write_page(
        path,
        "survey.html",
        title=Path(str(survey.get("root", "Data set"))).name or "Data set",
        kind="data set",
        survey=survey,
        facts={key: str(value) for key, value in facts.items() if value},
        rows=[entry for entry in classes if entry["pixels"]],
        absent=[entry["name"] for entry in classes if not entry["pixels"]],
        largest=max((entry["share"] for entry in classes), default=0) or 1,
        findings=[
            _finding(finding, shots)
            for finding, shots in zip(survey["findings"], evidence or repeat(()), strict=False)
        ],
        gallery=[embed_photo(caption, picture) for caption, picture in pictures],
    )


def _finding(finding: Mapping[str, Any], pictures: Sequence[tuple[str, Picture]]) -> dict[str, Any]:
    files = [str(name) for name in finding["files"]]
    shots = [embed_photo(caption, picture) for caption, picture in pictures]
    return {
        **finding,
        "files": files[:_MOST_FILES],
        "more": max(0, len(files) - _MOST_FILES),
        "count": len(files),
        "shots": shots,
    }


def _counted(content: Any) -> str:
    """``{"800x600": 204}`` -> ``"800x600 (204)"``; anything else as it is."""
    return (
        ", ".join(f"{key or 'not decided'} ({value})" for key, value in content.items())
        if isinstance(content, Mapping)
        else str(content)
    )


CaptionedPictures = list[tuple[str, Picture]]  # caption, picture


EvidenceDrawer = Callable[[Finding, Dataset], CaptionedPictures]


_MARK = (
    255,
    0,
    170,
)  # what no class has, what is off: a colour that neither streets nor cells have


_CROP = 160  # pixels: the side of a detail


_SHOWN = 640  # pixels: a smaller detail is enlarged to about that


def draw_evidence(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Return the pictures (caption, picture) that show a finding, none where a picture does not help or cannot be read."""
    try:
        return (
            EVIDENCE_DRAWERS[finding.kind](finding, dataset)
            if finding.kind in EVIDENCE_DRAWERS
            else []
        )
    except UsageError:
        return []


def _mended(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """The mask over its image as it is stored, and as it is after the cure."""
    cure = next(
        (cure for cure in finding.cures if cure.pair is not None and not cure.leave_out), None
    )
    if cure is None or cure.pair is None:
        return _labelled(finding, dataset)
    pair = cure.pair
    image = to_picture(read_pair_image(pair))
    after = read_repaired_label(
        pair, [other for other in finding.cures if other.pair == pair], dataset
    )
    before = _stored(pair, dataset)
    name = pair_name(pair, dataset.root)
    pictures = [(f"{name}: as it is", _laid(image, before, dataset))]
    return (
        pictures
        if after is None
        else [*pictures, ("mended", _laid(image, after.astype(np.int64), dataset))]
    )


def _outlined(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """A detail of the image with the outlines of the mask before and after."""
    cure = next((cure for cure in finding.cures if cure.pair is not None), None)
    if cure is None or cure.pair is None:
        return _labelled(finding, dataset)
    image = to_picture(read_pair_image(cure.pair))
    after = read_repaired_label(cure.pair, [cure], dataset)
    if after is None:
        return []
    before = _stored(cure.pair, dataset)
    box = _busiest(_edges(after))
    name = pair_name(cure.pair, dataset.root)
    return [
        (f"{name}: as it is", _outline(image, before, box)),
        ("mended: outlines on edges", _outline(image, after, box)),
    ]


def _twins(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    pairs = [_pair(path, dataset) for path in finding.files[:2]]
    shown: CaptionedPictures = []
    for pair in filter(None, pairs):
        image = to_picture(read_pair_image(pair))
        if finding.kind == "same image, different masks":
            image = _laid(image, _stored(pair, dataset), dataset)
        shown.append(
            (f"{pair_name(pair, dataset.root)}{f' ({pair.split})' if pair.split else ''}", image)
        )
    return shown


def _beside(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    other = finding.evidence["beside"]
    pairs = [
        pair for path in (other, finding.files[0]) if (pair := _pair(path, dataset)) is not None
    ]
    return [
        (f"{pair_name(pair, dataset.root)} ({pair.split})", to_picture(read_pair_image(pair)))
        for pair in pairs
    ]


def _labelled(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    pair = next(
        (found for path in finding.files if (found := _pair(path, dataset)) is not None), None
    )
    if pair is None:
        return []
    image = to_picture(read_pair_image(pair))
    return [
        (pair_name(pair, dataset.root), image),
        ("with its mask", _laid(image, _stored(pair, dataset), dataset)),
    ]


def _partner(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """The mask over its own image, and over the one that it fits."""
    own, other = _pair(finding.files[0], dataset), _pair(finding.evidence["fits"], dataset)
    if own is None or other is None:
        return []
    label = _stored(own, dataset)
    return [
        (
            f"{pair_name(one, dataset.root)}: {what}",
            _laid(to_picture(read_pair_image(one)), label, dataset),
        )
        for one, what in (
            (own, "this mask over its own image"),
            (other, "the same mask over this one"),
        )
    ]


def _region(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """The region outlined on two pictures of the set, far apart."""
    region: NDArray[np.bool_] = finding.evidence["region"]
    shown: CaptionedPictures = []
    for pair in (dataset.pairs[0], dataset.pairs[len(dataset.pairs) // 2]):
        image = to_picture(read_pair_image(pair)).copy()
        H, W, _ = image.shape
        inside = resize_label(region.astype(np.uint8), (W, H)) > 0
        image[inside] = (0.45 * image[inside] + 0.55 * np.array(_MARK)).astype(np.uint8)
        shown.append((pair_name(pair, dataset.root), image))
    return shown


def _review(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """The most suspicious labels: the first speck enlarged, or the boundaries that no edge supports."""
    shown: CaptionedPictures = []
    for path in finding.files[:2]:
        pair = _pair(path, dataset)
        if pair is None:
            continue
        image, label = to_picture(read_pair_image(pair)), _stored(pair, dataset)
        spot = finding.evidence["specks"].get(path)
        picture = _laid(image, label, dataset)
        if spot is None:
            picture = picture.copy()
            picture[_thick(find_unsupported_boundaries(image, label))] = _MARK
            shown.append(
                (f"{relative_name(path, dataset)}: edges that the image does not have", picture)
            )
        else:
            shown.append(
                (
                    f"{relative_name(path, dataset)}: where the first tiny spot is",
                    _cut(picture, _around(spot, label.shape, _CROP // 2)),
                )
            )
    return shown


def _frames(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    middle = len(dataset.pairs) // 2
    pairs = dataset.pairs[middle : middle + 2]
    return [(pair_name(pair, dataset.root), to_picture(read_pair_image(pair))) for pair in pairs]


def relative_name(path: Path, dataset: Dataset) -> str:
    """Return a file's path below the data set's folder."""
    return str(path.relative_to(dataset.root)) if path.is_relative_to(dataset.root) else str(path)


def _pair(path: Path, dataset: Dataset) -> Pair | None:
    return next((pair for pair in dataset.pairs if path in (pair.image, pair.mask)), None)


def _stored(pair: Pair, dataset: Dataset) -> NDArray[np.int64]:
    """A mask as class ids, -1 where it stores what no class has."""
    return map_codes(read_codes(pair, dataset), class_ids_by_code(dataset), -1)


def _laid(image: Image, ids: NDArray[np.int64], dataset: Dataset) -> Picture:
    """Lay a mask over an image of any size; what no class has is marked."""
    H, W = ids.shape
    picture = overlay(
        resize_image(image, (W, H)),
        np.where(ids < 0, IGNORE, ids).astype(np.uint8),
        dataset.classes,
        0.6,
    )
    picture[ids < 0] = _MARK
    return picture


def _edges(label: NDArray[np.integer]) -> NDArray[np.bool_]:
    edge = np.zeros(label.shape, bool)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    return edge


def _thick(edge: NDArray[np.bool_]) -> NDArray[np.bool_]:
    wide = edge.copy()
    wide[1:] |= edge[:-1]
    wide[:, 1:] |= edge[:, :-1]
    return wide


def _busiest(edge: NDArray[np.bool_]) -> tuple[slice, slice]:
    """The detail with most edges, away from the border."""
    H, W = edge.shape
    if min(H, W) <= _CROP:
        return slice(0, H), slice(0, W)
    sums = np.pad(edge.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = (
        sums[_CROP:, _CROP:]
        - sums[:-_CROP, _CROP:]
        - sums[_CROP:, :-_CROP]
        + sums[:-_CROP, :-_CROP]
    )
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    return slice(int(row), int(row) + _CROP), slice(int(column), int(column) + _CROP)


def _around(spot: tuple[int, int], shape: tuple[int, ...], side: int) -> tuple[slice, slice]:
    x, y = spot
    top, left = (
        max(0, min(place - side // 2, length - side))
        for place, length in zip((y, x), shape, strict=True)
    )
    return slice(top, top + side), slice(left, left + side)


def _cut(picture: Picture, box: tuple[slice, slice]) -> Picture:
    """Cut a detail out and enlarge it with square pixels."""
    detail = picture[box]
    factor = max(1, _SHOWN // max(detail.shape[:2]))
    return np.repeat(np.repeat(detail, factor, 0), factor, 1)


def _outline(image: Image, label: NDArray[np.integer], box: tuple[slice, slice]) -> Picture:
    """A grey detail, enlarged, with the boundaries between classes as thin lines between its pixels."""
    grey = np.repeat(image[box].mean(2, keepdims=True), 3, axis=2)
    picture = _cut(grey.astype(np.uint8), (slice(None), slice(None)))
    factor = picture.shape[0] // grey.shape[0]
    enlarged = np.repeat(np.repeat(label[box], factor, 0), factor, 1)
    picture[_thick(_edges(enlarged))] = _MARK
    return picture


EVIDENCE_DRAWERS: dict[str, EvidenceDrawer] = {
    "transposed mask": _mended,
    "turned mask": _mended,
    "unknown value": _mended,
    "grey levels of a palette": _mended,
    "smeared mask": _mended,
    "mask damaged by JPEG": _mended,
    "two values for one class": _mended,
    "inverted mask": _mended,
    "size mismatch": _labelled,
    "shifted masks": _outlined,
    "shifted mask": _outlined,
    "mask of another image": _partner,
    "mask does not fit its image": _labelled,
    "exact duplicate": _twins,
    "near duplicate": _twins,
    "near duplicates across splits": _twins,
    "same image, different masks": _twins,
    "validation beside training": _beside,
    "looks like a film": _frames,
    "blank image": _labelled,
    "odd exposure": _labelled,
    "odd size": _labelled,
    "mask of one class": _labelled,
    "constant region": _region,
    "labels to review": _review,
}


NUM_SAMPLES = 4


def inspect_dataset(
    data: str | Path,
    settings: Settings | None = None,
    html: Path | None = None,
    fix: Path | None = None,
) -> Survey:
    """Look through a data set.

    Args:
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        settings: ``data.*`` settings that say how the set is split.
        html: also write a page with pictures there.
        fix: also write a clean copy there, into a new or empty folder.

    Raises:
        UsageError: no such folder, or nothing in it that looks like pairs.
    """
    if fix:
        check_output_folder(fix, Path(data))
    choices = (settings or Settings()).data
    found = find_dataset(
        Path(data),
        Path(choices.classes) if choices.classes else None,
        strict=False,
        guess=defer_classes,
    )
    result = survey_dataset(
        found, split=lambda dataset: assign_splits(dataset, choices.split, choices.holdout)
    )
    if html:
        evidence = [draw_evidence(finding, result.dataset) for finding in result.findings]
        content = {
            **result.as_dict(),
            "findings": [_told(finding, result.dataset) for finding in result.findings],
        }
        write_survey_page(html, content, _samples(result.dataset), evidence)
    if fix:
        write_clean_copy(result, fix)
    return result


def _told(finding: Finding, dataset: Dataset) -> dict[str, Any]:
    files = [relative_name(path, dataset) for path in finding.files]
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "files": files,
        "message": finding.message,
        "remedy": finding.remedy,
    }


def _samples(dataset: Dataset) -> list[tuple[str, Picture]]:
    """A few pairs, spread over the data set: the image beside its mask."""
    pictures = []
    for pair in dataset.pairs[:: max(1, len(dataset.pairs) // NUM_SAMPLES)][:NUM_SAMPLES]:
        try:
            sample = read_sample(pair, dataset)
        except UsageError:
            continue  # it is among the findings
        picture = to_picture(sample.image)
        pictures.append((f"{pair_name(pair, dataset.root)} ({pair.split})", picture))
        pictures.append(("with its mask", overlay(picture, sample.label, dataset.classes)))
    return pictures
