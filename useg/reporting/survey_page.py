"""A survey -> the page of a data set: what is wrong with it, what is in it, and a look at some of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from useg.pictures import Picture
from useg.reporting.html import photo, write_page
from useg.reporting.spelling import percent

_MOST_FILES = 6


def write_survey(
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
    facts = {"Layout": survey["layout"], "Sizes": _counted(survey["sizes"]), "Bands": _counted(survey.get("bands", {}))}
    facts |= {"Pixel type": _counted(survey.get("dtypes", {})), "Splits": _counted(survey["splits"]), "Split by": survey.get("splits_by", "")}
    if survey.get("ignore_share"):
        facts["Ignored"] = f"{percent(survey['ignore_share'])} of all pixels"
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
        findings=[_finding(finding, shots) for finding, shots in zip(survey["findings"], evidence or repeat(()), strict=False)],
        gallery=[photo(caption, picture) for caption, picture in pictures],
    )


def _finding(finding: Mapping[str, Any], pictures: Sequence[tuple[str, Picture]]) -> dict[str, Any]:
    files = [str(name) for name in finding["files"]]
    shots = [photo(caption, picture) for caption, picture in pictures]
    return {**finding, "files": files[:_MOST_FILES], "more": max(0, len(files) - _MOST_FILES), "count": len(files), "shots": shots}


def _counted(content: Any) -> str:
    """``{"800x600": 204}`` -> ``"800x600 (204)"``; anything else as it is."""
    return ", ".join(f"{key or 'not decided'} ({value})" for key, value in content.items()) if isinstance(content, Mapping) else str(content)
