"""Add at the origin what stands on a plot of land: a house, or the wall, hedge or fence around it.

As in objects.py, random numbers are drawn before distances are looked at.
"""

from __future__ import annotations

import math

from useg.scenes.objects import LEAF_GREENS, PAINTS, shade
from useg.scenes.scenery import (
    BLOCKS,
    BOARDS,
    BUILDING,
    FACADE,
    FENCE,
    LEAVES,
    PLANT,
    WALL,
    Point,
    RandomSource,
    Rgb,
    Scenery,
)

_FACADES: tuple[Rgb, ...] = (
    (158, 92, 72),
    (196, 178, 146),
    (176, 168, 156),
    (142, 128, 118),
    (206, 190, 168),
    (124, 84, 70),
    (188, 152, 118),
    (150, 160, 164),
    (214, 204, 190),
)

_ROOFS: tuple[Rgb, ...] = ((136, 66, 48), (92, 84, 82), (112, 62, 50))
# Colour, joints, size of a block.
_MASONRY: tuple[tuple[Rgb, Rgb, tuple[float, float]], ...] = (
    ((128, 120, 106), (74, 70, 64), (0.7, 0.4)),
    ((150, 78, 58), (186, 172, 156), (0.5, 0.25)),
    ((158, 154, 148), (104, 102, 98), (1.2, 0.6)),
)

_FENCE_PAINTS: tuple[Rgb, ...] = (
    (226, 224, 216),
    (146, 104, 66),
    (118, 88, 62),
    (96, 112, 104),
    (196, 150, 96),
)


def building(
    scenery: Scenery, random: RandomSource, side: int, length: float, depth: float, height: float
) -> None:
    """Add a house from the origin ahead and away from the road (``side`` -1: to the left)."""
    color, glass, bay = (
        random.tint(random.pick(_FACADES)),
        random.tint((74, 88, 100), 0.25),
        length / max(2, round(length / random(1.9, 3.0))),
    )
    floor = height / max(1, round(height / 3.1))
    x0, x1 = (0.0, depth) if side > 0 else (-depth, 0.0)
    scenery.box(
        (x0, 0, 0),
        (x1, height, length),
        BUILDING,
        color,
        FACADE,
        glass,
        (bay, floor),
        top=shade(color, 0.75),
    )
    # The left end of the street front, and the way to the right one.
    start, along = (length, -length) if side > 0 else (0.0, length)
    if random.chance(0.45):
        shop = random.tint(random.pick(PAINTS), 0.3)
        scenery.face(
            (0, 0, start),
            (0, 0, along),
            (0, 3.0, 0),
            BUILDING,
            shade(shop, 0.8),
            FACADE,
            second=glass,
            grain=(bay * 1.5, 4.2),
        )
        scenery.face((0, 2.7, start), (0, 0, along), (0, 0.45, 0), BUILDING, shop)
    else:
        for k in range(1, int(length / bay), 3):
            door = start + math.copysign((k + 0.5) * bay - 0.55, along)
            scenery.face(
                (0, 0, door),
                (0, 0, math.copysign(1.1, along)),
                (0, 2.2, 0),
                BUILDING,
                random.pick(PAINTS),
            )
    if random.chance(0.35):
        _gable(scenery, random, color, side, length, depth, height)
    else:
        lip = 0.2 * side
        low, high = (
            (min(x0, x0 - lip), height - 0.35, -0.15),
            (max(x1, x1 - lip), height + 0.4, length + 0.15),
        )
        scenery.box(low, high, BUILDING, shade(color, 1.15), top=shade(color, 0.75), shadow=False)


def _gable(
    scenery: Scenery,
    random: RandomSource,
    color: Rgb,
    side: int,
    length: float,
    depth: float,
    height: float,
) -> None:
    """A pitched roof whose ridge runs along the street, and a chimney."""
    tiles, rise, eave = random.tint(random.pick(_ROOFS)), depth * 0.34, -0.2 * side
    start, along = (length, -length) if side > 0 else (0.0, length)
    scenery.face(
        (min(0.0, side * depth), height, 0),
        (depth, 0, 0),
        (0, rise, 0),
        BUILDING,
        color,
        shape="triangle",
    )
    slope = (side * depth / 2 - eave, rise + 0.2, 0.0)
    scenery.face(
        (eave, height - 0.2, start),
        (0, 0, along),
        slope,
        BUILDING,
        tiles,
        BLOCKS,
        second=shade(tiles, 0.7),
        grain=(0.6, 0.35),
    )
    x, z = side * depth * 0.3, length * 0.6
    scenery.box(
        (x - 0.4, height + rise * 0.4, z),
        (x + 0.4, height + rise + 0.7, z + 0.8),
        BUILDING,
        shade(color, 0.75),
    )


def wall(scenery: Scenery, random: RandomSource, low: Point, high: Point) -> None:
    """A garden wall of stone, brick or concrete blocks with a coping."""
    color, joints, block = random.pick(_MASONRY)
    scenery.box(low, high, WALL, random.tint(color), BLOCKS, joints, block)
    scenery.box(
        (low[0] - 0.06, high[1], low[2] - 0.06),
        (high[0] + 0.06, high[1] + 0.12, high[2] + 0.06),
        WALL,
        (172, 168, 160),
        shadow=False,
    )


def hedge(scenery: Scenery, random: RandomSource, low: Point, high: Point) -> None:
    """A clipped hedge with a ragged top."""
    green = random.tint(random.pick(LEAF_GREENS), 0.2)
    (x0, y0, z0), (x1, y1, z1) = low, high
    for corner, along in (
        ((x0, y0, z0), (x1 - x0, 0.0, 0.0)),
        ((x1, y0, z0), (0.0, 0.0, z1 - z0)),
        ((x0, y0, z1), (0.0, 0.0, z0 - z1)),
    ):
        scenery.face(
            corner,
            along,
            (0, y1 - y0, 0),
            PLANT,
            green,
            LEAVES,
            "hedge",
            (green[0] * 1.5, green[1] * 1.5, green[2] * 1.2),
        )
    scenery.shadow(x0, z0, x1, z1, y0, y1)


def fence(
    scenery: Scenery, random: RandomSource, kind: str, start: Point, along: Point, height: float
) -> None:
    """Add a fence of boards, pickets or rails; gaps too small at this distance are closed.

    Args:
        scenery: where to.
        random: for its paint.
        kind: "boards", "pickets" or "rails".
        start: its left end as seen from its front.
        along: from its left end to its right end, parallel to the x or the z axis.
        height: in metres.
    """
    color = random.tint(random.pick(_FENCE_PAINTS))
    dark, length = shade(color, 0.62), abs(along[0] + along[2])
    (x, y, z), dx, dz = start, along[0] / length, along[2] / length
    end_x, end_z = x + along[0], z + along[2]
    scenery.shadow(
        min(x, end_x),
        min(z, end_z),
        max(x, end_x) + 0.05,
        max(z, end_z) + 0.05,
        0.1 * height,
        height * 0.95,
    )
    middle = max(4.0, scenery.z + (z + end_z) / 2)
    # Of a metre of fence.
    pixels = scenery.focal / middle * (abs(dx) + abs(dz * (scenery.x + x)) / middle)
    open_pickets = kind == "pickets" and 0.16 * pixels >= 1.0
    if kind == "boards" or (kind == "pickets" and not open_pickets):
        scenery.face(
            (x, y + 0.05, z),
            along,
            (0, height - 0.05, 0),
            FENCE,
            color,
            BOARDS,
            second=dark,
            grain=(0.22, 1.0),
        )
        scenery.face((x, y + height - 0.1, z), along, (0, 0.1, 0), FENCE, dark)
    else:
        for share in (0.3, 0.9) if open_pickets else (0.25, 0.58, 0.9):
            scenery.face((x, y + height * share - 0.08, z), along, (0, 0.16, 0), FENCE, color)
    if open_pickets:
        for k in range(int(length / 0.36)):
            scenery.face(
                (x + dx * 0.36 * k, y + 0.05, z + dz * 0.36 * k),
                (0.2 * dx, 0, 0.2 * dz),
                (0, height, 0),
                FENCE,
                color,
            )
    for k in range(int(length / 2.0) + 1):
        post = min(2.0 * k, length - 0.1)
        scenery.billboard(
            x + dx * post, y, 0.16, height + 0.1, FENCE, color if kind == "rails" else dark
        )
