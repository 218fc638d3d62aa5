"""Files of LabelMe, VIA, CVAT and Cityscapes become label maps; what is broken is skipped."""

import numpy as np
import pytest
from made_annotations import (
    CORNERS,
    cvat,
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
from useg.reporting.inspection import inspect_dataset


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


def test_folders_that_all_name_a_split_are_splits_of_annotated_images(tmp_path):
    for folder in ("MoNuSegTrainingData", "MoNuSegTestData"):
        write_photo(tmp_path / folder / "a.jpg")
        write_file(tmp_path / folder / "a.json", labelme({"points": CORNERS}, image="a.jpg"))
    assert sorted(images_and_splits(find_dataset(tmp_path))) == [
        ("MoNuSegTestData/a.jpg", "test"),
        ("MoNuSegTrainingData/a.jpg", "train"),
    ]


def test_dacl10k_is_read_like_labelme(tmp_path):
    for split in ("train", "validation"):
        write_photo(tmp_path / "images" / split / f"{split}_1.jpg")
        content = {
            "imageName": f"{split}_1.jpg",
            "shapes": [{"label": "Rust", "points": CORNERS, "shapeType": "polygon"}],
        }
        write_file(tmp_path / "annotations" / split / f"{split}_1.json", content)
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "Rust")
    assert [split for _, split in images_and_splits(dataset)] == ["train", "val"]
    assert (read_first_label(dataset) == expect_block(1)).all()


def test_labelme_finds_a_renamed_image_by_the_name_of_the_annotation_file(tmp_path):
    write_photo(tmp_path / "b.png")
    write_file(tmp_path / "b.json", labelme({"points": CORNERS}, image="C:/Pictures/IMG_1234.jpg"))
    assert images_and_splits(find_dataset(tmp_path)) == [("b.png", "")]


def test_a_labelme_file_that_names_another_image_than_its_own_is_refused(tmp_path):
    for name in ("a", "b"):
        write_photo(tmp_path / f"{name}.png")
    write_file(tmp_path / "a.json", labelme({"points": CORNERS}, image="b.png"))
    with pytest.raises(
        DataError,
        match=r"annotates 'b\.png', but the image beside it with the same name is 'a\.png'",
    ):
        find_dataset(tmp_path)


def test_names_of_classes_that_differ_in_capitals_are_told(tmp_path):
    write_photo(tmp_path / "a.png")
    shapes = [{"label": name, "points": CORNERS} for name in ("big tree", "Big_Tree", "bush")]
    write_file(tmp_path / "a.json", labelme(*shapes, image="a.png"))
    (note,) = find_dataset(tmp_path).notes
    assert note.startswith("the classes 'Big_Tree' and 'big tree' have nearly the same name")


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
            "has a shape with a coordinate that is NaN or infinite",
        ),
        (cvat('<polygon label="car" points="1,1;2;3,3"/>'), "points are not pairs of numbers"),
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


def test_polygons_of_cityscapes_label_the_image_in_the_same_folder(tmp_path):
    objects = [
        {"label": "road", "polygon": [[0, 0], [11, 0], [11, 9], [0, 9]]},
        {"label": "cargroup", "polygon": CORNERS},
        {"label": "sky", "polygon": CORNERS, "deleted": 1},
        {"label": "pole", "polygon": [[1, 1], [2, 2]]},
        {"label": "ego vehicle", "polygon": [[0, 6], [11, 6], [11, 9], [0, 9]]},
    ]
    for drive in ("0", "1"):
        write_photo(tmp_path / "leftImg8bit" / "train" / drive / "000005_leftImg8bit.jpg")
        write_file(
            tmp_path / "gtFine" / "train" / drive / "000005_gtFine_polygons.json",
            {"imgWidth": 12, "imgHeight": 10, "objects": objects[int(drive) :]},
        )
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("car", "road")
    assert [pair.image.parent.name for pair in dataset.pairs] == ["0", "1"]
    whole, parts = (read_first_label(dataset, k) for k in (0, 1))
    assert (whole[3, 4], whole[0, 0], whole[8, 5]) == (0, 1, IGNORE)
    assert [passed.file.parent.name for passed in dataset.skipped] == ["0", "1"]
    # What no polygon covers has no label.
    assert (parts[3, 4], parts[0, 0]) == (0, IGNORE)


def test_regions_of_imagescope_are_painted_in_order_with_holes_and_ellipses(tmp_path):
    def region(corners, **more: str) -> str:
        attributes = " ".join(f'{key}="{value}"' for key, value in more.items())
        vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in corners)
        return f"<Region {attributes}><Vertices>{vertices}</Vertices></Region>"

    regions = (
        region(CORNERS, Type="0"),
        region([[3, 2], [5, 2], [5, 4], [3, 4]], NegativeROA="1"),
        region([[7, 1], [11, 5]], Type="2"),
        region([["nan", 1], [3, 3], [4, 4]], Type="0"),
    )
    write_photo(tmp_path / "Tissue Images" / "TCGA-1.png")
    write_file(
        tmp_path / "Annotations" / "TCGA-1.xml",
        f"<Annotations><Annotation><Regions>{''.join(regions)}</Regions></Annotation>"
        "</Annotations>",
    )
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes.names) == ("imagescope", ("background", "object"))
    label = read_first_label(dataset)
    assert (label[1, 2], label[3, 4], label[3, 9], label[1, 7]) == (1, 0, 1, 0)
    assert len(dataset.skipped) == 1


def test_what_is_wrong_in_an_annotation_file_is_not_taken_for_a_failed_download(tmp_path):
    for name, width in (("a", 99), ("b", 12), ("c", 12)):
        write_photo(tmp_path / "leftImg8bit" / "train" / "0" / f"{name}_leftImg8bit.jpg")
        write_file(
            tmp_path / "gtFine" / "train" / "0" / f"{name}_gtFine_polygons.json",
            {
                "imgWidth": width,
                "imgHeight": 10,
                "objects": [{"label": "road", "polygon": CORNERS}],
            },
        )
    messages = [finding.message for finding in inspect_dataset(tmp_path).findings]
    assert any("is 12x10 pixels, but its mask" in message for message in messages), messages
    assert not any("failed download" in message for message in messages)


@pytest.mark.parametrize(
    ("attribute", "name"),
    [('Name="Epithelial" Value=""', "Epithelial"), ('Name="Description" Value=""', "object")],
)
def test_layers_of_imagescope_without_a_name_are_named_by_their_attribute(
    tmp_path, attribute, name
):
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in CORNERS)
    write_photo(tmp_path / "TCGA-1.png")
    write_file(
        tmp_path / "TCGA-1.xml",
        f'<Annotations><Annotation Name=""><Attributes><Attribute {attribute}/></Attributes>'
        f'<Regions><Region Type="0"><Vertices>{vertices}</Vertices></Region></Regions>'
        "</Annotation></Annotations>",
    )
    assert find_dataset(tmp_path).classes.names == ("background", name)
