"""Pairs -> what a split must know of their pixels: each label's classes and each picture's signature; looked for once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data import store
from useg.data.dataset import Dataset, Pair, pair_size, read_label, read_pair_image
from useg.data.fingerprints import mark
from useg.data.parallel import in_parallel
from useg.data.twins import SIDE, signature
from useg.errors import UsageError

AFFORDABLE = 500_000_000  # pixels that may be decoded where nobody asked for it: 10 to 20 seconds on two cores
MANY = 10_000  # pictures; comparing each with each takes a second here, and a minute from 60,000 on
_SAMPLE = 20  # sizes that stand for all


def affordable(pairs: Sequence[Pair]) -> bool:
    """Tell whether the pictures are few and small enough to be looked at without being asked; headers of some are read."""
    if len(pairs) > MANY:
        return False
    areas = []
    for pair in pairs[:: max(1, len(pairs) // _SAMPLE)]:
        with suppress(UsageError):
            width, height = pair_size(pair)
            areas.append(width * height)
    return not areas or sum(areas) / len(areas) * len(pairs) <= AFFORDABLE


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
    """Return each picture's :func:`~useg.data.twins.signature`, ``(N, S)``; that of a blank picture for one that cannot be read."""

    def look(pair: Pair) -> NDArray[np.uint8]:
        try:
            return signature(read_pair_image(pair))
        except UsageError:
            return np.full(SIDE * SIDE, 128, np.uint8)

    return _kept("signatures", dataset, pairs, look)


def _kept(what: str, dataset: Dataset, pairs: Sequence[Pair], look: Callable[[Pair], NDArray[Any]]) -> NDArray[Any]:
    """Find the values of all pairs in the cache folder, or look at each pair and keep them there if that can be done."""
    folder = store.cache_folder()
    made_of = mark(folder, dataset, pairs, what) if folder else None
    if folder and made_of and (place := store.find(folder, made_of.key)):
        kept = store.read_arrays(place / "values.npz")
        if kept and "values" in kept:
            return kept["values"]
        store.remove(place)
    values = np.stack(list(in_parallel(look, pairs)))
    if folder and made_of:
        with suppress(OSError, UsageError), store.making(folder, made_of.key) as place:
            store.write_arrays(place / "values.npz", {"values": values})
            made_of.check()
    return values
