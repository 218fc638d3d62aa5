"""Numbers -> how a report spells them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from useg.scoring.intervals import Interval


def percent(share: float, brief: bool = False) -> str:
    """Spell a share 0..1: ``74.3 %``, or briefly ``74 %``; what is absent (``nan``) is a dash, what is tiny is not called 0.

    >>> percent(0.7432), percent(0.7432, brief=True), percent(0.0002), percent(float("nan"))
    ('74.3 %', '74 %', 'less than 0.1 %', '–')
    """
    if math.isnan(share):
        return "–"  # noqa: RUF001
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.{0 if brief and share >= 0.0995 else 1}f} %"


def number(share: float) -> str:
    """Spell a share 0..1 as a number of percent, ``74.3``; a dash for ``nan``."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}"  # noqa: RUF001


def span(interval: Interval | None) -> str:
    """Spell an interval of shares in percent; nothing where there is none.

    >>> span(Interval(0.4781, 0.5532))
    '47.8 to 55.3'
    """
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else ""


def counted(count: int, one: str, many: str = "") -> str:
    """Spell a number of things.

    >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
    ('1 image', '1,200 images', '2 classes')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Join names as a sentence does.

    >>> listed(["a"]), listed(["a", "b", "c"]), listed("abcdefgh")
    ('a', 'a, b and c', 'a, b, c, d, e, f and 2 more')
    """
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def sentence(text: str) -> str:
    """Return a clause as a sentence of its own.

    >>> sentence("few pixels"), sentence("Done.")
    ('Few pixels.', 'Done.')
    """
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else "." * bool(text))
