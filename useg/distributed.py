"""The processes that train one model together, and what they tell each other: torch.distributed, started by torchrun.

A process that was started alone is the first of one: everything here then costs nothing and changes nothing.
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

from useg.errors import UsageError

Value = TypeVar("Value")


PATIENCE = timedelta(seconds=60)  # after which a process that hears nothing of the others gives up


def is_distributed() -> bool:
    """Tell whether this process works with others now."""
    return distributed.is_available() and distributed.is_initialized()


def process_rank() -> int:
    """Return which of the processes this one is, from 0."""
    return distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Tell whether this process is the one that writes and prints, also when the others have gone their ways."""
    return int(os.environ.get("RANK", "0")) == 0


def is_restarted() -> bool:
    """Tell whether torchrun started these processes again after one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group() -> Iterator[None]:
    """Work with the other processes that torchrun has started, if it has.

    Raises:
        UsageError: one of them has died, or was not heard of for ``PATIENCE``.
    """
    if is_distributed() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, number, count = next(distributed.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    # torchrun keeps its store when it restarts processes: without a prefix they would look for
    # each other at the addresses of the dead ones
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=PATIENCE
    )
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise UsageError(
            "another process of this run does not answer any more; start all of them again with --resume"
        ) from error
    finally:
        distributed.destroy_process_group()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process do something, such as filling a cache, before the others do it."""
    if is_distributed() and process_rank():
        barrier()
    yield
    if is_distributed() and not process_rank():
        barrier()


def barrier() -> None:
    """Wait until all processes are here."""
    if is_distributed():
        distributed.barrier()


def broadcast_from_main(value: Value) -> Value:
    """Return what the first process says."""
    if not is_distributed():
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    result: Value = values[0]
    return result


def any_process(flag: bool) -> bool:
    """Tell whether a flag is up in any process."""
    if not is_distributed():
        return flag
    flags = torch.tensor([float(flag)], device=_device())
    distributed.all_reduce(flags)
    return bool(flags.item())


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over the processes; no gradients flow."""
    if not is_distributed():
        return values
    total = values.to(_device())
    distributed.all_reduce(total)
    return total.to(values.device)


class _Everywhere(torch.autograd.Function):
    """The sum over the processes, whose gradient is the sum of all their gradients."""

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

    A loss made of such sums is that of the whole batch in each process. Its gradients come out ``world`` times too large and are averaged by
    ``DistributedDataParallel``: together, those of the whole batch.
    """
    result: Tensor = _Everywhere.apply(values) if is_distributed() else values  # type: ignore[no-untyped-call]
    return result


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes, on any device; torch's own is for GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not (self.training and is_distributed()):
            return super().forward(x)
        wide = x.float()
        number = all_reduce_with_gradient(
            torch.tensor(float(wide.numel() / wide.shape[1]), device=x.device)
        )
        mean = all_reduce_with_gradient(wide.sum((0, 2, 3))) / number
        variance = (
            all_reduce_with_gradient(((wide - mean[:, None, None]) ** 2).sum((0, 2, 3))) / number
        )
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * number / (number - 1), share)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (wide * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


def wrap_parallel(model: nn.Module) -> nn.Module:
    """Return what computes a model in all processes: they start with the first one's weights, and share gradients and batch statistics."""
    if not is_distributed():
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _synced(child))
    return nn.parallel.DistributedDataParallel(
        model, [torch.cuda.current_device()] if torch.cuda.is_available() else None
    )


def _synced(norm: nn.BatchNorm2d) -> nn.Module:
    if norm.weight.is_cuda:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        return converted
    synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    synced.load_state_dict(norm.state_dict())
    return synced.train(norm.training)


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


BF16_WORTH = 1.3  # times as fast as fp32 must bf16 be; where it is emulated it is slower


def choose_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str | None, device: torch.device) -> torch.dtype | None:
    """Return the type of the autocast: that of ``"bf16"``, or None for ``"fp32"``; by default whichever is faster here."""
    if wanted is None:
        wanted = "bf16" if bf16_gain(device) >= BF16_WORTH else "fp32"
    return torch.bfloat16 if wanted == "bf16" else None


@cache
def bf16_gain(device: torch.device) -> float:
    """Measure how many times as fast a convolution is in bf16 as in fp32; takes some hundredths of a second, once a process."""
    x, weight = (
        torch.ones(shape, device=device).to(memory_format=torch.channels_last)
        for shape in ((1, 64, 64, 64), (64, 64, 3, 3))
    )
    coarse = x.bfloat16(), weight.bfloat16()
    seconds: dict[bool, float] = {}
    with torch.inference_mode():
        # They take turns, so that other load disturbs both. The best time counts: the first warm up.
        for k in range(12):
            inputs = coarse if k % 2 else (x, weight)
            used = _seconds(partial(F.conv2d, *inputs, padding=1), device)
            seconds[k % 2 == 1] = min(seconds.get(k % 2 == 1, used), used)
    return seconds[False] / seconds[True]


def training_rate(network: nn.Module, x: Tensor, precision: torch.dtype | None) -> float:
    """Measure how many pixels a second a network can be trained on.

    Args:
        network: on the device of ``x``; only its gradients change.
        x: a batch ``(N, C, H, W)``.
        precision: of the autocast; None is fp32.
    """

    def step() -> None:
        with torch.autocast(x.device.type, precision, enabled=precision is not None):
            loss = network(x).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    return x.shape[0] * x.shape[2] * x.shape[3] / min(_seconds(step, x.device) for _ in range(3))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
