"""Draw pictures for people: overlays, legends, error maps, pictures side by side, training curves.

Training, evaluation, the service and the reports all draw with these functions, so a class looks
the same everywhere.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from useg.classes import IGNORE, ClassTable, Color, Label, count_pixels, palette
from useg.ownership import mark_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.ImageFont import FreeTypeFont

Picture = NDArray[np.uint8]  # (H, W, 3)

# Rows of a run's log.jsonl.
TrainingLog = Sequence[Mapping[str, Any]]

# Colours of `draw_difference`. Their lightness differs so much that every kind of colour vision,
# and a grey print, distinguishes them.
CORRECT_COLOR: Color = (27, 31, 39)
WRONG_COLOR: Color = (255, 176, 0)
IGNORED_COLOR: Color = (126, 131, 140)

# Colours of canvas and text.
_BACKGROUND_COLOR: Color = (255, 255, 255)
_TEXT_COLOR: Color = (32, 36, 42)
_SECONDARY_COLOR: Color = (98, 105, 116)

# Colours of curves; both hues are legible on white and on near-black.
_AXIS_COLOR, _LOSS_COLOR, _SCORE_COLOR = "#3b424c", "#3f7be8", "#d9660a"

# A class colour counts as black if no channel is brighter.
_MAX_BLACK = 24

# Longer class names are shortened in legends.
_MAX_NAME_LENGTH = 26

# A smaller picture is enlarged before text is set beside it.
_MIN_LEGEND_SIDE_PIXELS = 384

# Rows of a picture that are blended at a time, so that they stay in the processor's cache.
_ROWS_AT_ONCE = 128

# A loss has a logarithmic axis if its largest value is more than this many times its smallest.
_MIN_LOG_SCALE_RATIO = 5

# The axis of the mean IoU covers at least this range, so that noise does not look like a trend.
_MIN_SCORE_RANGE = 0.05

# Points of a curve: more than a screen shows, and few enough for an inline SVG.
_MAX_CURVE_POINTS = 1200

# Runs with more steps get a smoothed curve of the loss.
_MAX_UNSMOOTHED_STEPS = 40


def to_picture(image: NDArray[Any]) -> Picture:
    """Convert an image of any kind to RGB.

    Args:
        image: ``(H, W, C)`` or ``(H, W)`` uint8, uint16 or float32 with 1..N bands.

    Returns:
        ``(H, W, 3)`` uint8. One or two bands: the first as grey; more: the first three. Other types
        than uint8 are stretched between their 1st and 99th percentile, all bands alike; NaN and
        infinite pixels are black. The result may share memory with ``image``.

    >>> to_picture(np.full((2, 3, 7), 9, np.uint8)).shape
    (2, 3, 3)
    """
    bands = image[..., None] if image.ndim == 2 else image
    bands = bands[..., :3] if bands.shape[2] >= 3 else np.repeat(bands[..., :1], 3, axis=2)
    return np.ascontiguousarray(bands if bands.dtype == np.uint8 else _stretch(bands))


def _stretch(bands: NDArray[Any]) -> Picture:
    # A million pixels determine a percentile well enough.
    step = max(1, math.isqrt(bands.shape[0] * bands.shape[1] // 1_000_000))
    sample = bands[::step, ::step].astype(np.float32)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return np.zeros(bands.shape, np.uint8)
    low, high = (float(value) for value in np.percentile(sample, (1, 99)))
    if high <= low:
        # Nearly all pixels have one value: let the few others decide.
        low = float(sample.min())
        high = max(float(sample.max()), low + 1e-6)
    values = (bands.astype(np.float32) - low) * (255 / (high - low))
    finite = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
    stretched: Picture = np.rint(np.clip(finite, 0, 255)).astype(np.uint8)
    return stretched


def overlay(image: NDArray[Any], label: Label, table: ClassTable, opacity: float = 0.5) -> Picture:
    """Blend class colours with an image, more strongly along the edges between classes.

    A class whose colour is black is not painted: a black tint would only darken the image, and
    would make a dark grey class (CARLA's Buildings) look unlabelled (CARLA's None).

    Args:
        image: as for :func:`to_picture`.
        label: class ids ``(H, W)``; ``IGNORE`` and ids outside the table leave the image as it is.
        table: the classes.
        opacity: 0 returns the image, 1 the bare class colours.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    picture = to_picture(image)
    assert picture.shape[:2] == label.shape, (picture.shape, label.shape)
    # In 256ths, so that a product with a pixel fits 16 bits: first inside, then along edges.
    weights = np.zeros((2, 256), np.uint16)
    weights[:, : len(table)] = [[round(256 * opacity)], [round(256 * (1 - (1 - opacity) ** 2))]]
    weights[:, [k for k, color in enumerate(table.colors) if is_black(color)]] = 0
    image_weights = (256 - weights).reshape(-1)
    # Adding 128 rounds to the nearest.
    paints = (weights[..., None] * palette(table).astype(np.uint16) + 128).reshape(-1, 3)
    index = label + 256 * _class_borders(label).astype(np.uint16)
    blended = np.empty_like(picture)
    for top in range(0, len(label), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        image_part = picture[rows] * image_weights.take(index[rows])[..., None]
        blended[rows] = (image_part + paints.take(index[rows], 0)) >> 8
    return blended


def is_black(color: Color) -> bool:
    """Whether a class colour is too dark to tint an image visibly.

    >>> is_black((0, 0, 0)), is_black((70, 70, 70)), is_black((0, 0, 255))
    (True, False, False)
    """
    return max(color) <= _MAX_BLACK


def _class_borders(label: Label) -> NDArray[np.bool_]:
    """Return which pixels have a right or lower neighbour of another class."""
    edge = np.zeros(label.shape, bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    return edge


def paint_label(label: Label, table: ClassTable) -> Picture:
    """Paint a label map in the exact class colours; ``IGNORE`` and unknown ids are grey.

    :func:`useg.classes.to_color` writes files in the colours of the data set instead. There,
    ignored pixels can have the colour of a class.
    """
    colors = palette(table)
    colors[len(table) :] = IGNORED_COLOR
    return colors[label]


def draw_difference(prediction: Label, label: Label) -> Picture:
    """Show where a prediction is correct (dark), wrong (vivid) or ignored (grey).

    >>> picture = draw_difference(np.uint8([[1, 2, 3]]), np.uint8([[1, 1, 255]]))
    >>> picture[0].tolist() == [list(CORRECT_COLOR), list(WRONG_COLOR), list(IGNORED_COLOR)]
    True
    """
    assert prediction.shape == label.shape, (prediction.shape, label.shape)
    colors = np.array((CORRECT_COLOR, WRONG_COLOR, IGNORED_COLOR), np.uint8)
    return colors[np.where(label == IGNORE, 2, prediction != label)]


def label_shares(label: Label, table: ClassTable) -> dict[int, float]:
    """Return the share, 0 to 1, of each class in a label map, largest first.

    Pixels outside the class table do not count.

    >>> label_shares(np.uint8([[1, 1], [0, 255]]), ClassTable(("sky", "road", "car")))
    {1: 0.6666666666666666, 0: 0.3333333333333333}
    """
    counts = count_pixels(label, len(table))
    order = sorted(np.flatnonzero(counts), key=lambda k: (-counts[k], k))
    return {int(k): float(counts[k] / counts.sum()) for k in order}


def add_legend(picture: Picture, label: Label, table: ClassTable) -> Picture:
    """Append a legend of the classes in a label map: colour, name and share, largest first.

    It stands to the right if its rows fit the height of the picture, else below in columns. A small
    picture is enlarged by an integer factor first, so that the text is legible and pixels stay
    square.

    Returns:
        ``(H', W', 3)`` uint8 with the (enlarged) picture in the top left corner.
    """
    factor = max(1, round(_MIN_LEGEND_SIDE_PIXELS / max(picture.shape[:2])))
    if factor > 1:
        picture = picture.repeat(factor, 0).repeat(factor, 1)
    H, W, _ = picture.shape
    font = _font(min(H, W))
    entries = [
        (table.colors[k], _shorten(table.names[k]), _percent(share))
        for k, share in label_shares(label, table).items()
    ]
    pad = round(font.size)
    line = min(round(font.size * 1.55), (H - pad) // max(1, len(entries)))
    swatch = round(font.size * 0.95)
    name_width = max((font.getlength(name) for _, name, _ in entries), default=0)
    cell = math.ceil(swatch + name_width + font.getlength("100.0 %") + 2.2 * pad)
    if line >= 1.25 * font.size:
        columns, left, top, canvas_size = 1, W + pad, pad, (W + cell + pad, H)
    else:
        line = round(font.size * 1.55)
        columns = max(1, (W - pad) // cell)
        left, top = pad, H + pad
        canvas_size = (max(W, cell + pad), H + 2 * pad + line * math.ceil(len(entries) / columns))
    canvas = Pillow.new("RGB", canvas_size, _BACKGROUND_COLOR)
    canvas.paste(Pillow.fromarray(picture))
    for k, entry in enumerate(entries):
        place = left + cell * (k % columns), top + line * (k // columns)
        _draw_legend_entry(canvas, entry, place, cell, font)
    return np.array(canvas)


def _draw_legend_entry(
    canvas: Pillow.Image,
    entry: tuple[Color, str, str],
    place: tuple[int, int],
    width: int,
    font: FreeTypeFont,
) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(canvas)
    (color, name, share), (x, y) = entry, place
    pad, swatch = round(font.size), round(font.size * 0.95)
    draw.rectangle((x, y, x + swatch, y + swatch), fill=color, outline=_SECONDARY_COLOR)
    if is_black(color):
        # Half empty: black in a label map, not painted in an overlay.
        right, bottom = x + swatch - 1, y + swatch - 1
        draw.polygon(((x + 1, y + 1), (right, y + 1), (right, bottom)), _BACKGROUND_COLOR)
    middle = y + swatch / 2
    draw.text((x + swatch + 0.6 * pad, middle), name, _TEXT_COLOR, font, anchor="lm")
    draw.text((x + width - pad, middle), share, _SECONDARY_COLOR, font, anchor="rm")


def side_by_side(
    pictures: Sequence[Picture], captions: Sequence[str] = (), gap: int = 8
) -> Picture:
    """Put pictures in a row on white, aligned at the top, each below its caption.

    Args:
        pictures: At least one ``(H, W, 3)`` uint8; heights and widths may differ.
        captions: One per picture, or none. A caption wider than its picture is shortened.
        gap: Pixels between pictures.
    """
    from PIL import ImageDraw

    assert pictures, "side_by_side needs at least one picture"
    assert len(captions) in (0, len(pictures)), (len(captions), len(pictures))
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    font = _font(height)
    header = round(font.size * 1.7) if captions else 0
    canvas = Pillow.new("RGB", (width, header + height), _BACKGROUND_COLOR)
    draw = ImageDraw.Draw(canvas)
    x = 0
    for k, picture in enumerate(pictures):
        canvas.paste(Pillow.fromarray(picture), (x, header))
        if captions:
            caption = _fit_text(captions[k], picture.shape[1], font)
            draw.text((x + 1, header / 2), caption, _TEXT_COLOR, font, anchor="lm")
        x += picture.shape[1] + gap
    return np.array(canvas)


def _font(height: int) -> FreeTypeFont:
    """Return Pillow's bundled font at a size that suits a picture of this height in pixels."""
    from PIL import ImageFont
    from PIL.ImageFont import FreeTypeFont

    font = ImageFont.load_default(min(40, max(14, height / 27)))
    assert isinstance(font, FreeTypeFont), "Pillow was built without FreeType"
    return font


def _fit_text(text: str, width: float, font: FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 3] + "..."


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def draw_curves(log: TrainingLog, path: Path) -> None:
    """Draw the loss and the mean IoU of a run over its steps.

    Args:
        log: Rows with ``step`` and ``loss``, and with ``mean_iou`` and ``validation_loss`` where
            they were measured. One row is enough. A single mean IoU is written above the loss.
        path: A ``.png`` or ``.svg`` file to write.
    """
    panels = _panels(log)
    figure = _figure(len(panels), 8.4)
    for axes, (draw, points) in zip(figure.axes, panels, strict=True):
        draw(axes, points)
    content = _render(figure, path.suffix.lstrip(".").lower(), transparent=False)
    path.write_bytes(mark_png(content))


def curves_svg(log: TrainingLog) -> list[str]:
    """Draw the same curves for an HTML page: one ``<svg>`` per panel.

    Text and lines have the page's own colour and font.
    """
    sheets = []
    for draw, points in _panels(log):
        figure = _figure(1, 4.2)
        draw(figure.axes[0], points)
        sheets.append(_inline_svg(_render(figure, "svg", transparent=True).decode()))
    return sheets


def _inline_svg(text: str) -> str:
    """Return the ``<svg>`` element of a file, for use inside a page.

    It needs no namespaces, metadata and size there, and two of them must not share ids.
    """
    text = text[text.index("<svg") :].replace(_AXIS_COLOR, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    ids = "figure|axes|matplotlib|patch|line2d|text|xtick|ytick|legend"
    text = re.sub(rf' xmlns(:\w+)?="[^"]*"| id="({ids})[^"]*"', "", text)
    for attribute in ("height", "width"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    return text


CurvePoints = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def _panels(log: TrainingLog) -> list[tuple[Any, CurvePoints]]:
    """List the panels: (function that draws it, curves as (steps, values)).

    The loss always has a panel, the mean IoU if it was measured at least twice.
    """
    points = {key: _points(log, key) for key in ("loss", "validation_loss", "mean_iou")}
    panels: list[tuple[Any, CurvePoints]] = [(_draw_loss, points)]
    if points["mean_iou"][0].size > 1:
        panels.append((_draw_score, points))
    return panels


def _points(log: TrainingLog, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and finite values of one key.

    After a resume, the later row of a step counts. Long curves become means of groups.
    """
    by_step = {
        float(row["step"]): float(row[key])
        for row in log
        if row.get(key) is not None and math.isfinite(row[key])
    }
    table = np.array(sorted(by_step.items()), np.float64).reshape(-1, 2)
    group = math.ceil(len(table) / _MAX_CURVE_POINTS)
    if group > 1:
        groups = np.array_split(table, math.ceil(len(table) / group))
        table = np.array([part.mean(0) for part in groups])
    return table[:, 0], table[:, 1]


def _figure(num_panels: int, width: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 2.9), dpi=160, layout="constrained")
    for k in range(num_panels):
        axes = figure.add_subplot(1, num_panels, k + 1)
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_AXIS_COLOR)
        axes.tick_params(colors=_AXIS_COLOR, labelsize=9, length=3)
        axes.grid(True, axis="y", color=_AXIS_COLOR, alpha=0.15, linewidth=0.8)
        axes.set_xlabel("step", color=_AXIS_COLOR, fontsize=9.5)
        axes.locator_params(axis="x", nbins=6, integer=True)
    return figure


def _draw_loss(axes: Axes, points: CurvePoints) -> None:
    steps, losses = points["loss"]
    validation_steps, validation = points["validation_loss"]
    _draw_title(axes, "loss")
    axes.margins(x=0.02)
    if len(steps) == 1:
        # Matplotlib's own limits would be less than a step apart.
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    if len(steps) < _MAX_UNSMOOTHED_STEPS:
        marker_size = 3.5 if len(steps) > 1 else 6
        line: dict[str, Any] = {"marker": "o", "markersize": marker_size, "label": "training"}
        axes.plot(steps, losses, color=_LOSS_COLOR, linewidth=1.8, **line)
    else:
        window = np.ones(max(3, len(steps) // 25))
        counts = np.convolve(np.ones(len(steps)), window, "same")
        smooth = np.convolve(losses, window, "same") / counts
        axes.plot(steps, losses, color=_LOSS_COLOR, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smooth, color=_LOSS_COLOR, linewidth=1.8, label="training, smoothed")
    if validation.size:
        line = {"linestyle": "--", "marker": "o", "markersize": 3.5}
        line["label"] = "validation, cross-entropy"
        axes.plot(validation_steps, validation, color=_SCORE_COLOR, linewidth=1.8, **line)
        axes.legend(frameon=False, fontsize=9, labelcolor=_AXIS_COLOR)
    score_steps, scores = points["mean_iou"]
    if len(scores) == 1:
        note = f"mean IoU {_percent(float(scores[0]))} at step {score_steps[0]:.0f}"
        axes.set_title(note, loc="right", color=_AXIS_COLOR, fontsize=9)
    values = np.concatenate((losses, validation))
    if values.size and values.min() > 0 and values.max() > _MIN_LOG_SCALE_RATIO * values.min():
        _use_log_scale(axes)


def _draw_title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_AXIS_COLOR, fontsize=11, fontweight="bold")


def _use_log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers (0.2, 0.5, 1) instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_score(axes: Axes, points: CurvePoints) -> None:
    steps, values = points["mean_iou"]
    best = int(values.argmax())
    _draw_title(axes, "mean IoU")
    axes.margins(x=0.02)
    axes.plot(steps, values, color=_SCORE_COLOR, linewidth=1.8, marker="o", markersize=3.5)
    axes.plot(steps[best], values[best], color=_SCORE_COLOR, marker="o", markersize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    low, high = float(values.min()), float(values.max())
    if high - low < _MIN_SCORE_RANGE:
        low = max(0, (low + high - _MIN_SCORE_RANGE) / 2)
        axes.set_ylim(low - 0.1 * _MIN_SCORE_RANGE, low + 1.1 * _MIN_SCORE_RANGE)
    note = f"best {_percent(float(values[best]))} at step {steps[best]:.0f}"
    axes.set_title(note, loc="right", color=_AXIS_COLOR, fontsize=9)


def _render(figure: Figure, suffix: str, transparent: bool) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    target = io.BytesIO()
    # Without a date the same curves give the same file.
    metadata = {"Date": None} if suffix == "svg" else None
    font_type = "none" if transparent else "path"
    with matplotlib.rc_context({"svg.fonttype": font_type, "svg.hashsalt": "useg"}):
        figure.savefig(target, format=suffix, transparent=transparent, metadata=metadata)
    return target.getvalue()
