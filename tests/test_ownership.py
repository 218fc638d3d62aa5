"""Files of useg are recognized by their marks, and everything else is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from useg import ownership
from useg.classes import CARLA
from useg.errors import DataError
from useg.images.image_files import write_label, write_picture
from useg.inference.exported import is_own_weights
from useg.training.checkpoint import RUN_FILES

OLD = Path(__file__).parent / "golden" / "old"
PIXELS = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


@pytest.mark.parametrize("name", ["ended", "interrupted"])
def test_runs_of_version_0_1_are_recognized(name: str) -> None:
    for path in (OLD / name).iterdir():
        assert RUN_FILES[path.name](path), path


def test_exports_of_version_0_1_are_recognized(tmp_path: Path) -> None:
    assert ownership.is_own_onnx(OLD / "valid.onnx")
    assert ownership.is_own_openvino(OLD / "valid.xml")
    assert is_own_weights(OLD / "valid.bin")
    for name in ("valid.xml", "valid.bin"):
        shutil.copy(OLD / name, tmp_path)
    (tmp_path / "valid.bin").write_bytes(b"other weights")
    assert not is_own_weights(tmp_path / "valid.bin")


def test_pictures_of_version_0_1_belong_to_their_label_map_or_run(tmp_path: Path) -> None:
    (tmp_path / "overlays").mkdir()
    overlay = tmp_path / "overlays/a.png"
    Image.fromarray(PIXELS).save(overlay)
    write_label(tmp_path / "a.png", PIXELS[..., 0], CARLA, "label map " + "0" * 64)
    assert not ownership.is_own_picture(overlay), "since then overlays have marks"
    (tmp_path / "a.png").unlink()
    write_label(tmp_path / "a.png", PIXELS[..., 0], CARLA, "0" * 64)
    assert ownership.is_own_picture(overlay)
    (tmp_path / "run/pictures").mkdir(parents=True)
    picture = tmp_path / "run/pictures/epoch_0001.jpg"
    Image.fromarray(PIXELS).save(picture)
    assert not ownership.is_own_picture(picture)
    shutil.copy(OLD / "interrupted/run.toml", tmp_path / "run")
    assert ownership.is_own_picture(picture)


def test_a_mask_and_a_scene_are_no_label_map(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_label(path, PIXELS[..., 0], CARLA)
    assert ownership.is_own_mask(path)
    assert not ownership.is_own_label_map(path)
    write_picture(tmp_path / "b.png", PIXELS)
    assert not ownership.is_own_label_map(tmp_path / "b.png")
    assert ownership.is_own_picture(tmp_path / "b.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_picture_saved_by_another_program_is_foreign(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_picture(path, PIXELS)
    assert ownership.is_own_picture(path)
    with Image.open(path) as picture:
        copy = picture.copy()
    copy.save(path, **({} if suffix == ".png" else {"comment": b""}))
    assert not ownership.is_own_picture(path)


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_the_software_of_a_tiff_is_found(options: dict[str, object], tmp_path: Path) -> None:
    for software in ("useg", "useg label map of a model in memory", "another"):
        tifffile.imwrite(tmp_path / "a.tif", PIXELS, software=software, **options)
        assert ownership.tiff_software(tmp_path / "a.tif").rstrip(b"\0") == software.encode()
        assert ownership.is_own_tiff(tmp_path / "a.tif") == (software == "useg")


def test_damaged_tiffs_have_no_software(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, software="useg and a long name")
    content = (tmp_path / "a.tif").read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "a.tif").write_bytes(content[:length])
        ownership.tiff_software(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(b"II*\0" + b"\xff" * 100)
    assert ownership.tiff_software(tmp_path / "a.tif") == b""


def test_an_edited_text_is_foreign(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(ownership.stamp("# Report\n\n"), "utf-8")
    assert ownership.is_own_markdown(path)
    for edited in (path.read_text() + "my notes\n", path.read_text().replace("Report", "Thesis")):
        path.write_text(edited)
        assert not ownership.is_own_markdown(path)


@pytest.mark.parametrize("kind", ["link", "dangling", "loop", "pipe", "folder", "missing"])
def test_what_is_not_a_file_is_never_recognized_and_never_waited_for(
    kind: str, tmp_path: Path
) -> None:
    write_picture(tmp_path / "own.png", PIXELS)
    path = tmp_path / "a.png"
    make = {
        "link": lambda: path.symlink_to(tmp_path / "own.png"),
        "dangling": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "missing": lambda: None,
    }
    make[kind]()
    assert not ownership.is_own_picture(path)
    if kind != "missing":
        with pytest.raises(DataError, match=r"would replace a file .*a\.png; choose"):
            ownership.refuse_foreign_files([(path, ownership.is_own_picture)])


def test_foreign_files_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    for k in range(9):
        (tmp_path / str(k)).touch()
    targets = [(path, ownership.recognize_none) for path in sorted(tmp_path.iterdir())]
    counted = r"would replace 9 files .*: \S+0, \S+1, \S+2 and 6 more; choose"
    with pytest.raises(DataError, match=counted):
        ownership.refuse_foreign_files(targets)
