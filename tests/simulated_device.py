"""A device for tests: the CPU under another name, which can fail, give NaN or run out of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from useg import device
from useg.inference import runtimes
from useg.training import batches

DEVICE = torch.device("cpu", 0)
# In inference mode, and otherwise.
CONVOLUTIONS = ("aten.conv2d.default", "aten.convolution.default")


class SimulatedDevice(TorchDispatchMode):
    """Watches tensors that are moved to ``DEVICE``, and all that is computed from them.

    Args:
        fails: Names of the operations that are missing.
        wrong: Factor on the results of ``operations``; NaN gives NaN.
        operations: Names of the operations whose results are wrong.
        largest: Bytes of the largest tensor for which there is memory.
    """

    def __init__(
        self,
        *,
        fails: tuple[str, ...] = (),
        wrong: float = 1.0,
        operations: tuple[str, ...] = CONVOLUTIONS,
        largest: float = float("inf"),
    ) -> None:
        super().__init__()
        self.fails, self.wrong, self.operations, self.largest = fails, wrong, operations, largest
        # By address; the storages are kept, so that no other one gets the address.
        self.storages: dict[int, Any] = {}
        self.num_operations = 0

    def watches(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        moved = kwargs.get("device")
        here = moved == DEVICE if moved is not None else any(map(self.watches, tensors))
        if not here:
            return operation(*args, **kwargs)
        self.num_operations += 1
        if str(operation) in self.fails:
            raise NotImplementedError(f"{operation} is not implemented for this device")
        result = operation(*args, **kwargs)
        if str(operation) in self.operations and self.wrong != 1:
            result = tree_map_only(Tensor, lambda each: each * self.wrong, result)
        for each in tree_flatten(result)[0]:
            if isinstance(each, Tensor):
                if each.nbytes > self.largest:
                    raise torch.OutOfMemoryError(f"out of memory for {each.nbytes} bytes")
                self.watch(each)
        return result


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """PyTorch finds ``DEVICE``."""
    monkeypatch.delenv("USEG_DEVICE", raising=False)
    for module in (device, runtimes):
        monkeypatch.setattr(module, "find_accelerator", lambda: DEVICE)
    monkeypatch.setattr(batches, "free_memory", lambda device: 1 << 30)
    return DEVICE
