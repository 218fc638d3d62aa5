"""What a detector says: one thing worth knowing, in words, with what proves it and what cures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from useg.classes import Label
from useg.data.dataset import Pair

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Cure:
    """What mends one pair of image and mask.

    Args:
        pair: whose; None for a file that belongs to no pair.
        does: what is done, for the log of changes.
        ids: what the mask stores (its codes, see :mod:`useg.data.doctor.looks`) -> class id, or ``IGNORE``; wins over the class table.
        source: the pair whose mask is the right one.
        change: turns the label map ``(H, W)`` into the right one.
        split: the split into which the pair goes.
        leave_out: the pair is not taken over.
    """

    pair: Pair | None
    does: str
    ids: Mapping[int, int] = field(default_factory=dict)
    source: Pair | None = None
    change: Callable[[Label], Label] | None = None
    split: str = ""
    leave_out: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing: ``message`` says what, ``remedy`` what to do; ``error`` means that training would stop or mislead.

    ``cures`` are what ``useg inspect --fix`` does about it, and ``evidence`` is what a page needs to draw it.
    """

    kind: str
    severity: Severity
    files: tuple[Path, ...]
    message: str
    remedy: str
    cures: tuple[Cure, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)


def both(items: Sequence[object]) -> str:
    """``[1, 2, 3]`` -> ``"1, 2 and 3"``."""
    return " and ".join(filter(None, (", ".join(str(item) for item in items[:-1]), str(items[-1]))))


def count(number: int, what: str) -> str:
    """``(2, "image")`` -> ``"2 images"``."""
    return f"{number:,} {what}{'s' * (number != 1)}"
