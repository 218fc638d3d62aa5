"""Faces + a camera and weather -> a canvas of face numbers -> the exact label and the picture.

The faces are painted once, as numbers, on a canvas of twice the size. Label and colour are both
looked up from those numbers, so they cannot disagree. Then the canvas is halved: colours by
averaging, labels by a majority of four.

Where a pixel lies on its face follows from the plane of the face, so all texture is computed in
metres and looks right in perspective.
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

# Nothing closer to the camera is drawn, in metres.
_NEAR = 0.35

# Canvas pixels that are coloured at once, which bounds the memory of large pictures.
_BAND = 1 << 18

# Strength and fineness (1/m) of the grain of each material; lamps have none.
_GRAIN = np.zeros((256, 2), np.float32)
_GRAIN[:11] = (0.05, 19.0)
_GRAIN[scenery.GLOW] = (0.0, 1.0)
_GRAIN[[scenery.ASPHALT, scenery.SLABS, scenery.LEAVES, scenery.BLOCKS, scenery.GLASS]] = (
    (0.06, 47.0),
    (0.07, 23.0),
    (0.24, 6.0),
    (0.10, 8.0),
    (0.02, 2.0),
)


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


@functools.cache
def _noise(roughness: float) -> Floats:
    """Make a tile of noise ``(256, 256)`` that repeats without a seam: mean 0, deviation 1.

    The larger ``roughness``, the larger its lumps.
    """
    waves = np.fft.rfft2(np.random.default_rng(11).standard_normal((256, 256)))
    pitch = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None, :])
    pitch[0, 0] = 1.0
    tile = np.fft.irfft2(waves / pitch**roughness)
    noise: Floats = ((tile - tile.mean()) / tile.std()).astype(np.float32)
    return noise


def _grain(u: Floats, v: Floats, roughness: float = 0.5) -> Floats:
    rows, columns = v.astype(np.int32) & 255, u.astype(np.int32) & 255
    return np.take(_noise(roughness).ravel(), (rows << 8) | columns)


def light(
    canvas: NDArray[np.int32],
    faces: Faces,
    shadow: NDArray[np.uint8],
    camera: Camera,
    lighting: Lighting,
) -> Floats:
    """Colour a canvas.

    Args:
        canvas: face numbers ``(2H, 2W)``.
        faces: what the numbers mean.
        shadow: ``(2H, 2W)`` uint8, 255 where the sun does not reach the ground.
        camera: the camera.
        lighting: the weather.

    Returns:
        The picture ``(H, W, 3)`` float32, 0-255 and more where it is too bright.
    """
    H, W = camera.height, camera.width
    picture = np.empty((H, W, 3), np.float32)
    lit = _lit_colors(faces, lighting)
    rows = max(1, _BAND // (4 * W))
    for top in range(0, H, rows):
        part = slice(2 * top, 2 * (top + rows))
        colors = _band(canvas[part], faces, lit, shadow[part], camera, lighting, 2 * top)
        picture[top : top + rows] = (
            (
                colors[:, ::2, ::2]
                + colors[:, 1::2, ::2]
                + colors[:, ::2, 1::2]
                + colors[:, 1::2, 1::2]
            )
            * 0.25
        ).transpose(1, 2, 0)
    return picture


def _lit_colors(faces: Faces, lighting: Lighting) -> Floats:
    """Colours of all faces in this light: ``(6, F)``."""
    sun = np.array(lighting.sun) / np.linalg.norm(lighting.sun)
    facing = np.maximum(sun @ faces.normals, 0.0)
    round_ones = np.isin(faces.materials, (scenery.LEAVES, scenery.ROUND)) | (
        faces.labels == scenery.PEDESTRIAN
    )
    facing = np.where(round_ones & (faces.normals[1] < 0.5), 0.35 + 0.45 * facing, facing)
    open_sky = 0.86 + 0.14 * faces.normals[1]
    strength = (
        np.array(lighting.sunlight)[:, None] * facing
        + np.array(lighting.daylight)[:, None] * open_sky
    )
    strength[:, faces.materials == scenery.GLOW] = 0.85 + 0.3 * lighting.lit
    lit: Floats = (faces.colors * np.concatenate((strength, strength))).astype(np.float32)
    return lit


def _band(
    canvas: NDArray[np.int32],
    faces: Faces,
    lit: Floats,
    shadow: NDArray[np.uint8],
    camera: Camera,
    lighting: Lighting,
    top: int,
) -> Floats:
    """Colour some rows of the canvas that start at row ``top``: ``(3, h, 2W)``."""
    h, w = canvas.shape
    x = ((np.arange(w, dtype=np.float32) + 0.5 - camera.width) / (2 * camera.focal)).astype(
        np.float32
    )
    y = (
        (np.arange(top, top + h, dtype=np.float32) + 0.5 - 2 * camera.horizon) / (2 * camera.focal)
    ).astype(np.float32)[:, None]
    plane = [np.take(row, canvas) for row in faces.planes]
    depth = 1.0 / np.maximum(plane[6] * x + plane[7] * y + plane[8], 1e-4)
    u, v = (
        (plane[0] * x + plane[1] * y + plane[2]) * depth,
        (plane[3] * x + plane[4] * y + plane[5]) * depth,
    )
    materials = np.take(faces.materials, canvas)
    grain = _GRAIN[faces.materials]
    fine = np.take(grain[:, 1].copy(), canvas)
    factor = 1.0 + np.take(grain[:, 0].copy(), canvas) * _grain(u * fine, v * fine) / (
        1.0 + 0.03 * depth
    )
    colors: Floats = np.stack([np.take(row, canvas) for row in lit[:3]]) * factor
    flat, numbers = colors.reshape(3, -1), canvas.ravel()
    for material, draw in _MATERIALS.items():
        at = np.flatnonzero(materials.ravel() == material)
        if len(at):
            places = _Places(
                u.ravel()[at], v.ravel()[at], depth.ravel()[at], numbers[at], faces, lit, lighting
            )
            flat[:, at] = draw(flat[:, at], places)
    dark = np.take(faces.shaded, canvas) * (shadow * np.float32(lighting.shadow / 255))
    for k in range(3):
        colors[k] *= 1.0 - dark * (1.0, 0.96, 0.86)[k]
    clear = np.exp(depth * -lighting.mist)
    for k in range(3):
        colors[k] = lighting.horizon[k] + (colors[k] - lighting.horizon[k]) * clear
    sky = np.flatnonzero(numbers == 0)
    if len(sky):
        flat[:, sky] = _sky(
            np.broadcast_to(x, (h, w)).ravel()[sky],
            np.broadcast_to(y, (h, w)).ravel()[sky],
            camera,
            lighting,
        )
    return colors


def _sky(x: Floats, y: Floats, camera: Camera, lighting: Lighting) -> Floats:
    """Gradient, sun and clouds for rays ``(x, y, 1)``: ``(3, n)``."""
    axes = camera.axes().astype(np.float32)
    east, up, ahead = (x * axes[0, k] + y * axes[1, k] + axes[2, k] for k in range(3))
    length = np.sqrt(x * x + y * y + 1)
    rise = np.clip(up / length, 0, 1)
    sun = np.array(lighting.sun, np.float32) / np.linalg.norm(lighting.sun)
    toward = np.maximum((east * sun[0] + up * sun[1] + ahead * sun[2]) / length, 0)
    high = 1.0 / (np.maximum(up, 0) + 0.15)
    lumps = _grain(east * high * 120 + 2000, ahead * high * 120 + 2000, 1.8)
    cover = (
        np.clip((lumps + lighting.clouds) * 0.55, 0, 1)
        * np.clip(rise * 7, 0.25, 1)
        * (0.8 if lighting.clouds > -3 else 0)
    )
    fade = np.minimum(rise * 1.7, 1) ** 0.7
    glow = 0.35 * toward**12 + 0.9 * toward**300
    cloud = 0.55 * np.array(lighting.horizon) + 0.45 * 255 * np.minimum(
        np.array(lighting.daylight) + np.array(lighting.sunlight), 1.0
    )
    colors = np.empty((3, len(x)), np.float32)
    for k in range(3):
        base = lighting.horizon[k] + (lighting.zenith[k] - lighting.horizon[k]) * fade
        base += (cloud[k] * (0.93 + 0.07 * np.clip(lumps, -2, 2)) - base) * cover
        colors[k] = base + 255 * glow * lighting.sunlight[k]
    return colors


@dataclass(frozen=True)
class _Places:
    """Pixels of one material: right, up and depth in metres, and their face; ``(n,)`` each."""

    u: Floats
    v: Floats
    depth: Floats
    number: NDArray[np.int32]
    faces: Faces
    lit: Floats
    lighting: Lighting

    def grain(self, k: int) -> Floats:
        """Return the face's number ``k`` (0 or 1) for its material."""
        return np.take(self.faces.grains[k], self.number)

    def mix(self, colors: Floats, share: Floats) -> Floats:
        """Blend the face's second colour into ``colors``."""
        for k in range(3):
            colors[k] += (np.take(self.lit[3 + k], self.number) - colors[k]) * share
        return colors


def _fraction(value: Floats) -> tuple[Floats, Floats]:
    whole = np.floor(value)
    return value - whole, whole


def _facade(c: Floats, at: _Places) -> Floats:
    """Rows of windows with frames; some are lit at dusk, and the foot of the house is dirty."""
    across, column = _fraction(at.u / at.grain(0))
    aloft, row = _fraction(at.v / at.grain(1))
    chance = _grain(column * 37 + at.number * 91, row * 53 + at.number * 17, 0.0)
    dx, dy = np.abs(across - 0.5), np.abs(aloft - 0.55)
    c = c * np.minimum(0.82 + 0.15 * at.v, 1.0)
    c[:, (dx < 0.33) & (dy < 0.34)] *= 1.22
    pane = np.flatnonzero((dx < 0.27) & (dy < 0.28))
    chance, reflected = chance[pane], 0.08 + 0.25 * (aloft[pane] - 0.3)
    lamp = chance > 2.2 - 1.6 * at.lighting.lit
    for k in range(3):
        glass = (
            np.take(at.lit[3 + k], at.number[pane]) * (0.75 + 0.25 * chance)
            + np.float32(at.lighting.horizon[k]) * reflected
        )
        c[k, pane] = np.where(lamp, (250, 204, 128)[k] * (0.35 + 0.65 * at.lighting.lit), glass)
    return c


def _blocks(c: Floats, at: _Places) -> Floats:
    """Courses of bricks, stones or tiles with joints, each block a little different."""
    wide, tall = at.grain(0), at.grain(1)
    aloft, row = _fraction(at.v / tall)
    across, column = _fraction(at.u / wide + 0.5 * (row % 2))
    c = c * (
        (1.0 + 0.13 * _grain(column * 7 + at.number, row * 5 + at.number, 0.0))
        * np.minimum(0.75 + 0.3 * at.v, 1.0)
    )
    joint: Floats = ((aloft < 0.14) | (across * wide < 0.14 * tall)).astype(np.float32)
    return at.mix(c, joint * np.clip(1.6 - at.depth * 0.05 / np.maximum(tall, 0.2), 0.2, 1))


def _boards(c: Floats, at: _Places) -> Floats:
    """Upright boards with dark gaps and streaks along the wood."""
    across, board = _fraction(at.u / at.grain(0))
    c = c * (
        1.0
        + 0.12 * _grain(board * 11 + at.number, board * 3 + at.number, 0.0)
        + 0.06 * _grain(at.u * 40, at.v * 3)
    )
    return at.mix(c, (across < 0.2) * np.clip(1.5 - at.depth * 0.04, 0.3, 1))


def _slabs(c: Floats, at: _Places) -> Floats:
    """Paving: square slabs with joints that vanish in the distance."""
    across, column = _fraction(at.u / 0.75)
    along, row = _fraction(at.v / 0.75)
    c = c * (1.0 + 0.05 * _grain(column * 3, row * 5, 0.0))
    return at.mix(c, ((across < 0.08) | (along < 0.08)) * np.clip(1.3 - at.depth * 0.06, 0, 0.8))


def _asphalt(c: Floats, at: _Places) -> Floats:
    """Stains, and the streaks that tyres leave along the road."""
    return c * (
        1.0 + 0.05 * _grain(at.u * 24, at.v * 1.5, 1.5) + 0.06 * _grain(at.u * 20, at.v * 20, 1.2)
    )


def _leaves(c: Floats, at: _Places) -> Floats:
    """Clumps of leaves: light tops, dark hollows."""
    return at.mix(c, np.clip(0.5 * _grain(at.u * 14, at.v * 14, 1.0) + 0.15, 0, 1))


def _round(c: Floats, at: _Places) -> Floats:
    """Something like a cylinder: darker towards both sides."""
    share = at.u / at.grain(0)
    return c * (0.62 + 1.5 * share * (1 - share) + 0.12 * (share < 0.4))


def _glass(c: Floats, at: _Places) -> Floats:
    """Lacquer and window glass: a soft reflection of the sky that grows upwards."""
    shine = np.clip(0.1 + 0.16 * at.v + 0.05 * _grain(at.u * 9, at.v * 9, 1.2), 0, 0.4)
    glazed: Floats = c + (np.array(at.lighting.horizon, np.float32)[:, None] * 0.9 - c) * shine
    return glazed


def _poster(c: Floats, at: _Places) -> Floats:
    """An advertisement: a disc, a slogan and a blob in the second colour."""
    across, aloft = at.u / at.grain(0), at.v / at.grain(1)
    disc = (across - 0.27) ** 2 + ((aloft - 0.6) / 1.5) ** 2 < 0.03
    slogan = (np.abs(aloft - 0.2) < 0.07) & (np.abs(across - 0.5) < 0.38)
    blob = (across > 0.5) & (aloft > 0.42) & (_grain(at.u * 30 + at.number, at.v * 30, 1.7) > 0.2)
    return at.mix(c, (disc | slogan | blob).astype(np.float32))


_MATERIALS = {
    scenery.FACADE: _facade,
    scenery.BLOCKS: _blocks,
    scenery.BOARDS: _boards,
    scenery.SLABS: _slabs,
    scenery.ASPHALT: _asphalt,
    scenery.LEAVES: _leaves,
    scenery.ROUND: _round,
    scenery.GLASS: _glass,
    scenery.POSTER: _poster,
}
