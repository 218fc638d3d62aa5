"""Images -> which of them are near duplicates: the one definition that splits and checks share.

Near duplicates are neighbouring frames of a video, copies that were resized or saved as JPEG, and
the images of a camera that stands still. Each image gets a signature of 256 bytes; two images are
near duplicates if their signatures correlate by at least ``NEAR_DUPLICATE_CORRELATION``.

Measured: copies saved as JPEG, halved, with noise or cropped by a percent correlate by 0.95 and
more. On a street drive (CARLA) nine of ten neighbouring frames reach 0.95, and frames more than 30
apart at most 0.92. On CamVid, whose frames are a second apart, neighbours reach 0.99 while the car
stands and 0.8 while it moves; images of different scenes reach at most 0.81.

Crops and overlapping tiles have other signatures, but equal pixels. They are found by landmarks:
patches whose own pixels choose them, so a crop has the same ones as the image.

Signatures and the class pixels of masks are computed once and kept in the cache folder.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.classes import count_pixels
from useg.data import cache_folder
from useg.data.cache_folder import make_cache_key
from useg.data.dataset import Dataset, Pair, read_label, read_pair_image, read_pair_size
from useg.errors import UsageError
from useg.files import find_cache_folder
from useg.images.image_files import Image
from useg.machine import in_parallel

# Two images are near duplicates from this correlation of their signatures on.
NEAR_DUPLICATE_CORRELATION = 0.93

# Near duplicates are reported from this correlation of their signatures on. A split may keep more
# images together than needed, but a finding should be right, and the definition's 0.93 is too low
# for that: a quarter of all pairs of different retinas (CHASE DB1) reach it, the highest 0.978, and
# different blood cells reach 0.972. Copies that are saved as JPEG, resized, darkened or noisy reach
# 0.985. Copies that are moved by several pixels may be missed: two pairs of blood cells that are
# the same cell have 0.94 and 0.97. The value was chosen on these data sets.
MIN_REPORTED_CORRELATION = 0.98

# A signature has 16 x 16 cells. Their mean is 128 and their standard deviation is 32.
SIGNATURE_SIDE = 16
_SIGNATURE_MEAN = 128
_SIGNATURE_DEVIATION = 32
# The mean of each block of 4 x 4 cells is removed.
_BLOCK_CELLS = 4

# Rows of the correlation matrix that are in memory at once.
_CORRELATED_ROWS = 1024

# The ways in which an image may be rotated or mirrored, for arrays ``(..., H, W)``. The first four
# exchange width and height. A name continues the sentence "the mask is ...".
ORIENTATIONS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "transposed": lambda pixels: pixels.mT,
    "rotated by 90 degrees": lambda pixels: np.rot90(pixels, -1, (-2, -1)),
    "rotated by 270 degrees": lambda pixels: np.rot90(pixels, 1, (-2, -1)),
    "transposed and rotated by 180 degrees": lambda pixels: np.rot90(pixels, 2, (-2, -1)).mT,
    "rotated by 180 degrees": lambda pixels: np.rot90(pixels, 2, (-2, -1)),
    "mirrored left to right": lambda pixels: pixels[..., ::-1],
    "mirrored top to bottom": lambda pixels: pixels[..., ::-1, :],
}

# Landmarks are patches of this side, one of 64 of all. At most this many, with the lowest hashes,
# are kept.
_LANDMARK_SIDE = 8
_NUM_LANDMARKS = 256
# Patches with a smaller range of values, such as parts of a plain area, are not landmarks.
_MIN_LANDMARK_RANGE = 12
# Two images overlap if at least this many landmarks, and this share of those in the smaller
# overlap, agree in one displacement.
_MIN_SHARED_LANDMARKS = 8
_MIN_SHARED_SHARE = 0.25
# Patches that more images share are logos or the like.
_MAX_SHARING_IMAGES = 16
# Odd weights of eight neighbours, whose sum is 0 (mod 256), so that no plain row is chosen.
_ROW_WEIGHTS = (37, 91, 173, 57, 203, 121, 231, 111)
_ROW_MASK, _ROW_CHOSEN = 63, 13
_PATCH_WEIGHTS = np.random.default_rng(0).integers(0, 1 << 63, _LANDMARK_SIDE, np.uint64) | 1

# At most this much is decoded unless the user asks for it: 10 to 20 seconds on two cores.
MAX_COMPARED_PIXELS = 500_000_000

# Comparing all pairs of this many images takes a second, and of 60,000 a minute.
MAX_COMPARED_PAIRS = 10_000

# Image headers from which the number of pixels of a whole data set is estimated.
_SAMPLED_SIZES = 20


def compute_signature(image: Image) -> NDArray[np.uint8]:
    """Return a signature that near duplicates share: ``(256,)`` uint8, or 128 everywhere if blank.

    It is the image's brightness on a grid of 16 x 16 cells, without the mean of each 4 x 4 block,
    in units of its own standard deviation. So exposure and size do not matter, and neither does
    what all images of a kind share, such as a bright sky over a dark road.

    Args:
        image: ``(H, W, C)`` of any number type and size.
    """
    cells = _average_cells(image)
    blocks_per_side = SIGNATURE_SIDE // _BLOCK_CELLS
    blocks = cells.reshape(blocks_per_side, _BLOCK_CELLS, blocks_per_side, _BLOCK_CELLS)
    blocks = blocks.astype(np.float64)
    means = np.add.reduce(blocks, (1, 3), keepdims=True) / _BLOCK_CELLS**2
    detail = (blocks - means).ravel()
    deviation = detail.std()
    if deviation <= 1e-3 * max(1e-30, float(np.abs(cells).max())):
        return _blank_signature()
    levels = np.rint(_SIGNATURE_MEAN + _SIGNATURE_DEVIATION * detail / deviation)
    signature: NDArray[np.uint8] = np.clip(levels, 0, 255).astype(np.uint8)
    return signature


def _average_cells(image: Image) -> NDArray[np.float32]:
    """Return the mean brightness of each cell, ``(16, 16)`` float32."""
    size = (SIGNATURE_SIDE, SIGNATURE_SIDE)
    if image.dtype == np.uint8 and image.shape[2] == 3:
        small = PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BOX)
        cells: NDArray[np.float32] = np.add.reduce(np.asarray(small, np.float32), 2) / 3
        return cells
    step = max(1, min(image.shape[:2]) // (8 * SIGNATURE_SIDE))
    grey = np.nan_to_num(image[::step, ::step].astype(np.float32), posinf=0, neginf=0).mean(2)
    return np.asarray(PIL.Image.fromarray(grey).resize(size, PIL.Image.Resampling.BOX))


def _blank_signature() -> NDArray[np.uint8]:
    """Return the signature of a blank image; it is a near duplicate of none, not even of itself."""
    return np.full(SIGNATURE_SIDE * SIGNATURE_SIDE, _SIGNATURE_MEAN, np.uint8)


def normalize_signatures(signatures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return signatures ``(N, 256)`` as vectors whose dot products are their correlations.

    A blank image's vector is 0, so that it correlates with nothing.
    """
    vectors = signatures.astype(np.float32) - _SIGNATURE_MEAN
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)
    return vectors


def find_near_duplicates(
    signatures: NDArray[np.uint8], least: float
) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.float32]]]:
    """Yield each image that has near duplicates before it.

    Args:
        signatures: ``(N, 256)``, as :func:`compute_signature` returns them.
        least: The lowest correlation of near duplicates.

    Yields:
        The image's index, the indices of its earlier near duplicates in ascending order, and their
        correlations with it.
    """
    vectors = normalize_signatures(signatures)
    for start in range(0, len(vectors), _CORRELATED_ROWS):
        stop = start + _CORRELATED_ROWS
        correlations = vectors[start:stop] @ vectors[:stop].T
        for index, row in enumerate(correlations, start):
            earlier = np.flatnonzero(row[:index] >= least)
            if len(earlier):
                yield index, earlier, row[earlier]


def group_near_duplicates(signatures: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Group images: near duplicates are in one group, and so are the near duplicates of these.

    Args:
        signatures: ``(N, 256)``, as :func:`compute_signature` returns them.

    Returns:
        ``(N,)``: for each image, the index of the first one of its group.
    """
    groups = np.arange(len(signatures))
    for index, earlier, _ in find_near_duplicates(signatures, NEAR_DUPLICATE_CORRELATION):
        joined = np.append(groups[earlier], groups[index])
        if joined.min() < joined.max():
            groups[np.isin(groups, joined)] = joined.min()
    return groups


def find_turned_copies(
    signatures: NDArray[np.uint8], others: NDArray[np.uint8], least: float
) -> list[tuple[int, int, float]]:
    """Return which images are mirrored or rotated copies of others.

    Args:
        signatures: ``(N, 256)``, as :func:`compute_signature` returns them.
        others: ``(M, 256)``, likewise.
        least: The lowest correlation of copies.

    Returns:
        The index among ``signatures``, that among ``others``, and the correlation of the signatures
        when one is turned, in the ``ORIENTATIONS``.
    """
    grids = signatures.reshape(-1, SIGNATURE_SIDE, SIGNATURE_SIDE)
    vectors = normalize_signatures(others)
    found: dict[tuple[int, int], float] = {}
    for turn in ORIENTATIONS.values():
        turned = turn(grids).reshape(len(grids), -1)
        correlations = normalize_signatures(turned) @ vectors.T
        for k, n in np.argwhere(correlations >= least).tolist():
            found[k, n] = max(found.get((k, n), 0.0), float(correlations[k, n]))
    return [(k, n, correlation) for (k, n), correlation in sorted(found.items())]


# The landmarks of an image (N, 3) uint64, N up to 256: hash, column and row, the lowest hash first.
Landmarks = NDArray[np.uint64]


def find_landmarks(image: Image) -> Landmarks:
    """Return landmarks of an image ``(H, W, C)``: the same in every crop that has their pixels.

    Only the middle band is used. Patches that occur twice in an image are not landmarks.
    """
    band = np.ascontiguousarray(image[..., image.shape[2] // 2])
    if band.dtype.kind == "f":
        band = np.nan_to_num(band, posinf=0, neginf=0).astype(np.float32).view(np.uint32) >> 12
    pixels = (band ^ (band >> 8) if band.dtype.itemsize > 1 else band).astype(np.uint8)
    H, W = (size - _LANDMARK_SIDE + 1 for size in pixels.shape)
    if min(H, W) < 1:
        return np.zeros((0, 3), np.uint64)
    sums = np.zeros((H, W), np.uint8)
    for k, weight in enumerate(_ROW_WEIGHTS):
        sums += pixels[:H, k : k + W] * np.uint8(weight)
    rows, columns = np.divmod(np.flatnonzero(sums.ravel() & _ROW_MASK == _ROW_CHOSEN), W)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (_LANDMARK_SIDE, _LANDMARK_SIDE))
    # Eight pixels at once are one number.
    numbers = windows[rows, columns].reshape(len(rows), _LANDMARK_SIDE**2).view(np.uint64)
    hashes = ((numbers ^ (numbers >> np.uint64(29))) * _PATCH_WEIGHTS).sum(1)
    low = np.argsort(hashes)[: 4 * _NUM_LANDMARKS]
    is_varied = np.ptp(numbers[low].view(np.uint8), axis=1) >= _MIN_LANDMARK_RANGE
    kept, first, counts = np.unique(hashes[low[is_varied]], return_index=True, return_counts=True)
    is_unique = np.flatnonzero(counts == 1)[:_NUM_LANDMARKS]
    places = low[is_varied][first[is_unique]]
    return np.stack([kept[is_unique], columns[places], rows[places]], axis=1).astype(np.uint64)


def find_overlaps(
    landmarks: Sequence[Landmarks], others: Sequence[Landmarks]
) -> list[tuple[int, int, float]]:
    """Return which images show pixels of which others, apart from pixels at the same places.

    Returns:
        The index among ``landmarks``, the index among ``others``, and the share of the landmarks of
        the smaller one that both have.
    """
    owners: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for k, found in enumerate(others):
        for value, x, y in found.tolist():
            owners[value].append((k, x, y))
    overlaps = []
    for n, found in enumerate(landmarks):
        agreeing: Counter[tuple[int, int, int]] = Counter()
        for value, x, y in found.tolist():
            places = owners.get(value, ())
            if len(places) <= _MAX_SHARING_IMAGES:
                agreeing.update((k, x - other_x, y - other_y) for k, other_x, other_y in places)
        for (k, dx, dy), count in agreeing.items():
            if count < _MIN_SHARED_LANDMARKS or dx == dy == 0:
                continue
            # Beyond the last hash that one image has kept, the other's cannot be found in it.
            last = min(found[-1, 0], others[k][-1, 0])
            fewest = min(int((each[:, 0] <= last).sum()) for each in (found, others[k]))
            if count >= _MIN_SHARED_SHARE * fewest:
                overlaps.append((n, k, count / fewest))
    return overlaps


def is_quick_to_compare(pairs: Sequence[Pair]) -> bool:
    """Return whether the images are so few and small that they can be decoded by default.

    The number of pixels is estimated from some of the images' headers.
    """
    if len(pairs) > MAX_COMPARED_PAIRS:
        return False
    areas = []
    for pair in pairs[:: max(1, len(pairs) // _SAMPLED_SIZES)]:
        with suppress(UsageError):
            width, height = read_pair_size(pair)
            areas.append(width * height)
    return not areas or sum(areas) / len(areas) * len(pairs) <= MAX_COMPARED_PIXELS


def count_class_pixels(dataset: Dataset, pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Return the number of pixels of each class in each label, ``(N, K)``.

    A label that cannot be read counts as 0 everywhere: training and inspection report it.
    """
    num_classes = len(dataset.classes)

    def count(pair: Pair) -> NDArray[np.int64]:
        try:
            return count_pixels(read_label(pair, dataset), num_classes)
        except UsageError:
            return np.zeros(num_classes, np.int64)

    return _compute_once("class pixels", dataset, pairs, count)


def compute_signatures(dataset: Dataset, pairs: Sequence[Pair]) -> NDArray[np.uint8]:
    """Return the :func:`compute_signature` of each image, ``(N, 256)``.

    An image that cannot be read gets the signature of a blank one.
    """

    def compute(pair: Pair) -> NDArray[np.uint8]:
        try:
            return compute_signature(read_pair_image(pair))
        except UsageError:
            return _blank_signature()

    return _compute_once("signatures", dataset, pairs, compute)


def _compute_once(
    what: str, dataset: Dataset, pairs: Sequence[Pair], compute: Callable[[Pair], NDArray[Any]]
) -> NDArray[Any]:
    """Return the values of all pairs from the cache folder, or compute them and keep them there.

    The cache is found under ``what``: choose another name if the values come to mean another thing.
    """
    folder = find_cache_folder()
    key = make_cache_key(folder, dataset, pairs, what) if folder else None
    if folder and key and (place := cache_folder.find_cached(folder, key.key)):
        kept = cache_folder.read_arrays(place / "values.npz")
        if kept and "values" in kept:
            return kept["values"]
        cache_folder.remove_cached(place)
    values = np.stack(list(in_parallel(compute, pairs)))
    if folder and key:
        with suppress(OSError, UsageError), cache_folder.create_cached(folder, key.key) as place:
            cache_folder.write_arrays(place / "values.npz", {"values": values})
            key.check()
    return values
