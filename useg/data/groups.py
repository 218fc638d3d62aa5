"""Names -> which pictures show the same patient, slide, site or scene, as far as names tell."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

FEWEST = 5  # groups: with fewer, holding one out whole says little
_LARGEST = 0.5  # share of the pictures that one group may have


def name_groups(names: Sequence[str]) -> list[str] | None:
    """Return each picture's group, or None where names show none: ``P03_slice_004`` -> ``P03``, ``tile_12_0_256`` -> ``tile_12``.

    A name is a row of parts between ``/ _ - .`` and blanks (or, without these, numbers with the letters before them: ``s03t12``). The first
    parts that differ from picture to picture name the group: as few of them as make at least five groups, of two pictures each on average,
    none with more than half of all. One of them must have a digit: ``cat_12`` and ``dog_12`` are kinds, not places.

    Args:
        names: paths without suffix, as they are unique in a data set.
    """
    rows = _parts(names)
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    if sum(len(row) == width for row in rows) < len(rows):
        return None
    differing = [k for k in range(width) if len({row[k] for row in rows}) > 1]
    for count in range(1, len(differing)):
        first = differing[:count]
        groups = ["_".join(row[: first[-1] + 1]) for row in rows]
        sizes = Counter(groups)
        if 2 * len(sizes) > len(rows):
            return None
        has_id = any(all(re.search(r"\d", row[k]) for row in rows) for k in first)
        if has_id and len(sizes) >= FEWEST and max(sizes.values()) <= _LARGEST * len(rows):
            return groups
    return None


def _parts(names: Sequence[str]) -> list[list[str]]:
    split = [re.split(r"[/_\-. ]+", name) for name in names]
    if max(map(len, split), default=0) > 1:
        return split
    forms = {re.sub(r"\d+", "0", name) for name in names}
    return [re.findall(r"\D*\d+|\D+$", name) for name in names] if len(forms) == 1 else split
