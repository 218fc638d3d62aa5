"""Image files become label maps on disk, each once, also when the job is killed.

``USEG_SOAK=1`` (``make soak``) kills three processes that share 1,000 pictures at 20 moments.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from made_inference import make_model, make_predictor
from made_strangers import save, yard
from PIL import Image as Pillow

from useg.classes import IGNORE
from useg.cli import main
from useg.errors import DataError, UsageError
from useg.files import natural_key
from useg.images.image_files import encode_png, read_image, read_mask, read_no_data, write_picture
from useg.inference import predict_files
from useg.inference.outputs import OutputOptions
from useg.inference.predict_files import find_images, find_sources, predict
from useg.inference.predictor import Predictor
from useg.models.description import fit_training_images, measure_image
from useg.models.geometry import WorkingSize
from useg.models.segmenter import save_model
from useg.predict_command import parse_shard

SOAK = os.environ.get("USEG_SOAK") == "1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for k, name in enumerate(("10.png", "2.png", "1.jpg")):
        write_picture(
            tmp_path / "in" / name, np.random.default_rng(k).integers(0, 256, (20, 30, 3), np.uint8)
        )
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    (tmp_path / "in" / "._2.png").write_text("what some systems leave beside a picture")
    return tmp_path / "in"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_model(make_model(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_files_folders_and_globs_in_natural_order(folder: Path) -> None:
    expected = [folder / "1.jpg", folder / "2.png", folder / "10.png"]
    assert find_images([str(folder)]) == expected
    assert (
        find_images([str(folder / "*.png"), str(folder / "1.jpg"), str(folder / "2.png")])
        == expected
    )


@pytest.mark.parametrize("source", ["nothing", "no*.png"])
def test_a_source_without_images_is_refused(source: str, folder: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"there is no image at .*; give image files, a folder of them, or a quoted glob",
    ):
        find_images([str(folder / source)])


def test_pixels_without_data_get_no_class_and_no_area(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 256, (20, 30, 3), np.uint8)
    image[:6, 4:] = 0
    tag = (42113, "s", 0, "0", True)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "tile.tif"
    tifffile.imwrite(path, image, photometric="rgb", extratags=[tag])
    Pillow.fromarray(np.dstack([image, (image > 0).any(2) * np.uint8(255)])).save(
        tmp_path / "in" / "transparent.png"
    )
    predictor, wanted = make_predictor(make_model()), OutputOptions("tif", probabilities="uint8")
    predict(predictor, [str(path.parent)], tmp_path / "out", wanted=replace(wanted, areas=True))
    for stem in ("tile", "transparent"):
        label = read_mask(tmp_path / "out" / f"{stem}.tif")
        assert np.array_equal(label == IGNORE, (image == 0).all(2))
        probabilities = read_image(tmp_path / "out" / "probabilities" / f"{stem}.tif")
        assert not probabilities[:6, 4:].any()
        assert probabilities[6:].any()
    rows = (tmp_path / "out" / "areas.csv").read_text().splitlines()[1:]
    assert sum(int(row.split(",")[2]) for row in rows) == 2 * (20 * 30 - 6 * 26)
    assert read_no_data(tmp_path / "out" / "tile.tif") == IGNORE
    assert np.array_equal(predictor(path) == IGNORE, (image == 0).all(2))


def write_pictures(folder: Path, image: str, mask: str, count: int = 4) -> None:
    for k in range(count):
        pixels, label = yard(k)
        save(folder / image.format(k), pixels)
        save(folder / mask.format(k), label * 60)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("yard {}.jpg", "yard {}_mask.png"),
        ("{}.jpg", "{}.png"),
        ("IM_{}.jpg", "IM_{}_P.png"),
        ("img_{}.png", "GT_{}.png"),
    ],
)
def test_masks_next_to_the_images_of_a_folder_are_left_out_and_reported(
    image: str, mask: str, tmp_path: Path
) -> None:
    write_pictures(tmp_path, image, mask)
    images = [tmp_path / image.format(k) for k in range(4)]
    masks = [tmp_path / mask.format(k) for k in range(4)]
    assert find_images([str(tmp_path)]) == images
    assert find_sources([str(tmp_path)]).left_out == masks
    both = [str(tmp_path), str(masks[1])]
    if image == "{}.jpg":
        with pytest.raises(DataError, match=r"1\.jpg and .*1\.png would both become 1\.png"):
            predict(make_predictor(make_model()), both, tmp_path / "out")
        return
    found = find_sources(both)
    assert found.left_out == [masks[0], *masks[2:]]
    assert found.images == sorted([*images, masks[1]], key=natural_key)


def test_label_maps_beside_their_images_are_not_left_out_masks(tmp_path: Path) -> None:
    for k in range(4):
        save(tmp_path / f"{k}.jpg", yard(k)[0])
    # The label maps of this model look like masks of the images.
    predictor = make_predictor(make_model(seed=3))
    outcome = predict(predictor, [str(tmp_path)], tmp_path)
    assert find_sources([str(tmp_path)]).left_out == outcome.label_maps
    assert not outcome.left_out


def test_images_that_are_called_like_masks_are_images(tmp_path: Path) -> None:
    for name in ("a.png", "a_mask.png", "b.png", "b_mask.png", "label 1.png", "street.png"):
        write_picture(tmp_path / name, yard(len(name))[0])
    assert find_sources([str(tmp_path)]).left_out == []
    assert len(find_images([str(tmp_path)])) == 6


def test_a_folder_with_images_only_below_it_names_the_folder_below(tmp_path: Path) -> None:
    save(tmp_path / "data" / "images" / "a.png", yard(0)[0])
    with pytest.raises(
        UsageError, match=r"no image at .*data itself, only in its subfolders, such as .*images;"
    ):
        find_images([str(tmp_path / "data")])


def test_masks_that_were_left_out_are_named(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "in", "{}.jpg", "{}_mask.png")
    arguments = ["predict", str(stored), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json", str(tmp_path / "job.json")])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert "left out 4 masks of other images, such as" in text
    assert names(tmp_path / "out") == ["0.png", "1.png", "2.png", "3.png"]
    assert len(json.loads((tmp_path / "job.json").read_text())["left_out"]) == 4


def test_label_maps_and_overlays(folder: Path, tmp_path: Path) -> None:
    predictor = make_predictor(make_model())
    seen = []
    outcome = predict(
        predictor,
        [str(folder)],
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert outcome.label_maps == [tmp_path / "out" / name for name in ("1.png", "2.png", "10.png")]
    assert (outcome.kept, outcome.failed) == (0, [])
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for path, target in zip(find_images([str(folder)]), outcome.label_maps, strict=True):
        assert (read_mask(target) == predictor(read_image(path))).all()
    assert (
        names(tmp_path / "out/overlays") == names(tmp_path / "out") == ["1.png", "10.png", "2.png"]
    )


def test_overlays_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    predict(
        make_predictor(make_model()),
        [str(folder)],
        tmp_path / "out",
        wanted=OutputOptions(overlays=False),
    )
    assert not (tmp_path / "out/overlays").exists()


@pytest.mark.parametrize("limit", ["MAX_CONCURRENT_PIXELS", "MAX_CONCURRENT_LOGITS"])
def test_large_pictures_are_computed_alone_with_all_threads(
    limit: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, threads, at_once, most = torch.get_num_threads(), [], [], []
    predictor = make_predictor(make_model())
    run = predictor.runtime.run

    def watched(x: Any) -> Any:
        threads.append(torch.get_num_threads())
        at_once.append(1)
        most.append(len(at_once))
        answer = run(x)
        at_once.pop()
        return answer

    object.__setattr__(predictor.runtime, "run", watched)
    try:
        torch.set_num_threads(2)
        small = predict(predictor, [str(folder)], tmp_path / "small").label_maps
        assert threads == [1, 1, 1]
        monkeypatch.setattr(predict_files, limit, 0)
        large = predict(predictor, [str(folder)], tmp_path / "large").label_maps
        assert threads[3:] == [2, 2, 2]
        assert max(most[3:]) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [path.read_bytes() for path in small] == [path.read_bytes() for path in large]


def test_openvino_in_several_threads(folder: Path, stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for k in range(20, 40):
        write_picture(
            folder / f"{k}.png", np.random.default_rng(k).integers(0, 256, (20, 30, 3), np.uint8)
        )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        predictor = Predictor.load(stored, "openvino")
        outcome = predict(
            predictor, [str(folder)], tmp_path / "out", wanted=OutputOptions(overlays=False)
        )
        for path, target in zip(find_images([str(folder)]), outcome.label_maps, strict=True):
            assert (read_mask(target) == predictor(read_image(path))).all()
    finally:
        torch.set_num_threads(before)


def test_a_broken_image_is_reported_and_the_others_are_labelled(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "2.png").write_bytes(b"broken")
    (folder / "3.png").write_bytes(encode_png(np.zeros((4, 4), np.uint8)))
    write_four_bands(folder / "4.tif")
    outcome = predict(make_predictor(make_model()), [str(folder)], tmp_path / "out")
    assert (
        names(tmp_path / "out") == names(tmp_path / "out/overlays") == ["1.png", "10.png", "3.png"]
    )
    assert [path.name for path in outcome.label_maps] == ["1.png", "3.png", "10.png"]
    assert [failure.path.name for failure in outcome.failed] == ["2.png", "4.tif"]
    assert "2.png' is not an image" in outcome.failed[0].reason
    assert "4.tif': the image has 4 bands, but 3 are needed" in outcome.failed[1].reason


def write_four_bands(path: Path) -> None:
    import tifffile

    tifffile.imwrite(
        path,
        np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8),
        photometric="minisblack",
        planarconfig="contig",
    )


def test_a_job_of_broken_images_only_is_an_error(folder: Path, tmp_path: Path) -> None:
    for path in find_images([str(folder)]):
        path.write_bytes(b"broken")
    with pytest.raises(
        UsageError,
        match=r"none of 3 images could be labelled; the first error: '.*1\.jpg' is not an image",
    ):
        predict(make_predictor(make_model()), [str(folder)], tmp_path / "out")
    with pytest.raises(UsageError, match=r"^'.*2\.png' is not an image"):
        predict(make_predictor(make_model()), [str(folder / "2.png")], tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_exit_status_and_json_of_a_broken_picture(
    folder: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "2.png").write_bytes(b"broken")
    with pytest.raises(SystemExit) as end:
        main(
            [
                "predict",
                str(stored),
                str(folder),
                "--out",
                str(tmp_path / "out"),
                "--json",
                "-",
                "--quiet",
            ]
        )
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert end.value.code == 1
    assert (content["num_images"], content["kept"], len(content["label_maps"])) == (2, 0, 2)
    assert content["failed"][0]["path"] == str(folder / "2.png")
    assert printed.err.splitlines() == [
        f"useg: {content['failed'][0]['error']}",
        "useg: 1 of 3 images could not be labelled",
    ]


def test_images_unlike_the_training_images_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    known = [
        measure_image(read_image(folder / name), [100.0] * 3, [50.0] * 3, model.working)
        for name in ("1.jpg", "2.png", "10.png")
    ]
    model.provenance = {"training_images": fit_training_images(known, known).as_dict()}
    save_model(model, tmp_path / "model.safetensors")
    write_picture(folder / "night.png", np.full((20, 30, 3), 3, np.uint8))
    command = ["predict", str(tmp_path / "model.safetensors"), str(folder), "--json"]
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "out.json"), "--out", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["unlike_training"] == [str(folder / "night.png")]
    assert (
        "1 of 4 images differs from the training images in brightness, contrast, colours or "
        "sharpness: night.png; expect more errors there"
    ) in capsys.readouterr().out


def test_models_that_do_not_know_their_training_images_name_none(
    folder: Path, stored: Path, tmp_path: Path
) -> None:
    predictor = Predictor.load(stored)
    assert predictor.training_distance(read_image(folder / "2.png")) is None
    assert predict(predictor, [str(folder)], tmp_path / "out").unlike == []


def test_a_repeated_job_keeps_its_label_maps(folder: Path, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def kept(**options: Any) -> int:
        return predict(Predictor.load(stored), [str(folder)], out, **options).kept

    assert kept() == 0
    contents = {path: path.read_bytes() for path in out.glob("*.png")}
    assert kept() == 3
    assert kept(overwrite=True) == 0
    (out / "2.png").unlink()
    assert kept() == 2
    os.utime(folder / "10.png", (1, 1))
    assert kept() == 2
    assert {path for path in contents if path.read_bytes() != contents[path]} == {out / "10.png"}
    assert kept(wanted=OutputOptions(overlays=False)) == 0
    assert kept(wanted=OutputOptions(overlays=False)) == 3


def test_summaries_cover_all_shards_and_kept_label_maps(
    folder: Path, stored: Path, tmp_path: Path
) -> None:
    wanted, rows = OutputOptions(overlays=False, areas=True), []
    for k in (1, 2, 1):
        predict(
            Predictor.load(stored), [str(folder)], tmp_path / "out", wanted=wanted, shard=(k, 2)
        )
        rows.append(len((tmp_path / "out/areas.csv").read_text().splitlines()))
    assert rows[0] < rows[1] == rows[2]


def test_outputs_are_written_on_request(folder: Path, tmp_path: Path) -> None:
    wanted = OutputOptions(
        labels="tif", overlays=False, probabilities="uint8", confidence="png", polygons=True
    )
    outcome = predict(make_predictor(make_model()), [str(folder)], tmp_path / "out", wanted=wanted)
    assert [path.name for path in outcome.label_maps] == ["1.tif", "2.tif", "10.tif"]
    assert {
        path.name: len(names(path)) for path in (tmp_path / "out").iterdir() if path.is_dir()
    } == {
        "confidence": 3,
        "polygons": 3,
        "probabilities": 3,
    }


def test_nothing_of_another_model_is_kept(folder: Path, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(Predictor.load(stored), [str(folder)], out)
    other = make_model(working=WorkingSize(scale=0.5))
    save_model(other, stored)
    assert predict(Predictor.load(stored), [str(folder)], out).kept == 0
    for path in find_images([str(folder)]):
        assert (
            read_mask(out / f"{path.stem}.png") == make_predictor(other)(read_image(path))
        ).all()
    in_memory = make_predictor(other)
    assert (
        predict(in_memory, [str(folder)], out).kept
        == predict(in_memory, [str(folder)], out).kept
        == 0
    )


def test_another_image_of_the_same_name_size_and_time_is_labelled(
    stored: Path, tmp_path: Path
) -> None:
    for k, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        folder.mkdir()
        content = encode_png(np.full((9, 9, 3), 50 + k, np.uint8))
        (folder / "1.png").write_bytes(content)
        os.utime(folder / "1.png", (1, 1))
    assert (tmp_path / "a/1.png").stat().st_size == (tmp_path / "b/1.png").stat().st_size
    for source, kept in (("a", 0), ("a", 1), ("b", 0), ("b", 1)):
        outcome = predict(Predictor.load(stored), [str(tmp_path / source)], tmp_path / "out")
        assert outcome.kept == kept


def test_files_of_another_program_are_named_and_stay(
    folder: Path, stored: Path, tmp_path: Path
) -> None:
    for name in ("out/1.png", "out/overlays/2.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        for content in (b"", b"\x89PNG", encode_png(np.zeros((20, 30), np.uint8))):
            path.write_bytes(content)
            with pytest.raises(UsageError, match=f"useg did not write.*{name}; choose"):
                predict(Predictor.load(stored), [str(folder)], tmp_path / "out")
            assert path.read_bytes() == content
            assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [path]
        path.unlink()


def test_shards_cover_all_once(folder: Path, tmp_path: Path) -> None:
    write_picture(folder / "3.png", np.zeros((4, 4, 3), np.uint8))
    parts = [
        predict(
            make_predictor(make_model()), [str(folder)], tmp_path / "out", shard=(k, 3)
        ).label_maps
        for k in (1, 2, 3)
    ]
    assert [[path.name for path in part] for part in parts] == [
        ["1.png", "10.png"],
        ["2.png"],
        ["3.png"],
    ]
    assert (
        predict(
            make_predictor(make_model()), [str(folder)], tmp_path / "out", shard=(5, 5)
        ).label_maps
        == []
    )


def test_shards_are_parsed_and_impossible_ones_refused() -> None:
    assert parse_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "2", "a/b", "1/0", "-1/3", "1.5/2", ""):
        with pytest.raises(UsageError, match=r"is not a shard; give I/N with I from 1 to N: 2/3"):
            parse_shard(text)


def test_temporary_files_of_a_killed_job_are_removed_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out/overlays").mkdir(parents=True)
    for name in (
        ".useg-0123456789abcdef.png",
        "overlays/.useg-fedcba9876543210.png",
        ".useg-0123.png",
        ".1-0123456789ab.png",
    ):
        (tmp_path / "out" / name).touch()
    predict(make_predictor(make_model()), [str(folder)], tmp_path / "out", shard=(1, 2))
    assert names(tmp_path / "out") == [
        ".1-0123456789ab.png",
        ".useg-0123.png",
        "1.png",
        "10.png",
    ]
    assert names(tmp_path / "out/overlays") == ["1.png", "10.png"]


def test_a_link_to_the_picture_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/2.png").symlink_to(folder / "2.png")
    with pytest.raises(
        UsageError, match=r"the label map of .*2\.png would overwrite the image itself"
    ):
        predict(make_predictor(make_model()), [str(folder)], tmp_path / "out")


Runner = Callable[..., list[int]]


@pytest.fixture
def run() -> Iterator[Runner]:
    """Run ``useg predict`` in processes, and kill them when there are so many label maps."""
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent.parent / "predict_child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin
    assert child.stdout

    def job(out: Path, processes: list[list[str]], kill_at: int | None = None) -> list[int]:
        assert child.stdin
        assert child.stdout
        child.stdin.write(
            json.dumps({"out": str(out), "processes": processes, "kill_at": kill_at}) + "\n"
        )
        child.stdin.flush()
        codes: list[int] = json.loads(child.stdout.readline())
        return codes

    yield job
    child.stdin.close()
    child.stdout.close()
    assert child.wait(60) == 0


def everything(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_killed_job_that_is_repeated_ends_like_an_uninterrupted_one(
    run: Runner, tmp_path: Path
) -> None:
    count, shards, moments, more = (1000, 3, 20, ["--no-overlays"]) if SOAK else (24, 2, 3, [])
    save_model(make_model(), tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    for k in range(count):
        pixels = (
            np.random.default_rng(k).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        )
        (tmp_path / "in" / f"{k}.png").write_bytes(encode_png(pixels))

    def processes(out: Path) -> list[list[str]]:
        start = [
            "predict",
            str(tmp_path / "model.safetensors"),
            str(tmp_path / "in"),
            "--out",
            str(out),
            "--quiet",
            *more,
        ]
        return [[*start, "--shard", f"{k + 1}/{shards}"] for k in range(shards)]

    assert run(tmp_path / "clean", processes(tmp_path / "clean")) == [0] * shards
    clean = everything(tmp_path / "clean")
    assert len(clean) == count * (1 if more else 2)
    rng, partly = random.Random(0), 0
    for moment in range(moments):
        out = tmp_path / f"out{moment}"
        run(out, processes(out), rng.randrange(count))
        left = everything(out)
        whole = {name for name in left if not Path(name).name.startswith(".")}
        assert all(left[name] == clean[name] for name in whole)
        partly += 0 < len(whole) < len(clean)
        assert run(out, processes(out)) == [0] * shards
        assert everything(out) == clean
    assert partly > moments // 2, "the kills came too early or too late to prove anything"


def test_images_whose_label_maps_are_one_file_on_the_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [tmp_path / "a.png", tmp_path / "A.png"]
    assert (
        len(predict_files.plan_outputs(dict.fromkeys(images), tmp_path / "out", OutputOptions()))
        == 2
    )
    monkeypatch.setattr("useg.files._ignores_case", lambda _: True)
    with pytest.raises(UsageError, match="would be one file"):
        predict_files.plan_outputs(dict.fromkeys(images), tmp_path / "out", OutputOptions())
