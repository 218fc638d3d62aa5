"""Mask files -> a class table, where nobody wrote one: which ids, grey levels or colours are in them, and what that means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Color, spread_colors
from useg.data.images import read_mask, read_palette
from useg.data.parallel import in_parallel
from useg.errors import UsageError

MOST = 64  # more colours or scattered values than this are no classes
_LOSSY = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Seen:
    """What is in one mask: its ``values`` (None when only colours make sense of it), the same as packed colours, and its palette's colours."""

    path: Path
    values: frozenset[int] | None
    codes: frozenset[int]
    colors: dict[int, Color]


def guess_classes(masks: Sequence[tuple[Path, int | None]], ignore: Sequence[int] = (), *, skip_unreadable: bool = False) -> ClassTable:
    """Look through all masks and derive the class table.

    Colours (bands that differ) become classes by colour; a palette gives ids their colours; exactly two values, such as 0 and 255, become
    background and foreground; 255 beside small ids means ignore; otherwise the values found are the classes, as they are.

    Args:
        masks: the mask files, at least one, each with its page (None for a file of one picture).
        ignore: values that are known to be no class.
        skip_unreadable: pass over damaged files instead of failing.

    Raises:
        UsageError: a damaged file; more colours or values than classes can be.
    """
    seen = in_parallel(lambda mask: _scan_or_skip(*mask, skip_unreadable), masks)
    return table_of([found for found in seen if found is not None], ignore)


def table_of(seen: Sequence[Seen], ignore: Sequence[int] = ()) -> ClassTable:
    """Derive the class table from what is in the masks, as :func:`guess_classes` says.

    Raises:
        UsageError: more colours or values than classes can be, or two codes for one thing.
    """
    if not seen:
        return ClassTable(("class 0",))
    palettes = _agreed_palette(seen)
    if palettes is None or any(found.values is None for found in seen):
        return _by_color(seen)
    values = frozenset().union(*(found.values or frozenset() for found in seen)) - frozenset(ignore)
    _refuse_smeared(seen, values)
    _refuse_two_codes(seen, values)
    if len(values) == 2:
        low, high = sorted(values)
        return ClassTable(("background", "foreground"), _colors((low, high), palettes), values=(low, high))
    ids = tuple(sorted(values - {IGNORE} if _is_ignore(values) else values))
    return ClassTable(tuple(f"class {v}" for v in ids), _colors(ids, palettes), values=ids, ignore=(IGNORE,) if _is_ignore(values) else ())


def _is_ignore(values: frozenset[int]) -> bool:
    """255 beside ids (0, 1, 2, 255) is not a class; beside grey levels (0, 128, 255) it is."""
    ids = values - {IGNORE}
    return IGNORE in values and len(ids) > 1 and max(ids) <= max(40, 2 * len(ids))


def _colors(values: Sequence[int], palettes: dict[int, Color]) -> tuple[Color, ...]:
    colors = tuple(palettes.get(v, (-1, -1, -1)) for v in values)
    return colors if len(set(colors)) == len(colors) and (-1, -1, -1) not in colors else spread_colors(len(values))


def _scan_or_skip(path: Path, page: int | None, skip: bool) -> Seen | None:
    try:
        return _scan(path, page)
    except UsageError:
        if skip:
            return None
        raise


def _scan(path: Path, page: int | None) -> Seen:
    mask = read_mask(path, page=page)
    if mask.ndim == 2:
        values = _distinct(mask)
        lut = read_palette(path)
        if lut is None:
            return Seen(path, values, frozenset(v * 0x010101 for v in values if 0 <= v <= 255), {})
        colors = {v: (int(lut[v, 0]), int(lut[v, 1]), int(lut[v, 2])) for v in values if v < len(lut)}
        return Seen(path, values, frozenset(r << 16 | g << 8 | b for r, g, b in colors.values()), colors)
    codes = _distinct(mask[..., 0].astype(np.int32) << 16 | mask[..., 1].astype(np.int32) << 8 | mask[..., 2])
    red_only = not mask[..., 1:].any()
    return Seen(path, frozenset(code >> 16 for code in codes) if red_only else None, codes, {})


def _distinct(values: NDArray[Any]) -> frozenset[int]:
    flat = values.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1])  # a mask is made of long runs: sorting their starts alone is many times faster
    return frozenset(int(v) for v in np.unique(np.append(flat[changes], flat[-1:])))


def _agreed_palette(seen: Iterable[Seen]) -> dict[int, Color] | None:
    """Join the files' palettes; None when one index has two colours, as after saving each mask with a palette of its own."""
    joined: dict[int, Color] = {}
    for found in seen:
        for value, color in found.colors.items():
            if joined.setdefault(value, color) != color:
                return None
    return joined


def _by_color(seen: Sequence[Seen]) -> ClassTable:
    codes = sorted(frozenset().union(*(found.codes for found in seen)))
    if len(codes) > MOST:
        worst = max(seen, key=lambda found: len(found.codes))
        raise UsageError(
            f"the masks hold {len(codes)} different colours ('{worst.path}' alone {len(worst.codes)}), but at most {MOST} can be classes: they look "
            f"like photographs, or like label pictures saved as JPEG or resized with smoothing; check which folder holds the masks, save them "
            f"as PNG without smoothing, or list the true colours in classes.toml with by_color = true"
        )
    colors = tuple((code >> 16, code >> 8 & 255, code & 255) for code in codes)
    two = len(codes) == 2 and colors[0] == (0, 0, 0)
    names = ("background", "foreground") if two else tuple(f"color #{code:06x}" for code in codes)
    return ClassTable(names, colors, by_color=True)


def _refuse_smeared(seen: Sequence[Seen], values: frozenset[int]) -> None:
    """Grey levels in between, made by JPEG or by smoothing, would pass for ids."""
    worst = max(seen, key=lambda found: len(found.values or ()))
    lossy = next((found.path for found in seen if found.path.suffix.lower() in _LOSSY), None)
    ids = values - {IGNORE}
    if lossy is not None and len(values) > 2:
        raise UsageError(
            f"the masks hold {len(values)} different values, and '{lossy}' is a JPEG, which blurs values; "
            f"a mask needs exact ones: save the masks as PNG again (for two classes: 255 where the value is above 127, otherwise 0)"
        )
    if len(values) > 255 or (len(values) > MOST and max(ids) > 1.5 * len(ids)):
        raise UsageError(
            f"the masks hold {len(values)} different values from {min(values)} to {max(values)} ('{worst.path}' alone {len(worst.values or ())}), "
            f"which look like a photograph, a smoothed mask or numbered objects and not like class ids; check which folder holds the masks, "
            f"or list the true values in classes.toml"
        )


def mixes_two_codes(values: Iterable[frozenset[int]]) -> bool:
    """Tell whether some masks say 1 and others 255 for the same class: together 0, 1 and 255, but never 1 and 255 in one mask."""
    each = [found for found in values if found]
    return frozenset().union(*each) == {0, 1, IGNORE} and not any({1, IGNORE} <= found for found in each)


def _refuse_two_codes(seen: Sequence[Seen], values: frozenset[int]) -> None:
    if values == {0, 1, IGNORE} and mixes_two_codes(found.values or frozenset() for found in seen):
        one, other = (next(found.path for found in seen if value in (found.values or ())) for value in (1, IGNORE))
        raise UsageError(
            f"some masks hold 0 and 1, such as '{one}', and others 0 and 255, such as '{other}', but none holds 1 and 255: one class has two values; "
            f"let useg inspect DATA --fix OUT write a clean copy, or list 1 as a class and 255 under ignore in classes.toml"
        )
