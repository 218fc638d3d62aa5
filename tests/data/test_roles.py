"""Words and pixels say which files are the masks."""

from pathlib import Path

import pytest
from made_data import named_files
from made_strangers import save, yard

from useg.data.file_names import role_of_words
from useg.data.roles import links_to_masks

pytestmark = pytest.mark.wheel


def test_words_give_a_role_unless_they_contradict():
    assert role_of_words({"images", "a"}) == "image"
    assert role_of_words({"mask"}) == "mask"
    assert role_of_words({"mask", "image"}) == role_of_words({"a"}) == ""


def test_pixels_tell_masks_from_images_where_words_do_not(tmp_path: Path):
    for k in range(3):
        pixels, label = yard(k)
        save(tmp_path / "one" / f"{k}.png", pixels)
        save(tmp_path / "two" / f"{k}.png", label)
    links = links_to_masks(named_files(tmp_path))
    assert links[0].partners == {f"one/{k}": f"two/{k}" for k in range(3)}


def test_a_folder_called_labeled_may_have_the_images(tmp_path: Path):
    for k in range(3):
        pixels, label = yard(k)
        folder = tmp_path / "labeled_train" / "Nice"
        save(folder / "Photos" / f"{k}.tif", pixels)
        save(folder / "UrbanAtlas" / f"{k}_UA.tif", label)
        save(tmp_path / "unlabeled_train" / "Calais" / "Photos" / f"{k + 5}.tif", pixels[::-1])
    links = links_to_masks(named_files(tmp_path))
    assert links[0].partners == {
        f"train/labeled/nice/photos/{k}": f"train/labeled/nice/urbanatlas/{k}_ua" for k in range(3)
    }
