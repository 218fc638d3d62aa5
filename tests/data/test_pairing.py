"""Folders and files are paired by their names, and no file is lost or used twice."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import (
    write_folders,
    write_image,
    write_mask,
    write_pixels,
)
from made_strangers import blobs, save, yard

from useg.classes import CITYSCAPES, IGNORE
from useg.data import file_names, object_masks, pairing, roles
from useg.data.dataset import (
    pair_name,
    read_label,
)
from useg.data.file_names import name_files, strip_role_words
from useg.data.layouts import find_dataset
from useg.data.pairing import match_lists
from useg.data.published_classes import TABLES_BY_NAME
from useg.errors import DataError

pytestmark = pytest.mark.wheel


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "masks"),
        ("image", "label"),
        ("imgs", "masks"),
        ("Images", "Labels"),
        ("images", "annotations"),
        ("img", "ann"),
        ("inputs", "targets"),
        ("IMAGES", "mask"),
        ("train_images", "train_masks"),
        ("images_train", "masks_train"),
        ("trainimages", "trainlabels"),
    ],
)
def test_two_folders_are_paired_by_name_in_natural_order(tmp_path, images, masks):
    dataset = find_dataset(write_folders(tmp_path, images, masks))
    assert [pair.image.stem for pair in dataset.pairs] == ["1", "2", "10"]
    assert all(pair.image.stem == pair.mask.stem for pair in dataset.pairs)
    assert {pair.split for pair in dataset.pairs} == {"train" if "train" in images else ""}
    assert dataset.layout == "folders"


def test_split_folders_may_be_around_or_inside_the_image_folders(tmp_path):
    for split in ("train", "valid", "Testing"):
        write_folders(tmp_path / "a" / split)
        write_folders(tmp_path / "b", f"images/{split}", f"masks/{split}")
    for root in ("a", "b"):
        dataset = find_dataset(tmp_path / root)
        assert sorted({pair.split for pair in dataset.pairs}) == ["test", "train", "val"], root
        assert len(dataset.pairs) == 9


def test_a_test_folder_without_masks_is_left_out(tmp_path):
    write_folders(tmp_path, "train", "train_masks")
    write_image(tmp_path / "test" / "9.jpg")
    assert len(find_dataset(tmp_path).pairs) == 3
    inside = write_folders(tmp_path / "inside", "images/train", "masks/train")
    write_image(inside / "images" / "test" / "9.jpg")
    assert len(find_dataset(inside).pairs) == 3


@pytest.mark.parametrize(
    ("image", "truth"),
    [
        ("a_7", "a_7_mask"),
        ("a_7", "a_7_label"),
        ("0001TP_6690", "0001TP_6690_L"),
        ("a7", "a7-seg"),
        ("a7", "a7_gt"),
        ("ISIC_1", "ISIC_1_segmentation"),
        ("8_sat", "8_mask"),
        ("img_01", "mask_01"),
        ("image1", "label1"),
        ("IMG_1", "img_1"),
        ("a_image", "a_mask"),
    ],
)
def test_names_are_paired_without_words_such_as_mask(tmp_path, image, truth):
    write_image(tmp_path / "images" / f"{image}.jpg")
    write_mask(tmp_path / "masks" / f"{truth}.png")
    assert len(find_dataset(tmp_path).pairs) == 1


def test_equal_rules_have_the_same_order_in_every_process():
    code = (
        "from useg.data.file_names import learn_links\n"
        "ends = ('', '_1stho', '_2ndho')\n"
        "names = [f'image_{k}{eye}{end}' for k in range(1, 5) for eye in 'lr' for end in ends]\n"
        "print([min(link.partners.values()) for link in learn_links(names)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 3)
    }
    assert len(printed) == 1


def test_exact_names_win_over_names_without_role_words(tmp_path):
    write_folders(tmp_path, names=("a", "a_L"))
    assert all(pair.image.stem == pair.mask.stem for pair in find_dataset(tmp_path).pairs)


def test_images_and_masks_in_one_folder_are_paired(tmp_path):
    for k in range(3):
        write_image(tmp_path / f"cell ({k}).png")
        write_mask(tmp_path / f"cell ({k})_mask.png")
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "one folder"
    assert len(dataset.pairs) == 3


def test_a_text_between_any_two_parts_of_a_name_is_found(tmp_path):
    for patient in range(1, 5):
        for frame in ("01", "12"):
            for k in range(4):
                write_image(tmp_path / "images" / f"p{patient}_frame{frame}_slice_{k}.png")
                write_mask(tmp_path / "masks" / f"p{patient}_frame{frame}_gt_slice_{k}.png")
    pairs = find_dataset(tmp_path).pairs
    assert len(pairs) == 32
    assert all(pair.mask.stem.replace("gt_", "") == pair.image.stem for pair in pairs)


def test_one_rule_pairs_the_defects_of_all_products(tmp_path):
    # MVTec keeps test/rust/0.png of a bottle in bottle/test, and its mask in bottle/ground_truth.
    for product in ("bottle", "cable"):
        for defect in ("broken_large", "rust"):
            for k in range(4):
                write_image(tmp_path / product / "test" / defect / f"{k:03}.png")
                write_mask(tmp_path / product / "ground_truth" / defect / f"{k:03}_mask.png")
    pairs = find_dataset(tmp_path).pairs
    assert len(pairs) == 16
    assert all(pair.mask.parts[-4] == pair.image.parts[-4] for pair in pairs)


def test_a_folder_of_each_image_repeats_its_name(tmp_path):
    # Drishti-GS has a folder of soft maps for each image.
    for k in range(12):
        pixels, label = yard(k)
        save(tmp_path / "Training" / "Images" / f"drishtiGS_{k:03}.png", pixels)
        for name, value in (("OD", 1), ("cup", 2)):
            folder = tmp_path / "Training" / "GT" / f"drishtiGS_{k:03}" / "SoftMap"
            mask = np.uint8(255) * (label >= value)
            save(folder / f"drishtiGS_{k:03}_{name}segSoftmap.png", mask)
    with pytest.raises(DataError, match="2 sets of masks for the same images") as error:
        find_dataset(tmp_path)
    offers = str(error.value).partition("dataset.toml:\n")[2].split("\nor\n")
    assert len(offers) == 2
    for offer in offers:
        (tmp_path / "dataset.toml").write_text(offer)
        assert len(find_dataset(tmp_path).pairs) == 12


def test_words_of_a_name_may_stand_in_another_order(tmp_path):
    for k in range(4):
        for seed, eye in ((k, "left"), (k + 20, "right")):
            pixels, label = yard(seed)
            save(tmp_path / "images" / f"{k}_{eye}.png", pixels)
            save(tmp_path / "masks" / f"{eye}_{k}.png", label // 2)
    pairs = find_dataset(tmp_path).pairs
    assert len(pairs) == 8
    assert all(pair.mask.stem.split("_")[::-1] == pair.image.stem.split("_") for pair in pairs)


def test_names_that_agree_only_if_two_words_change_places_are_refused(tmp_path):
    for sides, numbers in ((("left", "right"), range(3)), (("right", "left"), range(3, 6))):
        for k in numbers:
            write_image(tmp_path / "images" / f"{sides[0]}_{k}.png")
            write_mask(tmp_path / "masks" / f"{sides[1]}_mask_{k}.png")
    with pytest.raises(DataError, match=r"match only if 'left' and 'right' are swapped"):
        find_dataset(tmp_path)
    # The control: other words may change.
    for path in [*(tmp_path / "masks").glob("left*")]:
        path.rename(path.with_name(path.name.replace("left", "right")))
    assert len(find_dataset(tmp_path).pairs) == 6


def test_tiles_of_a_grid_are_paired_although_every_number_is_in_many_names(tmp_path):
    names = [f"slide{s}_r{y}_c{x}" for s in range(4) for y in range(4) for x in range(4)]
    dataset = find_dataset(write_folders(tmp_path, "tiles", "labels", tuple(names)))
    assert len(dataset.pairs) == 64
    assert all(pair.image.stem == pair.mask.stem for pair in dataset.pairs)


def test_sub_folders_are_paired_by_path_and_otherwise_by_name(tmp_path):
    same = tmp_path / "same"
    for street in ("a", "b"):
        write_folders(same, f"images/{street}", f"masks/{street}")
    assert len(find_dataset(same).pairs) == 6
    other = write_folders(tmp_path / "other", "images", "annotations/trimaps")
    assert len(find_dataset(other).pairs) == 3


def test_hidden_files_and_other_formats_are_skipped(tmp_path):
    write_folders(tmp_path, "images", "annotations")
    (tmp_path / "images" / "._1.jpg").write_bytes(b"mac")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"windows")
    (tmp_path / "__MACOSX" / "images").mkdir(parents=True)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("0 0.5 0.5 1 1")
    assert len(find_dataset(tmp_path).pairs) == 3


def test_voc_splits_are_read_and_images_may_have_no_mask(tmp_path):
    for name in ("2007_1", "2007_2", "2007_3"):
        write_image(tmp_path / "VOC2012" / "JPEGImages" / f"{name}.jpg")
    for name, split in (("2007_1", "train"), ("2007_3", "val")):
        write_mask(tmp_path / "VOC2012" / "SegmentationClass" / f"{name}.png", (0, 1, 2, 255))
        (tmp_path / "VOC2012" / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
            name + "\n"
        )
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "voc"
    assert [pair.split for pair in dataset.pairs] == ["train", "val"]
    assert dataset.classes.ignore == (IGNORE,)
    assert any("1 image without an annotation left out, such" in note for note in dataset.notes)
    (tmp_path / "dataset.toml").write_text('missing = "background"')
    assert len(find_dataset(tmp_path).pairs) == 3


def test_cityscapes_ids_are_chosen_among_its_files(tmp_path):
    for split in ("train", "val"):
        stem = tmp_path / "leftImg8bit" / split / "aachen" / "aachen_000000_000019"
        write_image(stem.with_name(stem.name + "_leftImg8bit.png"))
        for kind, values in (
            ("labelIds", (7, 33, 0)),
            ("color", [(1, 2, 3)]),
            ("instanceIds", (7, 7)),
        ):
            write_mask(
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


def test_coloured_labels_beside_ids_are_not_taken_for_the_images(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        ids = np.repeat(rng.integers(0, 3, (12, 1)), 16, 1).astype(np.uint8)
        noisy = np.clip(80 * ids[..., None] + rng.integers(0, 40, (12, 16, 3)), 0, 255)
        write_pixels(tmp_path / "rgb_images" / f"{k:05}_FV.png", noisy.astype(np.uint8))
        colors = np.uint8([[0, 0, 0], [200, 9, 9], [9, 200, 9]])[ids]
        write_pixels(tmp_path / "semantic_annotations" / "rgbLabels" / f"{k:05}_FV.png", colors)
        write_pixels(tmp_path / "semantic_annotations" / "gtLabels" / f"{k:05}_FV.png", ids)
    (pair, *_) = find_dataset(tmp_path).pairs
    assert (pair.image.parent.name, pair.mask.parent.name) == ("rgb_images", "gtLabels")


@pytest.mark.parametrize("name", TABLES_BY_NAME)
def test_colours_and_instances_beside_the_ids_of_cityscapes_are_left_out(tmp_path, name):
    for k in range(4):
        write_image(tmp_path / "leftImg8bit" / "train" / f"{k}_leftImg8bit.png")
        for end in (name, "color", "instanceIds"):
            write_mask(tmp_path / "gtFine" / "train" / f"{k}_gtFine_{end}.png", (7, 8))
    masks = [pair.mask.stem for pair in find_dataset(tmp_path).pairs]
    assert masks == [f"{k}_gtFine_{name}" for k in range(4)]


@pytest.mark.parametrize(
    ("name", "layout", "first_names"),
    [
        ("_gtFine_labellevel3Ids", "cityscapes", ["road", "drivable fallback", "sidewalk"]),
        ("_gtFine_labelcsTrainIds", "cityscapes", ["road", "sidewalk", "building"]),
        ("_label", "folders", ["class 0", "class 1", "class 2"]),
        ("", "folders", ["class 0", "class 1", "class 2"]),
    ],
)
def test_ids_of_other_data_in_cityscapes_folders_are_not_taken_for_its_own(
    tmp_path, name, layout, first_names
):
    for split in ("train", "val"):
        stem = "image" if name == "_label" else "leftImg8bit"
        write_image(tmp_path / "leftImg8bit" / split / "0" / f"000005_{stem}.png")
        write_mask(tmp_path / "gtFine" / split / "0" / f"000005{name}.png", (0, 1, 2))
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, list(dataset.classes.names[:3])) == (layout, first_names)
    assert np.unique(read_label(dataset.pairs[0], dataset)).tolist() == [0, 1, 2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "images").mkdir(mode=0)
    with pytest.raises(
        DataError,
        match=r"the folder '.*images' cannot be read \(Permission denied\); make it readable",
    ):
        find_dataset(tmp_path)


NAMES = st.sampled_from(
    ["{}", "{}_mask", "img_{}", "IMG{}", "{}_small", "{}_color", "train_{}", "{}.ome", "0{}"]
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(NAMES, st.integers(1, 12)), unique=True, min_size=1, max_size=8),
    st.sampled_from([("images", "masks"), ("CameraRGB", "CameraSeg"), ("img", "label_images")]),
    st.booleans(),
)
def test_two_folders_are_paired_as_what_names_teach(names, folders, has_same_names):
    stems = [name.format(number) for name, number in names]
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        root = Path(place)
        for stem in stems:
            write_image(root / folders[0] / f"{stem}.png")
        for stem in stems if has_same_names else stems[1:]:
            write_mask(root / folders[1] / f"{stem}.png")
        found = pair_or_error(root)
        patch.setattr(pairing, "_pair_folders", lambda root, paths: None)
        learned = pair_or_error(root)
    assert found == learned


def pair_or_error(root):
    try:
        return pairing.find_pairs(root)
    except DataError as error:
        return str(error)


def test_nothing_is_learned_from_names_that_are_equal(tmp_path, monkeypatch):
    write_folders(tmp_path, "CameraRGB", "CameraSeg")
    monkeypatch.delattr(roles, "learn_links")
    assert len(find_dataset(tmp_path).pairs) == 3
    # The control: these names are learned from.
    write_image(tmp_path / "CameraRGB" / "11.jpg")
    with pytest.raises(NameError):
        find_dataset(tmp_path)


@given(st.lists(st.text("abL_0129", min_size=1, max_size=6), unique=True, min_size=1))
def test_pairing_loses_and_repeats_no_file(stems):
    images = name_files([Path(f"i/{stem}.png") for stem in stems], Path("i"))
    masks = name_files([Path(f"m/{stem}.png") for stem in stems], Path("m"))
    wanted = dict(list(masks.items())[::2])
    found = match_lists(images, wanted)
    assert sorted([image for image, _ in found.pairs] + list(found.images)) == sorted(
        images.values()
    )
    assert all(image.stem == truth.stem for image, truth in found.pairs)
    assert len(found.pairs) == len(wanted)


@settings(deadline=None)
@given(st.text("abmL_-019", min_size=1))
def test_a_name_without_role_words_is_never_empty(stem):
    assert strip_role_words(stem)
    assert strip_role_words(stem + "_mask") == strip_role_words(stem)


def test_carvana_is_recognized(tmp_path):
    for k in (1, 2):
        write_image(tmp_path / "train" / f"fff9b3a5373f_0{k}.jpg", (4, 2))
        write_pixels(tmp_path / "train_masks" / f"fff9b3a5373f_0{k}_mask.gif", [[0, 1, 1, 0]] * 2)
    write_image(tmp_path / "test" / "0004d4463b50_01.jpg", (4, 2))
    (tmp_path / "train_masks.csv").write_text("img,rle_mask\n")
    dataset = find_dataset(tmp_path)
    assert [pair.split for pair in dataset.pairs] == ["train", "train"]
    assert dataset.classes.names == ("background", "foreground")


def test_masks_of_single_objects_are_joined(tmp_path):
    for name, masks in (("00ae65", 3), ("0a7d30", 1)):
        write_image(tmp_path / "stage1_train" / name / "images" / f"{name}.png", (4, 2))
        for k in range(masks):
            write_pixels(
                tmp_path / "stage1_train" / name / "masks" / f"{k}f.png",
                255 * (np.arange(8).reshape(2, 4) == k),
            )
    write_image(tmp_path / "stage1_test" / "0114f4" / "images" / "0114f4.png", (4, 2))
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
    write_pixels(tmp_path / "stage1_train" / "00ae65" / "masks" / "0f.png", np.ones((3, 4)))
    with pytest.raises(
        DataError,
        match=(
            r"masks/0f.png' is 4x3 pixels, but its image '.*00ae65.png' is 4x2; they must have "
            r"the same size"
        ),
    ):
        read_label(dataset.pairs[0], dataset)


def test_masks_of_cells_with_two_classes_are_refused_without_an_offer_of_one_cell(tmp_path):
    # In SegPC, each plasma cell has a mask of its cytoplasm and its nucleus.
    for k in range(4):
        pixels, numbers = blobs(k, 3)
        save(tmp_path / "x" / f"{k + 100}.png", pixels)
        for number in (1, 2, 3):
            nucleus = (numbers == number) & (np.roll(numbers, 1, 0) == number)
            mask = np.uint8(20) * (numbers == number) + np.uint8(20) * nucleus
            save(tmp_path / "y" / f"{k + 100}_{number}.png", mask)
    with pytest.raises(DataError, match="mark different pixels, so save one mask") as error:
        find_dataset(tmp_path)
    assert "dataset.toml" not in str(error.value)


def test_masks_in_numbered_folders_are_matched_by_the_names_of_their_files():
    # The masks of CelebAMask-HQ are in folders of 2,000 images each.
    images = {str(k): Path(f"img/{k}.jpg") for k in range(8)}
    numbers = [k for k in range(8) if k % 4 != 3]
    masks = {f"{k // 4}/{k:05}": Path(f"anno/{k // 4}/{k:05}_hair.png") for k in numbers}
    matched = match_lists(images, masks)
    assert [image.stem for image, _ in matched.pairs] == list(map(str, numbers))
    assert [mask.stem for _, mask in matched.pairs] == [f"{k:05}_hair" for k in numbers]


def test_one_mask_per_folder_is_an_ordinary_mask(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / name / "images" / "1.png", (4, 2))
        write_pixels(tmp_path / name / "masks" / "1.png", [[0, 1, 2, 0]] * 2)
    assert find_dataset(tmp_path).classes.names == ("class 0", "class 1", "class 2")


def test_twice_as_many_folders_take_twice_the_steps_to_find_object_masks(monkeypatch):
    def count_steps(num_folders):
        steps = []
        split = file_names.split_name
        monkeypatch.setattr(
            object_masks, "split_name", lambda name: steps.append(name) or split(name)
        )
        paths = [Path(f"masks_{k}/{k}.png") for k in range(num_folders)]
        assert object_masks.find_object_masks(Path(), paths) is None
        monkeypatch.undo()
        return len(steps)

    assert 0 < count_steps(10) <= 20
    assert count_steps(40) == 4 * count_steps(10)
    # Of the files of one name in very many folders, two are enough to see that it is not unique.
    named = (Path(f"{k}/a.png") for k in range(10))
    assert object_masks._outside_parents(Path("1/a"), named) == [Path("0/a.png"), Path("2/a.png")]
    assert next(named) == Path("3/a.png")


def test_a_rule_that_fits_a_name_in_very_many_ways_is_not_tried(monkeypatch):
    swap = (None, ("a", "b"))
    assert file_names.Rule((*swap, *swap, None)).apply("xaxax") == ["xbxbx"]
    # Each way would be tried: those of six texts take years.
    rule = file_names.Rule((*swap * 6, None))
    assert rule.apply("a" * 240) == []
    # The control: it would fit.
    monkeypatch.setattr(file_names, "_MAX_FITS", 10**30)
    assert file_names.Rule((*swap * 2, None)).apply("a" * 9)


def test_a_rule_of_which_a_text_is_missing_in_a_name_is_not_tried(monkeypatch):
    swap = (None, ("a", "b"))
    # All places of the other texts would be tried before the last is missed.
    rule = file_names.Rule((*swap * 6, None, ("c", "d"), None))
    tried = property(lambda _: pytest.fail("it was tried"))
    monkeypatch.setattr(file_names.Rule, "_patterns", tried)
    monkeypatch.setattr(file_names, "_follow", lambda *_: pytest.fail("it was tried"))
    assert rule.apply("a" * 240) == []
    # The control: it is tried where no text is missing.
    with pytest.raises(pytest.fail.Exception, match="it was tried"):
        file_names.Rule((*swap, None, ("c", "d"), None)).apply("xaxcx")
