"""Batches, optimiser and schedule."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from useg.config import TrainSettings
from useg.data.cache import CachedSample
from useg.models.unet import UNet
from useg.training.batches import Batches, Resident
from useg.training.schedule import Schedule, make_optimizer, rate_factor


def batches(flips: str | None, margin: int = 0) -> Batches:
    samples = []
    for k in range(5):
        label = np.full((12, 16), k, np.uint8)
        samples.append(CachedSample(np.repeat(label[..., None], 3, 2), label, None))
    return Batches(
        samples,
        (16, 12),
        2,
        0,
        flips,
        np.zeros(3, np.float32),
        np.ones(3, np.float32),
        margin,
        torch.device("cpu"),
    )


def test_an_epoch_visits_every_sample_once_in_a_new_order() -> None:
    seen = [
        int(label[0, 0]) for _, target in islice(batches(None).stream(0), 5) for label in target
    ]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]


def test_a_batch_is_a_function_of_its_number_alone() -> None:
    streamed = list(islice(batches("all", 4).stream(0), 4))
    x, target = batches("all", 4).at(3)
    assert torch.equal(streamed[3][0], x)
    assert torch.equal(streamed[3][1], target)
    assert (x.shape, target.shape) == ((2, 3, 20, 24), (2, 12, 16))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_without_changes_image_and_label_are_the_samples() -> None:
    x, target = batches(None).at(0)
    assert torch.equal(x[:, 0].long(), target)


@pytest.mark.parametrize("pixels", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("flips", [None, "horizontal", "all"])
def test_crops_cut_on_the_device_are_those_cut_on_the_processor(
    pixels: str, flips: str | None
) -> None:
    rng = np.random.default_rng(0)
    shapes = [(12, 16), (30, 9), (5, 40), (12, 16), (64, 48)]
    samples = [
        CachedSample((rng.random((*shape, 4)) * 250).astype(pixels), rng.integers(0, 9, shape, np.uint8), None) for shape in shapes
    ]  # fmt: skip
    given = (
        samples,
        (16, 12),
        5,
        0,
        flips,
        np.full(4, 120, np.float32),
        np.full(4, 40, np.float32),
        6,
        torch.device("cpu"),
    )
    for number in range(20):
        there, here = (
            Batches(*given, where).at(number)
            for where in (Resident(samples, torch.device("cpu")), None)
        )
        torch.testing.assert_close(there[0], here[0], rtol=1e-5, atol=1e-3)
        assert torch.equal(there[1], here[1])
        assert there[0].stride() == here[0].stride()


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_schedules_start_peak_and_end_where_they_should(schedule: str) -> None:
    factors = [rate_factor(schedule, step, 200) for step in range(200)]
    assert max(factors) == pytest.approx(1)
    assert min(factors) >= 0
    if schedule == "constant":
        assert set(factors) == {1.0}
        return
    assert factors[-1] < 0.001
    assert factors.index(max(factors)) == (30 if schedule == "onecycle" else 0)


def test_pretrained_weights_learn_more_slowly_and_only_matrices_decay() -> None:
    network = UNet(1, 2, width=2, depth=1, normalize=True)
    optimizer, _ = make_optimizer(
        network,
        network.down,
        TrainSettings(learning_rate=0.1, encoder_rate=0.5, schedule="constant"),
        Schedule(10),
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(network.parameters())
    )
    slow = {id(parameter) for parameter in network.down.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.05 if id(parameter) in slow else 0.1)
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1)


def test_the_first_batches_show_everything_at_half_the_size() -> None:
    ramp = np.tile(np.arange(0, 128, 2, dtype=np.uint8), (32, 1))
    sample = CachedSample(ramp[..., None], ramp, None)
    numbers = np.zeros(1, np.float32)
    given = ([sample], (64, 32), 1, 0, None, numbers, numbers + 1, 0, torch.device("cpu"))
    two = Batches(*given, coarse_size=(32, 16))
    assert [tuple(x.shape) for x, _ in islice(two.stream(0, lambda number: number < 2), 4)] == [
        (1, 1, 16, 32),
        (1, 1, 16, 32),
        (1, 1, 32, 64),
        (1, 1, 32, 64),
    ]
    x, target = two.at(1, coarse=True)
    torch.testing.assert_close(
        x[0, 0, 0], torch.arange(1.0, 128, 4)
    )  # the mean of two neighbours each
    assert (target[0] - x[0, 0]).abs().max() <= 1
    assert torch.equal(two.at(2)[0], Batches(*given).at(2)[0])
    flipped = Batches([sample], (64, 32), 1, 0, "all", *given[5:], coarse_size=(32, 16))
    whole = Batches([sample], (64, 32), 1, 0, "all", *given[5:])
    for number in range(9):  # the same place, whatever the size
        torch.testing.assert_close(
            flipped.at(number, coarse=True)[0].mean(), whole.at(number)[0].mean(), rtol=0, atol=3
        )
