"""Images and masks -> samples that are decoded once, at the working size, into one mapped file.

Decoding and resizing a photograph takes longer than training a small network on it, so it happens
once, in parallel. The file is kept in the user's cache folder under a digest of everything that it
depends on (see :mod:`useg.data.cache_folder`), so the next run finds it. Without a cache folder the
file has no name and disappears with the process, even if that is killed.

The bytes of all samples follow each other in one block, and a table holds their sizes, checksums
and statistics. So any number of samples needs few open files and little memory.
"""

from __future__ import annotations

import errno
import io
import mmap
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from useg.classes import Label, count_pixels
from useg.data import cache_folder
from useg.data.cache_folder import CacheKey, make_cache_key
from useg.data.dataset import Dataset, Pair, object_classes, read_objects, read_sample
from useg.files import find_cache_folder
from useg.images.image_files import Image, resize_label
from useg.machine import in_parallel
from useg.models.geometry import WorkingSize, fit_bands
from useg.objects.separation import measure_depth

# Every sample starts at a multiple of this many bytes; the first ones hold the file's header.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class CachedSample:
    """One sample: image ``(h, w, C)`` and label ``(h, w)`` at the working size.

    ``native`` is the label ``(H, W)`` at its own size; None unless it was asked for. ``missing``
    says where the image has no data ``(h, w)``; it is not kept. If objects are separated,
    ``label`` is uint16 and holds their depths, too (:func:`pack_target`).
    """

    image: Image
    label: NDArray[np.uint8] | NDArray[np.uint16]
    native: NDArray[np.uint8] | None
    missing: NDArray[np.bool_] | None = None


def pack_target(label: Label, depth: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Join a label and the depths to one map, which is cut and flipped as one."""
    return label.astype(np.uint16) | depth.astype(np.uint16) << np.uint16(8)


def label_of(packed: NDArray[Any]) -> Label:
    """Return the label of a map that :func:`pack_target` made, or of a plain label map."""
    return (packed & 0xFF).astype(np.uint8) if packed.dtype != np.uint8 else packed


@dataclass(frozen=True)
class SampleTable:
    """Where N samples lie in their block of bytes, their checksums and their statistics.

    Args:
        sizes: ``(N, 4)`` height and width of the sample and of its native label (0 if it has none).
        checks: ``(N,)`` CRC-32 of the sample's bytes.
        counts: ``(N, K)`` pixels of each class in the label.
        moments: ``(N, 2, C)`` sums of the pixels with data and of their squares, exact for 8 bits.
        counted: ``(N,)`` pixels with data.
    """

    sizes: NDArray[np.int64]
    checks: NDArray[np.uint32]
    counts: NDArray[np.int64]
    moments: NDArray[np.float64]
    counted: NDArray[np.int64]

    @property
    def areas(self) -> NDArray[np.int64]:
        """The number of pixels of each sample, ``(N,)``."""
        return self.sizes[:, 0] * self.sizes[:, 1]

    def starts(self, channels: int, pixels: str, labels: str) -> NDArray[np.int64]:
        """Return the offset of each sample, and the end of the last one, ``(N + 1,)``."""
        lengths = (
            self.areas * (channels * np.dtype(pixels).itemsize + np.dtype(labels).itemsize)
            + self.sizes[:, 2] * self.sizes[:, 3]
        )
        return np.cumsum(np.append(_ALIGNMENT_BYTES, lengths + -lengths % _ALIGNMENT_BYTES))


class Samples(Sequence[CachedSample]):
    """Samples in one block of bytes, usually a mapped file.

    A sample is read when it is first used, and its checksum is compared. A damaged sample is
    decoded again each time.

    Args:
        content: The block of bytes.
        table: The samples' places and checksums.
        pixels: Number type of the images.
        decode: Decodes sample k from its files.
        labels: Number type of the labels.
        on_damage: Called when a sample is damaged.

    Raises:
        ValueError: The block has more or fewer bytes than the table says.
    """

    def __init__(
        self,
        content: Any,
        table: SampleTable,
        pixels: str,
        decode: Callable[[int], CachedSample],
        labels: str = "uint8",
        on_damage: Callable[[], None] = lambda: None,
    ) -> None:
        self.table = table
        self.pixels, self.labels = pixels, labels
        self._content = memoryview(content)
        self._starts = table.starts(table.moments.shape[2], pixels, labels)
        self._decode = decode
        self._on_damage = on_damage
        self._checked = np.zeros(len(table.sizes), bool)
        if len(content) != self._starts[-1]:
            raise ValueError(f"it has {len(content)} bytes instead of {self._starts[-1]}")

    def __len__(self) -> int:
        return len(self.table.sizes)

    @overload
    def __getitem__(self, which: int) -> CachedSample: ...
    @overload
    def __getitem__(self, which: slice) -> list[CachedSample]: ...
    def __getitem__(self, which: int | slice) -> CachedSample | list[CachedSample]:
        if isinstance(which, slice):
            return [self[k] for k in range(len(self))[which]]
        k = range(len(self))[which]
        if not self._checked[k]:
            content = self._content[self._starts[k] : self._starts[k + 1]]
            if zlib.crc32(content) != self.table.checks[k]:
                self._on_damage()
                return self._decode(k)
            self._checked[k] = True
        height, width, *native = (int(side) for side in self.table.sizes[k])
        shape = (height, width, self.table.moments.shape[2])
        image = np.ndarray(shape, self.pixels, self._content, int(self._starts[k]))
        offset = int(self._starts[k]) + image.nbytes
        label: NDArray[Any] = np.ndarray((height, width), self.labels, self._content, offset)
        if not native[0]:
            return CachedSample(image, label, None)
        offset += label.nbytes
        return CachedSample(
            image, label, np.ndarray(tuple(native), np.uint8, self._content, offset)
        )


def write_samples(
    file: BinaryIO,
    decode: Callable[[int], CachedSample],
    count: int,
    channels: int,
    num_classes: int,
    max_bytes: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> SampleTable:
    """Decode samples in parallel and write them one after the other.

    Args:
        file: The file to write to.
        decode: Decodes sample k.
        count: The number of samples.
        channels: Channels C of each image.
        num_classes: The number of classes K.
        max_bytes: The number of bytes that may be written, or None.
        progress: Called with the number of samples written so far.

    Raises:
        OSError: The disk is full, or there are more than ``max_bytes`` bytes.
    """

    def work(k: int) -> tuple[bytes, CachedSample, NDArray[np.int64], NDArray[np.float64]]:
        sample = decode(k)
        arrays = (sample.image, sample.label, sample.native)
        content = b"".join(array.tobytes() for array in arrays if array is not None)
        counts = count_pixels(label_of(sample.label), num_classes)
        return (
            content + bytes(-len(content) % _ALIGNMENT_BYTES),
            sample,
            counts,
            _moments(sample),
        )

    table = SampleTable(
        np.zeros((count, 4), np.int64),
        np.zeros(count, np.uint32),
        np.zeros((count, num_classes), np.int64),
        np.zeros((count, 2, channels)),
        np.zeros(count, np.int64),
    )
    written = file.write(b"useg samples\n".ljust(_ALIGNMENT_BYTES, b"\0"))
    for k, (content, sample, counts, moments) in enumerate(in_parallel(work, range(count))):
        written += file.write(content)
        if max_bytes is not None and written > max_bytes:
            raise OSError(
                errno.EDQUOT,
                f"the data set needs more than the {max_bytes / 2**30:.3g} GB that the cache may "
                "have; USEG_CACHE_GB=50 allows 50",
            )
        native_size = (0, 0) if sample.native is None else sample.native.shape
        table.sizes[k] = (*sample.label.shape, *native_size)
        table.checks[k], table.counts[k], table.moments[k] = zlib.crc32(content), counts, moments
        missing = 0 if sample.missing is None else sample.missing.sum()
        table.counted[k] = sample.label.size - missing
        progress(k + 1)
    file.flush()
    return table


def _moments(sample: CachedSample) -> NDArray[np.float64]:
    """Return the sums of an image's pixels with data and of their squares, ``(2, C)``.

    It works in parts, since float64 takes eight times the memory of the image.
    """
    image = sample.image
    pixels = image.reshape(-1, image.shape[2]) if sample.missing is None else image[~sample.missing]
    sums = np.zeros((2, image.shape[2]))
    for part in np.array_split(pixels, len(pixels) // 1_000_000 + 1):
        values = part.astype(np.float64)
        sums += values.sum(0), np.einsum("nc,nc->c", values, values)
    return sums


def map_file(file: BinaryIO) -> mmap.mmap:
    """Map a file into memory; the file need not stay open."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def build_cache(
    dataset: Dataset,
    pairs: Sequence[Pair],
    working: WorkingSize,
    channels: int,
    pixels: str,
    *,
    native: bool = False,
    objects: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Samples:
    """Decode ``pairs`` in parallel, or find them decoded by an earlier run.

    Args:
        dataset: The data set; it knows how its masks store classes.
        pairs: The pairs to decode.
        working: The size to decode them at.
        channels: Channels that every image must have.
        pixels: Number type that every image must have.
        native: Whether to keep the labels at their own size as well.
        objects: Whether the labels hold the depths of objects as well.
        progress: Called with the number of pairs decoded so far.
        warn: Called with a sentence if the samples cannot be kept for the next run.

    Raises:
        DataError: A file cannot be read, image and mask differ in size, a mask has a value outside
            the classes, or an image has other channels or another number type.
    """

    def decode(k: int) -> CachedSample:
        sample = read_sample(pairs[k], dataset)
        image = working.prepare(fit_bands(sample.image, channels, pixels, str(pairs[k].image)))
        size, missing = (image.shape[1], image.shape[0]), sample.missing
        label: NDArray[Any] = resize_label(sample.label, size)
        if objects:
            # The numbers are reduced, and not the depths: so the valleys between objects stay.
            numbers = resize_label(read_objects(pairs[k], dataset), size)
            label = pack_target(label, measure_depth(numbers))
        return CachedSample(
            image,
            label,
            sample.label if native else None,
            None if missing is None else resize_label(missing.astype(np.uint8), size) > 0,
        )

    def write(file: BinaryIO, max_bytes: int | None = None) -> SampleTable:
        num_classes = len(dataset.classes)
        return write_samples(file, decode, len(pairs), channels, num_classes, max_bytes, progress)

    open_samples = partial(
        Samples, pixels=pixels, decode=decode, labels="uint16" if objects else "uint8"
    )
    folder = find_cache_folder()
    if folder is not None:
        try:
            form = f"{working} {channels} {pixels} {native} counted"
            form += f" objects {object_classes(dataset)}" if objects else ""
            key = make_cache_key(folder, dataset, pairs, form)
            return _find_or_create(folder, key, open_samples, write)
        except OSError as error:
            warn(
                f"the cache {folder} cannot be used ({error.strerror or error}); "
                "the decoded images go to a temporary file, for this run only"
            )
    return _create_uncached(open_samples, write, warn)


def _create_uncached(
    open_samples: Callable[..., Samples],
    write: Callable[[BinaryIO], SampleTable],
    warn: Callable[[str], None],
) -> Samples:
    """Decode samples for this run only: into a temporary file, or else into memory."""
    try:
        with tempfile.TemporaryFile() as file:
            table = write(file)
            return open_samples(map_file(file), table)
    except OSError as error:
        warn(
            f"no temporary file can be written in {tempfile.gettempdir()} "
            f"({error.strerror or error}); the decoded images stay in memory"
        )
        memory = io.BytesIO()
        table = write(memory)
        return open_samples(memory.getbuffer(), table)


def _find_or_create(
    folder: Path,
    key: CacheKey,
    open_samples: Callable[..., Samples],
    write: Callable[[BinaryIO, int], SampleTable],
) -> Samples:
    """Find the samples in the cache folder, or write them there.

    Raises:
        OSError: They cannot be written there.
    """
    if samples := _open_entry(folder, key.key, open_samples):
        return samples
    with cache_folder.create_cached(folder, key.key) as entry:
        with open(entry / "samples.bin", "wb") as file:
            table = write(file, cache_folder.read_cache_limit(folder))
        cache_folder.write_arrays(entry / "ledger.npz", asdict(table))
        key.check()
    if samples := _open_entry(folder, key.key, open_samples):
        return samples
    raise OSError("what was written there cannot be read")


def _open_entry(folder: Path, key: str, open_samples: Callable[..., Samples]) -> Samples | None:
    """Open an entry of the cache folder, if it is there; a damaged one is removed."""
    entry = cache_folder.find_cached(folder, key)
    if entry is None:
        return None
    arrays = cache_folder.read_arrays(entry / "ledger.npz")
    # The file may be gone, empty, or shorter than the table says.
    with suppress(OSError, ValueError):
        if arrays:
            table = SampleTable(**arrays)
            with open(entry / "samples.bin", "rb") as file:
                content = map_file(file)
            return open_samples(content, table, on_damage=lambda: cache_folder.remove_cached(entry))
    cache_folder.remove_cached(entry)
    return None
