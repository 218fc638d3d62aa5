"""A folder -> its files in natural order, without hidden ones and links that lead in circles."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path

from useg.errors import DataError
from useg.images.decode import IMAGE_SUFFIXES
from useg.images.files import natural_key


def list_image_files(folder: Path) -> list[Path]:
    """List the image files in a folder and its sub-folders, in natural order.

    Hidden files, and the copies that macOS makes, are left out.
    """
    return list_files(folder, IMAGE_SUFFIXES)


def list_files(folder: Path, suffixes: Container[str]) -> list[Path]:
    """List files like :func:`list_image_files`, by suffix (in lower case, with the dot)."""
    found = [
        Path(place, name)
        for place, names, _ in walk_folders(folder)
        for name in names
        if not _is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes
    ]
    return sorted(found, key=natural_key)


def walk_folders(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, files, links that are not followed) in and below ``root``.

    A link to a folder is followed unless that folder is read anyway, as in ``images/all -> .``.

    Raises:
        DataError: A folder cannot be read.
    """
    top = os.path.realpath(root)
    for place, folders, files in os.walk(root, onerror=_refuse_folder, followlinks=True):
        links = [
            os.path.join(place, name)
            for name in folders
            if not _is_hidden(name) and os.path.islink(os.path.join(place, name))
        ]
        skipped = [link for link in links if _is_read_anyway(os.path.realpath(link), place, top)]
        names = {os.path.basename(link) for link in skipped}
        folders[:] = [name for name in folders if not _is_hidden(name) and name not in names]
        yield place, files, skipped


def _is_read_anyway(target: str, place: str, top: str) -> bool:
    """Return whether a link leads to a folder around it, or to another one in the data."""
    around = Path(os.path.realpath(place))
    inside = Path(target).relative_to(top).parts if Path(target).is_relative_to(top) else None
    is_inside = inside is not None and not any(map(_is_hidden, inside))
    return is_inside or around.is_relative_to(target)


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"the folder '{error.filename}' cannot be read ({error.strerror}); "
        "make it readable, or choose another"
    ) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


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
        raise DataError(
            f"the folder '{folder}' cannot be read ({error.strerror}); "
            "make it readable, or choose another"
        ) from error
