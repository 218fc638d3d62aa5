"""Distributed training with torch.distributed, started by torchrun; and the choice of the device.

A process that was started alone is the main process of a group of one: everything here then costs
nothing and changes nothing. The second part chooses where to compute and in which precision, and
measures how fast that is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from useg.errors import MachineError

Value = TypeVar("Value")

# A process that hears nothing of the others for so long gives up.
TIMEOUT = timedelta(seconds=60)

# bf16 is used if it is at least this many times as fast as fp32; where it is emulated it is slower.
MIN_BF16_SPEEDUP = 1.3


def is_distributed() -> bool:
    """Return whether this process works in a group with others now."""
    return distributed.is_available() and distributed.is_initialized()


def process_rank() -> int:
    """Return the number of this process in its group, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes in the group."""
    return distributed.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this process writes and prints, also before and after the group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def is_restarted() -> bool:
    """Return whether torchrun has restarted these processes after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started; do nothing in a process started alone.

    Raises:
        MachineError: Another process has died, or did not answer for ``TIMEOUT``.
    """
    if is_distributed() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rendezvous = distributed.rendezvous("env://", timeout=TIMEOUT)
    store, number, count = next(rendezvous)
    # torchrun keeps its store when it restarts processes: without a prefix they would look for
    # each other at the addresses of the dead ones.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=TIMEOUT
    )
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise MachineError(
            "another process of this run no longer answers; start all of them again with --resume"
        ) from error
    finally:
        distributed.destroy_process_group()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process run the block before the others, for example to fill a cache."""
    if is_distributed() and process_rank():
        barrier()
    yield
    if is_distributed() and not process_rank():
        barrier()


def barrier() -> None:
    """Wait until all processes have reached this point."""
    if is_distributed():
        distributed.barrier()


def broadcast_from_main(value: Value) -> Value:
    """Return the value that the main process has."""
    if not is_distributed():
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    result: Value = values[0]
    return result


def any_process(flag: bool) -> bool:
    """Return whether a flag is True in any process."""
    if not is_distributed():
        return flag
    flags = torch.tensor([float(flag)], device=_own_device())
    distributed.all_reduce(flags)
    return bool(flags.item())


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over the processes; no gradients flow through it."""
    if not is_distributed():
        return values
    total = values.to(_own_device())
    distributed.all_reduce(total)
    return total.to(values.device)


class _AllReduceSum(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def all_reduce_with_gradient(values: Tensor) -> Tensor:
    """Return the sum over the processes, through which gradients flow.

    In each process, a loss that is made of such sums is the loss of the whole batch. Its gradients
    come out ``world_size()`` times too large, and ``DistributedDataParallel`` averages them: the
    result is the gradient of the whole batch.
    """
    if not is_distributed():
        return values
    result: Tensor = _AllReduceSum.apply(values)  # type: ignore[no-untyped-call]
    return result


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch normalization over the batches of all processes, on any device.

    ``torch.nn.SyncBatchNorm`` works only on GPUs.
    """

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not (self.training and is_distributed()):
            return super().forward(x)
        # All sums are taken in fp32.
        values = x.float()
        own_count = torch.tensor(float(values.numel() / values.shape[1]), device=x.device)
        count = all_reduce_with_gradient(own_count)
        mean = all_reduce_with_gradient(values.sum((0, 2, 3))) / count
        squares = ((values - mean[:, None, None]) ** 2).sum((0, 2, 3))
        variance = all_reduce_with_gradient(squares) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / (count - 1), share)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def wrap_parallel(model: nn.Module) -> nn.Module:
    """Return a module that trains a model in all processes.

    They start with the main process's weights, and share gradients and batch statistics.
    """
    if not is_distributed():
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _synchronize(child))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else None
    return nn.parallel.DistributedDataParallel(model, devices)


def _synchronize(norm: nn.BatchNorm2d) -> nn.Module:
    if norm.weight.is_cuda:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        return converted
    synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    synced.load_state_dict(norm.state_dict())
    return synced.train(norm.training)


def _own_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def choose_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str | None, device: torch.device) -> torch.dtype | None:
    """Return the autocast type: bfloat16 for ``"bf16"``, None for ``"fp32"``.

    If ``wanted`` is None, bf16 is chosen where it is measured to be faster.
    """
    if wanted is None:
        wanted = "bf16" if measure_bf16_speedup(device) >= MIN_BF16_SPEEDUP else "fp32"
    return torch.bfloat16 if wanted == "bf16" else None


@cache
def measure_bf16_speedup(device: torch.device) -> float:
    """Return how many times as fast a convolution is in bf16 as in fp32.

    It takes some hundredths of a second, once per process.
    """
    x, weight = (
        torch.ones(shape, device=device).to(memory_format=torch.channels_last)
        for shape in ((1, 64, 64, 64), (64, 64, 3, 3))
    )
    x_bf16, weight_bf16 = x.bfloat16(), weight.bfloat16()
    seconds: dict[bool, float] = {}
    with torch.inference_mode():
        # The two take turns, so that other load disturbs both alike. The shortest time counts: the
        # first calls warm up.
        for k in range(12):
            is_bf16 = k % 2 == 1
            inputs = (x_bf16, weight_bf16) if is_bf16 else (x, weight)
            taken = _measure_call(partial(F.conv2d, *inputs, padding=1), device)
            seconds[is_bf16] = min(seconds.get(is_bf16, taken), taken)
    return seconds[False] / seconds[True]


def measure_training_speed(network: nn.Module, x: Tensor, precision: torch.dtype | None) -> float:
    """Return how many pixels per second a network can be trained on.

    Args:
        network: A network on the device of ``x``; only its gradients change.
        x: A batch ``(N, C, H, W)``.
        precision: The autocast type; None is fp32.
    """

    def step() -> None:
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            loss = network(x).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    seconds = min(_measure_call(step, x.device) for _ in range(3))
    return x.shape[0] * x.shape[2] * x.shape[3] / seconds


def _measure_call(function: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
