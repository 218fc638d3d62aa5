"""What the masks store: values that no class has, two codes for one class, smeared edges, inverted and empty masks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.data.dataset import read_label
from useg.data.doctor.damage import format_of
from useg.data.doctor.decide import PALETTES, greys_of, palette_of_greys
from useg.data.doctor.finding import Cure, Finding, both, count
from useg.data.doctor.looks import COLOR, Case, Look, MaskLook
from useg.errors import UsageError

_UNSURE = 254  # the id that a mask's smeared pixels have until their neighbours decide
_FEW = 8  # masks: fewer show no custom to deviate from


def values(case: Case) -> Iterator[Finding]:
    """Masks with codes that the class table does not have: what they are, and what each stands for."""
    for look in case.looks:
        if look.mask is None:
            continue
        unknown = look.mask.codes[case.ids(look.mask.codes) < 0]
        if len(unknown):
            yield (
                _two_codes(case, look, look.mask) or _greys(case, look, look.mask) or _smeared(case, look, look.mask, unknown) or _unknown(case, look)
            )


def _two_codes(case: Case, look: Look, mask: MaskLook) -> Finding | None:
    own, table = set(mask.codes.tolist()), case.dataset.classes
    high = max(table.values) if len(table) == 2 and not table.by_color else 0
    if high not in (1, IGNORE) or min(table.values) != 0 or not own <= {0, IGNORE if high == 1 else 1}:
        return None
    other = IGNORE if high == 1 else 1
    message = f"the mask '{case.name(look.pair.mask)}' holds 0 and {other} where the others hold 0 and {high}: one class has two values"
    cure = Cure(look.pair, f"mask: {other} became class 1", ids={other: 1})
    return Finding("two values for one class", "error", (look.pair.mask,), message, f"save it with {high} in place of {other}", (cure,))


def _greys(case: Case, look: Look, mask: MaskLook) -> Finding | None:
    table = case.dataset.classes
    own = frozenset(mask.codes.tolist())
    if table.by_color or max(own) >= COLOR:
        return None
    name = palette_of_greys(own, {"the data set's own palette": table.colors} | dict(PALETTES))
    if not name:
        return None
    greys = greys_of(PALETTES.get(name, table.colors))
    ids = {code: int(case.ids(np.array([greys.get(code, IGNORE)]))[0]) if name in PALETTES else greys[code] for code in own}
    if min(ids.values()) < 0:
        return None
    shown = both(sorted(own)[:5])
    message = f"the mask '{case.name(look.pair.mask)}' holds {shown}: the grey levels of {name}'s colours, not ids (as .convert(\"L\") leaves them)"
    cure = Cure(look.pair, "mask: grey levels of a palette became ids " + both([ids[code] for code in sorted(own)]), ids=ids)
    return Finding("grey levels of a palette", "error", (look.pair.mask,), message, "save the palette picture's indices instead", (cure,))


def _smeared(case: Case, look: Look, mask: MaskLook, unknown: NDArray[np.int64]) -> Finding | None:
    table = case.dataset.classes
    rank = {int(code): int(k) for code, k in zip(mask.codes, case.ids(mask.codes), strict=True) if k >= 0}
    stored = _points(np.array(list(rank), np.int64)) if rank else np.zeros((0, 3))
    jpeg = look.pair.truth is None and format_of(look.pair.mask) == "JPEG"
    gaps = np.diff(np.sort(stored[:, 0])) if len(stored) > 1 else np.array([0])
    if not table.by_color and (len(table) < 2 or min(np.diff(sorted(table.values))) < 20 or not gaps.size):
        return None  # neighbouring ids: nobody can say which one a value in between was
    bad = np.isin(mask.codes, unknown)
    share = float(mask.counts[bad].sum() / mask.counts.sum())
    solid = float(mask.inner[bad].sum() / max(1, mask.counts[bad].sum()))
    if not jpeg and (len(unknown) < 3 or share > 0.6 or solid > 0.7):
        return None
    colors = np.array(table.colors, float) if table.by_color else np.repeat(np.array(table.values, float)[:, None], 3, axis=1)
    apart = np.abs(_points(unknown)[:, None] - colors[None]).sum(2)
    present = {k for code, k in rank.items() if k != IGNORE}
    plain = len(table) == 2 or len(present) <= 2
    ids = {int(code): int(row.argmin()) if plain or row.min() <= 60 else _UNSURE for code, row in zip(unknown, apart, strict=True)}
    what = "JPEG compression, which blurs values" if jpeg else "smoothing (anti-aliasing or resizing) along the edges"
    message = (
        f"the mask '{case.name(look.pair.mask)}' holds {count(len(unknown), 'code')} that no class has, on {share:.1%} of its pixels, made by {what}"
    )
    cure = Cure(look.pair, f"mask: {count(len(unknown), 'smeared code')} snapped to the nearest class", ids=ids, change=filled)
    kind = "mask damaged by JPEG" if jpeg else "smeared mask"
    return Finding(kind, "error", (look.pair.mask,), message, "save masks as PNG, and resize them by the nearest pixel", (cure,))


def _unknown(case: Case, look: Look) -> Finding:
    """Say it as training would; this reads the mask again, to name the place."""
    assert look.mask is not None
    path, name = look.pair.mask, case.name(look.pair.mask)
    try:
        read_label(look.pair, case.dataset)
        message, remedy = f"mask '{name}' cannot be used", "check it"
    except UsageError as error:
        message, _, remedy = str(error).replace(str(path), name).rpartition("; ")
    bad = case.ids(look.mask.codes) < 0
    ids = dict.fromkeys(look.mask.codes[bad].tolist(), IGNORE)
    shown = both([f"#{code - COLOR:06x}" if code >= COLOR else code for code in list(ids)[:4]])
    cure = Cure(look.pair, f"mask: {shown}{' and others' * (len(ids) > 4)}, which no class has, became ignored", ids=ids)
    return Finding("unknown value", "error", (path,), message, remedy, (cure,))


def filled(label: Label) -> Label:
    """Give pixels that are not sure the class of the nearest sure one."""
    label = label.copy()
    for _ in range(64):
        unsure = label == _UNSURE
        if not unsure.any():
            break
        padded = np.pad(label, 1, constant_values=_UNSURE)
        for part in (padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]):
            take = unsure & (label == _UNSURE) & (part != _UNSURE)
            label[take] = part[take]
    return label


def customs(case: Case) -> Iterator[Finding]:
    """How all masks of a set without a class table are read, where that is worth a word."""
    table = case.dataset.classes
    if not case.guessed:
        return
    remedy = "nothing needs doing; a classes.toml gives the classes names"
    if table.by_color:
        colors = both([f"({r}, {g}, {b})" for r, g, b in table.colors[:6]])
        more = f" and {len(table) - 6} more" if len(table) > 6 else ""
        yield Finding("colour masks", "note", (), f"the masks store {count(len(table), 'colour')}: {colors}{more}; each became a class", remedy)
    elif len(table) == 2 and table.values != (0, 1):
        low, high = table.values
        message = f"the masks hold the two grey levels {low} and {high}, which became the classes 0 and 1"
        yield Finding("two grey levels", "note", (), message, remedy)
    elif name := palette_of_greys(frozenset(table.values)):
        ids = [greys_of(PALETTES[name]).get(value, IGNORE) for value in table.values]
        message = f'the masks hold {both(table.values)}: the grey levels of {name}\'s palette colours {both(ids)} (as .convert("L") leaves them)'
        yield Finding(
            "grey levels of a palette", "warning", (), message, "save the palette pictures' indices; colours of one grey level have become one class"
        )
    elif table.values != tuple(range(len(table))) and len(table) > 2:
        missing = sorted(set(range(max(table.values))) - set(table.values) - set(table.ignore))
        if missing:
            shown = both([*missing[:8], "others"] if len(missing) > 8 else missing)
            message = f"the masks hold the ids {both(table.values)}; between them {shown} never occur"
            yield Finding(
                "ids skipped", "note", (), message, "list the classes in classes.toml if they exist elsewhere; otherwise nothing needs doing"
            )


def empty(case: Case) -> Iterator[Finding]:
    """A few masks that hold one class only while the others hold several."""
    alone = [look for look in case.whole if look.mask is not None and len(look.mask.codes) == 1]
    if not alone or len(case.whole) < _FEW or len(alone) > max(1, len(case.whole) // 10):
        return
    for look in alone:
        assert look.mask is not None
        k = int(case.ids(look.mask.codes)[0])
        what = (
            "is ignored everywhere" if k == IGNORE else f"is {case.dataset.classes.names[k]} everywhere" if k >= 0 else "holds one value everywhere"
        )
        message = f"the mask '{case.name(look.pair.mask)}' {what}, while the others hold several classes"
        remedy = "check that nothing was to be labelled there, or that its labels were not lost"
        yield Finding("mask of one class", "warning", (look.pair.mask,), message, remedy)


def inverted(case: Case) -> Iterator[Finding]:
    """Binary masks of which a few have foreground and background swapped."""
    looks = [look for look in case.whole if look.mask is not None and len(look.mask.codes) == 2]
    if len(case.dataset.classes) != 2 or len(looks) < _FEW:
        return
    traits = np.array([_traits(case, look) for look in looks])
    swapped = np.array([1, 1, 0]) - traits
    middle = np.median(traits, axis=0)
    spread = np.maximum(1.48 * np.median(np.abs(traits - middle), axis=0), (0.08, 0.12, 0.35))
    own, other = (np.minimum(np.abs(part - middle) / spread, 6).sum(1) for part in (traits, swapped))
    found = np.flatnonzero(own - other > 4)
    if len(found) > len(looks) // 3:
        return
    for k in found:
        look = looks[k]
        name, now = case.name(look.pair.mask), f"{traits[k, 0]:.0%} of it is foreground, {middle[0]:.0%} is usual"
        message = f"the mask '{name}' has foreground and background swapped against the others: {now}"
        cure = Cure(look.pair, "mask: foreground and background swapped back", change=swap)
        yield Finding("inverted mask", "error", (look.pair.mask,), message, "swap its two values", (cure,))


def swap(label: Label) -> Label:
    """Exchange the classes 0 and 1; what is ignored stays so."""
    return np.where(label <= 1, 1 - label, label).astype(np.uint8)


def _traits(case: Case, look: Look) -> tuple[float, float, float]:
    """The foreground's share of the mask and of its border, and how much brighter it is than the background, in standard deviations."""
    assert look.mask is not None
    assert look.image is not None
    grid = case.ids(look.mask.grid) == 1
    border = np.concatenate((grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]))
    share = float(case.counts[look.pair][1] / max(1, case.counts[look.pair][:2].sum()))
    thumb = look.image.thumb
    apart = float(thumb[grid].mean() - thumb[~grid].mean()) if 0 < grid.sum() < grid.size else 0.0
    return share, float(border.mean()), float(np.clip(apart / max(float(thumb.std()), 1e-6), -3, 3))


def _points(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Codes as points ``(N, 3)`` in colour space; a value is a grey."""
    grey = np.where(codes >= COLOR, codes - COLOR, codes * 0x010101)
    return np.stack([grey >> 16 & 255, grey >> 8 & 255, grey & 255], axis=1).astype(float)
