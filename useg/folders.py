"""Folders -> the files in them and in their sub-folders, in natural order."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

from useg.errors import DataError

# A folder, and the names of the files in it; links to folders that are not followed.
FolderContent = tuple[str, list[str], list[str]]

# Content of folders that were walked, while :func:`cached_walks` caches it.
_walks: ContextVar[dict[Path, list[FolderContent]] | None] = ContextVar("_walks", default=None)


def natural_key(path: Path | str) -> tuple[tuple[str | int, ...], str]:
    """Return a sort key that compares numbers in names by value: ``a2.png`` before ``a10.png``."""
    text = path.as_posix() if isinstance(path, Path) else path
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple(int(part) if k % 2 else part for k, part in enumerate(parts)), text


def list_files(folder: Path, suffixes: Container[str]) -> list[Path]:
    """List the files in a folder and its sub-folders, in natural order.

    Hidden files, and the copies that macOS makes, are left out.

    Args:
        folder: The folder.
        suffixes: The suffixes of the files, in lower case, with the dot.
    """
    found = [
        Path(place, name)
        for place, names, _ in walk_folders(folder)
        for name in names
        if not _is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes
    ]
    return sorted(found, key=natural_key)


@contextmanager
def cached_walks() -> Iterator[None]:
    """Cache the content of folders within this block, so each is walked only once.

    Nothing may be written into these folders meanwhile.
    """
    token = _walks.set({})
    try:
        yield
    finally:
        _walks.reset(token)


def walk_folders(root: Path) -> Iterable[FolderContent]:
    """Return (folder, files, links that are not followed) in and below ``root``.

    A link to a folder is followed unless that folder is read anyway, as in ``images/all -> .``.

    Raises:
        DataError: A folder cannot be read.
    """
    walks = _walks.get()
    if walks is None:
        return _walk(root)
    if root not in walks:
        walks[root] = list(_walk(root))
    return walks[root]


def _walk(root: Path) -> Iterator[FolderContent]:
    top = os.path.realpath(root)
    for place, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        links = [
            os.path.join(place, name)
            for name in folders
            if not _is_hidden(name) and os.path.islink(os.path.join(place, name))
        ]
        skipped = [link for link in links if _is_already_listed(os.path.realpath(link), place, top)]
        names = {os.path.basename(link) for link in skipped}
        folders[:] = [name for name in folders if not _is_hidden(name) and name not in names]
        yield place, files, skipped


def _is_already_listed(target: str, place: str, top: str) -> bool:
    """Return whether a link leads to a parent of itself, or to another folder of the data."""
    around = Path(os.path.realpath(place))
    inside = Path(target).relative_to(top).parts if Path(target).is_relative_to(top) else None
    is_inside = inside is not None and not any(map(_is_hidden, inside))
    return is_inside or around.is_relative_to(target)


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"the folder '{error.filename}' cannot be read ({error.strerror}); "
        "make it readable, or choose another"
    ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def list_subfolders(folder: Path) -> list[Path]:
    """List the visible sub-folders by name.

    Raises:
        DataError: The folder cannot be read.
    """
    try:
        return sorted(
            child for child in folder.iterdir() if child.is_dir() and not _is_hidden(child.name)
        )
    except OSError as error:
        _refuse_folder(error)
