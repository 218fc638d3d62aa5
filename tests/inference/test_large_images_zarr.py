"""OME-Zarr images: any rectangle equals the array; label maps lie over the image; refusals."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_inference import make_model, make_predictor, textured_image

from useg.errors import UsageError
from useg.images import large_tiff, ome_zarr
from useg.images.large_tiff import halved
from useg.images.ome_zarr import ZarrLabels, is_zarr, mark_of, open_zarr
from useg.inference import large_images
from useg.inference.large_images import predict_large_image
from useg.inference.outputs import OutputOptions
from useg.inference.predict_files import find_images, predict
from useg.inference.predictor import Predictor

zarr = pytest.importorskip("zarr")

TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module in (large_tiff, large_images, ome_zarr):
        monkeypatch.setattr(module, "TILE_SIDE", 64)
    monkeypatch.setattr(large_images, "MAX_ACTIVATION_BYTES", 4_000_000)


def write(
    folder: Path,
    image: np.ndarray,
    axes: str = "cyx",
    version: str = "0.5",
    chunk: int = 50,
    **options: Any,
) -> Path:
    """Write an image (H, W, C), with axes of length 1 where it has none, and a half-size level."""
    array = np.moveaxis(image, -1, 0) if "c" in axes else image[..., 0]
    array = array.reshape(
        [
            {"c": image.shape[2], "y": image.shape[0], "x": image.shape[1]}.get(axis, 1)
            for axis in axes
        ]
    )
    group = zarr.open_group(folder, mode="w", zarr_format=2 if version == "0.4" else 3)
    names = (
        {"dimension_names": list(axes)}
        if version == "0.5"
        else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    )
    chunks = [1] * (array.ndim - 2) + [chunk, chunk + 9]
    for name, level in (("full", array), ("half", array[..., ::2, ::2])):
        group.create_array(name, data=level, chunks=chunks, **names, **options)
    steps = [
        [{"type": "scale", "scale": [1] * (array.ndim - 2) + [0.5 * size, 0.25 * size]}]
        for size in (1, 2)
    ]
    scales = {
        "axes": [
            {"name": axis, "type": TYPES[axis], **({"unit": "micrometer"} if axis in "yx" else {})}
            for axis in axes
        ],
        "datasets": [
            {"path": name, "coordinateTransformations": step}
            for name, step in zip(("full", "half"), steps, strict=True)
        ],
        "coordinateTransformations": [
            {"type": "translation", "translation": [0] * (array.ndim - 2) + [7, 3]}
        ],
    }
    group.attrs.update(
        {"multiscales": [{"version": "0.4", **scales}]}
        if version == "0.4"
        else {"ome": {"version": "0.5", "multiscales": [scales]}}
    )
    return folder


@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
@given(
    data=st.data(),
    dtype=st.sampled_from(["u1", ">u2", "f4", "i2", "?"]),
    axes=st.sampled_from(["yx", "cyx", "tczyx", "czyx", "zyx"]),
    version=st.sampled_from(["0.4", "0.5"]),
    chunk=st.sampled_from([7, 16, 300]),
)
def test_every_rectangle_is_that_of_the_array(
    tmp_path, monkeypatch, data, dtype, axes, version, chunk
):
    monkeypatch.setattr(ome_zarr, "CELL", 32)
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    image = (
        np.random.default_rng(height)
        .integers(0, 256, (height, width, 4 if "c" in axes else 1))
        .astype(dtype)
    )
    read = open_zarr(write(tmp_path / "a.zarr", image, axes, version, chunk))
    expected = {"i2": np.dtype("f4"), "?": np.dtype("u1")}.get(
        dtype, np.dtype(dtype).newbyteorder("=")
    )
    assert (read.shape, read.dtype) == (image.shape, expected)
    for _ in range(3):
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        place = (
            slice(top, data.draw(st.integers(top + 1, height))),
            slice(left, data.draw(st.integers(left + 1, width))),
        )
        assert np.array_equal(read[place], image[place].astype(np.dtype(str(expected))))


def test_inner_chunks_of_shards_are_read_alone(tmp_path):
    image = textured_image(120, 90)
    group = zarr.open_group(write(tmp_path / "a.zarr", image), mode="a")
    del group["full"]
    group.create_array(
        "full",
        data=np.moveaxis(image, -1, 0),
        chunks=(1, 16, 16),
        shards=(3, 64, 64),
        dimension_names=["c", "y", "x"],
    )
    assert np.array_equal(open_zarr(tmp_path / "a.zarr")[3:119, 5:80], image[3:119, 5:80])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_the_label_map_is_that_of_the_array_and_lies_over_it(tmp_path, version):
    image, predictor = textured_image(203, 307), make_predictor(make_model())
    write(tmp_path / "a.zarr", image, "tczyx", version)
    predict_large_image(predictor, tmp_path / "a.zarr", tmp_path / "out.zarr")
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert group.metadata.zarr_format == (2 if version == "0.4" else 3)
    ome = group.attrs["ome"] if version == "0.5" else group.attrs
    scales, label = ome["multiscales"][0], group["0"][:]
    assert (label == predictor(image)).mean() > 0.9999
    assert len(np.unique(label)) > 1
    assert [group[level["path"]].shape for level in scales["datasets"]] == [
        (203, 307),
        (102, 154),
        (51, 77),
        (26, 39),
    ]
    for above, below in (
        (group["0"][:], group["1"][:]),
        (group["1"][:], group["2"][:]),
        (group["2"][:], group["3"][:]),
    ):
        assert np.array_equal(
            below, halved(np.pad(above, [(0, length % 2) for length in above.shape], "edge"))
        )
    assert scales["axes"] == [
        {"name": name, "type": "space", "unit": "micrometer"} for name in "yx"
    ]
    assert [
        [step[step["type"]] for step in level["coordinateTransformations"]]
        for level in scales["datasets"][:3]
    ] == [
        [[0.5, 0.25], [7, 3]],
        [[1, 0.5], [7.25, 3.125]],
        [[2, 1], [7.75, 3.375]],
    ]
    assert ome["image-label"]["colors"][1] == {
        "label-value": 1,
        "rgba": [*predictor.classes.colors[1], 255],
    }
    assert ome["image-label"]["properties"][2] == {"label-value": 2, "name": "c"}
    assert (ome if version == "0.5" else scales)["version"] == version
    if version == "0.5":
        assert group["1"].metadata.dimension_names == ("y", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "out.zarr"]


def test_each_chunk_is_decoded_about_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ome_zarr, "CELL", 64)
    monkeypatch.setattr(ome_zarr, "TILE_CACHE_BYTES", 30 * 64 * 64)
    monkeypatch.setattr(large_images, "MAX_ACTIVATION_BYTES", 2_000_000)
    write(tmp_path / "a.zarr", textured_image(256, 1024, 1), "yx", chunk=64)
    decoded = []
    exact = ome_zarr.ZarrImage._decode
    monkeypatch.setattr(
        ome_zarr.ZarrImage,
        "_decode",
        lambda self, i, j: decoded.append((i, j)) or exact(self, i, j),
    )
    predict_large_image(make_predictor(make_model()), tmp_path / "a.zarr", tmp_path / "out.zarr")
    assert len(decoded) <= 1.25 * len(set(decoded))


# In a job


def test_an_ome_zarr_is_one_image_and_not_a_folder_of_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "b.png").touch()
    (folder / "notes").mkdir()
    write(folder / "a.zarr", textured_image(20, 30), version="0.4")
    write(folder / "c", textured_image(20, 30))
    assert [is_zarr(folder / name) for name in ("a.zarr", "b.png", "c", "notes", "none")] == [
        True,
        False,
        True,
        False,
        False,
    ]
    for sources in (
        [str(folder)],
        [str(folder / "*")],
        [str(folder / name) for name in ("a.zarr", "b.png", "c")],
    ):
        assert [path.name for path in find_images(sources)] == ["a.zarr", "b.png", "c"]


def test_a_job_keeps_finished_label_maps_and_repeats_changed_ones(tmp_path, monkeypatch):
    predictor = make_predictor(make_model())
    monkeypatch.setattr(
        "useg.inference.predict_files.predictor_fingerprint", lambda predictor, wanted: "this model"
    )
    source, out = write(tmp_path / "a.zarr", textured_image(70, 90)), tmp_path / "out"
    assert predict(predictor, [str(source)], out).kept == 0
    assert re.fullmatch("label map [0-9a-f]{64}", mark_of(out / "a.zarr"))
    (leftover := out / ".useg-0123456789abcdef.zarr").mkdir()
    (leftover / "zarr.json").touch()
    assert predict(predictor, [str(source)], out).kept == 1
    assert [path.name for path in out.iterdir() if path.name != "overlays"] == ["a.zarr"]
    assert predict(predictor, [str(source)], out, overwrite=True).kept == 0
    zarr.open_group(source, mode="a")["full"][:, 3, 4] = 200
    assert predict(predictor, [str(source)], out).label_maps == [out / "a.zarr"]
    assert predict(predictor, [str(source)], out).kept == 1


def test_a_failure_half_way_keeps_the_previous_label_map(tmp_path, monkeypatch):
    predictor = make_predictor(make_model())
    predict_large_image(
        predictor,
        write(tmp_path / "a.zarr", textured_image(70, 90)),
        tmp_path / "out.zarr",
        mark="first",
    )
    monkeypatch.setattr(ZarrLabels, "_multiscale", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_large_image(predictor, tmp_path / "a.zarr", tmp_path / "out.zarr", mark="second")
    assert mark_of(tmp_path / "out.zarr") == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "out.zarr"]


# What is refused


def edited(folder: Path, name: str, change: dict[str, Any]) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **change}))


def damaged(folder: Path) -> None:
    chunk = next(
        path
        for path in (folder / "full").rglob("*")
        if path.is_file() and path.parent.parent.name == "0"
    )
    chunk.write_bytes(b"no chunk at all")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / ".zattrs").unlink(),
            r"is not an OME-Zarr image: it has no 'multiscales' in .zattrs or zarr.json; give",
        ),
        (
            lambda folder: (folder / ".zgroup").unlink(),
            r"is not an OME-Zarr image: it has no 'multiscales'",
        ),
        (
            lambda folder: (folder / ".zattrs").write_text("{"),
            r"is damaged or incomplete \(.*\); save or copy it again, or remove it",
        ),
        (
            lambda folder: (folder / ".zattrs").write_text('{"multiscales": []}'),
            r"is damaged or incomplete \(.*\)",
        ),
        (
            lambda folder: edited(folder, ".zattrs", {"plate": {}}),
            r"holds several OME-Zarr images; give one of them, a folder such as",
        ),
        (
            lambda folder: edited(
                folder, ".zattrs", {"multiscales": [{"datasets": [{"path": "full"}]}]}
            ),
            r"older than 0.4, .*; convert it to 0.4 or",
        ),
        (lambda folder: shutil.rmtree(folder / "full"), r"is damaged or incomplete \('full'\)"),
        (
            lambda folder: write(folder, np.zeros((9, 9, 1), "c8"), "yx"),
            r"holds complex64, not pixels; give an image of whole numbers or floats",
        ),
        (
            lambda folder: write(folder, np.zeros((9, 9, 3)), "yxc"),
            r"has the axes y, x, c for 3 dimensions; give an image whose last axes are",
        ),
        (
            lambda folder: write(folder, np.zeros((9, 9, 4), "u1")),
            r"has 4 bands, but 3 are needed; give images with 3",
        ),
        (damaged, r"a\.zarr' is damaged or incomplete"),
    ],
)
def test_damaged_zarrs_are_refused_in_one_sentence(tmp_path, spoil, message):
    folder = write(tmp_path / "a.zarr", textured_image(70, 90), version="0.4")
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        predict_large_image(make_predictor(make_model()), folder, tmp_path / "out.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize(
    "change",
    [
        {"compressor": {"id": "pickle"}},
        {"filters": [{"id": "pickle"}]},
        {"filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "dtype": "|O"},
    ],
)
def test_no_code_in_a_file_is_run(tmp_path, change):
    folder = write(tmp_path / "a.zarr", textured_image(70, 90), version="0.4")
    edited(folder / "full", ".zarray", change)
    for path in (folder / "full").rglob("[0-9]*"):
        if path.is_file():
            path.write_bytes(pickle.dumps(Planted(tmp_path / "run")))
    with pytest.raises(UsageError, match=r"damaged|not pixels"):
        predict_large_image(make_predictor(make_model()), folder, tmp_path / "out.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("axis", ["t", "z"])
def test_several_planes_or_points_in_time_are_refused_by_name(tmp_path, axis):
    folder = write(tmp_path / "a.zarr", textured_image(30, 40, 3), f"{axis}cyx")
    group = zarr.open_group(folder, mode="a")
    del group["full"]
    group.create_array("full", data=np.zeros((5, 3, 30, 40), "u1"))
    with pytest.raises(
        UsageError,
        match=rf"has 5 images along its axis '{axis}', but only one can be labelled at a time",
    ):
        open_zarr(folder)


def test_a_chunk_too_large_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write(tmp_path / "a.zarr", textured_image(200, 300), chunk=300)
    monkeypatch.setenv("USEG_MAX_PIXELS", "30000")
    with pytest.raises(UsageError, match="declares 300x200 pixels"):
        open_zarr(tmp_path / "a.zarr")


def test_wrong_targets_are_refused(tmp_path):
    predictor, folder = (
        make_predictor(make_model()),
        write(tmp_path / "a.zarr", textured_image(70, 90)),
    )
    with pytest.raises(
        UsageError,
        match=r"of an OME-Zarr is an OME-Zarr, but the target is 'a\.tif'; end the name in \.zarr",
    ):
        predict_large_image(predictor, folder, tmp_path / "a.tif")
    with pytest.raises(UsageError, match="would overwrite the image itself; choose another"):
        predict_large_image(predictor, folder, folder)
    with pytest.raises(
        UsageError, match="would overwrite the image itself; choose another folder for the output"
    ):
        predict(predictor, [str(folder)], tmp_path)
    with pytest.raises(
        UsageError,
        match="which ensembles and augmentation do not support; give one model, without",
    ):
        predict_large_image(
            Predictor(predictor.runtime, augment="flip"), folder, tmp_path / "out.zarr"
        )
    with pytest.raises(
        UsageError,
        match=r"a\.zarr' is labelled in blocks, which writes only a label map and objects; omit",
    ):
        predict(predictor, [str(folder)], tmp_path / "out", wanted=OutputOptions(polygons=True))
    other = write(tmp_path / "other.zarr", textured_image(20, 20))
    with pytest.raises(
        UsageError,
        match=r"would replace a file that useg did not write.*other\.zarr; choose another folder",
    ):
        predict_large_image(predictor, folder, other)
    assert open_zarr(other).shape == (20, 20, 3)


def test_without_zarr_the_install_line_is_given(tmp_path, monkeypatch):
    folder = write(tmp_path / "a.zarr", textured_image(20, 20))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UsageError, match=r"pip install 'useg\[zarr\]'"):
        predict_large_image(make_predictor(make_model()), folder, tmp_path / "out.zarr")


def test_a_description_that_is_nested_too_deeply_has_no_mark(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text("[" * 100_000)
    assert mark_of(tmp_path) is None
