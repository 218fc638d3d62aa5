"""A tensor that a network has computed -> which rows of the picture each of its rows depends on: receptive fields, exactly.

The recorded graph of operations is followed back to the picture, so skip connections, poolings and enlargements all count, and no
layer has to say anything about itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from useg.errors import UsageError

HEIGHT = 2  # the axis that is followed, in (N, C, H, W)


@dataclass(frozen=True)
class Field:
    """The first and last row of the picture on which each row of a feature map depends, as if the picture had no edges.

    Args:
        low: the first, for as many rows as it takes until the pattern repeats.
        high: the last, likewise.
        step: by how many rows of the picture the pattern has moved when it repeats.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    step: int

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and last row of the picture on which the rows ``first`` to ``last`` depend."""
        period = len(self.low)
        rows = range(first, last + 1)
        return (
            min(self.low[row % period] + self.step * (row // period) for row in rows),
            max(self.high[row % period] + self.step * (row // period) for row in rows),
        )

    @property
    def size(self) -> int:
        """The receptive field: on how many rows of the picture one row depends, where that differs between rows the most."""
        return max(high - low + 1 for low, high in zip(self.low, self.high, strict=True))


PICTURE = Field((0,), (0,), 1)


def gather(source: Field, period: int, step: int, window: Callable[[int], tuple[int, int]]) -> Field:
    """Return the field of an operation whose row depends on the rows ``window(row)`` of its source, first and last."""
    spans = [source.span(*window(row)) for row in range(period)]
    return Field(tuple(low for low, _ in spans), tuple(high for _, high in spans), step)


def union(fields: Sequence[Field]) -> Field:
    """Return the field of an operation whose row depends on the same row of each of its sources."""
    period = math.lcm(*(len(field.low) for field in fields))
    spans = [[field.span(row, row) for field in fields] for row in range(period)]
    step = fields[0].step * period // len(fields[0].low)
    return Field(tuple(min(low for low, _ in span) for span in spans), tuple(max(high for _, high in span) for span in spans), step)


def strided(source: Field, kernel: int, stride: int, padding: int, dilation: int) -> Field:
    """Return the field of a convolution or pooling."""
    period = len(source.low) // math.gcd(len(source.low), stride)
    step = source.step * period * stride // len(source.low)
    return gather(source, period, step, lambda row: (row * stride - padding, row * stride - padding + (kernel - 1) * dilation))


def transposed(source: Field, kernel: int, stride: int, padding: int) -> Field:
    """Return the field of a transposed convolution."""
    return gather(source, len(source.low) * stride, source.step, lambda row: (-((kernel - 1 - row - padding) // stride), (row + padding) // stride))


def bilinear(source: Field, factor: int) -> Field:
    """Return the field of a bilinear enlargement with the corners not aligned."""
    return gather(
        source, len(source.low) * factor, source.step, lambda row: ((2 * row + 1 - factor) // (2 * factor), (2 * row + factor) // (2 * factor))
    )


def field_of(x: Tensor, known: dict[Node, Field]) -> Field:
    """Follow ``x`` back to the picture.

    Args:
        x: a tensor that was computed from the picture.
        known: fields found earlier, with one for the picture's own node; more are added.

    Raises:
        UsageError: an operation on the way that has no rule here.
    """
    assert x.grad_fn is not None, "the picture must require a gradient, else no graph is recorded"
    field = _follow(x.grad_fn, known)
    assert field is not None, "does not depend on the picture"
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
    """Return the field of what ``node`` computes from things with these fields."""
    source = fields[0]
    match node.name().removesuffix("Backward0").removesuffix("Backward1"):
        case "Convolution" if node._saved_transposed:
            return transposed(source, node._saved_weight.shape[HEIGHT], node._saved_stride[0], node._saved_padding[0])
        case "Convolution":
            return strided(source, node._saved_weight.shape[HEIGHT], node._saved_stride[0], node._saved_padding[0], node._saved_dilation[0])
        case "MaxPool2DWithIndices":
            return strided(source, node._saved_kernel_size[0], node._saved_stride[0], node._saved_padding[0], node._saved_dilation[0])
        case "UpsampleNearest2D":
            return transposed(source, int(node._saved_scales_h), int(node._saved_scales_h), 0)
        case "UpsampleBilinear2D":
            return bilinear(source, int(node._saved_scales_h))
        case "ConstantPadNd":
            before = node._saved_pad[2]
            before -= 2**64 * (before >= 2**63)  # a negative one, which cuts off, is told without its sign
            return gather(source, len(source.low), source.step, lambda row: (row - before, row - before))
        case name if name in PIXELWISE:
            return union(fields)
        case name:
            raise UsageError(
                f"the receptive field of the operation {name!r} is not known; known are convolutions, poolings, enlargements and {PIXELWISE}"
            )


PIXELWISE = ("Add", "Alias", "Cat", "Clone", "Div", "Hardtanh", "Mul", "NativeBatchNorm", "Relu", "Sub", "ToCopy")
