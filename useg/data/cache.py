"""Pairs on disk -> every sample decoded once at the working size, in one memory-mapped file that the next run finds again.

Decoding and reducing a photograph takes longer than a small network needs to learn from it, so it happens once, in parallel. The file is
kept in the user's cache folder under a digest of all that it depends on: the bytes of every image and truth, the settings, and the code that
decodes. Where nothing may be kept it has no name, and vanishes with the run, also when the run is killed.
"""

from __future__ import annotations

import errno
import io
import mmap
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from useg.data import cache_folder
from useg.data.cache_folder import make_cache_key
from useg.data.dataset import Dataset, Pair, read_sample
from useg.images.files import Image, resize_image, resize_label
from useg.machine import in_parallel
from useg.models.geometry import WorkingSize, fit_bands

_ALIGNED = (
    64  # bytes: every sample starts at a multiple of this; the first ones say what the file is
)


@dataclass(frozen=True)
class CachedSample:
    """One sample: ``image`` (h, w, C) and ``label`` (h, w) at the working size, ``native`` (H, W) the label as stored (None unless asked for)."""

    image: Image
    label: NDArray[np.uint8]
    native: NDArray[np.uint8] | None


@dataclass(frozen=True)
class SampleIndex:
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
        lengths = (
            self.areas * (channels * np.dtype(pixels).itemsize + 1)
            + self.sizes[:, 2] * self.sizes[:, 3]
        )
        return np.cumsum(np.append(_ALIGNED, lengths + -lengths % _ALIGNED))


class Samples(Sequence[CachedSample]):
    """Samples in one block of bytes; nothing is read before it is looked at, and memory holds what the system likes to hold.

    Each sample is checked when it is first looked at. A damaged one is decoded again each time, and ``damaged`` is called.

    Raises:
        ValueError: there are more or fewer bytes than the ledger says.
    """

    def __init__(
        self,
        content: Any,
        ledger: SampleIndex,
        pixels: str,
        decode: Callable[[int], CachedSample],
        damaged: Callable[[], None],
    ) -> None:
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
            if (
                zlib.crc32(self._content[self._starts[k] : self._starts[k + 1]])
                != self.ledger.checks[k]
            ):
                self._damaged()
                return self._decode(k)
            self._checked[k] = True
        height, width, *native = (int(side) for side in self.ledger.sizes[k])
        shape = (height, width, self.ledger.moments.shape[2])
        image = np.ndarray(shape, self.pixels, self._content, int(self._starts[k]))
        label = np.ndarray(
            (height, width), np.uint8, self._content, int(self._starts[k]) + image.nbytes
        )
        after = int(self._starts[k]) + image.nbytes + label.nbytes
        return CachedSample(
            image,
            label,
            np.ndarray(tuple(native), np.uint8, self._content, after) if native[0] else None,
        )


def write_samples(
    file: BinaryIO,
    decode: Callable[[int], CachedSample],
    count: int,
    channels: int,
    num_classes: int,
    most: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SampleIndex:
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
        content = b"".join(
            array.tobytes()
            for array in (sample.image, sample.label, sample.native)
            if array is not None
        )
        counts = np.bincount(sample.label.ravel(), minlength=256)[:num_classes]
        return content + bytes(-len(content) % _ALIGNED), sample, counts, _moments(sample.image)

    ledger = SampleIndex(
        np.zeros((count, 4), np.int64),
        np.zeros(count, np.uint32),
        np.zeros((count, num_classes), np.int64),
        np.zeros((count, 2, channels)),
    )
    written = file.write(b"useg samples\n".ljust(_ALIGNED, b"\0"))
    for k, (content, sample, counts, moments) in enumerate(in_parallel(work, range(count))):
        written += file.write(content)
        if most is not None and written > most:
            raise OSError(
                errno.EDQUOT,
                f"this set needs more than the {most / 2**30:.3g} GB that may be kept; USEG_CACHE_GB=50 allows 50",
            )
        ledger.sizes[k] = (
            *sample.label.shape,
            *((0, 0) if sample.native is None else sample.native.shape),
        )
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


def map_file(file: BinaryIO) -> mmap.mmap:
    """Return a file's content without reading it, and without needing the file to stay open."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def build_cache(
    dataset: Dataset,
    pairs: Sequence[Pair],
    working: WorkingSize,
    channels: int,
    pixels: str,
    *,
    native: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    say: Callable[[str], None] = lambda text: None,
) -> Samples:
    """Decode ``pairs`` in parallel, or find them decoded by an earlier run.

    Args:
        dataset: where they come from; knows how its masks store classes.
        pairs: what to decode.
        working: at which size.
        channels: bands that every image must have.
        pixels: number type that every image must have.
        native: keep the labels at their native size as well.
        progress: called with the number of pairs decoded so far.
        say: told when nothing can be kept for the next run.

    Raises:
        DataError: a file that cannot be read, sizes that differ, a value outside the classes, other bands or number types.
    """

    def decode(k: int) -> CachedSample:
        sample = read_sample(pairs[k], dataset)
        image = fit_bands(sample.image, channels, pixels, str(pairs[k].image))
        size = working.of(image.shape[1], image.shape[0])
        return CachedSample(
            resize_image(image, size),
            resize_label(sample.label, size),
            sample.label if native else None,
        )

    def write(file: BinaryIO, most: int | None = None) -> SampleIndex:
        return write_samples(
            file, decode, len(pairs), channels, len(dataset.classes), most, progress
        )

    folder = cache_folder.find_cache_folder()
    if folder is not None:
        try:
            return _kept(
                folder,
                dataset,
                pairs,
                f"{working} {channels} {pixels} {native}",
                pixels,
                decode,
                write,
            )
        except OSError as error:
            say(
                f"the cache {folder} cannot be used ({error.strerror or error}): the decoded pictures go to scratch files, for this run alone"
            )
    try:
        with tempfile.TemporaryFile() as file:
            ledger = write(file)
            return Samples(map_file(file), ledger, pixels, decode, lambda: None)
    except OSError as error:
        say(
            f"scratch files cannot be written in {tempfile.gettempdir()} ({error.strerror or error}): the decoded pictures stay in memory"
        )
        memory = io.BytesIO()
        ledger = write(memory)
        return Samples(memory.getbuffer(), ledger, pixels, decode, lambda: None)


def _kept(
    folder: Path,
    dataset: Dataset,
    pairs: Sequence[Pair],
    settings: str,
    pixels: str,
    decode: Callable[[int], CachedSample],
    write: Callable[[BinaryIO, int], SampleIndex],
) -> Samples:
    """Find the samples in the cache folder, or put them there.

    Raises:
        OSError: they cannot be put there.
    """
    made_of = make_cache_key(folder, dataset, pairs, settings)
    place = cache_folder.find_cached(folder, made_of.key)
    samples = place and _opened(place, pixels, decode)
    if samples:
        return samples
    with cache_folder.create_cached(folder, made_of.key) as place:
        with open(place / "samples.bin", "wb") as file:
            ledger = write(file, cache_folder.read_cache_limit(folder))
        cache_folder.write_arrays(place / "ledger.npz", asdict(ledger))
        made_of.check()
    place = cache_folder.find_cached(folder, made_of.key)
    samples = place and _opened(place, pixels, decode)
    if not samples:
        raise OSError("what was written there cannot be read")
    return samples


def _opened(place: Path, pixels: str, decode: Callable[[int], CachedSample]) -> Samples | None:
    """Open what the cache folder keeps; what is damaged is removed."""
    arrays = cache_folder.read_arrays(place / "ledger.npz")
    try:
        if arrays:
            with open(place / "samples.bin", "rb") as file:
                return Samples(
                    map_file(file),
                    SampleIndex(**arrays),
                    pixels,
                    decode,
                    lambda: cache_folder.remove_cached(place),
                )
    except (OSError, ValueError):
        pass  # gone, empty, or not as long as it should be
    cache_folder.remove_cached(place)
    return None
