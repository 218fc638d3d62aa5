"""Image + label map -> pictures for people: overlay, legend, difference, side by side, training
curves.

Training, evaluation, the service and the reports all draw with these functions, so a class has one
look everywhere.
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

from useg.classes import IGNORE, ClassTable, Color, Label, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.ImageFont import FreeTypeFont

Picture = NDArray[np.uint8]  # (H, W, 3)


TrainingLog = Sequence[Mapping[str, Any]]  # rows of a run's log.jsonl


# What `difference` paints. Far apart in lightness, so every kind of colour vision (and a grey
# print) tells them apart.
CORRECT_COLOR: Color = (27, 31, 39)


WRONG_COLOR: Color = (255, 176, 0)


IGNORED_COLOR: Color = (126, 131, 140)


_BACKGROUND_COLOR: Color = (255, 255, 255)


_TEXT_COLOR: Color = (32, 36, 42)


_SECONDARY_COLOR: Color = (98, 105, 116)


_AXIS_COLOR, _LOSS_COLOR, _SCORE_COLOR = (
    "#3b424c",
    "#3f7be8",
    "#d9660a",
)  # both hues read on white and on near-black


_MAX_BLACK = 24  # brightest channel of a class colour that counts as black


_MAX_NAME_LENGTH = 26


_MIN_LEGEND_SIDE_PIXELS = 384  # a smaller picture is enlarged before text is set beside it


_ROWS_AT_ONCE = 32  # of a picture at a time, which stay in the processor's cache


_MIN_LOG_SCALE_RATIO = (
    5  # a loss whose largest value exceeds this many times its smallest is drawn on a log scale
)


_MIN_SCORE_RANGE = 0.05  # of the mean IoU axis, so that noise does not look like a trend


_MAX_CURVE_POINTS = 1200  # per curve: more than a screen shows, few enough for an inline SVG


def to_picture(image: NDArray[Any]) -> Picture:
    """Make any image viewable.

    Args:
        image: ``(H, W, C)`` or ``(H, W)`` uint8, uint16 or float32 with 1..N bands.

    Returns:
        ``(H, W, 3)`` uint8. One or two bands: the first as grey; more: the first three. What is not
        uint8 is stretched between its 1st and 99th percentile, all bands alike; pixels that are not
        finite are black. May share memory with ``image``.

    >>> to_picture(np.full((2, 3, 7), 9, np.uint8)).shape
    (2, 3, 3)
    """
    bands = image[..., None] if image.ndim == 2 else image
    bands = bands[..., :3] if bands.shape[2] >= 3 else np.repeat(bands[..., :1], 3, axis=2)
    return np.ascontiguousarray(bands if bands.dtype == np.uint8 else _stretch(bands))


def _stretch(bands: NDArray[Any]) -> Picture:
    step = max(
        1, math.isqrt(bands.shape[0] * bands.shape[1] // 1_000_000)
    )  # a million pixels fix a percentile well enough
    seen = bands[::step, ::step].astype(np.float32)
    seen = seen[np.isfinite(seen)]
    if not seen.size:
        return np.zeros(bands.shape, np.uint8)
    low, high = (float(v) for v in np.percentile(seen, (1, 99)))
    if high <= low:  # one value almost everywhere: let the few others decide
        low, high = float(seen.min()), max(float(seen.max()), float(seen.min()) + 1e-6)
    values = (bands.astype(np.float32) - low) * (255 / (high - low))
    stretched: Picture = np.rint(
        np.clip(np.nan_to_num(values, nan=0, posinf=0, neginf=0), 0, 255)
    ).astype(np.uint8)
    return stretched


def overlay(image: NDArray[Any], label: Label, table: ClassTable, opacity: float = 0.5) -> Picture:
    """Blend class colours with an image, more strongly along the edges between classes.

    A class whose colour is black is not painted. A black tint only darkens the image, and then a
    dark grey class (CARLA's Buildings) looks like an unlabelled one (CARLA's None).

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
    weights = np.zeros(
        (2, 256), np.uint16
    )  # in 256ths, so that a product with a pixel fits 16 bits: inside, along edges
    weights[:, : len(table)] = [[round(256 * opacity)], [round(256 * (1 - (1 - opacity) ** 2))]]
    weights[:, [k for k, color in enumerate(table.colors) if is_black(color)]] = 0
    kept = (256 - weights).reshape(-1)
    paints = (weights[..., None] * palette(table).astype(np.uint16) + 128).reshape(
        -1, 3
    )  # 128: rounds to the nearest
    places = label + 256 * _class_borders(label).astype(np.uint16)
    blended = np.empty_like(picture)
    for top in range(0, len(label), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        blended[rows] = (
            picture[rows] * kept.take(places[rows])[..., None] + paints.take(places[rows], 0)
        ) >> 8
    return blended


def is_black(color: Color) -> bool:
    """Tell whether a class colour is too dark to tint an image visibly.

    >>> is_black((0, 0, 0)), is_black((70, 70, 70)), is_black((0, 0, 255))
    (True, False, False)
    """
    return max(color) <= _MAX_BLACK


def _class_borders(label: Label) -> NDArray[np.bool_]:
    """Mark pixels whose right or lower neighbour is of another class."""
    edge = np.zeros(label.shape, bool)
    edge[:, :-1] |= label[:, :-1] != label[:, 1:]
    edge[:-1] |= label[:-1] != label[1:]
    return edge


def paint_label(label: Label, table: ClassTable) -> Picture:
    """Paint a label map in the exact class colours; ``IGNORE`` and ids outside the table are grey.

    Unlike :func:`useg.classes.to_color`, which writes files in the data set's own code, this cannot
    be mistaken: there ignored pixels share black with the first class.
    """
    colors = palette(table)
    colors[len(table) :] = IGNORED_COLOR
    return colors[label]


def draw_difference(prediction: Label, label: Label) -> Picture:
    """Show where a prediction is right (``RIGHT``, dark), wrong (``WRONG``, vivid) or not judged
    (``IGNORED``, grey).

    >>> difference(np.uint8([[1, 2, 3]]), np.uint8([[1, 1, 255]]))[0].tolist() == [list(RIGHT),
    list(WRONG), list(IGNORED)] True
    """
    assert prediction.shape == label.shape, (prediction.shape, label.shape)
    colors = np.array((CORRECT_COLOR, WRONG_COLOR, IGNORED_COLOR), np.uint8)
    return colors[np.where(label == IGNORE, 2, prediction != label)]


def label_shares(label: Label, table: ClassTable) -> dict[int, float]:
    """Return the share (0..1) of each class present in a label map, largest first; pixels outside
    the table do not count.

    >>> shares(np.uint8([[1, 1], [0, 255]]), ClassTable(("sky", "road", "car")))
    {1: 0.6666666666666666, 0: 0.3333333333333333}
    """
    counts = np.array(Pillow.fromarray(label).histogram())[
        : len(table)
    ]  # a tenth of bincount's time, which first makes int64 of it
    order = sorted(np.flatnonzero(counts), key=lambda k: (-counts[k], k))
    return {int(k): float(counts[k] / counts.sum()) for k in order}


def add_legend(picture: Picture, label: Label, table: ClassTable) -> Picture:
    """Append a legend of the classes present: swatch, name, share of the judged pixels, largest
    first.

    It stands to the right when its rows fit the picture's height, else below in columns. A small
    picture is enlarged by a whole factor first, so that its pixels stay square and the text
    legible.

    Returns:
        ``(H', W', 3)`` uint8 with the (enlarged) picture in the top left corner.
    """
    from PIL import ImageDraw

    factor = max(1, round(_MIN_LEGEND_SIDE_PIXELS / max(picture.shape[:2])))
    if factor > 1:
        picture = picture.repeat(factor, 0).repeat(factor, 1)
    H, W, _ = picture.shape
    font = _font(min(H, W))
    rows = [
        (table.colors[k], _shorten(table.names[k]), _percent(share))
        for k, share in label_shares(label, table).items()
    ]
    pad = round(font.size)
    line = min(round(font.size * 1.55), (H - pad) // max(1, len(rows)))
    swatch = round(font.size * 0.95)
    name_width = max((font.getlength(name) for _, name, _ in rows), default=0)
    cell = math.ceil(swatch + name_width + font.getlength("100.0 %") + 2.2 * pad)
    if line >= 1.25 * font.size:
        columns, left, top, canvas_size = 1, W + pad, pad, (W + cell + pad, H)
    else:
        line = round(font.size * 1.55)
        columns = max(1, (W - pad) // cell)
        left, top = pad, H + pad
        canvas_size = (max(W, cell + pad), H + 2 * pad + line * math.ceil(len(rows) / columns))
    canvas = Pillow.new("RGB", canvas_size, _BACKGROUND_COLOR)
    canvas.paste(Pillow.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    for k, (color, name, share) in enumerate(rows):
        x, y = left + cell * (k % columns), top + line * (k // columns)
        draw.rectangle((x, y, x + swatch, y + swatch), fill=color, outline=_SECONDARY_COLOR)
        if is_black(color):
            # Half empty: black in a label map, not painted in an overlay.
            draw.polygon(
                ((x + 1, y + 1), (x + swatch - 1, y + 1), (x + swatch - 1, y + swatch - 1)),
                _BACKGROUND_COLOR,
            )
        draw.text((x + swatch + 0.6 * pad, y + swatch / 2), name, _TEXT_COLOR, font, anchor="lm")
        draw.text((x + cell - pad, y + swatch / 2), share, _SECONDARY_COLOR, font, anchor="rm")
    return np.array(canvas)


def side_by_side(
    pictures: Sequence[Picture], captions: Sequence[str] = (), gap: int = 8
) -> Picture:
    """Set pictures in one row on white, aligned at the top, each under its caption.

    Args:
        pictures: at least one ``(H, W, 3)`` uint8; heights and widths may differ.
        captions: one per picture, or none at all; one that is too wide for its picture is cut with
            an ellipsis.
        gap: pixels between pictures.
    """
    from PIL import ImageDraw

    assert pictures, "side_by_side needs at least one picture"
    assert len(captions) in (0, len(pictures)), (len(captions), len(pictures))
    height = max(picture.shape[0] for picture in pictures)
    font = _font(height)
    head = round(font.size * 1.7) if captions else 0
    canvas = Pillow.new(
        "RGB",
        (sum(p.shape[1] for p in pictures) + gap * (len(pictures) - 1), head + height),
        _BACKGROUND_COLOR,
    )
    draw = ImageDraw.Draw(canvas)
    x = 0
    for k, picture in enumerate(pictures):
        canvas.paste(Pillow.fromarray(picture), (x, head))
        if captions:
            draw.text(
                (x + 1, head / 2),
                _fit_text(captions[k], picture.shape[1], font),
                _TEXT_COLOR,
                font,
                anchor="lm",
            )
        x += picture.shape[1] + gap
    return np.array(canvas)


def _font(height: int) -> FreeTypeFont:
    """Pillow's bundled font at a size that suits a picture of that height in pixels."""
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
    """Draw a run's loss and mean IoU over its steps.

    Args:
        log: rows with ``step`` and ``loss``; ``mean_iou`` and ``validation_loss`` where they were
            measured. One row is enough. A single mean IoU is written above the loss, not drawn.
        path: a ``.png`` or ``.svg`` file to write.
    """
    panels = _panels(log)
    figure = _figure(len(panels), 8.4)
    for axes, (draw, points) in zip(figure.axes, panels, strict=True):
        draw(axes, points)
    path.write_bytes(_render(figure, path.suffix.lstrip(".").lower(), transparent=False))


def curves_svg(log: TrainingLog) -> list[str]:
    """Draw the same curves for a page: one ``<svg>`` per panel, its text and lines in the page's
    own colour and font.
    """
    sheets = []
    for draw, points in _panels(log):
        figure = _figure(1, 4.2)
        draw(figure.axes[0], points)
        text = _render(figure, "svg", transparent=True).decode()
        text = text[text.index("<svg") :].replace(_AXIS_COLOR, "currentColor")
        # An inline SVG has no use for namespaces and metadata, and two of them must not share ids.
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(
            r' xmlns(:\w+)?="[^"]*"'
            r'| id="(figure|axes|matplotlib|patch|line2d|text|xtick|ytick|legend)[^"]*"',
            "",
            text,
        )
        sheets.append(
            re.sub(
                r'(<svg[^>]*?) width="[^"]*"',
                r"\1",
                re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
                count=1,
            )
        )
    return sheets


CurvePoints = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def _panels(log: TrainingLog) -> list[tuple[Any, CurvePoints]]:
    """List the panels: (function that draws it, curves as (steps, values)).

    The loss always has a panel, the mean IoU if it was measured at least twice.
    """
    points = {key: _points(log, key) for key in ("loss", "validation_loss", "mean_iou")}
    return [(_draw_loss, points)] + (
        [(_draw_score, points)] if points["mean_iou"][0].size > 1 else []
    )


def _points(log: TrainingLog, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The finite values of one key by step; after a resume the later row of a step counts. Long
    curves become means of groups.
    """
    by_step = {
        float(row["step"]): float(row[key])
        for row in log
        if row.get(key) is not None and math.isfinite(row[key])
    }
    table = np.array(sorted(by_step.items()), np.float64).reshape(-1, 2)
    group = math.ceil(len(table) / _MAX_CURVE_POINTS)
    if group > 1:
        table = np.array(
            [part.mean(0) for part in np.array_split(table, math.ceil(len(table) / group))]
        )
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
    axes.set_title("loss", loc="left", color=_AXIS_COLOR, fontsize=11, fontweight="bold")
    axes.margins(x=0.02)
    if len(steps) == 1:
        # Matplotlib's own limits are less than a step apart.
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    if len(steps) < 40:
        axes.plot(
            steps,
            losses,
            color=_LOSS_COLOR,
            linewidth=1.8,
            marker="o",
            markersize=3.5 if len(steps) > 1 else 6,
            label="training",
        )
    else:
        window = np.ones(max(3, len(steps) // 25))
        smooth = np.convolve(losses, window, "same") / np.convolve(
            np.ones(len(steps)), window, "same"
        )
        axes.plot(steps, losses, color=_LOSS_COLOR, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smooth, color=_LOSS_COLOR, linewidth=1.8, label="training, smoothed")
    if validation.size:
        axes.plot(
            validation_steps,
            validation,
            color=_SCORE_COLOR,
            linewidth=1.8,
            linestyle="--",
            marker="o",
            markersize=3.5,
            label="validation, cross-entropy",
        )
        axes.legend(frameon=False, fontsize=9, labelcolor=_AXIS_COLOR)
    score_steps, scores = points["mean_iou"]
    if len(scores) == 1:
        said = f"mean IoU {_percent(float(scores[0]))} at step {score_steps[0]:.0f}"
        axes.set_title(said, loc="right", color=_AXIS_COLOR, fontsize=9)
    everything = np.concatenate((losses, validation))
    if (
        everything.size
        and everything.min() > 0
        and everything.max() > _MIN_LOG_SCALE_RATIO * everything.min()
    ):
        _use_log_scale(axes)


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
    axes.set_title("mean IoU", loc="left", color=_AXIS_COLOR, fontsize=11, fontweight="bold")
    axes.margins(x=0.02)
    axes.plot(steps, values, color=_SCORE_COLOR, linewidth=1.8, marker="o", markersize=3.5)
    axes.plot(steps[best], values[best], color=_SCORE_COLOR, marker="o", markersize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    low, high = float(values.min()), float(values.max())
    if high - low < _MIN_SCORE_RANGE:
        low = max(0, (low + high - _MIN_SCORE_RANGE) / 2)
        axes.set_ylim(low - 0.1 * _MIN_SCORE_RANGE, low + 1.1 * _MIN_SCORE_RANGE)
    said = f"best {_percent(float(values[best]))} at step {steps[best]:.0f}"
    axes.set_title(said, loc="right", color=_AXIS_COLOR, fontsize=9)


def _render(figure: Figure, suffix: str, transparent: bool) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    target = io.BytesIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none" if transparent else "path", "svg.hashsalt": "useg"}
    ):
        figure.savefig(
            target,
            format=suffix,
            transparent=transparent,
            metadata={"Date": None} if suffix == "svg" else None,
        )
    return target.getvalue()
