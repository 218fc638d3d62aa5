"""What TensorBoard shows of a run equals its log, also of one that was interrupted and repeats some steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_loop import Interrupter, log_of, make_set, quick
from test_state import Stopper

from useg.config import read_settings
from useg.errors import UsageError
from useg.training import loop

TAGS = {"loss": "train/loss", "learning_rate": "train/learning rate", "images_per_second": "train/images a second",
        "mean_iou": "validation/mean IoU", "pixel_accuracy": "validation/pixel accuracy"}  # fmt: skip


def test_events_are_those_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    dataset, run = make_set(tmp_path / "data"), tmp_path / "run"
    loop.fit(dataset, run, quick(train__epochs=5, train__tensorboard=True), Stopper(3, monkeypatch))
    monkeypatch.undo()
    settings = read_settings(run / "run.toml")
    loop.fit(
        dataset, run, settings, Interrupter(7), resume=True
    )  # its last state is that of step 4: steps 5 to 7 are done again
    assert loop.fit(dataset, run, settings, resume=True).log[-1]["step"] == 10
    events = reading.EventAccumulator(str(run / "tensorboard")).Reload()
    for key, tag in TAGS.items():
        expected = [
            (row["step"], pytest.approx(row[key], rel=1e-6))
            for row in log_of(run)
            if row.get(key) is not None
        ]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    ious = [[event.value for event in events.Scalars(f"IoU/{name}")] for name in ("ground", "disc")]
    assert [sum(pair) / 2 for pair in zip(*ious, strict=True)] == pytest.approx(
        [event.value for event in events.Scalars(TAGS["mean_iou"])]
    )
    drawn = {path.name: path.read_bytes() for path in (run / "pictures").iterdir()}
    shown = events.Images("validation/pictures")
    assert {
        f"epoch_{event.step // 2:04d}.jpg": event.encoded_image_string for event in shown
    } == drawn
    assert [event.step for event in shown] == [2, 4, 8, 10]


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    loop.fit(make_set(tmp_path / "data"), tmp_path / "run", quick(train__epochs=1))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_missing_package_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        UsageError,
        match=r"the package 'tensorboard', which is not installed; run: pip install 'useg\[tensorboard\]'",
    ):
        loop.fit(make_set(tmp_path / "data"), tmp_path / "run", quick(train__tensorboard=True))
    assert not (tmp_path / "run").exists()
