"""Folders and names as other people have them are paired rightly, or refused with a way out."""

from pathlib import Path

from made_data import describe_pairs
from made_strangers import save, yard

from useg.data.layouts import find_dataset


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
