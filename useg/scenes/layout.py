"""Lay out a whole street: road, pavements, lots with houses and gardens, traffic, people.

Faces are painted back to front without a depth buffer. That is right here because planes separate
the bands from the camera outwards: the camera stands on the road, so the road's traffic hides the
objects on the pavements, and these hide what lies behind the pavements. Planes across the street
separate the lots, and inside a lot what is far from the road is painted first. The mild bends that
the camera adds (render.py) do not change that order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from useg.scenes import buildings, objects
from useg.scenes.scenery import (
    ASPHALT,
    BACKDROP,
    BUILDING,
    FACADE,
    GLASS,
    GROUND,
    HOOD,
    LEAVES,
    LINE,
    LOTS,
    PAVEMENT,
    PAVEMENTS,
    PLAIN,
    PLANT,
    ROAD,
    SLABS,
    TRAFFIC,
    VEHICLE,
    RandomSource,
    Rgb,
    Scenery,
)

_KERB = 0.14


_STRIPS = (
    0.4,
    4.0,
    7.0,
    11.0,
    16.0,
    23.0,
    33.0,
    48.0,
    70.0,
    110.0,
    190.0,
    400.0,
)  # the ground bends at these distances


@dataclass(frozen=True)
class StreetPlan:
    """Measures of a street, in metres; a crossing at 0 means none."""

    half: float
    pavement: float
    end: float
    camera_x: float
    crossing: float
    parking: bool

    def seen_from(self, x: float) -> float:
        """The distance at which something at ``x`` comes into the picture."""
        return max(5.0, abs(x - self.camera_x) * 1.6)


def lay_out(random: RandomSource, focal: float) -> tuple[Scenery, float]:
    """Build a street.

    Args:
        random: the source of all random numbers.
        focal: the camera's focal length in pixels.

    Returns:
        The scenery and the camera's place across the road (x).
    """
    parking = random.chance(0.45)
    half = random(3.4, 4.0) + (2.1 if parking else 0.0)
    plan = StreetPlan(
        half,
        random(2.6, 4.2),
        random(55.0, 100.0),
        random(1.2, 2.1),
        random(9.0, 17.0) if random.chance(0.3) else 0.0,
        parking,
    )
    scenery = Scenery(focal)
    _ground(scenery, random, plan)
    _backdrop(scenery, random, plan)
    first = random.shuffled(
        ("fence", "wall")
    )  # a fence first on one side, a wall first on the other: both are in most scenes
    yards = _lots(scenery, random, plan, -1, [*first, "hedge"]) + _lots(
        scenery, random, plan, 1, [*first[::-1], "hedge"]
    )
    _furniture(scenery, random, plan, yards)
    _people(scenery, random, plan)
    _traffic(scenery, random, plan)
    return scenery, plan.camera_x


def _flat_rectangle(
    scenery: Scenery,
    x0: float,
    x1: float,
    z0: float,
    z1: float,
    y: float,
    label: int,
    color: Rgb,
    material: int = PLAIN,
    second: Rgb = (0, 0, 0),
) -> None:
    """Lay a flat rectangle in strips, so that it can follow a bend."""
    cuts = [z0, *(z for z in _STRIPS if z0 < z < z1), z1]
    for near, far in itertools.pairwise(cuts):
        scenery.face(
            (x0, y, near),
            (x1 - x0, 0, 0),
            (0, 0, far - near),
            label,
            color,
            material,
            second=second,
        )


def _ground(scenery: Scenery, random: RandomSource, plan: StreetPlan) -> None:
    scenery.move_to(GROUND)
    half, outer = plan.half, plan.half + plan.pavement
    _flat_rectangle(
        scenery,
        -260,
        260,
        0.4,
        400,
        _KERB - 0.02,
        PLANT,
        random.tint((92, 112, 58)),
        LEAVES,
        (128, 138, 84),
    )
    gray, stone = (
        random(92, 138),
        random.tint(random.pick(((168, 160, 150), (150, 148, 148), (176, 158, 138))), 0.1),
    )
    joints = (stone[0] * 0.7, stone[1] * 0.7, stone[2] * 0.7)
    _flat_rectangle(
        scenery, -half, half, 0.4, plan.end + 30, 0, ROAD, (gray, gray, gray * 1.02), ASPHALT
    )
    for _ in range(3):
        x, z, patch = random(-half, half - 1.5), random(4, 25), gray * random(0.7, 0.9)
        scenery.face(
            (x, 0, z),
            (random(0.7, 1.5), 0, 0),
            (0, 0, random(1, 4)),
            ROAD,
            (patch, patch, patch),
            ASPHALT,
        )
    for side in (-1, 1):
        inner = side * half
        left, right = min(inner, side * outer), max(inner, side * outer)
        _flat_rectangle(
            scenery, left, right, 0.4, plan.end + 30, _KERB, PAVEMENT, stone, SLABS, joints
        )
        cuts = [z for z in _STRIPS if z < plan.end]
        for near, far in itertools.pairwise(cuts):
            start, along = (far, near - far) if side > 0 else (near, far - near)
            scenery.face((inner, 0, start), (0, 0, along), (0, _KERB, 0), PAVEMENT, (188, 184, 178))
        _flat_rectangle(
            scenery,
            min(inner, inner + side * 0.22),
            max(inner, inner + side * 0.22),
            0.4,
            60,
            _KERB,
            PAVEMENT,
            (196, 192, 186),
        )
    _marks(scenery, random, plan)


def _marks(scenery: Scenery, random: RandomSource, plan: StreetPlan) -> None:
    """Lane marks: a dashed or double middle, edges, bays, a crossing with stop lines, arrows."""
    white, width = (226.0, 224.0, 216.0), random(0.18, 0.26)
    middle: Rgb = random.pick((white, white, (232, 178, 44)))
    double, phase, dash = random.chance(0.3), random(0, 6), random.pick((3.0, 2.0))
    edge = plan.half - (2.2 if plan.parking else 0.35)
    cross = plan.crossing
    if double:
        for x in (-1.3 * width, 0.3 * width):
            _flat_rectangle(scenery, x, x + width, 0.4, 55, 0, LINE, middle)
    else:
        for k in range(10):
            z = 1.0 + phase + 2.2 * dash * (k - 1)
            if z > 0.4 and z < 45 and not (cross and cross - 4 < z < cross + 4):
                scenery.face((-width / 2, 0, z), (width, 0, 0), (0, 0, dash), LINE, middle)
    for side in (-1, 1):
        _flat_rectangle(
            scenery, side * edge - width / 2, side * edge + width / 2, 0.4, 55, 0, LINE, white
        )
        for k in range(5 if plan.parking else 0):
            scenery.face(
                (min(side * edge, side * plan.half), 0, 6.0 + 6.2 * k),
                (plan.half - edge, 0, 0),
                (0, 0, 0.16),
                LINE,
                white,
            )
    if cross:
        _flat_rectangle(
            scenery, -plan.half, plan.half, cross - 0.6, cross + 4.1, 0, ROAD, (86, 86, 88), ASPHALT
        )
        stripes = int(plan.half / 0.5)
        for k in range(-stripes, stripes, 2):
            scenery.face((k * 0.5 + 0.25, 0, cross), (0.5, 0, 0), (0, 0, 3.2), LINE, white)
        scenery.face((0.2, 0, cross - 1.5), (edge - 0.2, 0, 0), (0, 0, 0.4), LINE, white)
    elif random.chance(0.4):
        z = random(6, 10)
        scenery.face((plan.camera_x - 0.1, 0, z), (0.2, 0, 0), (0, 0, 2.2), LINE, white)
        scenery.face(
            (plan.camera_x - 0.45, 0, z + 2.2),
            (0.9, 0, 0),
            (0, 0, 1.4),
            LINE,
            white,
            shape="triangle",
        )


def _backdrop(scenery: Scenery, random: RandomSource, plan: StreetPlan) -> None:
    """Close the view: far houses, then woods, then the trees or the house at the street's end."""
    green = random.tint((62, 84, 50))
    light = (green[0] * 1.4, green[1] * 1.4, green[2] * 1.2)
    for k in range(-4, 4):
        scenery.move_to(BACKDROP, 48.0 * k + random(-8, 8), 220)
        if random.chance(0.5):
            tone = random(110, 150)
            scenery.billboard(
                30,
                0,
                random(14, 30),
                random(8, 26),
                BUILDING,
                (tone, tone, tone * 1.05),
                FACADE,
                second=(80, 88, 98),
            )
    for k in range(-4, 4):
        scenery.move_to(BACKDROP, 42.0 * k + random(-6, 6), 180)
        scenery.billboard(
            20,
            -1,
            60,
            random(7, 14),
            PLANT,
            green,
            LEAVES,
            random.pick(("grove", "grove turned")),
            light,
        )
    if random.chance(0.5):
        for k in range(-3, 4):
            scenery.move_to(BACKDROP, k * 6.0 + random(-1.5, 1.5), plan.end + 25 + random(0, 4))
            objects.tree(scenery, random, random(7, 11))
    elif random.chance(0.6):
        scenery.move_to(BACKDROP, -15.0, plan.end + 20)
        buildings.building(scenery, random, 1, 8.0, 30.0, random(7, 16))


def _lots(
    scenery: Scenery, random: RandomSource, plan: StreetPlan, side: int, borders: list[str]
) -> list[tuple[int, float, float]]:
    """Line one side of the street with houses, gardens, parks and yards.

    Returns where the yards open.
    """
    front = plan.half + plan.pavement
    z = max(2.0, plan.seen_from(side * front) - random(3, 9))
    kinds, yards = (
        random.shuffled(("house", "garden", "garden", random.pick(("park", "yard", "house")))),
        [],
    )
    while z < plan.end:
        length = random(8.0, 15.0)
        kinds, kind = (
            (kinds[1:], kinds[0])
            if kinds
            else ([], random.pick(("house", "house", "garden", "park", "yard")))
        )
        height = 3.1 * int(random(2, 6.3))
        if kind == "yard":
            _yard(scenery, random, side, plan.half, front, z, length)
            yards.append((side, z, z + length))
        elif kind == "house":
            scenery.move_to(LOTS, side * (front + random(0, 0.5)), z)
            buildings.building(scenery, random, side, length - 0.4, 11.0, height)
        else:
            borders, border = (
                (borders[1:], borders[0])
                if borders
                else ([], random.pick(("fence", "wall", "hedge")))
            )
            _garden(
                scenery,
                random,
                side,
                front,
                z,
                length,
                min(height, 9.3) if kind == "garden" else 0.0,
                border,
            )
        z += length
    return yards


def _yard(
    scenery: Scenery,
    random: RandomSource,
    side: int,
    half: float,
    front: float,
    z: float,
    length: float,
) -> None:
    """Add a side street or car park: asphalt, parked cars, a wall or fence at its end."""
    gray = random(92, 134)
    scenery.move_to(GROUND)
    near, far = side * half, side * (front + 40)
    _flat_rectangle(
        scenery,
        min(near, far),
        max(near, far),
        z + 0.5,
        z + length - 0.5,
        _KERB,
        ROAD,
        (gray, gray, gray),
        ASPHALT,
    )
    scenery.move_to(LOTS, side * (front + 16), z + 0.5, order=z)
    if random.chance(0.5):
        buildings.wall(scenery, random, (0, 0, 0), (0.3, 2.2, length - 1))
    else:
        buildings.fence(
            scenery,
            random,
            "boards",
            (0, 0, length - 1 if side > 0 else 0),
            (0, 0, -side * (length - 1)),
            2.0,
        )
    for k in (1, 0):
        scenery.move_to(
            LOTS,
            side * (front + 6.5 + 6 * k),
            z + length * 0.5 + random(0.2, 1.8),
            _KERB,
            yaw=math.pi / 2 * random.pick((-1, 1)),
            order=z,
        )
        if random.chance(0.7):
            objects.vehicle(scenery, random, random.pick(("saloon", "hatch", "van")))


def _garden(
    scenery: Scenery,
    random: RandomSource,
    side: int,
    front: float,
    z: float,
    length: float,
    height: float,
    border: str,
) -> None:
    """Add a lot with trees, borders and, unless ``height`` is 0, a house far back."""
    back = random(4.5, 7.0)
    if height:
        scenery.move_to(LOTS, side * (front + back), z + 1.0, order=z)
        buildings.building(scenery, random, side, length - 2.0, 9.0, height)
    for k in (2, 1, 0):
        deep = random(1.6, back - 0.8) if height else random(1.6, 9.0)
        scenery.move_to(LOTS, side * (front + deep), z + length * (k + 0.5) / 3, order=z)
        if random.chance(0.65 if height else 0.9):
            objects.tree(scenery, random, random(3.2, 6.5))
        else:
            objects.bush(scenery, random)
    scenery.move_to(LOTS, side * front, z, order=z)
    tall, kind = random(1.3, 2.2), random.pick(("boards", "boards", "pickets", "rails"))
    far = side * back
    if border == "wall":
        buildings.wall(scenery, random, (min(0.0, far), 0, 0), (max(0.0, far), tall, 0.3))
        buildings.wall(
            scenery, random, (min(0.0, side * 0.3), 0, 0), (max(0.0, side * 0.3), tall, length)
        )
    elif border == "hedge":
        buildings.hedge(scenery, random, (min(0.0, far), 0, 0), (max(0.0, far), tall, 0.7))
        buildings.hedge(
            scenery, random, (min(0.0, side * 0.7), 0, 0), (max(0.0, side * 0.7), tall, length)
        )
    else:
        buildings.fence(scenery, random, kind, (min(0.0, far), 0, 0), (back, 0, 0), tall)
        start, along = (length, -length) if side > 0 else (0.0, length)
        buildings.fence(scenery, random, kind, (0, 0, start), (0, 0, along), tall)


def _furniture(
    scenery: Scenery, random: RandomSource, plan: StreetPlan, yards: list[tuple[int, float, float]]
) -> None:
    """Add lamps, signs, trees and clutter along both kerbs, each kind in turn."""
    deck = random.shuffled((random.pick(("mast", "lamp")), "sign", "clutter"))
    slots = sorted(
        (plan.seen_from(side * (plan.half + 0.6)) + 1.0 + 4.2 * k + random(0, 1.6), side)
        for side in (-1, 1)
        for k in range(9)
    )
    for z, side in slots:
        deck = deck or random.shuffled(
            (
                "lamp",
                "sign",
                "clutter",
                "tree",
                "tree",
                "clutter",
                random.pick(("mast", "sign")),
                "light",
            )
        )
        if any(side == yard and near < z < far for yard, near, far in yards):
            continue
        kind = deck.pop()
        inner = kind != "clutter" or random.chance(0.4)
        x = side * (plan.half + (0.55 if inner else plan.pavement - 0.7))
        scenery.move_to(PAVEMENTS, x, max(z, plan.seen_from(x) + 0.5), _KERB)
        match kind:
            case "lamp":
                objects.lamp(scenery, random, -side)
            case "mast":
                objects.utility_pole(scenery, random)
            case "light":
                objects.traffic_light(scenery, random, -side)
            case "sign":
                objects.road_sign(scenery, random)
            case "tree":
                objects.tree(scenery, random, random(4.0, 6.0))
            case _:
                objects.clutter(scenery, random, plan.parking)
    if random.chance(0.35):
        _railing(scenery, random, plan)


def _railing(scenery: Scenery, random: RandomSource, plan: StreetPlan) -> None:
    """Add a railing of three pieces along the kerb of one side."""
    side = random.pick((-1, 1))
    z = plan.seen_from(side * plan.half) + random(0, 3)
    start, along = (0, 0, 2.0 if side > 0 else 0.0), (0, 0, -2.0 * side)
    for k in range(3):
        scenery.move_to(PAVEMENTS, side * (plan.half + 0.35), z + 2.0 * k, _KERB)
        buildings.fence(scenery, random, "rails", start, along, 1.05)


def _people(scenery: Scenery, random: RandomSource, plan: StreetPlan) -> None:
    for k in range(int(random(6, 10))):
        x = (1 - k % 2 * 2) * (plan.half + random(0.9, plan.pavement - 0.4))
        z = plan.seen_from(x) + 0.5 + 2.4 * (k // 2) + random(0, 2.5)
        if k == 2 and plan.crossing:
            scenery.move_to(
                TRAFFIC, random(-plan.half, plan.half), plan.crossing + random(0.4, 2.8)
            )
        else:
            scenery.move_to(PAVEMENTS, x, z, _KERB)
        objects.person(scenery, random)


def _traffic(scenery: Scenery, random: RandomSource, plan: StreetPlan) -> None:
    """Cars ahead in the camera's lane, oncoming ones, parked ones; the crossing stays free."""
    kinds = ("saloon", "saloon", "saloon", "hatch", "hatch", "hatch", "van", "van", "bus")
    for lane, start, yaw, gap in ((1.75, 9.0, 0.0, 12.0), (-1.75, 8.0, math.pi, 9.0)):
        z = start + random(0, 8)
        while z < 60:
            scenery.move_to(TRAFFIC, lane + random(-0.2, 0.2), z, yaw=yaw + random(-0.03, 0.03))
            kind = random.pick(kinds if z > 14 else kinds[:8])
            if not (plan.crossing and plan.crossing - 8 < z < plan.crossing + 8):
                objects.vehicle(scenery, random, kind)
            z += gap + random(0, 22) + (5 if kind == "bus" else 0)
    for side in (-1, 1) if plan.parking else ():
        for k in range(6):
            z = 9.1 + 6.2 * k
            if random.chance(0.55) and not (plan.crossing and abs(z - plan.crossing) < 6):
                scenery.move_to(
                    TRAFFIC, side * (plan.half - 1.1), z, yaw=0.0 if side > 0 else math.pi
                )
                objects.vehicle(scenery, random, random.pick(kinds[:8]))


def hood(
    scenery: Scenery, random: RandomSource, focal: float, width: int, height: int, horizon: float
) -> None:
    """Add the bonnet of the camera's car, fixed to the camera 1 m ahead of it."""
    paint = random.tint(random.pick(objects.PAINTS), 0.3)
    reach, low, rise = (
        width / focal * random(0.45, 0.65),
        (horizon - height) / focal,
        height / focal * random(0.06, 0.15),
    )
    shift = random(-0.12, 0.12) * reach
    scenery.move_to(HOOD)
    scenery.face(
        (shift - reach, low - 0.02, 1.0),
        (2 * reach, 0, 0),
        (0, rise + 0.02, 0),
        VEHICLE,
        paint,
        GLASS,
        "hood",
    )
