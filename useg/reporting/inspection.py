"""Data set -> survey of its content and problems, and a page about it.

The page shows the evidence of each finding: a mask before and after its repair, two copies side by
side, a region that never changes. The same text goes to a Markdown file. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from useg.doctor.edges import find_unsupported_boundaries
from useg.doctor.fix import (
    check_no_description,
    check_output_folder,
    read_repaired_label,
    write_clean_copy,
    write_description,
)
from useg.doctor.mask_codes import read_ids
from useg.doctor.measure import Finding, relative_name
from useg.doctor.survey import Survey, defer_classes, survey_dataset
from useg.errors import UsageError, format_count
from useg.files import replacing
from useg.images.image_files import Image, resize_image, resize_label
from useg.ownership import is_own_markdown, stamp
from useg.parsing import printable
from useg.reporting.html import (
    embed_photo,
    escape_markdown,
    format_markdown_table,
    markdown_path,
    write_page,
)
from useg.reporting.text import format_percent, to_sentence
from useg.visualization import Picture, overlay, to_picture

# (caption, picture)
CaptionedPictures = list[tuple[str, Picture]]

EvidenceDrawer = Callable[[Finding, Dataset], CaptionedPictures]

# Pairs that a page shows as samples.
NUM_SAMPLES = 4

# Files that the page lists for one finding.
_MAX_LISTED_FILES = 6

# Pairs of duplicates that the page shows for one finding.
_MAX_SHOWN_DUPLICATES = 4

# Marks errors, in a colour that does not occur in streets or cells.
_MARK_COLOR = (255, 0, 170)

# Side of a detail, and the size to which a smaller one is enlarged.
_DETAIL_PIXELS = 160
_ENLARGED_PIXELS = 640

_SEVERITY_HEADINGS = {"error": "Errors", "warning": "Warnings", "note": "Notes"}


def inspect_dataset(
    data: str | Path,
    settings: Settings | None = None,
    html: Path | None = None,
    fix: Path | None = None,
    *,
    drop_doubtful: bool = False,
    init: bool = False,
) -> Survey:
    """Survey a data set.

    Args:
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        settings: ``data.*`` settings that determine the split.
        html: also write a page with images to this file, and a Markdown file next to it.
        fix: also write a clean copy there, into a new or empty folder.
        init: also write ``classes.toml``, ``split.csv`` and ``dataset.toml``, as the data were
            recognised, into their folder.
        drop_doubtful: leave pairs out of the copy that may be right, such as near duplicates.

    Raises:
        UsageError: the folder does not exist, it has no pairs, or an output cannot be written.
    """
    if html:
        markdown_path(html)
    if fix:
        check_output_folder(fix, Path(data))
    if init:
        check_no_description(Path(data))
    choices = (settings or Settings()).data
    found = find_dataset(Path(data), choices.classes, strict=False, infer=defer_classes)
    survey = survey_dataset(
        found, split=lambda dataset: assign_splits(dataset, choices.split, choices.holdout)
    )
    if html:
        dataset = survey.dataset
        evidence = [draw_evidence(finding, dataset) for finding in survey.findings]
        content = survey.as_dict()
        for entry, finding in zip(content["findings"], survey.findings, strict=True):
            entry["files"] = [relative_name(path, dataset) for path in finding.files]
        write_survey_page(html, content, _draw_samples(dataset), evidence)
        write_survey_markdown(markdown_path(html), content)
    if fix:
        write_clean_copy(survey, fix, drop_doubtful=drop_doubtful)
    if init:
        write_description(survey)
    return survey


def _draw_samples(dataset: Dataset) -> CaptionedPictures:
    """Draw a few pairs, spread over the data set: each image with its mask."""
    pictures = []
    for pair in dataset.pairs[:: max(1, len(dataset.pairs) // NUM_SAMPLES)][:NUM_SAMPLES]:
        try:
            sample = read_sample(pair, dataset)
        except UsageError:
            # It is among the findings.
            continue
        picture = to_picture(sample.image)
        pictures.append((f"{pair_name(pair, dataset.root)} ({pair.split})", picture))
        pictures.append(("with its mask", overlay(picture, sample.label, dataset.classes)))
    return pictures


def write_survey_page(
    path: Path,
    survey: Mapping[str, Any],
    pictures: Sequence[tuple[str, Picture]],
    evidence: Sequence[Sequence[tuple[str, Picture]]] = (),
) -> None:
    """Write the page about a survey.

    Args:
        path: the ``.html`` file; it is replaced as a whole, or not at all.
        survey: ``num_pairs``, ``layout``, ``sizes``, ``splits``, ``classes`` and ``findings`` as in
            ``useg inspect --json``.
        pictures: (caption, picture) of samples.
        evidence: for each finding, in their order, the pictures that show it; or none at all.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    classes = survey["classes"]
    write_page(
        path,
        "survey.html",
        title=_title(survey),
        kind="data set",
        survey=survey,
        facts=_list_facts(survey),
        rows=[entry for entry in classes if entry["pixels"]],
        absent=[entry["name"] for entry in classes if not entry["pixels"]],
        largest=max((entry["share"] for entry in classes), default=0) or 1,
        findings=[
            _finding_content(finding, shown)
            for finding, shown in zip(survey["findings"], evidence or repeat(()), strict=False)
        ],
        gallery=[embed_photo(caption, picture) for caption, picture in pictures],
    )


def write_survey_markdown(path: Path, survey: Mapping[str, Any]) -> None:
    """Write the text of the page as Markdown.

    Args:
        path: the ``.md`` file; it is replaced as a whole, or not at all.
        survey: as for :func:`write_survey_page`.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    text = printable("\n\n".join(_markdown_blocks(survey)))
    with replacing(path, is_own_markdown) as draft:
        draft.write_text(stamp(f"{text}\n\n"), "utf-8")


def _markdown_blocks(survey: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {escape_markdown(_title(survey))}"
    yield f"{format_count(survey['num_pairs'], 'pair')} of image and mask."
    for severity, heading in _SEVERITY_HEADINGS.items():
        findings = [each for each in survey["findings"] if each["severity"] == severity]
        if findings:
            yield f"## {heading}"
            yield "\n".join(_markdown_finding(each) for each in findings)
    if not survey["findings"]:
        yield "No findings."
    yield "## Classes"
    rows = [
        (
            entry["name"],
            str(entry["id"]),
            f"{100 * entry['share']:.2f} %",
            f"{entry['pixels']:,}",
            f"{entry['images']:,}",
        )
        for entry in survey["classes"]
    ]
    yield format_markdown_table(("Class", "Id", "Share", "Pixels", "Images"), rows)
    yield "## Data set"
    yield "\n".join(
        f"- {name}: {escape_markdown(value)}" for name, value in _list_facts(survey).items()
    )


def _markdown_finding(finding: Mapping[str, Any]) -> str:
    """Return a list item: the kind, the problem, the remedy, and the files."""
    files = [str(name) for name in finding["files"]]
    more = f" and {len(files) - _MAX_LISTED_FILES:,} more"
    listed = ", ".join(files[:_MAX_LISTED_FILES]) + more * (len(files) > _MAX_LISTED_FILES)
    text = f"{to_sentence(finding['message'])} What to do: {to_sentence(finding['remedy'])}"
    where = f" Files: {to_sentence(listed)}" if files else ""
    return f"- **{escape_markdown(finding['kind'].capitalize())}**: {escape_markdown(text + where)}"


def _title(survey: Mapping[str, Any]) -> str:
    return Path(str(survey.get("root", "Data set"))).name or "Data set"


def _list_facts(survey: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "Layout": survey["layout"],
        "Sizes": _format_counts(survey["sizes"]),
        "Bands": _format_counts(survey.get("bands", {})),
        "Pixel type": _format_counts(survey.get("dtypes", {})),
        "Splits": _format_counts(survey["splits"]),
        "Split by": survey.get("splits_by", ""),
    }
    if survey.get("ignore_share"):
        facts["Ignored"] = f"{format_percent(survey['ignore_share'])} of all pixels"
    return {key: str(value) for key, value in facts.items() if value}


def _format_counts(content: Any) -> str:
    """``{"800x600": 204}`` -> ``"800x600 (204)"``; anything else as text."""
    if not isinstance(content, Mapping):
        return str(content)
    return ", ".join(f"{key or 'not decided'} ({value})" for key, value in content.items())


def _finding_content(
    finding: Mapping[str, Any], pictures: Sequence[tuple[str, Picture]]
) -> dict[str, Any]:
    """Return a finding as the page's template expects it."""
    files = [str(name) for name in finding["files"]]
    return {
        **finding,
        "files": files[:_MAX_LISTED_FILES],
        "more": max(0, len(files) - _MAX_LISTED_FILES),
        "count": len(files),
        "shots": [embed_photo(caption, picture) for caption, picture in pictures],
    }


def draw_evidence(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Return pictures that show a finding; none if they would not help or cannot be read."""
    draw = EVIDENCE_DRAWERS.get(finding.kind)
    if draw is None:
        return []
    try:
        return draw(finding, dataset)
    except UsageError:
        return []


def _draw_repair(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw a mask over its image, before and after its repair."""
    pair = next((each.pair for each in finding.repairs if each.pair and not each.leave_out), None)
    if pair is None:
        return _draw_pair(finding, dataset)
    image = to_picture(read_pair_image(pair))
    repairs = [repair for repair in finding.repairs if repair.pair == pair]
    before, after = read_ids(pair, dataset), read_repaired_label(pair, repairs, dataset)
    pictures = [
        (f"{pair_name(pair, dataset.root)}: before", _overlay_ids(image, before, dataset)),
    ]
    if after is not None:
        repaired = _overlay_ids(image, after.astype(np.int64), dataset)
        pictures.append(("after the repair", repaired))
    return pictures


def _draw_outlines(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw a detail of an image with the outlines of its mask, before and after the repair."""
    repair = next((each for each in finding.repairs if each.pair), None)
    if repair is None or repair.pair is None:
        return _draw_pair(finding, dataset)
    pair = repair.pair
    after = read_repaired_label(pair, [repair], dataset)
    if after is None:
        return []
    image, before = to_picture(read_pair_image(pair)), read_ids(pair, dataset)
    window = _find_busiest_window(_find_boundaries(after))
    return [
        (f"{pair_name(pair, dataset.root)}: before", _outline_detail(image, before, window)),
        ("after the repair: the outlines lie on edges", _outline_detail(image, after, window)),
    ]


def _draw_duplicates(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw the images of each pair of duplicates side by side, where their masks differ marked."""
    pictures: CaptionedPictures = []
    for pairs in finding.evidence["pairs"][:_MAX_SHOWN_DUPLICATES]:
        try:
            pictures += _draw_two(pairs, dataset)
        except UsageError:
            # Another finding reports what cannot be read.
            continue
    return pictures


def _draw_two(pairs: Sequence[Pair], dataset: Dataset) -> CaptionedPictures:
    images = [to_picture(read_pair_image(pair)) for pair in pairs]
    ids = [read_ids(pair, dataset) for pair in pairs]
    differs = ids[0] != ids[1] if ids[0].shape == ids[1].shape else np.zeros(0, bool)
    drawn: CaptionedPictures = []
    for pair, image, own in zip(pairs, images, ids, strict=True):
        caption = f"{pair_name(pair, dataset.root)}{f' ({pair.split})' if pair.split else ''}"
        if differs.any():
            image = _overlay_ids(image, own, dataset)
            image[differs] = _MARK_COLOR
            caption += f": {100 * differs.mean():.1f} % of the masks differ"
        drawn.append((caption, image))
    return drawn


def _draw_neighbours(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw an image and another one, beside which the finding puts it."""
    pairs = (_find_pair(path, dataset) for path in (finding.evidence["beside"], finding.files[0]))
    return [
        (f"{pair_name(pair, dataset.root)} ({pair.split})", to_picture(read_pair_image(pair)))
        for pair in pairs
        if pair is not None
    ]


def _draw_pair(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw the first pair of a finding: its image, and the same with its mask."""
    pairs = (_find_pair(path, dataset) for path in finding.files)
    pair = next((pair for pair in pairs if pair is not None), None)
    if pair is None:
        return []
    image = to_picture(read_pair_image(pair))
    return [
        (pair_name(pair, dataset.root), image),
        ("with its mask", _overlay_ids(image, read_ids(pair, dataset), dataset)),
    ]


def _draw_other_image(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw a mask over its own image, and over the image that it fits."""
    own = _find_pair(finding.files[0], dataset)
    other = _find_pair(finding.evidence["fits"], dataset)
    if own is None or other is None:
        return []
    ids = read_ids(own, dataset)
    captions = ("this mask over its own image", "the same mask over this image")
    return [
        (
            f"{pair_name(pair, dataset.root)}: {caption}",
            _overlay_ids(to_picture(read_pair_image(pair)), ids, dataset),
        )
        for pair, caption in zip((own, other), captions, strict=True)
    ]


def _draw_region(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Mark the region on two images of the data set, far apart."""
    region: NDArray[np.bool_] = finding.evidence["region"]
    pictures = []
    for pair in (dataset.pairs[0], dataset.pairs[len(dataset.pairs) // 2]):
        picture = to_picture(read_pair_image(pair)).copy()
        H, W, _ = picture.shape
        inside = resize_label(region.astype(np.uint8), (W, H)) > 0
        marked = 0.45 * picture[inside] + 0.55 * np.array(_MARK_COLOR)
        picture[inside] = marked.astype(np.uint8)
        pictures.append((pair_name(pair, dataset.root), picture))
    return pictures


def _draw_labels_to_review(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw the most suspicious labels: the first speck, or the boundaries without edges."""
    pictures = []
    for path in finding.files[:2]:
        pair = _find_pair(path, dataset)
        if pair is None:
            continue
        image, ids = to_picture(read_pair_image(pair)), read_ids(pair, dataset)
        picture = _overlay_ids(image, ids, dataset)
        name = relative_name(path, dataset)
        speck = finding.evidence["specks"].get(path)
        if speck is None:
            picture = picture.copy()
            picture[_thicken(find_unsupported_boundaries(image, ids))] = _MARK_COLOR
            pictures.append((f"{name}: boundaries without edges in the image", picture))
        else:
            window = _window_around(speck, ids.shape, _DETAIL_PIXELS // 2)
            pictures.append((f"{name}: the first tiny spot", _enlarge(picture, window)))
    return pictures


def _draw_frames(finding: Finding, dataset: Dataset) -> CaptionedPictures:
    """Draw two neighbouring images from the middle of the data set."""
    middle = len(dataset.pairs) // 2
    pairs = dataset.pairs[middle : middle + 2]
    return [(pair_name(pair, dataset.root), to_picture(read_pair_image(pair))) for pair in pairs]


def _find_pair(path: Path, dataset: Dataset) -> Pair | None:
    return next((pair for pair in dataset.pairs if path in (pair.image, pair.mask)), None)


def _overlay_ids(image: Image, ids: NDArray[np.int64], dataset: Dataset) -> Picture:
    """Draw a mask over an image of any size; pixels of no class are marked."""
    H, W = ids.shape
    label = np.where(ids < 0, IGNORE, ids).astype(np.uint8)
    picture = overlay(resize_image(image, (W, H)), label, dataset.classes, 0.6)
    picture[ids < 0] = _MARK_COLOR
    return picture


def _find_boundaries(label: NDArray[np.integer]) -> NDArray[np.bool_]:
    boundary = np.zeros(label.shape, bool)
    boundary[:, 1:] |= label[:, 1:] != label[:, :-1]
    boundary[1:] |= label[1:] != label[:-1]
    return boundary


def _thicken(boundary: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Make boundaries two pixels wide."""
    wide = boundary.copy()
    wide[1:] |= boundary[:-1]
    wide[:, 1:] |= boundary[:, :-1]
    return wide


def _find_busiest_window(boundary: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Return the square of ``_DETAIL_PIXELS`` with the most boundary pixels."""
    H, W = boundary.shape
    side = _DETAIL_PIXELS
    if min(H, W) <= side:
        return slice(0, H), slice(0, W)
    sums = np.pad(boundary.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    row, column = (int(k) for k in np.unravel_index(int(inside.argmax()), inside.shape))
    return slice(row, row + side), slice(column, column + side)


def _window_around(
    point: tuple[int, int], shape: tuple[int, ...], side: int
) -> tuple[slice, slice]:
    x, y = point
    top, left = (
        max(0, min(place - side // 2, length - side))
        for place, length in zip((y, x), shape, strict=True)
    )
    return slice(top, top + side), slice(left, left + side)


def _enlarge(picture: Picture, window: tuple[slice, slice]) -> Picture:
    """Cut out a detail and enlarge it, with square pixels."""
    detail = picture[window]
    factor = max(1, _ENLARGED_PIXELS // max(detail.shape[:2]))
    return np.repeat(np.repeat(detail, factor, 0), factor, 1)


def _outline_detail(
    image: Image, label: NDArray[np.integer], window: tuple[slice, slice]
) -> Picture:
    """Enlarge a detail in grey, with thin lines where its pixels change their class."""
    grey = np.repeat(image[window].mean(2, keepdims=True), 3, axis=2)
    picture = _enlarge(grey.astype(np.uint8), (slice(None), slice(None)))
    factor = picture.shape[0] // grey.shape[0]
    enlarged = np.repeat(np.repeat(label[window], factor, 0), factor, 1)
    picture[_thicken(_find_boundaries(enlarged))] = _MARK_COLOR
    return picture


EVIDENCE_DRAWERS: dict[str, EvidenceDrawer] = {
    "transposed mask": _draw_repair,
    "turned mask": _draw_repair,
    "turned masks": _draw_repair,
    "misplaced masks": _draw_repair,
    "outlines too wide or too narrow": _draw_pair,
    "unknown value": _draw_repair,
    "grey levels of a palette": _draw_repair,
    "smeared mask": _draw_repair,
    "mask damaged by JPEG": _draw_repair,
    "two values for one class": _draw_repair,
    "inverted mask": _draw_repair,
    "red and blue exchanged": _draw_repair,
    "masks of two kinds": _draw_repair,
    "size mismatch": _draw_pair,
    "shifted masks": _draw_outlines,
    "shifted mask": _draw_outlines,
    "mask of another image": _draw_other_image,
    "copied masks": _draw_pair,
    "mask does not fit its image": _draw_pair,
    "exact duplicate": _draw_duplicates,
    "near duplicate": _draw_duplicates,
    "near duplicates across splits": _draw_duplicates,
    "same image, different masks": _draw_duplicates,
    "validation beside training": _draw_neighbours,
    "negative images": _draw_neighbours,
    "red and blue of images exchanged": _draw_neighbours,
    "looks like a film": _draw_frames,
    "blank image": _draw_pair,
    "odd exposure": _draw_pair,
    "odd size": _draw_pair,
    "mask of one class": _draw_pair,
    "constant region": _draw_region,
    "labels to review": _draw_labels_to_review,
}
