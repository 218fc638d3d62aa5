"""Published data sets in their real folders: classes, splits and what their masks store; stacks page by page."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile

from useg.classes import CAMVID, CITYSCAPES, IGNORE, ClassTable
from useg.data.dataset import (
    Dataset,
    pair_name,
    read_label,
    read_pair_image,
    read_pair_size,
    read_sample,
)
from useg.data.layouts import find_dataset
from useg.data.masks import CAMVID_COLORS, CITYSCAPES_TRAIN_IDS, OXFORD_PETS
from useg.errors import UsageError


def save(path: Path, pixels: object, kind: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, np.array(pixels, kind))
    else:
        PIL.Image.fromarray(np.array(pixels, kind)).save(path)
    return path


def photo(path: Path, size: tuple[int, int] = (4, 2)) -> Path:
    return save(path, np.full((size[1], size[0], 3), 90))


def splits(dataset: Dataset) -> dict[str, str]:
    return {pair.image.stem: pair.split for pair in dataset.pairs}


# CamVid in its own colours

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
        ("images", "labels", "_L"), ("701_StillsRaw_full", "LabeledApproved_full", "_L"), ("a/701_StillsRaw_full", "a/LabeledApproved_full", "_L"),
        ("train", "train_labels", "_L"), ("images", "labels", ""),
    ],
)  # fmt: skip
def test_camvid_in_32_colours(tmp_path, images, labels, end):
    for name in ("0001TP_006690", "Seq05VD_f00000"):
        photo(tmp_path / images / f"{name}.png")
        save(tmp_path / labels / f"{name}{end}.png", STREET)
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes, len(dataset.pairs)) == ("camvid", CAMVID, 2)
    assert read_label(dataset.pairs[0], dataset).tolist() == [[3, 0, 8, 8], [5, IGNORE, 3, 0]]
    assert find_dataset(tmp_path, CAMVID).classes == CAMVID


def test_camvids_colours_are_32_and_each_class_has_some():
    assert len({color for color, _ in CAMVID_COLORS}) == 32
    assert {value for _, value in CAMVID_COLORS} == set(range(12))
    assert all(
        (color, k) in CAMVID_COLORS for k, color in enumerate(CAMVID.colors) if k != 4
    )  # SegNet recoloured the pavement


def test_a_colour_that_is_not_camvids_is_named(tmp_path):
    for k in range(5):
        photo(tmp_path / "images" / f"{k}.png")
        save(tmp_path / "labels" / f"{k}_L.png", STREET if k < 4 else [[(1, 2, 3)] * 4] * 2)
    dataset = find_dataset(tmp_path)
    with pytest.raises(
        UsageError, match=r"mask '.*4_L.png' has the colour \(1, 2, 3\) at \(row 0, column 0\)"
    ):
        read_label(dataset.pairs[4], dataset)


def test_few_colours_that_camvid_has_too_are_not_camvid(tmp_path):
    photo(tmp_path / "images" / "a.png")
    save(tmp_path / "labels" / "a_L.png", [[ROAD, SKY, CAR, SUV]] * 2)
    assert find_dataset(tmp_path).layout == "folders"


# Cityscapes, ADE20K, pets


def cityscapes(root: Path, kinds: dict[str, list[int]]) -> Path:
    for split in ("train", "val"):
        photo(root / "leftImg8bit" / split / "ulm" / "ulm_000000_000019_leftImg8bit.png")
        for kind, values in kinds.items():
            save(
                root / "gtFine" / split / "ulm" / f"ulm_000000_000019_gtFine_{kind}.png",
                [values] * 2,
            )
        (root / "gtFine" / split / "ulm" / "ulm_000000_000019_gtFine_polygons.json").write_text(
            "{}"
        )
    return root


def test_cityscapes_train_ids(tmp_path):
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
        photo(root / "images" / folder / f"ADE_{split}_00000001.jpg")
        save(root / "annotations" / folder / f"ADE_{split}_00000001.png", [[0, 1, 2, 150]] * 2)
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def test_ade20k(tmp_path):
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


def test_oxford_pets(tmp_path):
    for name in ("Abyssinian_1", "Abyssinian_2", "beagle_10", "pug_7"):
        photo(tmp_path / "images" / f"{name}.jpg")
        save(tmp_path / "annotations" / "trimaps" / f"{name}.png", [[1, 2, 3, 2]] * 2)
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
    with pytest.raises(UsageError, match=r"test.txt' cannot be read"):
        find_dataset(tmp_path)


# Kaggle


def test_carvana(tmp_path):
    for k in (1, 2):
        photo(tmp_path / "train" / f"fff9b3a5373f_0{k}.jpg")
        save(tmp_path / "train_masks" / f"fff9b3a5373f_0{k}_mask.gif", [[0, 1, 1, 0]] * 2)
    photo(tmp_path / "test" / "0004d4463b50_01.jpg")
    (tmp_path / "train_masks.csv").write_text("img,rle_mask\n")
    dataset = find_dataset(tmp_path)
    assert [pair.split for pair in dataset.pairs] == ["train", "train"]
    assert dataset.classes.names == ("background", "foreground")


def test_one_folder_per_image_with_the_masks_of_its_things(tmp_path):
    for name, masks in (("00ae65", 3), ("0a7d30", 1)):
        photo(tmp_path / "stage1_train" / name / "images" / f"{name}.png")
        for k in range(masks):
            save(
                tmp_path / "stage1_train" / name / "masks" / f"{k}f.png",
                255 * (np.arange(8).reshape(2, 4) == k),
            )
    photo(tmp_path / "stage1_test" / "0114f4" / "images" / "0114f4.png")
    (tmp_path / "stage1_train_labels.csv").write_text("ImageId,EncodedPixels\n")
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes.names) == ("instances", ("background", "foreground"))
    assert [pair_name(pair, tmp_path) for pair in dataset.pairs] == [
        f"stage1_train/{name}/images/{name}.png" for name in ("00ae65", "0a7d30")
    ]
    assert [read_label(pair, dataset)[0].tolist() for pair in dataset.pairs] == [
        [1, 1, 1, 0],
        [1, 0, 0, 0],
    ]
    assert len(find_dataset(tmp_path / "stage1_train").pairs) == 2
    save(tmp_path / "stage1_train" / "00ae65" / "masks" / "0f.png", np.ones((3, 4)))
    with pytest.raises(
        UsageError,
        match=r"masks/0f.png' is 4x3 pixels, but its image '.*00ae65.png' is 4x2; they must have one size",
    ):
        read_label(dataset.pairs[0], dataset)


def test_one_mask_of_the_images_name_per_folder_is_an_ordinary_mask(tmp_path):
    for name in ("a", "b"):
        photo(tmp_path / name / "images" / "1.png")
        save(tmp_path / name / "masks" / "1.png", [[0, 1, 2, 0]] * 2)
    assert find_dataset(tmp_path).classes.names == ("class 0", "class 1", "class 2")


# Stacks


def stack(path: Path, pages: int = 3, highest: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path,
        np.stack([np.full((5, 6), min(k, highest)) for k in range(pages)]).astype(np.uint8),
        photometric="minisblack",
    )
    return path


def test_stacks_are_pairs_page_by_page(tmp_path):
    stack(tmp_path / "images" / "a.tif")
    stack(tmp_path / "masks" / "a.tif")
    dataset = find_dataset(tmp_path)
    assert [pair_name(pair, tmp_path) for pair in dataset.pairs] == [
        "images/a.tif#0",
        "images/a.tif#1",
        "images/a.tif#2",
    ]
    assert len(set(dataset.pairs)) == 3
    assert dataset.classes.names == ("class 0", "class 1", "class 2")
    pair = dataset.pairs[2]
    assert (read_pair_size(pair), read_pair_image(pair).shape, read_pair_image(pair).max()) == (
        (6, 5),
        (5, 6, 1),
        2,
    )
    assert (read_sample(pair, dataset).label == 2).all()


def test_isbi_2012_as_it_is_published(tmp_path):
    for name in ("train-volume", "train-labels", "test-volume"):
        stack(tmp_path / f"{name}.tif", highest=1)
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "one folder"
    assert {pair.split for pair in dataset.pairs} == {"train"}
    assert len(dataset.pairs) == 3
    stack(tmp_path / "test-labels.tif")
    assert [pair.split for pair in find_dataset(tmp_path).pairs] == ["test"] * 3 + ["train"] * 3


def test_stacks_of_different_length_are_named(tmp_path):
    stack(tmp_path / "images" / "a.tif")
    stack(tmp_path / "masks" / "a.tif", 2)
    with pytest.raises(
        UsageError,
        match=r"image '.*images/a.tif' has 3 pages, but its mask '.*masks/a.tif' has 2; give a mask for every page",
    ):
        find_dataset(tmp_path)
    dataset = find_dataset(tmp_path, strict=False)
    assert len(dataset.pairs) == 1
    with pytest.raises(UsageError, match="is a stack of 3 pages"):
        read_sample(dataset.pairs[0], dataset)
    (tmp_path / "masks" / "a.tif").unlink()
    save(tmp_path / "masks" / "a.png", np.zeros((5, 6)))
    with pytest.raises(
        UsageError,
        match=r"a.tif' has 3 pages, but its mask '.*a.png' has 1; give a mask for every page",
    ):
        find_dataset(tmp_path)


def test_tiffs_of_one_picture_have_no_page(tmp_path):
    save(tmp_path / "images" / "a.tif", np.zeros((5, 6, 3)))
    save(tmp_path / "masks" / "a.tif", np.eye(5, 6))
    assert [pair.page for pair in find_dataset(tmp_path).pairs] == [None]


# What dataset.toml ignores


def test_ignored_values_leave_the_table(tmp_path):
    photo(tmp_path / "CameraRGB" / "a.png")
    save(tmp_path / "CameraSeg" / "a.png", [[(0, 0, 0), (7, 0, 0), (10, 0, 0), (7, 0, 0)]] * 2)
    for ignore in ('[10, "None"]', '["Vehicles", 0]'):
        (tmp_path / "dataset.toml").write_text(f"ignore = {ignore}")
        dataset = find_dataset(tmp_path)
        assert len(dataset.classes) == 11
        assert read_label(dataset.pairs[0], dataset)[0].tolist() == [IGNORE, 6, IGNORE, 6]


def test_ignored_colours_leave_the_table(tmp_path):
    photo(tmp_path / "images" / "a.png")
    save(tmp_path / "masks" / "a.png", [[(0, 0, 0), (9, 8, 7), (1, 2, 3), (9, 8, 7)]] * 2)
    (tmp_path / "dataset.toml").write_text('ignore = ["color #090807"]')
    assert find_dataset(tmp_path).classes == ClassTable(
        ("color #000000", "color #010203"),
        ((0, 0, 0), (1, 2, 3)),
        values=(0, 1),
        ignore=(0x090807,),
        by_color=True,
    )
