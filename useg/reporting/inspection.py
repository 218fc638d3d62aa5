"""A DATA folder -> a survey of what is in it and what is wrong with it, and its page (no torch needed)."""

from __future__ import annotations

from pathlib import Path

from useg.config import Settings
from useg.data.dataset import read_sample
from useg.data.layouts import find
from useg.data.splits import assign_splits
from useg.data.survey import Survey, survey
from useg.errors import UsageError
from useg.pictures import overlay, side_by_side, to_picture
from useg.reporting.report import write_survey

NUM_PICTURES = 6


def inspect(data: str | Path, settings: Settings | None = None, html: Path | None = None) -> Survey:
    """Look through a data set.

    Args:
        data: a folder whose layout is recognised, or a ``dataset.toml``.
        settings: ``data.*`` settings that say how the set is split.
        html: also write a page with pictures there.

    Raises:
        UsageError: no such folder, or nothing in it that looks like pairs.
    """
    choices = (settings or Settings()).data
    dataset = assign_splits(find(Path(data), Path(choices.classes) if choices.classes else None, strict=False), choices.split, choices.holdout)
    result = survey(dataset)
    if html:
        pictures = []
        step = max(1, len(dataset.pairs) // NUM_PICTURES)
        for pair in dataset.pairs[::step][:NUM_PICTURES]:
            try:
                sample = read_sample(pair, dataset)
            except UsageError:
                continue  # it is among the findings
            picture = to_picture(sample.image)
            pictures.append((f"{pair.image.name} ({pair.split})", side_by_side([picture, overlay(picture, sample.label, dataset.classes)])))
        write_survey(html, result.as_dict(), pictures)
    return result
