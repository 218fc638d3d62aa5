"""Image and mask -> how well the mask's class boundaries lie on the image's edges.

Masks that are shifted, scaled, turned or of another image are found by it
(:mod:`useg.doctor.alignment`), and so are masks that a model learned one pixel off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import CodeMap
from useg.errors import format_count

# Edge alignment is measured for shifts of the mask up to this far, in each direction.
MAX_SHIFT_PIXELS = 8

# Boundaries are searched in about this many rows of a mask.
_MAX_SEARCHED_ROWS = 150

# Boundary pixels in each direction: more do not help, and fewer than the minimum are too few.
_MAX_BOUNDARY_PIXELS = 160
_MIN_BOUNDARY_PIXELS = 24

# Placements are measured in images that are reduced to about this many pixels.
_PLACED_PIXELS = 480
# Each edge is divided by the mean strength within this many pixels, plus this share of the mean
# strength of the whole image.
_LOCAL_PIXELS, _MEAN_SHARE = 12, 0.1

# A placement counts if at least this many boundary pixels, and this share of them, stay inside.
_MIN_PLACED_PIXELS, _MIN_PLACED_SHARE = 40, 0.4

# (2 * MAX_SHIFT_PIXELS + 1, 2 * MAX_SHIFT_PIXELS + 1), mean 1: strength of the image's edges under
# the boundaries of a mask that is moved by (row, column) - MAX_SHIFT_PIXELS
EdgeAlignment = NDArray[np.float32]


def measure_edge_alignment(image: NDArray[Any], codes: CodeMap) -> EdgeAlignment | None:
    """Measure the image's edges under the mask's class boundaries, for every small shift.

    If a mask fits, the image changes more across a class boundary than next to it. A few hundred
    boundary pixels are enough to measure this, in a millisecond, for any image size.

    Args:
        image: ``(H, W, C)``; only the middle band is used.
        codes: ``(H, W)``, equal where the class is equal.

    Returns:
        Strength of the image's edges for each shift, relative to the mean of all shifts; None if
        there are too few boundaries.
    """
    if min(codes.shape) < 4 * MAX_SHIFT_PIXELS:
        return None
    band = image[..., image.shape[2] // 2]
    side = 2 * MAX_SHIFT_PIXELS + 2
    windows = np.lib.stride_tricks.sliding_window_view(band, (side, side))
    alignments = []
    for axis in (0, 1):
        rows, columns = _sample_boundary(codes, axis)
        if len(rows) < _MIN_BOUNDARY_PIXELS:
            continue
        patches = windows[rows - MAX_SHIFT_PIXELS, columns - MAX_SHIFT_PIXELS]
        here = patches[:, :-1, :-1]
        ahead = patches[:, 1:, :-1] if axis == 0 else patches[:, :-1, 1:]
        steps = (np.maximum(ahead, here) - np.minimum(ahead, here)).astype(np.float32)
        # The root keeps a single strong edge from deciding alone.
        strength = np.sqrt(steps).mean(0)
        # A blank image has no edges.
        if strength.any():
            alignments.append(strength / strength.mean())
    return np.mean(alignments, axis=0, dtype=np.float32) if alignments else None


def _sample_boundary(codes: CodeMap, axis: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of pixels whose next pixel along ``axis`` has another code.

    They are spread evenly over the mask and keep away from its border.
    """
    step = max(1, codes.shape[0] // _MAX_SEARCHED_ROWS)
    near, far = MAX_SHIFT_PIXELS, -MAX_SHIFT_PIXELS
    inner = codes[near : far - 1 : step, near : far - 1]
    if axis == 0:
        ahead = codes[near + 1 : far : step, near : far - 1]
    else:
        ahead = codes[near : far - 1 : step, near + 1 : far]
    places = np.flatnonzero(inner != ahead)
    if len(places) > _MAX_BOUNDARY_PIXELS:
        chosen = np.linspace(0, len(places) - 1, _MAX_BOUNDARY_PIXELS).astype(np.intp)
        places = places[chosen]
    rows, columns = np.divmod(places, inner.shape[1])
    return rows * step + near, columns + near


def strength_at(alignment: EdgeAlignment, shift: tuple[int, int] = (0, 0)) -> float:
    """Return the edge strength at ``shift = (right, down)``, with a tolerance of one pixel."""
    x, y = shift[0] + MAX_SHIFT_PIXELS, shift[1] + MAX_SHIFT_PIXELS
    return float(alignment[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max())


def find_strongest_shift(alignment: EdgeAlignment) -> tuple[int, int]:
    """Return the shift ``(right, down)`` of the mask with the strongest edges."""
    row, column = np.unravel_index(int(alignment.argmax()), alignment.shape)
    return int(column) - MAX_SHIFT_PIXELS, int(row) - MAX_SHIFT_PIXELS


def shift_z_score(alignment: EdgeAlignment, shift: tuple[int, int] = (0, 0)) -> float:
    """Return by how many standard deviations ``shift`` exceeds shifts over 3 pixels from it."""
    places = np.arange(-MAX_SHIFT_PIXELS, MAX_SHIFT_PIXELS + 1)
    distance = np.maximum(np.abs(places - shift[1])[:, None], np.abs(places - shift[0]))
    others = alignment[distance > 3]
    return (strength_at(alignment, shift) - float(others.mean())) / max(float(others.std()), 1e-3)


def shift_label(label: NDArray[Any], shift: tuple[int, int], fill: int) -> NDArray[Any]:
    """Move a label map ``(H, W)`` right and down; pixels that become free get ``fill``."""
    right, down = shift
    H, W = label.shape
    result = np.full_like(label, fill)
    target = (
        slice(max(0, down), H + min(0, down)),
        slice(max(0, right), W + min(0, right)),
    )
    source = (
        slice(max(0, -down), H - max(0, down)),
        slice(max(0, -right), W - max(0, right)),
    )
    result[target] = label[source]
    return result


@dataclass(frozen=True)
class MaskPlacement:
    """A change of a mask's scale and place.

    Args:
        across, down: the factors of width and height.
        anchor: what stays in place: 0 the left and top border, 0.5 the middle, 1 right and bottom.
        shift: how far the mask then moves right and down, in parts of its width and height.
    """

    across: float = 1.0
    down: float = 1.0
    anchor: float = 0.5
    shift: tuple[float, float] = (0.0, 0.0)


# From half to twice the size in steps of 1.2 %, without 1; and up to 15 % in steps of 0.6 %.
_FACTORS = tuple(2 ** (step / 60) for step in range(-60, 61) if step)
_SHIFTS = tuple(0.006 * step for step in range(-25, 26))

# The first one changes nothing.
PLACEMENTS = (
    MaskPlacement(),
    *(MaskPlacement(f, f, anchor) for anchor in (0.5, 0, 1) for f in _FACTORS),
    *(MaskPlacement(f, 1, anchor) for anchor in (0.5, 0, 1) for f in _FACTORS),
    *(MaskPlacement(1, f, anchor) for anchor in (0.5, 0, 1) for f in _FACTORS),
    *(MaskPlacement(shift=(right, down)) for right in _SHIFTS for down in _SHIFTS if right or down),
)


def measure_placements(image: NDArray[Any], codes: CodeMap) -> NDArray[np.float64] | None:
    """Measure the image's edges under the mask's class boundaries, for each of the ``PLACEMENTS``.

    Args:
        image: ``(H, W, C)``; only the middle band is used.
        codes: ``(H, W)``, equal where the class is equal.

    Returns:
        Strength of the edges ``(len(PLACEMENTS),)`` relative to those nearby, NaN where too much of
        the mask would be outside the image; None if there are too few boundaries.
    """
    step = max(1, round(max(codes.shape) / _PLACED_PIXELS))
    H, W = (side // step for side in codes.shape)
    codes = codes[step // 2 :: step, step // 2 :: step][:H, :W]
    if min(H, W) < 4 * MAX_SHIFT_PIXELS:
        return None
    band = image[: H * step, : W * step, image.shape[2] // 2].astype(np.float32)
    smooth = _average_nearby(band.reshape(H, step, W, step).mean((1, 3)), 1)
    boundaries = [_sample_boundary(codes, axis) for axis in (0, 1)]
    number = sum(len(rows) for rows, _ in boundaries)
    if number < 2 * _MIN_BOUNDARY_PIXELS:
        return None
    strength, inside = np.zeros(len(PLACEMENTS)), np.zeros(len(PLACEMENTS), np.intp)
    for axis, (rows, columns) in enumerate(boundaries):
        edges = _relative_edges(smooth, axis)
        # A boundary is between its pixel and the next one along the axis.
        y = _place(rows, H, axis=0, is_boundary=axis == 0)
        x = _place(columns, W, axis=1, is_boundary=axis == 1)
        is_inside = (y >= 2) & (y < H - 3) & (x >= 2) & (x < W - 3)
        found = edges.ravel()[np.where(is_inside, y * W + x, 0)]
        strength += (found * is_inside).sum(1)
        inside += is_inside.sum(1)
    is_enough = inside >= max(_MIN_PLACED_PIXELS, _MIN_PLACED_SHARE * number)
    return np.where(is_enough, strength / np.maximum(inside, 1), np.nan)


def _place(
    places: NDArray[np.intp], size: int, *, axis: int, is_boundary: bool
) -> NDArray[np.int32]:
    """Return the row or column of each pixel, or boundary behind it, by each placement."""
    changes = [
        (each.anchor, (each.down, each.across)[axis], each.shift[1 - axis]) for each in PLACEMENTS
    ]
    anchors, factors, shifts = np.array(changes, np.float32).T[:, :, None]
    # The middle of a pixel, or its end.
    middle = np.float32(1.0 if is_boundary else 0.5)
    offsets = size * (anchors * (1 - factors) + shifts) + middle * (factors - 1)
    placed: NDArray[np.int32] = (places.astype(np.float32) * factors + offsets + 0.5).astype(
        np.int32
    )
    return placed


def _relative_edges(band: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return the strength of the edges along an axis, with a tolerance of one pixel."""
    steps = np.abs(np.diff(band, axis=axis, append=band[-1:] if axis == 0 else band[:, -1:]))
    padded = np.pad(np.sqrt(steps), 1, mode="edge")
    nearby = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).max((2, 3))
    floor = _MEAN_SHARE * float(nearby.mean()) + 1e-6
    relative: NDArray[np.float64] = nearby / (_average_nearby(nearby, _LOCAL_PIXELS) + floor)
    return relative


def _average_nearby(values: NDArray[Any], radius: int) -> NDArray[np.float64]:
    """Return the mean of the values within ``radius`` rows and columns of each."""
    side = 2 * radius + 1
    sums = np.pad(values.astype(np.float64), radius, mode="edge").cumsum(0).cumsum(1)
    sums = np.pad(sums, ((1, 0), (1, 0)))
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    average: NDArray[np.float64] = inside / side**2
    return average


def measure_enclosure(codes: CodeMap) -> float:
    """Return the share of boundary pixels where the usual one of two codes is nearer to the middle.

    It is 1 around a single convex object in the middle of the mask, and little above a half if
    there are many objects.
    """
    counts: dict[tuple[int, int], int] = {}
    for axis in (0, 1):
        rows, columns = _sample_boundary(codes, axis)
        here, ahead = codes[rows, columns], codes[rows + (axis == 0), columns + (axis == 1)]
        is_far = 2 * (rows, columns)[axis] + 1 > codes.shape[axis]
        near, far = np.where(is_far, here, ahead), np.where(is_far, ahead, here)
        for pair in zip(near.tolist(), far.tolist(), strict=True):
            counts[pair] = counts.get(pair, 0) + 1
    usual = sum(
        max(n, counts[pair[::-1]]) / 2 if pair[::-1] in counts else n for pair, n in counts.items()
    )
    return usual / max(1, sum(counts.values()))


def place_label(label: NDArray[Any], placement: MaskPlacement, fill: int) -> NDArray[Any]:
    """Scale and move a label map ``(H, W)``, nearest pixel; those that become free get ``fill``."""
    right, down = placement.shift
    rows, columns = (
        np.floor(anchor + (np.arange(size) + 0.5 - anchor - size * shift) / factor)
        for size, anchor, factor, shift in zip(
            label.shape,
            (side * placement.anchor for side in label.shape),
            (placement.down, placement.across),
            (down, right),
            strict=True,
        )
    )
    H, W = label.shape
    places = np.ix_(rows.clip(0, H - 1).astype(np.intp), columns.clip(0, W - 1).astype(np.intp))
    is_inside = ((rows >= 0) & (rows < H))[:, None] & ((columns >= 0) & (columns < W))
    return np.where(is_inside, label[places], np.array(fill, label.dtype))


def describe_placement(placement: MaskPlacement) -> str:
    """Return a placement in words: ``"stretched to 133 % in height, from the top"``."""
    across, down, anchor = placement.across, placement.down, placement.anchor
    right, below = (100 * part for part in placement.shift)
    if right or below:
        parts = [f"{abs(right):.1f} % of the width {'right' if right > 0 else 'left'}"] * bool(
            right
        )
        parts += [f"{abs(below):.1f} % of the height {'down' if below > 0 else 'up'}"] * bool(below)
        return f"moved {' and '.join(parts)}"
    if across == down:
        words = f"{'enlarged' if down > 1 else 'reduced'} to {100 * down:.0f} %"
        start = {0: ", from the top left", 1: ", from the bottom right"}
    elif across == 1:
        words = f"{'stretched' if down > 1 else 'squeezed'} to {100 * down:.0f} % in height"
        start = {0: ", from the top", 1: ", from the bottom"}
    else:
        words = f"{'stretched' if across > 1 else 'squeezed'} to {100 * across:.0f} % in width"
        start = {0: ", from the left", 1: ", from the right"}
    return words + start.get(int(anchor), "") * (anchor != 0.5)


def find_unsupported_boundaries(image: NDArray[Any], codes: CodeMap) -> NDArray[np.bool_]:
    """Mark class boundaries ``(H, W)`` near which the image does not change.

    There the largest step of the image within 2 pixels is among the smallest 30 % of all places.
    """
    band = image[..., image.shape[2] // 2].astype(np.float32)
    step = np.zeros(band.shape, np.float32)
    step[:, 1:] = np.abs(np.diff(band, axis=1))
    step[1:] = np.maximum(step[1:], np.abs(np.diff(band, axis=0)))
    boundary = np.zeros(codes.shape, bool)
    boundary[:, 1:] = codes[:, 1:] != codes[:, :-1]
    boundary[1:] |= codes[1:] != codes[:-1]
    nearby = np.lib.stride_tricks.sliding_window_view(np.pad(step, 2), (5, 5)).max((2, 3))
    unsupported: NDArray[np.bool_] = boundary & (nearby <= np.quantile(nearby, 0.3))
    return unsupported


def describe_shift(shift: tuple[int, int]) -> str:
    """``(3, -2)`` -> ``"3 pixels right and 2 pixels up"``."""
    right, down = shift
    parts = []
    if right:
        parts.append(format_count(abs(right), "pixel") + (" right" if right > 0 else " left"))
    if down:
        parts.append(format_count(abs(down), "pixel") + (" down" if down > 0 else " up"))
    return " and ".join(parts)
