"""Training on a device that is not the CPU: trusted after a comparison, with the same results."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_training import (
    Interrupter,
    make_disc_dataset,
    notice_kinds,
    quick_settings,
    read_log,
    read_scores,
    run_results,
)
from simulated_device import CONVOLUTIONS, SimulatedDevice, accelerator  # noqa: F401

from useg.config import read_settings
from useg.scoring.losses import _sum_by_masks, _sum_by_scattering
from useg.scoring.metrics import confusion
from useg.training import loop, plan
from useg.training.trainer import SilentProgress, confusion_of_tensors


class Listener(SilentProgress):
    """Remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def healthy(accelerator: torch.device) -> SimulatedDevice:  # noqa: F811
    return SimulatedDevice()


def test_a_device_trains_as_the_cpu_does(healthy: SimulatedDevice, tmp_path: Path) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    settings = quick_settings(train__epochs=3, model__dropout=0.2)
    listener = Listener()
    with healthy:
        on_device = loop.fit(dataset, tmp_path / "device", settings, listener)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USEG_DEVICE", "cpu")
        on_cpu = loop.fit(dataset, tmp_path / "cpu", settings)
    assert healthy.num_operations > 1000
    assert not [line for line in listener.said if "is not used" in line]
    losses = [[row["loss"] for row in run.log] for run in (on_device, on_cpu)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert [row["step"] for row in on_device.log] == list(range(1, 7))
    assert [row["mean_iou"] is not None for row in on_device.log] == [False, True] * 3
    assert read_log(tmp_path / "device") == list(on_device.log)
    ious = [[row["mean_iou"] for row in run.log[1::2]] for run in (on_device, on_cpu)]
    np.testing.assert_allclose(ious[0], ious[1], rtol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_interrupted_run_on_a_device_resumes_to_the_bit(
    precision: str, healthy: SimulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_disc_dataset(tmp_path / "data")
    settings = quick_settings(train__epochs=3, train__precision=precision, model__dropout=0.2)
    with healthy:
        loop.fit(dataset, tmp_path / "whole", settings)
        with monkeypatch.context() as patch:
            patch.setattr("useg.training.checkpoint.MIN_SAVE_INTERVAL_SECONDS", 0.0)
            patch.setattr("useg.training.checkpoint.MAX_SAVE_SHARE", 1e9)
            loop.fit(dataset, tmp_path / "cut", settings, Interrupter(4))
        stored = read_settings(tmp_path / "cut" / "run.toml")
        assert loop.fit(dataset, tmp_path / "cut", stored, resume=True).log[-1]["step"] == 6
    assert read_scores(tmp_path / "cut") == read_scores(tmp_path / "whole")
    losses = [row["loss"] for row in read_log(tmp_path / "whole")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"fails": CONVOLUTIONS}, "is not implemented for this device"),
        ({"wrong": math.nan}, "its logits contain NaN or infinite values where the CPU's do not"),
        ({"largest": 100}, "out of memory"),
    ],
)
def test_the_cpu_trains_where_a_device_fails(
    faults: dict[str, object],
    said: str,
    accelerator: torch.device,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset, listener = make_disc_dataset(tmp_path / "data"), Listener()
    settings = quick_settings(train__epochs=2)
    with SimulatedDevice(**faults):  # type: ignore[arg-type]
        loop.fit(dataset, tmp_path / "run", settings, listener)
    told = [line for line in listener.said if "is not used" in line]
    assert len(told) == 1
    assert told[0].startswith("cpu:0 is not used, because ")
    assert said in told[0]
    assert told[0].endswith("; the CPU trains instead")
    monkeypatch.setenv("USEG_DEVICE", "cpu")
    loop.fit(dataset, tmp_path / "cpu", settings)
    assert run_results(tmp_path / "run")[1] == run_results(tmp_path / "cpu")[1]


def test_a_failure_while_speed_is_measured_is_a_fault_too(
    accelerator: torch.device,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(network: torch.nn.Module, *_: object) -> float:
        if simulated.watches(next(network.parameters())):
            raise RuntimeError("the driver has crashed\nwith details")
        return 1e9

    monkeypatch.setattr(plan, "measure_training_speed", fail)
    settings = quick_settings(train__epochs=None, train__minutes=1.0, model__width=None)
    with SimulatedDevice() as simulated:
        made = plan.make_plan(settings, make_disc_dataset(tmp_path / "data"))
    assert "because it fails (the driver has crashed); the CPU" in made.fault
    assert made.device == torch.device("cpu")


def test_a_batch_that_is_too_large_for_a_device_is_computed_in_parts(
    accelerator: torch.device,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "PROBE_SIDE", 16)
    dataset = make_disc_dataset(tmp_path / "data")
    # 8 bands of three crops have room, those of six have not.
    with SimulatedDevice(largest=150_000):
        run = loop.fit(dataset, tmp_path / "run", quick_settings(train__epochs=2, train__batch=6))
    assert notice_kinds(run) == {"too little memory"}
    assert len(run.log) == 2


def test_class_sums_on_a_device_equal_those_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(2, 5, 6, 7, generator=generator).softmax(1).requires_grad_()
    index = torch.randint(5, (2, 1, 6, 7), generator=generator)
    counted = torch.rand(2, 1, 6, 7, generator=generator) < 0.8
    gradients = []
    for sums in (_sum_by_scattering, _sum_by_masks):
        hits, truth = sums(probabilities * counted, index, counted)
        probabilities.grad = None
        (hits * torch.arange(5.0)).sum().backward()
        gradients.append((hits, truth, probabilities.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_pixels_on_a_device_are_counted_as_on_the_cpu() -> None:
    rng = np.random.default_rng(0)
    prediction = rng.integers(0, 5, (20, 30), np.uint8)
    label = rng.choice(np.uint8([0, 1, 2, 3, 4, 255]), (20, 30))
    found = confusion_of_tensors(torch.from_numpy(prediction), torch.from_numpy(label), 5)
    assert (found.numpy() == confusion(prediction, label, 5)).all()
