"""A template and its content -> one HTML page that needs nothing else: pictures lie inside it.

The pages stand in ``templates/`` beside this file.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from useg.classes import IGNORE, Label
from useg.data.dataset import Dataset, read_sample
from useg.files import replacing
from useg.images.files import Sample
from useg.pictures import WRONG_COLOR, Picture, to_picture
from useg.reporting.text import GalleryImage, image_names, listed, number, percent, sentence, span
from useg.scoring.metrics import class_ious
from useg.scoring.uncertainty import Calibration

if TYPE_CHECKING:
    from jinja2 import Environment

    from useg.inference.predictor import Predictor
    from useg.reporting.evaluate import CountSettings, Evaluation, ImageScore

_TEMPLATES = Path(__file__).parent / "templates"


_LONGEST_SIDE = 1024  # of a picture in a page: enough when enlarged, small enough to mail


@dataclass(frozen=True)
class Shot:
    """A picture as a page holds it: ``source`` is a ``data:`` address; ``small`` label maps are shown with square pixels."""

    caption: str
    source: str
    width: int
    height: int
    small: bool = False


def photo(caption: str, picture: Picture) -> Shot:
    """Put a photograph ``(H, W, 3)`` into a page, as JPEG."""
    sheet = _reduced(Pillow.fromarray(picture), Pillow.Resampling.BOX)
    return Shot(caption, data_url(jpeg(sheet, 88), "jpeg"), *sheet.size)


def flat(caption: str, ids: NDArray[np.uint8], colors: NDArray[np.uint8]) -> Shot:
    """Put a map of ids ``(H, W)`` into a page in the exact ``colors`` ``(256, 3)``, as PNG."""
    sheet = _reduced(Pillow.fromarray(ids), Pillow.Resampling.NEAREST)
    sheet.putpalette(colors.tobytes())
    target = io.BytesIO()
    sheet.save(target, "PNG", optimize=True)
    return Shot(
        caption, data_url(target.getvalue(), "png"), *sheet.size, small=max(sheet.size) < 640
    )


def jpeg(sheet: Pillow.Image, quality: int) -> bytes:
    """Encode a picture."""
    target = io.BytesIO()
    sheet.save(target, "JPEG", quality=quality, optimize=True)
    return target.getvalue()


def data_url(content: bytes, kind: str) -> str:
    """Return the ``data:`` address that is a picture of the kind ``"jpeg"`` or ``"png"``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _reduced(sheet: Pillow.Image, how: Pillow.Resampling) -> Pillow.Image:
    """Reduce a large picture; the ids of a map must not be mixed."""
    factor = _LONGEST_SIDE / max(sheet.size)
    return (
        sheet.resize(
            (max(1, round(sheet.width * factor)), max(1, round(sheet.height * factor))), how
        )
        if factor < 1
        else sheet
    )


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template and write the page; it appears whole or not at all.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    page = _environment().get_template(template).render(content)
    with replacing(path) as temporary:
        temporary.write_text(page, "utf-8")


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: percent(share).replace(" ", "\u00a0")
    environment.filters["number"] = number
    environment.filters |= {"sentence": sentence, "span": span}
    environment.filters["rgb"] = lambda color: f"rgb({color[0]},{color[1]},{color[2]})"
    environment.filters["at"] = lambda share: f"{100 * min(max(share, 0), 1):.2f}%"
    return environment


MOST_GALLERY = 12  # cases of a page


THUMBNAIL = 160  # pixels: the longest side of a small picture


def image_ious(image: ImageScore) -> tuple[float, ...]:
    """Return the IoU of each class in one image, ``nan`` where it is not in the truth."""
    return tuple(class_ious(image.tally).tolist())


def choose_gallery(evaluation: Evaluation, most: int = MOST_GALLERY) -> list[tuple[str, int]]:
    """Choose images to show: best, median and worst, for each class the one with most errors in it, and further weak ones while there is room.

    Args:
        evaluation: of any number of images.
        most: how many to show.

    Returns:
        (reason, index into ``evaluation.images``), best first; each image once.
    """
    images = evaluation.images
    ranked = sorted(
        (k for k, image in enumerate(images) if not math.isnan(image.mean_iou)),
        key=lambda k: -images[k].mean_iou,
    )
    if not ranked:
        return []
    ranks = {ranked[len(ranked) // 2]: "median", ranked[-1]: "worst", ranked[0]: "best"}
    classes: dict[int, list[str]] = {k: [] for k in ranks}
    for name, k in [*_worst_of_classes(evaluation), *(("", k) for k in ranked[:0:-1])]:
        if k in classes or len(classes) < most:
            classes.setdefault(k, []).extend([name] if name else [])
    words = {
        k: (ranks.get(k, ""), f"worst in {listed(names)}" if names else "")
        for k, names in classes.items()
    }
    return [("; ".join(filter(None, words[k])), k) for k in ranked if k in classes]


def _worst_of_classes(evaluation: Evaluation) -> list[tuple[str, int]]:
    """The name of each class, the worst first, and the image with most of its pixels missed or wrongly called so."""
    hits, truth, predicted = np.moveaxis(evaluation.tallies, 1, 0)
    errors = truth + predicted - 2 * hits
    classes = sorted(
        (entry for entry in evaluation.scores.classes if entry.pixels), key=lambda entry: entry.iou
    )
    return [
        (entry.name, int(errors[:, entry.id].argmax()))
        for entry in classes
        if errors.size and errors[:, entry.id].any()
    ]


def read_cases(
    chosen: Sequence[tuple[str, int]],
    evaluation: Evaluation,
    predictor: Predictor,
    dataset: Dataset,
    asked: CountSettings,
) -> list[GalleryImage]:
    """Read and predict the chosen images again.

    Raises:
        UsageError: a file that cannot be read any more.
    """
    from useg.reporting.evaluate import judged

    cases, names = [], image_names(evaluation)
    for reason, k in chosen:
        image = evaluation.images[k]
        sample = judged(read_sample(image.pair, dataset), asked, str(image.pair.mask))
        prediction = predictor(sample.image, asked.tile)
        cases.append(
            GalleryImage(
                reason,
                names[k],
                image.mean_iou,
                image_ious(image),
                sample.image,
                sample.label,
                prediction,
            )
        )
    return cases


def thumbnail(sample: Sample, prediction: Label) -> bytes:
    """Draw an image small, its wrong pixels in the colour of errors: JPEG of a few kilobytes."""
    picture, wrong = (
        to_picture(sample.image),
        (prediction != sample.label) & (sample.label != IGNORE),
    )
    height, width = sample.label.shape
    factor = min(1.0, THUMBNAIL / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small, errors = (
        Pillow.fromarray(part).resize(size, Pillow.Resampling.BOX)
        for part in (picture, np.uint8(200) * wrong)
    )
    small.paste(WRONG_COLOR, mask=errors)
    return jpeg(small, 62)


def keep(thumbnails: list[bytes]) -> Callable[[Sample, Label], None]:
    """Return what draws each image that an evaluation sees, and appends it."""
    return lambda sample, prediction: thumbnails.append(thumbnail(sample, prediction))


_SIDE, _LEFT, _TOP = 240, 44, 8  # of the square that the reliability curve lies in


_LEAST = 0.0005  # share of the pixels: a dot of fewer says nothing


_FIELD = 20  # side of a field of the map of errors


def reliability_svg(calibration: Calibration) -> str:
    """Draw the share that is right over confidence: on the diagonal, probabilities mean what they say. Large dots hold many pixels."""

    def place(confidence: float, accuracy: float) -> tuple[float, float]:
        return round(_LEFT + _SIDE * confidence, 1), round(_TOP + _SIDE * (1 - accuracy), 1)

    curve = [bin_ for bin_ in calibration.curve if bin_.share >= _LEAST]
    points = [place(bin_.confidence, bin_.accuracy) for bin_ in curve]
    dots = [
        f'<circle cx="{x}" cy="{y}" r="{2.5 + 9 * math.sqrt(bin_.share):.1f}"><title>{percent(bin_.accuracy)} right at {percent(bin_.confidence)} '
        f"confidence, {percent(bin_.share)} of the pixels</title></circle>"
        for (x, y), bin_ in zip(points, curve, strict=True)
    ]
    grid = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), text = place(share, share), f"{100 * share:.0f}"
        grid.append(
            f'<path class="grid" d="M{_LEFT} {y}h{_SIDE}"/><text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{text}</text>'
        )
        grid.append(f'<text x="{x}" y="{_TOP + _SIDE + 18}" text-anchor="middle">{text}</text>')
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    line = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<svg class="chart" viewBox="0 0 {_LEFT + _SIDE + 14} {_TOP + _SIDE + 42}" role="img" aria-label="Reliability curve">{"".join(grid)}'
        f'<path class="ideal" d="M{x0} {y0}L{x1} {y1}"/><polyline class="line" points="{line}"/><g class="dots">{"".join(dots)}</g>'
        f'<text x="{_LEFT + _SIDE / 2}" y="{_TOP + _SIDE + 38}" text-anchor="middle">confidence, %</text>'
        f'<text transform="translate(11 {_TOP + _SIDE / 2}) rotate(-90)" text-anchor="middle">right, %</text></svg>'
    )


def places_svg(rates: NDArray[np.float64]) -> str:
    """Draw the share of wrong pixels ``(R, C)`` as a map of fields, the stronger the more; fields without a judged pixel (``nan``) stay empty."""
    highest = max(float(np.nanmax(rates, initial=0)), 1e-9)
    rows, columns = rates.shape
    fields = [
        f'<rect x="{_FIELD * column}" y="{_FIELD * row}" width="{_FIELD - 1}" height="{_FIELD - 1}" rx="2" '
        f'style="--share:{rate / highest:.2f}"><title>{percent(float(rate))} wrong</title></rect>'
        for (row, column), rate in np.ndenumerate(rates)
        if not math.isnan(rate)
    ]
    label = "Share of wrong pixels by place in the picture"
    return f'<svg class="chart places" viewBox="0 0 {_FIELD * columns - 1} {_FIELD * rows - 1}" role="img" aria-label="{label}">{"".join(fields)}</svg>'
