"""YOLO's outlines in their published structure become label maps; broken ones are refused."""

import pytest
from made_annotations import (
    OUTLINE,
    expect_block,
    images_and_splits,
    read_first_label,
    write_file,
    write_photo,
    yolo,
)

from useg.data.layouts import find_dataset
from useg.errors import DataError


def test_yolo_is_read_as_ultralytics_writes_it(tmp_path):
    dataset = find_dataset(yolo(tmp_path))
    assert (dataset.layout, dataset.classes.names) == ("yolo", ("background", "cat", "dog"))
    assert images_and_splits(dataset) == [
        ("images/train/a.jpg", "train"),
        ("images/val/a.jpg", "val"),
    ]
    assert (read_first_label(dataset) == expect_block(2, 1, 3, 5, 9)).all()


def test_yolo_is_read_as_roboflow_exports_it_with_unlabelled_images(tmp_path):
    for split in ("train", "valid"):
        write_photo(tmp_path / split / "images" / "a.jpg")
        write_photo(tmp_path / split / "images" / "empty.jpg")
        write_file(tmp_path / split / "labels" / "a.txt", f"0 {OUTLINE}\n\n0 {OUTLINE}")
    write_photo(tmp_path / "test" / "images" / "unknown.jpg")
    write_file(tmp_path / "data.yaml", "names: ['cat']")
    dataset = find_dataset(tmp_path)
    assert images_and_splits(dataset) == [
        (f"{folder}/images/{name}.jpg", split)
        for folder, split in (("train", "train"), ("valid", "val"))
        for name in ("a", "empty")
    ]
    assert not read_first_label(dataset, 1).any()


def test_yolo_classes_without_names_are_numbered(tmp_path):
    dataset = find_dataset(yolo(tmp_path, yaml=""))
    assert dataset.classes.names == ("background", "class 0", "class 1")
    write_file(tmp_path / "classes.txt", "tree\nbush\n")
    assert find_dataset(tmp_path).classes.names == ("background", "tree", "bush")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "0 0.5 0.5 0.2 0.2",
            "a.txt' line 1 has five numbers, which are a box and not an outline; export the "
            "labels for segmentation",
        ),
        (
            "0 0.5 0.5 0.2 0.2 0.1",
            "line 1 is not 'class x y x y x y ...' with a class number and at least three points; "
            "correct or remove it",
        ),
        ("0 0 0 1 0 1 1 0.5", "line 1 is not 'class x y"),
        ("-1 0 0 1 0 1 1", "line 1 is not 'class x y"),
        ("x 0 0 1 0 1 1", "line 1 is not 'class x y"),
        ("0 0 0 1 0 1 nan", "line 1 has a shape with a coordinate that is NaN or infinite"),
        ("0 0 0 1 0 1 y", "line 1 has a shape whose points are not pairs of numbers"),
        (
            "2 0 0 1 0 1 1",
            "a.txt' has the class 2, but only 0 to 1 are named; add its name, or correct the "
            "number",
        ),
        ("", "no image in '.*' has a shape in its yolo file"),
    ],
)
def test_a_broken_yolo_file_is_refused(tmp_path, line, sentence):
    with pytest.raises(DataError, match=sentence):
        find_dataset(yolo(tmp_path, line))


def test_a_yolo_file_that_is_not_text_is_passed_over_with_its_image(tmp_path):
    yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe\x00")
    dataset = find_dataset(tmp_path)
    assert images_and_splits(dataset) == [("images/val/a.jpg", "val")]
    assert "a.txt' cannot be read as text" in dataset.passed_over[0].reason
