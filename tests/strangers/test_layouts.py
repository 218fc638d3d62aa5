"""Folders and names as other people have them are paired rightly, or refused with a way out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from made_data import describe_pairs
from made_doctor import survey_folder
from made_strangers import COLORS, HEIGHT, WIDTH, blobs, save, yard

from useg.classes import IGNORE
from useg.data.dataset import Dataset, Instances, read_label
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.errors import DataError


def write_pair(root: Path, k: int, image: str, mask: str) -> tuple[np.ndarray, np.ndarray]:
    """Write the k-th yard: ``{k}`` in the names is its number."""
    pixels, label = yard(k)
    save(root / image.format(k=k), pixels)
    save(root / mask.format(k=k), label)
    return pixels, label


def splits_of(dataset: Dataset) -> Counter[str]:
    return Counter(pair.split for pair in assign_splits(dataset).pairs)


def masks_of(dataset: Dataset) -> dict[str, str]:
    return {image: mask for image, mask, _ in describe_pairs(dataset)}


def follow(error: DataError, root: Path) -> list[Dataset]:
    """Write each dataset.toml that a message proposes, and read the folder with it."""
    _, _, proposals = str(error).partition("dataset.toml:\n")
    assert proposals, error
    datasets = []
    for text in proposals.split("\nor\n"):
        (root / "dataset.toml").write_text(text)
        datasets.append(find_dataset(root))
    (root / "dataset.toml").unlink()
    return datasets


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/0001TP_{k:06}.png", "labels/0001TP_{k:06}_P.png"),
        ("images/IMG_{k:04}.jpg", "masks/IMG_{k:04}.jpg.png"),
        ("output/M-33-20-D_{k}.jpg", "output/M-33-20-D_{k}_m.png"),
        ("set/imagesTr/img-{k}_0000.png", "set/labelsTr/img-{k}.png"),
        ("a/2016_0810{k:02}_1_361.jpg", "a/2016_0810{k:02}_1_361.png"),
        ("input/img({k}).tif", "labels/target({k}).tif"),
        ("images/core_{k}.ome.tif", "labels/core_{k}.tif"),
        ("Slide 7 (HE) [x={k},y=0,w=96].png", "Slide 7 (HE) [x={k},y=0,w=96]-labels.png"),
        ("kaggle/CS_{k}/CS_{k}_1.tif", "kaggle/CS_{k}/CS_{k}_1_mask.tif"),
        ("pictures/{k:03}.jpg", "expert/{k}_fixedmask.png"),
        ("Frames/ROAD{k}.JPG", "frames_checked/road{k}.PNG"),
        ("rgb/leaf.{k}.png", "rgb/seg.{k}.png"),
        ("p{k}/scan.png", "p{k}/checked.png"),
        ("part/images/x{k}.png", "other/truth/x{k}_train_id.png"),
        ("2_Ortho_RGB/top_2_{k}_RGB.tif", "5_Labels_all/top_2_{k}_label.tif"),
        ("Slide_01/01_{k}.png", "GT_01/01_{k}.png"),
        ("IMD{k:03}/IMD{k:03}_Dermoscopic/IMD{k:03}.bmp", "IMD{k:03}/IMD{k:03}_l/IMD{k:03}_l.bmp"),
        ("Class1/{k:04}.PNG", "Class1/Label/{k:04}_label.PNG"),
        ("clip_img/18/clip_0/18-{k:08}.jpg", "matting/18/matting_0/18-{k:08}.png"),
        ("JPEGImages/480p/bear{k}/00000.jpg", "Annotations/480p/bear{k}/00000.png"),
        ("hair/{k}.jpg", "anno/0/{k:05}_hair.png"),
        ("Bilder/Bild_{k}.jpg", "Masken/Maske_{k}.png"),
    ],
)
def test_names_that_differ_in_constant_texts_are_paired(
    tmp_path: Path, image: str, mask: str
) -> None:
    for k in range(1, 7):
        write_pair(tmp_path, k, image, mask)
    assert masks_of(find_dataset(tmp_path)) == {
        image.format(k=k): mask.format(k=k) for k in range(1, 7)
    }


def test_pictures_and_masks_with_an_ending_in_two_folders_leave_the_test_folder_out(
    tmp_path: Path,
) -> None:
    for k in range(3):
        image, label = yard(k)
        save(tmp_path / "train" / f"00087a6bd4dc_{k:02}.jpg", image)
        save(tmp_path / "train_masks" / f"00087a6bd4dc_{k:02}_mask.gif", label // 3)
    save(tmp_path / "test" / "4dcb78a00087_01.jpg", image)
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 3
    assert describe_pairs(dataset)[0] == (
        "train/00087a6bd4dc_00.jpg",
        "train_masks/00087a6bd4dc_00_mask.gif",
        "train",
    )
    assert "1 image of the split test without a mask: left for prediction" in dataset.notes


def write_defects(root: Path) -> None:
    """Write good images, which have no masks, and images with defects, which have."""
    for k in range(7):
        save(root / f"part{k % 2}" / "train" / "good" / f"{k:03}.png", yard(k)[0])
    for k in range(4):
        image, label = yard(k + 10)
        save(root / f"part{k % 2}" / "test" / "cut" / f"{k:03}.png", image)
        mask = root / f"part{k % 2}" / "ground_truth" / "cut" / f"{k:03}_mask.png"
        save(mask, (label == 3).astype(np.uint8) * 255)


def test_good_images_without_masks_are_asked_about_and_become_background(tmp_path: Path) -> None:
    write_defects(tmp_path)
    with pytest.raises(DataError, match=r'7 images without a mask .* set missing = "background"'):
        find_dataset(tmp_path)
    with pytest.raises(DataError, match=r'none is left for training.* missing = "background"'):
        assign_splits(find_dataset(tmp_path, strict=False))
    settings = 'missing = "background"\n[splits]\ntrain = "part*/*/*/*.png"'
    (tmp_path / "dataset.toml").write_text(settings)
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "foreground")
    assert {pair.split for pair in dataset.pairs} == {"train"}
    good = [pair for pair in dataset.pairs if pair.image.parent.name == "good"]
    assert (len(good), len(dataset.pairs)) == (7, 11)
    assert not any(read_label(pair, dataset).any() for pair in good)
    assert any("7 images without a mask, all background" in note for note in dataset.notes)
    survey = survey_folder(tmp_path)
    assert [each.severity for each in survey.findings if each.severity != "note"] == []
    assert survey.images == (11, 4)


@pytest.mark.parametrize(
    ("image", "mask", "good"),
    [
        ("Defect_images/{k}_2.png", "Mask_images/{k}_2_mask.png", "NODefect_images/u7/99{k}7.png"),
        ("test_public/bad/{k}.png", "test_public/gt/bad/{k}_mask.png", "training/good/1{k}.png"),
        ("Images/Anomaly/{k}.JPG", "Masks/Anomaly/{k}.png", "Images/Normal/00{k}5.JPG"),
    ],
)
def test_images_in_folders_of_good_things_have_no_mask(
    tmp_path: Path, image: str, mask: str, good: str
) -> None:
    for k in range(6):
        write_pair(tmp_path, k, image, mask)
        save(tmp_path / good.format(k=k), yard(k + 20)[0])
    assert len(find_dataset(tmp_path, strict=False).images) == 6


def test_half_as_many_images_without_a_mask_as_with_one_are_not_dropped(tmp_path: Path) -> None:
    for video in range(4):
        for frame in (100, 245, 390):
            write_pair(tmp_path, video + frame, f"{video}/{frame}/raw.png", "{k}.png")
            mask = tmp_path / f"{video + frame}.png"
            if frame == 390:
                mask.unlink()
            else:
                mask.rename(tmp_path / f"{video}/{frame}/instruments.png")
    with pytest.raises(DataError, match="4 images without a mask"):
        find_dataset(tmp_path)


@pytest.mark.parametrize(("num_pairs", "is_asked"), [(12, True), (1, False)])
def test_pairs_beside_masks_by_class_are_not_dropped(
    tmp_path: Path, num_pairs: int, is_asked: bool
) -> None:
    for k in range(num_pairs):
        write_pair(tmp_path, k, "colon/{k:02}/image.png", "colon/{k:02}/mask.png")
    for k in range(4):
        image, label = yard(k + 20)
        save(tmp_path / "several" / f"image{k:02}.png", image)
        for value, name in enumerate(("colon", "liver", "stomach"), 1):
            mask = (label == value).astype(np.uint8)
            save(tmp_path / "several" / f"mask{k:02}_{name}.png", mask)
    if is_asked:
        with pytest.raises(DataError, match=r"several/\*_colon.png \(4\)"):
            find_dataset(tmp_path)
    else:
        notes = find_dataset(tmp_path).notes
        assert any(note.startswith("2 other files left out") for note in notes)


def test_lists_of_images_and_masks_are_splits(tmp_path: Path) -> None:
    for k in range(8):
        write_pair(tmp_path, k, "video/{k:05}.jpg", "laneseg/video/{k:05}.png")
    for name, numbers in (("train_gt", range(6)), ("val_gt", range(6, 8))):
        lines = (f"/video/{k:05}.jpg /laneseg/video/{k:05}.png 1 1 0" for k in numbers)
        save_text = tmp_path / "list" / f"{name}.txt"
        save_text.parent.mkdir(exist_ok=True)
        save_text.write_text("\n".join(lines))
    dataset = find_dataset(tmp_path)
    assert splits_of(dataset) == {"train": 6, "val": 2}
    assert dataset.splits_by == "official: train_gt.txt, val_gt.txt"


def test_stacks_of_masks_are_compared(tmp_path: Path) -> None:
    labels = np.stack([yard(k)[1] for k in range(6)])
    save(tmp_path / "images" / "a.tif", np.stack([yard(k)[0][..., 0] for k in range(6)]))
    save(tmp_path / "images" / "b.tif", np.stack([yard(k)[0][..., 1] for k in range(6)]))
    for name in ("a", "b"):
        save(tmp_path / "labels-class" / f"{name}.tif", labels)
        save(tmp_path / "labels-semantic" / f"{name}.tif", np.minimum(labels, 2))
    with pytest.raises(DataError, match=r"labels-class/\*.tif has up to 4 values in one mask"):
        find_dataset(tmp_path)


def test_surface_normals_beside_images_are_no_images_of_normal_things(tmp_path: Path) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "rgb/{k}_rgb.png", "gt/{k}_gt.png")
        save(tmp_path / "normal" / f"{k}_normal.png", yard(k + 20)[0])
    assert len(find_dataset(tmp_path).pairs) == 6


def test_images_that_no_annotation_file_names_become_background(tmp_path: Path) -> None:
    rows = ["ImageId,EncodedPixels"]
    for k in range(6):
        save(tmp_path / "train" / f"{k}.png", yard(k)[0])
        rows += [f"{k}.png,{100 + k} 9"] * (k % 2)
    (tmp_path / "train.csv").write_text("\n".join(rows))
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 3
    assert any("3 images without an annotation left out, such as" in note for note in dataset.notes)
    (tmp_path / "dataset.toml").write_text('missing = "background"')
    dataset = find_dataset(tmp_path)
    marked = [int((read_label(pair, dataset) == 1).sum()) for pair in dataset.pairs]
    assert marked == [0, 9, 0, 9, 0, 9]
    assert splits_of(dataset)["train"] > 3


@pytest.mark.parametrize(("value", "is_clear"), [(0, True), (1, False)])
def test_images_without_masks_need_a_background(tmp_path: Path, value: int, is_clear: bool) -> None:
    for k in range(4):
        image, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", image)
        if k:
            save(tmp_path / "masks" / f"{k}.png", (label % 2 + value).astype(np.uint8))
    (tmp_path / "dataset.toml").write_text('missing = "background"')
    (tmp_path / "classes.toml").write_text(
        f'[[class]]\nname = "sky"\nvalue = {value}\n[[class]]\nname = "tree"\nvalue = {value + 1}\n'
    )
    dataset = find_dataset(tmp_path)
    if is_clear:
        assert not read_label(dataset.pairs[0], dataset).any()
        return
    with pytest.raises(DataError, match="none of the classes sky, tree is the background"):
        read_label(dataset.pairs[0], dataset)
    errors = [each.message for each in survey_folder(tmp_path).findings if each.severity == "error"]
    assert "none of the classes sky, tree is the background" in errors[0]


def write_retinas(root: Path) -> None:
    """Write images, vessels, and the field of view, which the test images have alone."""
    y, x = np.mgrid[:32, :48]
    view = ((y - 16) ** 2 + (x - 24) ** 2 < 200).astype(np.uint8) * 255
    for k in range(1, 9):
        vessel = view * (np.abs(y - 16 - 8 * np.sin(x / (4 + k))) < 1.5)
        part, name = ("training", f"{k + 20}_training") if k < 6 else ("test", f"{k:02}_test")
        rng = np.random.default_rng(k)
        pixels = np.where(view, 150, 5) - vessel // 4 + rng.integers(-5, 6, view.shape)
        save(root / part / "images" / f"{name}.tif", pixels.clip(0, 255).astype(np.uint8))
        save(root / part / "mask" / f"{name}_mask.gif", view)
        if part == "training":
            save(root / part / "1st_manual" / f"{k + 20}_manual1.gif", vessel.astype(np.uint8))


def test_a_field_of_view_is_not_taken_for_the_truth_and_can_be_ignored(tmp_path: Path) -> None:
    write_retinas(tmp_path)
    dataset = find_dataset(tmp_path)
    assert masks_of(dataset)["training/images/21_training.tif"] == (
        "training/1st_manual/21_manual1.gif"
    )
    assert len(dataset.pairs) == 5
    notes = "\n".join(dataset.notes)
    assert "*/mask/*.gif has nearly the same shape in every image (IoU 1.00)" in notes
    assert 'with the line valid = "*/mask/*.gif"' in notes
    assert "3 images of the split test without a mask: left for prediction" in notes
    (tmp_path / "dataset.toml").write_text('valid = "*/mask/*.gif"')
    valid = find_dataset(tmp_path)
    whole, inside = (read_label(data.pairs[0], data) for data in (dataset, valid))
    assert (inside[0] == IGNORE).all()
    assert (inside[16, 20:28] == whole[16, 20:28]).all()


def test_masks_of_one_shape_that_are_alone_are_said_to_look_like_a_field_of_view(
    tmp_path: Path,
) -> None:
    for k in range(4):
        save(tmp_path / "images" / f"{k}.png", yard(k)[0])
        save(tmp_path / "mask" / f"{k}.png", np.pad(np.full((20, 30), 255, np.uint8), ((6,), (9,))))
    assert "like a field of view, which masks of classes rarely do" in "\n".join(
        find_dataset(tmp_path).notes
    )


def test_the_same_masks_in_colours_are_left_aside(tmp_path: Path) -> None:
    for k in range(5):
        _, label = write_pair(
            tmp_path, k, "b/images/10k/train/{k}.jpg", "b/labels/sem_seg/masks/train/{k}.png"
        )
        ids = label * 3
        ids[-3:] = IGNORE
        save(tmp_path / "b" / "labels" / "sem_seg" / "masks" / "train" / f"{k}.png", ids)
        colors = tmp_path / "b" / "labels" / "sem_seg" / "colormaps" / "train" / f"{k}.png"
        save(colors, COLORS[label])
    dataset = find_dataset(tmp_path)
    assert "b/labels/sem_seg/masks/train/0.png" in masks_of(dataset).values()
    assert "colormaps/train/*.png shows the same as b/labels/sem_seg/masks" in dataset.notes[0]


def test_finished_masks_win_over_scribbles_and_nothing_is_called_too_much(tmp_path: Path) -> None:
    for k in range(5):
        _, label = write_pair(tmp_path, k, "yard_{k}.jpg", "yard_{k}_watershed_mask.png")
        save(tmp_path / f"yard_{k}_watershed_mask.png", label + 1)
        scribble = np.zeros_like(label)
        scribble[::6, 5:25] = label[::6, 5:25] + 1
        save(tmp_path / f"yard_{k}_mask.png", scribble)
        save(tmp_path / f"yard_{k}_color_mask.png", COLORS[label])
    dataset = find_dataset(tmp_path)
    assert set(masks_of(dataset).values()) == {f"yard_{k}_watershed_mask.png" for k in range(5)}
    assert "*[0-9]_mask.png labels only a part of what" in dataset.notes[0]
    assert (dataset.images, dataset.masks) == ((), ())


def test_masks_in_two_formats_beside_overlays_are_one_set(tmp_path: Path) -> None:
    # LabelMe's export to VOC.
    for k in range(5):
        image, label = yard(k)
        save(tmp_path / "JPEGImages" / f"{k}.jpg", image)
        save(tmp_path / "SegmentationClassPNG" / f"{k}.png", label)
        save(tmp_path / "SegmentationClassVisualization" / f"{k}.jpg", image // 2 + 60)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        np.save(tmp_path / "SegmentationClass" / f"{k}.npy", label)
    dataset = find_dataset(tmp_path)
    assert {pair.mask.suffix for pair in dataset.pairs} == {".npy"}
    assert "PNG/*.png shows the same as SegmentationClass/*.npy in another" in dataset.notes[0]


def test_classes_win_over_numbered_objects_and_panoptic_colours(tmp_path: Path) -> None:
    for k in range(6):
        split = "training" if k < 5 else "validation"
        _, label = write_pair(
            tmp_path, k, split + "/images/{k}xYz.jpg", split + "/v1.2/labels/{k}xYz.png"
        )
        save(tmp_path / split / "v1.2/instances" / f"{k}xYz.png", label.astype(np.uint16) * 256 + 1)
        panoptic = np.dstack([label + 1, label * 0, label * 0])
        save(tmp_path / split / "v1.2/panoptic" / f"{k}xYz.png", panoptic)
    dataset = find_dataset(tmp_path)
    assert masks_of(dataset)["training/images/0xYz.jpg"] == "training/v1.2/labels/0xYz.png"
    assert [pair.split for pair in dataset.pairs] == ["train"] * 5 + ["val"]
    (tmp_path / "cells").mkdir()
    for k in range(5):
        image, numbers = blobs(k, count=3 + k)
        save(tmp_path / "cells" / "photo" / f"{k}.png", image)
        save(tmp_path / "cells" / "cell" / f"{k}.png", (numbers > 0).astype(np.uint8))
        save(tmp_path / "cells" / "each" / f"{k}.tif", numbers)
    cells = find_dataset(tmp_path / "cells")
    assert masks_of(cells)["photo/0.png"] == "cell/0.png"
    assert "each/*.tif numbers the objects of cell/*.png" in cells.notes[0]


def test_masks_that_fit_the_edges_of_every_image_less_are_left_out_aloud(tmp_path: Path) -> None:
    for k in range(6):
        _, label = write_pair(tmp_path, k, "images/{k}.png", "labels_v2/{k}.png")
        save(tmp_path / "labels_v1" / f"{k}.png", np.roll(label, 2, axis=0))
    dataset = find_dataset(tmp_path)
    assert masks_of(dataset)["images/0.png"] == "labels_v2/0.png"
    assert (
        "labels_v1/*.png fits the edges of the images less well than labels_v2" in dataset.notes[0]
    )


def write_class_masks(root: Path, names: Sequence[str], overlap: int = 0) -> None:
    """Write a folder of masks per name: of a bright thing, and of one with weaker edges."""
    for k in range(8):
        rng = np.random.default_rng(k)
        first, second = np.zeros((2, HEIGHT, WIDTH), bool)
        first[4:12, 4 + k : 16 + k] = True
        second[18 - overlap : 28, 6 + k : 40 - k] = True
        noise = rng.normal(0, 4, (HEIGHT, WIDTH))
        save(root / "images" / f"{k}.png", np.uint8(80 + 120 * first + 9 * second + noise))
        for name, mask in zip(names, (first, second), strict=True):
            save(root / "masks" / name / f"{k}.png", (255 * mask).astype(np.uint8))


def test_folders_of_masks_that_hardly_overlap_are_classes_by_their_names(tmp_path: Path) -> None:
    write_class_masks(tmp_path, ("car", "road"))
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "car", "road")
    assert any("became one class each" in note for note in dataset.notes)
    label = read_label(dataset.pairs[0], dataset)
    assert (label[5, 6], label[20, 10], label[0, 0]) == (1, 2, 0)


@pytest.mark.parametrize(
    ("names", "overlap"),
    [
        (("car", "road"), 12),
        (("expert1", "expert2"), 0),
        (("cell", "fov"), 0),
        (("cell", "ignore"), 0),
        (("1", "2"), 0),
    ],
)
def test_folders_of_masks_that_may_be_no_classes_are_asked_about(
    tmp_path: Path, names: tuple[str, str], overlap: int
) -> None:
    write_class_masks(tmp_path, names, overlap)
    with pytest.raises(DataError, match="2 sets of masks for the same images"):
        find_dataset(tmp_path)


def test_two_annotators_are_asked_about_with_settings_that_work(tmp_path: Path) -> None:
    for k in range(5):
        _, label = write_pair(tmp_path, k, "images/{k}.png", "1st_manual/{k}.png")
        # Sometimes one of them is more exact, sometimes the other.
        moved = [np.roll(label, 2, axis=0), label]
        save(tmp_path / "1st_manual" / f"{k}.png", moved[k % 2])
        save(tmp_path / "2nd_manual" / f"{k}.png", moved[1 - k % 2])
    with pytest.raises(DataError, match="2 sets of masks for the same images") as caught:
        find_dataset(tmp_path)
    chosen = [masks_of(dataset)["images/0.png"] for dataset in follow(caught.value, tmp_path)]
    assert sorted(chosen) == ["1st_manual/0.png", "2nd_manual/0.png"]


def test_a_folder_per_class_and_two_kinds_of_images_are_asked_about(tmp_path: Path) -> None:
    for k in range(5):
        pixels, label = yard(k)
        save(tmp_path / "train/images/rgb" / f"{k}.jpg", pixels)
        save(tmp_path / "train/images/nir" / f"{k}.jpg", pixels[..., 1])
        for value, kind in ((1, "weeds"), (2, "planter_skip"), (3, "water")):
            save(tmp_path / f"train/labels/{kind}/{k}.png", (label == value) * np.uint8(255))
        for kind in ("masks", "boundaries"):
            save(tmp_path / f"train/{kind}/{k}.png", np.full_like(label, 255))
    with pytest.raises(DataError, match="2 sets of images for the same masks") as caught:
        find_dataset(tmp_path)
    message = str(caught.value)
    assert "train/images/rgb/*.jpg (5), train/images/nir/*.jpg (5)" in message
    assert "train/boundaries/*.png (5)" in message
    joined, *others = follow(caught.value, tmp_path)
    assert len(others) == 4
    assert sorted(joined.classes.names) == ["background", "planter_skip", "water", "weeds"]
    order = [0, *(joined.classes.names.index(name) for name in ("weeds", "planter_skip", "water"))]
    for k, pair in enumerate(joined.pairs):
        assert (read_label(pair, joined) == np.array(order)[yard(k)[1]]).all()


def test_numbered_masks_of_one_image_are_joined(tmp_path: Path) -> None:
    for kind, count in (("benign", 5), ("malignant", 3)):
        for k in range(1, count + 1):
            image, numbers = blobs(k + len(kind), count=2)
            name = f"with_GT/{kind}/{kind} ({k})"
            save(tmp_path / f"{name}.png", image)
            many = kind == "benign" and k == 4
            save(
                tmp_path / f"{name}_mask.png",
                (numbers == 1 if many else numbers > 0) * np.uint8(255),
            )
            if many:
                save(tmp_path / f"{name}_mask_1.png", (numbers == 2) * np.uint8(255))
                expected = numbers > 0
    dataset = find_dataset(tmp_path)
    assert (len(dataset.pairs), dataset.masks) == (8, ())
    pair = dataset.pairs[3]
    assert isinstance(pair.truth, Instances)
    assert [path.name for path in pair.truth.masks] == [
        "benign (4)_mask.png",
        "benign (4)_mask_1.png",
    ]
    assert (read_label(pair, dataset) == expected).all()


def test_numbered_masks_of_classes_are_not_joined(tmp_path: Path) -> None:
    for k in range(4):
        _, label = write_pair(tmp_path, k, "images/a{k}.png", "masks/a{k}_mask.png")
    save(tmp_path / "masks" / "a3_mask_1.png", label[:, ::-1])
    with pytest.raises(DataError, match=r"several masks \(.*a3_mask_1.png'\) with more than two"):
        find_dataset(tmp_path)


def test_one_mask_per_object_may_lie_in_a_folder_called_like_the_image(tmp_path: Path) -> None:
    for name in ("00ae65", "0a7d30", "1b44d2"):
        image, numbers = blobs(len(name), count=3)
        save(tmp_path / "images" / f"{name}.png", image)
        for k in range(1, 4):
            save(tmp_path / "masks" / name / f"{k}.png", (numbers == k) * np.uint8(255))
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, len(dataset.pairs)) == ("instances", 3)
    assert (read_label(dataset.pairs[0], dataset) == (numbers > 0)).all()


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("img_dir/{split}/{k}.png", "ann_dir/{split}/{k}.png"),
        ("{split}/Urban/images_png/{k}.png", "{split}/Urban/masks_png/{k}.png"),
        ("{split}/input/img({k}).png", "{split}/labels/target({k}).png"),
        ("{split}crop/{k}.jpg", "{split}crop/{k}.png"),
        ("{split}/{k}_sat.jpg", "{split}/{k}_mask.png"),
        ("images_{split}/{k}.jpg", "masks_{split}/{k}.png"),
        ("set/{split}/images/{k}.jpg", "set/masks/{split}/{k}.png"),
    ],
)
@pytest.mark.parametrize("words", [("train", "val", "test"), ("Train", "Valid", "TEST")])
def test_folders_called_like_splits_count_at_any_level(
    tmp_path: Path, image: str, mask: str, words: tuple[str, str, str]
) -> None:
    for k in range(8):
        split = words[0 if k < 5 else k % 3]
        write_pair(tmp_path, k, image.replace("{split}", split), mask.replace("{split}", split))
    assert splits_of(find_dataset(tmp_path)) == {"train": 6, "val": 1, "test": 1}


def test_splits_in_other_languages_are_official(tmp_path: Path) -> None:
    for k, split in enumerate(("Entraînement", "treino", "validação", "test")):
        write_pair(tmp_path, k, f"{split}/photos/{{k}}.png", f"{split}/masques/{{k}}.png")
    assert splits_of(find_dataset(tmp_path)) == {"train": 2, "val": 1, "test": 1}


def test_splits_without_masks_are_for_predicting(tmp_path: Path) -> None:
    for k in range(9):
        if k < 5:
            write_pair(tmp_path, k, "train/{k}_sat.jpg", "train/{k}_mask.png")
        else:
            save(tmp_path / ("valid" if k < 7 else "test") / f"{k}_sat.jpg", yard(k)[0])
    dataset = find_dataset(tmp_path)
    assert (len(dataset.pairs), dataset.images) == (5, ())
    assert {note.split(" without")[0] for note in dataset.notes} == {
        "2 images of the split val",
        "2 images of the split test",
    }
    (tmp_path / "dataset.toml").write_text('images = "*/*_sat.jpg"\nmasks = "*/*_mask.png"')
    assert len(find_dataset(tmp_path).pairs) == 5


def test_train_val_is_cut_and_the_test_folder_kept_beside_stray_masks(tmp_path: Path) -> None:
    for k in range(8):
        part = "train_val" if k < 6 else "TEST"
        _, label = write_pair(tmp_path, k, part + "/images/d_{k}_.jpg", part + "/masks/d_{k}_.bmp")
        if part == "TEST":
            for value, name in ((1, "RO"), (2, "SR")):
                save(
                    tmp_path / part / "masks" / name / f"d_{k}_.bmp",
                    (label == value) * np.uint8(255),
                )
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 8
    assert splits_of(dataset)["test"] == 2
    assert splits_of(dataset)["val"] > 0
    assert "TEST/masks/RO/*.bmp" in dataset.notes[0]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"valid.txt": "{k}.png"}, {"train": 6, "val": 2}),
        ({"train.txt": "{k}", "val.txt": "{k}"}, {"train": 6, "val": 2}),
        ({"sets/train_ids.txt": "./images/{k}.png masks/{k}.png", "sets/test_ids.txt": "{k}"}, {}),
        ({"ImageSets/Segmentation/train.txt": "{k}", "ImageSets/Segmentation/val.txt": "{k}"}, {}),
    ],
)
def test_lists_of_names_are_official_splits(
    tmp_path: Path, files: dict[str, str], expected: dict[str, int]
) -> None:
    for k in range(8):
        write_pair(tmp_path, k, "images/{k}.png", "masks/{k}.png")
    for name, line in files.items():
        numbers = range(6) if "train" in name else (6, 7)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(line.format(k=k) + "\n" for k in numbers))
    dataset = find_dataset(tmp_path)
    assert dataset.splits_by.startswith("official: ")
    counts = splits_of(dataset)
    assert sum(counts.values()) == 8
    assert all(counts[split] == count for split, count in expected.items())
    assert counts["train"] in (4, 5, 6)


def test_an_image_in_two_lists_is_refused_and_one_in_none_is_left_out(tmp_path: Path) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "images/{k}.png", "masks/{k}.png")
    (tmp_path / "train.txt").write_text("0\n1\n2\n")
    (tmp_path / "val.txt").write_text("3\n4\n")
    dataset = find_dataset(tmp_path)
    assert [pair.split for pair in dataset.pairs] == ["train"] * 3 + ["val"] * 2 + ["gap"]
    assert "1 image not listed in train.txt, val.txt: left out" in dataset.notes
    (tmp_path / "val.txt").write_text("2\n4\n")
    with pytest.raises(DataError, match=r"train.txt' and '.*val.txt' both name '2.png'"):
        find_dataset(tmp_path)


def test_split_folders_count_through_a_dataset_toml(tmp_path: Path) -> None:
    for k in range(8):
        split = "train" if k < 6 else "val"
        write_pair(tmp_path, k, f"img_dir/{split}/{{k}}.png", f"ann_dir/{split}/{{k}}.png")
    (tmp_path / "dataset.toml").write_text('images = "img_dir/*/*.png"\nmasks = "ann_dir/*/*.png"')
    assert splits_of(find_dataset(tmp_path)) == {"train": 6, "val": 2}


def test_a_dataset_toml_may_name_files_whose_stars_differ_in_constant_texts(tmp_path: Path) -> None:
    for k in range(5):
        write_pair(tmp_path, k, "images/{k}.jpg", "labels/{k}_P.png")
    (tmp_path / "dataset.toml").write_text('images = "images/*.jpg"\nmasks = "labels/*.png"')
    assert masks_of(find_dataset(tmp_path))["images/0.jpg"] == "labels/0_P.png"


def test_links_that_lead_in_circles_are_named_and_read_once(tmp_path: Path) -> None:
    for k in range(4):
        write_pair(tmp_path, k, "images/{k}.png", "masks/{k}.png")
    (tmp_path / "images" / "images").symlink_to(tmp_path / "images")
    (tmp_path / "all").symlink_to(tmp_path)
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 4
    assert sorted(note.split("'")[1].split("/")[-1] for note in dataset.notes) == ["all", "images"]


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    for k in range(4):
        write_pair(tmp_path / "store", k, "x/{k}.png", "y/{k}.png")
    (tmp_path / "store" / "x" / "back").symlink_to(tmp_path / "store")
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(tmp_path / "store" / "x")
    (data / "masks").symlink_to(tmp_path / "store" / "y")
    assert masks_of(find_dataset(data))["images/0.png"] == "masks/0.png"


def test_files_of_operating_systems_and_empty_files_do_not_stop_the_pairing(tmp_path: Path) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "photos/{k}.png", "checked/{k}.png")
    for name in (".DS_Store", "photos/Thumbs.db", "__MACOSX/photos/._1.png", "photos/._1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "photos" / "0.png").write_bytes(b"")
    assert len(find_dataset(tmp_path, strict=False).pairs) == 6


def test_thumbnails_and_other_pictures_beside_the_set_are_named(tmp_path: Path) -> None:
    for k in range(5):
        pixels, _ = write_pair(tmp_path, k, "images/{k}.png", "masks/{k}.png")
        save(tmp_path / "small" / f"{k}.png", pixels[::2, ::2])
    save(tmp_path / "docs" / "figure.png", yard(9)[0])
    dataset = find_dataset(tmp_path)
    assert masks_of(dataset)["images/0.png"] == "masks/0.png"
    notes = "\n".join(dataset.notes)
    assert "fit small/*.png, which are not used because they have other sizes" in notes
    assert "no image or mask belongs to it: 'docs/figure.png'" in notes


def test_images_that_share_more_folders_with_the_masks_are_theirs(tmp_path: Path) -> None:
    for k in range(5):
        write_pair(tmp_path, k, "b/test/broken/{k:03}.png", "b/ground_truth/broken/{k:03}_mask.png")
        save(tmp_path / "b" / "train" / "clean" / f"{k:03}.png", yard(k + 50)[0])
    dataset = find_dataset(tmp_path)
    assert masks_of(dataset)["b/test/broken/000.png"] == "b/ground_truth/broken/000_mask.png"
    assert (
        "b/train/clean/*.png, which are not used because they share fewer folders"
        in dataset.notes[0]
    )


def test_a_series_of_other_pictures_beside_the_images_is_named_and_left_aside(
    tmp_path: Path,
) -> None:
    for k in range(5):
        write_pair(tmp_path, k, "Data/IS_{k:04}.jpg", "GroundTruth/IS_{k:04}_segmentation.png")
        save(tmp_path / "Data" / f"IS_{k:04}_superpixels.png", yard(k + 50)[0])
    dataset = find_dataset(tmp_path)
    assert (len(dataset.pairs), dataset.images) == (5, ())
    assert "the masks would also fit Data/*.png" in dataset.notes[0]


def test_masks_with_padded_numbers_are_classes_by_their_names(tmp_path: Path) -> None:
    for k in range(1, 6):
        pixels, label = yard(k)
        save(tmp_path / "img" / f"{k}.jpg", pixels)
        for value, name in ((1, "hair"), (2, "skin")):
            save(tmp_path / "anno" / "0" / f"{k:05}_{name}.png", (label == value) * np.uint8(255))
    dataset = find_dataset(tmp_path)
    assert dataset.classes.names == ("background", "hair", "skin")
    for k, pair in enumerate(dataset.pairs, 1):
        label = yard(k)[1]
        assert (read_label(pair, dataset) == np.where(label > 2, 0, label)).all()


def test_a_folder_of_many_images_masks_does_not_belong_to_the_image_of_its_name(
    tmp_path: Path,
) -> None:
    # CelebAMask-HQ: the folder 0 has the masks of the images 0 to 4.
    for k in range(10):
        pixels, label = yard(k)
        save(tmp_path / "images" / f"{k}.jpg", pixels)
        for value, name in ((1, "skin"), (2, "hair"), (3, "hat")):
            if value < 3 or k % 3 == 0:
                mask = np.uint8(255) * (label == value)
                save(tmp_path / "anno" / str(k // 5) / f"{k:05}_{name}.png", mask)
    with pytest.raises(DataError, match=r"there are 3 sets of masks.*_skin\.png \(10\)"):
        find_dataset(tmp_path)


def test_images_without_a_folder_of_objects_are_left_out_aloud(tmp_path: Path) -> None:
    for k in range(5):
        pixels, numbers = blobs(k)
        save(tmp_path / "images" / f"cell{k}.png", pixels)
        for number in range(1, 5 if k else 1):
            mask = np.uint8(255) * (numbers == number)
            save(tmp_path / "masks" / f"cell{k}" / f"{number}.png", mask)
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 4
    assert "1 image without a folder of masks left out, such as 'images/cell0.png'" in dataset.notes


def test_lists_may_name_folders_of_images(tmp_path: Path) -> None:
    for video in ("bear", "bike", "cows"):
        for k in range(3):
            write_pair(tmp_path, k, f"JPEGImages/480p/{video}/{{k}}.jpg", f"Anno/{video}/{{k}}.png")
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "train.txt").write_text("bear\ncows\n")
    (tmp_path / "ImageSets" / "val.txt").write_text("480p/bike\n")
    dataset = find_dataset(tmp_path)
    assert {(pair.image.parent.name, pair.split) for pair in dataset.pairs} == {
        ("bear", "train"),
        ("cows", "train"),
        ("bike", "val"),
    }


SPLITS_OF_SIX = dict(zip((f"a{k}" for k in range(6)), (*["train"] * 4, "val", "test"), strict=True))


def table_of_splits(header: str, row: str) -> str:
    flags = {"train": "1,0,0", "val": "0,1,0", "test": "0,0,1"}
    rows = (row.format(name=n, split=s, flags=flags[s]) for n, s in SPLITS_OF_SIX.items())
    return "\n".join([header, *rows]) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("splits.json", '{"train": ["a0", "a1.png", "a2", "a3"], "val": ["a4"], "test": ["a5"]}'),
        ("split.json", json.dumps(SPLITS_OF_SIX)),
        ("my_split.json", '{"split": {"train": ["a0", "a1", "a2", "a3"], "valid": ["a4"], '
         '"test": ["a5"]}}'),
        ("datalist.json", json.dumps({
            name: [{"image": f"images/{n}.png", "label": f"masks/{n}.png"}
                   for n, s in SPLITS_OF_SIX.items() if s == split]
            for name, split in (("training", "train"), ("validation", "val"), ("test", "test"))
        })),
        ("partition.json", json.dumps([{"id": n, "set": s} for n, s in SPLITS_OF_SIX.items()])),
        ("splits.yaml", "train: [a0, a1, a2, a3]\nval:\n  - a4\ntest: [images/a5.png]\n"),
        ("metadata.csv", table_of_splits("image_id,age,split", "{name},3,{split}")),
        ("metadata.tsv", table_of_splits("Image Name\tPhase", "{name}.png\t{split}")),
        ("overview.csv", table_of_splits("tile;kind of use", "{name};{split}")),
        ("partition.txt", table_of_splits("", "{name}.png,{split}").lstrip()),
        ("parts.csv", table_of_splits("filename,train,val,test", "{name}.png,{flags}")),
        ("splits_0.csv", ",train,val,test\n0,a0,a4,a5\n1,a1,,\n2,a2,,\n3,a3,,\n"),
    ],
)  # fmt: skip
def test_splits_in_json_and_in_tables_are_official(tmp_path: Path, name: str, content: str) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "images/a{k}.png", "masks/a{k}.png")
    (tmp_path / name).write_text(content)
    dataset = find_dataset(tmp_path)
    assert [pair.split for pair in dataset.pairs] == [*["train"] * 4, "val", "test"]
    assert dataset.splits_by == f"official: {name}"
    # A split.csv overrules them.
    rows = "".join(f"a{k},{'val' if k < 2 else 'train'}\n" for k in range(6))
    (tmp_path / "split.csv").write_text("image,split\n" + rows)
    assert [pair.split for pair in find_dataset(tmp_path).pairs] == [*["val"] * 2, *["train"] * 4]


def test_tables_of_flags_hold_images_out(tmp_path: Path) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "images/a{k}.png", "masks/a{k}.png")
    (tmp_path / "train.csv").write_text(
        "fname,name,is_valid\n" + "".join(f"{k},a{k}.png,{k > 3}\n" for k in range(6))
    )
    dataset = find_dataset(tmp_path)
    assert [pair.split for pair in dataset.pairs] == [*["train"] * 4, "val", "val"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("folds.csv", table_of_splits("image,fold0,fold1", "{name}.png,{split},train"), "folds"),
        ("cv.csv", "image_id,fold\n" + "".join(f"a{k},{k % 3}\n" for k in range(6)), "folds"),
        ("splits_final.json", json.dumps([{"train": ["a0", "a1"], "val": ["a2"]}] * 2), "folds"),
        ("splits.yml", "f0: {train: [a0], val: [a1]}\nf1: {train: [a1], val: [a0]}", "folds"),
        ("train_fold0.txt", "a0\na1\na2\n", "folds"),
        ("split.xlsx", "PK", "does not read"),
        ("train.xlsx", "PK", "does not read"),
        ("train_test_split.txt", "1 1\n2 0\n", "too few of their lines"),
    ],
)
def test_splits_that_are_not_used_are_mentioned(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "images/a{k}.png", "masks/a{k}.png")
    assert find_dataset(tmp_path).notes == ()
    (tmp_path / name).write_text(content)
    dataset = find_dataset(tmp_path)
    (note,) = dataset.notes
    assert note.startswith(f"{name}: ")
    assert says in note
    assert "write a split.csv" in note
    assert {pair.split for pair in dataset.pairs} == {""}


def test_lists_hold_images_of_a_folder_for_training_out(tmp_path: Path) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "train/images/a{k}.png", "train/masks/a{k}.png")
        write_pair(tmp_path, k, "test/images/b{k}.png", "test/masks/b{k}.png")
    (tmp_path / "train.txt").write_text("a0\na1\na2\na3\n")
    (tmp_path / "val.txt").write_text("a4\na5\nb1\n")
    dataset = find_dataset(tmp_path)
    assert Counter(pair.split for pair in dataset.pairs) == {"train": 4, "val": 2, "test": 6}


def test_tables_about_images_name_no_classes(tmp_path: Path) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "images/a{k}.png", "masks/a{k}.png")
    rows = "".join(f"a{k}.png,day,{k}\n" for k in range(6))
    (tmp_path / "metadata.csv").write_text("picture,light,patient\n" + rows)
    assert find_dataset(tmp_path).classes.names[0] == "class 0"


def test_of_several_frames_for_one_mask_that_of_its_name_is_taken(tmp_path: Path) -> None:
    for clip in range(4):
        for frame in (1, 2, 3, 20):
            save(tmp_path / f"clips/{clip}/{frame}.jpg", yard(10 * clip + frame)[0])
        save(tmp_path / f"seg_label/{clip}/20.png", yard(10 * clip + 20)[1])
    dataset = find_dataset(tmp_path)
    assert {pair.image.stem for pair in dataset.pairs} == {"20"}
    assert any(
        "because they have names that are less similar to those of the masks" in note
        for note in dataset.notes
    )


def test_a_thing_inside_of_another_is_asked_about(tmp_path: Path) -> None:
    for k in range(6):
        pixels, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", pixels)
        save(tmp_path / "lung masks" / f"{k}.png", np.uint8(255) * (label > 0))
        save(tmp_path / "infection masks" / f"{k}.png", np.uint8(255) * (label == 1))
    with pytest.raises(DataError, match=r"2 sets of masks for the same images: .*lung masks"):
        find_dataset(tmp_path)


def test_masks_with_a_class_more_are_not_scribbles_of_those_without_it(tmp_path: Path) -> None:
    for k in range(6):
        pixels, label = yard(k)
        save(tmp_path / "images" / f"{k}.png", pixels)
        save(tmp_path / "masks" / f"{k}.png", np.where(label == 2, 0, label))
        save(tmp_path / "masks_old" / f"{k}.png", np.uint8(1) * (label == 1))
    assert {pair.mask.parent.name for pair in find_dataset(tmp_path).pairs} == {"masks"}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("TE", "test"),
        ("TE1", "test"),
        ("tst", "test"),
        ("VA", "val"),
        ("VD", "val"),
        ("val", "val"),
    ],
)
def test_short_names_of_splits_count_beside_each_other(
    tmp_path: Path, name: str, split: str
) -> None:
    for own, names in (("TR", range(6)), (name, range(6, 9))):
        for k in names:
            folder = f"DUTS-{own}/DUTS-{own}"
            write_pair(tmp_path, k, f"{folder}-Image/a{{k}}.jpg", f"{folder}-Mask/a{{k}}.png")
    found = Counter(pair.split for pair in find_dataset(tmp_path).pairs)
    assert found == {"train": 6, split: 3}
    # A folder of echo times alone is no split.
    for k in range(6):
        write_pair(tmp_path / "mr", k, "TE-images/a{k}.jpg", "TE-masks/a{k}.png")
    assert splits_of(find_dataset(tmp_path / "mr"))["test"] == 0


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("SBUTrain4KRecovered", "SBU-Test"), ("train", "test")),
        (("Training400", "Annotations-Val"), ("train", "val")),
        (("train", "dev"), ("train", "val")),
        (("train", "eval"), ("train", "test")),
        # One of them has no split.
        (("SBUTrain4KRecovered", "SBU-Rest"), ("", "")),
    ],
)
def test_folders_that_all_name_a_split_count_beside_each_other(
    tmp_path: Path, names: tuple[str, str], splits: tuple[str, str]
) -> None:
    for name, seeds in zip(names, (range(4), range(4, 7)), strict=True):
        for k in seeds:
            write_pair(tmp_path, k, f"{name}/photos/a{{k}}.png", f"{name}/masks/a{{k}}.png")
    found = Counter(pair.split for pair in find_dataset(tmp_path).pairs)
    assert found == Counter({splits[0]: 4}) + Counter({splits[1]: 3})


@pytest.mark.parametrize(
    ("others", "truth"),
    [
        (("leaf_instances", "visibility"), "semantics"),
        (("Human_ids", "Part_ids"), "Category_ids"),
        (("distance maps",), "mask binary"),
    ],
)
def test_masks_that_are_called_classes_win_where_pixels_do_not_decide(
    tmp_path: Path, others: tuple[str, ...], truth: str
) -> None:
    for k in range(6):
        write_pair(tmp_path, k, "images/{k}.png", f"{truth}/{{k}}.png")
        for shift, other in enumerate(others, 3):
            label = np.roll(yard(k)[1], 5 * shift, 1) % 3
            save(tmp_path / other / f"{k}.png", label)
    dataset = find_dataset(tmp_path)
    assert {pair.mask.parent.name for pair in dataset.pairs} == {truth}
    assert any(others[0] in note for note in dataset.notes)


def test_classes_of_which_some_masks_lack_the_last_do_not_number_parts_called_visible(
    tmp_path: Path,
) -> None:
    for k in range(6):
        pixels, label = yard(k)
        classes = label.copy()
        classes[:, : WIDTH // 2][classes[:, : WIDTH // 2] == 3] += k % 2
        save(tmp_path / "images" / f"{k}.png", pixels)
        save(tmp_path / "semantics" / f"{k}.png", classes)
        save(tmp_path / "plant_visibility" / f"{k}.png", np.uint8(200) * (label > 1))
    assert {pair.mask.parent.name for pair in find_dataset(tmp_path).pairs} == {"semantics"}


def test_python_objects_of_cellpose_are_not_taken_for_images(tmp_path: Path) -> None:
    for k in range(6):
        pixels, numbers = blobs(k)
        save(tmp_path / f"im{k}.png", pixels)
        objects = np.array({"masks": numbers}, dtype=object)
        np.save(tmp_path / f"im{k}_seg.npy", objects, allow_pickle=True)
    with pytest.raises(DataError, match=r"im0_seg.npy' .* it stores object instead of numbers"):
        find_dataset(tmp_path)
    for k in range(6):
        save(tmp_path / f"im{k}_cp_masks.png", blobs(k)[1])
    dataset = find_dataset(tmp_path)
    assert masks_of(dataset)["im3.png"] == "im3_cp_masks.png"
    assert not dataset.images


def test_classes_are_preferred_to_equal_masks_that_are_called_objects(tmp_path: Path) -> None:
    # CVAT's "Segmentation mask 1.1", where each class has one object.
    objects = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)], np.uint8)
    for k in range(5):
        pixels, label = yard(k)
        save(tmp_path / "JPEGImages" / f"{k}.jpg", pixels)
        save(tmp_path / "SegmentationClass" / f"{k}.png", COLORS[label])
        save(tmp_path / "SegmentationObject" / f"{k}.png", objects[label])
    assert {pair.mask.parent.name for pair in find_dataset(tmp_path).pairs} == {"SegmentationClass"}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_masks_in_a_fourth_band_are_mentioned(tmp_path: Path, suffix: str) -> None:
    for k in range(4):
        pixels, label = yard(k)
        save(tmp_path / f"{k}{suffix}", np.dstack([pixels, np.uint8(255) * (label == 3)]))
    with pytest.raises(DataError, match=r"fourth band.* has only a few values, like a mask"):
        find_dataset(tmp_path)


def test_images_of_one_band_each_are_asked_to_be_joined(tmp_path: Path) -> None:
    for k in range(5):
        pixels, label = yard(k)
        save(tmp_path / "masks" / f"{k}.png", label)
        for band, name in enumerate("RGB"):
            save(tmp_path / "images" / f"{k}_{name}.png", np.ascontiguousarray(pixels[..., band]))
    with pytest.raises(DataError, match="join the bands of each image in one TIFF"):
        find_dataset(tmp_path)


def test_masks_are_preferred_to_trimaps_in_each_part_of_a_data_set(tmp_path: Path) -> None:
    """P3M-10k: only the images for validation have trimaps, and these have another name."""
    places = {"train/blurred": range(8), "val/P/blurred": range(20, 24), "val/N/original": (30, 31)}
    for place, numbers in places.items():
        folder = tmp_path / place
        for k in numbers:
            image, label = yard(k)
            save(folder.with_name(f"{folder.name}_image") / f"p{k}.jpg", image)
            save(folder.with_name("mask") / f"p{k}.png", (label == 1).astype(np.uint8) * 255)
            if k >= 20:
                trimap = np.where(label == 1, 255, np.where(label == 2, 128, 0)).astype(np.uint8)
                save(folder.with_name("trimap") / f"p{k}.png", trimap)
    dataset = find_dataset(tmp_path)
    assert len(dataset.of("train")) == 8
    assert len(dataset.of("val")) == 6
    assert {pair.mask.parent.name for pair in dataset.pairs} == {"mask"}
    assert "trimap/*.png is called 'trimap'" in " ".join(dataset.notes)


def test_images_of_the_opposite_are_no_other_set_of_images(tmp_path: Path) -> None:
    """BoWFire, of which the images without fire have no masks."""
    for k in range(6):
        image, label = yard(k)
        save(tmp_path / "img" / f"fire{k:03}.png", image)
        save(tmp_path / "gt" / f"fire{k:03}_gt.png", (label == 1).astype(np.uint8) * 255)
        save(tmp_path / "img" / f"not_fire{k:03}.png", yard(k + 20)[0])
    with pytest.raises(DataError, match=r'6 images without a mask .* set missing = "background"'):
        find_dataset(tmp_path)
    (tmp_path / "dataset.toml").write_text('missing = "background"\n')
    dataset = find_dataset(tmp_path)
    empty = [pair for pair in dataset.pairs if not read_label(pair, dataset).any()]
    assert [pair.image.name for pair in empty] == [f"not_fire{k:03}.png" for k in range(6)]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/site_{k}.png", "masks/site_{k}_{hash}.png"),
        ("images/site_{k}_{hash}.png", "masks/site_{k}.png"),
        ("images/site_{k}.png", "masks/{hash}-site_{k}.png"),
        ("all/site_{k}.jpg", "all/site_{k}-{hash}.png"),
        ("{split}/images/site_{k}.png", "{split}/masks/site_{k} ({hash}).png"),
    ],
)
def test_names_that_begin_or_end_with_others_are_paired(
    tmp_path: Path, image: str, mask: str
) -> None:
    rng = np.random.default_rng(1)
    pairs = {}
    for k in range(12):
        pixels, label = yard(k)
        split = ("train", "val")[k > 8]
        names = [
            name.format(k=k % 9, hash=f"{rng.integers(1 << 40):010x}", split=split)
            if "{split}" in image
            else name.format(k=k, hash=f"{rng.integers(1 << 40):010x}")
            for name in (image, mask)
        ]
        save(tmp_path / names[0], pixels)
        save(tmp_path / names[1], (label == 1).astype(np.uint8) * 255)
        pairs[tmp_path / names[0]] = tmp_path / names[1]
    dataset = find_dataset(tmp_path)
    assert {pair.image: pair.mask for pair in dataset.pairs} == pairs


def test_rules_that_change_numbers_of_few_files_pair_nothing(tmp_path: Path) -> None:
    """AROI: ``raw0005`` of each patient has no mask, and not that of ``raw0001``."""
    for k in range(18):
        patient, place = f"patient{k // 6}", "labeled" if k % 6 < 4 else "unlabeled"
        image, label = yard(k)
        save(tmp_path / patient / "raw" / place / f"{patient}_raw{k % 6:04}.png", image)
        if place == "labeled":
            save(tmp_path / patient / "mask" / f"{patient}_raw{k % 6:04}.png", label)
    dataset = find_dataset(tmp_path)
    assert len(dataset.pairs) == 12
    assert all(pair.image.name == pair.mask.name for pair in dataset.pairs)


LINES_OF_LISTS = {
    "numbers": "{k}",
    "numbers with zeros": "{k:03}",
    "names of another format": "S2_{k:03}_sat.jpg",
    "parts of names": "{k:03}_sat",
    "images and masks": "old/{k:03}.png old/{k:03}_gt.png",
}


@pytest.mark.parametrize("kind", LINES_OF_LISTS)
def test_lists_may_name_images_by_the_part_that_differs(tmp_path: Path, kind: str) -> None:
    for k in range(10):
        image, label = yard(k)
        save(tmp_path / "images" / f"S2_{k:03}_sat.png", image)
        save(tmp_path / "masks" / f"S2_{k:03}_gt.png", label)
    for split, numbers in (("train", range(7)), ("val", range(7, 10))):
        lines = [LINES_OF_LISTS[kind].format(k=k) for k in numbers]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    dataset = assign_splits(find_dataset(tmp_path))
    assert [pair.split for pair in dataset.pairs] == ["train"] * 7 + ["val"] * 3
    # Numbers from 0 may count the images from 1.
    (tmp_path / "val.txt").write_text("8\n9\n10\n")
    dataset = find_dataset(tmp_path)
    assert not any(pair.split for pair in dataset.pairs)
    assert "too few of their lines name an image" in " ".join(dataset.notes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.json", {f"s{k}.png": {"split": ("train", "val")[k > 6]} for k in range(10)}),
        (
            "dataset.json",
            {"images": [{"file": f"s{k}.png", "set": ("train", "test")[k > 6]} for k in range(10)]},
        ),
        ("data.yaml", {"train": [f"s{k}" for k in range(7)], "val": ["s7", "s8", "s9"]}),
    ],
)
def test_records_and_settings_with_splits_are_official(
    tmp_path: Path, name: str, content: dict[str, object]
) -> None:
    for k in range(10):
        image, label = yard(k)
        save(tmp_path / "images" / f"s{k}.png", image)
        save(tmp_path / "masks" / f"s{k}.png", label)
    lists = "".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items())
    (tmp_path / name).write_text(lists if name.endswith("yaml") else json.dumps(content))
    dataset = find_dataset(tmp_path)
    assert [bool(pair.split in ("val", "test")) for pair in dataset.pairs] == [False] * 7 + [
        True
    ] * 3
    assert f"official: {name}" in dataset.splits_by


def test_lists_win_where_a_folder_called_valid_is_the_only_split(tmp_path: Path) -> None:
    """DeepFish has ``images/valid`` beside ``images/empty``."""
    for k in range(10):
        image, label = yard(k)
        folder = ("valid", "empty")[k > 5]
        save(tmp_path / "images" / folder / f"f{k}.png", image)
        save(tmp_path / "masks" / folder / f"f{k}.png", label if k < 6 else label * 0)
    (tmp_path / "train.csv").write_text("ID\nvalid/f0\nvalid/f1\nvalid/f2\nempty/f6\nempty/f7\n")
    (tmp_path / "val.csv").write_text("ID\nvalid/f3\nvalid/f4\nvalid/f5\nempty/f8\nempty/f9\n")
    dataset = find_dataset(tmp_path)
    assert sorted(pair.image.stem for pair in dataset.of("val")) == ["f3", "f4", "f5", "f8", "f9"]


def test_numbers_of_folders_are_no_part_of_the_names_of_classes(tmp_path: Path) -> None:
    """IDRiD: ``2. All Segmentation Groundtruths/2. Haemorrhages``."""
    for k in range(6):
        image, label = yard(k)
        save(tmp_path / "1. Original Images" / f"IDRiD_{k:02}.jpg", image)
        for number, name, short in ((1, "Aneurysms", "MA"), (2, "Haemorrhages", "HE")):
            folder = tmp_path / "2. All Segmentation Groundtruths" / f"{number}. {name}"
            mask = (label == number).astype(np.uint8) * 255
            save(folder / f"IDRiD_{k:02}_{short}.png", mask)
    assert find_dataset(tmp_path).classes.names == ("background", "Aneurysms", "Haemorrhages")
