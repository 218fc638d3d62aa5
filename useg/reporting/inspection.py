"""A DATA folder -> a survey of what is in it and what is wrong with it, and its page (no torch needed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from useg.config import Settings
from useg.data.dataset import Dataset, pair_name, read_sample
from useg.data.layouts import find
from useg.data.mending import check_out, mend
from useg.data.splits import assign_splits
from useg.data.survey import Finding, Survey, survey, undecided
from useg.errors import UsageError
from useg.pictures import Picture, overlay, to_picture
from useg.reporting.evidence import dataset_name, shots
from useg.reporting.survey_page import write_survey

NUM_PICTURES = 4


def inspect(data: str | Path, settings: Settings | None = None, html: Path | None = None, fix: Path | None = None) -> Survey:
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
        check_out(fix, Path(data))
    choices = (settings or Settings()).data
    found = find(Path(data), Path(choices.classes) if choices.classes else None, strict=False, guess=undecided)
    result = survey(found, split=lambda dataset: assign_splits(dataset, choices.split, choices.holdout))
    if html:
        evidence = [shots(finding, result.dataset) for finding in result.findings]
        content = {**result.as_dict(), "findings": [_told(finding, result.dataset) for finding in result.findings]}
        write_survey(html, content, _samples(result.dataset), evidence)
    if fix:
        mend(result, fix)
    return result


def _told(finding: Finding, dataset: Dataset) -> dict[str, Any]:
    files = [dataset_name(path, dataset) for path in finding.files]
    return {"kind": finding.kind, "severity": finding.severity, "files": files, "message": finding.message, "remedy": finding.remedy}


def _samples(dataset: Dataset) -> list[tuple[str, Picture]]:
    """A few pairs, spread over the data set: the image beside its mask."""
    pictures = []
    for pair in dataset.pairs[:: max(1, len(dataset.pairs) // NUM_PICTURES)][:NUM_PICTURES]:
        try:
            sample = read_sample(pair, dataset)
        except UsageError:
            continue  # it is among the findings
        picture = to_picture(sample.image)
        pictures.append((f"{pair_name(pair, dataset.root)} ({pair.split})", picture))
        pictures.append(("with its mask", overlay(picture, sample.label, dataset.classes)))
    return pictures
