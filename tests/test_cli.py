"""The command line as its user meets it: what it prints, what it leaves, and one clear sentence for
each mistake.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from PIL import Image

import useg
from useg.classes import CARLA
from useg.cli import main
from useg.errors import MachineError
from useg.images.image_files import read_image, read_size
from useg.scenes.generate import write_scenes

pytestmark = pytest.mark.usefixtures("blank_charts")

QUICK = ["--set", "model.width=4", "--set", "model.depth=2", "--set", "data.size=64x48"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 20, (64, 48), 0)
    return folder


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit):
        main(["train", str(scenes), "--out", str(out), "--epochs", "2", "--quiet", *QUICK])
    return out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"useg {useg.__version__}\n", "")


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_a_device_that_is_not_there_is_refused(
    command: str,
    scenes: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("USEG_DEVICE", "cpu")
    given: dict[str, list[str | Path]] = {
        "train": [scenes, "--out", tmp_path / "run", "--epochs", "1"],
        "evaluate": [trained, scenes],
        "predict": [trained, scenes / "CameraRGB", "--out", tmp_path / "out"],
    }
    status, out, error = run(capsys, command, *given[command], "--device", "cuda:99")
    assert (status, out) == (2, "")
    assert error.splitlines()[-1].startswith("useg: there is no device 'cuda:99' here; PyTorch ")
    assert not list(tmp_path.iterdir())


def test_train_leaves_a_complete_run(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "model.safetensors",
        "run.toml",
        "split.csv",
        "log.jsonl",
        "curves.png",
        "pictures",
        "report.html",
        "report.md",
        "scores.json",
        "state.pt",
    }


def test_evaluate_agrees_with_the_library_and_with_training(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys,
        "evaluate",
        trained,
        scenes,
        "--json",
        tmp_path / "scores.json",
        "--html",
        tmp_path / "report.html",
        "--runtime",
        "torch",
    )
    assert code == 0
    assert "mean IoU" in out
    content = json.loads((tmp_path / "scores.json").read_text())
    assert {"mean_iou", "pixel_accuracy", "mean_dice", "num_images", "classes", "absent"} <= set(
        content
    )
    assert {"id", "name", "iou", "dice", "precision", "recall", "pixels"} <= set(
        content["classes"][0]
    )
    assert content == useg.evaluate(trained, scenes).as_dict()
    assert content["mean_iou"] == json.loads((trained / "scores.json").read_text())["mean_iou"]
    assert "<html" in (tmp_path / "report.html").read_text()


def test_evaluate_holds_out_what_training_held_out(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        capsys,
        "train",
        scenes,
        "--out",
        tmp_path / "run",
        "--epochs",
        "1",
        "--quiet",
        *QUICK,
        "--set",
        "data.holdout=0.5",
        "--set",
        "data.split=random",
    )
    held_out = [
        line
        for line in (tmp_path / "run/split.csv").read_text().splitlines()
        if line.endswith(",val")
    ]
    run(capsys, "evaluate", tmp_path / "run", scenes, "--json", tmp_path / "scores.json", "--quiet")
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == len(held_out) > 6


def test_evaluate_scores_what_the_run_held_out_though_the_data_set_has_grown(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = tmp_path / scenes.name
    shutil.copytree(scenes, grown)
    for folder in ("CameraRGB", "CameraSeg"):
        first = sorted((grown / folder).iterdir())[0]
        for k in range(9000, 9040):
            shutil.copy(first, grown / folder / f"{k}{first.suffix}")
    run(capsys, "evaluate", trained, grown, "--json", tmp_path / "scores.json", "--quiet")
    held_out = [
        line for line in (trained / "split.csv").read_text().splitlines() if line.endswith(",val")
    ]
    assert json.loads((tmp_path / "scores.json").read_text())["num_images"] == len(held_out)


def test_the_report_says_what_flatters_the_scores(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert "slightly too high" in page
    assert "The training images come from the same recordings" in page


def test_json_to_standard_output_is_json_alone(
    trained: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "evaluate", trained, scenes, "--json", "-", "--quiet")
    assert json.loads(out)["num_images"] > 0


def test_predict_equals_the_library(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run(capsys, "predict", trained, scenes / "CameraRGB", "--out", tmp_path / "labels")
    assert code == 0
    model = useg.load(trained)
    paths = sorted((scenes / "CameraRGB").iterdir())
    assert sorted(path.name for path in (tmp_path / "labels").glob("*.png")) == [
        path.name for path in paths
    ]
    assert sorted(path.name for path in (tmp_path / "labels/overlays").iterdir()) == [
        path.name for path in paths
    ]
    for path in paths[:3]:
        with Image.open(tmp_path / "labels" / path.name) as written:
            assert written.mode == "P"
            assert written.getpalette()[: 3 * 13] == [
                value for color in CARLA.colors for value in color
            ]  # type: ignore[index]
            assert (np.asarray(written) == model(read_image(path))).all()


def test_any_image_size(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width, height in ((1, 1), (37, 91), (200, 3)):
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(
            tmp_path / f"{width}x{height}.png"
        )
    assert run(capsys, "predict", trained, tmp_path / "*.png", "--out", tmp_path / "labels")[0] == 0
    assert {read_size(path) for path in (tmp_path / "labels").glob("*.png")} == {
        (1, 1),
        (37, 91),
        (200, 3),
    }


def test_inspect(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "inspect", scenes, "--json", tmp_path / "x.json", "--html", tmp_path / "x.html"
    )
    assert code == 0
    assert "20" in out
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["num_pairs"] == 20
    assert [entry["name"] for entry in content["classes"]] == list(CARLA.names)
    assert "<html" in (tmp_path / "x.html").read_text()


def test_inspect_says_1_when_something_is_wrong(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    (tmp_path / "data/CameraRGB/scene_00003.png").write_bytes(b"")
    code, out, _ = run(capsys, "inspect", tmp_path / "data", "--json", tmp_path / "x.json")
    assert code == 1
    assert "scene_00003.png" in out
    errors = [
        finding
        for finding in json.loads((tmp_path / "x.json").read_text())["findings"]
        if finding["severity"] == "error"
    ]
    assert len(errors) == 1
    assert "scene_00003.png" in str(errors[0]["files"])


# Every mistake: (name, what spoils a copy of the data, the command, what the sentence must contain)
def _empty(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


def _png(folder: Path, part: str = "RGB") -> Path:
    return folder / f"Camera{part}" / "scene_00003.png"


SPOILED = {
    "missing folder": (lambda folder: shutil.rmtree(folder), "data"),
    "no pairs": (_empty, "dataset.toml"),
    "image without mask": (lambda folder: _png(folder, "Seg").unlink(), "scene_00003.png"),
    "mask of another size": (
        lambda folder: Image.new("RGB", (30, 20)).save(_png(folder, "Seg")),
        "30x20",
    ),
    "label above the classes": (
        lambda folder: Image.new("RGB", (64, 48), (17, 0, 0)).save(_png(folder, "Seg")),
        "value 17 at (row 0, column 0)",
    ),
    "truncated PNG": (
        lambda folder: _png(folder).write_bytes(_png(folder).read_bytes()[:900]),
        "scene_00003.png",
    ),
    "text named PNG": (lambda folder: _png(folder).write_text("hello"), "scene_00003.png"),
    "empty file": (lambda folder: _png(folder).write_bytes(b""), "scene_00003.png"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_data_is_one_sentence_and_leaves_nothing(
    name: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = SPOILED[name]
    shutil.copytree(scenes, tmp_path / "data")
    spoil(tmp_path / "data")  # type: ignore[no-untyped-call]
    code, out, err = run(
        capsys,
        "train",
        tmp_path / "data",
        "--out",
        tmp_path / "run",
        "--epochs",
        "1",
        "--quiet",
        *QUICK,
    )
    assert (code, out) == (2, "")
    assert err.startswith("useg: ")
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["truncated PNG", "text named PNG", "empty file"])
def test_a_broken_picture_to_predict_is_one_sentence(
    name: str, trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    SPOILED[name][0](tmp_path / "data")  # type: ignore[no-untyped-call]
    code, _, err = run(
        capsys, "predict", trained, _png(tmp_path / "data"), "--out", tmp_path / "labels", "--quiet"
    )
    assert code == 2
    assert "scene_00003.png" in err
    assert [path for path in (tmp_path / "labels").rglob("*") if path.is_file()] == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "there is no model"),
        (_cut, "not a readable model file"),
        (_flip, "damaged"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "not a readable model file"),
    ],
    ids=["missing", "cut short", "one bit flipped", "pickle"],
)
def test_a_broken_model_is_one_sentence(
    spoil,
    expected: str,
    trained: Path,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(trained, tmp_path / "run")
    spoil(tmp_path / "run" / "model.safetensors")
    for command in (
        ["evaluate", tmp_path / "run", scenes],
        ["predict", tmp_path / "run", scenes / "CameraRGB", "--out", tmp_path / "labels"],
    ):
        code, out, err = run(capsys, *command, "--quiet")
        assert (code, out) == (2, "")
        assert expected in err
    assert not (tmp_path / "labels").exists()


def test_an_output_folder_that_cannot_be_written(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious")
    for command in (
        ["train", scenes, "--out", tmp_path / "file/run", *QUICK],
        ["predict", trained, scenes / "CameraRGB", "--out", tmp_path / "file"],
    ):
        code, _, err = run(capsys, *command, "--quiet")
        assert code == 2
        assert "cannot be written" in err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run(
        capsys, "predict", trained, scenes / "CameraRGB", "--out", tmp_path / "locked", "--quiet"
    )
    assert (code, "cannot be written" in err) == (2, True)


def test_no_such_split(trained: Path, scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "evaluate", trained, scenes, "--split", "tset", "--quiet")
    assert code == 2
    assert "no pair in the split 'tset'; it has" in err


def test_two_pictures_of_one_name(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        capsys,
        "predict",
        trained,
        scenes / "CameraRGB",
        scenes / "CameraSeg",
        "--out",
        tmp_path / "labels",
        "--quiet",
    )
    assert (code, "would both become" in err) == (2, True)


def test_label_maps_never_overwrite_the_pictures(
    trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(scenes / "CameraRGB", tmp_path / "pictures")
    before = {path: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    code, _, err = run(
        capsys, "predict", trained, tmp_path / "pictures", "--out", tmp_path / "pictures", "--quiet"
    )
    assert (code, "would overwrite the image itself" in err) == (2, True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("text", ["", "Cannot allocate memory"])
def test_too_little_memory_is_one_sentence(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_too_much(*_: object, **__: object) -> None:
        raise MemoryError(text)

    monkeypatch.setattr("useg.cli.app", take_too_much)
    reason = text and f" ({text})"
    advice = "close other programs, or raise the limit of this process"
    assert run(capsys) == (2, "", f"useg: there is not enough memory{reason}; {advice}\n")
    with pytest.raises(MachineError, match="not enough memory"):
        main(["--debug"])


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "useg", "inspect", str(tmp_path / "no"), "--debug"],
        capture_output=True,
        text=True,
    )
    assert finished.returncode != 0
    assert "Traceback" in finished.stderr


def test_unknown_option_is_wrong_use() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "useg", "train", "--nonsense"], capture_output=True, text=True
    )
    assert finished.returncode == 2


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from useg import api

    monkeypatch.setattr(api, "DEMO_SIZE", (64, 48))
    monkeypatch.setattr(api, "DEMO_SCENES", {"train": 24, "test": 4})
    monkeypatch.setattr(api, "QUICK_SCENES", {"train": 12, "test": 2})
    monkeypatch.setattr(api, "QUICK_MINUTES", 0.1)


@pytest.mark.usefixtures("small_demo")
def test_demo_does_the_whole_job_and_is_repeated_quickly_with_fewer_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    code, printed, _ = run(capsys, "demo", "--out", out, "--minutes", "0.1", "--quiet")
    assert code == 0
    assert printed.splitlines()[-1] == str(out / "report.html")
    assert len(list((out / "labels/overlays").iterdir())) == 4
    assert all(
        (out / name).stat().st_size for name in ("report.html", "inspect.html", "picture.png")
    )
    assert json.loads((out / "scores.json").read_text())["num_images"] == 4

    assert run(capsys, "demo", "--quick", "--out", out, "--quiet")[0] == 0
    assert len(list((out / "train/CameraRGB").iterdir())) == 12
    assert json.loads((out / "scores.json").read_text())["num_images"] == 2


def test_demo_leaves_other_peoples_folders_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    code, _, err = run(capsys, "demo", "--out", tmp_path)
    assert (code, "was not made by useg demo" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
