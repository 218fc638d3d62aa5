"""Exact pixels of overlays and error maps; legends are read back by their colours."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageColor

from useg.classes import CARLA, IGNORE, ClassTable
from useg.visualization import (
    CORRECT_COLOR,
    IGNORED_COLOR,
    WRONG_COLOR,
    add_legend,
    curves_svg,
    draw_curves,
    draw_difference,
    label_shares,
    overlay,
    paint_label,
    side_by_side,
    to_picture,
)

TABLE = ClassTable(("sky", "road", "car"), ((10, 200, 30), (200, 40, 220), (0, 90, 250)))
rng = np.random.default_rng(3)
IMAGE = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
LABEL = np.repeat(np.repeat(rng.choice(np.uint8([0, 1, 2, IGNORE]), (4, 6)), 10, 0), 10, 1)
LOG = [
    {
        "step": k,
        "epoch": k // 10,
        "loss": 2.0 / (1 + k),
        "mean_iou": k / 100 if k % 10 == 9 else None,
    }
    for k in range(60)
]


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_every_kind_of_image_becomes_a_picture(bands, dtype):
    image = (rng.random((5, 8, bands)) * 200).astype(dtype)
    picture = to_picture(image)
    assert picture.shape == (5, 8, 3)
    assert picture.dtype == np.uint8
    if bands < 3:
        assert (picture[..., 0] == picture[..., 1]).all()
        assert (picture[..., 0] == picture[..., 2]).all()


def test_uint8_is_shown_as_it_is():
    assert (to_picture(IMAGE) == IMAGE).all()
    assert (to_picture(np.dstack([IMAGE] * 3)) == IMAGE).all()
    assert (to_picture(IMAGE[..., 0]) == IMAGE[..., :1]).all()


def test_16_bit_is_stretched_between_its_percentiles():
    image = np.arange(10_000, dtype=np.uint16).reshape(100, 100, 1) * 6
    grey = to_picture(image)[..., 0].ravel()
    assert (grey[:100] == 0).all()
    assert (grey[-100:] == 255).all()
    assert (np.diff(grey.astype(int)) >= 0).all()
    assert grey[5000] == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("value", [0, 7, np.nan, np.inf])
def test_a_flat_or_broken_float_image_is_still_a_picture(value):
    image = np.full((6, 6, 1), value, np.float32)
    assert to_picture(image).shape == (6, 6, 3)
    image[0, 0] = 1
    image[5, 5] = 2
    assert to_picture(image).max() == 255
    assert (to_picture(np.full((6, 6, 3), np.nan, np.float32)) == 0).all()


def test_overlay_is_exact_at_both_ends():
    seen = LABEL != IGNORE
    assert (overlay(IMAGE, LABEL, TABLE, 0) == IMAGE).all()
    assert (overlay(IMAGE, LABEL, TABLE, 1)[seen] == np.array(TABLE.colors)[LABEL[seen]]).all()


@settings(deadline=None, max_examples=40)
@given(
    st.floats(0, 1), arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3, 200, IGNORE]))
)
def test_overlay_leaves_what_has_no_class_and_stays_between_picture_and_color(opacity, label):
    image = np.full((6, 7, 3), 100, np.uint8)
    picture = overlay(image, label, TABLE, opacity)
    unknown = label >= len(TABLE)
    assert (picture[unknown] == 100).all()
    colors = np.array(TABLE.colors)[label[~unknown]]
    assert (picture[~unknown] >= np.minimum(colors, 100)).all()
    assert (picture[~unknown] <= np.maximum(colors, 100)).all()


def test_overlay_is_an_even_mix_inside_and_stronger_at_the_edge():
    label = np.zeros((3, 10), np.uint8)
    label[:, 5:] = 1
    picture = overlay(np.zeros((3, 10, 3), np.uint8), label, TABLE, 0.5)
    assert picture[1, 2].tolist() == [5, 100, 15]
    assert picture[1, 8].tolist() == [100, 20, 110]
    assert picture[1, 4, 1] == 150


def test_a_black_class_does_not_darken_the_overlay() -> None:
    """CARLA's Buildings (dark grey) must not look like CARLA's None (black)."""
    label = np.repeat(np.uint8([[0, 1]]), 10, 1)
    image = np.full((1, 20, 3), 160, np.uint8)
    picture = overlay(image, label, CARLA)
    assert (picture[:, :10] == 160).all()
    assert (picture[:, 10:] == 115).all()


def test_the_legend_shows_a_black_class_as_half_empty() -> None:
    label = np.zeros((600, 800), np.uint8)
    black = add_legend(np.full((600, 800, 3), 255, np.uint8), label, CARLA)[:, 800:]
    grey = add_legend(np.full((600, 800, 3), 255, np.uint8), label + 1, CARLA)[:, 800:]
    pixels = [int((sheet == color).all(-1).sum()) for sheet, color in ((black, 0), (grey, 70))]
    assert 0.4 < pixels[0] / pixels[1] < 0.6


def test_overlay_does_not_touch_its_input():
    before = IMAGE.copy()
    overlay(IMAGE, LABEL, TABLE, 1)
    assert (before == IMAGE).all()


def test_painted_labels_show_ignored_pixels_in_their_own_color():
    label = np.uint8([[0, 2, 3, IGNORE]])
    assert paint_label(label, TABLE)[0].tolist() == [
        list(TABLE.colors[0]),
        list(TABLE.colors[2]),
        list(IGNORED_COLOR),
        list(IGNORED_COLOR),
    ]


def test_the_colors_of_the_difference_count_the_errors():
    prediction = rng.integers(0, 3, LABEL.shape, dtype=np.uint8)
    picture = draw_difference(prediction, LABEL)
    counted = LABEL != IGNORE

    def count(color):
        return int((picture == color).all(-1).sum())

    assert count(WRONG_COLOR) == (prediction != LABEL)[counted].sum()
    assert count(CORRECT_COLOR) == (prediction == LABEL)[counted].sum()
    assert count(IGNORED_COLOR) == (~counted).sum()


def test_the_difference_survives_a_grey_print():
    lightness = sorted(
        np.dot(color, (0.299, 0.587, 0.114))
        for color in (CORRECT_COLOR, WRONG_COLOR, IGNORED_COLOR)
    )
    assert np.diff(lightness).min() > 40


def test_shares_are_largest_first_and_of_judged_pixels():
    label = np.uint8([[2] * 6 + [0] * 2 + [IGNORE] * 8])
    assert list(label_shares(label, TABLE).items()) == [(2, 0.75), (0, 0.25)]
    assert label_shares(np.full((2, 2), IGNORE, np.uint8), TABLE) == {}


def swatches(sheet, height, width, table):
    """The classes whose exact colour occurs in the legend, outside the picture in the corner."""
    legend = sheet.copy()
    legend[:height, :width] = 255
    return {k for k, color in enumerate(table.colors) if (legend == color).all(-1).sum() > 30}


@pytest.mark.parametrize(
    ("height", "width"), [(600, 800), (96, 128), (300, 400), (1024, 256), (200, 1200), (512, 1024)]
)
@pytest.mark.parametrize("present", [(0,), (1, 2, 8), tuple(range(13))])
def test_the_legend_lists_exactly_the_classes_present(height, width, present):
    label = np.array(present, np.uint8)[np.arange(height * width) % len(present)].reshape(
        height, width
    )
    label[0, 0] = IGNORE
    picture = np.zeros((height, width, 3), np.uint8)
    sheet = add_legend(picture, label, CARLA)
    factor = max(1, round(384 / max(height, width)))
    assert swatches(sheet, height * factor, width * factor, CARLA) == set(present)
    assert sheet.size > picture.size * factor**2


def test_the_picture_stands_in_the_corner_and_a_small_one_is_enlarged_by_a_whole_factor():
    sheet = add_legend(IMAGE, LABEL, TABLE)
    assert (sheet[: 40 * 6, : 60 * 6] == IMAGE.repeat(6, 0).repeat(6, 1)).all()
    large = rng.integers(0, 256, (600, 800, 3), dtype=np.uint8)
    assert (add_legend(large, np.zeros((600, 800), np.uint8), TABLE)[:600, :800] == large).all()


def test_a_legend_without_classes_and_one_with_a_very_long_name():
    nothing = np.full(LABEL.shape, IGNORE, np.uint8)
    assert swatches(add_legend(IMAGE, nothing, TABLE), 240, 360, TABLE) == set()
    long = ClassTable(("a" * 200,), ((200, 40, 220),))
    sheet = add_legend(IMAGE, np.zeros_like(LABEL), long)
    assert sheet.shape[1] < 900


def test_pictures_side_by_side_keep_their_pixels():
    other = np.zeros((20, 30, 3), np.uint8)
    row = side_by_side([IMAGE, other], gap=5)
    assert row.shape == (40, 60 + 5 + 30, 3)
    assert (row[:, :60] == IMAGE).all()
    assert (row[:20, 65:] == 0).all()
    assert (row[20:, 60:] == 255).all()
    captioned = side_by_side(
        [IMAGE, other], ["a caption that is far too long for its picture", "b"], gap=5
    )
    head = captioned.shape[0] - 40
    assert (captioned[head:, :60] == IMAGE).all()
    assert (captioned[:head, :60] < 128).any()
    assert (captioned[:head, 60:65] == 255).all(), "a caption runs into the next picture"


@pytest.mark.parametrize(
    "log",
    [
        LOG,
        LOG[:1],
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": 0.5, "mean_iou": 0.3, "validation_loss": 0.6}],
        [{"step": 1, "loss": float("nan")}],
        [{"step": k, "loss": 1 + k % 7} for k in range(5000)],
    ],
    ids=["long", "one row", "no score", "one epoch", "nan", "many steps"],
)
def test_curves_are_drawn_for_any_log(log, tmp_path):
    draw_curves(log, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as sheet:
        assert min(sheet.size) > 300
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 10


def extent(path: Path, color: str) -> tuple[float, float]:
    """Return how much of a drawing's width and height the pixels of a colour span."""
    with Image.open(path) as sheet:
        pixels = np.array(sheet.convert("RGB")).astype(int)
    rows, columns = np.nonzero((abs(pixels - ImageColor.getrgb(color)) < 12).all(-1))
    return float(np.ptp(columns) / pixels.shape[1]), float(np.ptp(rows) / pixels.shape[0])


def test_curves_fill_their_panels(tmp_path: Path) -> None:
    log = [
        {
            "step": k,
            "loss": 1.2 + 2 / (1 + k),
            "mean_iou": 0.02 + k / 1000 if k >= 60 and k % 10 == 9 else None,
        }
        for k in range(100)
    ]
    draw_curves(log, tmp_path / "curves.png")
    loss, score = (extent(tmp_path / "curves.png", color) for color in ("#3f7be8", "#d9660a"))
    assert loss[0] > 0.4
    assert loss[1] > 0.5
    assert score[0] > 0.4
    assert score[1] > 0.4


def test_a_single_step_has_whole_numbers_on_its_axis() -> None:
    (sheet,) = curves_svg([{"step": 1, "loss": 3.8}])
    axis = re.findall(r">([\d.]+)</text>", sheet[: sheet.index(">step<")])
    assert axis == ["0", "1", "2"]


def test_a_single_score_is_written_not_drawn(tmp_path: Path) -> None:
    log = [{"step": k, "loss": 2.0, "mean_iou": 0.352 if k == 9 else None} for k in range(10)]
    assert len(curves_svg(log)) == 1
    assert "mean IoU 35.2 % at step 9" in curves_svg(log)[0]
    draw_curves(log, tmp_path / "curves.png")
    assert extent(tmp_path / "curves.png", "#3f7be8")[0] > 0.85


def test_curves_are_one_svg_per_panel(tmp_path: Path):
    draw_curves(LOG, tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_inline_curves_take_the_page_s_color_and_refer_to_nothing_outside():
    sheets = curves_svg(LOG)
    assert len(sheets) == 2
    assert len(curves_svg(LOG[:1])) == 1, "no score was measured, so none is drawn"
    for sheet in sheets:
        assert sheet.startswith("<svg")
        assert "currentColor" in sheet
        assert "http" not in sheet
        assert "#3b424c" not in sheet


def test_many_steps_stay_a_small_drawing():
    assert (
        sum(map(len, curves_svg([{"step": k, "loss": 1 + k % 7} for k in range(50_000)]))) < 200_000
    )
