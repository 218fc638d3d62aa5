"""Each page of a stack becomes a label map of its own, and all outputs follow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from made_inference import make_model, make_model_of, make_predictor
from made_strangers import yard

from useg.cli import main
from useg.errors import DataError
from useg.images import image_files
from useg.images.image_files import read_mask
from useg.inference import predict_files
from useg.inference.outputs import OutputOptions
from useg.inference.predict_files import find_sources, predict
from useg.models.segmenter import save_model

LABELS_ONLY = OutputOptions(overlays=False)


def pages(count: int = 6, *bands: int, sides: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, *sides, *bands), np.uint8)


def write_pages(path: Path, stack: np.ndarray) -> None:
    with tifffile.TiffWriter(path) as file:
        for page in stack:
            file.write(page, contiguous=False)


WRITERS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "pages.tif": write_pages,
    "series.tif": lambda path, stack: tifffile.imwrite(path, stack, metadata={"axes": "ZYX"}),
    "imagej.tif": lambda path, stack: tifffile.imwrite(
        path, stack, imagej=True, metadata={"axes": "TYX"}
    ),
    "array.npy": np.save,
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("name", WRITERS)
def test_each_page_has_a_label_map(name: str, tmp_path: Path) -> None:
    stack = pages()
    WRITERS[name](tmp_path / name, stack)
    predictor = make_predictor(make_model_of(channels=1))
    outcome = predict(predictor, tmp_path / name, tmp_path / "out")
    stem = name.partition(".")[0]
    assert names(tmp_path / "out") == [f"{stem}_{k:04d}.png" for k in range(6)]
    assert names(tmp_path / "out/overlays") == names(tmp_path / "out")
    for path, page in zip(outcome.label_maps, stack, strict=True):
        assert (read_mask(path) == predictor(page)).all()
    assert outcome.num_images == 6
    assert (
        f"{name}' is a stack of 6 pages of 30x20 pixels; each page has a label map"
        in outcome.notes[0]
    )


def test_pages_in_colour_are_images_and_as_many_pages_as_bands_are_one(tmp_path: Path) -> None:
    predictor = make_predictor(make_model_of(channels=3))
    tifffile.imwrite(tmp_path / "rgb.tif", pages(3, 3), photometric="rgb")
    np.save(tmp_path / "rgbs.npy", pages(2, 3))
    write_pages(tmp_path / "bands.tif", pages(3))
    outcome = predict(
        predictor,
        [tmp_path / "rgb.tif", tmp_path / "bands.tif", tmp_path / "rgbs.npy"],
        tmp_path / "out",
        wanted=LABELS_ONLY,
    )
    maps = [
        "bands.png",
        "rgb_0000.png",
        "rgb_0001.png",
        "rgb_0002.png",
        "rgbs_0000.png",
        "rgbs_0001.png",
    ]
    assert names(tmp_path / "out") == maps
    expected = predictor(np.moveaxis(pages(3), 0, -1).copy())
    assert (read_mask(tmp_path / "out/bands.png") == expected).all()
    assert outcome.notes[0].startswith("2 files are stacks, such as ")
    assert "bands.tif' are the bands of one image, because the model takes that" in outcome.notes[1]


def test_all_outputs_are_those_of_pages(tmp_path: Path) -> None:
    write_pages(tmp_path / "z.tif", pages(4))
    wanted = OutputOptions(
        labels="tif", probabilities="uint8", polygons=True, coco=True, areas=True, objects=True
    )
    predict(make_predictor(make_model_of(channels=1)), tmp_path / "z.tif", tmp_path, wanted=wanted)
    stems = [f"z_{k:04d}" for k in range(4)]
    for folder, suffix in (("probabilities", "tif"), ("polygons", "geojson"), ("overlays", "png")):
        assert names(tmp_path / folder) == [f"{stem}.{suffix}" for stem in stems]
    images = [f"{stem}.tif" for stem in stems]
    coco = json.loads((tmp_path / "coco.json").read_text("utf-8"))
    assert [image["file_name"] for image in coco["images"]] == images
    for table in ("areas.csv", "objects.csv"):
        rows = csv.DictReader((tmp_path / table).read_text("utf-8").splitlines())
        assert list(dict.fromkeys(row["image"] for row in rows)) == images


def test_shards_divide_the_pages_and_a_second_run_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make_model_of(channels=1), tmp_path / "model.safetensors")
    stack = pages(5)
    write_pages(tmp_path / "z.tif", stack)
    wanted = OutputOptions(overlays=False, areas=True)

    def run(*, shard: tuple[int, int] = (1, 1), out: str = "out") -> predict_files.Outcome:
        return predict(
            tmp_path / "model.safetensors",
            tmp_path / "z.tif",
            tmp_path / out,
            wanted=wanted,
            shard=shard,
        )

    assert [path.name for path in run(shard=(2, 2)).label_maps] == ["z_0001.png", "z_0003.png"]
    digests: list[Path] = []
    identify = predict_files.identify_image
    monkeypatch.setattr(
        predict_files, "identify_image", lambda path: digests.append(path) or identify(path)
    )
    outcome = run()
    assert (outcome.kept, len(outcome.label_maps)) == (2, 5)
    # The file is read whole about once, and not once for each page: two threads may begin at once.
    assert len(digests) <= 4
    run(out="whole")
    for name in names(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    write_pages(tmp_path / "z.tif", stack[::-1])
    assert run().kept == 0


def test_the_pages_of_a_file_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make_model_of(channels=1), tmp_path / "model.safetensors")
    write_pages(tmp_path / "z.tif", pages(2))
    counted: list[Path] = []
    read_stack = predict_files.read_stack
    monkeypatch.setattr(
        predict_files, "read_stack", lambda path: counted.append(path) or read_stack(path)
    )
    predict(
        tmp_path / "model.safetensors", tmp_path / "z.tif", tmp_path / "out", wanted=LABELS_ONLY
    )
    assert counted == [tmp_path / "z.tif"]


def test_foreign_files_and_equal_names_are_refused(tmp_path: Path) -> None:
    predictor = make_predictor(make_model_of(channels=1))
    write_pages(tmp_path / "z.tif", pages(2))
    out = tmp_path / "out"
    out.mkdir()
    (out / "z_0001.png").write_bytes(b"somebody's work")
    with pytest.raises(DataError, match=r"z_0001\.png"):
        predict(predictor, tmp_path / "z.tif", out)
    assert (out / "z_0001.png").read_bytes() == b"somebody's work"
    assert names(out) == ["z_0001.png"]
    tifffile.imwrite(tmp_path / "z_0001.tif", pages(1)[0])
    with pytest.raises(DataError, match=r"z\.tif and .*z_0001\.tif would both become z_0001\.png"):
        predict(predictor, [tmp_path / "z.tif", tmp_path / "z_0001.tif"], tmp_path / "other")


def test_a_damaged_page_fails_alone(tmp_path: Path) -> None:
    stack = pages(3, sides=(64, 64))
    tifffile.imwrite(
        tmp_path / "z.tif", stack, compression="deflate", photometric="minisblack", metadata=None
    )
    with tifffile.TiffFile(tmp_path / "z.tif") as file:
        place = file.pages[1].dataoffsets[0]
    content = bytearray((tmp_path / "z.tif").read_bytes())
    content[place : place + 200] = bytes(200)
    (tmp_path / "z.tif").write_bytes(content)
    outcome = predict(
        make_predictor(make_model_of(channels=1)), tmp_path / "z.tif", tmp_path / "out"
    )
    assert names(tmp_path / "out") == ["z_0000.png", "z_0002.png"]
    (failure,) = outcome.failed
    assert failure.reason.startswith(f"page 1 of '{tmp_path / 'z.tif'}' is damaged")


def test_only_the_bytes_of_a_page_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "z.npy", pages(70, 1, sides=(80, 80)))
    sizes: list[int] = []
    decode = image_files.decode

    def watched(*arguments: Any) -> Any:
        stored = decode(*arguments)
        base = stored.pixels if stored.pixels.base is None else stored.pixels.base
        sizes.append(getattr(base, "nbytes", 0))
        return stored

    monkeypatch.setattr(image_files, "decode", watched)
    predictor = make_predictor(make_model_of(channels=1))
    outcome = predict(predictor, tmp_path / "z.npy", tmp_path / "out", wanted=LABELS_ONLY)
    assert (len(outcome.label_maps), max(sizes)) == (70, 80 * 80)


def test_few_or_flat_grey_arrays_are_no_stack(tmp_path: Path) -> None:
    for name, stack in (("few.npy", pages(3)), ("flat.npy", pages(9, sides=(10, 40)))):
        np.save(tmp_path / name, stack)
        with pytest.raises(DataError, match=rf"has {len(stack)} bands, but 1 are needed"):
            predict(make_predictor(make_model_of(channels=1)), tmp_path / name, tmp_path / "out")


def test_the_command_says_how_it_read_a_stack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(make_model(), tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    write_pages(tmp_path / "in/z.tif", pages(4))
    tifffile.imwrite(tmp_path / "in/a.tif", pages(1, 3)[0], photometric="rgb")
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        main(["predict", str(tmp_path / "model.safetensors"), str(tmp_path / "in"), "--out", out])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "5 label maps in" in printed
    assert "z.tif' is a stack of 4 pages of 30x20 pixels; each page has a label map" in printed


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_stacks_of_masks_beside_stacks_of_images_are_left_out(suffix: str, tmp_path: Path) -> None:
    write = write_pages if suffix == ".tif" else np.save
    for k in range(3):
        images, labels = zip(*(yard(10 * k + page) for page in range(6)), strict=True)
        write(tmp_path / f"v{k}{suffix}", np.stack(images)[..., 0])
        write(tmp_path / f"v{k}_mask{suffix}", np.stack(labels))
    found = find_sources([str(tmp_path)])
    assert [path.name for path in found.images] == [f"v{k}{suffix}" for k in range(3)]
    assert [path.name for path in found.left_out] == [f"v{k}_mask{suffix}" for k in range(3)]
