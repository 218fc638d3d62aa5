"""A file being written -> the whole file or none of it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from useg.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block ends well, what was written there replaces ``path`` in one step.

    Temporary file, flush to disk, rename: a reader, or a run that was killed, never sees half a file.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        temporary = _beside(path)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}); choose another place or free it"
        ) from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}); choose another place or free it"
        ) from error
    finally:
        with suppress(OSError):  # the disk may be gone
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; when the block ends well, it replaces ``path``, a folder, whole.

    Raises:
        UsageError: the folder cannot be written.
    """
    new, old = _beside(path), _beside(path)
    try:
        new.mkdir()
        yield new
        for folder, _, names in os.walk(new):
            for name in names:
                with open(os.path.join(folder, name), "rb+") as file:
                    os.fsync(file.fileno())
        if path.exists():
            path.rename(old)  # no folder with something in it is replaced in one step
        new.rename(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}); choose another place or free it"
        ) from error
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{secrets.token_hex(6)}{path.suffix}")


def clear_leftovers(folder: Path, stems: Container[str]) -> None:
    """Remove from a folder what :func:`replacing` and :func:`replacing_folder` left with these stems where they were killed."""
    for path in folder.iterdir():
        leftover = re.fullmatch(r"\.(.+)-[0-9a-f]{12}(\.[^.]*)?", path.name)
        if leftover and leftover[1] in stems:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Make a folder (and those above it) and check that it can be written.

    Raises:
        UsageError: it cannot be made or written, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"the folder {path} cannot be written ({error.strerror}); choose another with --out"
        ) from error
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
