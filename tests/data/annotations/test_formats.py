"""Annotation files in their published structure become label maps; broken ones are refused."""

import base64
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from useg.classes import IGNORE, ClassTable, write_classes
from useg.data.annotations.formats import parse_yaml_names, read_class_names
from useg.data.annotations.rasterize import decompress_rle, encode_rle
from useg.data.dataset import Dataset, read_label, read_sample
from useg.data.layouts import find_dataset
from useg.errors import DataError, UsageError

SIZE = (12, 10)
BOX = [2, 1, 6, 1, 6, 5, 2, 5]  # 4 x 4 pixels from row 1, column 2


def write_photo(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    return path


def write_file(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def read_first_label(dataset: Dataset, k: int = 0) -> np.ndarray:
    return read_sample(dataset.pairs[k], dataset).label


def images_and_splits(dataset: Dataset) -> list[tuple[str, str]]:
    return [(pair.image.relative_to(dataset.root).as_posix(), pair.split) for pair in dataset.pairs]


def expect_block(
    value: int,
    top: int = 1,
    left: int = 2,
    bottom: int = 5,
    right: int = 6,
    size: tuple[int, int] = SIZE,
) -> np.ndarray:
    expected = np.zeros((size[1], size[0]), np.uint8)
    expected[top:bottom, left:right] = value
    return expected


def coco_compress(lengths: list[int]) -> str:
    """COCO's ``rleToString``."""
    text = ""
    for k, length in enumerate(lengths):
        value = length - (lengths[k - 2] if k > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + 32 * more + 48)
            if not more:
                break
    return text


# COCO


def coco(
    *annotations: dict[str, object], names: tuple[str, ...] = ("a.jpg",), **more: object
) -> dict[str, object]:
    return {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"id": 7 + k, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for k, name in enumerate(names)
        ],
        "annotations": [
            {"id": k, "image_id": 7, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1.0, **each}
            for k, each in enumerate(annotations)
        ],
        "categories": [
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
            {"id": 3, "name": "car", "supercategory": "vehicle"},
        ],
        **more,
    }


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
    assert decompress_rle(coco_compress(lengths)) == lengths


def test_compressed_run_lengths_equal_those_of_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0.001, 0.03, 0.5, 0.97):
        mask = np.asfortranarray(rng.random((150, 200)) < density).astype(np.uint8)
        lengths = np.frombuffer(
            encode_rle(mask.astype(bool), by_columns=True).lengths, np.uint32
        ).tolist()
        text = tools.encode(np.asfortranarray(mask))["counts"].decode()
        assert decompress_rle(text) == lengths
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
        assert (read_first_label(dataset)[:6] == expect_block(1)[:6]).all()
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
    with pytest.raises(UsageError, match=r"x.json' declares 1000000x1000000 pixels"):
        read_label(find_dataset(tmp_path).pairs[0], find_dataset(tmp_path))


def test_a_category_called_background_is_the_background(tmp_path):
    write_photo(tmp_path / "a.jpg")
    categories = [{"id": 0, "name": "Background"}, {"id": 1, "name": "cell"}]
    write_file(
        tmp_path / "x.json", coco({"category_id": 1, "segmentation": [BOX]}, categories=categories)
    )
    assert find_dataset(tmp_path).classes.names == ("background", "cell")


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
            r"dataset.toml: '.*x.json' is not an annotation file of COCO, CVAT or LabelMe; choose "
            r"such a file, or masks"
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
        ({"segmentation": [[1, 2, 3, 4, 5, None]]}, "points are not pairs of numbers"),
        (
            {"segmentation": RUNS | {"counts": [100, 1]}},
            "has run lengths for 12x10 pixels that add up to 101, but its image has 12x10",
        ),
        ({"segmentation": RUNS | {"counts": [-1, 121]}}, "has run lengths for 12x10 pixels"),
        (
            {"segmentation": RUNS | {"size": [12, 10]}},
            "has run lengths for 10x12 pixels that add up to 120, but its image has 12x10",
        ),
        (
            {"segmentation": RUNS | {"counts": "\u20ac"}},
            "compressed run lengths cannot have '€' there",
        ),
        ({"segmentation": RUNS | {"counts": "P" * 50}}, "compressed run lengths cannot have 'P'"),
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


@pytest.mark.parametrize("content", ["{", "", "\x00", "[" * 100_000, '{"a": 1e'])
def test_invalid_json_is_refused(tmp_path, content):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "x.json", content)
    with pytest.raises(
        DataError,
        match=r"x.json' is not valid JSON \(.*\); save or copy it again, or remove it",
    ):
        find_dataset(tmp_path)


def test_an_image_that_is_annotated_twice_is_refused(tmp_path):
    write_photo(tmp_path / "a.jpg")
    for name in "xy":
        write_file(tmp_path / f"{name}.json", coco({"category_id": 3, "segmentation": [BOX]}))
    with pytest.raises(
        DataError,
        match=r"a.jpg' is annotated twice, in '.*x.json' and in '.*y.json'; keep one of them",
    ):
        find_dataset(tmp_path)


# LabelMe


def labelme(*shapes: dict[str, object], image: str = "a.jpg", **more: object) -> dict[str, object]:
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {
                "label": "cat",
                "group_id": None,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
                **shape,
            }
            for shape in shapes
        ],
        "imagePath": image,
        "imageData": None,
        "imageHeight": SIZE[1],
        "imageWidth": SIZE[0],
        **more,
    }


CORNERS = [[2, 1], [6, 1], [6, 5], [2, 5]]


def test_labelme_files_may_lie_beside_the_images_or_in_their_own_folder(tmp_path):
    beside, apart = tmp_path / "beside", tmp_path / "apart"
    for k in (1, 2, 10):
        write_photo(beside / f"{k}.jpg")
        write_file(
            beside / f"{k}.json",
            labelme({"points": CORNERS}, {"points": CORNERS, "label": "dog"}, image=f"{k}.jpg"),
        )
        write_photo(apart / "img" / f"{k}.jpg")
        write_file(
            apart / "ann" / f"{k}.json", labelme({"points": CORNERS}, image=f"..\\img\\{k}.jpg")
        )
    write_photo(beside / "3.jpg")  # not annotated yet
    dataset = find_dataset(beside)
    assert (dataset.layout, dataset.classes.names) == ("labelme", ("background", "cat", "dog"))
    assert images_and_splits(dataset) == [("1.jpg", ""), ("2.jpg", ""), ("10.jpg", "")]
    assert (
        read_first_label(dataset) == expect_block(2)
    ).all()  # the later shape lies over the earlier one
    assert (read_first_label(find_dataset(apart)) == expect_block(1)).all()


def test_labelme_finds_a_renamed_image_by_the_name_of_the_annotation_file(tmp_path):
    write_photo(tmp_path / "b.png")
    write_file(tmp_path / "b.json", labelme({"points": CORNERS}, image="C:/Pictures/IMG_1234.jpg"))
    assert images_and_splits(find_dataset(tmp_path)) == [("b.png", "")]


def png(mask: np.ndarray) -> str:
    target = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8)).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def test_all_labelme_shapes_have_the_right_area(tmp_path):
    write_photo(tmp_path / "a.jpg", (60, 50))

    def count_pixels(kind: str, points: object, **more: object) -> int:
        write_file(
            tmp_path / "a.json",
            labelme({"shape_type": kind, "points": points, **more}, imageWidth=60, imageHeight=50),
        )
        return int(read_first_label(find_dataset(tmp_path)).sum())

    assert (
        count_pixels("rectangle", [[2, 1], [6, 5]])
        == count_pixels("rectangle", [[6, 5], [2, 1]])
        == 16
    )
    assert count_pixels("circle", [[30, 25], [30, 35]]) == pytest.approx(314, abs=6)
    assert count_pixels("line", [[10, 20], [50, 20]]) == pytest.approx(400 + 78, abs=6)
    assert count_pixels("linestrip", [[10, 20], [30, 20], [30, 40]]) == pytest.approx(
        400 + 78, abs=30
    )
    assert count_pixels("point", [[30, 25]]) == pytest.approx(78, abs=4)
    assert count_pixels("mask", [[3, 4], [5, 5]], mask=png(np.array([[1, 0, 1], [0, 1, 0]]))) == 3
    assert (np.argwhere(read_first_label(find_dataset(tmp_path))) == [[4, 3], [4, 5], [5, 4]]).all()
    assert count_pixels(None, CORNERS) == 16


def test_labelme_labels_for_background_and_ignore(tmp_path):
    write_photo(tmp_path / "a.jpg")
    inner = [[3, 2], [5, 2], [5, 4], [3, 4]]
    for word, value in (("_background_", 0), ("__ignore__", IGNORE)):
        write_file(
            tmp_path / "a.json", labelme({"points": CORNERS}, {"points": inner, "label": word})
        )
        dataset = find_dataset(tmp_path)
        assert dataset.classes.names == ("background", "cat")
        assert (read_first_label(dataset)[2, 3], read_first_label(dataset)[1, 2]) == (value, 1)


def test_labelme_without_a_size_uses_the_image_size(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "a.json", labelme({"points": CORNERS}, imageHeight=None, imageWidth=None))
    assert (read_first_label(find_dataset(tmp_path)) == expect_block(1)).all()


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (
            {"shape_type": "spiral", "points": CORNERS},
            r"is not valid LabelMe \(shape_type is 'spiral'\)",
        ),
        ({"shape_type": "rectangle", "points": CORNERS}, "is not valid LabelMe"),
        ({"shape_type": "circle", "points": [[1, 1]]}, "is not valid LabelMe"),
        ({"points": [[1, 1], [2, 2]]}, "has an outline of 2 points"),
        ({"points": [[1, 1], [2, float("inf")], [3, 3]]}, "a coordinate that is NaN or infinite"),
        ({"points": [[1, 1], [2, "x"], [3, 3]]}, "is not valid LabelMe"),
        ({"points": None}, "is not valid LabelMe"),
        (
            {"shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "?"},
            "is not valid LabelMe",
        ),
        (
            {"shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "AAAA"},
            "'.*a.json: a mask' is not an image",
        ),
        (
            {"shape_type": "mask", "points": [], "mask": png(np.eye(2))},
            "is not valid LabelMe",
        ),
    ],
)
def test_a_broken_labelme_file_is_refused(tmp_path, shape, sentence):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "a.json", labelme(shape))
    with pytest.raises(UsageError, match=sentence):
        find_dataset(tmp_path)


def test_labelme_files_without_any_shape_are_refused(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "a.json", labelme())
    with pytest.raises(
        DataError,
        match=(
            r"no image in '.*' has a shape in its labelme file, such as '.*a.json'; annotate some"
        ),
    ):
        find_dataset(tmp_path)


# CVAT


def cvat(shapes: str, *, name: str = "a.jpg", more: str = "", size: tuple[int, int] = SIZE) -> str:
    return f"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>4</id><name>segmentation</name><size>1</size><mode>annotation</mode>
      <labels>
        <label><name>car</name><color>#33ddff</color><type>any</type><attributes></attributes></label>
        <label><name>line</name><color>#fa3253</color><type>any</type><attributes></attributes></label>
        <label><name>knee</name><type>points</type><attributes></attributes><parent>body</parent></label>
      </labels>
    </task>
  </meta>
  <image id="0" name="{name}" width="{size[0]}" height="{size[1]}">{shapes}
    <tag label="good_frame" source="manual"></tag>
  </image>
  {more}
</annotations>"""


def test_cvat_shapes_are_painted_by_z_order_in_the_colours_of_the_file(tmp_path):
    write_photo(tmp_path / "images" / "a.jpg")
    upper = (
        '<polygon label="car" source="manual" occluded="0" '
        'points="2.00,1.00;6.00,1.00;6.00,5.00;2.00,5.00" z_order="1"></polygon>'
    )
    lower = (
        '<box label="line" source="manual" occluded="0" xtl="0" ytl="0" xbr="12" ybr="10" '
        'z_order="0"></box>'
    )
    write_file(tmp_path / "annotations.xml", cvat(upper + lower))
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes.names) == ("cvat", ("background", "car", "line"))
    assert dataset.classes.colors[1:] == ((0x33, 0xDD, 0xFF), (0xFA, 0x32, 0x53))
    expected = expect_block(1)
    expected[expected == 0] = 2
    assert (read_first_label(dataset) == expected).all()


def test_all_cvat_shapes_have_the_right_area(tmp_path):
    write_photo(tmp_path / "a.jpg", (60, 50))

    def count_pixels(drawn: str) -> int:
        write_file(tmp_path / "annotations.xml", cvat(drawn, size=(60, 50)))
        return int((read_first_label(find_dataset(tmp_path)) > 0).sum())

    assert (
        count_pixels(
            '<box label="car" xtl="20" ytl="20" xbr="40" ybr="30" rotation="90.00" z_order="0"/>'
        )
        == 200
    )
    assert read_first_label(find_dataset(tmp_path))[16:34, 26:34].all()
    assert count_pixels(
        '<ellipse label="car" cx="30" cy="25" rx="20" ry="10" z_order="0"/>'
    ) == pytest.approx(628, abs=10)
    assert count_pixels(
        '<polyline label="line" points="5,5.5;45,5.5" z_order="0"/>'
    ) == pytest.approx(40, abs=2)
    assert (
        count_pixels(
            '<mask label="car" rle="1, 2, 0, 3" left="58" top="10" width="3" height="2" '
            'z_order="0"/>'
        )
        == 3
    )  # the last column lies outside
    # The example of CVAT's documentation: 13 x 15 pixels.
    runs = (
        "3, 5, 7, 7, 5, 9, 3, 11, 2, 11, 2, 12, 1, 12, 1, 26, 1, 12, 1, 12, 2, 11, 3, 9, 5, 7, "
        "7, 5, 3"
    )
    assert (
        count_pixels(
            f'<mask label="car" rle="{runs}" left="7" top="8" width="13" height="15" '
            'z_order="0"></mask>'
        )
        == 149
    )


def test_cvat_subsets_are_splits(tmp_path):
    more = ""
    for k, subset in enumerate(("Train", "Validation")):
        write_photo(tmp_path / "images" / subset / "b.jpg")
        box = '<box label="car" xtl="2" ytl="1" xbr="6" ybr="5"/>'
        more += (
            f'<image id="{k}" name="b.jpg" subset="{subset}" width="12" height="10">{box}</image>'
        )
    write_photo(tmp_path / "images" / "Train" / "a.jpg")
    write_file(
        tmp_path / "annotations.xml",
        cvat("", name="Train/a.jpg", more=more).replace(
            'name="Train/a.jpg"', 'name="a.jpg" subset="Train"'
        ),
    )
    assert images_and_splits(find_dataset(tmp_path)) == [
        ("images/Train/a.jpg", "train"),
        ("images/Train/b.jpg", "train"),
        ("images/Validation/b.jpg", "val"),
    ]


BOMB = (
    '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;"><!ENTITY secret SYSTEM '
    '"file:///etc/passwd">]>'
)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            BOMB + cvat("").split("?>")[1],
            r"is not valid XML \(it declares a document type, which annotations do not need\)",
        ),
        ("<annotations>", "is not valid XML"),
        ("", "is not valid XML"),
        (cvat('<box label="car" xtl="2"/>'), r"is not valid CVAT for images \('ytl' is missing\)"),
        (
            cvat('<box label="car" xtl="2" ytl="nan" xbr="3" ybr="4"/>'),
            "a <box> has a coordinate that is NaN or infinite",
        ),
        (cvat('<polygon label="car" points="1,1;2,2"/>'), "has an outline of 2 points"),
        (
            cvat('<polygon label="car" points="1,1;2,inf;3,3"/>'),
            "a <polygon> has a coordinate that is NaN or infinite",
        ),
        (cvat('<polygon label="car" points="1,1;2;3,3"/>'), "is not valid CVAT"),
        (cvat('<polygon points="1,1;2,2;3,3"/>'), "'label' is missing"),
        (
            cvat('<mask label="car" rle="3" left="0" top="0" width="2" height="2"/>'),
            "has a mask of 2x2 pixels whose run lengths add up to 3",
        ),
        (
            cvat('<mask label="car" rle="65536" left="0" top="0" width="256" height="256"/>'),
            "256x256 pixels, but its image has 12x10",
        ),
        (
            cvat('<mask label="car" rle="" left="0" top="0" width="2" height="2"/>'),
            "is not valid CVAT",
        ),
        (
            cvat('<mask label="car" rle="5,-1" left="0" top="0" width="2" height="2"/>'),
            "has a mask of 2x2 pixels whose run lengths add up to 4",
        ),
        (
            cvat("", more='<track id="0" label="car"></track>'),
            "has the format 'CVAT for video', which useg does not read; export the task as 'CVAT "
            "for images",
        ),
        (cvat("", name="").replace('width="12"', ""), "'width' is missing"),
    ],
)
def test_a_broken_cvat_file_is_refused(tmp_path, content, sentence):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "annotations.xml", content)
    with pytest.raises(DataError, match=sentence):
        find_dataset(tmp_path)


# YOLO

OUTLINE = "0.25 0.1 0.75 0.1 0.75 0.5 0.25 0.5"  # columns 3 to 9, rows 1 to 5


def yolo(
    root: Path, line: str = f"1 {OUTLINE}", yaml: str = "names:\n  0: cat\n  1: dog\n"
) -> Path:
    for split in ("train", "val"):
        write_photo(root / "images" / split / "a.jpg")
        write_file(root / "labels" / split / "a.txt", line + "\n")
    write_file(
        root / "data.yaml",
        f"path: ../elsewhere # the root\ntrain: images/train\nval: images/val\n\n{yaml}\nnc: 2\n",
    )
    return root


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
    "text",
    [
        "names: [cat, no, 1e3]",
        "names: ['cat', \"no\", 1e3]  # three",
        "names:\n  [\n    cat, # one\n    no,\n    1e3,\n  ]\nnc: 3",
        "names: {0: cat, 1: no, 2: 1e3}",
        "names:\n- cat\n- no\n- 1e3\nnc: 3",
        "nc: 3\nnames:   # list\n  # begins\n\n  - cat\n  - 'no'   # never false\n  - "
        "1e3\nroboflow:\n  license: MIT\n",
        "names:\n    0: cat\n    1: no\n    2: 1e3",
        "names:\r\n  0: cat\r\n  1: no\r\n  2: 1e3\r\n",
    ],
)
def test_yaml_names_are_text_however_they_are_written(text):
    assert parse_yaml_names(text, "x") == {0: "cat", 1: "no", 2: "1e3"}


def test_yaml_names_may_have_gaps_spaces_and_commas():
    assert parse_yaml_names('names: {3: "a, b", 7: traffic light}', "x") == {
        3: "a, b",
        7: "traffic light",
    }
    assert parse_yaml_names("other: [a]\nmy_names: [b]\n", "x") == {}
    assert parse_yaml_names("names: data/coco.names", "x") == {}


@given(st.text())
def test_random_yaml_is_read_or_refused(text):
    with contextlib.suppress(DataError):
        parse_yaml_names("names:" + text, "'data.yaml'")


def nested_aliases(depth: int) -> str:
    """Text that would have 10**depth names if every alias were expanded."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, depth + 1)]
    return "\n".join([*lines, f"names: *a{depth}"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (nested_aliases(30), "an entry in 'names:' that is not a number with a name"),
        ("names: &a [*a]", "is not valid YAML .*recursive"),
        ("names: " + "[" * 100_000, "is not valid YAML"),
        ("names:\n" + "- " * 100_000, "is not valid YAML"),
        ("names: [a", r"'data.yaml' is not valid YAML \(.*\); correct it, or remove it"),
        ('names: ["\\UFFFFFFFF"]', "is not valid YAML"),
        ("names: {? [a] : b}", "is not valid YAML"),
        ("names: {car: 0}", r"not a number with a name \('car'\); write for example '0: car'"),
        ("names: [[a, b]]", "not a number with a name"),
        ("names: {0: a, 10000000000: b}", "not a number with a name"),
        ("names: [a]\n#" + "x" * 1_000_000, "has more than 1,000,000 bytes, too many for a list"),
    ],
)
def test_hostile_yaml_is_refused_at_once(text, sentence):
    with pytest.raises(DataError, match=sentence):
        parse_yaml_names(text, "'data.yaml'")


def test_yaml_tags_run_no_code():
    text = "names: [!!python/object/apply:os.getcwd []]"
    with pytest.raises(DataError, match="not a number with a name"):
        parse_yaml_names(text, "'data.yaml'")


def test_yaml_files_without_names_are_skipped_even_if_they_are_invalid_or_large(tmp_path):
    write_file(tmp_path / "a.yaml", "hostnames: [\n")
    write_file(tmp_path / "b.yaml", "other: é" * 500_000)
    (tmp_path / "c.yaml").write_bytes(b"\xff names: [x]")
    write_file(tmp_path / "d.yaml", "\ufeffnames: [cat]")
    assert read_class_names(sorted(tmp_path.iterdir())) == {0: "cat"}
    write_file(tmp_path / "b.yaml", "names: [é" + "é" * 500_000)
    with pytest.raises(DataError, match=r"b.yaml' has more than 1,000,000 bytes"):
        read_class_names(sorted(tmp_path.iterdir()))


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


def test_a_yolo_file_that_is_not_text_is_refused(tmp_path):
    yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a.txt' cannot be read as text"):
        find_dataset(tmp_path)


# All


def test_files_that_are_no_annotations_are_skipped(tmp_path):
    write_photo(tmp_path / "a.jpg")
    write_file(tmp_path / "package.json", {"name": "x"})
    write_file(tmp_path / "list.json", [1, 2])
    write_file(tmp_path / "pom.xml", "<project/>")
    write_file(tmp_path / "._a.json", "mac")
    with pytest.raises(
        DataError,
        match=(
            r"It has 1 image and no sub-folders, 2 .json files, 1 .xml file. It recognizes .* "
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
