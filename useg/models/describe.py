"""A network and a size of picture -> a table of its layers: shapes, parameters, work, receptive fields.

Nothing is computed but shapes (torch's ``meta`` device), so that a large network at a large size takes no time and no memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from useg.models.fields import PICTURE, Field, field_of


@dataclass(frozen=True)
class Layer:
    """One call of one layer, for a batch of one picture.

    Args:
        name: where it is in the network, such as ``"down.0.2"``.
        kind: what it is, such as ``"Conv2d 3x3"``.
        shape: (C, H, W) of what comes out.
        parameters: numbers that are learned; 0 where the layer is called again.
        macs: multiply-adds of a convolution, one for each weight and place; twice as many floating-point operations. 0 for all else.
        field: receptive field: on how many rows of the picture one row of the output depends, far from the edges.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    field: int


@dataclass(frozen=True)
class Description:
    """What is in a network; ``str()`` is a table.

    Args:
        title: name of the network.
        shape: (C, H, W) of the picture.
        layers: in the order in which they are called.
    """

    title: str
    shape: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolutions for one picture."""
        return sum(layer.macs for layer in self.layers)

    @property
    def field(self) -> int:
        """Receptive field of the output, in rows of the picture."""
        return self.layers[-1].field

    def __str__(self) -> str:
        """Return the table."""
        head = ("layer", "kind", "output", "parameters", "million MACs", "field")
        rows = [
            (layer.name, layer.kind, by(layer.shape), f"{layer.parameters:,}", f"{layer.macs / 1e6:,.1f}" if layer.macs else "", str(layer.field))
            for layer in self.layers
        ]
        total = ("total", "", "", f"{self.parameters:,}", f"{self.macs / 1e6:,.1f}", str(self.field))
        widths = [max(len(row[k]) for row in (head, *rows, total)) for k in range(len(head))]
        left = (True, True, False, False, False, False)
        lines = [
            "  ".join(f"{cell:<{w}}" if k else f"{cell:>{w}}" for cell, w, k in zip(row, widths, left, strict=True)) for row in (head, *rows, total)
        ]
        rule = "-" * len(lines[0])
        return "\n".join([f"{self.title} on a picture of {by(self.shape)}", rule, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def by(shape: tuple[int, ...]) -> str:
    """Return ``"3 x 96 x 128"``."""
    return " x ".join(str(side) for side in shape)


def describe(model: nn.Module, size: tuple[int, int]) -> Description:
    """List the layers of a network, or of a ``Segmenter``, for pictures of one size.

    Args:
        model: any network of useg; it is not changed.
        size: (width, height) of the picture in pixels.

    Raises:
        UsageError: the network cannot take this size.

    >>> from useg.models.unet import UNet
    >>> describe(UNet(), (572, 572)).parameters
    31030658
    """
    shadow = _without_numbers(model)
    first = next(module for module in shadow.modules() if isinstance(module, nn.Conv2d))
    picture = torch.zeros(1, first.in_channels, size[1], size[0], device="meta", requires_grad=True)
    x = picture.view_as(picture)
    assert x.grad_fn is not None
    known: dict[Node, Field] = {x.grad_fn: PICTURE}
    layers: list[Layer] = []
    seen: set[nn.Module] = set()

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = 0 if module in seen else sum(parameter.numel() for parameter in module.parameters())
        seen.add(module)
        field = field_of(output, known).size
        layers.append(Layer(name, kind_of(module), tuple(output.shape[1:]), parameters, macs_of(module, inputs[0], output), field))

    for name, module in shadow.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output, name=name: note(name, module, inputs, output))
    shadow(x)
    return Description(type(model).__name__, tuple(picture.shape[1:]), tuple(layers))


def macs_of(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the multiply-adds of a convolution from ``x`` to ``y``; 0 for another layer."""
    if isinstance(module, nn.ConvTranspose2d):  # each weight meets each pixel that comes in
        return x[0, 0].numel() * module.weight.numel()
    if isinstance(module, nn.Conv2d):  # each weight makes each pixel that goes out
        return y[0, 0].numel() * module.weight.numel()
    return 0


def kind_of(module: nn.Module) -> str:
    """Return the layer's name with its kernel and stride: ``"Conv2d 3x3 /2"``."""
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        grouped = " grouped" if module.groups > 1 else ""
        return f"{kind} {module.kernel_size[0]}x{module.kernel_size[1]}" + (f" /{module.stride[0]}" if module.stride[0] > 1 else "") + grouped
    if isinstance(module, nn.MaxPool2d):
        return f"{kind} {module.kernel_size}x{module.kernel_size} /{module.stride}"
    return kind


def _without_numbers(model: nn.Module) -> Any:
    """Return a copy of the model whose tensors have shapes alone, without copying any number first."""
    shadows: dict[int, Any] = {id(value): nn.Parameter(value.detach().to("meta")) for value in model.parameters()}
    shadows |= {id(value): value.detach().to("meta") for value in model.buffers()}
    return copy.deepcopy(model, shadows).eval()
