"""Build the parts of an HTML page: embedded pictures, thumbnails, charts, and the filled template.

A page is one file: pictures are ``data:`` URLs, and charts are inline SVG in the colours and the
font of the page. The templates are in ``templates/`` beside this file.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from useg.classes import IGNORE, Label
from useg.data.dataset import Dataset, read_sample
from useg.errors import MAX_NAMES, SettingsError, join_names
from useg.files import clear_drafts, replacing
from useg.images.image_files import Sample
from useg.ownership import is_own_markdown, is_own_page, refuse_foreign_files, stamp
from useg.parsing import printable
from useg.reporting.text import (
    GalleryImage,
    format_interval,
    format_percent,
    format_percent_number,
    image_names,
    to_sentence,
)
from useg.scoring.metrics import class_ious
from useg.scoring.uncertainty import Calibration
from useg.visualization import WRONG_COLOR, Picture, to_picture

if TYPE_CHECKING:
    from jinja2 import Environment

    from useg.inference.predictor import Predictor
    from useg.reporting.evaluate import CountSettings
    from useg.reporting.evaluation_result import Evaluation, ImageScore

MAX_GALLERY_IMAGES = 12

# The longest side of a thumbnail.
THUMBNAIL_PIXELS = 160

_TEMPLATES = Path(__file__).parent / "templates"

# The longest side of an embedded picture: sharp when enlarged, small enough for an email.
_MAX_PICTURE_PIXELS = 1024

_PHOTO_JPEG_QUALITY = 88
_THUMBNAIL_JPEG_QUALITY = 62

# Opacity, 0 to 255, of the colour that marks wrong pixels in a thumbnail.
_WRONG_ALPHA = 200

# Side and margins of the reliability curve, in SVG units.
_CURVE_SIDE, _CURVE_LEFT, _CURVE_TOP = 240, 44, 8

# Bins with a smaller share of the pixels are left out of the reliability curve.
_MIN_BIN_SHARE = 0.0005

# Side of a cell of the error map, in SVG units.
_CELL_SIDE = 20


@dataclass(frozen=True)
class EmbeddedPicture:
    """An image inside a page.

    Args:
        caption: the text below it.
        source: its ``data:`` URL.
        width, height: its size in pixels.
        small: whether the page enlarges it with square pixels, as it does for small label maps.
    """

    caption: str
    source: str
    width: int
    height: int
    small: bool = False


def embed_photo(caption: str, picture: Picture) -> EmbeddedPicture:
    """Embed a photograph ``(H, W, 3)`` as JPEG."""
    sheet = _shrink(Pillow.fromarray(picture), Pillow.Resampling.BOX)
    source = data_url(encode_jpeg(sheet, _PHOTO_JPEG_QUALITY), "jpeg")
    return EmbeddedPicture(caption, source, *sheet.size)


def embed_class_map(
    caption: str, ids: NDArray[np.uint8], colors: NDArray[np.uint8]
) -> EmbeddedPicture:
    """Embed a map of ids ``(H, W)`` in the exact ``colors`` ``(256, 3)``, as PNG."""
    sheet = _shrink(Pillow.fromarray(ids), Pillow.Resampling.NEAREST)
    sheet.putpalette(colors.tobytes())
    target = io.BytesIO()
    sheet.save(target, "PNG", optimize=True)
    source = data_url(target.getvalue(), "png")
    return EmbeddedPicture(caption, source, *sheet.size, small=max(sheet.size) < 640)


def encode_jpeg(sheet: Pillow.Image, quality: int) -> bytes:
    """Encode a picture as JPEG."""
    target = io.BytesIO()
    sheet.save(target, "JPEG", quality=quality, optimize=True)
    return target.getvalue()


def data_url(content: bytes, kind: str) -> str:
    """Return the ``data:`` URL of an encoded picture; ``kind`` is ``"jpeg"`` or ``"png"``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _shrink(sheet: Pillow.Image, resampling: Pillow.Resampling) -> Pillow.Image:
    """Shrink a large picture to ``_MAX_PICTURE_PIXELS``."""
    factor = _MAX_PICTURE_PIXELS / max(sheet.size)
    if factor >= 1:
        return sheet
    size = (max(1, round(sheet.width * factor)), max(1, round(sheet.height * factor)))
    return sheet.resize(size, resampling)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template and write the page. The file is replaced as a whole, or not at all.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    page = _environment().get_template(template).render(content)
    with replacing(path, is_own_page) as draft:
        draft.write_text(stamp(f"{printable(page)}\n"), "utf-8")


def markdown_path(path: Path) -> Path:
    """Return the path of the Markdown file beside a page, and check that both can be written.

    Raises:
        DataError: useg did not write the file that is there.
        SettingsError: the page itself has that name, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise SettingsError(
            f"'{path}' cannot be written, because the folder '{path.parent}' does not exist; "
            "create it or choose another folder"
        )
    beside = path.with_suffix(".md")
    if beside == path:
        raise SettingsError(
            f"the page cannot be written to '{path}', because its Markdown gets that name; give a "
            "name that ends in .html"
        )
    refuse_foreign_files(
        [(path, is_own_page), (beside, is_own_markdown)], "choose another name for the page"
    )
    clear_drafts(path.absolute().parent)
    return beside


def escape_markdown(text: str) -> str:
    """Return text on one line, with the special characters of Markdown escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def format_markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, all others to the right."""
    alignment = [":--", *("--:" for _ in headings[1:])]
    lines = [headings, alignment, *([escape_markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: format_percent(share).replace(" ", "\u00a0"),
        "number": format_percent_number,
        "interval": format_interval,
        "sentence": to_sentence,
        "rgb": lambda color: f"rgb({color[0]},{color[1]},{color[2]})",
        "at": lambda share: f"{100 * min(max(share, 0), 1):.2f}%",
    }
    return environment


def image_ious(image: ImageScore) -> tuple[float, ...]:
    """Return the IoU of each class in one image; ``nan`` where the class has no true pixel."""
    return tuple(class_ious(image.tally).tolist())


def choose_gallery(evaluation: Evaluation, most: int = MAX_GALLERY_IMAGES) -> list[tuple[str, int]]:
    """Choose the images of the gallery.

    These are the images with the highest, the median and the lowest mean IoU, and for each class
    the image with most errors in it. Images with a low mean IoU fill the remaining places.

    Args:
        evaluation: an evaluation of any number of images.
        most: the number of images to choose.

    Returns:
        (reason, index into ``evaluation.images``), highest mean IoU first, each image once.
    """
    images = evaluation.images
    order = sorted(
        (k for k, image in enumerate(images) if not math.isnan(image.mean_iou)),
        key=lambda k: -images[k].mean_iou,
    )
    if not order:
        return []
    positions = {order[len(order) // 2]: "median", order[-1]: "worst", order[0]: "best"}
    classes: dict[int, list[str]] = {k: [] for k in positions}
    lowest_first = [("", k) for k in order[:0:-1]]
    for name, k in [*_worst_image_of_classes(evaluation), *lowest_first]:
        if k in classes or len(classes) < most:
            classes.setdefault(k, []).extend([name] if name else [])
    chosen = []
    for k in order:
        if k in classes:
            worst_in = f"worst in {join_names(classes[k], MAX_NAMES)}" if classes[k] else ""
            chosen.append(("; ".join(filter(None, (positions.get(k, ""), worst_in))), k))
    return chosen


def _worst_image_of_classes(evaluation: Evaluation) -> list[tuple[str, int]]:
    """Return for each class, lowest IoU first, its name and the image with most wrong pixels."""
    correct, truth, predicted = np.moveaxis(evaluation.tallies, 1, 0)
    errors = truth + predicted - 2 * correct
    classes = sorted(
        (entry for entry in evaluation.scores.classes if entry.pixels), key=lambda entry: entry.iou
    )
    return [
        (entry.name, int(errors[:, entry.id].argmax()))
        for entry in classes
        if errors.size and errors[:, entry.id].any()
    ]


def read_gallery(
    chosen: Sequence[tuple[str, int]],
    evaluation: Evaluation,
    predictor: Predictor,
    dataset: Dataset,
    settings: CountSettings,
) -> list[GalleryImage]:
    """Read the chosen images and predict them again.

    Raises:
        UsageError: a file can no longer be read.
    """
    from useg.reporting.evaluate import apply_ignore_mask

    gallery, names = [], image_names(evaluation)
    for reason, k in chosen:
        score = evaluation.images[k]
        sample = read_sample(score.pair, dataset)
        sample = apply_ignore_mask(sample, settings, str(score.pair.mask))
        gallery.append(
            GalleryImage(
                reason=reason,
                name=names[k],
                mean_iou=score.mean_iou,
                ious=image_ious(score),
                image=sample.image,
                label=sample.label,
                prediction=predictor(sample.image, settings.tile),
            )
        )
    return gallery


def make_thumbnail(sample: Sample, prediction: Label) -> bytes:
    """Return a small JPEG of an image, with its wrong pixels marked."""
    wrong = (prediction != sample.label) & (sample.label != IGNORE)
    height, width = sample.label.shape
    factor = min(1.0, THUMBNAIL_PIXELS / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small, alpha = (
        Pillow.fromarray(part).resize(size, Pillow.Resampling.BOX)
        for part in (to_picture(sample.image), np.uint8(_WRONG_ALPHA) * wrong)
    )
    small.paste(WRONG_COLOR, mask=alpha)
    return encode_jpeg(small, _THUMBNAIL_JPEG_QUALITY)


def collect_thumbnails(thumbnails: list[bytes]) -> Callable[[Sample, Label], None]:
    """Return a callback for an evaluation that appends a thumbnail of each image to the list."""
    return lambda sample, prediction: thumbnails.append(make_thumbnail(sample, prediction))


def reliability_curve_svg(calibration: Calibration) -> str:
    """Draw accuracy over confidence. The area of a dot grows with the number of its pixels."""

    def position(confidence: float, accuracy: float) -> tuple[float, float]:
        x, y = _CURVE_LEFT + _CURVE_SIDE * confidence, _CURVE_TOP + _CURVE_SIDE * (1 - accuracy)
        return round(x, 1), round(y, 1)

    dots, points = [], []
    for bin_ in calibration.curve:
        if bin_.share < _MIN_BIN_SHARE:
            continue
        x, y = position(bin_.confidence, bin_.accuracy)
        points.append(f"{x},{y}")
        dots.append(
            f'<circle cx="{x}" cy="{y}" r="{2.5 + 9 * math.sqrt(bin_.share):.1f}"><title>'
            f"{format_percent(bin_.accuracy)} correct at a confidence of "
            f"{format_percent(bin_.confidence)}, {format_percent(bin_.share)} of the pixels"
            "</title></circle>"
        )
    grid = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), tick = position(share, share), f"{100 * share:.0f}"
        grid.append(
            f'<path class="grid" d="M{_CURVE_LEFT} {y}h{_CURVE_SIDE}"/>'
            f'<text x="{_CURVE_LEFT - 8}" y="{y + 4}" text-anchor="end">{tick}</text>'
            f'<text x="{x}" y="{_CURVE_TOP + _CURVE_SIDE + 18}" text-anchor="middle">{tick}</text>'
        )
    (x0, y0), (x1, y1) = position(0, 0), position(1, 1)
    width, height = _CURVE_LEFT + _CURVE_SIDE + 14, _CURVE_TOP + _CURVE_SIDE + 42
    middle_x, middle_y = _CURVE_LEFT + _CURVE_SIDE / 2, _CURVE_TOP + _CURVE_SIDE / 2
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="Reliability curve">{"".join(grid)}'
        f'<path class="ideal" d="M{x0} {y0}L{x1} {y1}"/>'
        f'<polyline class="line" points="{" ".join(points)}"/>'
        f'<g class="dots">{"".join(dots)}</g>'
        f'<text x="{middle_x}" y="{height - 4}" text-anchor="middle">confidence, %</text>'
        f'<text transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">'
        "correct, %</text></svg>"
    )


def error_map_svg(rates: NDArray[np.float64]) -> str:
    """Draw the share of wrong pixels in each cell of a grid, stronger where it is higher.

    Args:
        rates: ``(R, C)`` shares; cells that are ``nan`` stay empty.
    """
    highest = max(float(np.nanmax(rates, initial=0)), 1e-9)
    rows, columns = rates.shape
    cells = [
        f'<rect x="{_CELL_SIDE * column}" y="{_CELL_SIDE * row}"'
        f' width="{_CELL_SIDE - 1}" height="{_CELL_SIDE - 1}" rx="2"'
        f' style="--share:{rate / highest:.2f}">'
        f"<title>{format_percent(float(rate))} wrong</title></rect>"
        for (row, column), rate in np.ndenumerate(rates)
        if not math.isnan(rate)
    ]
    width, height = _CELL_SIDE * columns - 1, _CELL_SIDE * rows - 1
    return (
        f'<svg class="chart places" viewBox="0 0 {width} {height}"'
        ' role="img" aria-label="Share of wrong pixels by position in the image">'
        f"{''.join(cells)}</svg>"
    )
