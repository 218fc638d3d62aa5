"""Outputs read back exactly, in useg and in other programs; the label map is written last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from made_inference import BACKGROUND_LABEL as LABEL
from made_inference import BACKGROUND_TABLE as TABLE
from made_inference import UTM, make_model, make_predictor, random_image, rasterio_open

from useg.classes import IGNORE, ClassTable, palette
from useg.errors import UsageError
from useg.images.image_files import read_image, read_mask, read_palette
from useg.images.tiff import GeoReference
from useg.inference import outputs
from useg.inference.outputs import (
    ImagePrediction,
    OutputOptions,
    is_done,
    label_image,
    label_path,
    make_folders,
    write_outputs,
)

EVERYTHING = OutputOptions("tif", True, "uint8", "png", polygons=True, coco=True, areas=True)


def some_probabilities(classes: int = 3, shape: tuple[int, int] = (3, 4)) -> np.ndarray:
    made = np.random.default_rng(0).random((classes, *shape), np.float32) + np.float32(0.1)
    return made / made.sum(0)


def write(
    out: Path,
    wanted: OutputOptions,
    label: np.ndarray = LABEL,
    table: ClassTable = TABLE,
    place: GeoReference | None = None,
    mark: str = "",
) -> Path:
    make_folders(out, wanted)
    image, probabilities = random_image(*label.shape), some_probabilities(len(table), label.shape)
    prediction = ImagePrediction(image, label, probabilities, place)
    return write_outputs(out, "a.b", prediction, table, wanted, mark=mark)


def names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_by_default_label_maps_and_overlays(tmp_path: Path) -> None:
    assert write(tmp_path, OutputOptions()) == tmp_path / "a.b.png"
    assert names(tmp_path) == ["a.b.png", "overlays/a.b.png"]
    assert (read_mask(tmp_path / "a.b.png") == LABEL).all()


def test_label_maps_alone(tmp_path: Path) -> None:
    write(tmp_path, OutputOptions(overlays=False))
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.png"]


def test_all_outputs_are_written(tmp_path: Path) -> None:
    assert (
        write(tmp_path, EVERYTHING)
        == label_path(tmp_path, "a.b", EVERYTHING)
        == tmp_path / "a.b.tif"
    )
    assert names(tmp_path) == [
        "a.b.tif",
        "confidence/a.b.png",
        "overlays/a.b.png",
        "polygons/a.b.geojson",
        "probabilities/a.b.tif",
    ]


@pytest.mark.parametrize("broken", ["write_picture", "_write_bands", "_write_polygons"])
def test_the_label_map_is_written_last(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, EVERYTHING)
    assert not label_path(tmp_path, "a.b", EVERYTHING).exists()
    assert not [name for name in names(tmp_path) if name.split("/")[-1].startswith(".")], (
        "no half file stays behind"
    )


def test_a_tiff_label_map_is_the_same_ids_in_the_classes_colours(tmp_path: Path) -> None:
    label = np.where(LABEL == 0, IGNORE, LABEL).astype(np.uint8)
    target = write(tmp_path, OutputOptions("tif", overlays=False), label)
    assert (read_mask(target) == label).all()
    assert (read_palette(target) == palette(TABLE)).all()
    with tifffile.TiffFile(target) as file:
        assert (file.pages.first.colormap == palette(TABLE).T.astype(int) * 257).all()
    with rasterio_open(target) as opened:
        assert (opened.read(1) == label).all()
        assert opened.colormap(1)[2] == (*TABLE.colors[2], 255)


def test_tiffs_carry_the_map(tmp_path: Path) -> None:
    write(tmp_path, OutputOptions("tif", False, "float16", "tif"), place=UTM)
    for name in ("a.b.tif", "probabilities/a.b.tif", "confidence/a.b.tif"):
        with rasterio_open(tmp_path / name) as opened:
            assert tuple(opened.transform)[:6] == UTM.transform
            assert opened.crs.to_string() == "EPSG:32632"


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("form", ["uint8", "float16"])
def test_probabilities_are_bands_with_names(classes: int, form: str, tmp_path: Path) -> None:
    table = ClassTable(("räder & <wheels>", *(f"class {k}" for k in range(1, classes))))
    write(
        tmp_path,
        OutputOptions(overlays=False, probabilities=form),
        np.zeros((5, 4), np.uint8),
        table,
    )
    expected = some_probabilities(classes, (5, 4))
    expected = (
        np.rint(expected * 255).astype(np.uint8) if form == "uint8" else expected.astype(np.float16)
    )
    path = tmp_path / "probabilities/a.b.tif"
    assert (read_image(path) == expected.transpose(1, 2, 0)).all()
    with tifffile.TiffFile(path) as file:
        assert json.loads(file.pages.first.description) == {
            "bands": list(table.names),
            "one": 255 if form == "uint8" else 1,
        }
    with rasterio_open(path) as opened:
        assert opened.descriptions == table.names
        assert (opened.read() == expected).all()


def test_confidence_is_the_highest_probability(tmp_path: Path) -> None:
    best = some_probabilities().max(0)
    for form in ("png", "tif"):
        write(tmp_path, OutputOptions(overlays=False, confidence=form))
    assert (read_image(tmp_path / "confidence/a.b.tif")[..., 0] == best).all()
    assert (read_image(tmp_path / "confidence/a.b.png")[..., 0] == np.rint(best * 255)).all()


def test_polygons_of_all_but_the_background(tmp_path: Path) -> None:
    write(tmp_path, OutputOptions(polygons=True), place=UTM)
    content = json.loads((tmp_path / "polygons/a.b.geojson").read_text("utf-8"))
    assert [
        (feature["properties"]["class"], feature["properties"]["area"])
        for feature in content["features"]
    ] == [
        ('räder & "wheels" <5', 400.0),
        ("car", 200.0),
        ("car", 100.0),
    ]
    rasterio = pytest.importorskip("rasterio.features")
    shapes = [(feature["geometry"], feature["properties"]["id"]) for feature in content["features"]]
    affine = pytest.importorskip("affine")
    assert (
        rasterio.rasterize(shapes, LABEL.shape, transform=affine.Affine(*UTM.transform)) == LABEL
    ).all()


def test_small_regions_and_holes_are_removed_in_all_outputs(tmp_path: Path) -> None:
    label = np.zeros((6, 6), np.uint8)
    label[2, 2], label[0, 0] = 2, 1

    def write_cleaned(wanted: OutputOptions) -> None:
        predictor: Any = lambda image: label.copy()  # noqa: E731
        write(tmp_path, wanted, label_image(predictor, np.zeros((6, 6, 3), np.uint8), wanted).label)

    write_cleaned(OutputOptions("png", polygons=True, max_hole=2))
    assert np.unique(read_mask(tmp_path / "a.b.png")).tolist() == [0, 1]
    write_cleaned(OutputOptions("png", polygons=True, min_region=2))
    assert np.unique(read_mask(tmp_path / "a.b.png")).tolist() == [0]
    assert json.loads((tmp_path / "polygons/a.b.geojson").read_text())["features"] == []


@pytest.mark.parametrize("form", ["png", "tif"])
def test_an_image_is_done_if_its_label_map_has_the_mark(form: str, tmp_path: Path) -> None:
    target = write(tmp_path, OutputOptions(form), mark="model 1")
    assert is_done(target, "model 1")
    assert not is_done(target, "model 2")
    assert not is_done(target, "model")
    assert not is_done(target, "")
    assert not is_done(tmp_path / f"other.{form}", "model 1")
    target.write_bytes(b"II*\0broken")
    assert not is_done(target, "model 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "jpg"}, "the format of label maps 'jpg' is not known; choose one of png, tif"),
        (
            {"probabilities": "unit8"},
            "the format of probabilities 'unit8' is not known; choose one of float16, uint8; "
            "did you mean 'uint8'?",
        ),
        ({"confidence": "x"}, "the format of confidence maps 'x' is not known; choose one of png"),
        ({"min_region": -1}, "min_region is -1 pixels, but it cannot be negative; 0 leaves label"),
        ({"max_hole": -1}, "max_hole is -1 pixels, but it cannot be negative; 0 leaves label maps"),
    ],
)
def test_unknown_formats_and_negative_sizes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        OutputOptions(**options)
    assert str(raised.value).startswith(message)


def test_probabilities_are_computed_when_they_are_needed(tmp_path: Path) -> None:
    predictor, image = make_predictor(make_model()), random_image(20, 30)
    plain = label_image(predictor, image, OutputOptions())
    assert plain.probabilities is plain.objects is None
    same = label_image(predictor, image, OutputOptions(confidence="png"))
    assert (plain.label == same.label).all()
    assert (plain.label == predictor(image)).all()
    assert (same.probabilities == predictor.probabilities(image)).all()


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "confidence").write_text("a file")
    with pytest.raises(UsageError, match="confidence cannot be written"):
        make_folders(tmp_path, OutputOptions(confidence="png"))


def test_of_each_ignores_the_summaries() -> None:
    assert (
        OutputOptions(coco=True).of_each
        == OutputOptions(areas=True).of_each
        == OutputOptions().of_each
    )
    assert (
        len(
            {
                wanted.of_each
                for wanted in (
                    OutputOptions(),
                    OutputOptions("tif"),
                    OutputOptions(polygons=True),
                    OutputOptions(min_region=2),
                )
            }
        )
        == 4
    )
