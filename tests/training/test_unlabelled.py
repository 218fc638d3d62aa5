"""A run learns the colours of images without masks where these matter, and is the same without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_training import SHAPES_SETTINGS, Interrupter, draw_shapes, make_shapes, read_log

import useg
from useg.errors import DataError, SettingsError
from useg.images.image_files import write_picture

# Photometric augmentation would learn other colours without images of them.
SETTINGS = {**SHAPES_SETTINGS, "model.encoder": "plain", "train.photometric": 0.0}
SETTINGS |= {"train.steps": 60, "train.learning_rate": 1e-2}
SIZE = (32, 48, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("unlabelled") / "data", 0, count=20)


@pytest.fixture(scope="module")
def plain(data: Path) -> Path:
    return useg.train(data, data.parent / "plain", settings=SETTINGS).out


@pytest.fixture(scope="module")
def elsewhere(data: Path) -> Path:
    """Images of the same shapes at dusk, without masks."""
    rng = np.random.default_rng(1)
    return write_images(data.parent / "elsewhere", 12, lambda k: at_dusk(draw_shapes(rng)[0]))


@pytest.fixture(scope="module")
def run(data: Path, elsewhere: Path) -> Path:
    return useg.train(data, data.parent / "run", settings=SETTINGS, unlabelled=elsewhere).out


def write_images(folder: Path, count: int, draw: Callable[[int], np.ndarray]) -> Path:
    folder.mkdir()
    for k in range(count):
        write_picture(folder / f"q{k:02d}.png", draw(k))
    return folder


def at_dusk(image: np.ndarray) -> np.ndarray:
    """Darker, and tinted blue."""
    return (image * np.array([0.25, 0.35, 0.6])).astype(np.uint8)


def share_right(run: Path, change: Callable[[np.ndarray], np.ndarray]) -> float:
    rng, right = np.random.default_rng(2), []
    predict = useg.load(run)
    for _ in range(8):
        image, label = draw_shapes(rng)
        right.append((predict(change(image)) == label).mean())
    return float(np.mean(right))


def test_other_colours_are_learned_where_they_matter(run: Path, plain: Path) -> None:
    before, after = (share_right(each, at_dusk) for each in (plain, run))
    assert after > before + 0.1
    at_home = [share_right(each, lambda image: image) for each in (plain, run)]
    assert at_home[1] > at_home[0] - 0.05
    compared = [row for row in read_log(run) if "unlabelled" in row]
    assert [row["step"] for row in compared] == [24, 60]
    first, last = (row["unlabelled"] for row in compared)
    assert first["matched"] < first["own"] - 0.05
    assert last["matched"] > first["matched"] + 0.1
    assert "crops took these colours (before: " in (run / "report.html").read_text()
    assert json.loads((run / "scores.json").read_text())["unlabelled"] == [first, last]


def test_colours_that_are_known_change_nothing(data: Path, plain: Path, tmp_path: Path) -> None:
    """Images from where the training images are: the model is that of a run without them."""
    said: list[str] = []

    class Listener(Interrupter):
        def say(self, text: str) -> None:
            said.append(text)

    rng = np.random.default_rng(3)
    here = write_images(tmp_path / "here", 8, lambda k: draw_shapes(rng)[0])
    run = useg.train(
        data, tmp_path / "run", settings=SETTINGS, unlabelled=here, progress=Listener(0)
    )
    expected = (plain / "model.safetensors").read_bytes()
    assert (run.out / "model.safetensors").read_bytes() == expected
    assert any("these colours hardly reduce the score" in text for text in said)
    assert run.settings.train.unlabelled_from is None


def test_a_repeated_or_interrupted_run_is_the_same(
    run: Path, data: Path, elsewhere: Path, tmp_path: Path
) -> None:
    expected = (run / "model.safetensors").read_bytes()
    cut = tmp_path / "cut"
    given: dict[str, Any] = {"settings": SETTINGS, "unlabelled": elsewhere}
    # The colours are compared after step 24 and taken from step 26 on.
    assert useg.train(data, cut, **given, progress=Interrupter(25)).interrupted
    with pytest.raises(SettingsError, match=r"the unlabelled images of the run in .* are .*, not "):
        useg.train(data, cut, resume=True, unlabelled=data)
    assert not useg.train(data, cut, resume=True, unlabelled=elsewhere).interrupted
    assert (cut / "model.safetensors").read_bytes() == expected
    again = useg.train(data, tmp_path / "again", config=run / "run.toml").out
    assert (again / "model.safetensors").read_bytes() == expected


def noise(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, SIZE, np.uint8)


def text(k: int) -> np.ndarray:
    """Black strokes on white paper."""
    page = np.full(SIZE, 255, np.uint8)
    page[3 + k : -3 : 5, 4:-4] = 0
    return page


@pytest.mark.parametrize(
    ("count", "draw", "reason"),
    [
        (3, lambda k: draw_shapes(np.random.default_rng(k))[0], "3 images, but 4 or more are"),
        (6, noise, "are noise: the correlation of neighbouring pixels is"),
        (6, lambda k: np.zeros(SIZE, np.uint8), "are blank"),
        (6, text, "are blank"),
    ],
)
def test_images_that_show_no_place_are_refused_before_training(
    count: int, draw: Callable[[int], np.ndarray], reason: str, data: Path, tmp_path: Path
) -> None:
    folder = write_images(tmp_path / "images", count, draw)
    with pytest.raises(DataError, match=reason):
        useg.train(data, tmp_path / "run", settings=SETTINGS, unlabelled=folder)
    assert not (tmp_path / "run").exists()


def test_settings_that_rule_each_other_out_are_refused(data: Path, tmp_path: Path) -> None:
    given = {**SETTINGS, "data.unlabelled": str(data)}
    with pytest.raises(SettingsError, match="set only one of them"):
        useg.train(data, tmp_path / "run", settings=given, unlabelled=data)
    with pytest.raises(DataError, match="is not a folder; give a folder of unlabelled images"):
        useg.train(data, tmp_path / "run", settings=SETTINGS, unlabelled=tmp_path / "nowhere")
    given = {**SETTINGS, "train.augment": False}
    with pytest.raises(SettingsError, match=r"train\.augment = false disables this"):
        useg.train(data, tmp_path / "run", settings=given, unlabelled=data / "images")
