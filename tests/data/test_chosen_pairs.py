"""Of several sets of images or masks, the right one is chosen, or the user is asked."""

from pathlib import Path

import numpy as np
import pytest
from made_data import named_files, write_folders, write_image
from made_strangers import COLORS, save, yard

from useg.data.chosen_pairs import choose_pairs
from useg.data.layouts import find_dataset
from useg.data.roles import links_to_masks
from useg.errors import DataError

pytestmark = pytest.mark.wheel


def test_the_set_of_images_with_the_sizes_of_the_masks_is_chosen(tmp_path: Path):
    write_folders(tmp_path, names=("1", "2", "3"))
    for k in (1, 2, 3):
        write_image(tmp_path / "images_half" / f"{k}.jpg", (4, 3))
    files = named_files(tmp_path)
    (chosen,) = choose_pairs(links_to_masks(files), files)
    assert set(chosen.link.partners) == {f"images/{k}" for k in (1, 2, 3)}
    assert "images_half/*.jpg, which are not used because they have other sizes" in chosen.notes[0]


def test_colour_images_are_chosen_beside_depth_and_previews_of_the_masks(tmp_path: Path):
    for k in range(3):
        pixels, label = yard(k)
        save(tmp_path / "color" / f"{k}.jpg", pixels)
        save(tmp_path / "depth" / f"{k}.png", pixels[..., 0].astype("uint16") * 9)
        save(tmp_path / "preview" / f"{k}.png", pixels[::-1])
        save(tmp_path / "label" / f"{k}.png", label)
    files = named_files(tmp_path)
    (chosen,) = choose_pairs(links_to_masks(files), files)
    assert chosen.link.partners == {f"color/{k}": f"label/{k}" for k in range(3)}
    assert "not used because they are called 'depth' and 'preview'" in chosen.notes[0]


def test_photographs_are_the_images_beside_masks_in_folders_called_images(tmp_path: Path):
    # AI4Mars keeps masks of its rover beside the photographs, and only its masks are split.
    for k in range(8):
        pixels, label = yard(k)
        name = f"NLA_3976814{k}{{}}_F0020000AUT_04096M1"
        save(tmp_path / "images" / "edr" / f"{name.format('EDR')}.jpg", pixels)
        split, ending = ("train", "") if k < 6 else ("test", "_merged1")
        save(tmp_path / "labels" / split / f"{name.format('EDR')}{ending}.png", label)
        if split == "train":
            save(tmp_path / "images" / "mxy" / f"{name.format('MXY')}.png", label // 2)
            sky = (label == 0).astype(np.uint8)
            save(tmp_path / "images" / "rng-30m" / f"{name.format('RNG')}.png", sky)
    dataset = find_dataset(tmp_path)
    assert [pair.image.parent.name for pair in dataset.pairs] == ["edr"] * 8
    assert [pair.mask.parent.name for pair in dataset.pairs] == ["train"] * 6 + ["test"] * 2
    assert [pair.split for pair in dataset.pairs] == ["train"] * 6 + ["test"] * 2
    assert any("images/mxy/*.png is called 'images'" in note for note in dataset.notes)


def test_images_of_good_parts_and_arrays_beside_pictures_take_no_masks(tmp_path: Path):
    # MSD has images of intact phones, and TartanAir has optical flow with masks of its own.
    for k in range(8):
        pixels, label = yard(k)
        if k > 5:
            save(tmp_path / "oil" / f"Oil_{k}.jpg", pixels)
            save(tmp_path / "truth" / f"Oil_{k}.png", label)
            continue
        save(tmp_path / "oil" / f"Oil_{k}.jpg", pixels)
        save(tmp_path / "truth" / f"Oil_{k}.png", label)
        save(tmp_path / "good" / f"good_{k}.jpg", pixels[::-1])
        (tmp_path / "flow").mkdir(exist_ok=True)
        np.save(tmp_path / "flow" / f"{k:06}_{k + 1:06}_flow.npy", pixels / np.float32(255))
        np.save(tmp_path / "flow" / f"{k:06}_{k + 1:06}_mask.npy", label)
    dataset = find_dataset(tmp_path)
    assert {pair.image.parent.name for pair in dataset.pairs} == {"oil"}
    assert any("not used because they are called 'good'" in note for note in dataset.notes)
    assert any("12 other files left out" in note for note in dataset.notes)


def test_masks_without_data_are_chosen_beside_their_colours(tmp_path: Path):
    # Beside the anomalies of SegmentMeIfYouCan, most of an image may be ignored.
    for k in range(4):
        pixels, label = yard(k)
        save(tmp_path / "images" / f"{k}.jpg", pixels)
        ids = np.array([255, 0, 255, 1], np.uint8)[label]
        save(tmp_path / "labels" / f"{k}_semantic.png", ids)
        save(tmp_path / "labels" / f"{k}_semantic_color.png", COLORS[np.minimum(ids, 2)])
    files = named_files(tmp_path)
    (chosen,) = choose_pairs(links_to_masks(files), files)
    assert set(chosen.link.partners.values()) == {f"labels/{k}_semantic" for k in range(4)}


@pytest.mark.parametrize("number", [6, 5])
def test_depth_maps_take_no_masks_from_the_images(tmp_path: Path, number: int):
    # NYU has the same labels with 40 and with 13 classes.
    for k in range(6):
        pixels, label = yard(k)
        save(tmp_path / "image" / f"{k}.png", pixels)
        save(tmp_path / "depth" / f"{k}.png", pixels[..., 0].astype("uint16") * 9)
        save(tmp_path / "label13" / f"{k}.png", label // 2)
        if k < number:
            save(tmp_path / ("label40" if number == 6 else "water") / f"{k}.png", label)
    files = named_files(tmp_path)
    if number == 6:
        with pytest.raises(DataError, match="2 sets of masks for the same images: label13/"):
            list(choose_pairs(links_to_masks(files), files))
    else:
        (chosen,) = choose_pairs(links_to_masks(files), files)
        assert "water/*.png is not called masks, and exists for only 5 images" in chosen.notes[-1]


def test_masks_in_colours_are_no_images_beside_two_sets_of_photographs(tmp_path: Path):
    for k in range(3):
        pixels, label = yard(k)
        for folder in ("rgb_images", "previous_images"):
            save(tmp_path / folder / f"{k}.png", pixels)
        save(tmp_path / "annotations" / "gtLabels" / f"{k}.png", label)
        save(tmp_path / "annotations" / "rgbLabels" / f"{k}.png", COLORS[label])
    files = named_files(tmp_path)
    with pytest.raises(DataError, match=r"2 sets of images .* previous_images.*, rgb_images"):
        list(choose_pairs(links_to_masks(files), files))


def test_two_files_with_one_partner_are_refused(tmp_path):
    write_folders(tmp_path, names=("1",))
    write_image(tmp_path / "images" / "1.png")
    with pytest.raises(
        DataError,
        match=(
            r"2 sets of images for the same masks: images/1.jpg \(1\), images/1.png \(1\)(.|\n)*"
            r'images = "images/1.jpg"\nmasks = "masks/1.png"\nor\nimages = "images/1.png"'
        ),
    ):
        find_dataset(tmp_path)
