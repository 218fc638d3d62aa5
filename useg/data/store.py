"""The user's cache folder: folders of files made once, found again under the digest of all that they were made from.

A folder in it is complete or not there: it is made under another name, flushed to disk and renamed. Two processes may make the same one at
once (the second to finish drops its own), and one that is killed leaves a folder that the next one clears away. Whoever still reads a
folder that is removed keeps its open files (POSIX), or keeps it from being removed (Windows).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.errors import UsageError

if sys.platform != "win32":
    import fcntl

SIZE = 20 << 30  # bytes that are kept at most, unless USEG_CACHE_GB says otherwise
_SHARE = 0.5  # and at most this share of the disk's free space, what is kept counted as free
_OURS = re.compile(r"set-[0-9a-f]{64}|files-[0-9a-f]{64}\.json")  # nothing else is ever removed: USEG_CACHE may name any folder
_UNFINISHED = re.compile(r"\.(?:making|removing)-set-\w+")
_DEAD = 24 * 3600  # seconds after which an unfinished folder counts as left alone where locks do not work


def cache_folder() -> Path | None:
    """Return where the cache is: ``$USEG_CACHE``, by default the system's place for a user's caches; None for ``USEG_CACHE=off``."""
    chosen = os.environ.get("USEG_CACHE", "")
    if chosen:
        return None if chosen.casefold() == "off" else Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path("~/AppData/Local").expanduser()) / "useg" / "Cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/useg").expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else "~/.cache").expanduser() / "useg"  # the XDG rules pass over a relative path


def most_bytes(folder: Path) -> int:
    """Return how much may be kept: ``$USEG_CACHE_GB``, by default 20 GB or half of what is free, whichever is less.

    Raises:
        UsageError: the variable is no number above 0.
        OSError: the folder is not there.
    """
    text = os.environ.get("USEG_CACHE_GB", "")
    if not text:
        return min(SIZE, int(_SHARE * (shutil.disk_usage(folder).free + sum(map(_bytes, _kept(folder))))))
    try:
        chosen = int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        chosen = 0
    if chosen < 1:
        raise UsageError(f"the environment variable USEG_CACHE_GB is {text!r}; set a number above 0, unset it, or set USEG_CACHE=off")
    return chosen


def find(folder: Path, key: str) -> Path | None:
    """Return the complete folder made for ``key`` (64 hexadecimal digits), and note that it is used; None when there is none."""
    place = folder / f"set-{key}"
    if not place.is_dir():
        return None
    with suppress(OSError):  # a cache that others filled may be read-only
        os.utime(place)
    return place


@contextmanager
def making(folder: Path, key: str) -> Iterator[Path]:
    """Yield a new folder to fill for ``key``; when the block ends well, :func:`find` finds it. Older ones go where room is needed.

    Raises:
        OSError: no room, or no right to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    with _claimed(folder) as place:
        try:
            yield place
            for path in (*place.iterdir(), place):
                _flush(path)
            try:
                place.rename(folder / f"set-{key}")
            except OSError:
                if not (folder / f"set-{key}").is_dir():  # otherwise another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(place, ignore_errors=True)
    _shrink(folder, most_bytes(folder), folder / f"set-{key}")


def remove(place: Path) -> None:
    """Remove a folder that :func:`find` found; nobody finds half of it. One that cannot be removed stays."""
    grave = place.with_name(f".removing-set-{os.urandom(8).hex()}")
    with suppress(OSError):
        place.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as ``.npz``, each with its check sum."""
    np.savez(path, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read what :func:`write_arrays` wrote; None where it is damaged or gone."""
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            return dict(stored)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def clear(folder: Path) -> None:
    """Remove what killed processes left unfinished."""
    for place in folder.iterdir():
        if _UNFINISHED.fullmatch(place.name) and _left_alone(place):
            shutil.rmtree(place, ignore_errors=True)


def _shrink(folder: Path, most: int, keep: Path) -> None:
    """Remove the longest unused until at most ``most`` bytes are kept; never ``keep``."""
    sizes = {place: _bytes(place) for place in _kept(folder)}
    for place in sorted(sizes, key=_used):
        if sum(sizes.values()) > most and place != keep:
            sizes.pop(place)
            remove(place) if place.is_dir() else place.unlink(missing_ok=True)


def _kept(folder: Path) -> list[Path]:
    return [place for place in folder.iterdir() if _OURS.fullmatch(place.name)]


def _bytes(place: Path) -> int:
    """Size of a file or of a folder's files; 0 when it has just been removed."""
    try:
        return sum(file.stat().st_size for file in (place.iterdir() if place.is_dir() else [place]))
    except OSError:
        return 0


def _used(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except OSError:
        return 0


@contextmanager
def _claimed(folder: Path) -> Iterator[Path]:
    """Make a folder that the system knows to be in use for as long as this process lives."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=".making-set-", dir=folder))
        lock = _lock(place)
        if place.is_dir():  # nobody took it for a dead one before it was locked
            break
        _unlock(lock)
    try:
        yield place
    finally:
        _unlock(lock)


def _left_alone(place: Path) -> bool:
    try:
        lock = _lock(place, wait=False)
    except BlockingIOError:
        return False
    _unlock(lock)
    return lock is not None or time.time() - _used(place) > _DEAD


def _lock(place: Path, wait: bool = True) -> int | None:
    """Lock a folder for this process until :func:`_unlock` or its death; None where locks do not work.

    Raises:
        BlockingIOError: another process has it, and this one does not want to wait.
    """
    if sys.platform == "win32":
        return None
    descriptor = None
    try:
        descriptor = os.open(place, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        _unlock(descriptor)
        raise
    except OSError:
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _flush(path: Path) -> None:
    """Bring a file's content, or a folder's list of files, to the disk."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
