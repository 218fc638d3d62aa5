"""Errors that a user can mend: each message says what was given, what is allowed and what to do.

The tree, for programs that treat the causes differently::

    UsageError
    ├── DataError              images, masks, folders, data set descriptions
    ├── ModelError             model files, runs, checkpoints, exports
    ├── SettingsError          settings, arguments and options
    └── MachineError           this machine: memory, disk, network, other processes
        ├── MissingPackageError    an optional package
        └── FaultyDeviceError      a GPU that computes something else than the CPU
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TypeVar

Option = TypeVar("Option")

# A sentence writes out at most this many names of a list.
MAX_NAMES = 6


class UsageError(Exception):
    """Base class of all errors that the user can fix; the command line prints them and exits 2.

    The message says what was given, what is allowed and what to do.
    """


class DataError(UsageError):
    """The data cannot be used: a damaged image, a mask with an unknown value, a missing folder."""


class ModelError(UsageError):
    """A model file, run, checkpoint or export cannot be used: missing, damaged, of another kind."""


class SettingsError(UsageError):
    """A setting, argument or option is unknown, has an impossible value or contradicts another."""


class MachineError(UsageError):
    """The environment does not allow it: memory, disk space, permissions, ports, processes."""


class MissingPackageError(MachineError):
    """An optional package is not installed; the message contains the command that installs it."""


class FaultyDeviceError(MachineError):
    """A GPU does not compute what the CPU computes."""


class DeviceWarning(UserWarning):
    """Something was computed on a device that was not chosen."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Name to import, such as ``"openvino"``.
        extra: The extra of useg that installs it.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs the package {module!r}, which is not installed; "
            f"run: pip install 'useg[{extra}]'"
        ) from error


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the most similar known name, or ``""``."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def choose(what: str, name: str, options: Mapping[str, Option]) -> Option:
    """Return the option with a name.

    Args:
        what: What is chosen, for the message, such as ``"augmentation"``.
        name: The name to look up.
        options: All options by their names.

    Raises:
        SettingsError: There is no such option; the message lists all and suggests the nearest.
    """
    if name in options:
        return options[name]
    raise SettingsError(
        f"{what} {name!r} is not known; "
        f"choose one of {', '.join(sorted(options))}{suggest(name, options)}"
    )


def format_count(count: int, one: str, many: str = "") -> str:
    """Format a count with its noun.

    >>> format_count(1, "image"), format_count(1200, "image"), format_count(2, "class", "classes")
    ('1 image', '1,200 images', '2 classes')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def join_names(items: Sequence[object], most: int | None = None) -> str:
    """Join with commas and "and"; at most ``most`` are written out.

    >>> join_names([1]), join_names([1, 2, 3]), join_names("abcdefgh", 6)
    ('1', '1, 2 and 3', 'a, b, c, d, e, f and 2 more')
    """
    shown = [str(item) for item in items[:most]]
    if most is not None and len(items) > most:
        shown.append(f"{len(items) - most} more")
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))
