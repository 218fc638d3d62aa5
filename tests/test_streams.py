"""Sources on disk become label maps on disk, each once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_predictor import make_model, make_predictor

from useg import UsageError
from useg.data.images import read_image, read_mask, write_picture
from useg.inference.streams import find_images, predict_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for k, name in enumerate(("10.png", "2.png", "1.jpg")):
        write_picture(tmp_path / "in" / name, np.random.default_rng(k).integers(0, 256, (20, 30, 3), np.uint8))
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    return tmp_path / "in"


def test_files_folders_and_globs_in_natural_order(folder: Path) -> None:
    expected = [folder / "1.jpg", folder / "2.png", folder / "10.png"]
    assert find_images([str(folder)]) == expected
    assert find_images([str(folder / "*.png"), str(folder / "1.jpg"), str(folder / "2.png")]) == expected


@pytest.mark.parametrize("source", ["nothing", "no*.png"])
def test_nothing_there(source: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no image at .*; give image files, a folder of them, or a quoted glob"):
        find_images([str(folder / source)])


def test_label_maps_and_overlays(folder: Path, tmp_path: Path) -> None:
    predictor = make_predictor(make_model())
    seen = []
    written = predict_files(predictor, [str(folder)], tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert written == [tmp_path / "out" / name for name in ("1.png", "2.png", "10.png")]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for path, target in zip(find_images([str(folder)]), written, strict=True):
        assert (read_mask(target) == predictor(read_image(path))).all()
    assert sorted(path.name for path in (tmp_path / "out/overlays").iterdir()) == ["1.png", "10.png", "2.png"]


def test_overlays_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    predict_files(make_predictor(make_model()), [str(folder)], tmp_path / "out", overlays=False)
    assert not (tmp_path / "out/overlays").exists()


def test_what_was_done_before_a_broken_picture_is_whole(folder: Path, tmp_path: Path) -> None:
    (folder / "2.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"2\.png"):
        predict_files(make_predictor(make_model()), [str(folder)], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["1.png"]
    assert read_mask(tmp_path / "out/1.png").shape == (20, 30)
