"""Findings of ``useg inspect`` -> the images that ``useg label --faulty`` shows first.

Only findings that a person can judge by looking at the mask count: a mask is shifted or rotated,
has tiny spots, belongs to another image, or has boundaries where the image has no edges.
"""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from useg.doctor.alignment import NO_FIT_KIND
from useg.doctor.survey import Survey
from useg.errors import DataError, format_count
from useg.labelling.folder import LabelPaths, find_paths
from useg.labelling.mask_format import check_editable, with_ignored_value
from useg.reporting.text import to_sentence

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
