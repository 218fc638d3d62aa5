"""`useg evaluate` as its user meets it: extras, intervals, a second model; and that training leaves a calibrated one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_inference import make_model
from PIL import Image
from test_cli import run

import useg
from useg.models import segmenter


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for _ in range(30):
        name = (
            rng.bytes(4).hex().translate(str.maketrans("0123456789", "ghijklmnop"))
        )  # no running numbers
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(
            folder / "images" / f"{name}.png"
        )
        Image.fromarray(rng.integers(0, 4, (24, 32), np.uint8)).save(
            folder / "masks" / f"{name}.png"
        )
    (folder / "classes.toml").write_text(
        "".join(f'[[class]]\nname = "{name}"\n' for name in "abcd")
    )
    return folder


def model(folder: Path, seed: int, **provenance: object) -> Path:
    made = make_model()
    torch.manual_seed(seed)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    made.provenance = dict(provenance)
    segmenter.save_model(made, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return model(tmp_path / "one", 1), model(tmp_path / "two", 2)


def test_scores_are_printed_with_their_intervals_and_extras(
    models: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(
        np.repeat(np.uint8([[255], [0]]), [4, 20], 0) * np.ones((1, 32), np.uint8)
    ).save(tmp_path / "hood.png")
    words = [
        "--split",
        "all",
        "--ignore-mask",
        tmp_path / "hood.png",
        "--objects",
        "b",
        "--membranes",
        "a",
        "--tolerance",
        "2",
        "--tile",
        "0",
    ]
    code, out, _ = run(
        capsys, "evaluate", models[0], data, *words, "--json", tmp_path / "scores.json", "--quiet"
    )
    content = json.loads((tmp_path / "scores.json").read_text())
    assert code == 0
    assert sum(entry["pixels"] for entry in content["classes"]) == 30 * 20 * 32
    low, high = content["intervals"]["mean_iou"]
    assert f"mean IoU {100 * content['mean_iou']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" in out
    for words_ in (
        "micro IoU (all pixels pooled)",
        "boundary F",
        "calibration error",
        "objects: F1",
        "warping error",
        "95 % intervals from 30 images",
    ):
        assert words_ in out
    extras = useg.Extras(ignore_mask=tmp_path / "hood.png", objects="b", membranes="a", tolerance=2)
    assert content == useg.evaluate(models[0], data, "all", extras=extras).as_dict()


def test_against_another_model(
    models: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        capsys,
        "evaluate",
        models[0],
        data,
        "--split",
        "all",
        "--against",
        models[1],
        "--json",
        tmp_path / "scores.json",
        "--quiet",
    )
    content = json.loads((tmp_path / "scores.json").read_text())
    assert code == 0
    assert content == useg.compare(*models, data, "all").as_dict()
    assert f"first model: {models[0]}\nsecond model: {models[1]}\n" in out
    assert (
        content["comparison"]["scores_against"]["mean_iou"]
        == useg.evaluate(models[1], data, "all").scores.mean_iou
    )
    assert 0 <= content["comparison"]["probability_better"] <= 1
    assert "the first model has the higher mean IoU with a probability of" in out


def test_models_that_held_out_other_pictures_are_not_compared_by_accident(
    models: tuple[Path, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = [{"data.split": "random", "data.holdout": share} for share in (0.2, 0.5)]
    paths = [
        model(path.parent, seed, split=split)
        for seed, (path, split) in enumerate(zip(models, splits, strict=True))
    ]
    code, _, err = run(capsys, "evaluate", paths[0], data, "--against", paths[1], "--quiet")
    assert code == 2
    assert "trained with different splits" in err
    code, out, _ = run(
        capsys,
        "evaluate",
        paths[0],
        data,
        "--against",
        paths[1],
        "--set",
        "data.holdout=0.5",
        "--set",
        "data.split=random",
        "--quiet",
    )
    assert code == 0
    assert "difference" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ignore-mask", "nothing.png"], "nothing.png"),
        (["--objects", "cell"], "the class 'cell' is not known; choose one of a, b, c, d"),
        (["--tolerance", "-2"], "cannot be negative"),
        (["--against", "nowhere"], "there is no model at nowhere"),
        (
            ["--against", "nowhere", "--html", "page.html"],
            "a report shows one model; leave one out",
        ),
    ],
)
def test_slips_are_one_sentence(
    models: tuple[Path, Path],
    data: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(capsys, "evaluate", models[0], data, *words, "--quiet")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_training_ends_with_a_calibrated_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--set", "model.width=4", "--set", "model.depth=1", "--set", "data.size=32x24"]
    code, _, _ = run(
        capsys, "train", data, "--out", tmp_path / "run", "--epochs", "1", "--quiet", *small
    )
    assert code == 0
    temperature = useg.load(tmp_path / "run").runtime.description.temperature
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert temperature != 1
    assert scores["calibration"]["temperature"] == temperature
