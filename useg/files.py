"""Write files and folders whole or not at all, whatever happens to the process or the disk."""

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

from useg.errors import MachineError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces ``path`` when the block succeeds.

    The content is flushed to disk and then renamed, so neither a reader nor a killed process ever
    leaves or sees half a file.

    Raises:
        MachineError: the folder cannot be written.
    """
    try:
        temporary = _beside(path)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _not_writable(path, error) from error
    finally:
        # The disk may be gone.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that replaces ``path`` when the block succeeds.

    Raises:
        MachineError: the folder cannot be written.
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
            # The system replaces only empty folders in one step.
            path.rename(old)
        new.rename(path)
    except OSError as error:
        raise _not_writable(path, error) from error
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _not_writable(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{path} cannot be written ({error.strerror}); free space, change its permissions or "
        "choose another place"
    )


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{secrets.token_hex(6)}{path.suffix}")


def clear_leftovers(folder: Path, stems: Container[str]) -> None:
    """Remove temporary files and folders that a killed process left in ``folder``.

    Args:
        folder: where :func:`replacing` or :func:`replacing_folder` wrote.
        stems: names, without suffix, of the files that they were to replace.
    """
    for path in folder.iterdir():
        leftover = re.fullmatch(r"\.(.+)-[0-9a-f]{12}(\.[^.]*)?", path.name)
        if leftover and leftover[1] in stems:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents, and check that it is writable.

    Raises:
        MachineError: it cannot be created or written, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise MachineError(
            f"the folder {path} cannot be written ({error.strerror}); choose another folder"
        ) from error
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
