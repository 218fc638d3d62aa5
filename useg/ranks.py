"""The processes that train one model together, and what they tell each other: torch.distributed, started by torchrun.

A process that was started alone is the first of one: everything here then costs nothing and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from useg.errors import UsageError

T = TypeVar("T")
PATIENCE = timedelta(seconds=60)  # after which a process that hears nothing of the others gives up


def joined() -> bool:
    """Tell whether this process works with others now."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Return which of the processes this one is, from 0."""
    return distributed.get_rank() if joined() else 0


def world() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if joined() else 1


def first() -> bool:
    """Tell whether this process is the one that writes and prints, also when the others have gone their ways."""
    return int(os.environ.get("RANK", "0")) == 0


def restarted() -> bool:
    """Tell whether torchrun started these processes again after one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def together() -> Iterator[None]:
    """Work with the other processes that torchrun has started, if it has.

    Raises:
        UsageError: one of them has died, or was not heard of for ``PATIENCE``.
    """
    if joined() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, number, count = next(distributed.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    # torchrun keeps its store when it starts processes again: without a prefix they would look for each other where the dead ones were
    store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise UsageError("another process of this run does not answer any more; start all of them again with --resume") from error
    finally:
        distributed.destroy_process_group()


@contextmanager
def first_before_the_others() -> Iterator[None]:
    """Let the first process do something, such as filling a cache, before the others do it."""
    if joined() and rank():
        wait()
    yield
    if joined() and not rank():
        wait()


def wait() -> None:
    """Wait until all processes are here."""
    if joined():
        distributed.barrier()


def agreed(value: T) -> T:
    """Return what the first process says."""
    if not joined():
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    result: T = values[0]
    return result


def anywhere(flag: bool) -> bool:
    """Tell whether a flag is up in any process."""
    if not joined():
        return flag
    flags = torch.tensor([float(flag)], device=_device())
    distributed.all_reduce(flags)
    return bool(flags.item())


def summed(values: Tensor) -> Tensor:
    """Return the sum over the processes; no gradients flow."""
    if not joined():
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


def everywhere(values: Tensor) -> Tensor:
    """Return the sum over the processes, through which gradients flow.

    A loss made of such sums is that of the whole batch in each process. Its gradients come out ``world`` times too large and are averaged by
    ``DistributedDataParallel``: together, those of the whole batch.
    """
    result: Tensor = _Everywhere.apply(values) if joined() else values  # type: ignore[no-untyped-call]
    return result


class SyncedNorm(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes, on any device; torch's own is for GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not (self.training and joined()):
            return super().forward(x)
        wide = x.float()
        number = everywhere(torch.tensor(float(wide.numel() / wide.shape[1]), device=x.device))
        mean = everywhere(wide.sum((0, 2, 3))) / number
        variance = everywhere(((wide - mean[:, None, None]) ** 2).sum((0, 2, 3))) / number
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


def parallel(model: nn.Module) -> nn.Module:
    """Return what computes a model in all processes: they start with the first one's weights, and share gradients and batch statistics."""
    if not joined():
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _synced(child))
    return nn.parallel.DistributedDataParallel(model, [torch.cuda.current_device()] if torch.cuda.is_available() else None)


def _synced(norm: nn.BatchNorm2d) -> nn.Module:
    if norm.weight.is_cuda:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(norm)  # type: ignore[no-untyped-call]
        return converted
    synced = SyncedNorm(norm.num_features, norm.eps, norm.momentum)
    synced.load_state_dict(norm.state_dict())
    return synced.train(norm.training)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
