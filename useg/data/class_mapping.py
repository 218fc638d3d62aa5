"""The classes of a data set -> those of a model: by name, by stored value, or as a user confirmed.

A score compares ids. If nothing shows that the ids of a data set and of a model mean the same, the
score could be silently wrong. So it is refused, with a proposed mapping for the user to confirm.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from useg.classes import IGNORE, ClassTable, Label
from useg.errors import DataError, SettingsError, suggest

# The mapping that says: equal stored values mean equal classes.
SAME_VALUES = "ids"

# Names that useg gives to two classes that no file names.
TWO_CLASSES = ("background", "foreground")

# Names at least this similar are proposed as the same class, 0 to 1.
_MIN_SIMILARITY = 0.75


@dataclass(frozen=True)
class ClassMapping:
    """The classes of a data set as those of a model.

    Args:
        stored: The data set's own class table, by which its masks are read.
        ids: For each class of ``stored`` the id of the model's class, or ``IGNORE``.
    """

    stored: ClassTable
    ids: tuple[int, ...]

    def apply(self, label: Label) -> Label:
        """Replace the data set's ids ``(H, W)`` by the model's."""
        lookup = np.full(256, IGNORE, np.uint8)
        lookup[: len(self.ids)] = self.ids
        return lookup[label]

    def describe(self, model: ClassTable) -> str:
        """Describe which class became which, and which are ignored."""
        mapped = [
            f"{name} as {model.names[k]}"
            for name, k in zip(self.stored.names, self.ids, strict=True)
            if k != IGNORE and name != model.names[k]
        ]
        ignored = [name for name, k in zip(self.stored.names, self.ids, strict=True) if k == IGNORE]
        parts = [f"scored {', '.join(mapped)}"] if mapped else []
        parts += [f"ignored {', '.join(ignored)}"] if ignored else []
        return "; ".join(parts) or "matched by name"


def parse_class_map(text: str) -> str | dict[str, str]:
    """Parse the value of ``--map``: ``ids``, or ``NAME=NAME,NAME=NAME``.

    Raises:
        SettingsError: A part is not ``NAME=NAME``, or a name stands on the left twice.

    >>> parse_class_map("Car=Vehicles, Tree=Vegetation")
    {'Car': 'Vehicles', 'Tree': 'Vegetation'}
    """
    if text.strip() == SAME_VALUES:
        return SAME_VALUES
    mapping: dict[str, str] = {}
    for part in text.split(","):
        own, equals, other = (piece.strip() for piece in part.partition("="))
        if not own or not equals or not other:
            raise SettingsError(
                f"the mapping has the part '{part.strip()}'; write NAME=NAME,NAME=NAME with a "
                "class of the data on the left and a class of the model on the right, or "
                f"'{SAME_VALUES}' if both use the same ids for the same classes"
            )
        if mapping.setdefault(own, other) != other:
            raise SettingsError(f"the mapping maps '{own}' to two classes; keep one of them")
    return mapping


def name_value(value: int) -> str:
    """Name a class that no file names after its stored value."""
    return f"class {value}"


def name_color(code: int) -> str:
    """Name a class that no file names after its colour ``0xRRGGBB``."""
    return f"color #{code:06x}"


def has_default_names(table: ClassTable) -> bool:
    """Whether useg has named the classes, because no file did."""
    return all(
        name in TWO_CLASSES or re.fullmatch(r"class \d+|color #[0-9a-f]{6}", name)
        for name in table.names
    )


def match_classes(
    own: ClassTable, model: ClassTable, class_map: str | Mapping[str, str] | None, place: str
) -> ClassMapping | None:
    """Find for each class of a data set the class of the model.

    Args:
        own: The data set's class table.
        model: The model's.
        class_map: What the user confirmed: ``"ids"``, or classes of the data set with those of the
            model; other classes are ignored, unless the model has one of the same name.
        place: The data set, for messages.

    Returns:
        The mapping, or None if names and order are the same.

    Raises:
        DataError: The names differ and nothing was confirmed.
        SettingsError: ``class_map`` names an unknown class or does not fit.
    """
    by_name = {_simplify(name): k for k, name in enumerate(model.names)}
    same_name = [by_name.get(_simplify(name), IGNORE) for name in own.names]
    if class_map is None:
        if own.names == model.names:
            return None
        if IGNORE not in same_name and len(set(same_name)) == len(same_name):
            return ClassMapping(own, tuple(same_name))
        raise DataError(_ask_for_mapping(own, model, place))
    if isinstance(class_map, str):
        return ClassMapping(own, _match_values(own, model, class_map, place))
    ids = list(same_name)
    for name, other in class_map.items():
        _check_name(name, own, place)
        _check_name(other, model, "the model")
        ids[own.names.index(name)] = model.names.index(other)
    return ClassMapping(own, tuple(ids))


def unnamed_classes_error(model: ClassTable, place: str) -> DataError:
    """Return the error for ids without names, scored by a model whose classes have names."""
    return DataError(
        f"the masks of {place} store ids without names, and they may not be the ids of the "
        f"model's classes ({_list_values(model)}); if they are, run it again with --map "
        f"{SAME_VALUES} "
        "(class_map in Python), or give the folder a classes.toml"
    )


def _match_values(
    own: ClassTable, model: ClassTable, class_map: str, place: str
) -> tuple[int, ...]:
    if class_map != SAME_VALUES:
        raise SettingsError(
            f"the class mapping is {class_map!r}; give '{SAME_VALUES}', or pairs of names"
        )
    by_value = {value: k for k, value in enumerate(model.values)}
    unknown = [
        name for name, value in zip(own.names, own.values, strict=True) if value not in by_value
    ]
    if own.by_color or model.by_color or unknown:
        what = f"{', '.join(unknown)} of {place}" if unknown else f"the colours of {place}"
        raise SettingsError(
            f"the mapping {SAME_VALUES} does not fit: {what} cannot be found among the model's ids "
            f"({_list_values(model)}); map names instead: 'NAME=NAME,NAME=NAME'"
        )
    return tuple(by_value[value] for value in own.values)


def _ask_for_mapping(own: ClassTable, model: ClassTable, place: str) -> str:
    """Say which classes differ, with the nearest mapping as a proposal."""
    proposal = {}
    simplified = {_simplify(name): name for name in model.names}
    for name in own.names:
        near = difflib.get_close_matches(_simplify(name), simplified, 1, _MIN_SIMILARITY)
        if near:
            proposal[name] = simplified[near[0]]
    left = [name for name in own.names if name not in proposal]
    pairs = ",".join(f"{name}={other}" for name, other in proposal.items()) or "NAME=NAME,NAME=NAME"
    return (
        f"{place} has the classes {', '.join(own.names)}, but the model has "
        f"{', '.join(model.names)}; say which belong together: check and complete --map '{pairs}' "
        "(class_map in Python)"
        + (f" (as it stands, {', '.join(left)} would be ignored)" if left and proposal else "")
    )


def _simplify(name: str) -> str:
    """Return a name without what does not change its meaning: case, spaces, plural."""
    simple = re.sub(r"[\s_\-]+", "", name.casefold())
    return simple.removesuffix("s") if len(simple) > 3 else simple


def _check_name(name: str, table: ClassTable, place: str) -> None:
    if name not in table.names:
        raise SettingsError(
            f"the mapping names the class {name!r}, but {place} has {', '.join(table.names)}"
            f"{suggest(name, table.names)}"
        )


def _list_values(table: ClassTable) -> str:
    return ", ".join(
        f"{value} {name}" for value, name in zip(table.values, table.names, strict=True)
    )
