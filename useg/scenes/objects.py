"""Add one object at the origin: a vehicle, person, tree, lamp, sign, bench and the like.

Every function draws its random numbers before it looks at distances, so that a scene is the same
street at every size; what would be too small to recognise is left out.
"""

from __future__ import annotations

from useg.scenes.scenery import (
    BLACK,
    BOARDS,
    CROWNS,
    GLASS,
    GLOW,
    LEAVES,
    OTHER,
    PEDESTRIAN,
    PLAIN,
    PLANT,
    POLE,
    POSTER,
    ROUND,
    SHAPES,
    SIGN,
    VEHICLE,
    RandomSource,
    Rgb,
    Scenery,
)

STEEL: Rgb = (92, 96, 100)


PAINTS: tuple[Rgb, ...] = (
    (188, 28, 30),
    (32, 62, 150),
    (212, 214, 216),
    (44, 46, 52),
    (140, 146, 152),
    (228, 226, 218),
    (24, 92, 70),
    (220, 160, 34),
    (104, 24, 40),
    (70, 130, 180),
)


CLOTHES: tuple[Rgb, ...] = (
    (196, 40, 48),
    (40, 70, 150),
    (235, 232, 226),
    (36, 38, 46),
    (90, 96, 104),
    (226, 176, 40),
    (62, 120, 84),
    (140, 70, 120),
    (110, 82, 60),
    (232, 120, 50),
)


SKINS: tuple[Rgb, ...] = ((226, 182, 152), (198, 146, 112), (140, 94, 66), (92, 62, 46))


HAIRS: tuple[Rgb, ...] = ((40, 30, 24), (92, 64, 40), (186, 150, 96), (24, 22, 22))


LEAF_GREENS: tuple[Rgb, ...] = (
    (66, 98, 38),
    (52, 84, 40),
    (86, 108, 44),
    (74, 92, 52),
    (104, 112, 46),
)


# length, width, sill, roof, rear overhang of the cabin, cabin length
_BODIES: dict[str, tuple[float, float, float, float, float, float]] = {
    "saloon": (4.6, 1.85, 0.92, 1.46, 0.35, 3.0),
    "hatch": (4.1, 1.8, 0.95, 1.54, 0.05, 2.9),
    "van": (5.2, 2.0, 1.1, 2.25, 0.0, 4.7),
    "bus": (9.0, 2.5, 1.1, 3.05, 0.0, 8.9),
}


def shade(color: Rgb, factor: float) -> Rgb:
    """Return a colour that is darker (below 1) or brighter by a factor."""
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def vehicle(scenery: Scenery, random: RandomSource, kind: str) -> None:
    """A car, van or bus: its middle at the origin, its front ahead."""
    length, width, sill, roof, rear, cabin = _BODIES[kind]
    paint = random.tint(random.pick(PAINTS))
    if scenery.pixels(width) < 4:
        return
    w, back, front = width / 2, -length / 2, length / 2
    scenery.box(
        (-w + 0.1, 0.1, back + 0.2), (w - 0.1, 0.3, front - 0.2), VEHICLE, BLACK, shadow=False
    )
    scenery.box((-w, 0.3, back), (w, sill, front), VEHICLE, paint, GLASS)
    for z in (back + length * 0.2, front - length * 0.19):
        for x, u in ((w + 0.01, 0.7), (-w - 0.01, -0.7)):
            scenery.face(
                (x, 0, z - u / 2), (0, 0, u), (0, 0.7, 0), VEHICLE, (22, 22, 24), shape="disc"
            )
            scenery.face(
                (x, 0.17, z - u / 4),
                (0, 0, u / 2),
                (0, 0.36, 0),
                VEHICLE,
                (150, 152, 156),
                shape="disc",
            )
    for x, z, u, lamp in (
        (-w, back - 0.01, 1.0, (206, 22, 20)),
        (w, front + 0.01, -1.0, (250, 246, 222)),
    ):
        scenery.face((x, 0.28, z), (2 * w * u, 0, 0), (0, 0.2, 0), VEHICLE, (48, 48, 52))
        scenery.face(
            (x + u * (w - 0.26), 0.52, z), (0.52 * u, 0, 0), (0, 0.13, 0), VEHICLE, (228, 226, 206)
        )
        for start in (0.04, 2 * w - 0.38):
            scenery.face(
                (x + u * start, sill - 0.28, z), (0.34 * u, 0, 0), (0, 0.18, 0), VEHICLE, lamp, GLOW
            )
    _cabin(scenery, kind, paint, (w, sill, roof - sill), back + rear, cabin)


def _cabin(
    scenery: Scenery,
    kind: str,
    paint: Rgb,
    low: tuple[float, float, float],
    z: float,
    length: float,
) -> None:
    """Add the upper half of a vehicle from ``z`` ahead; all four sides lean inwards.

    ``low`` is half its width, its foot and its height.
    """
    w, foot, rise = low
    lean = w * (0.2 if rise < 0.7 else 0.06)
    start, stop = (edge(s for s, t in SHAPES[kind] if t == 1) * length for edge in (min, max))
    for corner, along, up, outline, panes in (
        ((w, foot, z), (0.0, 0.0, length), (-lean, rise, 0.0), kind, f"{kind} panes"),
        (
            (-w, foot, z + length),
            (0.0, 0.0, -length),
            (lean, rise, 0.0),
            f"{kind} turned",
            f"{kind} panes turned",
        ),
        ((-w, foot, z), (2 * w, 0.0, 0.0), (0.0, rise, start), "screen", "pane"),
        ((w, foot, z + length), (-2 * w, 0.0, 0.0), (0.0, rise, stop - length), "screen", "pane"),
    ):
        scenery.face(corner, along, up, VEHICLE, paint, GLASS, outline)
        scenery.face(corner, along, up, VEHICLE, (36, 42, 48), GLASS, panes)
    scenery.face(
        (-w + lean, foot + rise, z + start),
        (2 * (w - lean), 0, 0),
        (0, 0, stop - start),
        VEHICLE,
        paint,
        GLASS,
    )
    scenery.shadow(-w + lean, z + start, w - lean, z + stop, foot, foot + rise)


def person(scenery: Scenery, random: RandomSource) -> None:
    """Somebody standing or walking."""
    k = random(0.86, 1.08)  # of a height of 1.75 m
    top, legs = random.tint(random.pick(CLOTHES)), random.tint(random.pick(CLOTHES[1:9]), 0.2)
    skin, hair, stride, skirt, bag = (
        random.pick(SKINS),
        random.pick(HAIRS),
        random(0.0, 0.17) * k,
        random.chance(0.25),
        random.chance(0.3),
    )
    if scenery.pixels(1.75 * k) < 8.5:
        return
    for side in (-1, 1):
        scenery.face(
            (side * stride - 0.085 * k, 0, 0),
            (0.17 * k, 0, 0),
            (side * (0.1 * k - stride), 0.86 * k, 0),
            PEDESTRIAN,
            legs,
        )
        scenery.billboard(side * stride, 0, 0.2 * k, 0.09 * k, PEDESTRIAN, BLACK)
    if skirt:
        scenery.billboard(0, 0.5 * k, 0.54 * k, 0.5 * k, PEDESTRIAN, legs, shape="skirt")
    for side in (-1, 1):
        scenery.face(
            ((side * 0.27 - 0.06) * k, 0.78 * k, 0),
            (0.12 * k, 0, 0),
            (-side * 0.06 * k, 0.64 * k, 0),
            PEDESTRIAN,
            shade(top, 0.8),
        )
        scenery.billboard(side * 0.28 * k, 0.7 * k, 0.1 * k, 0.11 * k, PEDESTRIAN, skin)
    scenery.billboard(0, 0.8 * k, 0.5 * k, 0.68 * k, PEDESTRIAN, top, ROUND, "torso")
    if bag:
        scenery.billboard(0.27 * k, 0.62 * k, 0.26 * k, 0.3 * k, PEDESTRIAN, (96, 58, 36))
    scenery.billboard(0, 1.46 * k, 0.24 * k, 0.29 * k, PEDESTRIAN, skin, shape="disc")
    scenery.billboard(0, 1.62 * k, 0.25 * k, 0.14 * k, PEDESTRIAN, hair, shape="disc")
    scenery.shadow(-0.2 * k, -0.1, 0.2 * k, 0.1, 0.0, 1.75 * k)


def tree(scenery: Scenery, random: RandomSource, height: float) -> None:
    """A trunk and a crown of ragged balls, or a conifer."""
    green, conifer, thick = (
        random.tint(random.pick(LEAF_GREENS), 0.2),
        random.chance(0.22),
        random(0.22, 0.36) * height / 5,
    )
    radius = height * random(0.26, 0.36)
    scenery.billboard(0, 0, thick, height * 0.6, PLANT, (84, 66, 50), ROUND)
    if conifer:
        for k in range(4):
            light = (green[0] * 1.5, green[1] * 1.5, green[2] * 1.3)
            scenery.billboard(
                0,
                height * (0.14 + 0.2 * k),
                height * (0.52 - 0.11 * k),
                height * 0.36,
                PLANT,
                green,
                LEAVES,
                "triangle",
                light,
            )
        scenery.shadow(
            -height * 0.2,
            -height * 0.2,
            height * 0.2,
            height * 0.2,
            height * 0.2,
            height,
            round=True,
        )
        return
    for k, (dx, dy) in enumerate(
        ((-0.55, -0.3), (0.55, -0.25), (0.0, 0.25), (-0.35, 0.1), (0.3, 0.0))
    ):
        size, light_of = radius * random(1.15, 1.5), 0.8 + 0.09 * k
        x, y = (
            radius * (dx + random(-0.15, 0.15)),
            height - radius * 1.15 + radius * (dy + random(-0.12, 0.12)) - size / 2,
        )
        color = shade(green, light_of)
        scenery.billboard(
            x,
            y,
            size,
            size,
            PLANT,
            color,
            LEAVES,
            random.pick(CROWNS),
            (color[0] * 1.6, color[1] * 1.5, color[2] * 1.2),
        )
    scenery.shadow(-radius, -radius, radius, radius, height - 2 * radius, height, round=True)
    scenery.shadow(-thick / 2, -thick / 2, thick / 2, thick / 2, 0, height - radius)


def bush(scenery: Scenery, random: RandomSource) -> None:
    """A shrub of three ragged balls."""
    green, width = random.tint(random.pick(LEAF_GREENS), 0.2), random(0.9, 1.8)
    for dx in (-0.3, 0.3, 0.0):
        size = width * random(0.6, 0.8)
        scenery.billboard(
            dx * width,
            -0.12,
            size,
            size,
            PLANT,
            green,
            LEAVES,
            random.pick(CROWNS),
            (green[0] * 1.6, green[1] * 1.5, green[2] * 1.2),
        )
    scenery.shadow(-width / 2, -0.4, width / 2, 0.4, 0.0, width * 0.6, round=True)


def lamp(scenery: Scenery, random: RandomSource, inward: float) -> None:
    """Add a street lamp with an arm over the road (``inward`` -1 or 1), or one with a lantern."""
    height, arm, old, gray = (
        random(5.0, 7.5),
        random(1.0, 1.8) * inward,
        random.chance(0.3),
        random.tint(random.pick((STEEL, (62, 68, 66), (132, 136, 138))), 0.15),
    )
    if scenery.pixels(0.22) < 0.9:
        return
    if old:
        height *= 0.62
    scenery.billboard(0, 0, 0.34, 0.9, POLE, gray, ROUND)
    scenery.billboard(0, 0.9, 0.19, height - 0.9, POLE, gray, ROUND)
    if old:
        scenery.billboard(0, height, 0.5, 0.55, POLE, (236, 222, 170), GLOW)
        scenery.billboard(0, height + 0.55, 0.62, 0.2, POLE, gray, PLAIN, "triangle")
    else:
        scenery.face(
            (min(0.0, arm) - 0.08, height - 0.16, 0),
            (abs(arm) + 0.16, 0, 0),
            (0, 0.18, 0),
            POLE,
            gray,
        )
        scenery.billboard(arm, height - 0.26, 0.75, 0.22, POLE, gray)
        scenery.billboard(arm, height - 0.31, 0.55, 0.07, POLE, (236, 222, 170), GLOW)
    scenery.shadow(-0.12, -0.12, 0.12, 0.12, 0.0, height)


def utility_pole(scenery: Scenery, random: RandomSource) -> None:
    """A wooden mast with a cross-arm and insulators."""
    height, wood = random(6.5, 8.5), random.tint((112, 92, 74))
    if scenery.pixels(0.3) < 0.9:
        return
    scenery.billboard(0, 0, 0.27, height, POLE, wood, ROUND)
    scenery.billboard(0, height - 1.0, 2.0, 0.18, POLE, wood)
    for x in (-0.85, -0.35, 0.35, 0.85):
        scenery.billboard(x, height - 0.82, 0.12, 0.2, POLE, (150, 156, 156))
    scenery.shadow(-0.15, -0.15, 0.15, 0.15, 0.0, height)


def traffic_light(scenery: Scenery, random: RandomSource, inward: float) -> None:
    """Add a pole with one or two three-lamp heads, which are traffic signs, as in CARLA."""
    height, arm, lit, casing = (
        random(3.0, 3.6),
        random.chance(0.5),
        random.pick((0, 1, 2)),
        random.pick(((38, 40, 40), (52, 56, 50), (212, 168, 34))),
    )
    if scenery.pixels(0.5) < 2.5:
        return
    pole_height = 5.6 if arm else height + 1.0
    scenery.billboard(0, 0, 0.2, pole_height, POLE, STEEL, ROUND)
    heads = [(0.0, height)]
    if arm:
        scenery.face((min(0.0, 2.6 * inward), 5.4, 0), (2.6, 0, 0), (0, 0.18, 0), POLE, STEEL)
        heads.append((2.5 * inward, 4.5))
    for x, y in heads:
        scenery.billboard(x, y, 0.56, 1.3, SIGN, casing)
        for k, color in enumerate(((40, 214, 120), (250, 180, 30), (240, 36, 28))):
            on = k == lit
            scenery.billboard(
                x,
                y + 0.06 + 0.41 * k,
                0.36,
                0.36,
                SIGN,
                color if on else (66, 60, 52),
                GLOW if on else PLAIN,
                "octagon",
            )
    scenery.shadow(-0.1, -0.1, 0.1, 0.1, 0.0, pole_height)


def road_sign(scenery: Scenery, random: RandomSource) -> None:
    """A plate on a post."""
    kind, low, size, color = (
        random.pick(tuple(_PLATES)),
        random(2.0, 2.4),
        random(0.75, 1.0),
        random.pick(((22, 74, 168), (20, 112, 70))),
    )
    if scenery.pixels(size) < 4:
        return
    scenery.billboard(0, 0, 0.13, low + 0.3, POLE, (142, 146, 150), ROUND)
    for x, y, w, h, paint, shape in _PLATES[kind]:
        scenery.billboard(
            x * size, low + y * size, w * size, h * size, SIGN, paint or color, shape=shape
        )
    scenery.shadow(-size / 2, -0.05, size / 2, 0.05, low, low + size)


_RED, _WHITE = (204, 24, 28), (240, 240, 236)


# Layers of a plate: centre, foot, width, height in plate sizes, colour (None: random), outline.
_PLATES: dict[str, tuple[tuple[float, float, float, float, Rgb | None, str], ...]] = {
    "limit": (
        (0, 0, 1, 1, _RED, "disc"),
        (0, 0.14, 0.72, 0.72, _WHITE, "disc"),
        (0, 0.34, 0.36, 0.32, (40, 40, 42), "square"),
    ),
    "warning": ((0, 0, 1.15, 1, _RED, "triangle"), (0, 0.12, 0.72, 0.62, _WHITE, "triangle")),
    "works": ((0, 0, 1.15, 1, _RED, "triangle"), (0, 0.12, 0.72, 0.62, (250, 206, 40), "triangle")),
    "stop": ((0, 0, 1, 1, _RED, "octagon"), (0, 0.38, 0.76, 0.24, _WHITE, "square")),
    "priority": (
        (0, 0, 1.1, 1.1, _WHITE, "diamond"),
        (0, 0.18, 0.74, 0.74, (250, 200, 30), "diamond"),
    ),
    "one way": (
        (0, 0, 1, 1, _WHITE, "square"),
        (0, 0.06, 0.88, 0.88, None, "square"),
        (0, 0.18, 0.46, 0.64, _WHITE, "arrow"),
    ),
    "guide": (
        (0, 0, 1.9, 1, _WHITE, "square"),
        (0, 0.06, 1.78, 0.88, None, "square"),
        (-0.4, 0.2, 0.36, 0.6, _WHITE, "arrow"),
        (0.32, 0.5, 0.76, 0.16, _WHITE, "square"),
    ),
}


def clutter(scenery: Scenery, random: RandomSource, tall: bool) -> None:
    """Street furniture, CARLA's class Other; only what is seen above parked cars when ``tall``."""
    draw = random.pick(
        (_post_box, _advertising_board, _kiosk)
        if tall
        else (_post_box, _advertising_board, _kiosk, _bin, _bench, _hydrant, _crates, _barrier)
    )
    color, paint = (
        random.tint(random.pick(((46, 96, 60), (60, 66, 74), (150, 40, 40), (40, 66, 128)))),
        random.tint(random.pick(PAINTS)),
    )
    bright = random.pick(((204, 32, 30), (236, 184, 30)))
    if scenery.pixels(0.7) >= 3:
        draw(scenery, color, paint, bright)


def _bin(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    scenery.box(
        (-0.4, 0.08, -0.4),
        (0.4, 1.1, 0.4),
        OTHER,
        color,
        top=shade(color, 0.7),
    )
    scenery.billboard(0, 0.82, 0.6, 0.12, OTHER, BLACK)


def _bench(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    scenery.box((-0.9, 0.4, -0.3), (0.9, 0.5, 0.25), OTHER, (136, 92, 54))
    scenery.box((-0.9, 0.58, 0.2), (0.9, 1.0, 0.27), OTHER, (136, 92, 54), shadow=False)
    for x in (-0.75, 0.75):
        scenery.billboard(x, 0, 0.12, 0.42, OTHER, BLACK)


def _hydrant(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    scenery.billboard(0, 0, 0.36, 0.75, OTHER, bright, ROUND)
    scenery.billboard(0, 0.42, 0.62, 0.18, OTHER, bright)
    scenery.billboard(0, 0.66, 0.38, 0.28, OTHER, bright, ROUND, "disc")
    scenery.shadow(-0.18, -0.18, 0.18, 0.18, 0, 0.9)


def _post_box(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    scenery.box((-0.35, 0, -0.3), (0.35, 1.35, 0.3), OTHER, bright)
    scenery.billboard(0, 0.98, 0.5, 0.08, OTHER, BLACK)
    scenery.billboard(0, 0.45, 0.42, 0.3, OTHER, (238, 236, 228))


def _advertising_board(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    for x in (-1.0, 1.0):
        scenery.billboard(x, 0, 0.14, 1.1, OTHER, BLACK)
    scenery.billboard(0, 0.95, 2.9, 1.9, OTHER, (70, 72, 76))
    scenery.billboard(0, 1.05, 2.7, 1.7, OTHER, paint, POSTER, second=(240, 236, 222))
    scenery.shadow(-1.4, -0.05, 1.4, 0.05, 0.95, 2.85)


def _kiosk(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    scenery.box((-0.75, 0, -0.6), (0.75, 2.3, 0.6), OTHER, color, top=BLACK)
    scenery.billboard(0, 1.05, 1.2, 0.85, OTHER, paint, POSTER, second=(240, 236, 222))
    scenery.box((-0.9, 2.3, -0.75), (0.9, 2.5, 0.75), OTHER, BLACK, shadow=False)


def _crates(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    for x, y in ((-0.4, 0.0), (0.4, 0.0), (-0.1, 0.6)):
        scenery.box(
            (x - 0.36, y, -0.35),
            (x + 0.36, y + 0.56, 0.35),
            OTHER,
            (176, 132, 80),
            BOARDS,
            (104, 72, 42),
            (0.18, 1.0),
        )


def _barrier(scenery: Scenery, color: Rgb, paint: Rgb, bright: Rgb) -> None:
    for x in (-0.55, 0.55):
        scenery.billboard(x, 0, 0.12, 1.0, OTHER, BLACK)
    for k in range(6):
        scenery.billboard(
            -0.75 + 0.3 * k, 0.55, 0.3, 0.42, OTHER, (232, 90, 26) if k % 2 else (240, 238, 230)
        )
