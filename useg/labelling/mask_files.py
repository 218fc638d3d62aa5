"""The masks of a labelled folder: where they are, how files store them, and which are faulty.

A folder keeps its format: palette PNGs of stored values, or RGB PNGs of class colours. Unpainted
pixels have a value of their own.

``useg label --faulty`` shows faulty masks first. Only findings of ``useg inspect`` that a person
can judge by looking at the mask count: a mask is shifted or rotated, has tiny spots, belongs to
another image, or has boundaries where the image has no edges.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from useg.classes import IGNORE, ClassTable, Label
from useg.data.dataset import Dataset, Pair, read_label
from useg.doctor.single_masks import NO_FIT_KIND
from useg.doctor.survey import Survey
from useg.errors import DataError, UsageError, format_count
from useg.images.image_files import encode_png
from useg.reporting.text import to_sentence


def extend_table(table: ClassTable | None, names: Sequence[str]) -> ClassTable:
    """Return the table with these names; each new class gets a free value and a distinct colour."""
    if table is None:
        return ClassTable(tuple(names))
    if len(names) < len(table):
        raise DataError(
            f"{format_count(len(names), 'class', 'classes')} were sent, but the masks have "
            f"{len(table)}; classes cannot be removed, so rename one that you do not need"
        )
    values, colors = list(table.values), list(table.colors)
    own = ClassTable(tuple(names)).colors
    while len(values) < len(names):
        taken = {*values, *table.ignore}
        values.append(next(value for value in range(1 << 16) if value not in taken))
        colors.append(next(color for color in (*own[len(colors) :], *own) if color not in colors))
    return replace(table, names=tuple(names), values=tuple(values), colors=tuple(colors))


def with_ignored_value(table: ClassTable) -> ClassTable:
    """Return the table with a stored value for unpainted pixels."""
    if _ignored_value(table) is not None:
        return table
    if table.by_color:
        colors = (0xFFFFFF, 0, *range(0xFF00FF, 0, -1))
        free = next(color for color in colors if color not in table.stored)
    else:
        free = next((value for value in range(255, 0, -1) if value not in table.values), -1)
        if free < 0:
            raise DataError(
                "the masks use all 256 values, which leaves no value for unpainted pixels"
            )
    return replace(table, ignore=(*table.ignore, free))


def _ignored_value(table: ClassTable) -> int | None:
    """Return the value that unpainted pixels have in a file: a number, or a colour as a number."""
    highest = 0xFFFFFF if table.by_color else 255
    fitting = [value for value in table.ignore if 0 <= value <= highest]
    return 255 if 255 in fitting and not table.by_color else fitting[0] if fitting else None


def encode_mask(label: Label, table: ClassTable) -> bytes:
    """Encode a label map as a PNG in the format of the class table.

    The file does not carry the mark of useg, so no other command replaces a person's work.
    """
    ignored = _ignored_value(table)
    assert ignored is not None
    colors = np.zeros((256, 3), np.uint8)
    if table.by_color:
        colors[: len(table)] = table.colors
        colors[IGNORE] = ignored >> 16, ignored >> 8 & 255, ignored & 255
        return encode_png(np.take(colors, label, axis=0))
    values = np.full(256, ignored, np.uint8)
    values[: len(table)] = table.values
    colors[list(table.values)] = table.colors
    return encode_png(np.take(values, label), colors)


def check_editable(dataset: Dataset, pairs: Sequence[Pair]) -> None:
    """Check that useg can write the masks back in their own format.

    Raises:
        DataError: It cannot.
    """
    advice = (
        f"useg inspect {dataset.root} --fix OUT writes a copy with masks that useg label can edit"
    )
    for pair in pairs:
        if pair.truth is not None or pair.valid is not None or pair.page is not None:
            raise DataError(f"'{pair.mask}' is not a single mask image; {advice}")
        if pair.mask.suffix.lower() != ".png":
            raise DataError(f"the mask '{pair.mask}' is not a PNG; {advice}")
    too_large = not dataset.classes.by_color and max(dataset.classes.values) > 255
    if too_large or not _survives_writing(dataset, pairs[0]):
        raise DataError(
            f"'{pairs[0].mask}' stores classes in a format that useg cannot write; {advice}"
        )


def _survives_writing(dataset: Dataset, pair: Pair) -> bool:
    """Whether writing a mask and reading it again returns the same mask."""
    label = read_label(pair, dataset)
    label[0, 0] = IGNORE
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "mask.png")
        copy.write_bytes(encode_mask(label, dataset.classes))
        try:
            again = read_label(replace(pair, mask=copy), dataset)
        except UsageError:
            return False
    return bool(np.array_equal(again, label))


@dataclass(frozen=True)
class LabelPaths:
    """The folders of one labelling job.

    Args:
        images: The folder of the images.
        masks: The folder of the masks.
        root: The folder that ``useg train`` reads; ``dataset.toml`` and ``classes.toml`` are here.
    """

    images: Path
    masks: Path
    root: Path


def find_paths(images: Path, masks: Path | None = None) -> LabelPaths:
    """Find the folder of masks for a folder of images.

    By default, masks are stored in ``masks`` next to a folder named ``images``, and in a subfolder
    ``masks`` of any other folder.

    Raises:
        DataError: The image folder does not exist, or the masks would be mixed with the images.
    """
    if not images.is_dir():
        raise DataError(f"'{images}' is not a folder; give the folder that contains the images")
    images = Path(os.path.realpath(images))
    if masks is None:
        is_images = images.name.casefold() == "images"
        root = images.parent if is_images else images
        return LabelPaths(images, root / "masks", root)
    masks = Path(os.path.realpath(masks))
    if masks == images or images.is_relative_to(masks):
        raise DataError(
            f"the masks would be mixed with the images in '{masks}'; choose another folder for them"
        )
    siblings = masks.parent in (images.parent, images)
    return LabelPaths(images, masks, masks.parent if siblings else masks)


KINDS = ("shifted mask", "turned mask", "mask of another image", NO_FIT_KIND, "labels to review")

# They replace the message of a finding that names many masks.
_SPECKS = "This mask has many tiny spots."
_NO_EDGES = "The boundaries of this mask lie where the image has no edges."


def faulty_masks(survey: Survey) -> dict[Path, str]:
    """Return the masks that a person should check, and the problem with each."""
    sentences: dict[Path, list[str]] = defaultdict(list)
    masks = {pair.mask for pair in survey.dataset.pairs}
    for finding in survey.findings:
        if finding.kind not in KINDS:
            continue
        for path in masks.intersection(finding.files):
            sentence = to_sentence(finding.message)
            if finding.kind == "labels to review":
                sentence = _SPECKS if path in finding.evidence["specks"] else _NO_EDGES
            sentences[path].append(sentence)
    return {path: " ".join(each) for path, each in sentences.items()}


def suggest_label_command(survey: Survey) -> str:
    """Return a line with the command that opens the faulty masks; "" if there are none.

    It is also "" if ``useg label`` cannot edit the masks, because of their format or because images
    and masks share a folder.
    """
    faulty, pairs = faulty_masks(survey), survey.dataset.pairs
    if not faulty:
        return ""
    images, masks = (
        Path(os.path.commonpath([os.path.realpath(path.parent) for path in paths]))
        for paths in ([pair.image for pair in pairs], [pair.mask for pair in pairs])
    )
    try:
        paths = find_paths(images, masks)
        table = with_ignored_value(survey.dataset.classes)
        check_editable(replace(survey.dataset, classes=table), pairs)
    except DataError:
        return ""
    if paths.root != Path(os.path.realpath(survey.root)):
        return ""
    folder = "" if find_paths(images) == paths else f" --masks {shlex.quote(str(masks))}"
    count = format_count(len(faulty), "mask")
    return f"to correct {count} by hand: useg label {shlex.quote(str(images))}{folder} --faulty"


def find_faulty(paths: LabelPaths) -> dict[Path, str]:
    """Inspect a labelled folder; return the faulty masks and the problem with each.

    Raises:
        UsageError: There are no masks.
    """
    from useg.reporting.inspection import inspect_dataset

    found = faulty_masks(inspect_dataset(paths.root))
    return {Path(os.path.realpath(path)): sentence for path, sentence in found.items()}
