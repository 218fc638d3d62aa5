"""A card -> pictures on which two forms of one model are compared: made street scenes, with the statistics of the training pictures."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
from numpy.typing import NDArray

from useg.data.augment import mirrored
from useg.data.scenes import make_scene
from useg.inference.card import Card
from useg.inference.tiles import Network

SIDE = 512  # a longer side than this is not probed
DIFFERENT = 4  # scenes; a larger batch repeats them


def probe_size(card: Card) -> tuple[int, int]:
    """Return the (width, height) of what the network is given at its working size, at most about ``SIDE`` each way."""
    width, height = card.working.of(*(card.working.frame or (SIDE, SIDE)))
    whole = [card.valid_size(min(side, SIDE) + 2 * card.margin) for side in (width, height)]
    return whole[0], whole[1]


def probe(card: Card, size: tuple[int, int], count: int = 1) -> NDArray[np.generic]:
    """Make raw pixels ``(count, C, height, width)`` as the model takes them; the same each time."""
    width, height = size
    scenes = [_scene(k % DIFFERENT) for k in range(count)]
    rows, columns = mirrored(np.arange(height), 192), mirrored(np.arange(width), 256)
    x = np.stack(scenes)[:, rows][:, :, columns].transpose(0, 3, 1, 2)[:, [band % 3 for band in range(card.channels)]]
    x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    x = x * np.array(card.std, np.float32)[:, None, None] + np.array(card.mean, np.float32)[:, None, None]
    if card.pixels != "float32":
        x = np.clip(np.rint(x), 0, np.iinfo(card.pixels).max)
    pixels: NDArray[np.generic] = x.astype(card.pixels)
    return pixels


@cache
def _scene(seed: int) -> NDArray[np.float32]:
    return make_scene(seed, (256, 192)).image.astype(np.float32)


def agreement(logits: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Return the share of pixels, 0 to 1, that two answers (N, K, h, w) give the same label."""
    return float((logits.argmax(1) == others.argmax(1)).mean())


def seconds_of(network: Network, x: NDArray[np.generic], times: int = 2) -> float:
    """Return the least time that one call takes, after a first call that does not count."""
    network(x)
    least = np.inf
    for _ in range(times):
        began = time.perf_counter()
        network(x)
        least = min(least, time.perf_counter() - began)
    return float(least)
