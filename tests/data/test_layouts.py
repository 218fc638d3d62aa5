"""Data folders are recognized by name or described in dataset.toml; others are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from made_data import describe_pairs, write_folders, write_image, write_mask, write_pixels

from useg.classes import CAMVID, CARLA, IGNORE, ClassTable, write_classes
from useg.data.dataset import pair_name, read_label, read_pair_image, read_pair_size, read_sample
from useg.data.layouts import find_dataset
from useg.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


pytestmark = pytest.mark.wheel


def test_a_folder_is_walked_once(tmp_path, monkeypatch):
    walk, walked = os.walk, []
    monkeypatch.setattr(os, "walk", lambda top, **more: walked.append(top) or walk(top, **more))
    write_folders(tmp_path, values=[(7, 0, 0), (12, 0, 0)])
    (tmp_path / "train.txt").write_text("1\n2\n")
    assert len(find_dataset(tmp_path).pairs) == 3
    assert walked == [tmp_path]
    # The next call sees what has been added.
    write_folders(tmp_path, names=("3",), values=[(7, 0, 0)])
    assert len(find_dataset(tmp_path).pairs) == 4


@pytest.mark.parametrize("seg", ["CameraSeg", "CameraMask"])
def test_carla_is_recognized_in_one_folder_and_in_several(tmp_path, seg):
    one = write_folders(tmp_path / "one", "CameraRGB", seg, values=[(7, 0, 0), (12, 0, 0)])
    assert (find_dataset(one).layout, find_dataset(one).classes) == ("carla", CARLA)
    many = tmp_path / "many"
    for part in ("dataB/dataB", "dataA/dataA"):
        write_folders(many / part, "CameraRGB", seg, values=[(7, 0, 0), (12, 0, 0)])
    dataset = find_dataset(many)
    assert [name for name, _, _ in describe_pairs(dataset)][:4] == [
        f"dataA/dataA/CameraRGB/{k}.jpg" for k in (1, 2, 10)
    ] + ["dataB/dataB/CameraRGB/1.jpg"]
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [7, 12]


@pytest.mark.parametrize("annot", ["annot", "_annot"])
def test_camvid_is_recognized_with_its_splits(tmp_path, annot):
    for split in ("train", "val", "test"):
        write_folders(tmp_path, split, split + annot, ("0016E5_1",), values=(0, 10, 11))
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes, dataset.splits_by) == ("camvid", CAMVID, "official")
    assert [pair.split for pair in dataset.pairs] == ["test", "train", "val"]
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0, 10, IGNORE]


def test_images_without_a_mask_are_left_out_where_dataset_toml_says_so(tmp_path):
    write_folders(tmp_path)
    image = next((tmp_path / "images").iterdir())
    (image.parent / f"zz{image.suffix}").write_bytes(image.read_bytes())
    with pytest.raises(DataError, match="1 image without a mask"):
        find_dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text('missing = "skip"')
    dataset = find_dataset(tmp_path)
    assert dataset.images == ()
    assert "zz" not in {pair.image.stem for pair in dataset.pairs}
    assert "1 image without a mask left out" in dataset.notes


def test_missing_folders_and_files_are_refused(tmp_path):
    (tmp_path / "carla").mkdir()
    with pytest.raises(
        DataError,
        match=(
            r"the data '.*carlo' does not exist; choose a folder with images and masks.*; did you "
            r"mean 'carla'\?"
        ),
    ):
        find_dataset(tmp_path / "carlo")
    file = write_image(tmp_path / "a.png")
    with pytest.raises(
        DataError,
        match=r"a.png' is a file; choose a folder with images and masks, or a dataset.toml",
    ):
        find_dataset(file)


def test_a_folder_without_names_that_agree_is_refused_without_a_guess(tmp_path):
    for k in range(3):
        write_image(tmp_path / "raw stuff" / f"{'abc'[k]}.jpg")
        write_mask(tmp_path / "truth" / f"{'xyz'[k]}.png")
    write_image(tmp_path / "loose.png")
    with pytest.raises(
        DataError, match="has no pairs of image and mask that useg recognises"
    ) as caught:
        find_dataset(tmp_path)
    message = str(caught.value)
    assert "It has raw stuff/ (3 images), truth/ (3 images), 1 image beside them." in message
    assert "masks =" not in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"It has 0 images and no sub-folders. It recognises"):
        find_dataset(tmp_path / "empty")


def test_files_without_a_partner_are_refused_or_listed(tmp_path):
    write_folders(tmp_path, names=("1", "2"))
    for k in range(5):
        write_image(tmp_path / "images" / f"x{k}.jpg")
    with pytest.raises(
        DataError,
        match=(
            r"5 images without a mask \(2 pairs are complete\): '.*x0.jpg', '.*x1.jpg', "
            r"'.*x2.jpg' and 2 more; add the missing"
        ),
    ):
        find_dataset(tmp_path)
    dataset = find_dataset(tmp_path, strict=False)
    assert (len(dataset.pairs), len(dataset.images), dataset.masks) == (2, 5, ())
    for k in range(5):
        (tmp_path / "images" / f"x{k}.jpg").unlink()
    write_mask(tmp_path / "masks" / "y.png")
    with pytest.raises(
        DataError,
        match=r"1 mask without an image \(2 pairs are complete\): '.*y.png'; add the missing",
    ):
        find_dataset(tmp_path)
    assert [path.name for path in find_dataset(tmp_path, strict=False).masks] == ["y.png"]


def test_an_argument_wins_over_classes_toml_which_wins_over_the_layout(tmp_path):
    write_folders(tmp_path, "CameraRGB", "CameraSeg", values=[(0, 0, 0), (7, 0, 0)])
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
    with pytest.raises(DataError, match=r"none.toml is not a class table"):
        find_dataset(tmp_path, tmp_path / "none.toml")


def test_dataset_toml_pairs_by_the_text_for_the_stars(tmp_path):
    for street in ("a", "b"):
        for k in (1, 2):
            write_image(tmp_path / "shots" / street / f"s{k}.png")
            write_mask(tmp_path / "truth" / f"{street}" / f"s{k}_ids.png", (0, 1, 9))
    (tmp_path / "dataset.toml").write_text(
        'images = "shots/*/*.png"\nmasks = "truth/*/*_ids.png"\nignore = [9]\n[splits]\ntrain = '
        '"shots/a/*"\nval = "shots/b/*.png"\n'
    )
    for data in (tmp_path, tmp_path / "dataset.toml"):
        dataset = find_dataset(data)
        assert dataset.layout == "dataset.toml"
        assert describe_pairs(dataset)[1] == ("shots/a/s2.png", "truth/a/s2_ids.png", "train")
        assert [pair.split for pair in dataset.pairs] == ["train", "train", "val", "val"]
        assert (dataset.classes.values, dataset.classes.ignore) == ((0, 1), (9,))
    write_classes(tmp_path / "mine.toml", ClassTable(("a", "b", "c"), values=(0, 1, 9)))
    (tmp_path / "dataset.toml").write_text(
        'images = "**/s?.png"\nmasks = "**/s?_ids.png"\nclasses = "mine.toml"'
    )
    assert describe_pairs(find_dataset(tmp_path))[2] == ("shots/b/s1.png", "truth/b/s1_ids.png", "")
    (tmp_path / "dataset.toml").write_text(
        'images = "shots/?/s1.png"\nmasks = "truth/a/s[12]_ids.png"\nclasses = "mine.toml"'
    )
    with pytest.raises(DataError, match="no two have the same name"):
        find_dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text(
        'images = "shots/a/s?.png"\nmasks = "truth/*/s1_ids.png"'
    )
    with pytest.raises(
        DataError,
        match=(
            r"2 images and 2 masks match the globs, but no two have the same name \(such as "
            r"'.*a/s1.png' and '.*a/s1_ids.png'\)"
        ),
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
def test_dataset_toml_may_name_other_folders(tmp_path, pattern):
    write_folders(tmp_path / "elsewhere", "a", "b")
    (tmp_path / "settings").mkdir()
    images, masks = (
        pattern.replace("{}", name).replace("{root}", tmp_path.as_posix()) for name in "ab"
    )
    (tmp_path / "settings" / "my.toml").write_text(f'images = "{images}"\nmasks = "{masks}"')
    assert [
        (pair.image.name, pair.mask.name)
        for pair in find_dataset(tmp_path / "settings" / "my.toml").pairs
    ] == [(f"{k}.jpg", f"{k}.png") for k in (1, 2, 10)]


def test_dataset_toml_may_separate_images_and_masks_of_one_folder(tmp_path):
    write_image(tmp_path / "a.png")
    write_mask(tmp_path / "a_truth.png")
    (tmp_path / "dataset.toml").write_text('images = "*.png"\nmasks = "*_truth.png"')
    assert describe_pairs(find_dataset(tmp_path)) == [("a.png", "a_truth.png", "")]


def test_dataset_toml_may_name_only_classes_and_splits(tmp_path):
    write_folders(tmp_path, names=("1", "2"))
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
        ("images = ", r"dataset.toml is not valid TOML \(.*\); correct it, for example: images = "),
        (
            'image = "a/*"',
            r"has the unknown key 'image'; choose from images, masks, classes, ignore, splits, "
            r"valid, objects, alpha, empty, missing; did you mean 'images'\?",
        ),
        ('images = "images/*"', r'needs both images = "..." and masks = "..."'),
        (
            'images = "images/*"\nmasks = "mask/*"',
            r'masks = "mask/\*" matches no file; paths are relative to',
        ),
        ('images = "images/*"\nmasks = 3', "images, masks, classes and splits are text in quotes"),
        ("ignore = 3", "ignore is a list of whole numbers"),
        ('missing = "all"', 'has missing = .all.; choose "error", "skip"'),
        (
            '[splits]\nvalid = "images/*"',
            r"has the unknown split 'valid'; choose from train, val, test; did you mean 'val'\?",
        ),
        ("ignore = " + "[" * 5000, r"is not valid TOML \(it is nested too deeply\)"),
        ("ignore = [" + "9" * 5000 + "]", r"is not valid TOML \(Exceeds the limit"),
        ('images = "**a/*"\nmasks = "m/*"', r"'\*\*a/\*' has \*\* beside other characters"),
        ('images = "*a*b*c*"\nmasks = "m/*"', "has more than 3 stars in one name"),
        ('images = "a/*"\nmasks = "**/**/**/*"', r"has \*\* more than 2 times"),
        ('images = "a\\u0000b*"\nmasks = "m/*"', "has a character that cannot be printed"),
        ('images = "a/[z-a]*"\nmasks = "m/*"', "has brackets that do not form a set of"),
        ('[splits]\ntrain = "a**"', r"'a\*\*' has \*\* beside other characters"),
        (f'images = "{"[" * 200_000}"\nmasks = "m/*"', "has more than 1,000 characters"),
        ('classes = "none.toml"', "none.toml is not a class table"),
        ('splits = "none.csv"', r"none.csv' cannot be read .*; it needs the columns image,split"),
    ],
)
def test_an_invalid_dataset_toml_is_refused(tmp_path, content, sentence):
    write_folders(tmp_path)
    (tmp_path / "dataset.toml").write_text(content)
    with pytest.raises(DataError, match=sentence):
        find_dataset(tmp_path)


@pytest.mark.parametrize("content", ["a pipe", "zeros without end", "very many lines"])
def test_a_list_that_cannot_be_one_is_not_read(tmp_path, content):
    """A pipe would wait for ever; of very many lines, each would be looked up."""
    write_folders(tmp_path)
    path = tmp_path / "train.txt"
    if content == "a pipe":
        os.mkfifo(path)
    elif content == "zeros without end":
        path.symlink_to("/dev/zero")
    else:
        path.write_text("0\n" * 3_000_000)
    assert {pair.split for pair in find_dataset(tmp_path).pairs} == {""}


def test_a_pipe_that_is_called_like_a_file_of_annotations_is_not_waited_for(tmp_path):
    write_folders(tmp_path)
    os.mkfifo(tmp_path / "notes.json")
    assert find_dataset(tmp_path).pairs


def test_a_pipe_that_is_called_like_a_table_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(DataError, match="no pairs of image and mask"):
        find_dataset(tmp_path)


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


def stack(path: Path, pages: int = 3, highest: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(
        path,
        np.stack([np.full((5, 6), min(k, highest)) for k in range(pages)]).astype(np.uint8),
        photometric="minisblack",
    )
    return path


def test_stacks_are_paired_page_by_page(tmp_path):
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


def test_isbi_2012_is_read_as_published(tmp_path):
    for name in ("train-volume", "train-labels", "test-volume"):
        stack(tmp_path / f"{name}.tif", highest=1)
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "one folder"
    assert {pair.split for pair in dataset.pairs} == {"train"}
    assert len(dataset.pairs) == 3
    stack(tmp_path / "test-labels.tif")
    assert [pair.split for pair in find_dataset(tmp_path).pairs] == ["test"] * 3 + ["train"] * 3


def test_stacks_of_different_lengths_are_refused(tmp_path):
    stack(tmp_path / "images" / "a.tif")
    stack(tmp_path / "masks" / "a.tif", 2)
    with pytest.raises(
        DataError,
        match=(
            r"image '.*images/a.tif' has 3 pages, but its mask '.*masks/a.tif' has 2; each page "
            r"needs a mask"
        ),
    ):
        find_dataset(tmp_path)
    for folder in ("images", "masks"):
        stack(tmp_path / folder / "b.tif")
    dataset = find_dataset(tmp_path, strict=False)
    assert len(dataset.pairs) == 4
    with pytest.raises(DataError, match="is a stack of 3 pages"):
        read_sample(dataset.pairs[0], dataset)
    for path in ("images/b.tif", "masks/b.tif", "masks/a.tif"):
        (tmp_path / path).unlink()
    write_pixels(tmp_path / "masks" / "a.png", np.zeros((5, 6)))
    dataset = find_dataset(tmp_path)
    assert read_sample(dataset.pairs[0], dataset).image.shape == (5, 6, 3)
    assert "are read as the bands of one image" in dataset.notes[0]
    stack(tmp_path / "images" / "a.tif", 17)
    with pytest.raises(
        DataError,
        match=r"a.tif' has 17 pages, but its mask '.*a.png' has 1; each page needs a mask",
    ):
        find_dataset(tmp_path)


def test_tiffs_with_one_page_have_no_page_number(tmp_path):
    write_pixels(tmp_path / "images" / "a.tif", np.zeros((5, 6, 3)))
    write_pixels(tmp_path / "masks" / "a.tif", np.eye(5, 6))
    assert [pair.page for pair in find_dataset(tmp_path).pairs] == [None]


def test_ignored_values_are_removed_from_the_class_table(tmp_path):
    write_image(tmp_path / "CameraRGB" / "a.png", (4, 2))
    write_pixels(
        tmp_path / "CameraSeg" / "a.png", [[(0, 0, 0), (7, 0, 0), (10, 0, 0), (7, 0, 0)]] * 2
    )
    for ignore in ('[10, "None"]', '["Vehicles", 0]'):
        (tmp_path / "dataset.toml").write_text(f"ignore = {ignore}")
        dataset = find_dataset(tmp_path)
        assert len(dataset.classes) == 11
        assert read_label(dataset.pairs[0], dataset)[0].tolist() == [IGNORE, 6, IGNORE, 6]


def test_ignored_colours_are_removed_from_the_class_table(tmp_path):
    write_image(tmp_path / "images" / "a.png", (4, 2))
    write_pixels(tmp_path / "masks" / "a.png", [[(0, 0, 0), (9, 8, 7), (1, 2, 3), (9, 8, 7)]] * 2)
    (tmp_path / "dataset.toml").write_text('ignore = ["color #090807"]')
    assert find_dataset(tmp_path).classes == ClassTable(
        ("color #000000", "color #010203"),
        ((0, 0, 0), (1, 2, 3)),
        values=(0, 1),
        ignore=(0x090807,),
        by_color=True,
    )
