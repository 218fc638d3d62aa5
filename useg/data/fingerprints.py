"""Files -> digests of their content, so that what was made of them is found again, and never after an edit.

Reading every byte of a large set takes a minute, so digests are kept with the files' stamps: size, time of the last modification, time of the
last change of any kind (which no program can set back) and number on the disk. A digest is kept only of a file that had been left alone for
two seconds: a later edit within the same tick of the disk's clock would leave the stamp as it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from useg.data.dataset import Dataset, Instances, Pair
from useg.data.parallel import in_parallel
from useg.data.shapes import Drawing
from useg.errors import UsageError
from useg.files import replacing

SETTLED = 2_000_000_000  # nanoseconds; the coarsest clock (FAT) ticks every two seconds
UNREADABLE = "unreadable"  # in place of a digest: whoever decodes the file says what is wrong with it

Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Mark:
    """What some pairs' pixels depend on, as a ``key`` of 64 hexadecimal digits, and the stamps of the files when it was made."""

    key: str
    stamps: dict[Path, Stamp]

    def check(self) -> None:
        """Refuse to keep what was made of files that have changed since.

        Raises:
            OSError: they have.
        """
        if _stamps(self.stamps) != self.stamps:
            raise OSError("a picture was changed while the pictures were read")


def mark(folder: Path, dataset: Dataset, pairs: Sequence[Pair], *settings: str) -> Mark:
    """Digest all that decides the pixels of ``pairs``: bytes of their files, classes, the code that decodes, and ``settings``.

    Where the files lie and what they are called is no part of it. Digests of files are kept in ``folder``.
    """
    stamps = _stamps(path for pair in pairs for path in _files(pair))
    memo = folder / f"files-{_sha256(str(dataset.root.absolute()))}.json"
    found = digests((path for pair in pairs for path in _files(pair)), memo)
    drawn = (repr(pair.truth) if isinstance(pair.truth, Drawing) else "" for pair in pairs)
    each = (f"{pair.page} {shapes} " + " ".join(found[path] for path in _files(pair)) for pair, shapes in zip(pairs, drawn, strict=True))
    return Mark(_sha256(decoder_version(), *settings, repr(dataset.classes), repr(dataset.recolored), *each), stamps)


def _files(pair: Pair) -> tuple[Path, ...]:
    """The files that decide a pair's pixels; a :class:`Drawing` is in the pair itself."""
    if isinstance(pair.truth, Drawing):
        return (pair.image,)
    return (pair.image, *(pair.truth.masks if isinstance(pair.truth, Instances) else (pair.mask,)))


def _stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    found = {}
    for path in dict.fromkeys(files):
        with suppress(OSError):  # whoever decodes it says what is wrong
            found[path] = stamp(path)
    return found


@cache
def decoder_version() -> str:
    """Return a digest of the code that turns files into samples, so that no number has to be raised by hand when it changes."""
    sources = [Path(__file__).parents[1] / "classes.py", *sorted(Path(__file__).parent.glob("*.py"))]
    versions = [f"{package} {metadata.version(package)}" for package in ("useg", "numpy", "pillow", "tifffile", "imagecodecs")]
    return _sha256(*versions, *(path.read_text("utf-8") for path in sources))


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def digests(paths: Iterable[Path], memo: Path) -> dict[Path, str]:
    """Return each file's SHA-256.

    Args:
        paths: files; one that is named twice is read once.
        memo: the file in which digests are kept; one that cannot be read or written is done without.
    """
    known = _read(memo)
    began = time.time_ns()

    def digest(path: Path) -> tuple[Path, Stamp | None, str]:
        try:
            before = stamp(path)
            if before == known.get(str(path), (None, ""))[0]:
                return path, before, known[str(path)][1]
            with path.open("rb") as file:
                return path, before, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return path, None, UNREADABLE

    found = list(in_parallel(digest, dict.fromkeys(paths)))
    settled = {str(path): (at, value) for path, at, value in found if at is not None and max(at[1:3]) < began - SETTLED}
    if settled.items() - known.items():
        with suppress(OSError, UsageError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            with replacing(memo) as temporary:
                temporary.write_text(json.dumps(settled), "utf-8")
    return {path: value for path, _, value in found}


def stamp(path: Path) -> Stamp:
    """Return what changes when a file is written: size, times of modification and of any change in nanoseconds, number on the disk.

    Raises:
        OSError: there is no such file.
    """
    seen = path.stat()
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


def _read(memo: Path) -> dict[str, tuple[Stamp, str]]:
    try:
        content = json.loads(memo.read_text("utf-8"))
        return {path: ((size, modified, changed, number), value) for path, ((size, modified, changed, number), value) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
