"""What looks like classes and is not, and what looks like one mask and is several."""

from pathlib import Path

import numpy as np
import pytest
from made_strangers import COLORS, HEIGHT, NAMES, WIDTH, blobs, paint, save, yard

from useg.data.dataset import read_label, read_objects
from useg.data.layouts import find_dataset
from useg.errors import DataError
from useg.images.image_files import read_mask
from useg.scoring.metrics import regions

pytestmark = pytest.mark.wheel


def test_masks_of_disjoint_classes_are_not_compared_by_edges(tmp_path: Path) -> None:
    for k in range(6):
        # The weeds have edges in the image, and what is planted has none.
        weeds, planted, valid = np.zeros((3, HEIGHT, WIDTH), bool)
        weeds[6 + k : 20 + k, 5:18] = planted[4:20, 30 + k : 42 + k] = valid[:, 5 + 3 * k :] = True
        image = paint(np.where(weeds, 170, 50), np.random.default_rng(k))
        save(tmp_path / "images" / f"{k}.png", image)
        for name, mask in (
            ("boundaries", valid),
            ("labels/weeds", weeds),
            ("labels/planted", planted),
        ):
            save(tmp_path / name / f"{k}.png", mask.astype(np.uint8) * 255)
    with pytest.raises(DataError, match="unclear which of them is the ground truth"):
        find_dataset(tmp_path)


def test_two_kinds_of_images_with_two_kinds_of_masks_are_asked_about(tmp_path: Path) -> None:
    """OCTA-500: the shorter name of a folder of images says nothing about whose masks they are."""
    for k in range(6):
        image, label = yard(k)
        masks = [(label == kind).astype(np.uint8) * 255 for kind in (3, 1)]
        for name, pixels in zip(
            ("Projection Maps/OCTA(ILM_OPL)", "Projection Maps/OCT(FULL)", "GroundTruth", "GT_FAZ"),
            (image, 255 - image, *masks),
            strict=True,
        ):
            save(tmp_path / "OCTA_3M" / name / f"{10001 + k}.bmp", pixels)
    with pytest.raises(DataError, match="2 sets of images for the same masks"):
        find_dataset(tmp_path)


def test_numbered_channels_are_asked_about(tmp_path: Path) -> None:
    """The 1 of w1 is also in s1, so its names have nothing that those of w2 lack."""
    for k in range(6):
        image, label = yard(k)
        for channel in (1, 2):
            save(tmp_path / f"plate1/A{k:02}_s1_w{channel}.tif", image[..., channel])
        save(tmp_path / f"plate1/A{k:02}_s1_mask.tif", label)
    with pytest.raises(DataError, match="2 sets of images for the same masks"):
        find_dataset(tmp_path)


def test_images_that_have_the_names_of_masks_are_taken(tmp_path: Path) -> None:
    for k in range(6):
        image, label = yard(k)
        for name, pixels in ("", 255 - image), ("_T", image), ("_W", 255 - image):
            save(tmp_path / f"DJI_{k:04}{name}.jpg", pixels)
        save(tmp_path / f"DJI_{k:04}_T_mask.png", (label == 3).astype(np.uint8) * 255)
    dataset = find_dataset(tmp_path)
    assert all(pair.image.stem.endswith("_T") for pair in dataset.pairs)
    assert "have names that are less similar to those of the masks" in dataset.notes[0]


@pytest.mark.parametrize("folder", ["train", "2024"])
def test_new_images_with_the_names_of_the_others_get_no_masks(tmp_path: Path, folder: str) -> None:
    for k in range(6):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", yard(k + 10)[0])
        save(tmp_path / folder / "images" / f"{k}.png", image)
        save(tmp_path / folder / "masks" / f"{k}.png", label)
    dataset = find_dataset(tmp_path)
    assert {pair.image.parent for pair in dataset.pairs} == {tmp_path / folder / "images"}
    assert "share fewer folders with the masks" in dataset.notes[0]


@pytest.mark.parametrize(("folders", "is_said"), [("crack,dark rust", True), ("P1,P2", False)])
def test_folders_of_images_and_masks_may_be_classes(
    tmp_path: Path, folders: str, is_said: bool
) -> None:
    names = folders.split(",")
    for number, folder in enumerate(names):
        for k in range(5):
            image, label = yard(10 * number + k)
            save(tmp_path / folder / "images" / f"{k}.png", image)
            save(tmp_path / folder / "masks" / f"{k}.png", np.uint8(255) * (label == 3))
    notes = find_dataset(tmp_path).notes
    said = f"the images and masks are in the folders {', '.join(names)}; if each folder is a class"
    assert any(said in note for note in notes) == is_said
    globs = "".join(f'"{folder}" = "{folder}/masks/*.png"\n' for folder in names)
    (tmp_path / "dataset.toml").write_text(f'images = "*/images/*.png"\n[masks]\n{globs}')
    assert find_dataset(tmp_path).classes.names == ("background", *names)


@pytest.mark.parametrize(
    "masks", ['masks = "rust/masks/*.png"', '[masks]\nrust = "rust/masks/*.png"']
)
def test_globs_pair_files_of_one_folder_if_names_are_used_twice(tmp_path: Path, masks: str) -> None:
    for folder, first in ("cracks", 0), ("rust", 10):
        for k in range(5):
            image, label = yard(first + k)
            save(tmp_path / folder / "images" / f"{k}.png", image)
            save(tmp_path / folder / "masks" / f"{k}.png", np.uint8(255) * (label == 3))
    (tmp_path / "dataset.toml").write_text(
        f'images = "*/images/*.png"\nmissing = "skip"\n{masks}\n'
    )
    pairs = find_dataset(tmp_path).pairs
    assert [pair.image for pair in pairs] == [tmp_path / f"rust/images/{k}.png" for k in range(5)]


def test_elevations_and_drawn_boxes_are_not_the_images(tmp_path: Path) -> None:
    for k in range(6):
        image, label = yard(k)
        heights = paint(label * 60, np.random.default_rng(k))
        previews = np.ascontiguousarray(image[::2, ::2])
        for name, pixels in (
            ("image", image),
            ("dem", heights),
            ("bbox_image", 255 - image),
            ("previews", previews),
        ):
            save(tmp_path / name / f"{k}.png", pixels)
        save(tmp_path / "mask" / f"{k}.png", (label == 3).astype(np.uint8) * 255)
    (note,) = find_dataset(tmp_path).notes[:1]
    assert note.startswith("the images are image/*.png")
    assert "previews/*.png, which are not used because they have other sizes" in note
    assert "they are called 'bbox' and 'dem'" in note
    assert "and 'previews'" not in note


def test_instances_over_the_whole_image_do_not_win_against_classes(tmp_path: Path) -> None:
    # Apollo's instanceIds are 65535 where no object is.
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "ColorImage" / f"{k}_Camera_5.jpg", image)
        save(tmp_path / "Label" / f"{k}_Camera_5_bin.png", label)
        numbers = np.array([65535, 33000, 36000, 65535], np.uint16)[label]
        save(tmp_path / "Label" / f"{k}_Camera_5_instanceIds.png", numbers)
    dataset = find_dataset(tmp_path)
    assert dataset.classes.values == (0, 1, 2, 3)
    assert "is called 'instance'" in dataset.notes[0]


@pytest.mark.parametrize("number", [3, 5])
def test_means_of_annotators_are_no_classes(tmp_path: Path, number: int) -> None:
    levels = set()
    for k in range(6):
        image, label = yard(k)
        yards = np.pad(label > 0, 5, mode="edge")
        drawn = [yards[i : i + HEIGHT, 10 - i : 10 - i + WIDTH] for i in range(3, 3 + number)]
        mean = (np.sum(drawn, axis=0) * 255 // number).astype(np.uint8)
        levels |= set(np.unique(mean).tolist())
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "segmentations" / f"{k}.png", mean)
    assert len(levels) == number + 1
    with pytest.raises(DataError, match="The classes are 0 and 255"):
        find_dataset(tmp_path)


def test_nested_classes_as_grey_levels_stay_classes(tmp_path: Path) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for k in range(6):
        distance = (y - 16) ** 2 + (x - 20 - k) ** 2
        label = np.searchsorted([30, 90, 180], distance, side="right")
        image = paint(label * 60, np.random.default_rng(k))
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", (255 - 85 * label).astype(np.uint8))
    assert find_dataset(tmp_path).classes.values == (0, 85, 170, 255)


@pytest.mark.parametrize(("every", "first"), [(2, 0), (5, 0), (2, 1)])
def test_class_folders_that_lack_some_images_are_asked_about(
    tmp_path: Path, every: int, first: int
) -> None:
    for k in range(12):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.jpg", image)
        save(tmp_path / "masks" / "house" / f"{k}.png", (label == 1).astype(np.uint8) * 255)
        save(tmp_path / "masks" / "ball" / f"{k}.png", (label == 3).astype(np.uint8) * 255)
        if k % every == first:
            save(tmp_path / "masks" / "lawn" / f"{k}.png", (label == 2).astype(np.uint8) * 255)
    with pytest.raises(DataError) as raised:
        find_dataset(tmp_path)
    lines = str(raised.value).partition("dataset.toml:\n")[2].partition("\nor\n")[0]
    assert "[masks]" in lines
    (tmp_path / "dataset.toml").write_text(lines)
    dataset = find_dataset(tmp_path)
    assert set(dataset.classes.names) == {"background", "house", "lawn", "ball"}
    label = read_label(dataset.pairs[first], dataset)
    assert (label == dataset.classes.names.index("lawn")).sum() == (yard(first)[1] == 2).sum()


def write_cells(root: Path, are_kinds: bool) -> None:
    """Cells with the values 1 to 3: kinds of another brightness, or colours of neighbours."""
    for k in range(8):
        _, numbers = blobs(k, 8)
        kinds = np.random.default_rng(k).integers(1, 4, 9)
        kinds[0] = 0
        values = kinds[numbers].astype(np.uint8)
        bright = 50 * values if are_kinds else 120 * (values > 0)
        image = paint(30 + bright, np.random.default_rng(k))
        save(root / "images" / f"{k}.tif", image)
        save(root / "masks" / f"{k}.png", np.stack([values, 0 * values, 0 * values], axis=2))


def test_values_that_only_distinguish_neighbours_are_asked_about(tmp_path: Path) -> None:
    write_cells(tmp_path, are_kinds=False)
    assert "the regions of all values but 0 look alike" in find_dataset(tmp_path).notes[0]
    (tmp_path / "dataset.toml").write_text(
        'images = "images/*.tif"\nmasks = "masks/*.png"\nobjects = true\n'
    )
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "foreground")
    objects = read_objects(dataset.pairs[0], dataset)
    mask = read_mask(dataset.pairs[0].mask)[..., 0]
    assert len(np.unique(objects)) == len(np.unique(regions(mask)[mask > 0])) + 1


def test_kinds_of_cells_are_classes_without_a_question(tmp_path: Path) -> None:
    write_cells(tmp_path, are_kinds=True)
    dataset = find_dataset(tmp_path)
    assert dataset.classes.values == (0, 1, 2, 3)
    assert not dataset.notes


def test_lists_name_videos_above_the_folders_of_images(tmp_path: Path) -> None:
    for video in ("a_1", "b_2", "c_3"):
        for k in range(3):
            image, label = yard(k + ord(video[0]))
            save(tmp_path / "data" / video / "origin" / f"{k}.jpg", image)
            save(tmp_path / "data" / video / "mask" / f"{k}.png", label)
    (tmp_path / "train.txt").write_text("a_1\nb_2\n")
    (tmp_path / "val.txt").write_text("c_3\n")
    dataset = find_dataset(tmp_path)
    assert (len(dataset.of("train")), len(dataset.of("val"))) == (6, 3)


def test_lists_of_splits_that_name_no_image_are_mentioned(tmp_path: Path) -> None:
    write_yards(tmp_path, "images", "masks")
    (tmp_path / "train.txt").write_text("".join(f"{k}_tile_{j}\n" for k in range(5) for j in "ab"))
    dataset = find_dataset(tmp_path)
    assert any("train.txt: not used as splits" in note for note in dataset.notes)


@pytest.mark.parametrize("number", [1, 2])
def test_lists_with_other_words_give_the_splits(tmp_path: Path, number: int) -> None:
    # KITTI-360: each line names an image and its mask.
    names = [f"drive_{k}" for k in range(4)]
    for k, name in enumerate(names):
        image, label = yard(k)
        save(tmp_path / "raw" / f"{name}.png", image)
        save(tmp_path / "semantic" / f"{name}.png", label)
    for k in range(number):
        for split, listed in (("train", names[:3]), ("val", names[3:])):
            lines = "".join(f"raw/{name}.png semantic/{name}.png\n" for name in listed)
            (tmp_path / f"2013_{k}_{split}_frames.txt").write_text(lines)
    dataset = find_dataset(tmp_path)
    splits = ["train", "train", "train", "val"] if number == 1 else [""] * 4
    assert [pair.split for pair in dataset.pairs] == splits
    said = dataset.splits_by if number == 1 else dataset.notes[-1]
    assert "2013_0_train_frames.txt" in said
    assert ("there are several folds or splits" in said) == (number == 2)


def write_yards(root: Path, images: str, masks: str) -> None:
    for k in range(5):
        image, label = yard(k)
        save(root / images / f"photo{k}.png", image)
        save(root / masks / f"photo{k}.png", label)


@pytest.mark.parametrize("masks", ["gtFine/default/{}_gtFine_labelIds.png", "defaultannot/{}.png"])
def test_classes_of_tools_are_not_those_of_the_layout(tmp_path: Path, masks: str) -> None:
    for k in range(5):
        image, label = yard(k)
        place = "leftImg8bit/default/{}_leftImg8bit.png" if "gtFine" in masks else "default/{}.png"
        save(tmp_path / place.format(k), image)
        save(tmp_path / masks.format(k), label if "gtFine" in masks else COLORS[label])
    rows = "".join(f"{r} {g} {b} {n}\n" for n, (r, g, b) in zip(NAMES, COLORS, strict=True))
    (tmp_path / "label_colors.txt").write_text(rows)
    assert find_dataset(tmp_path).classes.names == NAMES


def test_a_color_in_one_column_of_a_table_is_read(tmp_path: Path) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", COLORS[label])
    rows = "".join(f"{n},{r} {g} {b}\n" for n, (r, g, b) in zip(NAMES, COLORS, strict=True))
    (tmp_path / "class_mapping.csv").write_text("class_name,class_color\n" + rows)
    assert find_dataset(tmp_path).classes.names == NAMES


def test_names_that_may_be_shifted_by_one_are_refused(tmp_path: Path) -> None:
    for k in range(5):
        image, label = yard(k)
        label[:3] = 255
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", label)
    rows = "".join(f"{k}: {n}\n" for k, n in enumerate(("unlabeled", *NAMES)))
    (tmp_path / "labels.txt").write_text(rows)
    with pytest.raises(DataError, match="may be one lower than"):
        find_dataset(tmp_path)


def test_folders_that_only_masks_have_may_be_classes(tmp_path: Path) -> None:
    for k in range(8):
        image, label = yard(k)
        name = "cat" if k < 4 else "dog"
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / name / f"{k}.png", (label == 3).astype(np.uint8) * 255)
    assert any("in the folders cat, dog" in note for note in find_dataset(tmp_path).notes)
    (tmp_path / "dataset.toml").write_text(
        'images = "images/*.png"\n[masks]\ncat = "masks/cat/*.png"\ndog = "masks/dog/*.png"\n'
    )
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "cat", "dog")
    labels = [np.unique(read_label(pair, dataset)).tolist() for pair in dataset.pairs]
    assert labels == [[0, 1]] * 4 + [[0, 2]] * 4


@pytest.mark.parametrize("name", ["masks/p{k}_mask_{n}.png", "masks/p{k}/{n}.png"])
def test_masks_of_several_annotators_are_not_joined(tmp_path: Path, name: str) -> None:
    for k in range(5):
        image, numbers = blobs(k, 3)
        save(tmp_path / "images" / f"p{k}.png", image)
        for n in range(3):
            mask = np.roll(numbers > 0, n % 2, 1).astype(np.uint8) * 255
            save(tmp_path / name.format(k=k, n=n), mask)
    with pytest.raises(DataError, match="seem to come from several annotators") as raised:
        find_dataset(tmp_path)
    for offer in str(raised.value).partition("dataset.toml:\n")[2].split("\nor\n"):
        if "_mask_" in name:
            (tmp_path / "dataset.toml").write_text(offer)
            assert len(find_dataset(tmp_path).pairs) == 5


def write_second_download(root: Path, copied: int) -> None:
    for k in range(8):
        image, numbers = blobs(k, 2)
        save(root / "images" / f"p{k}.png", image)
        save(root / "masks" / f"p{k}.png", (numbers > 0).astype(np.uint8) * 255)
    mask = (blobs(copied, 2)[1] > 0).astype(np.uint8) * 255
    save(root / "masks" / "p3 (1).png", mask)


def test_second_downloads_of_a_mask_are_no_objects(tmp_path: Path) -> None:
    write_second_download(tmp_path, copied=3)
    assert all(pair.truth is None for pair in find_dataset(tmp_path).pairs)
    write_second_download(tmp_path, copied=5)
    with pytest.raises(DataError, match=r"p3 \(1\).png' has the name of a second") as raised:
        find_dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text(str(raised.value).partition("dataset.toml:\n")[2])
    dataset = find_dataset(tmp_path)
    assert [pair.mask.name for pair in dataset.pairs] == [f"p{k}.png" for k in range(8)]


def test_several_masks_of_a_few_images_are_joined_with_a_note(tmp_path: Path) -> None:
    write_second_download(tmp_path, copied=5)
    (tmp_path / "masks" / "p3 (1).png").rename(tmp_path / "masks" / "p3_1.png")
    notes = " ".join(find_dataset(tmp_path).notes)
    assert "1 image has several masks, such as 'p3.png' and 'p3_1.png'" in notes


@pytest.mark.parametrize(
    ("name", "asks"),
    [
        ("masks/p{k}_{n}.png", '"0" = "masks/\\*_0.png"\n"1" = "masks/\\*_1.png"'),
        ("masks/p{k}/{n}.png", '"0" = "masks/p\\*/0.png"\n"1" = "masks/p\\*/1.png"'),
    ],
)
def test_masks_that_cover_all_of_an_image_are_classes(tmp_path: Path, name: str, asks: str) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "images" / f"p{k}.png", image)
        for n in range(4):
            save(tmp_path / name.format(k=k, n=n), (label == n).astype(np.uint8) * 255)
    with pytest.raises(DataError, match=asks):
        find_dataset(tmp_path)


def test_masks_of_classes_for_each_person_are_refused_with_a_way(tmp_path: Path) -> None:
    # MHP: one mask for each person, with the classes of clothes.
    for k in range(4):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", image)
        for n in range(2):
            save(tmp_path / "parsing_annos" / f"{k}_02_0{n + 1}.png", label * (label != n))
    with pytest.raises(DataError, match="save one mask for each image, for example their numpy"):
        find_dataset(tmp_path)


def test_predictions_are_no_truth_for_images_of_another_folder(tmp_path: Path) -> None:
    for k in range(8):
        image, label = yard(k)
        if k < 5:
            save(tmp_path / "train" / "image" / f"{k}.png", image)
            save(tmp_path / "train" / "label" / f"{k}.png", label)
        else:
            save(tmp_path / "test" / f"{k}.png", image)
            save(tmp_path / "test" / f"{k}_predict.png", label)
    dataset = find_dataset(tmp_path)
    assert {pair.split for pair in dataset.pairs} == {"train"}
    assert any("test/5_predict.png" in note for note in dataset.notes)


def test_predictions_are_no_truth_for_pictures_that_a_model_made(tmp_path: Path) -> None:
    for k in range(6):
        image, label = yard(k)
        for folder, pixels in (("images", image), ("masks", label)):
            save(tmp_path / folder / f"{k}.png", pixels)
        for folder, pixels in (("pred", label), ("vis", image // 2)):
            save(tmp_path / "runs" / "1" / folder / f"{k}.png", pixels)
    assert {pair.image.parent.name for pair in find_dataset(tmp_path).pairs} == {"images"}


def test_lists_of_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    for site, names in (("a", "sky\nhouse\nlawn\nball\n"), ("b", "sky\nlawn\nhouse\nball\n")):
        for k in range(4):
            image, label = yard(k + 9 * (site == "b"))
            save(tmp_path / site / "images" / f"{k}.png", image)
            save(tmp_path / site / "masks" / f"{k}.png", label)
        (tmp_path / site / "classes.txt").write_text(names)
    with pytest.raises(DataError, match="different names"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("width", [0.7, 1])
def test_outlines_are_asked_about(tmp_path: Path, width: float) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for k in range(5):
        distance = np.hypot(y - 15, x - 20 - k) - 11 - k % 3
        image = paint(np.where(distance < 0, 170, 50), np.random.default_rng(k))
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", (np.abs(distance) < width).astype(np.uint8) * 255)
    with pytest.raises(DataError, match="seem to be outlines"):
        find_dataset(tmp_path)
    settings = 'images = "images/*.png"\nmasks = "masks/*.png"\nignore = []\n'
    (tmp_path / "dataset.toml").write_text(settings)
    assert len(find_dataset(tmp_path).classes) == 2


def test_roads_around_blocks_are_no_outlines(tmp_path: Path) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for k in range(5):
        roads = ((y + k) % 11 < 2) | ((x + 2 * k) % 13 < 2)
        image = paint(np.where(roads, 170, 50), np.random.default_rng(k))
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", roads.astype(np.uint8) * 255)
    assert len(find_dataset(tmp_path).classes) == 2


@pytest.mark.parametrize("kind", ["colours", "grey levels", "grey levels of ids from 1"])
def test_masks_saved_in_two_ways_are_refused(tmp_path: Path, kind: str) -> None:
    for k in range(6):
        image, label = yard(k)
        other = COLORS[label] if kind == "colours" else label * 85
        if "from 1" in kind:
            label, other = (label == 1) + np.uint8(1), (label == 1) * np.uint8(255)
        split = "train" if k < 4 else "val"
        save(tmp_path / split / "images" / f"{k}.png", image)
        save(tmp_path / split / "masks" / f"{k}.png", label if split == "train" else other)
    with pytest.raises(DataError, match=f"some masks have ids .* and others {kind[:7]}"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("missing", [3, 2])
def test_masks_that_are_stretched_one_by_one_are_refused(tmp_path: Path, missing: int) -> None:
    for k in range(6):
        image, label = yard(k)
        if k == 4:
            label[label == missing] = 0
        _, ids = np.unique(label, return_inverse=True)
        ids = ids.reshape(label.shape)
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", (ids / ids.max() * 255).astype(np.uint8))
    with pytest.raises(DataError, match=r"each mask seems to be stretched to 0 to 255 separately"):
        find_dataset(tmp_path)


# matplotlib's viridis of three and of four values.
VIRIDIS = {
    3: np.array([(68, 1, 84), (32, 144, 140), (253, 231, 36)], np.uint8),
    4: np.array([(68, 1, 84), (48, 103, 141), (53, 183, 120), (253, 231, 36)], np.uint8),
}


@pytest.mark.parametrize("is_stretched", [True, False])
def test_masks_in_colours_of_their_own_range_are_refused(
    tmp_path: Path, is_stretched: bool
) -> None:
    for k in range(6):
        image, label = yard(k)
        label = np.minimum(label, 2) if k == 4 else label
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", VIRIDIS[3 if is_stretched and k == 4 else 4][label])
    if not is_stretched:
        assert len(find_dataset(tmp_path).classes) == 4
        return
    with pytest.raises(DataError, match=r"the colours of '.*/4.png' are #440154, #20908c and #fd"):
        find_dataset(tmp_path)


def test_levels_of_which_some_masks_lack_one_are_classes(tmp_path: Path) -> None:
    for k in range(6):
        image, label = yard(k)
        label[label == 3] = 3 * (k != 4)
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.png", label * 85)
    assert len(find_dataset(tmp_path).classes) == 4


def test_parts_of_images_on_black_are_no_masks(tmp_path: Path) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.jpg", image)
        save(tmp_path / "segmented" / f"{k}.png", image * (label == 3)[..., None])
    with pytest.raises(DataError, match="show parts of their images on black, not classes"):
        find_dataset(tmp_path)


def test_colors_that_differ_from_mask_to_mask_are_mentioned(tmp_path: Path) -> None:
    for k in range(5):
        image, numbers = blobs(k)
        colors = np.random.default_rng(k).integers(0, 255, (5, 3)).astype(np.uint8)
        colors[0] = 255
        save(tmp_path / "images" / f"{k}.jpg", image)
        save(tmp_path / "gt" / f"{k}.png", colors[numbers])
    assert any("most colours occur in one mask" in note for note in find_dataset(tmp_path).notes)


@pytest.mark.parametrize(("mask", "other"), [("mask", "groundtruth"), ("trimap", "mask")])
def test_other_files_that_are_called_masks_are_asked_about(
    tmp_path: Path, mask: str, other: str
) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "tile" / f"frame{k:04}.png", image)
        save(tmp_path / mask / f"frame{k:04}.png", label)
        # Names that no rule leads to.
        save(tmp_path / other / f"{'kqzwx'[k]}.png", label)
    with pytest.raises(DataError, match="unclear which files are the masks"):
        find_dataset(tmp_path)


def test_masks_that_repeat_the_number_of_their_folder_are_found(tmp_path: Path) -> None:
    """So does WeedMap, and its folder ``mask`` has one shape everywhere."""
    for k in range(12):
        image, label = yard(k)
        folder, frame = tmp_path / "RedEdge" / f"{k // 6:03}", f"frame{k % 6:04}"
        save(folder / "tile" / "RGB" / f"{frame}.png", image)
        for kind in ("NIR", "NDVI"):
            save(folder / "tile" / kind / f"{frame}.png", image[..., 0])
        save(folder / "mask" / f"{frame}.png", np.full((HEIGHT, WIDTH), 255, np.uint8))
        for kind, stored in (("color", COLORS[label]), ("iMap", label)):
            save(folder / "groundtruth" / f"{folder.name}_{frame}_GroundTruth_{kind}.png", stored)
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 12
    for pair in dataset.pairs:
        folder = pair.image.parents[2]
        assert pair.image.parent.name == "RGB"
        assert pair.mask.parent == folder / "groundtruth"
        assert pair.mask.name == f"{folder.name}_{pair.image.stem}_GroundTruth_iMap.png"


def test_names_that_do_not_agree_can_be_listed_in_a_table(tmp_path: Path) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "photos" / f"IMG_20{k}12_{'kqzwx'[k]}.jpg", image)
        save(tmp_path / "truth" / f"mask_{k + 1}.png", label)
    with pytest.raises(DataError, match=r"pairs.csv with the columns image,mask"):
        find_dataset(tmp_path)
    rows = (f"IMG_20{k}12_{'kqzwx'[k]}.jpg,mask_{k + 1}.png\n" for k in range(5))
    (tmp_path / "pairs.csv").write_text("image,mask\n" + "".join(rows))
    assert [pair.mask.stem for pair in find_dataset(tmp_path).pairs] == [
        f"mask_{k + 1}" for k in range(5)
    ]


def test_raw_images_are_not_preferred_to_others(tmp_path: Path) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "raw" / f"{k}.png", image)
        save(tmp_path / "processed" / f"{k}.png", 255 - image)
        save(tmp_path / "masks" / f"{k}.png", label)
    with pytest.raises(DataError, match=r"2 sets of images for the same masks: .*raw/\*\.png"):
        find_dataset(tmp_path)


def test_images_called_labelled_have_the_masks_of_their_names(tmp_path: Path) -> None:
    for k in range(10):
        image, label = yard(k)
        save(tmp_path / ("labeled" if k < 6 else "unlabeled") / f"s{k}.jpg", image)
        if k < 6:
            save(tmp_path / "masks" / f"s{k}.png", label)
    dataset = find_dataset(tmp_path)
    assert [pair.image.parent.name for pair in dataset.pairs] == ["labeled"] * 6
    assert "4 other files left out" in " ".join(dataset.notes)


def test_words_that_only_masks_have_may_be_classes(tmp_path: Path) -> None:
    for k in range(6):
        image, label = yard(k)
        save(tmp_path / f"{k}.jpg", image)
        name = f"{k}_{('lawn', 'ball')[k % 2]}.png"
        save(tmp_path / name, (label == 2 + k % 2).astype(np.uint8) * 255)
    assert any(
        "the names of the masks contain ball, lawn" in x for x in find_dataset(tmp_path).notes
    )


def test_folders_that_count_from_another_number_are_mentioned(tmp_path: Path) -> None:
    for k in range(8):
        image, label = yard(k)
        save(tmp_path / "ab"[k % 2] / "images" / f"{k}.png", image)
        save(tmp_path / "ab"[k % 2] / "masks" / f"{k}.png", label + k % 2)
    notes = find_dataset(tmp_path).notes
    assert any("one value may mean different classes" in note for note in notes)


def test_masks_before_an_event_with_fewer_classes_are_mentioned(tmp_path: Path) -> None:
    # xBD: buildings before, their damage after.
    for k in range(4):
        image, label = yard(k)
        for state in ("pre", "post"):
            save(tmp_path / "images" / f"fire_{k}_{state}_disaster.png", image)
            mask = np.minimum(label, 1) if state == "pre" else label
            save(tmp_path / "targets" / f"fire_{k}_{state}_disaster_target.png", mask)
    (note,) = (note for note in find_dataset(tmp_path).notes if "pre" in note)
    assert "so 1 may mean different classes" in note


def test_numbered_masks_of_an_image_without_a_plain_one_are_joined(tmp_path: Path) -> None:
    # AITEX has ID_mask.png, or ID_mask1.png and ID_mask2.png.
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k:04}_00.png", image)
        for number in ("1", "2") if k == 3 else ("",):
            part = label == int(number or 1)
            save(tmp_path / "masks" / f"{k:04}_00_mask{number}.png", part.astype(np.uint8) * 255)
    dataset = find_dataset(tmp_path)
    assert [pair.image.stem for pair in dataset.pairs] == [f"{k:04}_00" for k in range(5)]
    label = yard(3)[1]
    assert (read_label(dataset.pairs[3], dataset) == ((label == 1) | (label == 2))).all()


def test_overlays_that_are_called_masks_are_no_images(tmp_path: Path) -> None:
    # Supervisely's export has masks for people, which are drawn over the images, and for machines.
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "img" / f"{k}.jpg", image)
        save(tmp_path / "masks_human" / f"{k}.png", image // 2 + COLORS[label] // 2)
        save(tmp_path / "masks_machine" / f"{k}.png", label)
    assert {pair.mask.parent.name for pair in find_dataset(tmp_path).pairs} == {"masks_machine"}


def test_ids_in_jpeg_files_are_refused(tmp_path: Path) -> None:
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", image)
        save(tmp_path / "masks" / f"{k}.jpg", label)
    with pytest.raises(
        DataError, match=r"JPEG files of the values 0, 1, .*export the masks as PNG"
    ):
        find_dataset(tmp_path)


def test_an_image_without_a_mask_in_each_folder_is_no_other_set_of_images(tmp_path: Path) -> None:
    for place in ("aachen", "ica"):
        for k in range(5):
            image, label = yard(k)
            save(tmp_path / place / "images" / f"{place}_{k}.png", image)
            if k < 4:
                save(tmp_path / place / "labels" / f"{place}_{k}.png", label)
    with pytest.raises(DataError, match="2 images without a mask"):
        find_dataset(tmp_path)


@pytest.mark.parametrize(("high", "ignored"), [((254, 255), (255,)), ((65535,), ())])
def test_highest_values_beside_ids_are_ignored_or_mentioned(
    tmp_path: Path, high: tuple[int, ...], ignored: tuple[int, ...]
) -> None:
    for k in range(5):
        image, label = yard(k)
        values = label.astype(np.uint16)
        for row, value in enumerate(high):
            values[row] = value
        save(tmp_path / "images" / f"{k}.tif", image)
        save(tmp_path / "masks" / f"{k}.tif", values)
    dataset = find_dataset(tmp_path)
    assert dataset.classes.ignore == ignored
    assert any(f"{high[0]} beside ids up to 3" in note for note in dataset.notes)


def test_masks_of_matlab_have_a_running_number(tmp_path: Path) -> None:
    for k, name in enumerate(("street_5", "street_2", "oak", "street_1"), 1):
        image, label = yard(k)
        save(tmp_path / "images" / f"{name}.png", image)
        save(tmp_path / "PixelLabelData" / f"Label_{k}_{name}.png", label)
    dataset = find_dataset(tmp_path)
    names = {pair.image.stem: pair.mask.stem for pair in dataset.pairs}
    assert len(names) == 4
    assert all(mask.endswith(f"_{image}") for image, mask in names.items())


@pytest.mark.parametrize("are_alike", [True, False])
def test_one_to_three_objects_that_look_alike_are_joined(tmp_path: Path, are_alike: bool) -> None:
    for k in range(12):
        rng = np.random.default_rng(k)
        numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
        # From left to right, as people number persons.
        for n, left in enumerate(np.sort(rng.choice([2, 12, 22, 32], 1 + k % 3, False)), 1):
            top = rng.integers(2, 12)
            numbers[top : top + rng.integers(10, 16), left : left + 7] = n
        bright = 120 * (numbers > 0) if are_alike else 60 * numbers
        save(tmp_path / "images" / f"{k}.png", paint(30 + bright, rng))
        save(tmp_path / "masks" / f"{k}.png", numbers)
    dataset = find_dataset(tmp_path)
    assert dataset.encoding.objects == are_alike
    assert "connected region" in dataset.notes[0]
