"""TensorBoard shows the log of a run, also of one that was interrupted and repeats some steps."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from made_training import (
    Interrupter,
    StopAfter,
    make_disc_dataset,
    quick_settings,
    read_log,
)
from PIL import Image

from useg.config import read_settings
from useg.errors import MissingPackageError
from useg.images.image_files import read_image
from useg.training import loop

TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning rate",
    "images_per_second": "train/images a second",
    "mean_iou": "validation/mean IoU",
    "pixel_accuracy": "validation/pixel accuracy",
}


def test_tensorboard_shows_the_log_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    dataset, run = make_disc_dataset(tmp_path / "data"), tmp_path / "run"
    settings = quick_settings(train__epochs=5, train__tensorboard=True)
    loop.fit(dataset, run, settings, StopAfter(3, monkeypatch))
    monkeypatch.undo()
    settings = read_settings(run / "run.toml")
    # The last checkpoint is that of step 4, so steps 5 to 7 are repeated.
    loop.fit(dataset, run, settings, Interrupter(7), resume=True)
    assert loop.fit(dataset, run, settings, resume=True).log[-1]["step"] == 10
    events = reading.EventAccumulator(str(run / "tensorboard")).Reload()
    for key, tag in TAGS.items():
        expected = [
            (row["step"], pytest.approx(row[key], rel=1e-6))
            for row in read_log(run)
            if row.get(key) is not None
        ]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    ious = [[event.value for event in events.Scalars(f"IoU/{name}")] for name in ("ground", "disc")]
    assert [sum(pair) / 2 for pair in zip(*ious, strict=True)] == pytest.approx(
        [event.value for event in events.Scalars(TAGS["mean_iou"])]
    )
    shown = events.Images("validation/pictures")
    for event in shown:
        drawn = read_image(run / "pictures" / f"epoch_{event.step // 2:04d}.jpg")
        pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert (pixels == drawn).all()
    assert [event.step for event in shown] == [2, 4, 8, 10]


def test_no_events_are_written_by_default(tmp_path: Path) -> None:
    loop.fit(
        make_disc_dataset(tmp_path / "data"), tmp_path / "run", quick_settings(train__epochs=1)
    )
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_missing_tensorboard_is_reported_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = r"'tensorboard', which is not installed; run: pip install 'useg\[tensorboard\]'"
    with pytest.raises(MissingPackageError, match=message):
        loop.fit(
            make_disc_dataset(tmp_path / "data"),
            tmp_path / "run",
            quick_settings(train__tensorboard=True),
        )
    assert not (tmp_path / "run").exists()
