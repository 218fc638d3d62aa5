"""COCO and YOLO files in their published structure become label maps; broken ones are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_annotations import (
    BOX,
    OUTLINE,
    SIZE,
    coco,
    coco_compress,
    expect_block,
    images_and_splits,
    read_first_label,
    write_file,
    write_photo,
    yolo,
)

from useg.classes import IGNORE
from useg.data.annotations import formats
from useg.data.annotations.shapes import decompress_rle, encode_rle
from useg.data.dataset import read_label
from useg.data.layouts import find_dataset
from useg.errors import DataError


def test_coco_is_read_as_published(tmp_path):
    for split in ("train", "val"):
        name = f"{split}.jpg"
        write_photo(tmp_path / f"{split}2017" / name)
        write_file(
            tmp_path / f"annotations/instances_{split}2017.json",
            coco({"category_id": 90, "segmentation": [BOX]}, names=(name,)),
        )
        write_file(
            tmp_path / f"annotations/captions_{split}2017.json", {"images": [], "annotations": []}
        )
        write_file(
            tmp_path / f"annotations/person_keypoints_{split}2017.json",
            coco({"category_id": 3, "segmentation": [BOX]}, names=(name,)),
        )
    write_photo(tmp_path / "test2017" / "1.jpg")
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.splits_by, dataset.classes.names) == (
        "coco",
        "official",
        ("background", "car", "toothbrush"),
    )
    assert images_and_splits(dataset) == [
        ("train2017/train.jpg", "train"),
        ("val2017/val.jpg", "val"),
    ]
    assert (read_first_label(dataset) == expect_block(2)).all()


def test_coco_is_read_as_roboflow_exports_it(tmp_path):
    for split in ("train", "valid", "test"):
        write_photo(tmp_path / split / "a.jpg")
        write_file(
            tmp_path / split / "_annotations.coco.json",
            coco({"category_id": 3, "segmentation": [BOX]}),
        )
    assert images_and_splits(find_dataset(tmp_path)) == [
        ("test/a.jpg", "test"),
        ("train/a.jpg", "train"),
        ("valid/a.jpg", "val"),
    ]


def test_lvis_names_images_by_address(tmp_path):
    write_photo(tmp_path / "train2017" / "a.jpg")
    content = coco({"category_id": 3, "segmentation": [BOX]})
    content["images"] = [{"id": 7, "coco_url": "http://images.example/train2017/a.jpg"}]
    write_file(tmp_path / "lvis_v1_train.json", content)
    assert images_and_splits(find_dataset(tmp_path))[0][0] == "train2017/a.jpg"


def test_coco_masks_and_crowds_are_read_compressed_or_not(tmp_path):
    write_photo(tmp_path / "images" / "a.jpg")
    mask = np.zeros(SIZE[::-1], bool)
    mask[1:5, 2:6] = True
    lengths = np.frombuffer(encode_rle(mask, by_columns=True).lengths, np.uint32).tolist()
    assert lengths[:3] == [21, 4, 6]
    for counts in (lengths, coco_compress(lengths)):
        annotation = {
            "category_id": 3,
            "iscrowd": 1,
            "segmentation": {"size": [SIZE[1], SIZE[0]], "counts": counts},
        }
        write_file(tmp_path / "annotations.json", coco(annotation))
        assert (read_first_label(find_dataset(tmp_path)) == expect_block(1)).all()


@given(
    arrays.arrays(
        bool,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.booleans(),
        fill=st.booleans(),
    )
)
def test_compressed_run_lengths_are_reversed(mask):
    lengths = np.frombuffer(encode_rle(mask, by_columns=True).lengths, np.uint32).tolist()
    assert decompress_rle(coco_compress(lengths)).tolist() == lengths


def test_compressed_run_lengths_equal_those_of_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0.001, 0.03, 0.5, 0.97):
        mask = np.asfortranarray(rng.random((150, 200)) < density).astype(np.uint8)
        lengths = np.frombuffer(
            encode_rle(mask.astype(bool), by_columns=True).lengths, np.uint32
        ).tolist()
        text = tools.encode(np.asfortranarray(mask))["counts"].decode()
        assert decompress_rle(text).tolist() == lengths
        assert coco_compress(lengths) == text


def test_coco_paints_small_shapes_over_large_ones_and_later_over_earlier_ones(tmp_path):
    write_photo(tmp_path / "a.jpg")
    small, large = [3, 2, 5, 2, 5, 4, 3, 4], [0, 0, 12, 0, 12, 10, 0, 10]
    write_file(
        tmp_path / "x.json",
        coco(
            {"category_id": 3, "segmentation": [small]},
            {"category_id": 90, "segmentation": [large]},
        ),
    )
    assert (read_first_label(find_dataset(tmp_path))[[2, 0], [3, 0]] == [1, 2]).all()
    write_file(
        tmp_path / "x.json",
        coco(
            {"category_id": 3, "segmentation": [small]},
            {"category_id": 90, "segmentation": [small]},
        ),
    )
    assert read_first_label(find_dataset(tmp_path))[2, 3] == 2


def test_coco_outlines_may_be_empty_short_several_or_flat(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_photo(tmp_path / "b.jpg")
    flat, two, several = (
        {"segmentation": BOX},
        {"segmentation": [[1, 1, 2, 2], BOX]},
        {"segmentation": [BOX, [8, 6, 10, 6, 10, 8, 8, 8]]},
    )
    for annotation in (flat, two, several):
        write_file(
            tmp_path / "x.json",
            coco(
                {"category_id": 3, **annotation},
                {"category_id": 3, "segmentation": []},
                names=("a.jpg", "b.jpg"),
            ),
        )
        dataset = find_dataset(tmp_path)
        label = read_first_label(dataset)
        assert (label[1:6] == expect_block(1)[1:6]).all()
        # The box of the annotation without an outline.
        assert label[0].tolist() == [IGNORE] + 11 * [0]
        assert "1 annotation without an outline" in dataset.skipped[0].reason
        assert not read_first_label(dataset, 1).any()
    write_file(
        tmp_path / "x.json",
        coco({"category_id": 3, "segmentation": [[-5, -5, 50, -5, 50, 50, -5, 50]]}),
    )
    assert (read_first_label(find_dataset(tmp_path)) == 1).all()


def test_coco_sizes_may_be_missing_but_not_wrong(tmp_path):
    write_photo(tmp_path / "a.jpg")
    content = coco({"category_id": 3, "segmentation": [BOX]})
    write_file(tmp_path / "x.json", content | {"images": [{"id": 7, "file_name": "a.jpg"}]})
    assert (read_first_label(find_dataset(tmp_path)) == expect_block(1)).all()
    write_file(
        tmp_path / "x.json",
        content | {"images": [{"id": 7, "file_name": "a.jpg", "width": 10, "height": 12}]},
    )
    with pytest.raises(
        DataError, match=r"a.jpg' is 12x10 pixels, but its mask '.*x.json' is 10x12"
    ):
        read_first_label(find_dataset(tmp_path))
    write_file(
        tmp_path / "x.json",
        content | {"images": [{"id": 7, "file_name": "a.jpg", "width": 10**6, "height": 10**6}]},
    )
    with pytest.raises(DataError, match=r"12x10 pixels, but its mask '.*' is 1000000x1000000"):
        read_label(find_dataset(tmp_path).pairs[0], find_dataset(tmp_path))


def test_a_category_called_background_is_the_background(tmp_path):
    write_photo(tmp_path / "a.jpg")
    categories = [{"id": 0, "name": "Background"}, {"id": 1, "name": "cell"}]
    write_file(
        tmp_path / "x.json", coco({"category_id": 1, "segmentation": [BOX]}, categories=categories)
    )
    assert find_dataset(tmp_path).classes.names == ("background", "cell")


RUNS = {"size": [SIZE[1], SIZE[0]], "counts": [119, 1]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"annotations": [{"image_id": 8, "category_id": 3}]},
            "has an annotation for image 8, but does not list that image",
        ),
        (
            {"annotations": [{"image_id": 7, "category_id": 4}]},
            "has an annotation of category 4, but does not list that category",
        ),
        (
            {"annotations": [{"image_id": 7}]},
            r"is not valid COCO \('category_id' is missing\); export it again",
        ),
        ({"annotations": 3}, r"is not valid COCO \(.*int.*\)"),
        ({"annotations": [3]}, "is not valid COCO"),
        ({"images": [{"id": [7], "file_name": "a.jpg"}]}, "is not valid COCO"),
        (
            {"images": [{"id": 7, "file_name": "a.jpg", "width": -3, "height": 2}]},
            "an image of -3x2 pixels",
        ),
        (
            {"images": [{"id": 7, "file_name": "a.jpg", "width": "wide", "height": 2}]},
            "is not valid COCO",
        ),
        ({"categories": [{"id": 1}]}, "'name' is missing"),
        (
            {"segmentation": []},
            r"are boxes without outlines, but useg needs the outlines \('segmentation'\)",
        ),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "a coordinate that is NaN or infinite"),
        ({"segmentation": [[1, 2, 3, 4, 5, 10**400]]}, "points are not pairs of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "has an outline of an odd number of coordinates"),
        ({"segmentation": [[1, 2, 3, 4, 5, "x"]]}, "points are not pairs of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, [6]]]}, "points are not pairs of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6], "123456"]}, "has an outline that is not a list"),
        ({"segmentation": [[1, 2, 3, 4, 5, None]]}, "points are not pairs of numbers"),
        (
            {"segmentation": RUNS | {"counts": [100, 1]}},
            "has run lengths for 12x10 pixels that add up to 101, but its image has 12x10",
        ),
        ({"segmentation": RUNS | {"counts": [-1, 121]}}, "has run lengths for 12x10 pixels"),
        ({"segmentation": RUNS | {"counts": [2**62, 2**62, 120]}}, "that add up to 9223372036854"),
        ({"segmentation": RUNS | {"counts": [10**400]}}, "is not valid COCO"),
        (
            {"segmentation": RUNS | {"size": [12, 10]}},
            "has run lengths for 10x12 pixels that add up to 120, but its image has 12x10",
        ),
        (
            {"segmentation": RUNS | {"counts": "\u20ac"}},
            "compressed run lengths cannot have '€' there",
        ),
        ({"segmentation": RUNS | {"counts": "P" * 50}}, "compressed run lengths cannot have 'P'"),
        ({"segmentation": RUNS | {"counts": "0\ud800"}}, "compressed run lengths cannot have '"),
        (
            {"segmentation": RUNS | {"counts": "P"}},
            "compressed run lengths end in the middle of a number",
        ),
        ({"segmentation": {"counts": [1]}}, "'size' is missing"),
        ({"segmentation": 3}, "is not valid COCO"),
        ({"segmentation": RUNS | {"counts": 3}}, "is not valid COCO"),
    ],
)
def test_a_broken_coco_file_is_refused(tmp_path, change, sentence):
    write_photo(tmp_path / "a.jpg")
    content = (
        coco({"category_id": 3, **change})
        if "segmentation" in change
        else coco({"category_id": 3, "segmentation": [BOX]}) | change
    )
    write_file(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=sentence):
        find_dataset(tmp_path)


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


def test_yolo_is_read_beside_the_images_as_darknet_keeps_it(tmp_path):
    for name in ("a", "b", "empty"):
        write_photo(tmp_path / "obj" / f"{name}.jpg")
    write_file(tmp_path / "obj" / "a.txt", f"1 {OUTLINE}\n")
    write_file(tmp_path / "obj" / "b.txt", f"0 {OUTLINE}\n")
    write_file(tmp_path / "obj.names", "cat\ndog\n")
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes.names) == ("yolo", ("background", "cat", "dog"))
    assert (read_first_label(dataset) == expect_block(2, 1, 3, 5, 9)).all()
    assert len(dataset.pairs) == 3


def test_notes_beside_images_are_no_outlines(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "a.txt", "3 cats on a mat, seen from above\n")
    with pytest.raises(DataError, match="has no pairs of image and mask"):
        find_dataset(tmp_path)


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
            "a.txt' line 1 has five numbers, so it is a box instead of an outline; export the "
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
        ("0 0 0 9 0 9 8", "line 1 has the coordinate 9, but coordinates are fractions"),
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


def test_a_file_of_very_many_damaged_parts_is_refused(tmp_path, monkeypatch):
    lines = "0 0 0 1 0 1 1\n" + "0 0 0 1 0 1 y\n" * 3
    # Three lines each of the files of two images.
    assert len(find_dataset(yolo(tmp_path / "a", lines)).skipped) == 6
    monkeypatch.setattr(formats, "MAX_SKIPPED", 2)
    sentence = (
        r"a\.txt' has more than 2 parts that cannot be read, such as this: .* pairs of numbers"
    )
    with pytest.raises(DataError, match=sentence):
        find_dataset(yolo(tmp_path / "b", lines))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\n" * 300_001, b" " * 20_000_001])
def test_a_yolo_file_that_is_not_text_or_too_long_is_skipped_with_its_image(tmp_path, content):
    yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(content)
    dataset = find_dataset(tmp_path)
    assert images_and_splits(dataset) == [("images/val/a.jpg", "val")]
    assert "a.txt' cannot be read as text" in dataset.skipped[0].reason
