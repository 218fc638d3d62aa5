"""Table of the layers of a network: shapes, parameters, multiply-adds and receptive fields.

Only shapes are computed (torch's ``meta`` device), so a large network at a large size needs no time
and no memory. Receptive fields are exact: the autograd graph is followed from each output back to
the image, so skip connections, poolings and upsampling all count, and no layer needs to declare
anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from useg.errors import UsageError

# The axis that is followed, in (N, C, H, W).
ROW_AXIS = 2


@dataclass(frozen=True)
class Field:
    """The first and last image row on which each row of a feature map depends.

    The image is taken to have no edges.

    Args:
        low: first row, for as many rows of the map as it takes until the pattern repeats.
        high: last row, likewise.
        step: number of image rows by which the pattern has moved when it repeats.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    step: int

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and last image row on which the rows ``first`` to ``last`` depend."""
        period = len(self.low)
        rows = range(first, last + 1)
        return (
            min(self.low[row % period] + self.step * (row // period) for row in rows),
            max(self.high[row % period] + self.step * (row // period) for row in rows),
        )

    @property
    def size(self) -> int:
        """The receptive field: the largest number of image rows on which one row depends."""
        return max(high - low + 1 for low, high in zip(self.low, self.high, strict=True))


INPUT_FIELD = Field((0,), (0,), 1)


def gather(
    source: Field, period: int, step: int, window: Callable[[int], tuple[int, int]]
) -> Field:
    """Return the field of an operation whose row depends on source rows ``window(row)``."""
    spans = [source.span(*window(row)) for row in range(period)]
    return Field(tuple(low for low, _ in spans), tuple(high for _, high in spans), step)


def union(fields: Sequence[Field]) -> Field:
    """Return the field of an operation whose row depends on the same row of each of its sources."""
    period = math.lcm(*(len(field.low) for field in fields))
    spans = [[field.span(row, row) for field in fields] for row in range(period)]
    step = fields[0].step * period // len(fields[0].low)
    return Field(
        tuple(min(low for low, _ in span) for span in spans),
        tuple(max(high for _, high in span) for span in spans),
        step,
    )


def strided(source: Field, kernel: int, stride: int, padding: int, dilation: int) -> Field:
    """Return the field of a convolution or pooling."""
    period = len(source.low) // math.gcd(len(source.low), stride)
    step = source.step * period * stride // len(source.low)
    return gather(
        source,
        period,
        step,
        lambda row: (row * stride - padding, row * stride - padding + (kernel - 1) * dilation),
    )


def transposed(source: Field, kernel: int, stride: int, padding: int) -> Field:
    """Return the field of a transposed convolution."""
    return gather(
        source,
        len(source.low) * stride,
        source.step,
        lambda row: (-((kernel - 1 - row - padding) // stride), (row + padding) // stride),
    )


def bilinear(source: Field, factor: int) -> Field:
    """Return the field of a bilinear upsampling without aligned corners."""
    return gather(
        source,
        len(source.low) * factor,
        source.step,
        lambda row: ((2 * row + 1 - factor) // (2 * factor), (2 * row + factor) // (2 * factor)),
    )


def field_of(x: Tensor, known: dict[Node, Field]) -> Field:
    """Compute the field of a tensor by following its autograd graph back to the image.

    Args:
        x: a tensor that was computed from the image.
        known: fields found earlier, with one for the node of the image; new ones are added.

    Raises:
        UsageError: there is no rule for an operation on the way.
    """
    assert x.grad_fn is not None, "the image must require a gradient, else no graph is recorded"
    field = _follow(x.grad_fn, known)
    assert field is not None, "does not depend on the image"
    return field


def _follow(node: Node, known: dict[Node, Field]) -> Field | None:
    if node in known:
        return known[node]
    sources = [_follow(source, known) for source, _ in node.next_functions if source is not None]
    fields = [field for field in sources if field is not None]
    if fields:
        known[node] = _rule(node, fields)
    return known.get(node)


def _rule(node: Any, fields: list[Field]) -> Field:
    """Return the field of what ``node`` computes from inputs with these fields."""
    source = fields[0]
    match node.name().removesuffix("Backward0").removesuffix("Backward1"):
        case "Convolution" if node._saved_transposed:
            return transposed(
                source,
                node._saved_weight.shape[ROW_AXIS],
                node._saved_stride[0],
                node._saved_padding[0],
            )
        case "Convolution":
            return strided(
                source,
                node._saved_weight.shape[ROW_AXIS],
                node._saved_stride[0],
                node._saved_padding[0],
                node._saved_dilation[0],
            )
        case "MaxPool2DWithIndices":
            return strided(
                source,
                node._saved_kernel_size[0],
                node._saved_stride[0],
                node._saved_padding[0],
                node._saved_dilation[0],
            )
        case "UpsampleNearest2D":
            return transposed(source, int(node._saved_scales_h), int(node._saved_scales_h), 0)
        case "UpsampleBilinear2D":
            return bilinear(source, int(node._saved_scales_h))
        case "ConstantPadNd":
            before = node._saved_pad[2]
            # A negative padding, which crops, is stored as an unsigned number.
            before -= 2**64 * (before >= 2**63)
            return gather(
                source, len(source.low), source.step, lambda row: (row - before, row - before)
            )
        case name if name in PIXELWISE:
            return union(fields)
        case name:
            raise UsageError(
                f"the receptive field of the operation {name!r} is unknown; use convolutions, "
                f"poolings, upsampling and {', '.join(PIXELWISE)} only"
            )


# Operations whose output row depends on the same row of each input.
PIXELWISE = (
    "Add",
    "Alias",
    "Cat",
    "Clone",
    "Div",
    "Hardtanh",
    "Mul",
    "NativeBatchNorm",
    "Relu",
    "Sub",
    "ToCopy",
)


@dataclass(frozen=True)
class Layer:
    """One call of one layer, for a batch of one image.

    Args:
        name: path in the network, such as ``"down.0.2"``.
        kind: type of layer, such as ``"Conv2d 3x3"``.
        shape: (C, H, W) of the output.
        parameters: number of trainable parameters; 0 where the layer is called again.
        macs: multiply-adds of a convolution; a multiply-add is two floating-point operations. 0 for
            all other layers.
        field: receptive field: the number of image rows on which one output row depends, far from
            the edges.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    field: int


@dataclass(frozen=True)
class Description:
    """The layers of a network; ``str()`` is a table.

    Args:
        title: name of the network.
        shape: (C, H, W) of the image.
        layers: all layers in the order in which they are called.
    """

    title: str
    shape: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of the convolutions for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def field(self) -> int:
        """Receptive field of the output, in image rows."""
        return self.layers[-1].field

    def __str__(self) -> str:
        """Return the table."""
        head = ("layer", "kind", "output", "parameters", "million MACs", "field")
        rows = [
            (
                layer.name,
                layer.kind,
                by(layer.shape),
                f"{layer.parameters:,}",
                f"{layer.macs / 1e6:,.1f}" if layer.macs else "",
                str(layer.field),
            )
            for layer in self.layers
        ]
        total = (
            "total",
            "",
            "",
            f"{self.parameters:,}",
            f"{self.macs / 1e6:,.1f}",
            str(self.field),
        )
        widths = [max(len(row[k]) for row in (head, *rows, total)) for k in range(len(head))]
        left = (True, True, False, False, False, False)
        lines = [
            "  ".join(
                f"{cell:<{w}}" if k else f"{cell:>{w}}"
                for cell, w, k in zip(row, widths, left, strict=True)
            )
            for row in (head, *rows, total)
        ]
        rule = "-" * len(lines[0])
        return "\n".join(
            [
                f"{self.title} on an image of {by(self.shape)}",
                rule,
                lines[0],
                rule,
                *lines[1:-1],
                rule,
                lines[-1],
            ]
        )


def by(shape: tuple[int, ...]) -> str:
    """Return ``"3 x 96 x 128"``."""
    return " x ".join(str(side) for side in shape)


def describe(model: nn.Module, size: tuple[int, int]) -> Description:
    """List the layers of a network or ``Segmenter`` for images of one size.

    Args:
        model: any network of useg; it is not changed.
        size: (width, height) of the image in pixels.

    Returns:
        The layers in the order in which they are called; ``str()`` of it is a table.

    Raises:
        DataError: the network does not take this size.

    >>> from useg.models.unet import UNet
    >>> describe(UNet(), (572, 572)).parameters
    31030658
    """
    meta_model = _copy_to_meta(model)
    first = next(module for module in meta_model.modules() if isinstance(module, nn.Conv2d))
    image = torch.zeros(1, first.in_channels, size[1], size[0], device="meta", requires_grad=True)
    x = image.view_as(image)
    assert x.grad_fn is not None
    known: dict[Node, Field] = {x.grad_fn: INPUT_FIELD}
    layers: list[Layer] = []
    counted: set[nn.Module] = set()

    def add_layer(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = (
            0 if module in counted else sum(parameter.numel() for parameter in module.parameters())
        )
        counted.add(module)
        field = field_of(output, known).size
        layers.append(
            Layer(
                name,
                kind_of(module),
                tuple(output.shape[1:]),
                parameters,
                macs_of(module, inputs[0], output),
                field,
            )
        )

    for name, module in meta_model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: add_layer(name, module, inputs, output)
            )
    meta_model(x)
    return Description(type(model).__name__, tuple(image.shape[1:]), tuple(layers))


def largest_feature_map(network: nn.Module, side: int) -> int:
    """Return how many values the largest feature map has, for one square image of this side.

    It loads less than :func:`describe`: on the meta device, PyTorch first imports its compiler,
    which takes more than a second.

    Args:
        network: A network on the meta device. It is moved to the CPU, where all weights are 0.
        side: In pixels.
    """
    sizes: list[int] = []
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()))
    weights = {name: torch.zeros(each.shape) for name, each in network.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    with torch.inference_mode():
        network.eval()(torch.zeros(1, first.in_channels, side, side))
    return max(sizes)


def macs_of(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the multiply-adds of a convolution from ``x`` to ``y``; 0 for another layer."""
    # Each weight is applied to each input pixel.
    if isinstance(module, nn.ConvTranspose2d):
        return x[0, 0].numel() * module.weight.numel()
    # Each weight contributes to each output pixel.
    if isinstance(module, nn.Conv2d):
        return y[0, 0].numel() * module.weight.numel()
    return 0


def kind_of(module: nn.Module) -> str:
    """Return the layer's name with its kernel and stride: ``"Conv2d 3x3 /2"``."""
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        grouped = " grouped" if module.groups > 1 else ""
        return (
            f"{kind} {module.kernel_size[0]}x{module.kernel_size[1]}"
            + (f" /{module.stride[0]}" if module.stride[0] > 1 else "")
            + grouped
        )
    if isinstance(module, nn.MaxPool2d):
        return f"{kind} {module.kernel_size}x{module.kernel_size} /{module.stride}"
    return kind


def _copy_to_meta(model: nn.Module) -> Any:
    """Copy the model to the ``meta`` device, without copying any values first."""
    copies: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to("meta")) for value in model.parameters()
    }
    copies |= {id(value): value.detach().to("meta") for value in model.buffers()}
    return copy.deepcopy(model, copies).eval()
