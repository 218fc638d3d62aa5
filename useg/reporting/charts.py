"""Counts -> drawings for a page: inline SVG in the page's own colours and font."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from useg.reporting.spelling import percent
from useg.scoring.calibration import Calibration

_SIDE, _LEFT, _TOP = 240, 44, 8  # of the square that the reliability curve lies in
_LEAST = 0.0005  # share of the pixels: a dot of fewer says nothing
_FIELD = 20  # side of a field of the map of errors


def reliability_svg(calibration: Calibration) -> str:
    """Draw the share that is right over confidence: on the diagonal, probabilities mean what they say. Large dots hold many pixels."""

    def place(confidence: float, accuracy: float) -> tuple[float, float]:
        return round(_LEFT + _SIDE * confidence, 1), round(_TOP + _SIDE * (1 - accuracy), 1)

    curve = [bin_ for bin_ in calibration.curve if bin_.share >= _LEAST]
    points = [place(bin_.confidence, bin_.accuracy) for bin_ in curve]
    dots = [
        f'<circle cx="{x}" cy="{y}" r="{2.5 + 9 * math.sqrt(bin_.share):.1f}"><title>{percent(bin_.accuracy)} right at {percent(bin_.confidence)} '
        f"confidence, {percent(bin_.share)} of the pixels</title></circle>"
        for (x, y), bin_ in zip(points, curve, strict=True)
    ]
    grid = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), text = place(share, share), f"{100 * share:.0f}"
        grid.append(f'<path class="grid" d="M{_LEFT} {y}h{_SIDE}"/><text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{text}</text>')
        grid.append(f'<text x="{x}" y="{_TOP + _SIDE + 18}" text-anchor="middle">{text}</text>')
    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    line = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<svg class="chart" viewBox="0 0 {_LEFT + _SIDE + 14} {_TOP + _SIDE + 42}" role="img" aria-label="Reliability curve">{"".join(grid)}'
        f'<path class="ideal" d="M{x0} {y0}L{x1} {y1}"/><polyline class="line" points="{line}"/><g class="dots">{"".join(dots)}</g>'
        f'<text x="{_LEFT + _SIDE / 2}" y="{_TOP + _SIDE + 38}" text-anchor="middle">confidence, %</text>'
        f'<text transform="translate(11 {_TOP + _SIDE / 2}) rotate(-90)" text-anchor="middle">right, %</text></svg>'
    )


def places_svg(rates: NDArray[np.float64]) -> str:
    """Draw the share of wrong pixels ``(R, C)`` as a map of fields, the stronger the more; fields without a judged pixel (``nan``) stay empty."""
    highest = max(float(np.nanmax(rates, initial=0)), 1e-9)
    rows, columns = rates.shape
    fields = [
        f'<rect x="{_FIELD * column}" y="{_FIELD * row}" width="{_FIELD - 1}" height="{_FIELD - 1}" rx="2" '
        f'style="--share:{rate / highest:.2f}"><title>{percent(float(rate))} wrong</title></rect>'
        for (row, column), rate in np.ndenumerate(rates)
        if not math.isnan(rate)
    ]
    label = "Share of wrong pixels by place in the picture"
    return (
        f'<svg class="chart places" viewBox="0 0 {_FIELD * columns - 1} {_FIELD * rows - 1}" role="img" aria-label="{label}">{"".join(fields)}</svg>'
    )
