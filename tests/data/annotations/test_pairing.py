"""Annotation files find their images; what cannot be read is skipped with its reason."""

import numpy as np
import PIL.Image
import pytest
from made_annotations import (
    BOX,
    CORNERS,
    SIZE,
    coco,
    expect_block,
    images_and_splits,
    labelme,
    read_first_label,
    write_file,
    write_photo,
)

from useg.classes import IGNORE, ClassTable, write_classes
from useg.data.dataset import Dataset
from useg.data.layouts import find_dataset
from useg.doctor.survey import survey_dataset
from useg.errors import DataError


def test_the_name_of_an_annotation_file_gives_the_split(tmp_path):
    for split in ("train", "val"):
        write_photo(tmp_path / "images" / f"{split}_1.jpg")
        write_file(
            tmp_path / f"{split}.json",
            coco({"category_id": 3, "segmentation": [BOX]}, names=(f"{split}_1.jpg",)),
        )
    assert images_and_splits(find_dataset(tmp_path)) == [
        ("images/train_1.jpg", "train"),
        ("images/val_1.jpg", "val"),
    ]


def test_coco_images_are_found_in_sub_folders_but_not_outside(tmp_path):
    write_photo(tmp_path / "secret.jpg")
    data = tmp_path / "data"
    write_photo(data / "photos" / "north" / "a.jpg")
    write_photo(data / "photos" / "south" / "a.jpg")
    annotation = {"category_id": 3, "segmentation": [BOX]}
    write_file(data / "x.json", coco(annotation, names=("north/a.jpg", "C:\\data\\south\\a.jpg")))
    assert images_and_splits(find_dataset(data)) == [
        ("photos/north/a.jpg", ""),
        ("photos/south/a.jpg", ""),
    ]
    write_file(data / "x.json", coco(annotation, names=("a.jpg",)))
    with pytest.raises(
        DataError,
        match=(
            r"x.json' names the image 'a.jpg', which could be '.*north/a.jpg' or "
            r"'.*south/a.jpg'; give the images different names"
        ),
    ):
        find_dataset(data)
    write_file(data / "x.json", coco(annotation, names=("../secret.jpg",)))
    with pytest.raises(
        DataError,
        match=(
            r"x.json' names images such as '../secret.jpg', but '.*data' has none of them; put "
            r"them there, or write a dataset.toml"
        ),
    ):
        find_dataset(data)
    write_file(data / "x.json", coco(annotation, names=("north/a.jpg", "gone.jpg")))
    with pytest.raises(
        DataError, match=r"1 mask without an image \(1 pairs are complete\): '.*x.json#gone.jpg'"
    ):
        find_dataset(data)
    assert [path.name for path in find_dataset(data, strict=False).masks] == ["x.json#gone.jpg"]


def test_dataset_toml_may_name_annotation_files_and_images_elsewhere(tmp_path):
    write_photo(tmp_path / "photos" / "a.jpg")
    write_file(tmp_path / "truth" / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    write_file(
        tmp_path / "truth" / "dataset.toml", 'images = "../photos/*.jpg"\nmasks = "x.json"\n'
    )
    dataset = find_dataset(tmp_path / "truth")
    assert (dataset.layout, read_first_label(dataset).max()) == ("dataset.toml", 1)
    write_file(tmp_path / "truth" / "x.json", {"hello": "world"})
    with pytest.raises(
        DataError,
        match=(
            r"dataset.toml: '.*x.json' is not an annotation file of COCO, CVAT, LabelMe, Label "
            r"Studio, Supervisely or VIA; choose such a file, or masks"
        ),
    ):
        find_dataset(tmp_path / "truth")
    write_file(tmp_path / "truth" / "a.txt", "1 .1 .1 .6 .1 .6 .9")
    write_file(tmp_path / "truth" / "dataset.toml", 'images = "../photos/*.jpg"\nmasks = "*.txt"\n')
    assert find_dataset(tmp_path / "truth").classes.names == ("background", "class 0", "class 1")


def test_dataset_toml_may_ignore_annotated_classes(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    for ignore in ('["car"]', "[1]"):
        write_file(tmp_path / "dataset.toml", f"ignore = {ignore}")
        assert find_dataset(tmp_path).classes.names == ("background", "toothbrush")
        assert (read_first_label(find_dataset(tmp_path)) == expect_block(IGNORE)).all()
    write_file(tmp_path / "dataset.toml", 'ignore = ["carr"]')
    with pytest.raises(
        DataError,
        match=(
            r"dataset.toml ignores the class 'carr', but the classes are background, car, "
            r"toothbrush; did you mean 'car'"
        ),
    ):
        find_dataset(tmp_path)


def test_classes_toml_orders_annotated_classes_and_may_omit_the_background(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    write_classes(tmp_path / "classes.toml", ClassTable(("toothbrush", "car")))
    assert read_first_label(find_dataset(tmp_path))[2, 3] == 1
    assert read_first_label(find_dataset(tmp_path))[9, 0] == IGNORE
    assert (
        read_first_label(find_dataset(tmp_path, ClassTable(("car", "background"))))[2, 3] == 0
    )  # a model's
    with pytest.raises(
        DataError,
        match=(
            r"x.json' \(a.jpg\) has a shape of the class 'car', but the 2 classes are "
            r"background, cat"
        ),
    ):
        read_first_label(find_dataset(tmp_path, ClassTable(("background", "cat"))))


def test_an_image_that_is_annotated_twice_is_refused(tmp_path):
    write_photo(tmp_path / "a.jpg")
    for name in "xy":
        write_file(tmp_path / f"{name}.json", coco({"category_id": 3, "segmentation": [BOX]}))
    assert find_dataset(tmp_path).layout == "coco"
    write_file(tmp_path / "y.json", coco({"category_id": 90, "segmentation": [BOX]}))
    with pytest.raises(
        DataError,
        match=r"a.jpg' is annotated twice, in '.*x.json' and in '.*y.json'; keep one of them",
    ):
        find_dataset(tmp_path)


def test_files_that_are_no_annotations_are_skipped(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "package.json", {"name": "x"})
    write_file(tmp_path / "list.json", [1, 2])
    write_file(tmp_path / "pom.xml", "<project/>")
    write_file(tmp_path / "._a.json", "mac")
    with pytest.raises(
        DataError,
        match=(
            r"It has 1 image and no sub-folders, 2 .json files, 1 .xml file. It recognises .* "
            r"annotation files of COCO"
        ),
    ):
        find_dataset(tmp_path)


def test_annotations_without_images_are_refused(tmp_path):
    write_file(tmp_path / "x.json", coco())
    with pytest.raises(
        DataError,
        match=(
            r"It has 0 images and no sub-folders, 1 .json file. Put the images of "
            r"'.*x.json' there too"
        ),
    ):
        find_dataset(tmp_path)


def test_masks_win_over_annotation_files(tmp_path):
    write_photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    PIL.Image.fromarray(np.eye(10, 12, dtype=np.uint8)).save(tmp_path / "masks" / "a.png")
    write_file(tmp_path / "x.json", "{")
    assert find_dataset(tmp_path).layout == "folders"


def reasons(dataset: Dataset) -> list[str]:
    return [passed.reason for passed in dataset.skipped]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("damaged.json", "{", "is not valid JSON"),
        ("bad.json", {"images": 3, "annotations": [], "categories": []}, "is not valid COCO"),
        ("bomb.xml", "<!DOCTYPE x [<!ENTITY a 'aaa'>]><x>&a;</x>", "declares a document type"),
        ("video.xml", "<annotations><track/></annotations>", "the format 'CVAT for video'"),
        (
            "boxes.xml",
            "<annotation><object><bndbox/></object></annotation>",
            "the format of Pascal VOC for detection",
        ),
        ("b.json", {"asset": {}, "regions": []}, "the format VoTT, which useg does not read"),
        ("x.geojson.json", {"type": "FeatureCollection", "features": []}, "the format GeoJSON"),
        ("results.json", [{"image_id": 1, "category_id": 3}], "the format COCO's results"),
        ("a___objects.json", {"metadata": {}, "instances": []}, "the format SuperAnnotate"),
        ("kili.json", [{"externalId": "a", "jsonResponse": {}}], "the format Kili"),
        ("dl.json", {"filename": "/a.jpg", "annotations": []}, "the format Dataloop"),
        ("tasks.json", [{"task_id": "1", "response": {}}], "the format Scale"),
        ("sa_1.json", {"image": {}, "annotations": []}, "the format Segment Anything"),
    ],
)
def test_a_foreign_file_is_skipped_with_its_reason(tmp_path, name, content, reason):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    write_file(tmp_path / name, content)
    dataset = find_dataset(tmp_path)
    assert (read_first_label(dataset) == expect_block(1)).all()
    (passed,) = dataset.skipped
    assert passed.file.name == name
    assert reason in passed.reason
    assert passed.reason.count("; ")
    # Alone, its reason is the error.
    (tmp_path / "x.json").unlink()
    with pytest.raises(DataError, match=reason):
        find_dataset(tmp_path)


def test_a_bad_shape_is_skipped_and_an_image_that_had_no_other_is_left_out(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_photo(tmp_path / "b.jpg")
    bad = {"category_id": 90, "segmentation": [[1, 2, 3]]}
    content = coco(
        {"category_id": 3, "segmentation": [BOX]}, bad, {**bad, "image_id": 8},
        names=("a.jpg", "b.jpg"),
    )  # fmt: skip
    write_file(tmp_path / "x.json", content)
    dataset = find_dataset(tmp_path)
    assert images_and_splits(dataset) == [("a.jpg", "")]
    assert (read_first_label(dataset) == expect_block(1)).all()
    assert len(reasons(dataset)) == 2
    assert all("an odd number of coordinates" in reason for reason in reasons(dataset))


def test_the_files_of_one_format_are_read_and_those_of_others_named(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "a.json", labelme({"points": CORNERS}))
    write_file(tmp_path / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "coco"
    assert "1 image in labelme files" in reasons(dataset)[0]


def test_panoptic_files_are_read_or_skipped(tmp_path):
    write_photo(tmp_path / "val2017" / "a.jpg")
    numbers = np.full(SIZE[::-1], 5_000_300, np.uint32)
    numbers[1:5, 2:6] = 70_000
    colors = np.stack([numbers >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
    (tmp_path / "annotations" / "panoptic_val2017").mkdir(parents=True)
    PIL.Image.fromarray(colors).save(tmp_path / "annotations" / "panoptic_val2017" / "a.png")
    segments = [{"id": 5_000_300, "category_id": 90}, {"id": 70_000, "category_id": 3}]
    content = coco()
    content["annotations"] = [{"image_id": 7, "file_name": "a.png", "segments_info": segments}]
    write_file(tmp_path / "annotations" / "panoptic_val2017.json", content)
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes.names[1:]) == ("coco panoptic", ("car", "toothbrush"))
    assert images_and_splits(dataset) == [("val2017/a.jpg", "val")]
    expected = expect_block(1)
    expected[expected == 0] = 2
    assert (read_first_label(dataset) == expected).all()


def test_inspect_lists_what_was_skipped_and_counts_it(tmp_path):
    for name in "abcd":
        write_photo(tmp_path / f"{name}.jpg")
        write_file(tmp_path / f"{name}.json", labelme({"points": CORNERS}, image=f"{name}.jpg"))
    write_file(tmp_path / "d.json", "{")
    survey = survey_dataset(find_dataset(tmp_path, strict=False))
    assert "skipped  1 annotation file or part of one" in survey.lines()
    assert survey.as_dict()["num_passed_over"] == 1
    (finding,) = (each for each in survey.findings if each.kind == "passed over")
    assert finding.severity == "warning"
    assert finding.message.startswith("'d.json' is not valid JSON")
    assert finding.remedy == "save or copy it again, or remove it"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.json", "[" + "[]," * 2_000_000 + "1]", "2,000,001 nested items in 6,000,003 bytes"),
        ("x.xml", "<a>" + "<b/>" * 1_500_000 + "</a>", "nested items in 6,000,007 bytes"),
        ("x.json", "[" * 100_000, "is not valid JSON"),
        ("x.json", '{"imagePath": [' + "[1, 2], " * 500_000 + "0]}", "500,002 points and other"),
        ("x.xml", "<a>" + "<Vertex X='1'/>" * 500_000 + "</a>", "500,002 points and other"),
    ],
)
def test_items_that_would_fill_the_memory_are_not_parsed(tmp_path, name, content, reason):
    write_photo(tmp_path / "a.jpg")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        find_dataset(tmp_path)


def test_a_declared_size_is_compared_with_the_picture_before_masks_are_made(tmp_path):
    write_photo(tmp_path / "a.jpg")
    runs = {"size": [17_000, 17_000], "counts": [0, 289_000_000]}
    images = [{"id": 7, "file_name": "a.jpg", "width": 17_000, "height": 17_000}]
    content = coco({"category_id": 3, "segmentation": runs}, images=images)
    write_file(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=r"declares 17000x17000 pixels .* which has 12x10"):
        find_dataset(tmp_path)
