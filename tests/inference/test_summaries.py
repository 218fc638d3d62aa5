"""One COCO file and one table of areas for a whole job, whichever process wrote label maps."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from made_inference import BACKGROUND_LABEL as LABEL
from made_inference import BACKGROUND_TABLE as TABLE
from made_inference import UTM, small_label_maps

from useg.classes import IGNORE
from useg.data.annotations.formats import Reading
from useg.data.annotations.interchange import read_coco
from useg.data.annotations.rasterize import draw_shapes
from useg.data.annotations.shapes import compress_rle, decompress_rle
from useg.errors import DataError
from useg.images.image_files import write_label
from useg.inference import summaries
from useg.inference.outputs import OutputOptions
from useg.inference.summaries import (
    LabelledImage,
    _object_annotations,
    coco_annotations,
    write_summaries,
)
from useg.objects.table import write_object_map, write_objects_csv
from useg.ownership import OBJECTS_HEADER
from useg.scoring.metrics import regions


@given(st.lists(st.integers(0, 2**33), min_size=1, max_size=9))
def test_run_lengths_survive_compression(lengths: list[int]) -> None:
    assert decompress_rle(compress_rle(np.array(lengths))).tolist() == lengths


@given(small_label_maps())
def test_annotations_are_those_of_coco_s_own_tools(label: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    numbers = regions(label)
    expected = []
    for number in range(numbers.max() + 1):
        mask = numbers == number
        value = int(label[mask][0])
        if value not in (0, IGNORE):
            runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            segmentation = {"size": list(mask.shape), "counts": runs["counts"].decode()}
            box = [int(side) for side in coco.toBbox(runs)]
            expected.append(
                {
                    "category_id": value,
                    "segmentation": segmentation,
                    "area": int(coco.area(runs)),
                    "bbox": box,
                    "iscrowd": 0,
                }
            )
    found = coco_annotations(label, background=0)
    assert sorted(found, key=json.dumps) == sorted(expected, key=json.dumps)


def write_labels(folder: Path) -> tuple[list[LabelledImage], list[np.ndarray]]:
    labels = [LABEL, LABEL[::-1].copy(), np.full((2, 2), IGNORE, np.uint8)]
    images = [
        LabelledImage(k, folder / "in" / name, folder / f"{name[0]}.png", name)
        for k, name in enumerate(("a.tif", "b.jpg", "c.tif"), 1)
    ]
    (folder / "in").mkdir()
    for image, label in zip(images, labels, strict=True):
        write_label(image.label, label, TABLE)
        tags = UTM.tags if image.name == "a.tif" else ()
        tifffile.imwrite(image.image, label, extratags=tags)
    return images, labels


def test_coco_gives_the_label_maps_back(tmp_path: Path) -> None:
    images, labels = write_labels(tmp_path)
    assert write_summaries(tmp_path, images, TABLE, OutputOptions(coco=True)) == [
        tmp_path / "coco.json"
    ]
    content = json.loads((tmp_path / "coco.json").read_text("utf-8"))
    assert content["images"][2] == {"id": 3, "file_name": "c.tif", "width": 2, "height": 2}
    assert [(entry["id"], entry["name"]) for entry in content["categories"]] == list(
        enumerate(TABLE.names)
    )
    assert [entry["id"] for entry in content["annotations"]] == list(range(1, 7))
    reading = Reading(tmp_path, [each.image for each in images])
    entries = read_coco(tmp_path / "coco.json", content, reading).entries
    for entry, label in zip(entries, labels, strict=True):
        assert (
            draw_shapes(entry.drawing, label.shape[::-1], TABLE, "x")
            == np.where(label == IGNORE, 0, label)
        ).all()


# pycocotools causes the warning itself.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_coco_s_own_tools_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    images, labels = write_labels(tmp_path)
    write_summaries(tmp_path, images, TABLE, OutputOptions(coco=True))
    opened = coco.COCO(tmp_path / "coco.json")
    for image, label in enumerate(labels, 1):
        painted = np.zeros(label.shape, np.uint8)
        for annotation in opened.loadAnns(opened.getAnnIds(image)):
            painted[opened.annToMask(annotation) == 1] = annotation["category_id"]
        assert (painted == np.where(label == IGNORE, 0, label)).all()


def test_areas_are_those_of_the_label_maps(tmp_path: Path) -> None:
    images, _ = write_labels(tmp_path)
    assert write_summaries(tmp_path, images, TABLE, OutputOptions(areas=True)) == [
        tmp_path / "areas.csv"
    ]
    lines = list(csv.reader((tmp_path / "areas.csv").read_text("utf-8").splitlines()))
    assert lines[:5] == [
        ["image", "class", "pixels", "share", "area"],
        ["a.tif", "background", "5", "0.416667", "500.0"],
        ["a.tif", TABLE.names[1], "4", "0.333333", "400.0"],
        ["a.tif", "car", "3", "0.250000", "300.0"],
        ["b.jpg", "background", "5", "0.416667", ""],
    ]
    assert lines[9] == ["c.tif", "car", "0", "0.000000", ""]
    write_summaries(tmp_path, images[1:], TABLE, OutputOptions(areas=True))
    assert (
        (tmp_path / "areas.csv")
        .read_text()
        .startswith("image,class,pixels,share\nb.jpg,background,5,0.416667\n")
    )


def test_summaries_cover_existing_label_maps_only(tmp_path: Path) -> None:
    images, _ = write_labels(tmp_path)
    both = OutputOptions(coco=True, areas=True)
    whole = [path.read_bytes() for path in write_summaries(tmp_path, images, TABLE, both)]
    (tmp_path / "b.png").rename(tmp_path / "elsewhere.png")
    write_summaries(tmp_path, images, TABLE, both)
    assert [
        image["id"] for image in json.loads((tmp_path / "coco.json").read_text())["images"]
    ] == [1, 3], "numbers are of the whole job"
    assert b"b.jpg" not in (tmp_path / "areas.csv").read_bytes()
    (tmp_path / "elsewhere.png").rename(tmp_path / "b.png")
    assert [path.read_bytes() for path in write_summaries(tmp_path, images, TABLE, both)] == whole
    write_summaries(tmp_path, images, TABLE, both, done=lambda each: each.image.suffix == ".tif")
    assert b"b.jpg" not in (tmp_path / "areas.csv").read_bytes()
    assert write_summaries(tmp_path, images, TABLE, OutputOptions()) == []
    assert write_summaries(tmp_path, images, TABLE, both, done=lambda each: False) == []


def test_the_last_writer_of_a_summary_includes_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = write_labels(tmp_path)
    whole = [
        path.read_bytes()
        for path in write_summaries(tmp_path, images, TABLE, OutputOptions(areas=True))
    ]
    (tmp_path / "b.png").rename(tmp_path / "elsewhere.png")
    write = summaries.write_areas

    def write_while_another_comes(*arguments: Any) -> None:
        write(*arguments)
        if not (tmp_path / "b.png").exists():
            (tmp_path / "elsewhere.png").rename(tmp_path / "b.png")

    monkeypatch.setattr(summaries, "write_areas", write_while_another_comes)
    assert [
        path.read_bytes()
        for path in write_summaries(tmp_path, images, TABLE, OutputOptions(areas=True))
    ] == whole


def write_objects(folder: Path) -> LabelledImage:
    """Write the label map, the object map and the table of an image with two objects."""
    numbers = np.zeros((20, 30), np.uint8)
    numbers[2:6, 3:9], numbers[10:15, 4:8] = 1, 2
    (folder / "objects").mkdir()
    write_label(folder / "a.png", (numbers > 0).astype(np.uint8), TABLE)
    write_object_map(folder / "objects" / "a.tif", numbers, (20, 30), 2, None)
    cells = [",".join(OBJECTS_HEADER)]
    for number, pixels in ((1, 24), (2, 20)):
        cells.append(f"a.png,{number},{TABLE.names[1]},{pixels},5,4,3,2,6,4,0.5,0,")
    (folder / "objects" / "a.csv").write_text("\n".join(cells) + "\n")
    return LabelledImage(1, Path("a.png"), folder / "a.png", "a.png")


def test_objects_of_a_map_and_a_table_are_annotations(tmp_path: Path) -> None:
    entry = write_objects(tmp_path)
    found = _object_annotations(tmp_path / "objects", entry, TABLE)
    assert [(each["area"], each["score"]) for each in found] == [(24, 0.5), (20, 0.5)]


BAD_TABLES = {
    "a missing row": lambda text: text[: text.rindex("a.png")],
    "another class": lambda text: text.replace(f",{TABLE.names[1]},", ",nothing,"),
    "too many cells": lambda text: text.replace("0.5,0,", "0.5,0,,"),
    "too few cells": lambda text: text.replace("0.5,0,", "0.5,0"),
    "a formula for a number": lambda text: text.replace(",24,", ",=1+1,"),
    "no finite number": lambda text: text.replace("0.5", "nan"),
    "another header": lambda text: text.replace("pixels", "dots"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_of_objects_that_useg_did_not_write_so_are_refused(
    name: str, tmp_path: Path
) -> None:
    entry = write_objects(tmp_path)
    table = tmp_path / "objects" / "a.csv"
    table.write_text(BAD_TABLES[name](table.read_text()))
    with pytest.raises(DataError, match=r"is not a table of objects|are not those of 'a\.csv'"):
        _object_annotations(tmp_path / "objects", entry, TABLE)


def test_formulas_in_a_table_of_objects_are_escaped(tmp_path: Path) -> None:
    write_objects(tmp_path)
    table = tmp_path / "objects" / "a.csv"
    table.write_text(table.read_text().replace("a.png,1", "=cmd,1"))
    write_objects_csv(tmp_path / "objects.csv", [table])
    lines = (tmp_path / "objects.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["image", "'=cmd", "a.png"]


def test_a_map_of_objects_is_read_like_every_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = write_objects(tmp_path)
    place = tmp_path / "objects" / "a.tif"
    # tifffile alone believes what the description declares.
    monkeypatch.setattr(tifffile, "imread", lambda *_: pytest.fail("it was believed"))
    tifffile.imwrite(place, np.zeros((20, 31), np.uint16), metadata=None, software="useg")
    with pytest.raises(DataError, match="are not those of"):
        _object_annotations(tmp_path / "objects", entry, TABLE)
    place.write_bytes(place.read_bytes()[:40])
    with pytest.raises(DataError, match="delete it and label the image again"):
        _object_annotations(tmp_path / "objects", entry, TABLE)
