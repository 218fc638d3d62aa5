"""Distributed training with torch.distributed, started by torchrun.

A process that was started alone is the main process of a group of one: everything here then costs
nothing and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from useg.device import choose_device
from useg.errors import MachineError, format_count

Value = TypeVar("Value")

# A process that hears nothing of the others for so long gives up.
TIMEOUT = timedelta(seconds=60)


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
        MachineError: Another process has died, or did not answer for ``TIMEOUT``; or there are
            more processes than GPUs.
    """
    if is_distributed() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    device = choose_device()
    if device.type != "cpu":
        _take_own_accelerator()
    rendezvous = distributed.rendezvous("env://", timeout=TIMEOUT)
    store, number, count = next(rendezvous)
    # torchrun keeps its store when it restarts processes: without a prefix they would look for
    # each other at the addresses of the dead ones.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=TIMEOUT
    )
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise MachineError(
            "another process of this run no longer responds; start all of them again to resume it"
        ) from error
    finally:
        distributed.destroy_process_group()


def _take_own_accelerator() -> None:
    """Compute on the accelerator that has the number of this process on this machine."""
    number, available = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if number >= available:
        raise MachineError(
            f"this machine has {format_count(available, 'GPU')}, but more processes were "
            "started; start one for each GPU, or train on the device cpu"
        )
    torch.accelerator.set_device_index(number)


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
    """Batch normalisation over the batches of all processes, on any device.

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
    device = _own_device()
    devices = None if device.type == "cpu" else [device]
    return nn.parallel.DistributedDataParallel(model, devices)


def _synchronize(norm: nn.BatchNorm2d) -> nn.Module:
    if norm.weight.is_cuda:
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        return convert(norm)
    synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    synced.load_state_dict(norm.state_dict())
    return synced.train(norm.training)


def _own_device() -> torch.device:
    device = choose_device()
    if device.type == "cpu":
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())
