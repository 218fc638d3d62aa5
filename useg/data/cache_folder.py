"""The user's cache folder: folders of files made once, found again under the digest of all that they were made from.

A folder in it is complete or not there: it is made under another name, flushed to disk and renamed. Two processes may make the same one at
once (the second to finish drops its own), and one that is killed leaves a folder that the next one clears away. Whoever still reads a
folder that is removed keeps its open files (POSIX), or keeps it from being removed (Windows).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from useg.data.annotations.rasterize import Drawing
from useg.data.dataset import Dataset, Instances, Pair
from useg.errors import SettingsError, UsageError
from useg.files import replacing
from useg.machine import in_parallel

if sys.platform != "win32":
    import fcntl


MAX_CACHE_BYTES = 20 << 30  # bytes that are kept at most, unless USEG_CACHE_GB says otherwise


_SHARE = 0.5  # and at most this share of the disk's free space, what is kept counted as free


_OURS = re.compile(
    r"set-[0-9a-f]{64}|files-[0-9a-f]{64}\.json"
)  # nothing else is ever removed: USEG_CACHE may name any folder


_UNFINISHED = re.compile(r"\.(?:making|removing)-set-\w+")


_DEAD = (
    24 * 3600
)  # seconds after which an unfinished folder counts as left alone where locks do not work


def find_cache_folder() -> Path | None:
    """Return where the cache is: ``$USEG_CACHE``, by default the system's place for a user's caches; None for ``USEG_CACHE=off``."""
    chosen = os.environ.get("USEG_CACHE", "")
    if chosen:
        return None if chosen.casefold() == "off" else Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("useg", appauthor=False)


def read_cache_limit(folder: Path) -> int:
    """Return how much may be kept: ``$USEG_CACHE_GB``, by default 20 GB or half of what is free, whichever is less.

    Raises:
        DataError: the variable is no number above 0.
        OSError: the folder is not there.
    """
    text = os.environ.get("USEG_CACHE_GB", "")
    if not text:
        return min(
            MAX_CACHE_BYTES,
            int(_SHARE * (shutil.disk_usage(folder).free + sum(map(_bytes, _kept(folder))))),
        )
    try:
        chosen = int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        chosen = 0
    if chosen < 1:
        raise SettingsError(
            f"the environment variable USEG_CACHE_GB is {text!r}; set a number above 0, unset it, or set USEG_CACHE=off"
        )
    return chosen


def find_cached(folder: Path, key: str) -> Path | None:
    """Return the complete folder made for ``key`` (64 hexadecimal digits), and note that it is used; None when there is none."""
    place = folder / f"set-{key}"
    if not place.is_dir():
        return None
    with suppress(OSError):  # a cache that others filled may be read-only
        os.utime(place)
    return place


@contextmanager
def create_cached(folder: Path, key: str) -> Iterator[Path]:
    """Yield a new folder to fill for ``key``; when the block ends well, :func:`find` finds it. Older ones go where room is needed.

    Raises:
        OSError: no room, or no right to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_unfinished(folder)
    with _claimed(folder) as place:
        try:
            yield place
            for path in (*place.iterdir(), place):
                _flush(path)
            try:
                place.rename(folder / f"set-{key}")
            except OSError:
                if not (
                    folder / f"set-{key}"
                ).is_dir():  # otherwise another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(place, ignore_errors=True)
    _shrink(folder, read_cache_limit(folder), folder / f"set-{key}")


def remove_cached(place: Path) -> None:
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


def clear_unfinished(folder: Path) -> None:
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
            remove_cached(place) if place.is_dir() else place.unlink(missing_ok=True)


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


MIN_FILE_AGE_NANOSECONDS = (
    2_000_000_000  # nanoseconds; the coarsest clock (FAT) ticks every two seconds
)


# the code that decides a sample's pixels; an edit elsewhere leaves the caches of all users as they are
DECODING_MODULES = (
    "classes.py", "data/annotations/rasterize.py", "data/cache.py", "data/dataset.py", "images/decode.py", "images/files.py",
    "images/limits.py", "images/tiff.py", "models/geometry.py",
)  # fmt: skip
UNREADABLE_FILE_DIGEST = (
    "unreadable"  # in place of a digest: whoever decodes the file says what is wrong with it
)


FileStamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class CacheKey:
    """What some pairs' pixels depend on, as a ``key`` of 64 hexadecimal digits, and the stamps of the files when it was made."""

    key: str
    stamps: dict[Path, FileStamp]

    def check(self) -> None:
        """Refuse to keep what was made of files that have changed since.

        Raises:
            OSError: they have.
        """
        if _stamps(self.stamps) != self.stamps:
            raise OSError("a picture was changed while the pictures were read")


def make_cache_key(
    folder: Path, dataset: Dataset, pairs: Sequence[Pair], *settings: str
) -> CacheKey:
    """Digest all that decides the pixels of ``pairs``: bytes of their files, classes, the code that decodes, and ``settings``.

    Where the files lie and what they are called is no part of it. Digests of files are kept in ``folder``.
    """
    stamps = _stamps(path for pair in pairs for path in _files(pair))
    memo = folder / f"files-{_sha256(str(dataset.root.absolute()))}.json"
    found = compute_digests((path for pair in pairs for path in _files(pair)), memo)
    drawn = (repr(pair.truth) if isinstance(pair.truth, Drawing) else "" for pair in pairs)
    each = (
        f"{pair.page} {shapes} " + " ".join(found[path] for path in _files(pair))
        for pair, shapes in zip(pairs, drawn, strict=True)
    )
    return CacheKey(
        _sha256(
            compute_decoder_version(),
            *settings,
            repr(dataset.classes),
            repr(dataset.recolored),
            *each,
        ),
        stamps,
    )


def _files(pair: Pair) -> tuple[Path, ...]:
    """The files that decide a pair's pixels; a :class:`Drawing` is in the pair itself."""
    if isinstance(pair.truth, Drawing):
        return (pair.image,)
    return (pair.image, *(pair.truth.masks if isinstance(pair.truth, Instances) else (pair.mask,)))


def _stamps(files: Iterable[Path]) -> dict[Path, FileStamp]:
    found = {}
    for path in dict.fromkeys(files):
        with suppress(OSError):  # whoever decodes it says what is wrong
            found[path] = read_file_stamp(path)
    return found


@cache
def compute_decoder_version() -> str:
    """Return a digest of the code that turns files into samples: the cache is void when that changes, and only then."""
    sources = [Path(__file__).parents[1] / name for name in DECODING_MODULES]
    versions = [
        f"{package} {metadata.version(package)}"
        for package in ("useg", "numpy", "pillow", "tifffile", "imagecodecs")
    ]
    return _sha256(*versions, *(path.read_text("utf-8") for path in sources))


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def compute_digests(paths: Iterable[Path], memo: Path) -> dict[Path, str]:
    """Return each file's SHA-256.

    Args:
        paths: files; one that is named twice is read once.
        memo: the file in which digests are kept; one that cannot be read or written is done without.
    """
    known = _read(memo)
    began = time.time_ns()

    def digest(path: Path) -> tuple[Path, FileStamp | None, str]:
        try:
            before = read_file_stamp(path)
            if before == known.get(str(path), (None, ""))[0]:
                return path, before, known[str(path)][1]
            with path.open("rb") as file:
                return path, before, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return path, None, UNREADABLE_FILE_DIGEST

    found = list(in_parallel(digest, dict.fromkeys(paths)))
    settled = {
        str(path): (at, value)
        for path, at, value in found
        if at is not None and max(at[1:3]) < began - MIN_FILE_AGE_NANOSECONDS
    }
    if settled.items() - known.items():
        with suppress(OSError, UsageError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memo) as temporary:
                temporary.write_text(json.dumps(settled), "utf-8")
    return {path: value for path, _, value in found}


def read_file_stamp(path: Path) -> FileStamp:
    """Return what changes when a file is written: size, times of modification and of any change in nanoseconds, number on the disk.

    Raises:
        OSError: there is no such file.
    """
    seen = path.stat()
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


def _read(memo: Path) -> dict[str, tuple[FileStamp, str]]:
    try:
        content = json.loads(memo.read_text("utf-8"))
        return {
            path: ((size, modified, changed, number), value)
            for path, ((size, modified, changed, number), value) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
