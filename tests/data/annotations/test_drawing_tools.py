"""Files of LabelMe, Supervisely and VIA become label maps; broken ones are refused."""

import numpy as np
import pytest
from made_annotations import (
    CORNERS,
    expect_block,
    images_and_splits,
    labelme,
    png,
    read_first_label,
    write_file,
    write_photo,
)

from useg.classes import IGNORE
from useg.data.layouts import find_dataset
from useg.errors import DataError, UsageError


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
        ({"shape_type": "rectangle", "points": CORNERS[:1]}, "has an outline of 1 points"),
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
