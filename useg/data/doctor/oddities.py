"""Pictures that are blank or far off in exposure, and a class that is nearly all at one fixed place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from useg.data.doctor.finding import Cure, Finding, count
from useg.data.doctor.looks import GRID, Case

_MANY = 20  # pictures from which "always at the same place" means something


def constant_region(case: Case) -> Iterator[Finding]:
    """A class that lies at one fixed place in nearly every picture, and hardly elsewhere: a camera car's hood, a frame, a stamp."""
    grids = [case.ids(look.mask.grid) for look in case.whole if look.mask is not None]
    if len(grids) < _MANY:
        return
    for k, name in enumerate(case.dataset.classes.names):
        seen = np.zeros(GRID, np.int64)
        for grid in grids:
            seen += grid == k
        region = seen >= 0.95 * len(grids)
        share = float(seen[region].sum() / max(1, seen.sum()))
        size = float(region.mean())
        at_border = region[0].any() or region[-1].any() or region[:, 0].any() or region[:, -1].any()
        if share >= 0.8 and 0.005 <= size <= 0.4 and at_border:
            message = (
                f"{share:.0%} of all {name} pixels are one region that is at the same place in nearly every picture "
                f"({place_in_words(region)}, {size:.0%} of it), as a camera's own hood, a frame or a stamp is"
            )
            remedy = (
                f"the score of {name} says little about other {name}: "
                "leave that region out of the score with useg evaluate --ignore-mask, or give it an ignored value"
            )
            yield Finding("constant region", "warning", (), message, remedy, evidence={"region": region, "class": k})


def place_in_words(region: NDArray[np.bool_]) -> str:
    """Say where in the picture a region of the grid lies: ``"at the bottom"``."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    upright = "bottom" if rows[0] >= GRID[0] / 2 else "top" if rows[-1] < GRID[0] / 2 else ""
    across = "right" if columns[0] >= GRID[1] / 2 else "left" if columns[-1] < GRID[1] / 2 else ""
    return f"at the {' '.join(filter(None, (upright, across)))}" if upright or across else "all over it"


def exposure(case: Case) -> Iterator[Finding]:
    """Pictures without content, and a few that are far darker or brighter than all others."""
    looks = [(look, look.image) for look in case.looks if look.image is not None]
    if len(looks) < 8:
        return
    means = np.array([float(image.thumb.mean()) for _, image in looks])
    ranges = np.array([float(np.ptp(image.thumb)) for _, image in looks])
    usual, middle = float(np.median(ranges)), float(np.median(means))
    spread = max(1.48 * float(np.median(np.abs(means - middle))), 0.1 * usual, 1e-6)
    blank = [k for k in range(len(looks)) if ranges[k] <= 0.02 * usual]
    odd = [k for k in range(len(looks)) if k not in blank and abs(means[k] - middle) > 6 * spread and ranges[k] < 0.5 * usual]
    if usual > 0 and blank and len(blank) <= max(1, len(looks) // 10):
        for k in blank:
            path = looks[k][0].pair.image
            cure = Cure(looks[k][0].pair, "left out: the image is blank", leave_out=True)
            message = f"'{case.name(path)}' is blank: one {'dark' if means[k] < middle else 'bright'} tone all over"
            yield Finding("blank image", "error", (path,), message, "remove the pair, or take the right picture", (cure,))
    if odd and len(odd) <= max(1, len(looks) // 20):
        files = tuple(looks[k][0].pair.image for k in odd)
        tone = "darker" if means[odd[0]] < middle else "brighter"
        more = f" ({count(len(odd), 'such picture')})" if len(odd) > 1 else ""
        message = f"'{case.name(files[0])}' is far {tone} than all others, with little contrast{more}"
        yield Finding("odd exposure", "warning", files, message, "check that it shows what its mask says")
