"""The user's cache folder: results that are computed once and found again under a digest.

The digest (SHA-256) covers everything a result depends on: the bytes of the images and masks, the
settings, and the code that decodes them. An entry is a folder that is complete or absent: it is
filled under another name, flushed to disk and renamed. Two processes may fill the same entry at
once; the second to finish drops its own. The next process removes what a killed one left behind. A
process that still reads a removed entry keeps its open files (POSIX), or prevents the removal
(Windows).

Reading every byte of a large data set takes a minute, so digests of files are kept with the files'
stamps: size, time of the last modification, time of the last change of any kind (which no program
can set back) and number on the disk. A digest is kept only if the file was last changed more than
two seconds ago: a later edit within the same tick of the disk's clock would not change the stamp.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
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
from numpy.typing import NDArray

from useg import __version__
from useg.data.annotations.shapes import Drawing
from useg.data.dataset import ClassMasks, Dataset, Instances, Pair
from useg.errors import SettingsError, UsageError
from useg.files import draft_folder, flush_folder, replacing
from useg.machine import in_parallel
from useg.parsing import open_file

# Without USEG_CACHE_GB, the cache has at most this many bytes, ...
MAX_CACHE_BYTES = 20 << 30
# ... and at most this share of the disk's free space, which includes what the cache holds.
_MAX_SHARE_OF_FREE_SPACE = 0.5

# Nothing else is ever removed, since USEG_CACHE may name any folder.
_ENTRY_NAME = re.compile(r"set-[0-9a-f]{64}|files-[0-9a-f]{64}\.json")

# The coarsest clock of a file system (FAT) ticks every two seconds.
MIN_FILE_AGE_NANOSECONDS = 2_000_000_000

# In place of the digest of a file that cannot be read; decoding it reports the reason.
UNREADABLE_FILE_DIGEST = "unreadable"

# The code that decides a sample's pixels. Edits elsewhere leave the users' caches valid.
DECODING_MODULES = (
    "classes.py",
    "data/annotations/rasterize.py",
    "data/annotations/shapes.py",
    "data/cache.py",
    "data/class_mapping.py",
    "data/dataset.py",
    "images/decode.py",
    "images/image_files.py",
    "images/formats.py",
    "images/jpeg2000.py",
    "images/other_formats.py",
    "images/tiff.py",
    "images/tiff_directories.py",
    "models/geometry.py",
    "scoring/metrics.py",
    "objects/separation.py",
)

# Size, times of modification and of any change in nanoseconds, number on the disk.
FileStamp = tuple[int, int, int, int]


def read_cache_limit(folder: Path) -> int:
    """Return how many bytes the cache may have.

    It is ``$USEG_CACHE_GB``, by default 20 GB or half of the free space, whichever is less.

    Raises:
        SettingsError: The variable is not a number above 0.
        OSError: The folder does not exist.
    """
    text = os.environ.get("USEG_CACHE_GB", "")
    if not text:
        available = shutil.disk_usage(folder).free + sum(map(_measure_bytes, _list_entries(folder)))
        return min(MAX_CACHE_BYTES, int(_MAX_SHARE_OF_FREE_SPACE * available))
    try:
        chosen = int(float(text) * (1 << 30))
    except (ValueError, OverflowError):
        chosen = 0
    if chosen < 1:
        raise SettingsError(
            f"the environment variable USEG_CACHE_GB is {text!r}; "
            "set a number above 0, unset it, or set USEG_CACHE=off"
        )
    return chosen


def find_cached(folder: Path, key: str) -> Path | None:
    """Return the complete entry for ``key`` (64 hex digits) and mark it as used, or return None."""
    place = folder / f"set-{key}"
    if not place.is_dir():
        return None
    # A shared cache may be read-only.
    with suppress(OSError):
        os.utime(place)
    return place


@contextmanager
def create_cached(folder: Path, key: str) -> Iterator[Path]:
    """Yield a new folder to fill; it becomes the entry for ``key`` if the block raises nothing.

    The entries that were not used for the longest time are removed where room is needed.

    Raises:
        OSError: There is no room, or no permission to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entry = folder / f"set-{key}"
    with draft_folder(entry) as draft:
        # The samples are nobody else's, wherever the cache is.
        draft.chmod(0o700)
        yield draft
        try:
            flush_folder(draft)
        except OSError as error:
            # Some network file systems cannot flush.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        try:
            draft.rename(entry)
        except OSError:
            # If the entry is there now, another process was faster, with the same content.
            if not entry.is_dir():
                raise
    _remove_oldest(folder, read_cache_limit(folder), keep=entry)


def remove_cached(entry: Path) -> None:
    """Remove an entry, so that nobody finds half of it; one that cannot be removed stays."""
    with suppress(OSError), draft_folder(entry) as draft:
        entry.rename(draft / entry.name)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as ``.npz``, each with its checksum."""
    np.savez(path, allow_pickle=False, **arrays)


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """Read what :func:`write_arrays` wrote; None if it is damaged or gone."""
    try:
        with open(path, "rb") as file, np.load(file) as stored:
            return dict(stored)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _remove_oldest(folder: Path, max_bytes: int, keep: Path) -> None:
    """Remove the longest unused entries until at most ``max_bytes`` remain; never ``keep``."""
    sizes = {entry: _measure_bytes(entry) for entry in _list_entries(folder)}
    for entry in sorted(sizes, key=_last_used):
        if sum(sizes.values()) > max_bytes and entry != keep:
            sizes.pop(entry)
            remove_cached(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def _list_entries(folder: Path) -> list[Path]:
    return [place for place in folder.iterdir() if _ENTRY_NAME.fullmatch(place.name)]


def _measure_bytes(entry: Path) -> int:
    """Return the size of a file or of a folder's files; 0 if it has just been removed."""
    try:
        files = entry.iterdir() if entry.is_dir() else [entry]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _last_used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0


@dataclass(frozen=True)
class CacheKey:
    """A digest of all that decides some pairs' pixels, and the files' stamps when it was made."""

    key: str
    stamps: dict[Path, FileStamp]

    def check(self) -> None:
        """Check that no file has changed since the key was made.

        Raises:
            OSError: A file has changed.
        """
        if _read_stamps(self.stamps) != self.stamps:
            raise OSError("an image or mask was changed while useg read the data")


def make_cache_key(
    folder: Path, dataset: Dataset, pairs: Sequence[Pair], *settings: str
) -> CacheKey:
    """Digest the files of ``pairs``, the classes, the decoding code and ``settings``.

    Names and places of the files are not part of it. Digests of the files are kept in ``folder``.
    """
    files = [path for pair in pairs for path in _files_of(pair)]
    stamps = _read_stamps(files)
    digests = compute_digests(files, folder / f"files-{_sha256(str(dataset.root.absolute()))}.json")
    parts = []
    for pair in pairs:
        shapes = repr(pair.truth) if isinstance(pair.truth, Drawing) else ""
        if isinstance(pair.truth, ClassMasks):
            shapes = repr([name for name, _ in pair.truth.masks])
        shapes += " valid" if pair.valid is not None else ""
        parts.append(f"{pair.page} {shapes} " + " ".join(digests[path] for path in _files_of(pair)))
    classes = [repr(dataset.classes), repr(dataset.recolored), repr(dataset.encoding)]
    if dataset.mapping:
        classes.append(repr(dataset.mapping))
    return CacheKey(_sha256(compute_decoder_version(), *settings, *classes, *parts), stamps)


def _files_of(pair: Pair) -> tuple[Path, ...]:
    """Return the files that decide a pair's pixels; the pair itself holds its drawn shapes."""
    valid = () if pair.valid is None else (pair.valid,)
    if isinstance(pair.truth, Drawing):
        stored = (shape.mask.path for shape in pair.truth.shapes if shape.mask)
        return (pair.image, *dict.fromkeys(stored), *valid)
    if isinstance(pair.truth, ClassMasks):
        return (pair.image, *(path for _, path in pair.truth.masks), *valid)
    masks = pair.truth.masks if isinstance(pair.truth, Instances) else (pair.mask,)
    return (pair.image, *masks, *valid)


def _read_stamps(files: Iterable[Path]) -> dict[Path, FileStamp]:
    found = {}
    for path in dict.fromkeys(files):
        # Decoding a file that cannot be read reports the reason.
        with suppress(OSError):
            found[path] = read_file_stamp(path)
    return found


@cache
def compute_decoder_version() -> str:
    """Return a digest of the code that turns files into samples.

    The cache is void if that changes, and only then.
    """
    sources = [Path(__file__).parents[1] / name for name in DECODING_MODULES]
    packages = ("numpy", "pillow", "tifffile", "imagecodecs")
    versions = [f"{package} {metadata.version(package)}" for package in packages]
    # A checkout that is not installed has a version too.
    versions.insert(0, f"useg {__version__}")
    return _sha256(*versions, *(path.read_text("utf-8") for path in sources))


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def compute_digests(paths: Iterable[Path], digest_file: Path) -> dict[Path, str]:
    """Return each file's SHA-256, or ``UNREADABLE_FILE_DIGEST``.

    Args:
        paths: Files; each is read once, also if it is named twice.
        digest_file: JSON file that keeps digests. It is not an error if it cannot be read or
            written.
    """
    known = _read_digest_file(digest_file)
    start = time.time_ns()

    def compute(path: Path) -> tuple[Path, FileStamp | None, str]:
        try:
            stamp = read_file_stamp(path)
            if stamp == known.get(str(path), (None, ""))[0]:
                return path, stamp, known[str(path)][1]
            with open_file(path) as file:
                return path, stamp, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return path, None, UNREADABLE_FILE_DIGEST

    found = list(in_parallel(compute, dict.fromkeys(paths)))
    settled = {
        str(path): (stamp, digest)
        for path, stamp, digest in found
        if stamp is not None and max(stamp[1:3]) < start - MIN_FILE_AGE_NANOSECONDS
    }
    if settled.items() - known.items():
        with suppress(OSError, UsageError):
            digest_file.parent.mkdir(parents=True, exist_ok=True)
            # The folder is useg's own.
            with replacing(digest_file, Path.is_file) as draft:
                draft.write_text(json.dumps(settled), "utf-8")
    return {path: digest for path, _, digest in found}


def read_file_stamp(path: Path) -> FileStamp:
    """Return a file's :data:`FileStamp`, which changes whenever the file is written.

    Raises:
        OSError: There is no such file.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read_digest_file(digest_file: Path) -> dict[str, tuple[FileStamp, str]]:
    try:
        content = json.loads(digest_file.read_text("utf-8"))
        return {
            path: ((size, modified, changed, number), digest)
            for path, ((size, modified, changed, number), digest) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
