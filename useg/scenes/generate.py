"""Make street scenes with exact labels from a seed: a data set without a download.

A street is laid out (layout.py) from objects and houses (objects.py, buildings.py), painted in
perspective (render.py), lit (light.py) and seen through the lens and sensor of a camera (here). The
classes are CARLA's; the label is what is really visible at each pixel: shadows, mist, rain and
reflections change the picture alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from useg.classes import CARLA, write_classes
from useg.errors import UsageError
from useg.files import make_folder, replacing_folder
from useg.images.image_files import Sample, write_picture
from useg.ownership import SCENE_MARK, recognize_none
from useg.scenes import scenery
from useg.scenes.layout import hood, lay_out
from useg.scenes.render import (
    Camera,
    Floats,
    Lighting,
    cast_shadows,
    light,
    majority_label,
    paint_faces,
    project,
)
from useg.scenes.scenery import RandomSource

_SEEDS_APART = (
    1_000_003  # data sets of different seeds share no scene while they are smaller than this
)


_LIGHTINGS = (
    Lighting(
        "sun",
        (0.6, 1.0, 0.3),
        (0.52, 0.48, 0.38),
        (0.58, 0.60, 0.66),
        (70, 124, 200),
        (190, 212, 232),
        -0.4,
        0.0016,
        0.58,
    ),
    Lighting(
        "overcast",
        (0.1, 1.0, 0.1),
        (0.14, 0.14, 0.14),
        (0.70, 0.72, 0.75),
        (150, 160, 172),
        (206, 210, 214),
        1.2,
        0.004,
        0.22,
    ),
    Lighting(
        "dusk",
        (0.9, 0.45, 0.8),
        (0.34, 0.20, 0.10),
        (0.42, 0.40, 0.50),
        (46, 58, 104),
        (232, 164, 118),
        0.0,
        0.003,
        0.3,
        lit=1.0,
    ),
    Lighting(
        "rain",
        (0.1, 1.0, 0.1),
        (0.06, 0.06, 0.07),
        (0.52, 0.55, 0.60),
        (98, 106, 118),
        (156, 164, 172),
        1.6,
        0.010,
        0.15,
        lit=0.35,
    ),
)


_LIGHTING_PROBABILITIES = (0.42, 0.24, 0.16, 0.18)


def make_scene(seed: int, size: tuple[int, int] = (256, 192)) -> Sample:
    """Make one street scene, a pure function of seed and size.

    Args:
        seed: any whole number from 0.
        size: width and height in pixels, 32 to 4096 each.

    Returns:
        ``image`` ``(height, width, 3)`` uint8, ``label`` ``(height, width)`` uint8: CARLA's 0-12.

    Raises:
        UsageError: a size or seed that is not possible.

    Example:
        >>> make_scene(7, (128, 96)).image.shape
        (96, 128, 3)
    """
    _check(seed, size)
    rng = np.random.default_rng(seed)
    random = RandomSource(rng)
    lighting, camera = _draw_lighting(random), _draw_camera(random, size)
    scenery, x = lay_out(random, camera.focal)
    camera = replace(camera, x=x)
    if random.chance(0.75):
        hood(scenery, random, camera.focal, camera.width, camera.height, camera.horizon)
    faces = project(scenery, camera)
    canvas = paint_faces(faces, camera)
    label = majority_label(canvas, faces.labels)
    picture = light(canvas, faces, cast_shadows(scenery, camera, lighting), camera, lighting)
    if lighting.name == "rain":
        picture = _add_rain(picture, label, camera, rng)
    return Sample(_simulate_sensor(picture, lighting, rng), label)


def _draw_lighting(random: RandomSource) -> Lighting:
    roll, lighting = random(), _LIGHTINGS[-1]
    for candidate, odds in zip(_LIGHTINGS, _LIGHTING_PROBABILITIES, strict=True):
        if roll < odds:
            lighting = candidate
            break
        roll -= odds
    turn, height, light = random(0, 2 * np.pi), random(0.55, 1.15), random(0.88, 1.1)
    reach = float(np.hypot(lighting.sun[0], lighting.sun[2]))
    ahead = (
        np.sin(turn) if lighting.name != "dusk" else 0.4 + 0.6 * np.sin(turn)
    )  # dusk often looks into the sun
    return replace(
        lighting,
        sun=(reach * float(np.cos(turn)), lighting.sun[1] * height, reach * float(ahead)),
        daylight=(
            lighting.daylight[0] * light,
            lighting.daylight[1] * light,
            lighting.daylight[2] * light,
        ),
        clouds=lighting.clouds + random(-0.8, 0.5),
        mist=lighting.mist * random(0.6, 1.8),
    )


def _draw_camera(random: RandomSource, size: tuple[int, int]) -> Camera:
    width, height = size
    bent = random.chance(0.4)
    return Camera(
        width,
        height,
        focal=max(width, height * 4 / 3) * random(0.64, 0.8),
        horizon=height * random(0.42, 0.52),
        x=0.0,
        y=random(2.1, 2.7) if random.chance(0.2) else random(1.35, 1.75),
        yaw=random(-0.06, 0.06),
        roll=random(-0.03, 0.03) if random.chance(0.3) else 0.0,
        curve=random(-0.0016, 0.0016) * bent,
        slope=random(-0.0006, 0.0006) * bent,
    )


def _add_rain(
    picture: Floats, label: NDArray[np.uint8], camera: Camera, rng: np.random.Generator
) -> Floats:
    """Let wet ground mirror what stands above the horizon, and add streaks of rain."""
    H, W, _ = picture.shape
    soft = _blurred(picture, W / 120)
    rows = np.arange(H)
    below = np.maximum(rows - camera.horizon, 0.0)
    mirrored = soft[np.clip(2 * camera.horizon - rows, 0, H - 1).astype(int)]
    puddles = Image.fromarray(rng.random((9, 5), np.float32)).resize(
        (W, H), Image.Resampling.BICUBIC
    )
    share = (
        np.clip(0.5 - 0.5 * below / H, 0.1, 0.5)[:, None] * (0.4 + 1.0 * np.asarray(puddles))
    ).astype(np.float32)
    share *= np.isin(label, (scenery.ROAD, scenery.LINE)) + 0.5 * (label == scenery.PAVEMENT)
    picture = picture + (mirrored - picture) * share[..., None]
    streaks = Image.new("L", (W, H))
    draw = ImageDraw.Draw(streaks)
    lean = rng.uniform(-0.25, 0.25)
    for x, y, length in (rng.random((90, 3)) * (W * 1.1, H, H * 0.09)).tolist():
        draw.line(
            (x, y, x + lean * (length + H * 0.03), y + length + H * 0.03),
            fill=255,
            width=max(1, W // 300),
        )
    return picture + (200 - picture) * (np.asarray(streaks, np.float32)[..., None] * (0.16 / 255))


def _blurred(picture: Floats, radius: float) -> Floats:
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(
        ImageFilter.BoxBlur(radius)
    )
    return np.asarray(image, np.float32)


def _simulate_sensor(
    picture: Floats, lighting: Lighting, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Bloom around lamps, lens blur and vignette, exposure, noise."""
    H, W, _ = picture.shape
    exposure, noise, blur, tint = (
        rng.uniform(0.9, 1.12),
        rng.uniform(1.5, 4.5),
        rng.uniform(0, 0.3),
        rng.uniform(-0.03, 0.03),
    )
    if lighting.lit:
        bright: Floats = np.maximum(picture - 190, 0)
        picture = picture + _blurred(bright * np.float32(2.5), W / 40) * np.float32(
            0.6 * lighting.lit
        )
    down, across = np.linspace(-1, 1, H)[:, None], np.linspace(-1, 1, W)
    vignette = 1.0 - 0.16 * (down * down + across * across)
    picture = picture * (vignette[..., None] * exposure * (1 + tint, 1, 1 - tint)).astype(
        np.float32
    )
    shot = rng.standard_normal(picture.shape, np.float32)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if blur > 0.15:
        image = image.filter(ImageFilter.BoxBlur(blur))
    sharp = np.asarray(image, np.float32) + shot * np.float32(
        noise * (1.25 if lighting.lit else 1.0)
    )
    return np.clip(sharp, 0, 255).astype(np.uint8)


def _check(seed: int, size: tuple[int, int]) -> None:
    if not all(32 <= side <= 4096 for side in size):
        raise UsageError(
            f"scenes of {size[0]}x{size[1]} pixels cannot be made; "
            "give a width and a height of 32 to 4096, such as 256x192"
        )
    if seed < 0:
        raise UsageError(
            f"the seed is {seed}, but it must not be negative; give a whole number from 0"
        )


def write_scenes(out: Path, count: int, size: tuple[int, int] = (256, 192), seed: int = 0) -> None:
    """Write a data set of street scenes in CARLA's layout.

    ``out/CameraRGB/scene_00000.png`` is the image, ``out/CameraSeg/scene_00000.png`` holds class
    ids in its red channel, and ``out/classes.toml`` names the classes. Everything is written beside
    ``out`` and renamed at the end, so an interruption leaves nothing.

    Args:
        out: a folder that does not exist yet or is empty.
        count: how many scenes.
        size: width and height in pixels, 32 to 4096 each.
        seed: data sets of different seeds have no scene in common.

    Raises:
        UsageError: something else than that was given.

    Example:
        >>> write_scenes(Path("scenes"), 500, (128, 96), seed=1)  # doctest: +SKIP
    """
    _check(seed, size)
    if not 1 <= count <= _SEEDS_APART:
        raise UsageError(f"{count} scenes cannot be made; give a count of 1 to {_SEEDS_APART}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise UsageError(
            f"{out} {what}, but scenes need a new or empty folder; choose another one or remove it"
        )
    make_folder(out.absolute().parent)
    with replacing_folder(out, recognize_none) as draft:
        _fill(draft, count, size, seed)


def _fill(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    for name in ("CameraRGB", "CameraSeg"):
        (folder / name).mkdir()
    for k in range(count):
        sample = make_scene(seed * _SEEDS_APART + k, size)
        mask = np.zeros_like(sample.image)
        mask[..., 0] = sample.label
        for kind, pixels in (("CameraRGB", sample.image), ("CameraSeg", mask)):
            write_picture(folder / kind / f"scene_{k:05d}.png", pixels, SCENE_MARK)
    write_classes(folder / "classes.toml", CARLA)
