"""Label map -> polygons -> the same label map; rings as rasterio makes them, valid GeoJSON."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from made_inference import UTM, small_label_maps
from scipy import ndimage

from useg.classes import IGNORE, ClassTable
from useg.data.annotations.rasterize import draw_shapes
from useg.data.annotations.shapes import Drawing, Shape, pack_outline
from useg.images.tiff import GeoReference
from useg.inference.polygons import Polygon, count_corners, to_geojson, to_polygons
from useg.scoring.metrics import regions

TABLE = ClassTable(("sky", "road", "car"))
# Holes in holes.
NESTED = (
    np.minimum(*(np.minimum(part, 8 - part) for part in np.indices((9, 9)))).astype(np.uint8) % 3
)


def polygons_to_label(polygons: Iterable[Polygon], size: tuple[int, int]) -> np.ndarray:
    """Draw each polygon as one outline that goes to every hole, around it and back the same way."""
    shapes = []
    for polygon in polygons:
        closed = [np.concatenate([ring, ring[:1]]) for ring in polygon.rings]
        start = closed[0][:1]
        outline = np.concatenate([part for ring in closed for part in (ring, start)])
        shapes.append(Shape(str(polygon.value), (pack_outline(outline, "a polygon"),)))
    table = ClassTable(tuple(str(value) for value in range(IGNORE)))
    return draw_shapes(Drawing(tuple(shapes), size), size, table, "a polygon")


def area(ring: np.ndarray) -> float:
    x, y = ring.T
    return (np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


@given(small_label_maps())
def test_regions_are_those_of_each_class_alone(label: np.ndarray) -> None:
    numbers = regions(label)
    assert (np.unique(numbers, return_index=True)[0] == np.arange(numbers.max() + 1)).all()
    assert (np.diff(np.unique(numbers, return_index=True)[1]) > 0).all(), (
        "in the order of their first pixels"
    )
    for value in np.unique(label):
        theirs, count = ndimage.label(label == value)
        pairs = set(zip(theirs[theirs > 0].tolist(), numbers[theirs > 0].tolist(), strict=True))
        assert len(pairs) == count == len({number for _, number in pairs})


@given(small_label_maps())
def test_polygons_give_the_label_map_back(label: np.ndarray) -> None:
    polygons = to_polygons(label)
    assert (polygons_to_label(polygons, label.shape[::-1]) == label).all()
    assert [polygon.pixels for polygon in polygons] == [
        sum(area(ring) for ring in polygon.rings) for polygon in polygons
    ]


@given(small_label_maps())
def test_corners_are_counted_without_tracing(label: np.ndarray) -> None:
    rings = [ring for polygon in to_polygons(label) for ring in polygon.rings]
    assert count_corners(label) == sum(len(ring) for ring in rings)


@pytest.mark.parametrize(
    "label",
    [
        np.zeros((1, 1), np.uint8),
        np.full((1, 1), IGNORE, np.uint8),
        np.full((3, 4), IGNORE, np.uint8),
        np.full((5, 3), 2, np.uint8),
        np.indices((7, 8)).sum(0).astype(np.uint8) % 2,
        np.where(np.indices((6, 5)).sum(0) % 2, IGNORE, 1).astype(np.uint8),
        NESTED,
        np.arange(255, dtype=np.uint8).reshape(15, 17),
    ],
)
def test_the_smallest_checkerboards_holes_in_holes_and_every_class(label: np.ndarray) -> None:
    polygons = to_polygons(label)
    assert (polygons_to_label(polygons, label.shape[::-1]) == label).all()
    assert len(polygons) == len({*regions(label)[label != IGNORE].tolist()})


@given(small_label_maps())
def test_rings_have_their_region_to_the_right_and_do_not_meet_themselves(label: np.ndarray) -> None:
    for polygon in to_polygons(label):
        assert area(polygon.rings[0]) > 0
        assert all(area(ring) < 0 for ring in polygon.rings[1:])
        for ring in polygon.rings:
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)
            steps = np.roll(ring, -1, 0) - ring
            assert ((steps == 0).sum(1) == 1).all(), "upright edges"
            assert ((steps[:, 0] == 0) != (np.roll(steps, -1, 0)[:, 0] == 0)).all(), (
                "a corner at every point"
            )


def test_a_hole_and_a_notch_that_meet_at_a_corner_stay_apart() -> None:
    (polygon,) = to_polygons(np.uint8([[255, 1, 1], [1, 255, 1], [1, 1, 1]]))
    assert [ring.tolist() for ring in polygon.rings] == [
        [[1, 0], [3, 0], [3, 3], [0, 3], [0, 1], [1, 1]],
        [[1, 2], [2, 2], [2, 1], [1, 1]],
    ]


@given(small_label_maps())
def test_polygons_are_valid_and_equal_those_of_rasterio(label: np.ndarray) -> None:
    features, geometry = (
        pytest.importorskip("rasterio.features"),
        pytest.importorskip("shapely.geometry"),
    )
    theirs = [
        (int(value), geometry.shape(shape))
        for shape, value in features.shapes(label, label != IGNORE, connectivity=4)
    ]
    ours = [
        (feature["properties"]["id"], geometry.shape(feature["geometry"]))
        for feature in geojson(label)["features"]
    ]
    assert all(shape.is_valid for _, shape in ours)
    assert len(ours) == len(theirs)
    for value, shape in ours:
        assert any(value == other and shape.equals(their) for other, their in theirs)


def geojson(label: np.ndarray, place: GeoReference | None = None) -> dict:
    table = ClassTable(tuple(f"class {k}" for k in range(255)))
    return json.loads(json.dumps(to_geojson(to_polygons(label), table, place)))


def test_geojson_in_pixels() -> None:
    content = to_geojson(to_polygons(np.uint8([[1, 1], [2, 255]])), TABLE)
    assert content == {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "properties": {"class": "road", "id": 1, "pixels": 2},
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[0, 0], [2, 0], [2, 1], [0, 1], [0, 0]]],
                },
            },
            {
                "type": "Feature",
                "properties": {"class": "car", "id": 2, "pixels": 1},
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [[[0, 1], [1, 1], [1, 2], [0, 2], [0, 1]]],
                },
            },
        ],
    }


def test_geojson_on_a_map() -> None:
    content = geojson(np.uint8([[0, 0], [2, 0]]), UTM)
    assert content["crs"] == {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
    assert content["features"][1] == {
        "type": "Feature",
        "properties": {"class": "class 2", "id": 2, "pixels": 1, "area": 100.0},
        "geometry": {
            "type": "Polygon",
            "coordinates": [
                [
                    [500_000.0, 4_999_990.0],
                    [500_000.0, 4_999_980.0],
                    [500_010.0, 4_999_980.0],
                    [500_010.0, 4_999_990.0],
                    [500_000.0, 4_999_990.0],
                ]
            ],
        },
    }
    assert "crs" not in geojson(np.uint8([[0]]), GeoReference(UTM.transform))


@pytest.mark.parametrize(
    "transform",
    [
        UTM.transform,
        (2.0, 0.0, 5.0, 0.0, 3.0, 7.0),
        (0.0, 2.0, 0.0, 1.0, 0.0, 0.0),
        (0.6, -0.8, 0.0, 0.8, 0.6, 1.0),
    ],
)
def test_outer_rings_have_positive_area_on_every_map(transform: tuple[float, ...]) -> None:
    place = GeoReference(transform)
    for feature in geojson(NESTED, place)["features"]:
        areas = [area(np.array(ring[:-1])) for ring in feature["geometry"]["coordinates"]]
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
        assert areas[0] > 0
        assert all(value < 0 for value in areas[1:])
        assert sum(areas) == pytest.approx(feature["properties"]["area"])
        assert feature["properties"]["area"] == pytest.approx(
            feature["properties"]["pixels"] * place.pixel_area
        )


def test_map_coordinates_are_rasterio_s() -> None:
    features, geometry = (
        pytest.importorskip("rasterio.features"),
        pytest.importorskip("shapely.geometry"),
    )
    transform = pytest.importorskip("affine").Affine(*UTM.transform)
    theirs = [
        geometry.shape(shape)
        for shape, _ in features.shapes(NESTED, connectivity=4, transform=transform)
    ]
    ours = [geometry.shape(feature["geometry"]) for feature in geojson(NESTED, UTM)["features"]]
    assert len(ours) == len(theirs)
    assert all(any(shape.equals(their) for their in theirs) for shape in ours)


def test_polygons_of_larger_maps() -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(150, 200)), 2)
    label = np.digitize(noise / noise.std(), [-1, 0, 1]).astype(np.uint8)
    polygons = to_polygons(label)
    assert (polygons_to_label(polygons, (200, 150)) == label).all()
    assert sum(polygon.pixels for polygon in polygons) == label.size
