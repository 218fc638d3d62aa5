"""Any image <-> windows that a network can take, such that the windows' answer equals the whole image's (numpy only).

A U-Net is shift-equivariant only in steps of its pooling stride, so windows start at multiples of ``stride``. Of each window
only those logits are kept that no artificial edge has reached: nothing is blended, and there is no seam to hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from useg.models.geometry import Geometry, reflect_indices, round_up

LogitsFunction = Callable[
    [NDArray[np.generic]], NDArray[np.float32]
]  # raw pixels (N, C, H, W) -> logits (N, K, h, w)


MAX_TILE_BATCH_PIXELS = 400_000  # so many pixels of small windows are computed at a time: more gain nothing, and cost memory


MAX_TILE_SIZES_TRIED = 64


class PixelSource(Protocol):
    """A picture ``(H, W, C)`` that gives any rectangle of itself: an array, or a file that is too large for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        ...

    def __getitem__(self, place: tuple[slice, slice], /) -> NDArray[Any]:
        """Return the pixels ``(h, w, C)`` of these rows and columns, which lie inside."""
        ...


@dataclass(frozen=True)
class Span:
    """One window along one direction, in pixels of the padded image: its start, and the output kept, from ``first`` to before ``last``."""

    start: int
    first: int
    last: int

    @property
    def kept(self) -> slice:
        """The output kept, in pixels of the image."""
        return slice(self.first, self.last)

    @property
    def answered(self) -> slice:
        """The same, in pixels of the window's output."""
        return slice(self.first - self.start, self.last - self.start)


@dataclass(frozen=True)
class TileWindow:
    """What the network looks at in one pass, ``size`` (height, width) pixels of ``image``, and which of its answer is kept."""

    image: PixelSource
    rows: Span
    columns: Span
    size: tuple[int, int]


Batch = tuple[list[TileWindow], NDArray[np.generic]]


def padded_size(length: int, geometry: Geometry) -> int:
    """Return the size to which ``length`` pixels are padded for one pass."""
    return geometry.valid_size(length + 2 * geometry.margin)


def window_size(tile: int, geometry: Geometry) -> int:
    """Return the largest size of at most ``tile`` that the network takes and that keeps some output, or else the smallest such."""
    smallest = geometry.valid_size(2 * (geometry.margin + geometry.halo) + geometry.stride)
    return max(smallest, tile - (tile - smallest) % geometry.stride)


def tile_spans(length: int, window: int, geometry: Geometry) -> list[Span]:
    """Cover ``length`` output pixels with windows of ``window`` input pixels.

    The first starts at 0, all start at multiples of the stride, and what they keep follows on without gap or overlap.
    """
    stride, margin = geometry.stride, geometry.margin
    if margin:  # unpadded network: everything that comes out is right
        output = window - 2 * margin
        if length <= output:
            return [Span(0, 0, length)]
        step = output // stride * stride
        count = 1 + -(-(length - output) // step)
        starts = [k * step for k in range(count)]
        return [
            Span(start, start, length if k == count - 1 else start + step)
            for k, start in enumerate(starts)
        ]
    padded = padded_size(
        length, geometry
    )  # zeros outside: an inner edge spoils what lies within the halo
    if window >= padded:
        return [Span(0, 0, length)]
    step = window - 2 * geometry.halo
    count = 1 + -(-(padded - window) // step)
    starts = [min(k * step, padded - window) for k in range(count)]
    edges = [0, *(start + geometry.halo for start in starts[1:]), length]
    return [Span(start, edges[k], edges[k + 1]) for k, start in enumerate(starts)]


def block_size(extent: int, length: int, geometry: Geometry) -> int:
    """Return the size of a window that is right about any ``extent`` neighbouring output pixels of ``length``, wherever they start."""
    window = geometry.valid_size(
        extent + 2 * (geometry.margin + geometry.halo) + geometry.stride - 1
    )
    return min(window, padded_size(length, geometry))


def block_span(first: int, last: int, window: int, length: int, geometry: Geometry) -> Span:
    """Place a window of :func:`block_size` such that it is right about the output pixels from ``first`` to before ``last`` of ``length``."""
    start = max(0, first - geometry.halo) // geometry.stride * geometry.stride
    return Span(min(start, padded_size(length, geometry) - window), first, last)


def tile_windows(image: PixelSource, geometry: Geometry, tile: int) -> list[TileWindow]:
    """Cover an image with windows of about ``tile`` pixels, all of one size, or with one window when ``tile`` is 0."""
    height, width = image.shape[:2]
    size = _window_length(height, tile, geometry), _window_length(width, tile, geometry)
    columns = tile_spans(width, size[1], geometry)
    return [
        TileWindow(image, row, column, size)
        for row in tile_spans(height, size[0], geometry)
        for column in columns
    ]


def choose_tile(height: int, width: int, geometry: Geometry, most_pixels: int) -> int:
    """Choose the ``tile`` for an image: 0 for one pass, if that is of ``most_pixels`` at most, or else windows that compute the least in all.

    Larger windows overlap less, but windows that just fail to fit an image compute much beyond its edges. Of all sizes within the
    bound the one with the fewest pixels computed is taken; the smallest possible windows if none is within.

    Args:
        height, width: of the image, in pixels.
        geometry: the network's.
        most_pixels: of a window, so that the network's activations fit into memory.
    """
    if padded_size(height, geometry) * padded_size(width, geometry) <= most_pixels:
        return 0

    def area(tile: int) -> int:
        return _window_length(height, tile, geometry) * _window_length(width, tile, geometry)

    def work(tile: int) -> int:
        counts = (
            len(tile_spans(length, _window_length(length, tile, geometry), geometry))
            for length in (height, width)
        )
        return area(tile) * next(counts) * next(counts)

    smallest, largest = (
        window_size(1, geometry),
        max(padded_size(length, geometry) for length in (height, width)),
    )
    while largest > smallest and area(largest) > most_pixels:
        largest = max(smallest, min(largest - geometry.stride, largest * 31 // 32))
    step = round_up(max(1, (largest - smallest) // MAX_TILE_SIZES_TRIED), geometry.stride)
    return min(range(window_size(largest, geometry), smallest - 1, -step), key=work)


def predict_tiled(
    image: PixelSource, network: LogitsFunction, geometry: Geometry, tile: int
) -> NDArray[np.float32]:
    """Return logits (K, H, W) for an image (H, W, C), in windows of about ``tile`` pixels, or in one pass when ``tile`` is 0.

    Outside the image the network sees its mirror image (overlap-tile strategy, U-Net paper section 2).
    """
    return predict_tiled_many([image], network, geometry, tile)[0]


def predict_tiled_many(
    images: Sequence[PixelSource], network: LogitsFunction, geometry: Geometry, tile: int
) -> list[NDArray[np.float32]]:
    """As :func:`predict`, for several images: small windows of one size are computed together, whichever image they are from."""
    covers = [tile_windows(image, geometry, tile) for image in images]
    parts = tile_logits(
        tile_batches((window for windows in covers for window in windows), geometry), network
    )
    return [
        _stitch(image, islice(parts, len(windows)))
        for image, windows in zip(images, covers, strict=True)
    ]


def tile_batches(windows: Iterable[TileWindow], geometry: Geometry) -> Iterator[Batch]:
    """Put neighbours of one size together and read their pixels (N, C, H, W); no more than one batch is in memory."""
    for size, group in groupby(windows, lambda window: window.size):
        count = max(1, MAX_TILE_BATCH_PIXELS // (size[0] * size[1]))
        while batch := list(islice(group, count)):
            yield (
                batch,
                np.stack(
                    [_read_window(window, geometry.margin).transpose(2, 0, 1) for window in batch]
                ),
            )


def tile_logits(
    batches: Iterable[Batch], network: LogitsFunction
) -> Iterator[tuple[TileWindow, NDArray[np.float32]]]:
    """Compute windows -> each of them, in order, with the logits (K, h, w) that it keeps."""
    for windows, x in batches:
        for window, logits in zip(windows, network(x), strict=True):
            yield window, logits[:, window.rows.answered, window.columns.answered]


def _stitch(
    image: PixelSource, parts: Iterable[tuple[TileWindow, NDArray[np.float32]]]
) -> NDArray[np.float32]:
    logits: NDArray[np.float32] | None = None
    for window, part in parts:
        if logits is None:
            logits = np.empty((len(part), *image.shape[:2]), np.float32)
        logits[:, window.rows.kept, window.columns.kept] = part
    assert logits is not None
    return logits


def _window_length(length: int, tile: int, geometry: Geometry) -> int:
    whole = padded_size(length, geometry)
    return min(window_size(tile, geometry), whole) if tile else whole


def _read_window(window: TileWindow, margin: int) -> NDArray[Any]:
    """Cut a window out of its image; where it lies outside, the image is mirrored at its edges, as often as needed."""
    starts, lengths = (window.rows.start, window.columns.start), window.image.shape[:2]
    index = [
        reflect_indices(np.arange(start - margin, start - margin + size), length)
        for start, size, length in zip(starts, window.size, lengths, strict=True)
    ]
    rows, columns = (slice(int(places.min()), int(places.max()) + 1) for places in index)
    pixels = window.image[rows, columns]
    if pixels.shape[:2] == window.size:  # nothing lies outside
        return pixels
    inside: NDArray[Any] = pixels[(index[0] - rows.start)[:, None], index[1] - columns.start]
    return inside


MAX_EXACT_CONTEXT_PIXELS = (
    256  # pixels: of a network that sees no further, windows are right to the bit and cost little
)


OVERLAP_SAMPLE_PIXELS = (
    1024  # pixels: side of what is looked at to find the margin for one that does
)


MIN_OVERLAP_AGREEMENT = 0.999  # share of labels that have to be those of one pass


COMPARED_BLOCK_STRIDES = 4  # strides: side of the blocks that are compared; small ones, since all of their pixels are near an edge


COMPARED_POSITIONS = (0.35, 0.65)  # where in the picture, of its height and of its width


MIN_OVERLAP_STRIDES = 4  # strides: less margin than this is not tried, since the picture may be blank where it is measured


OVERLAP_STEP_STRIDES = 2  # strides


@dataclass(frozen=True)
class MeasuredOverlap:
    """What was measured with one margin.

    Args:
        context: pixels around what is kept of a window.
        agreement: share of labels, 0 to 1, that are those of one pass.
        difference: the largest difference between logits.
    """

    context: int
    agreement: float
    difference: float


def measure_overlaps(
    network: LogitsFunction,
    image: PixelSource,
    geometry: Geometry,
    contexts: list[int],
    least: float = 2.0,
) -> list[MeasuredOverlap]:
    """Compare small blocks from the midst of an image with one pass over it, for one margin after the other, until one agrees enough.

    Args:
        network: raw pixels in, logits out; with same padding.
        image: (H, W, C), best a few times as large as the largest margin.
        geometry: the network's.
        contexts: the margins, in pixels.
        least: the share of equal labels that is enough; above 1 all margins are tried.
    """
    whole = predict_tiled(image, network, geometry, 0)
    measured: list[MeasuredOverlap] = []
    for context in contexts:
        windows = _sample_blocks(image, replace(geometry, context=context))
        pairs = [
            (part, whole[:, window.rows.kept, window.columns.kept])
            for window, part in tile_logits(tile_batches(windows, geometry), network)
        ]
        same = float(np.mean([part.argmax(0) == truth.argmax(0) for part, truth in pairs]))
        measured.append(
            MeasuredOverlap(
                context, same, float(max(np.abs(part - truth).max() for part, truth in pairs))
            )
        )
        if same >= least:
            break
    return measured


def find_sufficient_overlap(
    network: LogitsFunction,
    image: PixelSource,
    geometry: Geometry,
    least: float = MIN_OVERLAP_AGREEMENT,
) -> MeasuredOverlap:
    """Return the smallest margin with which at least that share of labels is that of one pass; arguments as for :func:`measure`."""
    contexts = list(
        range(
            MIN_OVERLAP_STRIDES * geometry.stride,
            geometry.context,
            OVERLAP_STEP_STRIDES * geometry.stride,
        )
    )
    found = measure_overlaps(network, image, geometry, contexts, least)
    return (
        found[-1]
        if found and found[-1].agreement >= least
        else MeasuredOverlap(geometry.context, 1.0, 0.0)
    )


def overlap_geometry(
    network: LogitsFunction,
    image: PixelSource,
    geometry: Geometry,
    say: Callable[[str], None] = lambda text: None,
) -> Geometry:
    """Return the network's geometry, with a measured margin where the exact one would have most pixels of a large image computed many times."""
    if (
        geometry.context <= MAX_EXACT_CONTEXT_PIXELS
        or max(image.shape[:2]) <= OVERLAP_SAMPLE_PIXELS
    ):
        return geometry
    margin = find_sufficient_overlap(network, crop_center(image, OVERLAP_SAMPLE_PIXELS), geometry)
    say(
        f"windows overlap by {margin.context} pixels on each side, not by the {geometry.context} that this network sees: "
        f"in the middle of the picture {margin.agreement:.2%} of labels are those of one pass"
    )
    return replace(geometry, context=margin.context)


def _sample_blocks(image: PixelSource, geometry: Geometry) -> list[TileWindow]:
    side = COMPARED_BLOCK_STRIDES * geometry.stride
    lengths = image.shape[:2]
    sizes = [block_size(min(side, length), length, geometry) for length in lengths]
    spans = [
        [
            _sample_span(place, min(side, length), size, length, geometry)
            for place in COMPARED_POSITIONS
        ]
        for size, length in zip(sizes, lengths, strict=True)
    ]
    return [
        TileWindow(image, rows, columns, (sizes[0], sizes[1])) for rows, columns in product(*spans)
    ]


def _sample_span(place: float, side: int, size: int, length: int, geometry: Geometry) -> Span:
    first = min(int(length * place) // geometry.stride * geometry.stride, length - side)
    return block_span(first, first + side, size, length, geometry)


def crop_center(image: PixelSource, side: int) -> NDArray[np.generic]:
    """Return the middle of an image, at most ``side`` pixels each way."""
    starts = [max(0, (length - side) // 2) for length in image.shape[:2]]
    rows, columns = (
        slice(start, min(start + side, length))
        for start, length in zip(starts, image.shape[:2], strict=True)
    )
    return image[rows, columns]
