"""The device that computes: chosen, measured, and compared with the CPU before it is trusted."""

from __future__ import annotations

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from simulated_device import CONVOLUTIONS, DEVICE, SimulatedDevice, accelerator  # noqa: F401

from useg import device
from useg.device import (
    GraphedFunction,
    choose_device,
    fastest_precision,
    find_fault,
    graph_on_gpu,
    in_compute_thread,
)
from useg.errors import MachineError
from useg.models.segmenter import build_network
from useg.models.unet import UNet
from useg.scoring.losses import make_loss

CPU = torch.device("cpu")


def test_the_accelerator_is_chosen_if_there_is_one(
    accelerator: torch.device,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_device() == accelerator
    monkeypatch.setenv("USEG_DEVICE", "cpu")
    assert choose_device() == CPU
    assert choose_device("auto") == accelerator
    monkeypatch.setattr(device, "find_accelerator", lambda: None)
    assert choose_device("auto") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "gpu", "meta", "nonsense:x"])
def test_a_missing_device_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_accelerator", lambda: None)
    with pytest.raises(MachineError, match=f"no device '{name}' here; PyTorch finds cpu; choose"):
        choose_device(name)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({}, None),
        ({"fails": CONVOLUTIONS}, "a training step on it fails .*convolution.* is not implemented"),
        ({"fails": ("aten.max_pool2d_with_indices_backward.default",)}, "step on it fails"),
        ({"wrong": math.nan}, "its logits contain NaN or infinite values"),
        (
            {"wrong": math.nan, "operations": ("aten.convolution_backward.default",)},
            "its gradients contain NaN or infinite values",
        ),
        ({"wrong": 1.1}, r"its logits differ by [\d.]+ % from the CPU's"),
        (
            {"wrong": 1.1, "operations": ("aten.convolution_backward.default",)},
            r"its gradients differ by [\d.]+ % from the CPU's",
        ),
        ({"largest": 1000}, "a training step on it fails .out of memory"),
    ],
)
def test_a_device_is_compared_with_the_cpu(faults: dict[str, object], said: str | None) -> None:
    torch.manual_seed(0)
    network = UNet(3, 2, width=4, depth=2, padding="same", dropout=0.5)
    x, target = torch.randn(2, 3, 16, 16), torch.randint(2, (2, 16, 16))
    before = [parameter.clone() for parameter in network.parameters()]
    with SimulatedDevice(**faults) as simulated:  # type: ignore[arg-type]
        fault = find_fault(network, make_loss("ce + dice"), x, target, torch.bfloat16, DEVICE)
    assert simulated.num_operations > 0
    assert fault is None if said is None else re.search(said, fault or "")
    assert all(map(torch.equal, before, network.parameters())), "the network is not changed"


def test_rounding_that_a_network_magnifies_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = build_network({"encoder": "lite0", "channels": 3, "classes": 5, "width": 16})
    step = network, make_loss("ce"), torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    with SimulatedDevice():
        assert find_fault(*step, torch.bfloat16, DEVICE) is None
        monkeypatch.setattr(device, "MAX_ROUNDING_RATIO", 0.0)
        fault = find_fault(*step, torch.bfloat16, DEVICE)
    assert fault
    assert "differ by" in fault, "the network does magnify it"


@pytest.mark.parametrize(
    ("bf16", "fp16", "chosen"), [(2.0, 0.5, "bf16"), (0.4, 2.0, "fp16"), (0.4, 1.1, "fp32")]
)
def test_gpus_without_bf16_compute_in_fp16(
    bf16: float, fp16: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedups = {torch.bfloat16: bf16, torch.float16: fp16}
    monkeypatch.setattr(device, "measure_speedup", lambda _, dtype: speedups[dtype])
    assert fastest_precision(DEVICE) == chosen
    assert fastest_precision(CPU) == ("bf16" if bf16 > 1 else "fp32")


def test_speeds_are_measured() -> None:
    assert 0.01 < device.measure_speedup(CPU, torch.bfloat16) < 100
    small, large = (
        device.measure_training_speed(
            UNet(3, 2, width=width, padding="same"), torch.ones(1, 3, 64, 64), None
        )
        for width in (2, 32)
    )
    assert small > large > 0
    assert device.choose_precision("fp32", CPU) is None
    assert device.choose_precision("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize(("version", "avoids"), [(90_800, False), (91_900, True), (None, False)])
def test_depthwise_kernels_are_compiled_only_where_it_pays(
    version: int | None, avoids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    gpu = torch.device("cuda")
    assert device.avoids_compiling(gpu) is avoids
    with device.allow_compiling(True):
        assert not device.avoids_compiling(gpu)
        with device.allow_compiling(False):
            assert device.avoids_compiling(gpu) is avoids
    assert device.avoids_compiling(gpu) is avoids
    assert not device.avoids_compiling(CPU)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not device.avoids_compiling(gpu)


def test_one_thread_computes_for_all() -> None:
    def compute(number: int) -> tuple[int, threading.Thread]:
        return 10 // number, threading.current_thread()

    compute_there = in_compute_thread(compute, CPU)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compute_there, [1, 2, 5, 10]))
    assert [value for value, _ in found] == [10, 5, 2, 1]
    assert len({thread for _, thread in found}) == 1
    assert found[0][1] is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        compute_there(0)


def test_a_function_on_the_cpu_is_called_as_it_is() -> None:
    calls = []

    def add_one(x: torch.Tensor) -> list[torch.Tensor | None]:
        calls.append(x)
        return [x + 1]

    function = graph_on_gpu(add_one, CPU)
    for k in range(5):
        assert function(torch.tensor(k))[0] == k + 1
    assert len(calls) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_recorded_function_computes_the_same() -> None:
    gpu = torch.device("cuda")
    layer = torch.nn.Conv2d(3, 5, 3).to(gpu)
    function = GraphedFunction(lambda x: [layer(x)], gpu)
    for k in range(8):
        x = torch.randn(2, 3, 8, 8 + k % 2, device=gpu)
        torch.testing.assert_close(function(x)[0], layer(x))
    assert len(function.recordings) == 2
    reading = GraphedFunction(lambda x: [x * float(x.sum())], gpu)
    for _ in range(4):
        torch.testing.assert_close(reading(x)[0], x * x.sum())
    assert not reading.records


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "float32"])
def test_arrays_of_any_form_arrive_as_they_are(dtype: str) -> None:
    every_other = np.arange(24).astype(dtype).reshape(4, 6)[:, ::2]
    read_only = np.full((2, 1, 3), 7, dtype)
    read_only.flags.writeable = False
    arrays = [every_other, read_only, np.zeros((0, 2), dtype)]
    moved = device.move_arrays(arrays, device.CPU)
    for array, tensor in zip(arrays, moved, strict=True):
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
    # The arrays may change while the device computes.
    every_other[:] = 0
    assert moved[0].numpy().any()
