"""Colour a painted street: materials, light, shadow, mist and sky, one band of rows at a time.

Where a pixel lies on its face follows from the plane of the face, so all texture is computed in
metres and looks right in perspective.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.scenes import scenery
from useg.scenes.render import Camera, Faces, Floats, Lighting

_BAND = (
    1 << 18
)  # canvas pixels that are coloured at once, which bounds the memory of large pictures


# material: strength and fineness (1/m) of its grain; lamps have none
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
