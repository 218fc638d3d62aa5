"""Faults are planted into runs: the monitor names each one, and is silent about healthy runs."""

from __future__ import annotations

import os
import re
import time

import numpy as np
import pytest
import torch
from made_training import (
    CLASSES,
    draw_shapes,
    make_shapes,
    notice_kinds,
    train_shapes,
)

from useg.classes import ClassTable
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.errors import DataError, SettingsError
from useg.images.image_files import read_mask, write_label, write_picture
from useg.scoring.losses import make_loss
from useg.training.batches import Batches
from useg.training.monitor import Monitor, chance_level_loss

SEEDS = range(10) if os.environ.get("USEG_SOAK") == "1" else range(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_healthy_run_has_no_notices(tmp_path, seed):
    run = train_shapes(make_shapes(tmp_path, seed), seed)
    assert run.scores.mean_iou > 0.6
    assert run.notices == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_of_other_images_are_chance_level(tmp_path, seed):
    make_shapes(tmp_path, seed)
    masks = sorted((tmp_path / "masks").iterdir())
    contents = [path.read_bytes() for path in masks]
    for path, content in zip(masks, contents[7:] + contents[:7], strict=True):
        path.write_bytes(content)
    assert notice_kinds(train_shapes(tmp_path, seed)) == {"no better than a guess"}


@pytest.mark.parametrize("seed", SEEDS)
def test_too_high_learning_rate_diverges(tmp_path, seed):
    make_shapes(tmp_path, seed)
    run = train_shapes(tmp_path, seed, train__learning_rate=30.0, model__normalize=False)
    assert notice_kinds(run) == {"loss rises"}


@pytest.mark.parametrize("seed", SEEDS)
def test_too_low_learning_rate_is_named(tmp_path, seed):
    run = train_shapes(make_shapes(tmp_path, seed), seed, train__learning_rate=1e-7)
    assert notice_kinds(run) == {"learns too slowly"}


@pytest.mark.parametrize("seed", SEEDS)
def test_nan_loss_stops_the_run_and_draws_the_batch(tmp_path, seed):
    make_shapes(tmp_path, seed)
    message = (
        r"the loss is (NaN|infinite) at step \d+: the learning rate is too high.*; "
        "set train.learning_rate to a tenth"
    )
    with pytest.raises(SettingsError, match=message):
        train_shapes(tmp_path, seed, train__learning_rate=1e6, model__normalize=False)
    assert len(list((tmp_path / "run/pictures").glob("step_*.png"))) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_rare_classes_ignored_by_cross_entropy_are_a_single_predicted_class(tmp_path, seed):
    make_shapes(tmp_path, seed, visible=False, radius=2, bar=0)
    run = train_shapes(tmp_path, seed, train__class_weights="none", train__loss="ce")
    assert notice_kinds(run) == {"one class for all"}
    message = r"the model predicts ground for (100\.0|99\.[5-9]) % .* so rare that the loss ignores"
    assert re.match(message, run.notices[0].message)


@pytest.mark.parametrize("seed", SEEDS)
def test_invisible_class_is_not_learned(tmp_path, seed):
    rng = np.random.default_rng(seed)
    make_shapes(tmp_path, seed, classes=ClassTable((*CLASSES.names, "speck")))
    table = ClassTable((*CLASSES.names, "speck"))
    for k in range(24):
        image, label = draw_shapes(rng)
        y, x = rng.integers(0, 28, 2)
        # It has the colour of what it lies on.
        label[y : y + 4, x : x + 4] = 3
        write_picture(tmp_path / "images" / f"p{k:03d}.png", image)
        write_label(tmp_path / "masks" / f"p{k:03d}.png", label, table)
    run = train_shapes(tmp_path, seed, table)
    assert "never learned: speck" in notice_kinds(run)
    assert len(notice_kinds(run)) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_missing_from_the_masks_are_named(tmp_path, seed):
    table = ClassTable((*CLASSES.names, *(f"other {k}" for k in range(9))))
    make_shapes(tmp_path, seed, classes=table)
    run = train_shapes(tmp_path, seed, table, train__steps=20)
    assert notice_kinds(run) == {"wrong number of classes"}


@pytest.mark.parametrize(
    ("shares", "is_told"), [((1, 0), True), ((0.9, 0.1), False), ((1,), False)]
)
def test_training_masks_of_one_class_are_told(shares, is_told):
    names = ("background", "foreground")[: len(shares)]
    notices = Monitor(names, np.array(shares), 1.0, 10).check_classes()
    assert [each.kind for each in notices] == ["wrong number of classes"] * is_told


@pytest.mark.parametrize("seed", SEEDS)
def test_label_outside_the_classes_is_refused_before_training(tmp_path, seed):
    table = ClassTable((*CLASSES.names, "ghost"))
    make_shapes(tmp_path, seed, classes=table)
    _, label = draw_shapes(np.random.default_rng(seed))
    label[3, 9] = 3
    write_label(tmp_path / "masks/p005.png", label, table)
    with pytest.raises(DataError, match=r"p005.png.* has the value 3 at \(row 3, column 9\).*; "):
        train_shapes(tmp_path, seed, CLASSES)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", SEEDS)
def test_slow_data_loading_is_named(tmp_path, seed, monkeypatch):
    at = Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, *which: (time.sleep(0.15), at(self, *which))[1])
    run = train_shapes(make_shapes(tmp_path, seed), seed, train__steps=25)
    assert "waiting for pictures" in notice_kinds(run)


def test_a_gpu_that_waits_for_crops_is_not_told_to_use_a_faster_disk() -> None:
    texts = []
    for cuts_on_device in (False, True):
        monitor = Monitor(("a", "b"), np.array([0.5, 0.5]), 1.0, 300, cuts_on_device=cuts_on_device)
        notices = [each for step in range(1, 40) for each in monitor.check_step(step, 0.5, 1, 0.6)]
        assert [notice.kind for notice in notices] == ["waiting for pictures"]
        texts.append(str(notices[0]))
    assert ["disk" in text for text in texts] == [True, False]
    assert "the GPU is partly idle: 60 % of each step is spent waiting" in texts[1]


def test_memorised_labels_are_overfitting(tmp_path):
    settings = {"train__augment": False, "train__steps": 300, "train__schedule": "constant"}
    num_named = 0
    for seed in SEEDS:
        folder = make_shapes(tmp_path / str(seed), seed)
        rng = np.random.default_rng(seed)
        # What looks the same is a disc in some masks and a bar in others.
        for pair in assign_splits(find_dataset(folder, CLASSES), "random").of("train"):
            order = np.array([0, 2, 1] if rng.random() < 0.35 else [0, 1, 2], np.uint8)
            write_label(pair.mask, order[read_mask(pair.mask)], CLASSES)
        num_named += "overfit" in notice_kinds(train_shapes(folder, seed, **settings))
    assert num_named >= 0.9 * len(SEEDS)


def test_chance_level_cross_entropy_is_the_entropy_of_the_shares():
    shares = np.array([0.5, 0.25, 0.25])
    target = torch.tensor([0, 0, 1, 2]).reshape(1, 2, 2)
    assert chance_level_loss(make_loss("ce"), target, shares, None) == pytest.approx(
        -(shares * np.log(shares)).sum()
    )


def test_each_notice_is_returned_once():
    monitor, notices = Monitor(("a", "b"), np.array([0.5, 0.5]), 1.0, 400), []
    for step in range(1, 400):
        notices += monitor.check_step(step, 1.0 + 0.01 * step, 1, 0)
    notices += monitor.check_validation(400, np.array([[100, 0], [100, 0]]), 0.25)
    assert [notice.kind for notice in notices] == ["loss rises"]


def test_overfitting_is_a_gap_between_training_and_validation_loss():
    # The chance-level loss is 1, the chance-level cross-entropy log 2.
    monitor, notices = Monitor(("a", "b"), np.array([0.5, 0.5]), 1.0, 300), []
    counts = np.array([[90, 10], [10, 90]])
    validation_losses = {230: None, 260: 0.19 * np.log(2), 290: 0.21 * np.log(2)}
    for step in range(1, 301):
        notices += monitor.check_step(step, 0.05, 1, 0)
        if step in validation_losses:
            notices += monitor.check_validation(step, counts, validation_losses[step])
            assert len(notices) == (step == 290)
    assert [notice.kind for notice in notices] == ["overfit"]
    assert notices[0].message == (
        "overfitting: the training loss is down to 5.0 % of chance level, the validation loss only "
        "to 21.0 %"
    )
    assert notices[0].remedy.startswith("use more training images")


def test_class_that_no_training_mask_shows_cannot_be_learned():
    monitor = Monitor(("a", "b", "c"), np.array([0.5, 0.5, 0.0]), 1.0, 100)
    counts = np.array([[90, 10, 0], [10, 90, 0], [30, 0, 0]])
    (notice,) = monitor.check_validation(100, counts, None)
    assert notice.kind == "never learned: c"
    assert notice.message == (
        "no training mask shows c, but validation masks do, so the model cannot learn it"
    )


def test_classes_with_one_cause_are_explained_at_once() -> None:
    shares = np.array([0.4, 0.2, 0.15, 0.0005, 0.1, 0.1495])
    monitor = Monitor(("a", "b", "c", "d", "e", "f"), shares, 1.0, 100)
    counts = np.diag([90, 0, 0, 0, 0, 90])
    counts[[1, 2, 3, 4], [0, 0, 1, 1]] = 30
    rare, confused = monitor.check_validation(100, counts, None)
    assert confused.kind == "never learned: b, c, e"
    assert (
        "finds b and c (it predicts a), e (it predicts b): at this image size" in confused.message
    )
    assert rare.message.endswith(
        "finds d (it predicts b): only 0.05 % of the training pixels show it"
    )
    assert not monitor.check_validation(100, counts, None)
