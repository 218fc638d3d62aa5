"""A question about a network -> the answer by another way: other people's libraries, and pixels
that are no numbers.

torchvision, timm and segmentation_models_pytorch are no dependencies (they want a CUDA build of
torch); where they are installed without theirs, they import once torch is told to pass over
torchvision's own operators, of which none is used here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def oracle(name: str) -> ModuleType:
    """Import torchvision or a library that needs it, or skip the test that asks."""
    register = torch.library.register_fake

    def pass_over(op: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *arguments, **options)

    try:
        torch.library.register_fake = pass_over
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(ImportError):  # what does not need it imports without
                importlib.import_module("torchvision")
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed as an oracle ({error}); pip install --no-deps it")
    finally:
        torch.library.register_fake = register


def rows_reached(
    network: Callable[[Tensor], Tensor], height: int, width: int, rows: range
) -> Tensor:
    """Say which rows of the logits depend on which rows of a picture of one band, by making one row
    after the other not a number.

    Returns:
        A truth value for each row of ``rows`` and each row of the logits.
    """
    reached = []
    for row in rows:
        x = torch.ones(
            1, 1, height, width, dtype=torch.double
        )  # single precision has convolutions that spread it further
        x[:, :, row] = torch.nan
        with torch.no_grad():
            reached.append(network(x).isnan().any(3).any(1)[0])
    return torch.stack(reached)


def context_is_exact(network: Any, height: int) -> bool:
    """Say whether an aligned block of output rows of a network with same padding reaches just as
    far as ``context`` says.
    """
    network = network.double().eval()
    stride, context = network.stride, network.context
    first = height // 2 // stride * stride
    assert first > context + 1
    rows = (
        first - context - 1,
        first - context,
        first + stride - 1 + context,
        first + stride + context,
    )
    reached = [
        rows_reached(network, height, stride, range(row, row + 1))[0, first : first + stride]
        .any()
        .item()
        for row in rows
    ]
    return bool(not reached[0] and (reached[1] or reached[2]) and not reached[3])


def moves_with_the_picture(network: Any, height: int) -> bool:
    """Say whether shifting the picture by ``stride`` shifts the logits of a network with same
    padding, and changes no other inner row.
    """
    network = network.double().eval()
    stride, margin = network.stride, network.context + network.stride
    assert 2 * margin + stride < height
    x = torch.randn(1, 1, height + stride, stride, dtype=torch.double)
    with torch.no_grad():
        here, there = network(x[:, :, :-stride]), network(x[:, :, stride:])
    inner = slice(margin, height - margin)
    return torch.allclose(
        here[:, :, stride:][:, :, inner], there[:, :, : height - stride][:, :, inner], atol=1e-9
    ) and bool(there.std() > 1e-3)


def unreached(network: nn.Module, *sizes: int) -> list[str]:
    """Name the parameters that the gradient of the logits of one picture does not reach."""
    network.train()(torch.randn(2, *sizes)).square().mean().backward()
    return [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
