"""Pictures -> which of them are nearly the same one: frames of a film, resaved or resized copies, a still camera."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.data import cache_folder
from useg.data.cache_folder import make_cache_key
from useg.data.dataset import Dataset, Pair, pair_size, read_label, read_pair_image
from useg.errors import UsageError
from useg.images.files import Image
from useg.machine import in_parallel

SIGNATURE_SIDE = 16


NEAR_DISTANCE = (
    0.93  # correlation of two signatures from which on their pictures count as nearly the same
)


_ROWS = 1024  # signatures that are compared with all others at once


def signature(image: Image) -> NDArray[np.uint8]:
    """Return what a picture looks like from afar: ``(SIDE * SIDE,)`` uint8, 128 on average; all 128 for one that shows nothing.

    The picture's brightness on a grid of 16 x 16 fields, less the mean of each 4 x 4 of them, in units of its own deviation. So exposure
    and size do not matter, and neither does what all pictures of a kind share, such as a bright sky over a dark road.

    Args:
        image: ``(H, W, C)`` of any number type and size.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        fields = np.asarray(
            PIL.Image.fromarray(image).resize(
                (SIGNATURE_SIDE, SIGNATURE_SIDE), PIL.Image.Resampling.BOX
            ),
            np.float32,
        ).mean(2)
    else:
        step = max(1, min(image.shape[:2]) // (8 * SIGNATURE_SIDE))
        grey = np.nan_to_num(image[::step, ::step].astype(np.float32), posinf=0, neginf=0).mean(2)
        fields = np.asarray(
            PIL.Image.fromarray(grey).resize(
                (SIGNATURE_SIDE, SIGNATURE_SIDE), PIL.Image.Resampling.BOX
            )
        )
    blocks = fields.reshape(4, SIGNATURE_SIDE // 4, 4, SIGNATURE_SIDE // 4).astype(np.float64)
    detail = (blocks - blocks.mean((1, 3), keepdims=True)).ravel()
    deviation = detail.std()
    if deviation <= 1e-3 * max(
        1e-30, float(np.abs(fields).max())
    ):  # blank: nothing to remember, and so no twin of other blank ones
        return np.full(SIGNATURE_SIDE * SIGNATURE_SIDE, 128, np.uint8)
    units: NDArray[np.uint8] = np.clip(np.rint(128 + 32 * detail / deviation), 0, 255).astype(
        np.uint8
    )
    return units


def clusters(signatures: NDArray[np.uint8], near: float = NEAR_DISTANCE) -> NDArray[np.intp]:
    """Group pictures: two whose signatures correlate by at least ``near`` are in one group, and so are the twins of twins.

    Measured: copies resaved as JPEG, halved, noisy or cropped by a percent 0.95 and more. On a street drive (CARLA) nine of ten
    neighbouring frames 0.95 and more, frames over 30 apart 0.92 at most. On CamVid, whose frames are a second apart, 0.99 where the car
    stands, 0.8 where it moves, and 0.81 at most between scenes.

    Args:
        signatures: ``(N, S)`` as :func:`signature` gives them.
        near: 1 for copies alone, lower for more.

    Returns:
        ``(N,)``: for each picture, the index of the first one of its group.
    """
    vectors = signatures.astype(np.float32) - 128
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(lengths, 1)  # a blank one stays 0: near to nothing
    groups = np.arange(len(vectors))
    for first in range(0, len(vectors), _ROWS):
        alike = vectors[first : first + _ROWS] @ vectors[: first + _ROWS].T >= near
        for row, others in enumerate(alike, first):
            joined = np.append(groups[: len(others)][others], groups[row])
            if joined.min() < joined.max():
                groups[np.isin(groups, joined)] = joined.min()
    return groups


COMPARED_PIXELS = 500_000_000  # pixels that may be decoded where nobody asked for it: 10 to 20 seconds on two cores


COMPARED_PAIRS = (
    10_000  # pictures; comparing each with each takes a second here, and a minute from 60,000 on
)


_SAMPLE = 20  # sizes that stand for all


def few_enough_to_compare(pairs: Sequence[Pair]) -> bool:
    """Tell whether the pictures are few and small enough to be looked at without being asked; headers of some are read."""
    if len(pairs) > COMPARED_PAIRS:
        return False
    areas = []
    for pair in pairs[:: max(1, len(pairs) // _SAMPLE)]:
        with suppress(UsageError):
            width, height = pair_size(pair)
            areas.append(width * height)
    return not areas or sum(areas) / len(areas) * len(pairs) <= COMPARED_PIXELS


def class_pixels(dataset: Dataset, pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Return the pixels of each class in each label, ``(N, K)``; all 0 for one that cannot be read."""
    num_classes = len(dataset.classes)

    def count(pair: Pair) -> NDArray[np.int64]:
        try:
            return np.bincount(read_label(pair, dataset).ravel(), minlength=256)[:num_classes]
        except UsageError:  # training and inspection will say so
            return np.zeros(num_classes, np.int64)

    return _kept("class pixels", dataset, pairs, count)


def signatures(dataset: Dataset, pairs: Sequence[Pair]) -> NDArray[np.uint8]:
    """Return each picture's :func:`~useg.data.duplicates.signature`, ``(N, S)``; that of a blank picture for one that cannot be read."""

    def look(pair: Pair) -> NDArray[np.uint8]:
        try:
            return signature(read_pair_image(pair))
        except UsageError:
            return np.full(SIGNATURE_SIDE * SIGNATURE_SIDE, 128, np.uint8)

    return _kept("signatures", dataset, pairs, look)


def _kept(
    what: str, dataset: Dataset, pairs: Sequence[Pair], look: Callable[[Pair], NDArray[Any]]
) -> NDArray[Any]:
    """Find the values of all pairs in the cache folder, or look at each pair and keep them there if that can be done."""
    folder = cache_folder.cache_folder()
    made_of = make_cache_key(folder, dataset, pairs, what) if folder else None
    if folder and made_of and (place := cache_folder.find_cached(folder, made_of.key)):
        kept = cache_folder.read_arrays(place / "values.npz")
        if kept and "values" in kept:
            return kept["values"]
        cache_folder.remove_cached(place)
    values = np.stack(list(in_parallel(look, pairs)))
    if folder and made_of:
        with suppress(OSError, UsageError), cache_folder.make_cached(folder, made_of.key) as place:
            cache_folder.write_arrays(place / "values.npz", {"values": values})
            made_of.check()
    return values
