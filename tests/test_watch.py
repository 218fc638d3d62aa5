"""Faults are planted into runs: each is named for what it is, with what to do, and a run without fault is told nothing."""

import itertools
import os
import re
import time

import numpy as np
import pytest
import torch

from useg.classes import ClassTable
from useg.config import Settings
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.errors import UsageError
from useg.images.files import read_mask, write_label, write_picture
from useg.scoring.losses import make_loss
from useg.training import loop, trainer
from useg.training.batches import Batches
from useg.training.monitor import Monitor, chance_level_loss

SEEDS = range(10) if os.environ.get("USEG_SOAK") == "1" else range(1)
QUICK = {
    "model.width": 8, "model.depth": 2, "data.size": "48x32", "train.batch": 4, "train.steps": 160, "train.precision": "fp32", "data.split": "random",
    "train.validate_every": 4,
}  # fmt: skip
CLASSES = ClassTable(("ground", "disc", "bar"))


def draw(rng, *, visible=True, radius=6, bar=6):
    """A noisy picture and its label: a disc and a bar on the ground, each of its own colour."""
    label = np.zeros((32, 48), np.uint8)
    rows, columns = np.mgrid[:32, :48]
    y, x, left = rng.integers(8, 24), rng.integers(8, 40), rng.integers(0, 48 - bar)
    label[:, left : left + bar] = 2
    label[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = 1
    colors = (
        np.array([(90, 90, 90), (190, 120, 60), (60, 120, 200)]) if visible else np.full((3, 3), 90)
    )
    return np.clip(colors[label] + rng.normal(0, 12, (32, 48, 3)), 0, 255).astype(np.uint8), label


def made(folder, seed, count=24, classes=CLASSES, **how):
    rng = np.random.default_rng(seed)
    for k in range(count):
        image, label = draw(rng, **how)
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_picture(folder / "images" / f"p{k:03d}.png", image)
        write_label(folder / "masks" / f"p{k:03d}.png", label, classes)
    return folder


def trained(folder, seed, classes=CLASSES, **changes):
    settings = Settings().with_(
        {
            **QUICK,
            "train.seed": seed,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )
    dataset = assign_splits(find_dataset(folder, classes), "random")
    return loop.fit(dataset, folder / "run", settings)


def kinds(run):
    return {notice.kind for notice in run.notices}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_healthy_run_is_told_nothing(tmp_path, seed):
    run = trained(made(tmp_path, seed), seed)
    assert run.scores.mean_iou > 0.6
    assert run.notices == ()


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_of_other_pictures_teach_nothing(tmp_path, seed):
    made(tmp_path, seed)
    masks = sorted((tmp_path / "masks").iterdir())
    contents = [path.read_bytes() for path in masks]
    for path, content in zip(masks, contents[7:] + contents[:7], strict=True):
        path.write_bytes(content)
    assert kinds(trained(tmp_path, seed)) == {"no better than a guess"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_learning_rate_that_is_too_high_makes_the_loss_rise(tmp_path, seed):
    assert kinds(
        trained(made(tmp_path, seed), seed, train__learning_rate=30.0, model__normalize=False)
    ) == {"loss rises"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_learning_rate_that_is_too_low_learns_too_slowly(tmp_path, seed):
    assert kinds(trained(made(tmp_path, seed), seed, train__learning_rate=1e-7)) == {
        "learns too slowly"
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loss_that_is_no_number_stops_the_run_and_shows_the_batch(tmp_path, seed):
    with pytest.raises(
        UsageError,
        match=r"the loss of step \d+ is (nan|inf): the learning rate is too high.*; set train.learning_rate to a tenth",
    ):
        trained(made(tmp_path, seed), seed, train__learning_rate=1e30, model__normalize=False)
    assert len(list((tmp_path / "run/pictures").glob("step_*.png"))) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_rare_things_that_plain_cross_entropy_gives_up_leave_all_background(tmp_path, seed):
    made(tmp_path, seed, visible=False, radius=2, bar=0)
    run = trained(tmp_path, seed, train__class_weights="none", train__loss="ce")
    assert kinds(run) == {"one class for all"}
    assert re.match(
        r"(100\.0|99\.[5-9])% of the held-out pixels are called ground, .* too rare for the loss to pay",
        run.notices[0].message,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_class_that_hardly_anything_shows_is_never_learned(tmp_path, seed):
    rng = np.random.default_rng(seed)
    made(tmp_path, seed, classes=ClassTable((*CLASSES.names, "speck")))
    table = ClassTable((*CLASSES.names, "speck"))
    for k in range(24):
        image, label = draw(rng)
        y, x = rng.integers(0, 28, 2)
        label[y : y + 4, x : x + 4] = 3  # looks as what it lies on
        write_picture(tmp_path / "images" / f"p{k:03d}.png", image)
        write_label(tmp_path / "masks" / f"p{k:03d}.png", label, table)
    run = trained(tmp_path, seed, table)
    assert "never learned: speck" in kinds(run)
    assert len(kinds(run)) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_more_classes_than_the_masks_hold_are_the_wrong_number(tmp_path, seed):
    table = ClassTable((*CLASSES.names, *(f"other {k}" for k in range(9))))
    assert kinds(trained(made(tmp_path, seed, classes=table), seed, table, train__steps=20)) == {
        "wrong number of classes"
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_label_outside_the_classes_is_named_before_training(tmp_path, seed):
    table = ClassTable((*CLASSES.names, "ghost"))
    made(tmp_path, seed, classes=table)
    _, label = draw(np.random.default_rng(seed))
    label[3, 9] = 3
    write_label(tmp_path / "masks/p005.png", label, table)
    with pytest.raises(UsageError, match=r"p005.png.* has the value 3 at \(row 3, column 9\).*; "):
        trained(tmp_path, seed, CLASSES)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", SEEDS)
def test_slow_pictures_are_named(tmp_path, seed, monkeypatch):
    at = Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, *which: (time.sleep(0.3), at(self, *which))[1])
    assert "waiting for pictures" in kinds(trained(made(tmp_path, seed), seed, train__steps=25))


@pytest.mark.parametrize(
    "limit",
    [{"train.steps": 25}, {"train.steps": None, "train.minutes": 0.06}],
    ids=["while training", "while measuring"],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_too_little_memory_makes_the_parts_of_a_batch_smaller_and_goes_on(
    tmp_path, seed, limit, monkeypatch
):
    compute = trainer.compute

    def little(model, x, precision):
        if model.training and len(x) > 1:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
            )
        return compute(model, x, precision)

    monkeypatch.setattr(trainer, "compute", little)
    run = trained(made(tmp_path, seed), seed, **limit)
    assert kinds(run) == {"too little memory"}
    assert len(run.log) == run.settings.train.steps


def test_one_crop_that_does_not_fit_ends_the_run_in_a_sentence(tmp_path, monkeypatch):
    def none(model, x, precision):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "compute", none)
    with pytest.raises(
        UsageError,
        match=r"crop\(s\) of 48x32 pixels need more memory than there is.*; choose a smaller data.crop",
    ):
        trained(made(tmp_path, 0), 0)


def test_pictures_learnt_by_heart_are_an_overfit(tmp_path):
    named = 0
    for seed in SEEDS:
        folder = made(tmp_path / str(seed), seed)
        rng = np.random.default_rng(seed)
        for pair in assign_splits(find_dataset(folder, CLASSES), "random").of(
            "train"
        ):  # the same look is a disc here and a bar there
            write_label(
                pair.mask,
                np.array([0, 2, 1] if rng.random() < 0.35 else [0, 1, 2], np.uint8)[
                    read_mask(pair.mask)
                ],
                CLASSES,
            )
        named += "overfit" in kinds(
            trained(
                folder, seed, train__augment=False, train__steps=300, train__schedule="constant"
            )
        )
    assert named >= 0.9 * len(SEEDS)


def test_parts_of_a_batch_give_the_same_step(tmp_path):
    logs = []
    for parts in (1, 2):
        made(tmp_path / str(parts), 0)
        run = trained(
            tmp_path / str(parts),
            0,
            train__accumulate=parts,
            train__steps=6,
            train__loss="ce",
            train__class_weights="none",
            model__normalize=False,
        )
        logs.append([row["loss"] for row in run.log])
    assert np.allclose(*logs, rtol=1e-4)


def test_a_guess_costs_the_entropy_of_the_shares():
    shares = np.array([0.5, 0.25, 0.25])
    target = torch.tensor([0, 0, 1, 2]).reshape(1, 2, 2)
    assert chance_level_loss(make_loss("ce"), target, shares, None) == pytest.approx(
        -(shares * np.log(shares)).sum()
    )


def test_each_is_told_once():
    watch = Monitor(("a", "b"), np.array([0.5, 0.5]), 1.0, 400)
    told = list(
        itertools.chain.from_iterable(
            watch.step(step, 1.0 + 0.01 * step, 1, 0) for step in range(1, 400)
        )
    )
    told += watch.validated(400, np.array([[100, 0], [100, 0]]), 0.25)
    assert [notice.kind for notice in told] == ["loss rises"]


def test_an_overfit_is_a_gap_between_training_and_held_out_pictures():
    watch = Monitor(
        ("a", "b"), np.array([0.5, 0.5]), 1.0, 300
    )  # a guess has a loss of 1 here, and a cross-entropy of log 2
    counts, told = np.array([[90, 10], [10, 90]]), []
    for step in range(1, 301):
        told += watch.step(step, 0.05, 1, 0)
        if step in (230, 260, 290):
            told += watch.validated(
                step, counts, {230: None, 260: 0.19 * np.log(2), 290: 0.21 * np.log(2)}[step]
            )
            assert len(told) == (step == 290)
    assert [notice.kind for notice in told] == ["overfit"]
    assert "5.0% of a guess's, that of the held-out pictures to 21.0%" in told[0].message
    assert told[0].remedy.startswith("give it more training pictures")
