"""`useg evaluate`: extras, intervals, a second model; training leaves a calibrated model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from made_inference import make_model
from PIL import Image

import useg
from useg.models import segmenter
from useg.models.description import fit_training_images, measure_image
from useg.models.geometry import WorkingSize


def write_model(folder: Path, seed: int, **provenance: object) -> Path:
    """Write a model with random weights."""
    folder.mkdir(exist_ok=True)
    model = make_model()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.provenance = dict(provenance)
    segmenter.save_model(model, folder / "model.safetensors")
    return folder / "model.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    return command_line.run(capsys, *arguments, "--quiet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 images whose names contain no digits, so that they are no video."""
    folder = tmp_path_factory.mktemp("data") / "set"
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    letters = str.maketrans("0123456789", "ghijklmnop")
    for _ in range(30):
        name = rng.bytes(4).hex().translate(letters)
        image = rng.integers(0, 256, (24, 32, 3), np.uint8)
        mask = rng.integers(0, 4, (24, 32), np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    classes = "".join(f'[[class]]\nname = "{name}"\n' for name in "abcd")
    (folder / "classes.toml").write_text(classes)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return write_model(tmp_path / "one", 1), write_model(tmp_path / "two", 2)


def read_scores(folder: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return scores


def test_scores_are_printed_with_their_intervals_and_extras(
    models: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hood = tmp_path / "hood.png"
    ignored = np.zeros((24, 32), np.uint8)
    ignored[:4] = 255
    Image.fromarray(ignored).save(hood)
    options = ["--split", "all", "--ignore-mask", hood, "--objects", "b", "--membranes", "a"]
    options += ["--tolerance", "2", "--tile", "0", "--json", tmp_path / "scores.json"]
    code, out, _ = run(capsys, "evaluate", models[0], data, *options)
    content = read_scores(tmp_path)
    assert code == 0
    assert sum(entry["pixels"] for entry in content["classes"]) == 30 * 20 * 32
    low, high = content["intervals"]["mean_iou"]
    assert f"mean IoU {100 * content['mean_iou']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" in out
    for phrase in (
        "micro IoU (all pixels pooled)",
        "boundary F",
        "expected calibration error",
        "objects: F1",
        "warping error",
        "95 % intervals from 30 images",
    ):
        assert phrase in out
    extras = useg.Extras(ignore_mask=hood, objects="b", membranes="a", tolerance=2)
    assert content == useg.evaluate(models[0], data, "all", extras=extras).as_dict()


def test_all_images_of_other_data_are_scored_if_the_classes_agree(
    models: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = {"classes": [{"name": "a", "iou": 0.9, "pixels": 9}, {"name": "b", "iou": None}]}
    night = measure_image(np.zeros((9, 9, 3), np.uint8), [100.0] * 3, [50.0] * 3, WorkingSize())
    model = write_model(
        tmp_path / "three",
        3,
        dataset="elsewhere",
        validation=validation,
        training_images=fit_training_images([night], [night]).as_dict(),
    )
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "classes.toml").unlink(missing_ok=True)
    names = ("road", "sky", "car", "tree")
    code, _, err = run(capsys, "evaluate", model, other)
    assert (code, "run it again with --map ids" in err) == (2, True)

    code, out, _ = run(capsys, "evaluate", model, other, "--map", "ids")
    assert code == 0
    assert "note: scored all 30 images, because the model was not trained on other" in out
    assert "the mean IoU of 1 class was 90.0 % on the images held out in training, and is" in out
    assert "30 of 30 images differ from the training images" in out

    lines = [f'[[class]]\nname = "{name}"\nvalue = {k}' for k, name in enumerate(names)]
    (other / "classes.toml").write_text("\n".join(lines))
    code, _, err = run(capsys, "evaluate", model, other)
    assert code == 2
    assert "other has the classes road, sky, car, tree, but the model has" in err
    assert "check and complete --map" in err


def test_second_model_is_compared_with_the_first(
    models: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--split", "all", "--against", models[1], "--json", tmp_path / "scores.json"]
    options += ["--runtime", "torch"]
    code, out, _ = run(capsys, "evaluate", models[0], data, *options)
    content = read_scores(tmp_path)
    comparison = content["comparison"]
    second = useg.evaluate(models[1], data, "all")
    assert code == 0
    assert content == useg.compare(*models, data, "all").as_dict()
    assert f"first model: {models[0]}\nsecond model: {models[1]}\n" in out
    assert comparison["scores_against"]["mean_iou"] == second.scores.mean_iou
    assert 0 <= comparison["probability_better"] <= 1
    assert "the first model has the higher mean IoU with a probability of" in out


def test_models_of_different_splits_are_compared_only_with_an_explicit_split(
    models: tuple[Path, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        write_model(path.parent, 1, split={"data.split": "random", "data.holdout": holdout})
        for path, holdout in zip(models, (0.2, 0.5), strict=True)
    ]
    code, _, err = run(capsys, "evaluate", paths[0], data, "--against", paths[1])
    assert code == 2
    assert "trained with different splits" in err
    split = ["--set", "data.holdout=0.5", "--set", "data.split=random"]
    code, out, _ = run(capsys, "evaluate", paths[0], data, "--against", paths[1], *split)
    assert code == 0
    assert "difference" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ignore-mask", "nothing.png"], "nothing.png"),
        (["--objects", "cell"], "the class 'cell' is not known; choose one of a, b, c, d"),
        (["--tolerance", "-2"], "cannot be negative"),
        (["--against", "nowhere"], "there is no model at nowhere"),
        (
            ["--against", "nowhere", "--html", "page.html"],
            "a report shows one model; omit one",
        ),
    ],
)
def test_errors_are_one_line(
    models: tuple[Path, Path],
    data: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(capsys, "evaluate", models[0], data, *options)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_training_ends_with_a_calibrated_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--set", "model.width=4", "--set", "model.depth=1", "--set", "data.size=32x24"]
    code, _, _ = run(capsys, "train", data, "--out", tmp_path / "run", "--epochs", "1", *small)
    assert code == 0
    temperature = useg.load(tmp_path / "run").runtime.description.temperature
    assert temperature != 1
    assert read_scores(tmp_path / "run")["calibration"]["temperature"] == temperature
