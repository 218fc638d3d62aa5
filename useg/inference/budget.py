"""A card and a budget of memory -> how many pixels a window of the network may have."""

from __future__ import annotations

import torch

from useg.inference.card import Card
from useg.models.describe import describe
from useg.models.segmenter import build

FEATURE_MAPS, ANSWERS = 7, 2  # live at the same time at the peak, fitted to measured processes (benchmarks/tiles.py)
PROBED = 256  # pixels: the side of the picture for which the network is described


def bytes_per_pixel(card: Card) -> int:
    """Estimate the memory that the network's activations take at their peak, in fp32, for each pixel that it is given.

    Seven times its largest feature map and twice its answer: that is what the last level of the expanding path holds.
    """
    side = card.valid_size(max(PROBED, card.smallest))
    with torch.device("meta"):
        network = build(card.network)
    largest = max(channels * height * width for channels, height, width in (layer.shape for layer in describe(network, (side, side)).layers))
    return int(4 * (FEATURE_MAPS * largest / side**2 + ANSWERS * len(card.classes)))


def window_pixels(card: Card, budget_bytes: int) -> int:
    """Return how many pixels a window may have so that the network's activations fit into ``budget_bytes``."""
    return budget_bytes // bytes_per_pixel(card)
