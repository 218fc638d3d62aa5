"""Many samples <-> one block of bytes with a ledger: a few open files and little memory, however many there are."""

from __future__ import annotations

import errno
import mmap
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from useg.data.images import Image
from useg.data.parallel import in_parallel

_ALIGNED = 64  # bytes: every sample starts at a multiple of this; the first ones say what the file is


@dataclass(frozen=True)
class CachedSample:
    """One sample: ``image`` (h, w, C) and ``label`` (h, w) at the working size, ``native`` (H, W) the label as stored (None unless asked for)."""

    image: Image
    label: NDArray[np.uint8]
    native: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Ledger:
    """What is known of N samples without looking at them.

    Args:
        sizes: ``(N, 4)`` height and width of the sample and of its native label (0 where there is none).
        checks: ``(N,)`` CRC-32 of each one's bytes.
        counts: ``(N, K)`` pixels of each class in its label.
        moments: ``(N, 2, C)`` sums of its pixels and of their squares, exact for 8 bits.
    """

    sizes: NDArray[np.int64]
    checks: NDArray[np.uint32]
    counts: NDArray[np.int64]
    moments: NDArray[np.float64]

    @property
    def areas(self) -> NDArray[np.int64]:
        """Pixels of each sample, ``(N,)``."""
        return self.sizes[:, 0] * self.sizes[:, 1]

    def starts(self, channels: int, pixels: str) -> NDArray[np.int64]:
        """Return where each sample's bytes start, and where the last one's end: ``(N + 1,)``."""
        lengths = self.areas * (channels * np.dtype(pixels).itemsize + 1) + self.sizes[:, 2] * self.sizes[:, 3]
        return np.cumsum(np.append(_ALIGNED, lengths + -lengths % _ALIGNED))


class Samples(Sequence[CachedSample]):
    """Samples in one block of bytes; nothing is read before it is looked at, and memory holds what the system likes to hold.

    Each sample is checked when it is first looked at. A damaged one is decoded again each time, and ``damaged`` is called.

    Raises:
        ValueError: there are more or fewer bytes than the ledger says.
    """

    def __init__(self, content: Any, ledger: Ledger, pixels: str, decode: Callable[[int], CachedSample], damaged: Callable[[], None]) -> None:
        self.ledger = ledger
        self.pixels = pixels
        self._content = memoryview(content)
        self._starts = ledger.starts(ledger.moments.shape[2], pixels)
        self._decode = decode
        self._damaged = damaged
        self._checked = np.zeros(len(ledger.sizes), bool)
        if len(content) != self._starts[-1]:
            raise ValueError(f"{len(content)} bytes, not {self._starts[-1]}")

    def __len__(self) -> int:
        return len(self.ledger.sizes)

    @overload
    def __getitem__(self, which: int) -> CachedSample: ...
    @overload
    def __getitem__(self, which: slice) -> list[CachedSample]: ...
    def __getitem__(self, which: int | slice) -> CachedSample | list[CachedSample]:
        if isinstance(which, slice):
            return [self[k] for k in range(len(self))[which]]
        k = range(len(self))[which]
        if not self._checked[k]:
            if zlib.crc32(self._content[self._starts[k] : self._starts[k + 1]]) != self.ledger.checks[k]:
                self._damaged()
                return self._decode(k)
            self._checked[k] = True
        height, width, *native = (int(side) for side in self.ledger.sizes[k])
        shape = (height, width, self.ledger.moments.shape[2])
        image = np.ndarray(shape, self.pixels, self._content, int(self._starts[k]))
        label = np.ndarray((height, width), np.uint8, self._content, int(self._starts[k]) + image.nbytes)
        after = int(self._starts[k]) + image.nbytes + label.nbytes
        return CachedSample(image, label, np.ndarray(tuple(native), np.uint8, self._content, after) if native[0] else None)


def write_samples(
    file: BinaryIO,
    decode: Callable[[int], CachedSample],
    count: int,
    channels: int,
    num_classes: int,
    most: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Ledger:
    """Decode ``count`` samples in parallel and write them one after the other.

    Args:
        file: where to.
        decode: gives sample k.
        count: how many there are.
        channels: C of each image.
        num_classes: K.
        most: bytes that may be written, or None.
        progress: called with the samples written so far.

    Raises:
        OSError: the disk is full, or there are more than ``most`` bytes.
    """

    def work(k: int) -> tuple[bytes, CachedSample, NDArray[np.int64], NDArray[np.float64]]:
        sample = decode(k)
        content = b"".join(array.tobytes() for array in (sample.image, sample.label, sample.native) if array is not None)
        counts = np.bincount(sample.label.ravel(), minlength=256)[:num_classes]
        return content + bytes(-len(content) % _ALIGNED), sample, counts, _moments(sample.image)

    ledger = Ledger(
        np.zeros((count, 4), np.int64), np.zeros(count, np.uint32), np.zeros((count, num_classes), np.int64), np.zeros((count, 2, channels))
    )
    written = file.write(b"useg samples\n".ljust(_ALIGNED, b"\0"))
    for k, (content, sample, counts, moments) in enumerate(in_parallel(work, range(count))):
        written += file.write(content)
        if most is not None and written > most:
            raise OSError(errno.EDQUOT, f"this set needs more than the {most / 2**30:.3g} GB that may be kept; USEG_CACHE_GB=50 allows 50")
        ledger.sizes[k] = (*sample.label.shape, *((0, 0) if sample.native is None else sample.native.shape))
        ledger.checks[k], ledger.counts[k], ledger.moments[k] = zlib.crc32(content), counts, moments
        progress(k + 1)
    file.flush()
    return ledger


def _moments(image: Image) -> NDArray[np.float64]:
    """Return the sums of a picture's pixels and of their squares, ``(2, C)``; a part at a time, for they take eight times its memory."""
    pixels = image.reshape(-1, image.shape[2])
    sums = np.zeros((2, image.shape[2]))
    for part in np.array_split(pixels, len(pixels) // 1_000_000 + 1):
        values = part.astype(np.float64)
        sums += values.sum(0), np.einsum("nc,nc->c", values, values)
    return sums


def mapped(file: BinaryIO) -> mmap.mmap:
    """Return a file's content without reading it, and without needing the file to stay open."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
