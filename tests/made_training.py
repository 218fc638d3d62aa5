"""Small data sets and settings to train on, and what training tests read from a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from useg.classes import ClassTable
from useg.config import Settings
from useg.data.dataset import Dataset, Pair
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.images.image_files import write_label, write_picture
from useg.training import loop, trainer
from useg.training.checkpoint import StopRequest


def make_disc_dataset(
    folder: Path, num_train: int = 6, num_val: int = 2, size: tuple[int, int] = (48, 32)
) -> Dataset:
    """Bright discs on dark noise: two classes that a few steps tell apart."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    pairs = []
    for k in range(num_train + num_val):
        pairs.append(
            Pair(folder / f"{k}.png", folder / f"{k}_mask.png", "train" if k < num_train else "val")
        )
        y, x = np.mgrid[: size[1], : size[0]]
        disc = (
            (y - rng.integers(8, size[1] - 8)) ** 2 + (x - rng.integers(8, size[0] - 8)) ** 2 < 64
        ).astype(np.uint8)
        image = rng.integers(0, 60, (size[1], size[0], 3)) + 150 * disc[..., None]
        Image.fromarray(image.astype(np.uint8)).save(pairs[-1].image)
        Image.fromarray(disc).save(pairs[-1].mask)
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("ground", "disc")))


def make_street_dataset(
    folder: Path, num_train: int = 6, num_val: int = 2, size: tuple[int, int] = (48, 32)
) -> Dataset:
    """Whole scenes: a bright road fills the lower part of each image, up to about the middle."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    width, height = size
    pairs = []
    for k in range(num_train + num_val):
        split = "train" if k < num_train else "val"
        pairs.append(Pair(folder / f"{k}.png", folder / f"{k}_mask.png", split))
        road = np.zeros((height, width), np.uint8)
        road[round(height * rng.uniform(0.4, 0.6)) :] = 1
        image = rng.integers(0, 60, (height, width, 3)) + 150 * road[..., None]
        Image.fromarray(image.astype(np.uint8)).save(pairs[-1].image)
        Image.fromarray(road).save(pairs[-1].mask)
    return Dataset(folder, "folders", tuple(pairs), ClassTable(("sky", "road")))


def quick_settings(**changes: Any) -> Settings:
    """Settings of a short run; ``train__steps=9`` changes ``train.steps``."""
    base = {
        "model.width": 4,
        "model.depth": 2,
        "train.epochs": 8,
        "train.batch": 3,
        "train.learning_rate": 1e-2,
        "train.precision": "fp32",
        "train.zoom": (0.6, 1.15),
    }
    return Settings().with_({**base, **dotted(changes)})


def dotted(changes: dict[str, Any]) -> dict[str, Any]:
    """Turn ``train__steps`` into ``train.steps``."""
    return {key.replace("__", "."): value for key, value in changes.items()}


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def read_scores(run: Path) -> list[tuple[float, float]]:
    """Loss and mean IoU of every step: two runs that differ anywhere differ here."""
    return [(row["loss"], row["mean_iou"]) for row in read_log(run)]


def run_results(run: Path) -> tuple[bytes, list[tuple[float, float]], bytes]:
    """What must not depend on interruptions: the model file, the log and the settings."""
    return (
        (run / "model.safetensors").read_bytes(),
        read_scores(run),
        (run / "run.toml").read_bytes(),
    )


class Interrupter(trainer.SilentProgress):
    """Presses Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        if row["step"] == self.at:
            raise KeyboardInterrupt


class StopAfter(trainer.SilentProgress):
    """Asks the run to stop at a step, as a signal would: during its validation, or after it."""

    def __init__(self, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.stop = at, StopRequest()
        monkeypatch.setattr(loop, "interruptible", lambda: nullcontext(self.stop))

    def step(self, row: dict[str, Any], steps: int, seconds_left: float) -> None:
        self.stop.requested = self.stop.requested or row["step"] == self.at

    def validated(self, row: dict[str, Any]) -> None:
        self.step(row, 0, 0.0)


CLASSES = ClassTable(("ground", "disc", "bar"))
SHAPES_SETTINGS = {
    "model.width": 8,
    "model.depth": 2,
    "data.size": "48x32",
    "data.split": "random",
    "train.batch": 4,
    "train.steps": 160,
    "train.precision": "fp32",
    "train.validate_every": 4,
}


def draw_shapes(
    rng: np.random.Generator, *, visible: bool = True, radius: int = 6, bar: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image and its label: a disc and a bar on the ground, each of its own colour."""
    label = np.zeros((32, 48), np.uint8)
    rows, columns = np.mgrid[:32, :48]
    y, x, left = rng.integers(8, 24), rng.integers(8, 40), rng.integers(0, 48 - bar)
    label[:, left : left + bar] = 2
    label[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = 1
    colors = np.array(
        [(90, 90, 90), (190, 120, 60), (60, 120, 200)] if visible else [(90,) * 3] * 3
    )
    noise = rng.normal(0, 12, (32, 48, 3))
    return np.clip(colors[label] + noise, 0, 255).astype(np.uint8), label


def make_shapes(
    folder: Path, seed: int, count: int = 24, classes: ClassTable = CLASSES, **how: Any
) -> Path:
    """A folder of images and masks of shapes."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for k in range(count):
        image, label = draw_shapes(rng, **how)
        write_picture(folder / "images" / f"p{k:03d}.png", image)
        write_label(folder / "masks" / f"p{k:03d}.png", label, classes)
    return folder


def train_shapes(
    folder: Path, seed: int, classes: ClassTable = CLASSES, **changes: Any
) -> loop.Run:
    """Train on a folder of shapes; ``train__steps=9`` changes ``train.steps``."""
    settings = Settings().with_({**SHAPES_SETTINGS, "train.seed": seed, **dotted(changes)})
    dataset = assign_splits(find_dataset(folder, classes), "random")
    return loop.fit(dataset, folder / "run", settings)


def notice_kinds(run: loop.Run) -> set[str]:
    return {notice.kind for notice in run.notices}


@contextmanager
def restored_threads() -> Iterator[None]:
    """Give PyTorch its number of threads back after a block."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
