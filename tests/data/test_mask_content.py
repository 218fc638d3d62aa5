"""Values that smoothing, JPEG or a slip made do not become classes."""

import numpy as np
import PIL.Image
import pytest
from made_data import write_folders, write_mask

from useg.data.layouts import find_dataset
from useg.errors import DataError

pytestmark = pytest.mark.wheel


def test_photographs_as_masks_are_refused(tmp_path):
    write_folders(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    for path in (tmp_path / "masks").iterdir():
        PIL.Image.fromarray(np.kron(noise, np.ones((4, 4, 1), np.uint8))).save(path)
    PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)).save(
        tmp_path / "masks" / "2.png"
    )
    with pytest.raises(
        DataError,
        match=r"2.png' has \d+ values that no class has .*: it looks like a photograph",
    ):
        find_dataset(tmp_path)


def test_smoothed_and_jpeg_masks_are_refused(tmp_path):
    write_folders(tmp_path)
    PIL.Image.fromarray(np.arange(0, 256, 2, dtype=np.uint8).reshape(8, 16)).save(
        tmp_path / "masks" / "2.png"
    )
    with pytest.raises(
        DataError,
        match=r"2.png' has 12\d values that no class has .*: it looks like a photograph",
    ):
        find_dataset(tmp_path)
    (tmp_path / "masks" / "2.png").unlink()
    write_mask(tmp_path / "masks" / "2.jpg", (0, 100, 200))
    with pytest.raises(
        DataError,
        match=r"2.jpg' has \d+ values that no class has .*: a JPEG alters values. .* --fix OUT",
    ):
        find_dataset(tmp_path)
