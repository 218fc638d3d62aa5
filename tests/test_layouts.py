"""Folders as people have them -> pairs and class table; every refusal says what was found and what to do."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from useg.classes import CAMVID, CARLA, CITYSCAPES, IGNORE, ClassTable, write_classes
from useg.data.dataset import Dataset, Pair, read_label, read_sample
from useg.data.layouts import find_dataset
from useg.data.pairing import key_by_stem, match_by_name, strip_role_words
from useg.errors import UsageError
from useg.images.files import read_mask, write_label

pytestmark = pytest.mark.wheel

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def picture(path: Path, *, size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)
    return path


def mask(path: Path, values: object = (0, 1, 2), *, size: tuple[int, int] = (8, 6)) -> Path:
    """A mask that holds ``values``: numbers, or colours as triples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = np.array(values, np.uint8)
    places = np.arange(size[0] * size[1]) % len(listed)
    PIL.Image.fromarray(listed[places].reshape(size[1], size[0], *listed.shape[1:])).save(path)
    return path


def folders(
    root: Path,
    images: str = "images",
    masks: str = "masks",
    names: tuple[str, ...] = ("1", "2", "10"),
    values: object = (0, 1, 2),
) -> Path:
    for name in names:
        picture(root / images / f"{name}.jpg")
        mask(root / masks / f"{name}.png", values)
    return root


def names(dataset: Dataset) -> list[tuple[str, str, str]]:
    return [
        (
            pair.image.relative_to(dataset.root).as_posix(),
            pair.mask.relative_to(dataset.root).as_posix(),
            pair.split,
        )
        for pair in dataset.pairs
    ]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "masks"), ("image", "label"), ("imgs", "masks"), ("Images", "Labels"), ("images", "annotations"), ("img", "ann"),
        ("inputs", "targets"), ("IMAGES", "mask"), ("train_images", "train_masks"), ("images_train", "masks_train"), ("trainimages", "trainlabels"),
    ],
)  # fmt: skip
def test_two_folders_are_matched_by_name_in_natural_order(tmp_path, images, masks):
    dataset = find_dataset(folders(tmp_path, images, masks))
    assert [pair.image.stem for pair in dataset.pairs] == ["1", "2", "10"]
    assert all(pair.image.stem == pair.mask.stem for pair in dataset.pairs)
    assert {pair.split for pair in dataset.pairs} == {"train" if "train" in images else ""}
    assert dataset.layout == "folders"


@pytest.mark.parametrize("seg", ["CameraSeg", "CameraMask"])
def test_carla_in_one_folder_and_in_several(tmp_path, seg):
    one = folders(tmp_path / "one", "CameraRGB", seg, values=[(7, 0, 0), (12, 0, 0)])
    assert (find_dataset(one).layout, find_dataset(one).classes) == ("carla", CARLA)
    many = tmp_path / "many"
    for part in ("dataB/dataB", "dataA/dataA"):
        folders(many / part, "CameraRGB", seg, values=[(7, 0, 0), (12, 0, 0)])
    dataset = find_dataset(many)
    assert [name for name, _, _ in names(dataset)][:4] == [
        f"dataA/dataA/CameraRGB/{k}.jpg" for k in (1, 2, 10)
    ] + ["dataB/dataB/CameraRGB/1.jpg"]
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [7, 12]


def test_carla_masks_whose_bands_are_all_zero_or_single(tmp_path):
    picture(tmp_path / "CameraRGB" / "a.png")
    picture(tmp_path / "CameraRGB" / "b.png")
    mask(tmp_path / "CameraSeg" / "a.png", [(0, 0, 0)])
    mask(tmp_path / "CameraSeg" / "b.png", [3, 4])
    dataset = find_dataset(tmp_path)
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0]
    assert np.unique(read_label(dataset.pairs[1], dataset)).tolist() == [3, 4]


def test_carla_values_and_colours_beyond_the_table_are_named(tmp_path):
    dataset = find_dataset(
        folders(tmp_path, "CameraRGB", "CameraSeg", values=[(7, 0, 0), (17, 0, 0)])
    )
    with pytest.raises(
        UsageError,
        match=r"mask '.*1.png' has the value 17 at \(row 0, column 1\), but there are 13 classes \(0-12\)",
    ):
        read_label(dataset.pairs[0], dataset)
    mask(tmp_path / "CameraSeg" / "1.png", [(70, 70, 70), (128, 64, 128)])
    with pytest.raises(
        UsageError,
        match=r"1.png' holds colours, but the class table \(13 classes\) expects ids; list .* by_color = true",
    ):
        read_label(dataset.pairs[0], dataset)


@pytest.mark.parametrize("annot", ["annot", "_annot"])
def test_camvid(tmp_path, annot):
    for split in ("train", "val", "test"):
        folders(tmp_path, split, split + annot, ("0016E5_1",), values=(0, 10, 11))
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes, dataset.splits_by) == ("camvid", CAMVID, "official")
    assert [pair.split for pair in dataset.pairs] == ["train", "val", "test"]
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0, 10, IGNORE]


def test_split_folders_around_and_inside(tmp_path):
    for split in ("train", "valid", "Testing"):
        folders(tmp_path / "a" / split)
        folders(tmp_path / "b", f"images/{split}", f"masks/{split}")
    for root in ("a", "b"):
        dataset = find_dataset(tmp_path / root)
        assert sorted({pair.split for pair in dataset.pairs}) == ["test", "train", "val"], root
        assert len(dataset.pairs) == 9


def test_a_test_folder_without_masks_is_left_out(tmp_path):
    folders(tmp_path, "train", "train_masks")
    picture(tmp_path / "test" / "9.jpg")
    assert len(find_dataset(tmp_path).pairs) == 3
    inside = folders(tmp_path / "inside", "images/train", "masks/train")
    picture(inside / "images" / "test" / "9.jpg")
    assert len(find_dataset(inside).pairs) == 3


@pytest.mark.parametrize(
    ("image", "truth"),
    [
        ("a_7", "a_7_mask"), ("a_7", "a_7_label"), ("0001TP_6690", "0001TP_6690_L"), ("a7", "a7-seg"),
        ("a7", "a7_gt"), ("ISIC_1", "ISIC_1_segmentation"), ("8_sat", "8_mask"), ("img_01", "mask_01"), ("image1", "label1"), ("IMG_1", "img_1"),
        ("a_image", "a_mask"),
    ],
)  # fmt: skip
def test_names_may_say_what_a_file_is(tmp_path, image, truth):
    picture(tmp_path / "images" / f"{image}.jpg")
    mask(tmp_path / "masks" / f"{truth}.png")
    assert len(find_dataset(tmp_path).pairs) == 1


def test_exact_names_win_over_reduced_ones(tmp_path):
    folders(tmp_path, names=("a", "a_L"))
    assert all(pair.image.stem == pair.mask.stem for pair in find_dataset(tmp_path).pairs)


def test_images_and_masks_in_one_folder(tmp_path):
    for k in range(3):
        picture(tmp_path / f"cell ({k}).png")
        mask(tmp_path / f"cell ({k})_mask.png")
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "one folder"
    assert len(dataset.pairs) == 3


def test_deeper_folders_are_matched_by_path_and_otherwise_by_name(tmp_path):
    same = tmp_path / "same"
    for street in ("a", "b"):
        folders(same, f"images/{street}", f"masks/{street}")
    assert len(find_dataset(same).pairs) == 6
    other = folders(tmp_path / "other", "images", "annotations/trimaps")
    assert len(find_dataset(other).pairs) == 3


def test_hidden_files_and_other_files_are_no_pictures(tmp_path):
    folders(tmp_path, "images", "annotations")
    (tmp_path / "images" / "._1.jpg").write_bytes(b"mac")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"windows")
    (tmp_path / "__MACOSX" / "images").mkdir(parents=True)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("0 0.5 0.5 1 1")
    assert len(find_dataset(tmp_path).pairs) == 3


def test_voc_takes_its_lists_and_has_images_without_masks(tmp_path):
    for name in ("2007_1", "2007_2", "2007_3"):
        picture(tmp_path / "VOC2012" / "JPEGImages" / f"{name}.jpg")
    for name, split in (("2007_1", "train"), ("2007_3", "val")):
        mask(tmp_path / "VOC2012" / "SegmentationClass" / f"{name}.png", (0, 1, 2, 255))
        (tmp_path / "VOC2012" / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
            name + "\n"
        )
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "voc"
    assert [pair.split for pair in dataset.pairs] == ["train", "val"]
    assert dataset.classes.ignore == (IGNORE,)


def test_cityscapes_takes_the_ids_among_its_files(tmp_path):
    for split in ("train", "val"):
        stem = tmp_path / "leftImg8bit" / split / "aachen" / "aachen_000000_000019"
        picture(stem.with_name(stem.name + "_leftImg8bit.png"))
        for kind, values in (
            ("labelIds", (7, 33, 0)),
            ("color", [(1, 2, 3)]),
            ("instanceIds", (7, 7)),
        ):
            mask(
                tmp_path / "gtFine" / split / "aachen" / f"aachen_000000_000019_gtFine_{kind}.png",
                values,
            )
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes, [pair.split for pair in dataset.pairs]) == (
        "cityscapes",
        CITYSCAPES,
        ["train", "val"],
    )
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0, 18, IGNORE]


def test_what_is_no_data_folder(tmp_path):
    (tmp_path / "carla").mkdir()
    with pytest.raises(
        UsageError,
        match=r"the data '.*carlo' does not exist; give a folder with images and masks.*; did you mean 'carla'\?",
    ):
        find_dataset(tmp_path / "carlo")
    file = picture(tmp_path / "a.png")
    with pytest.raises(
        UsageError,
        match=r"a.png' is a file; give a folder with images and masks, or a dataset.toml",
    ):
        find_dataset(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    (tmp_path / "images").mkdir(mode=0)
    with pytest.raises(
        UsageError,
        match=r"the folder '.*images' cannot be read \(Permission denied\); make it readable",
    ):
        find_dataset(tmp_path)


def test_nothing_recognised_shows_what_is_there_and_a_dataset_toml_that_works(tmp_path):
    folders(tmp_path, "raw stuff", "truth")
    picture(tmp_path / "loose.png")
    with pytest.raises(UsageError, match="no pairs of image and mask were found") as caught:
        find_dataset(tmp_path)
    message = str(caught.value)
    assert (
        "it has raw stuff/ (3 pictures), truth/ (3 pictures), 1 picture beside them; known are CameraRGB + CameraSeg"
        in message
    )
    (tmp_path / "dataset.toml").write_text("\n".join(message.splitlines()[1:]))
    assert names(find_dataset(tmp_path))[0] == ("raw stuff/1.jpg", "truth/1.png", "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="it has 0 pictures and no sub-folders; known are"):
        find_dataset(tmp_path / "empty")


def test_files_without_partner_are_named(tmp_path):
    folders(tmp_path, names=("1", "2"))
    for k in range(5):
        picture(tmp_path / "images" / f"x{k}.jpg")
    with pytest.raises(
        UsageError,
        match=r"5 images without a mask \(2 pairs are complete\): '.*x0.jpg', '.*x1.jpg', '.*x2.jpg' and 2 more; add the missing",
    ):
        find_dataset(tmp_path)
    dataset = find_dataset(tmp_path, strict=False)
    assert (len(dataset.pairs), len(dataset.images), dataset.masks) == (2, 5, ())
    for k in range(5):
        (tmp_path / "images" / f"x{k}.jpg").unlink()
    mask(tmp_path / "masks" / "y.png")
    with pytest.raises(
        UsageError,
        match=r"1 mask without an image \(2 pairs are complete\): '.*y.png'; add the missing images",
    ):
        find_dataset(tmp_path)
    assert [path.name for path in find_dataset(tmp_path, strict=False).masks] == ["y.png"]


def test_two_files_for_one_partner_are_an_error(tmp_path):
    folders(tmp_path, names=("1",))
    picture(tmp_path / "images" / "1.png")
    with pytest.raises(
        UsageError,
        match=r"1.jpg' and '.*1.png' have the same name \('1'\), so it is unclear which one belongs to its partner; remove one",
    ):
        find_dataset(tmp_path)


def test_sizes_that_differ_are_named(tmp_path):
    folders(tmp_path)
    mask(tmp_path / "masks" / "2.png", size=(7, 6))
    dataset = find_dataset(tmp_path)
    assert read_sample(dataset.pairs[0], dataset).label.shape == (6, 8)
    with pytest.raises(
        UsageError,
        match=r"image '.*2.jpg' is 8x6 pixels, but its mask '.*2.png' is 7x6; they must have one size",
    ):
        read_sample(dataset.pairs[1], dataset)


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
def test_ids_are_taken_as_found(tmp_path, values, stored, ignore, first):
    for name in ("1", "2"):
        picture(tmp_path / "images" / f"{name}.png", size=(16, 16))
        mask(tmp_path / "masks" / f"{name}.png", values, size=(16, 16))
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
    folders(tmp_path, names=("1",), values=(0, 1))
    folders(tmp_path, names=("2",), values=(0, 5))
    assert find_dataset(tmp_path).classes.values == (0, 1, 5)


def test_a_palette_gives_ids_their_colours(tmp_path):
    folders(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        write_label(path, read_mask(path), CAMVID)
    table = find_dataset(tmp_path).classes
    assert table.colors == CAMVID.colors[:3]
    assert table.names == ("class 0", "class 1", "class 2")
    assert not table.by_color


def test_palettes_that_disagree_are_read_as_colours(tmp_path):
    folders(tmp_path, names=("1", "2"))
    for name, colors in (("1", CAMVID.colors), ("2", CAMVID.colors[::-1])):
        write_label(
            tmp_path / "masks" / f"{name}.png",
            read_mask(tmp_path / "masks" / f"{name}.png"),
            ClassTable(CAMVID.names, colors),
        )
    dataset = find_dataset(tmp_path)
    assert dataset.classes.by_color
    first, second = (read_label(pair, dataset)[0, 0] for pair in dataset.pairs)
    assert dataset.classes.colors[first] == CAMVID.colors[0]
    assert dataset.classes.colors[second] == CAMVID.colors[-1]


def test_colours_become_classes(tmp_path):
    folders(tmp_path, names=("1",), values=[(0, 0, 0), (128, 64, 128)])
    folders(
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
    folders(tmp_path, names=("3",), values=[(0, 0, 0), (9, 8, 7)])
    assert find_dataset(tmp_path).classes.names == (
        "color #000000",
        "color #090807",
        "color #804080",
    )


def test_ids_in_the_red_channel_are_seen_in_any_layout(tmp_path):
    dataset = find_dataset(folders(tmp_path, values=[(0, 0, 0), (1, 0, 0), (5, 0, 0)]))
    assert (dataset.classes.by_color, dataset.classes.values) == (False, (0, 1, 5))
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0, 1, 2]


def test_photographs_as_masks_are_refused(tmp_path):
    folders(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    for path in (tmp_path / "masks").iterdir():
        PIL.Image.fromarray(np.kron(noise, np.ones((4, 4, 1), np.uint8))).save(path)
    PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)).save(
        tmp_path / "masks" / "2.png"
    )
    with pytest.raises(
        UsageError,
        match=r"different colours \('.*2.png' alone \d+\), but at most 64 can be classes: they look like photographs",
    ):
        find_dataset(tmp_path)


def test_smeared_grey_masks_are_refused(tmp_path):
    folders(tmp_path)
    PIL.Image.fromarray(np.arange(0, 256, 2, dtype=np.uint8).reshape(8, 16)).save(
        tmp_path / "masks" / "2.png"
    )
    with pytest.raises(
        UsageError,
        match=r"the masks hold 129 different values from 0 to 254 \('.*2.png' alone 128\), which look like a photograph",
    ):
        find_dataset(tmp_path)
    (tmp_path / "masks" / "2.png").unlink()
    mask(tmp_path / "masks" / "2.jpg", (0, 100, 200))
    with pytest.raises(
        UsageError,
        match=r"2.jpg' is a JPEG, which blurs values; a mask needs exact ones: save the masks as PNG again",
    ):
        find_dataset(tmp_path)


def test_a_class_table_in_data_wins_and_a_given_one_wins_over_it(tmp_path):
    folders(tmp_path, "CameraRGB", "CameraSeg", values=[(0, 0, 0), (7, 0, 0)])
    mine = ClassTable(("other", "road"), values=(0, 7))
    write_classes(tmp_path / "classes.toml", mine)
    assert find_dataset(tmp_path).classes == mine
    assert np.unique(
        read_label(find_dataset(tmp_path).pairs[0], find_dataset(tmp_path))
    ).tolist() == [0, 1]
    given_table = ClassTable(("else", "way"), values=(0, 7))
    write_classes(tmp_path / "x.toml", given_table)
    assert find_dataset(tmp_path, tmp_path / "x.toml").classes == given_table
    assert find_dataset(tmp_path, CARLA).classes == CARLA
    with pytest.raises(UsageError, match=r"none.toml is not a class table"):
        find_dataset(tmp_path, tmp_path / "none.toml")


def test_dataset_toml_matches_by_what_the_stars_stand_for(tmp_path):
    for street in ("a", "b"):
        for k in (1, 2):
            picture(tmp_path / "shots" / street / f"s{k}.png")
            mask(tmp_path / "truth" / f"{street}" / f"s{k}_ids.png", (0, 1, 9))
    (tmp_path / "dataset.toml").write_text(
        'images = "shots/*/*.png"\nmasks = "truth/*/*_ids.png"\nignore = [9]\n[splits]\ntrain = "shots/a/*"\nval = "shots/b/*.png"\n'
    )
    for data in (tmp_path, tmp_path / "dataset.toml"):
        dataset = find_dataset(data)
        assert dataset.layout == "dataset.toml"
        assert names(dataset)[1] == ("shots/a/s2.png", "truth/a/s2_ids.png", "train")
        assert [pair.split for pair in dataset.pairs] == ["train", "train", "val", "val"]
        assert (dataset.classes.values, dataset.classes.ignore) == ((0, 1), (9,))
    write_classes(tmp_path / "mine.toml", ClassTable(("a", "b", "c"), values=(0, 1, 9)))
    (tmp_path / "dataset.toml").write_text(
        'images = "**/s?.png"\nmasks = "**/s?_ids.png"\nclasses = "mine.toml"'
    )
    with pytest.raises(
        UsageError, match=r"a/s1.png' and '.*b/s1.png' have the same name \('1'\), so it is unclear"
    ):
        find_dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text(
        'images = "shots/a/s?.png"\nmasks = "truth/*/s1_ids.png"'
    )
    with pytest.raises(
        UsageError,
        match=r"2 images and 2 masks match, but no names agree \(such as '.*a/s1.png' and '.*a/s1_ids.png'\)",
    ):
        find_dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text(
        'images = "shots/**/*.*"\nmasks = "truth/**/*_ids.png"\nclasses = "mine.toml"'
    )
    assert find_dataset(tmp_path).classes.names == ("a", "b", "c")
    assert len(find_dataset(tmp_path).pairs) == 4


@pytest.mark.parametrize(
    "pattern", ["../elsewhere/{}/[0-9]*.*", "{root}/elsewhere/{}/*", "../elsewhere/{}/?*.???"]
)
def test_a_dataset_toml_may_point_elsewhere(tmp_path, pattern):
    folders(tmp_path / "elsewhere", "a", "b")
    (tmp_path / "settings").mkdir()
    images, masks = (
        pattern.replace("{}", name).replace("{root}", tmp_path.as_posix()) for name in "ab"
    )
    (tmp_path / "settings" / "my.toml").write_text(f'images = "{images}"\nmasks = "{masks}"')
    assert [
        (pair.image.name, pair.mask.name)
        for pair in find_dataset(tmp_path / "settings" / "my.toml").pairs
    ] == [(f"{k}.jpg", f"{k}.png") for k in (1, 2, 10)]


def test_a_dataset_toml_may_tell_images_and_masks_of_one_folder_apart(tmp_path):
    picture(tmp_path / "a.png")
    mask(tmp_path / "a_truth.png")
    (tmp_path / "dataset.toml").write_text('images = "*.png"\nmasks = "*_truth.png"')
    assert names(find_dataset(tmp_path)) == [("a.png", "a_truth.png", "")]


def test_a_dataset_toml_may_only_name_classes_and_splits(tmp_path):
    folders(tmp_path, names=("1", "2"))
    (tmp_path / "dataset.toml").write_text('ignore = [2]\nsplits = "mine.csv"')
    (tmp_path / "mine.csv").write_text("image,split\n1,train\n2,val\n")
    dataset = find_dataset(tmp_path)
    assert dataset.classes.ignore == (2,)
    assert ([pair.split for pair in dataset.pairs], dataset.splits_by) == (
        ["train", "val"],
        "mine.csv",
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("images = ", r"dataset.toml is no TOML \(.*\); correct it, for example: images = "),
        (
            'image = "a/*"',
            r"has the key 'image'; known are images, masks, classes, ignore, splits; did you mean 'images'\?",
        ),
        ('images = "images/*"', r'needs both images = "..." and masks = "..."'),
        ('images = "images/*"\nmasks = "mask/*"', r'masks = "mask/\*" matches no file below'),
        ('images = "images/*"\nmasks = 3', "images, masks, classes and splits are text in quotes"),
        ("ignore = 3", "ignore is a list of whole numbers"),
        (
            '[splits]\nvalid = "images/*"',
            r"has the split 'valid'; known are train, val, test; did you mean 'val'\?",
        ),
        ('classes = "none.toml"', "none.toml is not a class table"),
        ('splits = "none.csv"', r"none.csv' cannot be read .*; it needs the columns image,split"),
    ],
)
def test_a_wrong_dataset_toml_is_one_clear_sentence(tmp_path, content, sentence):
    folders(tmp_path)
    (tmp_path / "dataset.toml").write_text(content)
    with pytest.raises(UsageError, match=sentence):
        find_dataset(tmp_path)


def test_an_unreadable_mask_stops_find_unless_asked_not_to(tmp_path):
    folders(tmp_path)
    (tmp_path / "masks" / "2.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"2.png' is not an image"):
        find_dataset(tmp_path)
    assert find_dataset(tmp_path, strict=False).classes.values == (0, 1, 2)
    for path in (tmp_path / "masks").iterdir():
        path.write_text("no picture")
    assert len(find_dataset(tmp_path, strict=False).pairs) == 3


@given(st.lists(st.text("abL_0129", min_size=1, max_size=6), unique=True, min_size=1))
def test_matching_loses_and_doubles_no_file(stems):
    images = key_by_stem([Path(f"i/{stem}.png") for stem in stems], Path("i"))
    masks = key_by_stem([Path(f"m/{stem}.png") for stem in stems[::2]], Path("m"))
    found = match_by_name(images, masks)
    assert sorted([image for image, _ in found.pairs] + list(found.images)) == sorted(
        images.values()
    )
    assert all(image.stem == truth.stem for image, truth in found.pairs)
    assert len(found.pairs) == len(masks)


@settings(deadline=None)
@given(st.text("abmL_-019", min_size=1))
def test_a_name_is_never_emptied(stem):
    assert strip_role_words(stem)
    assert strip_role_words(stem + "_mask") == strip_role_words(stem)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not beside this checkout")
@pytest.mark.parametrize(
    ("folder", "layout", "count", "classes"),
    [("carla", "carla", 204, 13), ("camvid", "camvid", 468, 11), ("isbi2012", "folders", 30, 2)],
)
def test_real_data(folder, layout, count, classes):
    dataset = find_dataset(SHARED / folder)
    assert (dataset.layout, len(dataset.pairs), len(dataset.classes)) == (layout, count, classes)
    sample = read_sample(dataset.pairs[-1], dataset)
    assert set(np.unique(sample.label)) <= {*range(classes), IGNORE}


def test_a_pair_has_no_split_until_it_is_decided():
    assert Pair(Path("a"), Path("b")).split == ""
