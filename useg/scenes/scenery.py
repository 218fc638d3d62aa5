"""A generated street as flat faces in space, and its random numbers; no camera and no weather.

The world is x to the right, y up, z ahead, in metres. A face is a corner, an edge to its right, an
edge upwards and an outline in their coordinates. Faces are painted from back to front without a
depth buffer, in the order of ``Scenery.key``; see layout.py for why that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Choice = TypeVar("Choice")


Point = tuple[float, float, float]


Rgb = tuple[float, float, float]


SKY, BUILDING, FENCE, OTHER, PEDESTRIAN, POLE, LINE, ROAD, PAVEMENT, PLANT, VEHICLE, WALL, SIGN = (
    range(13)
)


PLAIN, ASPHALT, SLABS, BLOCKS, FACADE, BOARDS, LEAVES, ROUND, GLASS, GLOW, POSTER = range(
    11
)  # materials: light.py draws them


GROUND, BACKDROP, LOTS, PAVEMENTS, TRAFFIC, HOOD = (
    band * 10_000.0 for band in range(6)
)  # painted in this order


BLACK: Rgb = (26, 26, 29)


def _ring(count: int, wave: float = 0.0, turn: float = 0.0) -> tuple[tuple[float, float], ...]:
    """A circle in the unit square; ``wave`` makes its rim ragged, ``turn`` picks which rags."""
    points = []
    for k in range(count):
        angle = 2 * math.pi * (k + 0.5) / count
        radius = 0.5 * (
            1
            - wave
            + wave * math.sin(3.0 * angle + turn) * math.cos(5.0 * angle + 2.3 * turn)
            + wave * (k % 2) * 0.8
        )
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return tuple(points)


SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0, 0), (1, 0), (0.5, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "octagon": _ring(8),
    "disc": _ring(12),
    "screen": ((0.0, 0), (1.0, 0), (0.88, 1), (0.12, 1)),
    "pane": ((0.08, 0.1), (0.92, 0.1), (0.84, 0.9), (0.16, 0.9)),
    "saloon": ((0, 0), (1, 0), (0.74, 1), (0.24, 1)),
    "saloon panes": ((0.12, 0.1), (0.88, 0.1), (0.71, 0.88), (0.27, 0.88)),
    "hatch": ((0, 0), (1, 0), (0.7, 1), (0.06, 1)),
    "hatch panes": ((0.07, 0.1), (0.88, 0.1), (0.68, 0.88), (0.11, 0.88)),
    "van": ((0, 0), (1, 0), (0.88, 1), (0.01, 1)),
    "bus": ((0, 0), (1, 0), (0.98, 1), (0.01, 1)),
    "van panes": ((0.72, 0.22), (0.96, 0.22), (0.87, 0.86), (0.72, 0.86)),
    "bus panes": ((0.03, 0.25), (0.95, 0.25), (0.93, 0.82), (0.03, 0.82)),
    "torso": ((0.14, 0), (0.86, 0), (1, 0.78), (0.8, 1), (0.2, 1), (0, 0.78)),
    "skirt": ((0, 0), (1, 0), (0.76, 1), (0.24, 1)),
    "arrow": ((0.36, 0), (0.64, 0), (0.64, 0.6), (1, 0.6), (0.5, 1), (0, 0.6), (0.36, 0.6)),
    "hood": (
        (0, 0),
        (1, 0),
        (1, 0.42),
        (0.93, 0.66),
        (0.8, 0.82),
        (0.65, 0.9),
        (0.5, 0.93),
        (0.35, 0.9),
        (0.2, 0.82),
        (0.07, 0.66),
        (0, 0.42),
    ),
    "hedge": (
        (0, 0),
        (1, 0),
        (1, 0.86),
        (0.88, 1),
        (0.74, 0.9),
        (0.6, 1),
        (0.47, 0.92),
        (0.33, 1),
        (0.2, 0.9),
        (0.08, 0.98),
        (0, 0.88),
    ),
    "grove": (
        (0, 0),
        (1, 0),
        (1, 0.5),
        (0.86, 0.72),
        (0.74, 0.6),
        (0.58, 0.94),
        (0.45, 0.74),
        (0.3, 1),
        (0.16, 0.68),
        (0, 0.6),
    ),
    **{f"crown{k}": _ring(14, 0.16, 1.7 * k) for k in range(6)},
}


SHAPES |= {
    f"{name} turned": tuple((1 - s, t) for s, t in reversed(points))
    for name, points in SHAPES.items()
}


SHAPE_IDS = {name: k for k, name in enumerate(SHAPES)}


CROWNS = tuple(name for name in SHAPES if name.startswith("crown") and "turned" not in name)


class RandomSource:
    """Random numbers one by one, drawn from a numpy generator in blocks, which is faster."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._numbers: list[float] = []

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number between ``low`` and ``high``."""
        if not self._numbers:
            self._numbers = self._rng.random(1024).tolist()
        return low + (high - low) * self._numbers.pop()

    def chance(self, probability: float) -> bool:
        """Return True with a probability."""
        return self() < probability

    def pick(self, options: Sequence[Choice]) -> Choice:
        """Return one of them."""
        return options[int(self() * len(options))]

    def shuffled(self, options: Sequence[str]) -> list[str]:
        """Return all of them in another order."""
        return [option for _, option in sorted((self(), option) for option in options)]

    def tint(self, color: Rgb, spread: float = 0.12) -> Rgb:
        """The same hue, a little lighter or darker."""
        factor = self(1 - spread, 1 + spread)
        return (color[0] * factor, color[1] * factor, color[2] * factor)


class Scenery:
    """Faces and shadows, placed relative to a movable origin in the street.

    Attributes:
        focal: pixels of a length of 1 m at 1 m, which decides what is too small to draw.
        frames: corner, right edge and up edge of each face: 9 numbers, world metres.
        attributes: label, material, outline, colour (3), second colour (3), two numbers for the
            material, painting order.
        shadows: boxes that cast one: x0, z0, x1, z1, bottom, top, and 1.0 when round.
    """

    def __init__(self, focal: float) -> None:
        self.focal = focal
        self.frames: list[tuple[float, ...]] = []
        self.attributes: list[tuple[float, ...]] = []
        self.shadows: list[tuple[float, ...]] = []
        self.move_to(0.0)

    def move_to(
        self,
        band: float,
        x: float = 0.0,
        z: float = 0.0,
        y: float = 0.0,
        yaw: float = 0.0,
        order: float | None = None,
    ) -> None:
        """Move the origin.

        Faces of a higher band are painted later; within a band, those of the nearer origin or
        of the lower ``order``.
        """
        self.x, self.y, self.z = x, y, z
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        self.key = band - (z if order is None else order)

    def pixels(self, metres: float) -> float:
        """How many pixels a length takes at the distance of the origin."""
        return self.focal * metres / max(self.z, 1.0)

    def face(
        self,
        p: Point,
        u: Point,
        v: Point,
        label: int,
        color: Rgb,
        material: int = PLAIN,
        shape: str = "square",
        second: Rgb = BLACK,
        grain: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Add a face at ``p`` from the origin; seen from its front, ``u`` is right and ``v`` up."""
        c, s = self.cos, self.sin
        self.frames.append(
            (
                self.x + c * p[0] + s * p[2],
                self.y + p[1],
                self.z - s * p[0] + c * p[2],
                c * u[0] + s * u[2],
                u[1],
                c * u[2] - s * u[0],
                c * v[0] + s * v[2],
                v[1],
                c * v[2] - s * v[0],
            )
        )
        self.attributes.append(
            (label, material, SHAPE_IDS[shape], *color, *second, *grain, self.key)
        )

    def billboard(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        label: int,
        color: Rgb,
        material: int = PLAIN,
        shape: str = "square",
        second: Rgb = BLACK,
    ) -> None:
        """Add an upright face towards the camera with the middle of its foot at (``x``, ``y``)."""
        self.face(
            (x - w / 2, y, 0), (w, 0, 0), (0, h, 0), label, color, material, shape, second, (w, h)
        )

    def box(
        self,
        low: Point,
        high: Point,
        label: int,
        color: Rgb,
        material: int = PLAIN,
        second: Rgb = BLACK,
        grain: tuple[float, float] = (1.0, 1.0),
        top: Rgb | None = None,
        shadow: bool = True,
    ) -> None:
        """Add the five sides of a box that can be seen from above the ground."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        w, h, d = x1 - x0, y1 - y0, z1 - z0
        for corner, along in (
            ((x0, y0, z0), (w, 0.0, 0.0)),
            ((x1, y0, z1), (-w, 0.0, 0.0)),
            ((x1, y0, z0), (0.0, 0.0, d)),
            ((x0, y0, z1), (0.0, 0.0, -d)),
        ):
            self.face(corner, along, (0, h, 0), label, color, material, "square", second, grain)
        self.face((x0, y1, z0), (w, 0, 0), (0, 0, d), label, top or color)
        if shadow:
            self.shadow(x0, z0, x1, z1, y0, y1)

    def shadow(
        self,
        x0: float,
        z0: float,
        x1: float,
        z1: float,
        bottom: float,
        top: float,
        round: bool = False,
    ) -> None:
        """Let an upright box, or the ellipsoid inside it, cast a shadow."""
        c, s = self.cos, self.sin
        xs = [c * x + s * z for x in (x0, x1) for z in (z0, z1)]
        zs = [c * z - s * x for x in (x0, x1) for z in (z0, z1)]
        self.shadows.append(
            (
                self.x + min(xs),
                self.z + min(zs),
                self.x + max(xs),
                self.z + max(zs),
                bottom,
                top,
                float(round),
            )
        )
