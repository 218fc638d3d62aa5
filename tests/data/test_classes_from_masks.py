"""The values of masks become classes, and published data sets get their own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from made_data import write_folders, write_image, write_mask, write_pixels

from useg.classes import CAMVID, CITYSCAPES, IGNORE, ClassTable
from useg.data import classes_from_masks, mask_problems
from useg.data.dataset import Dataset, read_label
from useg.data.layouts import find_dataset
from useg.data.mask_content import MaskContent, color_code, count_codes
from useg.data.published_classes import CAMVID_COLORS, CITYSCAPES_TRAIN_IDS, OXFORD_PETS
from useg.errors import DataError
from useg.images.image_files import read_mask, write_label

pytestmark = pytest.mark.wheel


@pytest.mark.parametrize(
    ("values", "stored", "ignore", "first"),
    [
        ((0, 255), (0, 255), (), "background"),
        ((0, 1), (0, 1), (), "background"),
        ((0, 128), (0, 128), (), "background"),
        ((0, 1, 2), (0, 1, 2), (), "class 0"),
        ((0, 1, 4), (0, 1, 4), (), "class 0"),
        ((0, 1, 2, 255), (0, 1, 2), (255,), "class 0"),
        ((0, 15, 255), (0, 15), (255,), "class 0"),
        ((0, 128, 255), (0, 128, 255), (), "class 0"),
        (tuple(range(151)), tuple(range(151)), (), "class 0"),
        ((3,), (3,), (), "class 3"),
    ],
)
def test_values_of_masks_become_class_ids(tmp_path, values, stored, ignore, first):
    for name in ("1", "2"):
        columns = np.tile(np.repeat(np.uint8(values), 5), (4, 1))
        write_image(tmp_path / "images" / f"{name}.png", columns.shape[::-1])
        PIL.Image.fromarray(columns).save(write_mask(tmp_path / "masks" / f"{name}.png"))
    dataset = find_dataset(tmp_path)
    assert (dataset.classes.values, dataset.classes.ignore, dataset.classes.names[0]) == (
        stored,
        ignore,
        first,
    )
    assert set(np.unique(read_label(dataset.pairs[0], dataset))) == set(range(len(stored))) | (
        {IGNORE} if ignore else set()
    )


def test_ids_are_joined_over_all_masks(tmp_path):
    write_folders(tmp_path, names=("1",), values=(0, 1))
    write_folders(tmp_path, names=("2",), values=(0, 5))
    assert find_dataset(tmp_path).classes.values == (0, 1, 5)


def test_a_palette_gives_ids_their_colours(tmp_path):
    write_folders(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        label = read_mask(path)
        path.unlink()
        write_label(path, label, CAMVID)
    table = find_dataset(tmp_path).classes
    assert table.colors == CAMVID.colors[:3]
    assert table.names == ("class 0", "class 1", "class 2")
    assert not table.by_color


def test_palettes_that_disagree_are_read_as_colours(tmp_path):
    write_folders(tmp_path, names=("1", "2"))
    for name, colors in (("1", CAMVID.colors), ("2", CAMVID.colors[::-1])):
        path = tmp_path / "masks" / f"{name}.png"
        label = read_mask(path)
        path.unlink()
        write_label(path, label, ClassTable(CAMVID.names, colors))
    dataset = find_dataset(tmp_path)
    assert dataset.classes.by_color
    first, second = (read_label(pair, dataset)[0, 0] for pair in dataset.pairs)
    assert dataset.classes.colors[first] == CAMVID.colors[0]
    assert dataset.classes.colors[second] == CAMVID.colors[-1]


def test_colours_become_classes(tmp_path):
    write_folders(tmp_path, names=("1",), values=[(0, 0, 0), (128, 64, 128)])
    write_folders(
        tmp_path, names=("2",), values=[(0, 0, 0), (0, 0, 0)]
    )  # one colour, equal bands: still a colour mask
    dataset = find_dataset(tmp_path)
    assert (dataset.classes.by_color, dataset.classes.names, dataset.classes.colors) == (
        True,
        ("background", "foreground"),
        ((0, 0, 0), (128, 64, 128)),
    )
    assert [np.unique(read_label(pair, dataset)).tolist() for pair in dataset.pairs] == [
        [0, 1],
        [0],
    ]
    write_folders(tmp_path, names=("3",), values=[(0, 0, 0), (9, 8, 7)])
    assert find_dataset(tmp_path).classes.names == (
        "color #000000",
        "color #090807",
        "color #804080",
    )


def test_ids_in_the_red_channel_are_read_in_any_layout(tmp_path):
    dataset = find_dataset(write_folders(tmp_path, values=[(0, 0, 0), (1, 0, 0), (5, 0, 0)]))
    assert (dataset.classes.by_color, dataset.classes.values) == (False, (0, 1, 5))
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0, 1, 2]


def test_an_unreadable_mask_is_an_error_only_if_strict(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "masks" / "2.png").write_text("no picture")
    with pytest.raises(DataError, match=r"2.png' is not an image"):
        find_dataset(tmp_path)
    assert find_dataset(tmp_path, strict=False).classes.values == (0, 1, 2)
    for path in (tmp_path / "masks").iterdir():
        path.write_text("no picture")
    assert len(find_dataset(tmp_path, strict=False).pairs) == 3


def splits(dataset: Dataset) -> dict[str, str]:
    return {pair.image.stem: pair.split for pair in dataset.pairs}


ROAD, SKY, CAR, SUV, TREE, VOID = (
    (128, 64, 128),
    (128, 128, 128),
    (64, 0, 128),
    (64, 128, 192),
    (128, 128, 0),
    (0, 0, 0),
)
STREET = [[ROAD, SKY, CAR, SUV], [TREE, VOID, ROAD, SKY]]


@pytest.mark.parametrize(
    ("images", "labels", "end"),
    [
        ("images", "labels", "_L"),
        ("701_StillsRaw_full", "LabeledApproved_full", "_L"),
        ("a/701_StillsRaw_full", "a/LabeledApproved_full", "_L"),
        ("train", "train_labels", "_L"),
        ("images", "labels", ""),
    ],
)
def test_camvid_is_recognized_by_its_32_colours(tmp_path, images, labels, end):
    for name in ("0001TP_006690", "Seq05VD_f00000"):
        write_image(tmp_path / images / f"{name}.png", (4, 2))
        write_pixels(tmp_path / labels / f"{name}{end}.png", STREET)
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes, len(dataset.pairs)) == ("camvid", CAMVID, 2)
    assert read_label(dataset.pairs[0], dataset).tolist() == [[3, 0, 8, 8], [5, IGNORE, 3, 0]]
    assert find_dataset(tmp_path, CAMVID).classes == CAMVID


def test_every_class_of_camvid_has_some_of_the_32_colours():
    assert len({color for color, _ in CAMVID_COLORS}) == 32
    assert {value for _, value in CAMVID_COLORS} == set(range(12))
    assert all(
        (color, k) in CAMVID_COLORS for k, color in enumerate(CAMVID.colors) if k != 4
    )  # SegNet recoloured the pavement


def test_a_colour_that_camvid_does_not_have_is_refused(tmp_path):
    for k in range(5):
        write_image(tmp_path / "images" / f"{k}.png", (4, 2))
        write_pixels(tmp_path / "labels" / f"{k}_L.png", STREET if k < 4 else [[(1, 2, 3)] * 4] * 2)
    dataset = find_dataset(tmp_path)
    with pytest.raises(
        DataError, match=r"mask '.*4_L.png' has the colour \(1, 2, 3\) at \(row 0, column 0\)"
    ):
        read_label(dataset.pairs[4], dataset)


def test_few_colours_of_camvid_are_not_enough_to_recognize_it(tmp_path):
    write_image(tmp_path / "images" / "a.png", (4, 2))
    write_pixels(tmp_path / "labels" / "a_L.png", [[ROAD, SKY, CAR, SUV]] * 2)
    assert find_dataset(tmp_path).layout == "folders"


def cityscapes(root: Path, kinds: dict[str, list[int]]) -> Path:
    for split in ("train", "val"):
        write_image(
            root / "leftImg8bit" / split / "ulm" / "ulm_000000_000019_leftImg8bit.png", (4, 2)
        )
        for kind, values in kinds.items():
            write_pixels(
                root / "gtFine" / split / "ulm" / f"ulm_000000_000019_gtFine_{kind}.png",
                [values] * 2,
            )
        (root / "gtFine" / split / "ulm" / "ulm_000000_000019_gtFine_polygons.json").write_text(
            "{}"
        )
    return root


def test_cityscapes_train_ids_have_their_own_table(tmp_path):
    dataset = find_dataset(
        cityscapes(tmp_path / "a", {"labelTrainIds": [0, 18, 255, 1], "color": [1, 2, 3, 4]})
    )
    assert (dataset.layout, dataset.classes, len(dataset.pairs)) == (
        "cityscapes",
        CITYSCAPES_TRAIN_IDS,
        2,
    )
    assert read_label(dataset.pairs[0], dataset)[0].tolist() == [0, 18, IGNORE, 1]
    assert (
        find_dataset(tmp_path / "a", CITYSCAPES).classes == CITYSCAPES_TRAIN_IDS
    )  # a model that was trained on labelIds
    both = find_dataset(
        cityscapes(tmp_path / "b", {"labelTrainIds": [0, 18, 255, 1], "labelIds": [7, 33, 0, 8]})
    )
    assert read_label(both.pairs[0], both)[0].tolist() == [0, 18, IGNORE, 1]


def ade20k(root: Path) -> Path:
    for split, folder in (("train", "training"), ("val", "validation")):
        write_image(root / "images" / folder / f"ADE_{split}_00000001.jpg", (4, 2))
        write_pixels(
            root / "annotations" / folder / f"ADE_{split}_00000001.png", [[0, 1, 2, 150]] * 2
        )
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def test_ade20k_names_come_from_its_list(tmp_path):
    root = ade20k(tmp_path / "ADEChallengeData2016")
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, len(dataset.classes), dataset.splits_by) == ("ade20k", 150, "official")
    assert dataset.classes.names[:2] == ("class 1", "class 2")
    assert read_label(dataset.pairs[0], dataset)[0].tolist() == [IGNORE, 0, 1, 149]
    rows = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        "1\t0.1576\t11664\t1172\t1\twall",
        "2\t0.1072\t6046\t612\t1\tbuilding, edifice",
    ]
    rows += [
        "59\t0.0024\t240\t28\t0\tscreen door, screen",
        "131\t0.0009\t236\t23\t0\tscreen, silver screen",
        "142\t0.0008\t9\t9\t0\tscreen, CRT",
    ]
    (root / "objectInfo150.txt").write_text("\n".join(rows))
    names = find_dataset(tmp_path).classes.names
    assert (names[0], names[1], names[58], names[130], names[149]) == (
        "wall",
        "building",
        "screen door",
        "screen, silver screen",
        "class 150",
    )
    assert splits(find_dataset(root)) == {"ADE_train_00000001": "train", "ADE_val_00000001": "val"}


def test_oxford_pets_have_their_classes_and_splits(tmp_path):
    for name in ("Abyssinian_1", "Abyssinian_2", "beagle_10", "pug_7"):
        write_image(tmp_path / "images" / f"{name}.jpg", (4, 2))
        write_pixels(tmp_path / "annotations" / "trimaps" / f"{name}.png", [[1, 2, 3, 2]] * 2)
        (tmp_path / "annotations" / "trimaps" / f"._{name}.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "images" / "Abyssinian_5.mat").write_bytes(b"MATLAB")
    (tmp_path / "annotations" / "list.txt").write_text(
        "#Image CLASS-ID SPECIES BREED ID\nAbyssinian_1 1 1 1\n"
    )
    (tmp_path / "annotations" / "trainval.txt").write_text(
        "Abyssinian_1 1 1 1\nAbyssinian_2 1 1 1\n"
    )
    (tmp_path / "annotations" / "test.txt").write_text("beagle_10 5 2 1\n")
    (tmp_path / "annotations" / "xmls").mkdir()
    (tmp_path / "annotations" / "xmls" / "Abyssinian_1.xml").write_text("<annotation/>")
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes) == ("pets", OXFORD_PETS)
    assert splits(dataset) == {
        "Abyssinian_1": "train",
        "Abyssinian_2": "train",
        "beagle_10": "test",
        "pug_7": "gap",
    }
    assert read_label(dataset.pairs[0], dataset)[0].tolist() == [1, 0, 2, 0]
    (tmp_path / "dataset.toml").write_text('ignore = ["border"]')
    assert find_dataset(tmp_path).classes.names == ("background", "pet")
    assert read_label(find_dataset(tmp_path).pairs[0], find_dataset(tmp_path))[0].tolist() == [
        1,
        0,
        IGNORE,
        0,
    ]
    (tmp_path / "annotations" / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"test.txt' cannot be read"):
        find_dataset(tmp_path)


def test_a_mask_all_of_whose_colours_were_smeared_has_neither_ids_nor_colours():
    colors = np.full((20, 20), color_code((0, 0, 200)))
    colors[5:15, 5:15] = color_code((255, 0, 0))
    colored = count_codes(Path("a.png"), colors)
    nothing = np.zeros(0, np.int64)
    dropped = MaskContent(Path("b.png"), nothing, nothing, nothing, nothing, np.zeros(2, np.int64))
    contents = [colored, dropped, replace(dropped, band=0)]
    assert classes_from_masks._store_colors(contents)
    assert mask_problems.describe_ids_and_colors(contents) == ""
    assert not dropped.has_colors
