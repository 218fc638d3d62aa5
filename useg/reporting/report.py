"""Scores, pictures and a log -> one HTML page that needs nothing else: the report of an evaluation, the survey of a data set.

The pages stand in ``templates/`` beside this file; here their content is put into words and numbers.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from useg.classes import ClassTable, Label
from useg.files import replacing
from useg.pictures import IGNORED, RIGHT, WRONG, Picture, curves_svg, difference, painted, shares, to_picture
from useg.scoring.metrics import Confusion, Scores

if TYPE_CHECKING:
    from jinja2 import Environment

    from useg.reporting.evaluate import Evaluation, ImageScore  # torch comes with it, and a page needs none

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_SIDE = 1024  # of a picture in a page: enough when enlarged, small enough to mail
_LARGEST_MATRIX = 24  # classes; a larger confusion matrix is no longer read by eye
_MOST_TICKS = 300
_MOST_FILES = 6


@dataclass(frozen=True)
class Showcase:
    """One image of the gallery: ``rank`` is ``"best"``, ``"median"`` or ``"worst"``; ``label`` and ``prediction`` are ``(H, W)``."""

    rank: str
    name: str
    mean_iou: float
    image: NDArray[Any]
    label: Label
    prediction: Label


@dataclass(frozen=True)
class Command:
    """A command line to copy, and what it does in one sentence."""

    text: str
    does: str


@dataclass(frozen=True)
class _Shot:
    """A picture as a page holds it: ``source`` is a ``data:`` address; ``small`` label maps are shown with square pixels."""

    caption: str
    source: str
    width: int
    height: int
    small: bool


def write_report(
    path: Path,
    *,
    title: str,
    evaluation: Evaluation,
    table: ClassTable,
    showcases: Sequence[Showcase],
    log: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] = {},
    warnings: Sequence[str] = (),
    commands: Sequence[Command] = (),
) -> None:
    """Write the page of an evaluation: scores, worst confusions, gallery, curves, and how to repeat it.

    Args:
        path: the ``.html`` file; it appears whole or not at all.
        title: the page's heading.
        evaluation: what was measured, on what.
        table: names and colours of the classes.
        showcases: images for the gallery, in the order in which they are shown.
        log: rows of ``log.jsonl`` for the training curves, or none.
        facts: settings, seed, machine, versions: whatever a reader needs to repeat the numbers.
        warnings: sentences that a reader must see before the numbers.
        commands: the exact command lines.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    from markupsafe import Markup

    scores = evaluation.scores
    seen = set[int]().union(*(shares(part, table) for case in showcases for part in (case.label, case.prediction)))
    _write(
        path,
        "report.html",
        title=title,
        kind="evaluation",
        scores=scores,
        measured=_measured(evaluation),
        model=evaluation.model,
        warnings=warnings,
        # Only numbers of the log enter these drawings, so they are safe to embed as they are.
        curves=[Markup(sheet) for sheet in curves_svg(log)] if log else [],
        rows=_class_rows(scores, table),
        confusions=worst_confusions(evaluation.counts, table.names),
        matrix=_matrix(evaluation.counts, table),
        spread=_spread(evaluation.images),
        gallery=[(case, _shots(case, table)) for case in showcases],
        legend=[(table.colors[k], table.names[k]) for k in sorted(seen)],
        verdicts=[(RIGHT, "right"), (WRONG, "wrong"), (IGNORED, "ignored")],
        facts=facts,
        commands=commands,
    )


def write_survey(
    path: Path,
    survey: Mapping[str, Any],
    pictures: Sequence[tuple[str, Picture]],
    evidence: Sequence[Sequence[tuple[str, Picture]]] = (),
) -> None:
    """Write the page of a data set: what is wrong with it, what is in it, and a look at some of it.

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
    _write(
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
        gallery=[_shot(caption, picture, photo=True) for caption, picture in pictures],
    )


def worst_confusions(counts: Confusion, names: Sequence[str], most: int = 3) -> list[str]:
    """Put the worst confusions into words: those that take the largest share of their true class, as the mean IoU weighs them.

    >>> worst_confusions(np.array([[82, 18], [0, 9]]), ("Poles", "Buildings"))
    ['18 % of Poles pixels are called Buildings']
    """
    wrong = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(wrong, 0)
    # Of equal shares, the one with more pixels first.
    order = sorted(zip(*np.nonzero(wrong), strict=True), key=lambda pair: (-wrong[pair], -counts[pair]))
    return [f"{percent(float(wrong[k, j]), brief=True)} of {names[k]} pixels are called {names[j]}" for k, j in order[:most]]


def percent(share: float, brief: bool = False) -> str:
    """Spell a share 0..1: ``74.3 %``, or briefly ``74 %``; what is absent (``nan``) is a dash, what is tiny is not called 0.

    >>> percent(0.7432), percent(0.7432, brief=True), percent(0.0002), percent(float("nan"))
    ('74.3 %', '74 %', 'less than 0.1 %', '–')
    """
    if math.isnan(share):
        return "–"  # noqa: RUF001
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.{0 if brief and share >= 0.0995 else 1}f} %"


def _measured(evaluation: Evaluation) -> str:
    count = evaluation.scores.num_images
    part = "" if evaluation.split == "all" else f" in the split “{evaluation.split}”"
    return f"{count:,} image{'s' * (count != 1)}{part} of {evaluation.dataset}"


def _class_rows(scores: Scores, table: ClassTable) -> list[dict[str, Any]]:
    total = sum(entry.pixels for entry in scores.classes)
    return [{"score": entry, "color": table.colors[entry.id], "share": entry.pixels / total} for entry in scores.classes if entry.pixels]


def _matrix(counts: Confusion, table: ClassTable) -> dict[str, Any] | None:
    """The confusion matrix as shares of each true class, without classes that neither occur nor are predicted."""
    used = np.flatnonzero(counts.sum(0) + counts.sum(1))
    if not 1 < len(used) <= _LARGEST_MATRIX:
        return None
    part = counts[np.ix_(used, used)]
    shown = part / np.maximum(part.sum(1, keepdims=True), 1)
    kept = [k for k, row in enumerate(part) if row.sum()]
    names = [table.names[k] for k in used]
    return {"names": names, "rows": [(names[k], k, shown[k].tolist()) for k in kept]}


def _spread(images: Sequence[ImageScore]) -> dict[str, Any] | None:
    """How the single images did: tick positions 0..1, the middle half in words, and the weakest by name."""
    ranked = sorted((image for image in images if not math.isnan(image.mean_iou)), key=lambda image: image.mean_iou)
    if len(ranked) < 2:
        return None
    values = np.array([image.mean_iou for image in ranked])
    low, middle, high = (float(v) for v in np.quantile(values, (0.25, 0.5, 0.75)))
    ticks = values if len(values) <= _MOST_TICKS else np.quantile(values, np.linspace(0, 1, _MOST_TICKS))
    return {"low": low, "middle": middle, "high": high, "ticks": ticks.tolist(), "weakest": ranked[:5]}


def _shots(case: Showcase, table: ClassTable) -> list[_Shot]:
    return [
        _shot("image", to_picture(case.image), photo=True),
        _shot("truth", painted(case.label, table), photo=False),
        _shot("prediction", painted(case.prediction, table), photo=False),
        _shot("difference", difference(case.prediction, case.label), photo=False),
    ]


def _shot(caption: str, picture: Picture, *, photo: bool) -> _Shot:
    """Encode a picture into the page; label maps are reduced without mixing colours and stored without loss."""
    sheet = Pillow.fromarray(picture)
    factor = _LONGEST_SIDE / max(sheet.size)
    if factor < 1:
        size = (max(1, round(sheet.width * factor)), max(1, round(sheet.height * factor)))
        sheet = sheet.resize(size, Pillow.Resampling.BOX if photo else Pillow.Resampling.NEAREST)
    target = io.BytesIO()
    if photo:
        sheet.save(target, "JPEG", quality=90, subsampling=0)
    else:
        sheet.save(target, "PNG", optimize=True)
    data = base64.b64encode(target.getvalue()).decode()
    return _Shot(
        caption, f"data:image/{'jpeg' if photo else 'png'};base64,{data}", sheet.width, sheet.height, small=not photo and max(sheet.size) < 640
    )


def _finding(finding: Mapping[str, Any], pictures: Sequence[tuple[str, Picture]]) -> dict[str, Any]:
    files = [str(name) for name in finding["files"]]
    shots = [_shot(caption, picture, photo=True) for caption, picture in pictures]
    return {**finding, "files": files[:_MOST_FILES], "more": max(0, len(files) - _MOST_FILES), "count": len(files), "shots": shots}


def _counted(content: Any) -> str:
    """``{"800x600": 204}`` -> ``"800x600 (204)"``; anything else as it is."""
    return ", ".join(f"{key or 'not decided'} ({value})" for key, value in content.items()) if isinstance(content, Mapping) else str(content)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: percent(share).replace(" ", "\u00a0")
    environment.filters["number"] = lambda share: "–" if math.isnan(share) else f"{100 * share:.1f}"  # noqa: RUF001
    environment.filters["rgb"] = lambda color: f"rgb({color[0]},{color[1]},{color[2]})"
    return environment


def _write(path: Path, template: str, **content: Any) -> None:
    page = _environment().get_template(template).render(content)
    with replacing(path) as temporary:
        temporary.write_text(page, "utf-8")
