"""Draw a U-Net for one image size as SVG, after figure 1 of the paper.

Every feature map is a box, and every layer an arrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from torch import nn

from useg.errors import ModelError
from useg.models.describe import Description, describe
from useg.models.unet import UNet

# Between two boxes side by side.
BOX_GAP_PIXELS = 52
# Between two levels; holds the size of the upper map, an arrow and the channels of the lower map.
LEVEL_GAP_PIXELS = 74
MAX_BOX_PIXELS = 150
MARGIN_PIXELS = 26


COLOURS = {
    "conv": "#2563eb",
    "pool": "#dc2626",
    "up": "#16a34a",
    "skip": "#6b7280",
    "head": "#0d9488",
}
MAP_COLOUR, COPY_COLOUR, TEXT_COLOUR = "#5b8def", "#ffffff", "#1f2937"
TIMES = "\u00d7"


@dataclass
class Box:
    """A feature map in the drawing: its shape, its level and its left and right edges."""

    shape: tuple[int, int, int]
    level: int
    left: float
    right: float
    # Width of the part at its left that comes through a skip connection.
    copied: float = 0.0

    @property
    def middle(self) -> float:
        """Where the arrow from or to another level ends: the middle of the part not copied."""
        return (self.left + self.copied + self.right) / 2


@dataclass(frozen=True)
class Arrow:
    """A layer in the drawing."""

    kind: str
    source: Box
    target: Box


def drawing(network: nn.Module, size: tuple[int, int]) -> str:
    """Draw a U-Net for images of one size.

    Args:
        network: a ``UNet``, or a ``Segmenter`` with one.
        size: (width, height) of the image in pixels.

    Returns:
        The text of an SVG file.

    Raises:
        ModelError: the network is not a U-Net.
        DataError: the network does not take this size.

    >>> from useg.models.unet import UNet
    >>> drawing(UNet(), (572, 572))[:4]
    '<svg'
    """
    if not any(isinstance(module, UNet) for module in network.modules()):
        raise ModelError(
            f"a {type(network).__name__} cannot be drawn, only the plain U-Net can; "
            "describe() lists the layers of every network"
        )
    description = describe(network, size)
    boxes, arrows = arrange(description)
    return render(description, boxes, arrows)


def arrange(description: Description) -> tuple[list[Box], list[Arrow]]:
    """Place the feature maps from left to right, each level below the one before."""
    C, H, W = description.shape
    box = Box((C, H, W), 0, MARGIN_PIXELS + 30, MARGIN_PIXELS + 30 + box_width(C))
    boxes, arrows = [box], []
    pending_skips: list[Box] = []
    for layer in description.layers:
        C, H, W = layer.shape
        kind = layer.kind.split()[0]
        if kind == "Conv2d":
            target = Box(
                (C, H, W),
                box.level,
                box.right + BOX_GAP_PIXELS,
                box.right + BOX_GAP_PIXELS + box_width(C),
            )
            arrows.append(Arrow("head" if "1x1" in layer.kind else "conv", box, target))
        elif kind == "MaxPool2d":
            pending_skips.append(box)
            target = Box(
                (C, H, W),
                box.level + 1,
                box.middle - box_width(C) / 2,
                box.middle + box_width(C) / 2,
            )
            arrows.append(Arrow("pool", box, target))
        elif kind == "ConvTranspose2d":
            skip = pending_skips.pop()
            copied = box_width(skip.shape[0])
            left = box.middle - box_width(C) / 2 - copied
            target = Box(
                (skip.shape[0] + C, H, W), box.level - 1, left, left + copied + box_width(C), copied
            )
            arrows += [Arrow("up", box, target), Arrow("skip", skip, target)]
        else:
            continue
        boxes.append(target)
        box = target
    return boxes, arrows


def box_width(channels: int) -> float:
    """Return the width of a box; it grows less than in proportion to the channels."""
    return max(5.0, math.pow(channels, 0.55))


def box_height(height: int, tallest: int) -> float:
    """Return the height of a box; it grows less than in proportion to the rows."""
    return MAX_BOX_PIXELS * math.pow(height / tallest, 0.6)


def render(description: Description, boxes: list[Box], arrows: list[Arrow]) -> str:
    """Turn the arrangement into SVG."""
    tallest = boxes[0].shape[1]
    centres: list[float] = []
    y = MARGIN_PIXELS + 62.0
    for level in range(1 + max(box.level for box in boxes)):
        room = max(box_height(box.shape[1], tallest) for box in boxes if box.level == level)
        centres.append(y + room / 2)
        y += room + LEVEL_GAP_PIXELS
    width = max(max(box.right for box in boxes) + MARGIN_PIXELS + 30, 960)
    height = y + 6
    title = (
        f"U-Net: {description.parameters:,} parameters, "
        f"{description.macs / 1e9:,.2f} billion multiply-adds per image"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{TEXT_COLOUR}" role="img">',
        f"<title>{escape(title)}</title>",
        "<defs>" + "".join(_head(kind) for kind in COLOURS) + "</defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#ffffff"/>',
        f'<text x="{MARGIN_PIXELS}" y="{MARGIN_PIXELS}" font-size="17" font-weight="600">'
        f"{escape(title)}</text>",
    ]
    parts += [_arrow(arrow, centres, tallest) for arrow in arrows]
    parts += [_box(box, centres, tallest) for box in boxes]
    parts += [_cut(arrow, centres, tallest) for arrow in arrows if arrow.kind == "skip"]
    for box, word in ((boxes[0], "image"), (boxes[-1], "logits")):
        above = centres[0] - box_height(box.shape[1], tallest) / 2 - 22
        parts.append(
            f'<text x="{(box.left + box.right) / 2:.1f}" y="{above:.1f}" '
            f'text-anchor="middle" font-weight="600">{word}</text>'
        )
    return "\n".join([*parts, _legend(height - 22, description, arrows), "</svg>"])


def _box(box: Box, centres: list[float], tallest: int) -> str:
    C, H, W = box.shape
    centre, tall = centres[box.level], box_height(H, tallest)
    top, middle = centre - tall / 2, (box.left + box.right) / 2
    copy = (
        f'<rect x="{box.left:.1f}" y="{top:.1f}" width="{box.copied:.1f}" height="{tall:.1f}" '
        f'fill="{COPY_COLOUR}" stroke="{MAP_COLOUR}"/>'
        if box.copied
        else ""
    )
    return (
        f'{copy}<rect x="{box.left + box.copied:.1f}" y="{top:.1f}" '
        f'width="{box.right - box.left - box.copied:.1f}" height="{tall:.1f}" '
        f'fill="{MAP_COLOUR}" stroke="{MAP_COLOUR}"/>'
        f'<text x="{middle:.1f}" y="{top - 5:.1f}" text-anchor="middle">{C}</text>'
        f'<text x="{middle:.1f}" y="{top + tall + 13:.1f}" text-anchor="middle" font-size="11" '
        f'fill="{COLOURS["skip"]}">{W}{TIMES}{H}</text>'
    )


def _arrow(arrow: Arrow, centres: list[float], tallest: int) -> str:
    source, target = arrow.source, arrow.target
    above, below = centres[source.level], centres[target.level]
    if arrow.kind == "pool":
        ends = (
            source.middle,
            above + box_height(source.shape[1], tallest) / 2 + 20,
            target.middle,
            below - box_height(target.shape[1], tallest) / 2 - 22,
        )
    elif arrow.kind == "up":
        ends = (
            source.middle,
            above - box_height(source.shape[1], tallest) / 2 - 22,
            target.middle,
            below + box_height(target.shape[1], tallest) / 2 + 20,
        )
    else:
        ends = source.right + 5, above, target.left - 6, below
    x1, y1, x2, y2 = ends
    colour, thick = COLOURS[arrow.kind], 4 if arrow.kind == "skip" else 2.5
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{thick}" '
        f'opacity="{0.45 if arrow.kind == "skip" else 1}" marker-end="url(#{arrow.kind})"/>'
    )


def _cut(arrow: Arrow, centres: list[float], tallest: int) -> str:
    """Return the dashed frame around the part that is copied; nothing if the whole map is."""
    box, tall = arrow.source, box_height(arrow.target.shape[1], tallest)
    if box.shape[1:] == arrow.target.shape[1:]:
        return ""
    return (
        f'<rect x="{box.left:.1f}" y="{centres[box.level] - tall / 2:.1f}" '
        f'width="{box.right - box.left:.1f}" height="{tall:.1f}" '
        f'fill="none" stroke="{COPY_COLOUR}" stroke-width="1.5" stroke-dasharray="4 3"/>'
    )


def _head(kind: str) -> str:
    return (
        f'<marker id="{kind}" viewBox="0 0 10 10" refX="8" refY="5" '
        f'markerWidth="12" markerHeight="12" markerUnits="userSpaceOnUse" '
        f'orient="auto"><path d="M0 0 10 5 0 10z" fill="{COLOURS[kind]}"/></marker>'
    )


def _legend(y: float, description: Description, arrows: list[Arrow]) -> str:
    kinds = [layer.kind for layer in description.layers]
    cropped = any(
        arrow.kind == "skip" and arrow.source.shape[1:] != arrow.target.shape[1:]
        for arrow in arrows
    )
    kernel = next(
        (
            kind.split()[1].replace("x", TIMES)
            for kind in kinds
            if kind.startswith("ConvTranspose2d")
        ),
        "",
    )
    normalised = ", batch normalisation" if "BatchNorm2d" in kinds else ""
    captions = {
        "conv": f"3{TIMES}3 convolution{normalised}, ReLU",
        "skip": "crop and copy" if cropped else "copy",
        "pool": f"2{TIMES}2 max pooling",
        "up": f"{kernel} up-convolution",
        "head": f"1{TIMES}1 convolution",
    }
    x, parts = float(MARGIN_PIXELS), []
    for kind, text in captions.items():
        parts.append(
            f'<line x1="{x:.0f}" y1="{y - 4:.1f}" x2="{x + 26:.0f}" y2="{y - 4:.1f}" '
            f'stroke="{COLOURS[kind]}" stroke-width="2.5" marker-end="url(#{kind})"/>'
        )
        parts.append(f'<text x="{x + 34:.0f}" y="{y:.1f}">{text}</text>')
        x += 56 + 7 * len(text)
    return "".join(parts)
