"""Faces + a camera -> a canvas of face numbers -> the exact label.

The faces are painted once, as numbers, on a canvas of twice the size. Label and colour (light.py)
are both looked up from those numbers, so they cannot disagree. Then the canvas is halved: colours
by averaging, labels by a majority of four.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from useg.scenes import scenery
from useg.scenes.scenery import HOOD, SHAPES, Rgb, Scenery

Floats = NDArray[np.float32]


_NEAR = 0.35  # metres; nothing closer to the camera is drawn


@dataclass(frozen=True)
class Camera:
    """A pinhole camera near the world's origin that looks ahead: pixels, metres, radians.

    The horizon's row stands for a small pitch, as in architects' cameras, so that upright things
    stay upright. The street bends
    away by ``curve * z**2`` to the right and ``slope * z**2`` upwards.
    """

    width: int
    height: int
    focal: float
    horizon: float
    x: float
    y: float
    yaw: float = 0.0
    roll: float = 0.0
    curve: float = 0.0
    slope: float = 0.0

    def axes(self) -> NDArray[np.float64]:
        """Return right, down and ahead as rows, in world coordinates."""
        cy, sy, cr, sr = (
            math.cos(self.yaw),
            math.sin(self.yaw),
            math.cos(self.roll),
            math.sin(self.roll),
        )
        right, down = np.array((cy, 0.0, -sy)), np.array((0.0, -1.0, 0.0))
        return np.array((cr * right + sr * down, cr * down - sr * right, (sy, 0.0, cy)))

    def to_camera(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Turn world points ``(..., 3)`` into camera coordinates (right, down, ahead)."""
        bent = points - (self.x, self.y, 0.0)
        bent[..., 0] += self.curve * points[..., 2] ** 2
        bent[..., 1] += self.slope * points[..., 2] ** 2
        seen: NDArray[np.float64] = bent @ self.axes().T
        return seen


@dataclass(frozen=True)
class Lighting:
    """Weather and light; colours are factors of a surface's own colour, or 0-255 for the sky."""

    name: str
    sun: tuple[float, float, float]
    sunlight: Rgb
    daylight: Rgb
    zenith: Rgb
    horizon: Rgb
    clouds: float
    mist: float
    shadow: float
    lit: float = 0.0


@dataclass(frozen=True)
class Faces:
    """What the camera sees of a scenery, in painting order; row 0 of every table is the sky."""

    outlines: list[list[int]]
    # (9, F): (x, y, 1) times rows 0-2, 3-5 and 6-8 is right / depth, up / depth, 1 / depth
    planes: Floats
    colors: Floats  # (6, F): colour and second colour
    normals: Floats  # (3, F)
    grains: Floats  # (2, F)
    labels: NDArray[np.uint8]
    materials: NDArray[np.uint8]
    shaded: NDArray[np.uint8]  # 1 where a shadow can fall


def project(scenery: Scenery, camera: Camera) -> Faces:
    """Project the faces, drop those that are not visible, and sort the rest back to front."""
    attributes = np.array(scenery.attributes)
    order = np.argsort(attributes[:, 11], kind="stable")
    attributes, frames = attributes[order], np.array(scenery.frames).reshape(-1, 3, 3)[order]
    ends = frames + frames[:, :1] * ((0.0,), (1.0,), (1.0,))
    seen = camera.to_camera(ends)
    mounted = attributes[:, 11] >= HOOD - 5_000
    seen[mounted] = ends[mounted] * (1.0, -1.0, 1.0)
    corner, u, v = seen[:, 0], seen[:, 1] - seen[:, 0], seen[:, 2] - seen[:, 0]
    volume = np.einsum("fi,fi->f", corner, np.cross(u, v))
    shapes, counts = _shape_table()
    kind = attributes[:, 2].astype(int)
    points = corner[:, None] + shapes[kind, :, :1] * u[:, None] + shapes[kind, :, 1:] * v[:, None]
    pixels, behind = _pixels(points, camera)
    low, high = pixels.min(1), pixels.max(1)
    inside = (high >= 0).all(1) & (low[:, 0] < 2 * camera.width) & (low[:, 1] < 2 * camera.height)
    keep = np.flatnonzero((volume < -1e-9) & ~behind.all(1) & (inside | behind.any(1)))
    flat = pixels[keep].reshape(len(keep), -1).tolist()
    outlines = [
        row[: 2 * count] if not cut else _clipped(corners[:count], camera)
        for row, count, cut, corners in zip(
            flat,
            counts[kind[keep]].tolist(),
            np.any(behind[keep], axis=1).tolist(),
            points[keep],
            strict=True,
        )
    ]
    return _tables(
        attributes[keep], frames[keep], corner[keep], u[keep], v[keep], volume[keep], outlines
    )


def _tables(
    attributes: NDArray[np.float64],
    frames: NDArray[np.float64],
    corner: NDArray[np.float64],
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    volume: NDArray[np.float64],
    outlines: list[list[int]],
) -> Faces:
    """Describe outline k in row k + 1 of every table.

    A point of the plane is ``corner + s u + t v``, solved for s, t and depth.
    """
    wide, tall = np.linalg.norm(frames[:, 1], axis=1), np.linalg.norm(frames[:, 2], axis=1)
    right = np.cross(v, corner) / volume[:, None] * wide[:, None]
    up = np.cross(corner, u) / volume[:, None] * tall[:, None]
    near = np.cross(u, v) / volume[:, None]
    materials = attributes[:, 1].astype(np.uint8)
    flat = np.abs(frames[:, 1, 1]) + np.abs(frames[:, 2, 1]) < 1e-6
    # Texture on the ground continues from strip to strip; elsewhere it starts at random, so that
    # two trees differ.
    start = np.where(
        flat[:, None],
        frames[:, 0, [0, 2]] + 300.0,
        (frames[:, 0, [2, 0]] * 7.3) % 17.0 * (materials == scenery.LEAVES)[:, None],
    )
    right, up = right + near * start[:, :1], up + near * start[:, 1:]
    normal = np.cross(frames[:, 2], frames[:, 1])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    grounded = flat & (frames[:, 0, 1] < 0.3) & (attributes[:, 11] < 9_000)
    sky = np.zeros((1, 9))
    return Faces(
        outlines,
        np.concatenate((sky, np.hstack((right, up, near)))).T.astype(np.float32),
        np.concatenate((sky[:, :6], attributes[:, 3:9])).T.astype(np.float32),
        np.concatenate((sky[:, :3], normal)).T.astype(np.float32),
        np.concatenate((sky[:, :2] + 1, attributes[:, 9:11])).T.astype(np.float32),
        np.concatenate(((scenery.SKY,), attributes[:, 0])).astype(np.uint8),
        np.concatenate(((255,), materials)).astype(np.uint8),
        np.concatenate(((0,), grounded)).astype(np.uint8),
    )


@functools.cache
def _shape_table() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return all outlines as one array ``(S, P, 2)``, padded, and their lengths ``(S,)``."""
    most = max(map(len, SHAPES.values()))
    table = [points + points[-1:] * (most - len(points)) for points in SHAPES.values()]
    return np.array(table), np.array([len(points) for points in SHAPES.values()])


def _pixels(
    points: NDArray[np.float64], camera: Camera
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the canvas pixels ``(..., 2)`` of camera points, and which are too close or behind."""
    behind = points[..., 2] < _NEAR
    scale = 2.0 * camera.focal / np.where(behind, 1.0, points[..., 2])
    pixels = points[..., :2] * scale[..., None] + (camera.width - 0.5, 2.0 * camera.horizon - 0.5)
    return np.rint(np.clip(pixels, -1e6, 1e6)).astype(np.int64), behind


def _clipped(points: NDArray[np.float64], camera: Camera) -> list[int]:
    """Cut off the part of an outline that is too close, and project the rest."""
    kept = []
    for a, b in zip(points, np.roll(points, -1, axis=0), strict=True):
        if a[2] >= _NEAR:
            kept.append(a)
        if (a[2] >= _NEAR) != (b[2] >= _NEAR):
            kept.append(a + (b - a) * (_NEAR + 1e-9 - a[2]) / (b[2] - a[2]))
    pixels: list[int] = _pixels(np.array(kept), camera)[0].ravel().tolist() if len(kept) > 2 else []
    return pixels


def paint_faces(faces: Faces, camera: Camera) -> NDArray[np.int32]:
    """Return the canvas ``(2H, 2W)`` int32: the number of the face at each place, 0 for the sky."""
    canvas = Image.new("I", (2 * camera.width, 2 * camera.height))
    polygon = ImageDraw.Draw(canvas).polygon
    for number, outline in enumerate(faces.outlines, 1):
        if outline:
            polygon(outline, fill=number)
    return np.asarray(canvas)


def majority_label(canvas: NDArray[np.int32], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halve a canvas to a label map ``(H, W)``: the majority of four, or what lies in front."""
    four = [canvas[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    ids = [labels[part] for part in four]
    label, best = ids[0], np.full(ids[0].shape, -1, np.int32)
    for part, own in zip(four, ids, strict=True):
        score = part + sum((own == other).astype(np.int32) for other in ids) * len(labels)
        label, best = np.where(score > best, own, label), np.maximum(score, best)
    return label


def cast_shadows(scenery: Scenery, camera: Camera, lighting: Lighting) -> NDArray[np.uint8]:
    """Return how much light each place of the ground loses to shadows: ``(2H, 2W)`` uint8."""
    canvas = Image.new("L", (2 * camera.width, 2 * camera.height))
    polygon = ImageDraw.Draw(canvas).polygon
    boxes = np.array(scenery.shadows)
    x0, z0, x1, z1, bottom, top, ball = boxes.T
    dx, dz = -lighting.sun[0] / lighting.sun[1], -lighting.sun[2] / lighting.sun[1]
    xa, xb = (x0, x1) if dx >= 0 else (x1, x0)
    za, zb = (z0, z1) if dz >= 0 else (z1, z0)
    # A rectangle swept in a straight line covers a hexagon; a ball covers an ellipse.
    xs = np.stack((xa, xb, xb, xb, xa, xa), 1) + dx * np.stack(
        (bottom, bottom, top, top, top, bottom), 1
    )
    zs = np.stack((za, za, za, zb, zb, zb), 1) + dz * np.stack(
        (bottom, bottom, top, top, top, bottom), 1
    )
    ring, middle, swing = np.array(SHAPES["disc"]) * 2 - 1, (bottom + top) / 2, (top - bottom) / 2
    ellipse_x = ((x0 + x1) / 2 + dx * middle)[:, None] + ((x1 - x0) / 2 + 0.4 * abs(dx) * swing)[
        :, None
    ] * ring[:, 0]
    ellipse_z = ((z0 + z1) / 2 + dz * middle)[:, None] + ((z1 - z0) / 2 + 0.4 * abs(dz) * swing)[
        :, None
    ] * ring[:, 1]
    for corners_x, corners_z in (
        (xs[ball == 0], zs[ball == 0]),
        (ellipse_x[ball == 1], ellipse_z[ball == 1]),
    ):
        points = camera.to_camera(
            np.stack((corners_x, np.full_like(corners_x, 0.04), corners_z), -1)
        )
        pixels, behind = _pixels(points, camera)
        whole = ~behind.any(1)
        for outline in pixels[whole].reshape(-1, 2 * points.shape[1]).tolist():
            polygon(outline, fill=255)
        for corners in points[~whole & ~behind.all(1)]:
            outline = _clipped(corners, camera)
            if outline:
                polygon(outline, fill=255)
    return np.asarray(
        canvas.filter(
            ImageFilter.BoxBlur(max(1.0, camera.width / (200 if lighting.shadow > 0.3 else 40)))
        )
    )
