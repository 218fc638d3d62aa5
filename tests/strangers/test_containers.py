"""Folders of HDF5, MATLAB and NIfTI files: the lines of Python that useg prints make them
readable."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io
from made_strangers import save, yard

from useg.data.dataset import read_label
from useg.data.layouts import find_dataset
from useg.errors import DataError


def run_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the lines that useg prints for a folder, beside it; return what it says before them."""
    with pytest.raises(DataError) as raised:
        find_dataset(folder)
    said, _, lines = str(raised.value).partition(":\nimport")
    monkeypatch.chdir(folder.parent)
    exec("import" + lines, {})
    return said


def check(folder: Path, labels: list[np.ndarray]) -> None:
    dataset = find_dataset(folder)
    assert len(dataset.pairs) == len(labels)
    for pair, label in zip(dataset.pairs, labels, strict=True):
        np.testing.assert_array_equal(read_label(pair, dataset), label)


def write_npy(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, array)


def test_masks_in_matlab_files_are_written_beside_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, labels = tmp_path / "data", [yard(k)[1] for k in range(8)]
    (folder / "cls").mkdir(parents=True)
    for k, label in enumerate(labels):
        save(folder / "img" / f"{k}.jpg", yard(k)[0])
        content = {"GTcls": {"Segmentation": label, "CategoriesPresent": np.arange(3)}}
        scipy.io.savemat(folder / "cls" / f"{k}.mat", content)
    said = run_lines(folder, monkeypatch)
    assert "useg does not read .mat files" in said
    assert "beside the images" in said
    assert "pip install scipy" in said
    check(folder, labels)


def open_stub(path: Path) -> Any:
    """Stand for a file of h5py: a context whose ``visititems`` calls back."""
    arrays = {"pair/image": np.load(path)[..., :3], "pair/label": np.load(path)[..., 3]}

    def visit(call: Callable[[str, Any], None]) -> None:
        call("pair", SimpleNamespace())
        for name, array in arrays.items():
            call(name, array if path.suffix == ".h5" else array.T)

    class Context:
        def __enter__(self) -> Any:
            return SimpleNamespace(visititems=visit)

        def __exit__(self, *_: object) -> None:
            return

    return Context()


@pytest.mark.parametrize("suffix", [".h5", ".mat"])
def test_images_and_masks_in_hdf5_files_are_written_to_a_new_folder(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, labels = tmp_path / "data", [yard(k)[1] for k in range(8)]
    for k, label in enumerate(labels):
        write_npy(folder / f"{k}{suffix}", np.dstack([yard(k)[0], label]))
    if suffix == ".mat":
        monkeypatch.setattr("useg.data.unrecognized._MATLAB_HDF5", b"\x93NUMPY\x01\x00v\x00")
    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=open_stub))
    said = run_lines(folder, monkeypatch)
    assert "to the folder OUT" in said
    assert "pip install h5py" in said
    check(tmp_path / "OUT", labels)


@pytest.mark.parametrize("channels", [1, 4])
def test_nifti_volumes_become_stacks_of_slices(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = []
    for k in range(3):
        slices = [yard(10 * k + z) for z in range(6)]
        grey = np.stack([image[..., 0] for image, _ in slices], 2).astype(np.float64)
        image = grey if channels == 1 else np.stack([grey, grey / 2, grey / 3, grey], 3)
        write_npy(tmp_path / f"data/imagesTr/la_{k}.nii.gz", image)
        own = [label for _, label in slices]
        write_npy(tmp_path / f"data/labelsTr/la_{k}.nii.gz", np.stack(own, 2).astype(np.int32))
        labels += own

    def load(path: Path) -> Any:
        return SimpleNamespace(dataobj=np.load(path))

    monkeypatch.setitem(sys.modules, "nibabel", SimpleNamespace(load=load))
    assert "pip install nibabel tifffile" in run_lines(tmp_path / "data", monkeypatch)
    check(tmp_path / "OUT", labels)


def test_a_format_of_slides_is_said_before_that_of_their_outlines(tmp_path: Path) -> None:
    for name in ("a.geojson", "a.svs", "b.geojson"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"does not read \.svs files: convert them to TIFF"):
        find_dataset(tmp_path)


@pytest.mark.parametrize("beside", ["_parts_1.png", "_atr.txt", ".json"])
def test_colours_of_classes_and_objects_become_masks_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    """The full ADE20K."""
    names, labels = np.array(["sky", "house", "lawn", "ball"]), []
    for k in range(6):
        pixels, label = yard(k)
        stem = f"data/images/{'training' if k < 4 else 'validation'}/yard/ADE_{k:08}"
        save(tmp_path / f"{stem}.jpg", pixels)
        number = label.astype(int) + 300
        objects = (number * 37 + k) % 200
        colors = np.stack([number // 256 * 10, number % 256, objects], -1)
        save(tmp_path / f"{stem}_seg.png", colors.astype(np.uint8))
        if beside == ".json":
            about = [{"name_ndx": 300 + n, "name": str(names[n])} for n in range(4)]
            (tmp_path / f"{stem}.json").write_text(json.dumps({"annotation": {"object": about}}))
        elif beside == "_atr.txt":
            (tmp_path / f"{stem}_atr.txt").write_text('001 # 0 # 0 # sky # sky # ""\n')
        else:
            parts = np.stack([label * 0, label * 7, label * 0], -1)
            save(tmp_path / f"{stem}_parts_1.png", parts)
        labels.append(label)
    said = run_lines(tmp_path / "data", monkeypatch)
    assert "full ADE20K" in said
    assert "R // 10 * 256 + G" in said
    dataset = find_dataset(tmp_path / "OUT")
    assert [pair.split for pair in dataset.pairs] == ["train"] * 4 + ["val"] * 2
    for pair, label in zip(dataset.pairs, labels, strict=True):
        named = np.array(dataset.classes.names)[read_label(pair, dataset)]
        if beside == ".json":
            assert (named == names[label]).all()
        assert len(np.unique(label)) == len(np.unique(named))


def test_masks_of_single_objects_become_one_mask_for_each_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The names of Open Images.
    folder, labels = tmp_path / "data", []
    rng = np.random.default_rng(0)
    for k in range(8):
        pixels, label = yard(k)
        save(folder / "images" / f"{k:016x}.jpg", pixels)
        for value, name in ((1, "Dog"), (2, "Person")):
            mask = np.uint8(255) * (label == value)
            save(folder / "masks" / f"{k:016x}_{name}_{rng.integers(1 << 32):08x}.png", mask)
        labels.append(np.where(label == 3, 0, label))
    assert "like those of masks of single objects" in run_lines(folder, monkeypatch)
    check(tmp_path / "OUT", labels)
    assert find_dataset(tmp_path / "OUT").classes.names == ("background", "Dog", "Person")


def test_pictures_with_drawn_outlines_are_no_masks_of_single_objects(tmp_path: Path) -> None:
    # Beside a_mask.txt, the nuclei of MICCAI 2018 have a_poly.png: the image with outlines.
    for k in range(8):
        pixels, label = yard(k)
        save(tmp_path / f"image{k}.png", pixels)
        outlined = np.where((label == 1)[..., None], np.uint8(255), pixels)
        save(tmp_path / f"image{k}_poly.png", outlined)
    with pytest.raises(DataError) as error:
        find_dataset(tmp_path)
    assert "single objects" not in str(error.value)
