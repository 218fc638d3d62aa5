"""Annotation files in their real structure -> label maps; broken and hostile ones -> one clear sentence."""

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
from useg.errors import UsageError

SIZE = (12, 10)
BOX = [2, 1, 6, 1, 6, 5, 2, 5]  # 4 x 4 pixels from row 1, column 2


def photo(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    return path


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def label(dataset: Dataset, k: int = 0) -> np.ndarray:
    return read_sample(dataset.pairs[k], dataset).label


def images(dataset: Dataset) -> list[tuple[str, str]]:
    return [(pair.image.relative_to(dataset.root).as_posix(), pair.split) for pair in dataset.pairs]


def block(
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


def compress(lengths: list[int]) -> str:
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


def test_coco_as_it_is_published(tmp_path):
    for split in ("train", "val"):
        name = f"{split}.jpg"
        photo(tmp_path / f"{split}2017" / name)
        write(
            tmp_path / f"annotations/instances_{split}2017.json",
            coco({"category_id": 90, "segmentation": [BOX]}, names=(name,)),
        )
        write(
            tmp_path / f"annotations/captions_{split}2017.json", {"images": [], "annotations": []}
        )
        write(
            tmp_path / f"annotations/person_keypoints_{split}2017.json",
            coco({"category_id": 3, "segmentation": [BOX]}, names=(name,)),
        )
    photo(tmp_path / "test2017" / "1.jpg")
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.splits_by, dataset.classes.names) == (
        "coco",
        "official",
        ("background", "car", "toothbrush"),
    )
    assert images(dataset) == [("train2017/train.jpg", "train"), ("val2017/val.jpg", "val")]
    assert (label(dataset) == block(2)).all()


def test_the_name_of_a_file_says_the_split_of_pictures_in_one_folder(tmp_path):
    for split in ("train", "val"):
        photo(tmp_path / "images" / f"{split}_1.jpg")
        write(
            tmp_path / f"{split}.json",
            coco({"category_id": 3, "segmentation": [BOX]}, names=(f"{split}_1.jpg",)),
        )
    assert images(find_dataset(tmp_path)) == [
        ("images/train_1.jpg", "train"),
        ("images/val_1.jpg", "val"),
    ]


def test_coco_as_roboflow_exports_it(tmp_path):
    for split in ("train", "valid", "test"):
        photo(tmp_path / split / "a.jpg")
        write(
            tmp_path / split / "_annotations.coco.json",
            coco({"category_id": 3, "segmentation": [BOX]}),
        )
    assert images(find_dataset(tmp_path)) == [
        ("test/a.jpg", "test"),
        ("train/a.jpg", "train"),
        ("valid/a.jpg", "val"),
    ]


def test_coco_runs_compressed_or_not_and_crowds(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    mask = np.zeros(SIZE[::-1], bool)
    mask[1:5, 2:6] = True
    lengths = np.frombuffer(encode_rle(mask, by_columns=True).lengths, np.uint32).tolist()
    assert lengths[:3] == [21, 4, 6]
    for counts in (lengths, compress(lengths)):
        annotation = {
            "category_id": 3,
            "iscrowd": 1,
            "segmentation": {"size": [SIZE[1], SIZE[0]], "counts": counts},
        }
        write(tmp_path / "annotations.json", coco(annotation))
        assert (label(find_dataset(tmp_path)) == block(1)).all()


@given(
    arrays.arrays(
        bool,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.booleans(),
        fill=st.booleans(),
    )
)
def test_compressed_runs_are_cocos(mask):
    lengths = np.frombuffer(encode_rle(mask, by_columns=True).lengths, np.uint32).tolist()
    assert decompress_rle(compress(lengths)) == lengths


def test_compressed_runs_agree_with_cocos_own_tools():
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0.001, 0.03, 0.5, 0.97):
        mask = np.asfortranarray(rng.random((150, 200)) < density).astype(np.uint8)
        lengths = np.frombuffer(
            encode_rle(mask.astype(bool), by_columns=True).lengths, np.uint32
        ).tolist()
        text = tools.encode(np.asfortranarray(mask))["counts"].decode()
        assert decompress_rle(text) == lengths
        assert compress(lengths) == text


def test_coco_paints_small_things_over_large_ones_and_later_over_earlier_ones_of_one_size(tmp_path):
    photo(tmp_path / "a.jpg")
    small, large = [3, 2, 5, 2, 5, 4, 3, 4], [0, 0, 12, 0, 12, 10, 0, 10]
    write(
        tmp_path / "x.json",
        coco(
            {"category_id": 3, "segmentation": [small]},
            {"category_id": 90, "segmentation": [large]},
        ),
    )
    assert (label(find_dataset(tmp_path))[[2, 0], [3, 0]] == [1, 2]).all()
    write(
        tmp_path / "x.json",
        coco(
            {"category_id": 3, "segmentation": [small]},
            {"category_id": 90, "segmentation": [small]},
        ),
    )
    assert label(find_dataset(tmp_path))[2, 3] == 2


def test_coco_odds_and_ends(tmp_path):
    """Empty outlines, outlines of two points, several outlines, a flat list, boxes beside outlines, a picture without annotations."""
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    flat, two, several = (
        {"segmentation": BOX},
        {"segmentation": [[1, 1, 2, 2], BOX]},
        {"segmentation": [BOX, [8, 6, 10, 6, 10, 8, 8, 8]]},
    )
    for annotation in (flat, two, several):
        write(
            tmp_path / "x.json",
            coco(
                {"category_id": 3, **annotation},
                {"category_id": 3, "segmentation": []},
                names=("a.jpg", "b.jpg"),
            ),
        )
        dataset = find_dataset(tmp_path)
        assert (label(dataset)[:6] == block(1)[:6]).all()
        assert not label(dataset, 1).any()
    write(
        tmp_path / "x.json",
        coco({"category_id": 3, "segmentation": [[-5, -5, 50, -5, 50, 50, -5, 50]]}),
    )
    assert (label(find_dataset(tmp_path)) == 1).all()


def test_coco_sizes_that_are_missing_or_not_the_pictures(tmp_path):
    photo(tmp_path / "a.jpg")
    content = coco({"category_id": 3, "segmentation": [BOX]})
    write(tmp_path / "x.json", content | {"images": [{"id": 7, "file_name": "a.jpg"}]})
    assert (label(find_dataset(tmp_path)) == block(1)).all()
    write(
        tmp_path / "x.json",
        content | {"images": [{"id": 7, "file_name": "a.jpg", "width": 10, "height": 12}]},
    )
    with pytest.raises(
        UsageError, match=r"a.jpg' is 12x10 pixels, but its mask '.*x.json' is 10x12"
    ):
        label(find_dataset(tmp_path))
    write(
        tmp_path / "x.json",
        content | {"images": [{"id": 7, "file_name": "a.jpg", "width": 10**6, "height": 10**6}]},
    )
    with pytest.raises(UsageError, match=r"x.json' declares 1000000x1000000 pixels"):
        read_label(find_dataset(tmp_path).pairs[0], find_dataset(tmp_path))


def test_a_category_called_background_is_the_background(tmp_path):
    photo(tmp_path / "a.jpg")
    categories = [{"id": 0, "name": "Background"}, {"id": 1, "name": "cell"}]
    write(
        tmp_path / "x.json", coco({"category_id": 1, "segmentation": [BOX]}, categories=categories)
    )
    assert find_dataset(tmp_path).classes.names == ("background", "cell")


def test_coco_names_pictures_wherever_they_lie_but_nothing_outside(tmp_path):
    photo(tmp_path / "secret.jpg")
    data = tmp_path / "data"
    photo(data / "photos" / "north" / "a.jpg")
    photo(data / "photos" / "south" / "a.jpg")
    annotation = {"category_id": 3, "segmentation": [BOX]}
    write(data / "x.json", coco(annotation, names=("north/a.jpg", "C:\\data\\south\\a.jpg")))
    assert images(find_dataset(data)) == [("photos/north/a.jpg", ""), ("photos/south/a.jpg", "")]
    write(data / "x.json", coco(annotation, names=("a.jpg",)))
    with pytest.raises(
        UsageError,
        match=r"x.json' names the picture 'a.jpg', which could be '.*north/a.jpg' or '.*south/a.jpg'; give pictures names",
    ):
        find_dataset(data)
    write(data / "x.json", coco(annotation, names=("../secret.jpg",)))
    with pytest.raises(
        UsageError,
        match=r"x.json' names pictures such as '../secret.jpg', but none that it names is in '.*data'; put them there, or say in",
    ):
        find_dataset(data)
    write(data / "x.json", coco(annotation, names=("north/a.jpg", "gone.jpg")))
    with pytest.raises(
        UsageError, match=r"1 mask without an image \(1 pairs are complete\): '.*x.json#gone.jpg'"
    ):
        find_dataset(data)
    assert [path.name for path in find_dataset(data, strict=False).masks] == ["x.json#gone.jpg"]


def test_dataset_toml_may_name_annotation_files_and_pictures_elsewhere(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    write(tmp_path / "truth" / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    write(tmp_path / "truth" / "dataset.toml", 'images = "../photos/*.jpg"\nmasks = "x.json"\n')
    dataset = find_dataset(tmp_path / "truth")
    assert (dataset.layout, label(dataset).max()) == ("dataset.toml", 1)
    write(tmp_path / "truth" / "x.json", {"hello": "world"})
    with pytest.raises(
        UsageError,
        match=r"dataset.toml: '.*x.json' is no annotation file of COCO, CVAT or LabelMe; give one of these, or masks",
    ):
        find_dataset(tmp_path / "truth")
    write(tmp_path / "truth" / "a.txt", "1 .1 .1 .6 .1 .6 .9")
    write(tmp_path / "truth" / "dataset.toml", 'images = "../photos/*.jpg"\nmasks = "*.txt"\n')
    assert find_dataset(tmp_path / "truth").classes.names == ("background", "class 0", "class 1")


def test_dataset_toml_may_ignore_drawn_classes(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    for ignore in ('["car"]', "[1]"):
        write(tmp_path / "dataset.toml", f"ignore = {ignore}")
        assert find_dataset(tmp_path).classes.names == ("background", "toothbrush")
        assert (label(find_dataset(tmp_path)) == block(IGNORE)).all()
    write(tmp_path / "dataset.toml", 'ignore = ["carr"]')
    with pytest.raises(
        UsageError,
        match=r"dataset.toml ignores the class 'carr', but the classes are background, car, toothbrush; did you mean 'car'",
    ):
        find_dataset(tmp_path)


def test_a_class_table_of_ones_own_orders_drawn_classes_and_may_leave_out_the_background(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "x.json", coco({"category_id": 3, "segmentation": [BOX]}))
    write_classes(tmp_path / "classes.toml", ClassTable(("toothbrush", "car")))
    assert label(find_dataset(tmp_path))[2, 3] == 1
    assert label(find_dataset(tmp_path))[9, 0] == IGNORE
    assert label(find_dataset(tmp_path, ClassTable(("car", "background"))))[2, 3] == 0  # a model's
    with pytest.raises(
        UsageError,
        match=r"x.json' \(a.jpg\) has a shape of the class 'car', which is none of the 2 classes \(background, cat\)",
    ):
        label(find_dataset(tmp_path, ClassTable(("background", "cat"))))


RUNS = {"size": [SIZE[1], SIZE[0]], "counts": [119, 1]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"annotations": [{"image_id": 8, "category_id": 3}]}, "has an annotation of image 8, which is not among its images"),
        ({"annotations": [{"image_id": 7, "category_id": 4}]}, "has an annotation of category 4, which is not among its categories"),
        ({"annotations": [{"image_id": 7}]}, r"is not in the format COCO as it should be \(there is no 'category_id'\); export it again"),
        ({"annotations": 3}, r"is not in the format COCO as it should be \(.*int.*\)"),
        ({"annotations": [3]}, "is not in the format COCO"),
        ({"images": [{"id": [7], "file_name": "a.jpg"}]}, "is not in the format COCO"),
        ({"images": [{"id": 7, "file_name": "a.jpg", "width": -3, "height": 2}]}, "a picture of -3x2 pixels"),
        ({"images": [{"id": 7, "file_name": "a.jpg", "width": "wide", "height": 2}]}, "is not in the format COCO"),
        ({"categories": [{"id": 1}]}, "there is no 'name'"),
        ({"segmentation": []}, "are boxes without outlines; labels for pixels need 'segmentation'"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "a coordinate that is no finite number"),
        ({"segmentation": [[1, 2, 3, 4, 5, 10**400]]}, "points are not pairs of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "has an outline of an odd number of coordinates"),
        ({"segmentation": [[1, 2, 3, 4, 5, "x"]]}, "points are not pairs of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, None]]}, "points are not pairs of numbers"),
        ({"segmentation": RUNS | {"counts": [100, 1]}}, "has runs for 12x10 pixels that cover 101, but its image has 12x10"),
        ({"segmentation": RUNS | {"counts": [-1, 121]}}, "has runs for 12x10 pixels"),
        ({"segmentation": RUNS | {"size": [12, 10]}}, "has runs for 10x12 pixels that cover 120, but its image has 12x10"),
        ({"segmentation": RUNS | {"counts": "\u20ac"}}, "compressed runs have '€' where no such character can be"),
        ({"segmentation": RUNS | {"counts": "P" * 50}}, "compressed runs have 'P' where"),
        ({"segmentation": RUNS | {"counts": "P"}}, "compressed runs end in the middle of a number"),
        ({"segmentation": {"counts": [1]}}, "there is no 'size'"),
        ({"segmentation": 3}, "is not in the format COCO"),
        ({"segmentation": RUNS | {"counts": 3}}, "is not in the format COCO"),
    ],
)  # fmt: skip
def test_a_broken_coco_file_is_one_clear_sentence(tmp_path, change, sentence):
    photo(tmp_path / "a.jpg")
    content = (
        coco({"category_id": 3, **change})
        if "segmentation" in change
        else coco({"category_id": 3, "segmentation": [BOX]}) | change
    )
    write(tmp_path / "x.json", content)
    with pytest.raises(UsageError, match=sentence):
        find_dataset(tmp_path)


@pytest.mark.parametrize("content", ["{", "", "\x00", "[" * 100_000, '{"a": 1e'])
def test_what_is_no_json_is_named(tmp_path, content):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "x.json", content)
    with pytest.raises(
        UsageError,
        match=r"x.json' is no JSON that can be read \(.*\); save or copy it again, or remove it",
    ):
        find_dataset(tmp_path)


def test_a_picture_annotated_twice_is_named(tmp_path):
    photo(tmp_path / "a.jpg")
    for name in "xy":
        write(tmp_path / f"{name}.json", coco({"category_id": 3, "segmentation": [BOX]}))
    with pytest.raises(
        UsageError,
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


def test_labelme_beside_its_pictures_and_in_a_folder_of_its_own(tmp_path):
    beside, apart = tmp_path / "beside", tmp_path / "apart"
    for k in (1, 2, 10):
        photo(beside / f"{k}.jpg")
        write(
            beside / f"{k}.json",
            labelme({"points": CORNERS}, {"points": CORNERS, "label": "dog"}, image=f"{k}.jpg"),
        )
        photo(apart / "img" / f"{k}.jpg")
        write(apart / "ann" / f"{k}.json", labelme({"points": CORNERS}, image=f"..\\img\\{k}.jpg"))
    photo(beside / "3.jpg")  # not annotated yet
    dataset = find_dataset(beside)
    assert (dataset.layout, dataset.classes.names) == ("labelme", ("background", "cat", "dog"))
    assert images(dataset) == [("1.jpg", ""), ("2.jpg", ""), ("10.jpg", "")]
    assert (label(dataset) == block(2)).all()  # the later shape lies over the earlier one
    assert (label(find_dataset(apart)) == block(1)).all()


def test_labelme_finds_a_renamed_picture_by_its_own_name(tmp_path):
    photo(tmp_path / "b.png")
    write(tmp_path / "b.json", labelme({"points": CORNERS}, image="C:/Pictures/IMG_1234.jpg"))
    assert images(find_dataset(tmp_path)) == [("b.png", "")]


def png(mask: np.ndarray) -> str:
    target = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8)).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def test_labelme_shapes(tmp_path):
    photo(tmp_path / "a.jpg", (60, 50))

    def area(kind: str, points: object, **more: object) -> int:
        write(
            tmp_path / "a.json",
            labelme({"shape_type": kind, "points": points, **more}, imageWidth=60, imageHeight=50),
        )
        return int(label(find_dataset(tmp_path)).sum())

    assert area("rectangle", [[2, 1], [6, 5]]) == area("rectangle", [[6, 5], [2, 1]]) == 16
    assert area("circle", [[30, 25], [30, 35]]) == pytest.approx(314, abs=6)
    assert area("line", [[10, 20], [50, 20]]) == pytest.approx(400 + 78, abs=6)
    assert area("linestrip", [[10, 20], [30, 20], [30, 40]]) == pytest.approx(400 + 78, abs=30)
    assert area("point", [[30, 25]]) == pytest.approx(78, abs=4)
    assert area("mask", [[3, 4], [5, 5]], mask=png(np.array([[1, 0, 1], [0, 1, 0]]))) == 3
    assert (np.argwhere(label(find_dataset(tmp_path))) == [[4, 3], [4, 5], [5, 4]]).all()
    assert area(None, CORNERS) == 16


def test_labelmes_words_for_background_and_ignore(tmp_path):
    photo(tmp_path / "a.jpg")
    inner = [[3, 2], [5, 2], [5, 4], [3, 4]]
    for word, value in (("_background_", 0), ("__ignore__", IGNORE)):
        write(tmp_path / "a.json", labelme({"points": CORNERS}, {"points": inner, "label": word}))
        dataset = find_dataset(tmp_path)
        assert dataset.classes.names == ("background", "cat")
        assert (label(dataset)[2, 3], label(dataset)[1, 2]) == (value, 1)


def test_labelme_without_sizes_takes_the_pictures(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "a.json", labelme({"points": CORNERS}, imageHeight=None, imageWidth=None))
    assert (label(find_dataset(tmp_path)) == block(1)).all()


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (
            {"shape_type": "spiral", "points": CORNERS},
            r"is not in the format LabelMe as it should be \(shape_type is 'spiral'\)",
        ),
        ({"shape_type": "rectangle", "points": CORNERS}, "is not in the format LabelMe"),
        ({"shape_type": "circle", "points": [[1, 1]]}, "is not in the format LabelMe"),
        ({"points": [[1, 1], [2, 2]]}, "has an outline of 2 points"),
        ({"points": [[1, 1], [2, float("inf")], [3, 3]]}, "a coordinate that is no finite number"),
        ({"points": [[1, 1], [2, "x"], [3, 3]]}, "is not in the format LabelMe"),
        ({"points": None}, "is not in the format LabelMe"),
        (
            {"shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "?"},
            "is not in the format LabelMe",
        ),
        (
            {"shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "AAAA"},
            "'.*a.json: a mask' is not a picture",
        ),
        (
            {"shape_type": "mask", "points": [], "mask": png(np.eye(2))},
            "is not in the format LabelMe",
        ),
    ],
)
def test_a_broken_labelme_file_is_one_clear_sentence(tmp_path, shape, sentence):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "a.json", labelme(shape))
    with pytest.raises(UsageError, match=sentence):
        find_dataset(tmp_path)


def test_labelme_files_without_any_shape_are_refused(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "a.json", labelme())
    with pytest.raises(
        UsageError,
        match=r"no picture in '.*' has a shape \(labelme files such as '.*a.json'\); draw some",
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
  <image id="0" name="{name}" width="{size[0]}" height="{size[1]}">{shapes}<tag label="good_frame" source="manual"></tag></image>
  {more}
</annotations>"""


def test_cvat(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    upper = '<polygon label="car" source="manual" occluded="0" points="2.00,1.00;6.00,1.00;6.00,5.00;2.00,5.00" z_order="1"></polygon>'
    lower = '<box label="line" source="manual" occluded="0" xtl="0" ytl="0" xbr="12" ybr="10" z_order="0"></box>'
    write(tmp_path / "annotations.xml", cvat(upper + lower))
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes.names) == ("cvat", ("background", "car", "line"))
    assert dataset.classes.colors[1:] == ((0x33, 0xDD, 0xFF), (0xFA, 0x32, 0x53))
    expected = block(1)
    expected[expected == 0] = 2
    assert (label(dataset) == expected).all()


def test_cvat_shapes(tmp_path):
    photo(tmp_path / "a.jpg", (60, 50))

    def area(drawn: str) -> int:
        write(tmp_path / "annotations.xml", cvat(drawn, size=(60, 50)))
        return int((label(find_dataset(tmp_path)) > 0).sum())

    assert (
        area('<box label="car" xtl="20" ytl="20" xbr="40" ybr="30" rotation="90.00" z_order="0"/>')
        == 200
    )
    assert label(find_dataset(tmp_path))[16:34, 26:34].all()
    assert area(
        '<ellipse label="car" cx="30" cy="25" rx="20" ry="10" z_order="0"/>'
    ) == pytest.approx(628, abs=10)
    assert area('<polyline label="line" points="5,5.5;45,5.5" z_order="0"/>') == pytest.approx(
        40, abs=2
    )
    assert (
        area(
            '<mask label="car" rle="1, 2, 0, 3" left="58" top="10" width="3" height="2" z_order="0"/>'
        )
        == 3
    )  # the last column lies outside
    # The example of CVAT's documentation: 13 x 15 pixels.
    runs = "3, 5, 7, 7, 5, 9, 3, 11, 2, 11, 2, 12, 1, 12, 1, 26, 1, 12, 1, 12, 2, 11, 3, 9, 5, 7, 7, 5, 3"
    assert (
        area(
            f'<mask label="car" rle="{runs}" left="7" top="8" width="13" height="15" z_order="0"></mask>'
        )
        == 149
    )


def test_cvat_subsets_are_splits(tmp_path):
    more = ""
    for k, subset in enumerate(("Train", "Validation")):
        photo(tmp_path / "images" / subset / "b.jpg")
        box = '<box label="car" xtl="2" ytl="1" xbr="6" ybr="5"/>'
        more += (
            f'<image id="{k}" name="b.jpg" subset="{subset}" width="12" height="10">{box}</image>'
        )
    photo(tmp_path / "images" / "Train" / "a.jpg")
    write(
        tmp_path / "annotations.xml",
        cvat("", name="Train/a.jpg", more=more).replace(
            'name="Train/a.jpg"', 'name="a.jpg" subset="Train"'
        ),
    )
    assert images(find_dataset(tmp_path)) == [
        ("images/Train/a.jpg", "train"),
        ("images/Train/b.jpg", "train"),
        ("images/Validation/b.jpg", "val"),
    ]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;"><!ENTITY secret SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (BOMB + cvat("").split("?>")[1], r"is no XML that can be read \(it declares a document type, which annotations do not need\)"),
        ("<annotations>", "is no XML that can be read"),
        ("", "is no XML that can be read"),
        (cvat('<box label="car" xtl="2"/>'), r"is not in the format CVAT for images as it should be \(there is no 'ytl'\)"),
        (cvat('<box label="car" xtl="2" ytl="nan" xbr="3" ybr="4"/>'), "a <box> has a coordinate that is no finite number"),
        (cvat('<polygon label="car" points="1,1;2,2"/>'), "has an outline of 2 points"),
        (cvat('<polygon label="car" points="1,1;2,inf;3,3"/>'), "a <polygon> has a coordinate that is no finite number"),
        (cvat('<polygon label="car" points="1,1;2;3,3"/>'), "is not in the format CVAT"),
        (cvat('<polygon points="1,1;2,2;3,3"/>'), "there is no 'label'"),
        (cvat('<mask label="car" rle="3" left="0" top="0" width="2" height="2"/>'), "has a mask of 2x2 pixels whose runs cover 3"),
        (cvat('<mask label="car" rle="65536" left="0" top="0" width="256" height="256"/>'), "256x256 pixels, but its picture has 12x10"),
        (cvat('<mask label="car" rle="" left="0" top="0" width="2" height="2"/>'), "is not in the format CVAT"),
        (cvat('<mask label="car" rle="5,-1" left="0" top="0" width="2" height="2"/>'), "has a mask of 2x2 pixels whose runs cover 4"),
        (cvat("", more='<track id="0" label="car"></track>'), "is CVAT's format for video, which is not read; export the task as 'CVAT for images"),
        (cvat("", name="").replace('width="12"', ""), "there is no 'width'"),
    ],
)  # fmt: skip
def test_a_broken_cvat_file_is_one_clear_sentence(tmp_path, content, sentence):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "annotations.xml", content)
    with pytest.raises(UsageError, match=sentence):
        find_dataset(tmp_path)


# YOLO

OUTLINE = "0.25 0.1 0.75 0.1 0.75 0.5 0.25 0.5"  # columns 3 to 9, rows 1 to 5


def yolo(
    root: Path, line: str = f"1 {OUTLINE}", yaml: str = "names:\n  0: cat\n  1: dog\n"
) -> Path:
    for split in ("train", "val"):
        photo(root / "images" / split / "a.jpg")
        write(root / "labels" / split / "a.txt", line + "\n")
    write(
        root / "data.yaml",
        f"path: ../elsewhere # the root\ntrain: images/train\nval: images/val\n\n{yaml}\nnc: 2\n",
    )
    return root


def test_yolo_as_ultralytics_has_it(tmp_path):
    dataset = find_dataset(yolo(tmp_path))
    assert (dataset.layout, dataset.classes.names) == ("yolo", ("background", "cat", "dog"))
    assert images(dataset) == [("images/train/a.jpg", "train"), ("images/val/a.jpg", "val")]
    assert (label(dataset) == block(2, 1, 3, 5, 9)).all()


def test_yolo_as_roboflow_has_it_and_pictures_without_a_text_file(tmp_path):
    for split in ("train", "valid"):
        photo(tmp_path / split / "images" / "a.jpg")
        photo(tmp_path / split / "images" / "empty.jpg")
        write(tmp_path / split / "labels" / "a.txt", f"0 {OUTLINE}\n\n0 {OUTLINE}")
    photo(tmp_path / "test" / "images" / "unknown.jpg")
    write(tmp_path / "data.yaml", "names: ['cat']")
    dataset = find_dataset(tmp_path)
    assert images(dataset) == [
        (f"{folder}/images/{name}.jpg", split)
        for folder, split in (("train", "train"), ("valid", "val"))
        for name in ("a", "empty")
    ]
    assert not label(dataset, 1).any()


def test_yolo_without_names_numbers_its_classes(tmp_path):
    dataset = find_dataset(yolo(tmp_path, yaml=""))
    assert dataset.classes.names == ("background", "class 0", "class 1")
    write(tmp_path / "classes.txt", "tree\nbush\n")
    assert find_dataset(tmp_path).classes.names == ("background", "tree", "bush")


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat, no, 1e3]",
        "names: ['cat', \"no\", 1e3]  # three",
        "names:\n  [\n    cat, # one\n    no,\n    1e3,\n  ]\nnc: 3",
        "names: {0: cat, 1: no, 2: 1e3}",
        "names:\n- cat\n- no\n- 1e3\nnc: 3",
        "nc: 3\nnames:   # list\n  # begins\n\n  - cat\n  - 'no'   # never false\n  - 1e3\nroboflow:\n  license: MIT\n",
        "names:\n    0: cat\n    1: no\n    2: 1e3",
        "names:\r\n  0: cat\r\n  1: no\r\n  2: 1e3\r\n",
    ],
)
def test_names_in_yaml(text):
    assert parse_yaml_names(text, "x") == {0: "cat", 1: "no", 2: "1e3"}


def test_names_in_yaml_may_have_gaps_spaces_and_commas():
    assert parse_yaml_names('names: {3: "a, b", 7: traffic light}', "x") == {
        3: "a, b",
        7: "traffic light",
    }
    assert parse_yaml_names("other: [a]\nmy_names: [b]\n", "x") == {}
    assert parse_yaml_names("names: data/coco.names", "x") == {}


@given(st.text())
def test_random_yaml_is_read_or_refused(text):
    with contextlib.suppress(UsageError):
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
    with pytest.raises(UsageError, match=sentence):
        parse_yaml_names(text, "'data.yaml'")


def test_yaml_tags_run_no_code():
    text = "names: [!!python/object/apply:os.getcwd []]"
    with pytest.raises(UsageError, match="not a number with a name"):
        parse_yaml_names(text, "'data.yaml'")


def test_yaml_files_without_names_are_skipped_even_if_they_are_invalid_or_large(tmp_path):
    write(tmp_path / "a.yaml", "hostnames: [\n")
    write(tmp_path / "b.yaml", "other: é" * 500_000)
    (tmp_path / "c.yaml").write_bytes(b"\xff names: [x]")
    write(tmp_path / "d.yaml", "\ufeffnames: [cat]")
    assert read_class_names(sorted(tmp_path.iterdir())) == {0: "cat"}
    write(tmp_path / "b.yaml", "names: [é" + "é" * 500_000)
    with pytest.raises(UsageError, match=r"b.yaml' has more than 1,000,000 bytes"):
        read_class_names(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "0 0.5 0.5 0.2 0.2",
            r"a.txt' line 1 has five numbers: a box and not an outline; labels for pixels need outlines",
        ),
        (
            "0 0.5 0.5 0.2 0.2 0.1",
            "line 1 is not 'class x y x y x y ...' with a class from 0 and three points or more; correct or remove it",
        ),
        ("0 0 0 1 0 1 1 0.5", "line 1 is not 'class x y"),
        ("-1 0 0 1 0 1 1", "line 1 is not 'class x y"),
        ("x 0 0 1 0 1 1", "line 1 is not 'class x y"),
        ("0 0 0 1 0 1 nan", "line 1 has a shape with a coordinate that is no finite number"),
        ("0 0 0 1 0 1 y", "line 1 has a shape whose points are not pairs of numbers"),
        (
            "2 0 0 1 0 1 1",
            r"a.txt' has the class 2, but names are listed for 0 to 1; add its name, or correct the number",
        ),
        ("", "no picture in '.*' has a shape"),
    ],
)
def test_a_broken_yolo_file_is_one_clear_sentence(tmp_path, line, sentence):
    with pytest.raises(UsageError, match=sentence):
        find_dataset(yolo(tmp_path, line))


def test_yolo_text_that_is_none(tmp_path):
    yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"a.txt' is no text that can be read"):
        find_dataset(tmp_path)


# All


def test_files_that_are_no_annotations_are_passed_over(tmp_path):
    photo(tmp_path / "a.jpg")
    write(tmp_path / "package.json", {"name": "x"})
    write(tmp_path / "list.json", [1, 2])
    write(tmp_path / "pom.xml", "<project/>")
    write(tmp_path / "._a.json", "mac")
    with pytest.raises(
        UsageError,
        match=r"it has 1 picture and no sub-folders, 2 .json files, 1 .xml file; known are .* annotation files of COCO",
    ):
        find_dataset(tmp_path)


def test_annotations_without_pictures_say_so(tmp_path):
    write(tmp_path / "x.json", coco())
    with pytest.raises(
        UsageError,
        match=r"it has 0 pictures and no sub-folders, 1 .json file; put the pictures that '.*x.json' speaks of there too",
    ):
        find_dataset(tmp_path)


def test_masks_win_over_annotation_files(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    PIL.Image.fromarray(np.eye(10, 12, dtype=np.uint8)).save(tmp_path / "masks" / "a.png")
    write(tmp_path / "x.json", "{")
    assert find_dataset(tmp_path).layout == "folders"
