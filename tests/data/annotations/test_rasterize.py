"""Shapes become exact pixels, as a slow loop and COCO's own tools make them."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from useg.classes import IGNORE, ClassTable
from useg.data.annotations import rasterize
from useg.data.annotations.rasterize import draw_shapes
from useg.data.annotations.shapes import (
    Drawing,
    Ellipse,
    Line,
    RunLengths,
    Shape,
    box_outline,
    compute_shape_area,
    decode_rle,
    ellipse_outline,
    encode_rle,
    pack_outline,
    pack_points,
)
from useg.errors import DataError

TABLE = ClassTable(("background", "a", "b"))
SIZE = (40, 30)
side = st.floats(-10, 50, allow_nan=False).map(lambda value: round(value, 2))
corners = st.lists(st.tuples(side, side), min_size=3, max_size=12)


def shape(name: str, *outlines: list[tuple[float, float]]) -> Shape:
    return Shape(name, tuple(pack_outline(outline, "x") for outline in outlines))


def paint(*shapes: Shape, size: tuple[int, int] = SIZE, table: ClassTable = TABLE) -> np.ndarray:
    return draw_shapes(Drawing(shapes, size), size, table, "'a.json'")


def cover(*outlines: list[tuple[float, float]], size: tuple[int, int] = SIZE) -> np.ndarray:
    return paint(shape("a", *outlines), size=size) == 1


def draw_line(points: list[tuple[float, float]], width: float) -> np.ndarray:
    return paint(Shape("a", (Line(pack_points(points, "x"), width),))) == 1


def strip(
    begin: tuple[float, float], end: tuple[float, float], width: float
) -> list[tuple[float, float]]:
    (x0, y0), (x1, y1) = begin, end
    length = np.hypot(x1 - x0, y1 - y0)
    x, y = (y0 - y1) / length * width / 2, (x1 - x0) / length * width / 2
    return [(x0 + x, y0 + y), (x1 + x, y1 + y), (x1 - x, y1 - y), (x0 - x, y0 - y)]


def rasterize_slowly(outline: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """The same rule, pixel by pixel and edge by edge.

    Each edge starts at its upper end and the arithmetic is the same, so that ties are alike.
    """
    mask = np.zeros((size[1], size[0]), bool)
    corners = [(x - 0.5, y - 0.5) for x, y in outline]
    for row, column in np.ndindex(*mask.shape):
        for edge in zip(corners, corners[1:] + corners[:1], strict=True):
            (x0, y0), (x1, y1) = sorted(edge, key=lambda corner: corner[1])
            if y0 <= row < y1:
                mask[row, column] ^= x0 + (row - y0) * ((x1 - x0) / (y1 - y0)) <= column
    return mask


def test_a_box_covers_as_many_pixels_as_its_area():
    mask = cover(box_outline(3, 2, 8, 6))
    assert mask.sum() == 20
    assert mask[2:6, 3:8].all()


def test_a_triangle_covers_exactly_these_pixels():
    assert cover([(0, 0), (4, 0), (0, 4)], size=(5, 5)).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]


def test_a_centre_on_an_edge_belongs_to_what_lies_right_of_it_or_below():
    mask = cover(box_outline(2.5, 1.5, 5.5, 4.5), size=(8, 8))
    assert mask[1:4, 2:5].all()
    assert mask.sum() == 9


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 60)), min_size=2, max_size=5))
@settings(max_examples=40)
@example([(1, 0), (29, 5)])
def test_neighbours_share_no_pixel_and_leave_none_out(cuts):
    xs, ys = (sorted({0, end, *(cut[k] / 2 for cut in cuts)}) for k, end in ((0, 40), (1, 30)))
    total = np.zeros((30, 40), int)
    for x0, x1 in pairwise(xs):
        for y0, y1 in pairwise(ys):
            total += cover([(x0, y0), (x1, y0), (x1, y1)])
            total += cover([(x0, y0), (x1, y1), (x0, y1)])
    assert (total == 1).all()


@settings(max_examples=60, derandomize=True)
@given(corners)
@example([(0.0, 0.0), (0.0, 0.0), (5.12, 5.12)])
def test_the_even_odd_rule_holds_for_every_outline(outline):
    assert (cover(outline) == rasterize_slowly(outline, SIZE)).all()


@given(corners)
def test_long_outlines_are_filled_in_parts(outline):
    whole = cover(outline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rasterize, "_MAX_CROSSINGS", 7)
        assert (cover(outline) == whole).all()


def test_areas_inside_an_outline_twice_are_not_covered():
    star = [
        (20 + 12 * math.sin(4 * math.pi * k / 5), 15 - 12 * math.cos(4 * math.pi * k / 5))
        for k in range(5)
    ]
    mask = cover(star)
    assert not mask[15, 20]  # the middle of a pentagram
    assert mask[5, 20]


def test_outlines_of_one_shape_are_joined():
    mask = cover(box_outline(0, 0, 6, 6), box_outline(4, 4, 10, 10))
    assert mask.sum() == 36 + 36 - 4
    assert mask[5, 5]


def test_shapes_are_cut_off_at_the_edge_of_the_image():
    assert cover(box_outline(-5, -5, 3, 3)).sum() == 9
    assert cover(box_outline(-1e300, -1e300, 1e300, 1e300)).all()
    assert cover([(38, 10), (60, 10), (60, 20), (38, 20)]).sum() == 20
    assert not cover(box_outline(100, 100, 200, 200)).any()
    assert not cover(box_outline(-9, -9, -2, -2)).any()
    assert not cover([(1, 1), (5, 1), (9, 1)]).any()


def test_points_far_outside_do_not_overflow():
    far = shape("a", [(-1e300, -1e300), (1e300, 0), (0, 1e300)])
    assert math.isfinite(compute_shape_area(far))
    assert paint(far).any()


def test_circles_and_lines_have_the_right_area():
    assert cover(ellipse_outline(20, 15, 10, 10)).sum() == pytest.approx(math.pi * 100, abs=8)
    assert cover(ellipse_outline(20, 15, 18, 6)).sum() == pytest.approx(math.pi * 108, abs=8)
    assert draw_line([(5, 5.5), (35, 5.5)], 4).sum() == pytest.approx(30 * 4 + math.pi * 4, abs=4)
    thin = draw_line([(2, 3), (30, 25), (30, 5)], 1)
    assert thin[3:24, :30].any(axis=1).all()  # a thin line has no gaps
    assert draw_line([(5, 5), (5, 5)], 6).sum() == pytest.approx(math.pi * 9, abs=4)


@given(st.lists(st.tuples(side, side), min_size=1, max_size=12), st.sampled_from([0.5, 1, 2, 7]))
def test_a_line_is_the_union_of_its_discs_and_strips(points, width):
    expected = cover(
        *(ellipse_outline(x, y, width / 2, width / 2) for x, y in points),
        *(strip(*ends, width) for ends in pairwise(points) if ends[0] != ends[1]),
    )
    assert (draw_line(points, width) == expected).all()


def test_a_line_of_many_points_is_drawn_in_few_parts(monkeypatch):
    counts = []
    draw = rasterize._draw_outlines
    monkeypatch.setattr(
        rasterize, "_draw_outlines", lambda *given: (counts.append(len(given[1])), draw(*given))[1]
    )
    zigzag = [(k % 40, k % 30) for k in range(20_000)]
    assert draw_line(zigzag, 2).any()
    assert sum(counts) == 39_999
    assert len(counts) < 20


def test_an_ellipse_is_drawn_to_a_hundredth_of_a_pixel():
    for radius in (0.5, 5.0, 300.0, 10_000.0):
        points = np.array(ellipse_outline(0, 0, radius, radius))
        middles = (points + np.roll(points, 1, axis=0)) / 2
        assert radius - np.hypot(*middles.T).min() < 0.011


def test_later_shapes_lie_over_earlier_ones():
    label = paint(shape("a", box_outline(0, 0, 10, 10)), shape("b", box_outline(5, 5, 15, 15)))
    assert (label[7, 7], label[2, 2], label[20, 20]) == (2, 1, 0)


def test_without_a_background_class_uncovered_pixels_are_ignored():
    label = paint(shape("b", box_outline(0, 0, 10, 10)), table=ClassTable(("a", "b")))
    assert (label[0, 0], label[20, 20]) == (1, IGNORE)


def test_a_shape_called_ignore_is_ignored():
    assert (
        paint(shape("a", box_outline(0, 0, 10, 10)), shape("__ignore__", box_outline(5, 5, 9, 9)))[
            6, 6
        ]
        == IGNORE
    )


def test_an_unknown_class_is_refused():
    with pytest.raises(
        DataError,
        match=(
            "'a.json' has a shape of the class 'carr', but the 2 classes "
            r"are background, car; add it to.*'car'"
        ),
    ):
        paint(shape("carr", box_outline(0, 0, 1, 1)), table=ClassTable(("background", "car")))


def test_fractions_are_scaled_to_the_size_of_the_image():
    drawing = Drawing((shape("a", box_outline(0.25, 0.5, 0.75, 1)),))
    label = draw_shapes(drawing, (40, 30), TABLE, "x")
    assert label[15:, 10:30].all()
    assert label.sum() == 20 * 15


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([(0, 0), (1, 1)], "an outline of 2 points, but it needs at least three"),
        ([(0, 0), (1, float("nan")), (2, 2)], "a coordinate that is NaN or infinite"),
        ([(0, 0), (1, "x"), (2, 2)], "points are not pairs of numbers"),
        ([(0, 0), (1,), (2, 2)], "points are not pairs of numbers"),
        ([(0, 0), (1, 10**400), (2, 2)], "points are not pairs of numbers"),
        ([1, 2, 3], "points are not pairs of numbers"),
    ],
)
def test_invalid_points_are_refused(points, sentence):
    with pytest.raises(DataError, match=f"'a.json' has .*{sentence}"):
        pack_outline(points, "'a.json'")


@given(arrays.arrays(bool, st.tuples(st.integers(0, 9), st.integers(0, 9))), st.booleans())
def test_run_length_encoding_is_reversed(mask, by_columns):
    runs = encode_rle(mask, by_columns=by_columns)
    assert (decode_rle(runs) == mask).all()
    assert compute_shape_area(Shape("a", runs=runs)) == mask.sum()


@given(st.integers(-6, 12), st.integers(-6, 12))
def test_masks_are_placed_and_cut_off_at_the_edge(left, top):
    mask = np.eye(5, dtype=bool)
    expected = np.zeros((30, 30), np.uint8)
    expected[10 + top : 15 + top, 10 + left : 15 + left] = mask
    label = paint(Shape("a", runs=encode_rle(mask, left, top)), size=(8, 9))
    assert (label == expected[10:19, 10:18]).all()


def test_the_area_of_outlines_is_their_sum():
    assert compute_shape_area(shape("a", box_outline(0, 0, 10, 5), [(0, 0), (4, 0), (0, 4)])) == 58


def test_shapes_are_hashable_and_equal_by_content():
    assert (
        len(
            {
                shape("a", box_outline(0, 0, 1, 1)),
                shape("a", box_outline(0, 0, 1, 1)),
                shape("b", box_outline(0, 0, 1, 1)),
            }
        )
        == 2
    )
    assert hash(Drawing((Shape("a", runs=RunLengths(b"", 0, 0)),), (3, 4)))


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools' own
@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(-20, 240), st.integers(-20, 200)), min_size=3, max_size=9))
def test_pixels_equal_those_of_pycocotools_away_from_outlines(points):
    """pycocotools rounds to fifths of a pixel, so centres near an outline may differ."""
    coco = pytest.importorskip("pycocotools.mask")
    outline = [(x / 5, y / 5) for x, y in points]
    theirs = coco.decode(
        coco.merge(
            coco.frPyObjects([[float(v) for point in outline for v in point]], SIZE[1], SIZE[0])
        )
    ).astype(bool)
    ours = cover(outline)
    near = np.zeros_like(ours)
    rows, columns = np.indices(ours.shape)
    for (x0, y0), (x1, y1) in zip(outline, outline[1:] + outline[:1], strict=True):
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = np.clip(
            ((columns + 0.5 - x0) * (x1 - x0) + (rows + 0.5 - y0) * (y1 - y0)) / length, 0, 1
        )
        near |= (
            np.hypot(columns + 0.5 - x0 - along * (x1 - x0), rows + 0.5 - y0 - along * (y1 - y0))
            < 0.3
        )
    assert (ours == theirs)[~near].all()


@pytest.mark.parametrize(
    "hostile",
    [
        Shape("a", (Ellipse(0.0, 0.0, 9e6, 9e6),) * 70),
        Shape("a", (Line(np.zeros((70, 2)).tobytes(), 10.0),)),
        Shape("a", (pack_outline([(k % 40, k % 2 * 30) for k in range(3000)], "x"),)),
        Shape("a", runs=encode_rle(np.ones((30, 40), bool))),
    ],
)
def test_work_for_one_image_is_limited(hostile, monkeypatch):
    assert paint(hostile).any()
    monkeypatch.setattr(rasterize, "_MAX_WORK", 1000)
    monkeypatch.setattr(rasterize, "_MAX_WORK_PER_PIXEL", 0)
    with pytest.raises(DataError, match="too many or too large shapes for 40x30 pixels"):
        paint(hostile)


def test_too_many_shapes_are_refused_before_any_is_drawn(monkeypatch):
    tiny = Shape("a", (pack_outline(box_outline(0, 0, 1, 1), "x"),) * 40_000)
    monkeypatch.setattr(rasterize, "_draw_outlines", None)
    with pytest.raises(DataError, match="too many or too large shapes for 40x30 pixels"):
        paint(tiny)
