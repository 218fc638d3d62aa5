"""Prediction on a GPU: trusted after a comparison with the CPU, in parts where memory is short."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_inference import make_model_of
from simulated_device import CONVOLUTIONS, SimulatedDevice, accelerator  # noqa: F401

from useg.errors import DeviceWarning, MachineError, UsageError
from useg.inference.predictor import Predictor
from useg.inference.runtimes import label_agreement, load_runtime, make_probe
from useg.models.segmenter import describe_model, save_model


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_model(make_model_of(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def x() -> np.ndarray:
    return make_probe(describe_model(make_model_of()), (64, 48), 4)


def test_the_gpu_predicts_by_default_if_there_is_one(
    stored: Path,
    x: np.ndarray,
    accelerator: torch.device,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with SimulatedDevice() as simulated:
        runtime = load_runtime(stored)
        found = runtime.run(x)
    assert runtime.name == "gpu"
    assert simulated.num_operations > 10
    assert label_agreement(found, load_runtime(stored, "torch").run(x)) > 0.98
    monkeypatch.setenv("USEG_DEVICE", "cpu")
    assert load_runtime(stored).name == "torch"
    with pytest.raises(UsageError, match="the runtime is gpu, but the device is the CPU"):
        load_runtime(stored, "gpu")
    monkeypatch.setenv("USEG_DEVICE", "tpu")
    with pytest.raises(UsageError, match="there is no device 'tpu' here"):
        load_runtime(stored, "torch")


@pytest.mark.parametrize("runtime", [None, "gpu", "auto"])
@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"fails": CONVOLUTIONS}, "a prediction on it fails"),
        ({"wrong": math.nan}, "its logits contain NaN or infinite values"),
        ({"wrong": 2.0}, "its logits differ by .* % from the CPU's"),
    ],
)
def test_the_cpu_predicts_where_a_gpu_fails(
    runtime: str | None,
    faults: dict[str, object],
    said: str,
    stored: Path,
    x: np.ndarray,
    accelerator: torch.device,  # noqa: F811
) -> None:
    with (
        SimulatedDevice(**faults),  # type: ignore[arg-type]
        pytest.warns(DeviceWarning, match=f"cpu:0 is not used, because {said}.*the CPU is used"),
    ):
        loaded = Predictor.load(stored, runtime, num_images=1).runtime
    assert loaded.name != "gpu"
    assert label_agreement(loaded.run(x), load_runtime(stored, "torch").run(x)) > 0.98


def test_a_batch_that_is_too_large_for_a_gpu_is_computed_in_parts(
    stored: Path,
    x: np.ndarray,
    accelerator: torch.device,  # noqa: F811
) -> None:
    with SimulatedDevice() as simulated:
        runtime = load_runtime(stored)
        expected = runtime.run(x)
        one = runtime.run(x[:1])
        # Room for the input and the features of two images, not of four.
        simulated.largest = 2.5 * max(each.nbytes() for each in simulated.storages.values()) / 4
        before = simulated.num_operations
        found = runtime.run(x)
        assert simulated.num_operations > before
        simulated.largest = one.nbytes // 8
        with pytest.raises(MachineError, match="an image of 64x48 pixels needs more memory than"):
            runtime.run(x)
    np.testing.assert_allclose(found, expected, atol=0.05)
