"""What a person got wrong -> one clear sentence; a missing optional package -> its install line."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TypeVar

Option = TypeVar("Option")


class UsageError(Exception):
    """Wrong use or bad input: says what was given, what is allowed and what to do. The command line prints it and exits 2."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: the name to import, such as ``"openvino"``.
        extra: the extra of useg that brings it.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"this needs the package {module!r}, which is not installed; run: pip install 'useg[{extra}]'"
        ) from error


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or ``""`` when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def choose(what: str, name: str, options: Mapping[str, Option]) -> Option:
    """Look ``name`` up among ``options``; an unknown name is an error that lists them and suggests the nearest.

    Raises:
        UsageError: there is no such option.
    """
    if name in options:
        return options[name]
    raise UsageError(
        f"{what} {name!r} is not known; choose one of {', '.join(sorted(options))}{suggest(name, options)}"
    )
