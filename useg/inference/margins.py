"""A network that sees very far, and a picture -> the smallest margin at which windows answer nearly as one pass does, measured.

The inputs of a pretrained contracting path reach 500 pixels and more beyond a block of output, and windows that keep such a margin
compute most pixels many times. Nearly all of what decides a label is near it, so far less margin gives nearly the same labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from useg.inference import tiles
from useg.inference.tiles import Geometry, Network, Pixels, Window

EXACT = 256  # pixels: of a network that sees no further, windows are right to the bit and cost little
MEASURED = 1024  # pixels: side of what is looked at to find the margin for one that does
LEAST = 0.999  # share of labels that have to be those of one pass
BLOCK = 4  # strides: side of the blocks that are compared; small ones, since all of their pixels are near an edge
PLACES = (0.35, 0.65)  # where in the picture, of its height and of its width
FEWEST = 4  # strides: less margin than this is not tried, since the picture may be blank where it is measured
STEP = 2  # strides


@dataclass(frozen=True)
class Margin:
    """What was measured with one margin.

    Args:
        context: pixels around what is kept of a window.
        agreement: share of labels, 0 to 1, that are those of one pass.
        difference: the largest difference between logits.
    """

    context: int
    agreement: float
    difference: float


def measure(network: Network, image: Pixels, geometry: Geometry, contexts: list[int], least: float = 2.0) -> list[Margin]:
    """Compare small blocks from the midst of an image with one pass over it, for one margin after the other, until one agrees enough.

    Args:
        network: raw pixels in, logits out; with same padding.
        image: (H, W, C), best a few times as large as the largest margin.
        geometry: the network's.
        contexts: the margins, in pixels.
        least: the share of equal labels that is enough; above 1 all margins are tried.
    """
    whole = tiles.predict(image, network, geometry, 0)
    measured: list[Margin] = []
    for context in contexts:
        windows = _blocks(image, replace(geometry, context=context))
        pairs = [(part, whole[:, window.rows.kept, window.columns.kept]) for window, part in tiles.answers(tiles.batches(windows, geometry), network)]
        same = float(np.mean([part.argmax(0) == truth.argmax(0) for part, truth in pairs]))
        measured.append(Margin(context, same, float(max(np.abs(part - truth).max() for part, truth in pairs))))
        if same >= least:
            break
    return measured


def sufficient(network: Network, image: Pixels, geometry: Geometry, least: float = LEAST) -> Margin:
    """Return the smallest margin with which at least that share of labels is that of one pass; arguments as for :func:`measure`."""
    contexts = list(range(FEWEST * geometry.stride, geometry.context, STEP * geometry.stride))
    found = measure(network, image, geometry, contexts, least)
    return found[-1] if found and found[-1].agreement >= least else Margin(geometry.context, 1.0, 0.0)


def affordable(network: Network, image: Pixels, geometry: Geometry, say: Callable[[str], None] = lambda text: None) -> Geometry:
    """Return the network's geometry, with a measured margin where the exact one would have most pixels of a large image computed many times."""
    if geometry.context <= EXACT or max(image.shape[:2]) <= MEASURED:
        return geometry
    margin = sufficient(network, middle(image, MEASURED), geometry)
    say(
        f"windows overlap by {margin.context} pixels on each side, not by the {geometry.context} that this network sees: "
        f"in the middle of the picture {margin.agreement:.2%} of labels are those of one pass"
    )
    return replace(geometry, context=margin.context)


def _blocks(image: Pixels, geometry: Geometry) -> list[Window]:
    side = BLOCK * geometry.stride
    lengths = image.shape[:2]
    sizes = [tiles.block_size(min(side, length), length, geometry) for length in lengths]
    spans = [[_span(place, min(side, length), size, length, geometry) for place in PLACES] for size, length in zip(sizes, lengths, strict=True)]
    return [Window(image, rows, columns, (sizes[0], sizes[1])) for rows, columns in product(*spans)]


def _span(place: float, side: int, size: int, length: int, geometry: Geometry) -> tiles.Span:
    first = min(int(length * place) // geometry.stride * geometry.stride, length - side)
    return tiles.block_span(first, first + side, size, length, geometry)


def middle(image: Pixels, side: int) -> NDArray[np.generic]:
    """Return the middle of an image, at most ``side`` pixels each way."""
    starts = [max(0, (length - side) // 2) for length in image.shape[:2]]
    rows, columns = (slice(start, min(start + side, length)) for start, length in zip(starts, image.shape[:2], strict=True))
    return image[rows, columns]
