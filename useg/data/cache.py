"""Pairs on disk -> every sample decoded once at the working size, in one memory-mapped file that the next run finds again.

Decoding and reducing a photograph takes longer than a small network needs to learn from it, so it happens once, in parallel. The file is
kept in the user's cache folder under a digest of all that it depends on: the bytes of every image and truth, the settings, and the code that
decodes. Where nothing may be kept it has no name, and vanishes with the run, also when the run is killed.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from useg.data import store
from useg.data.dataset import Dataset, Pair, read_sample
from useg.data.fingerprints import mark
from useg.data.images import Image, resize_image, resize_label
from useg.data.samples import CachedSample, Ledger, Samples, mapped, write_samples
from useg.errors import UsageError


@dataclass(frozen=True)
class WorkingSize:
    """At what size a model looks at a picture.

    Args:
        frame: (width, height) to which every whole picture is brought, its proportions kept (a camera: the frame is the scene), or None.
        scale: factor applied to every picture when ``frame`` is None (microscopes, satellites: a pixel has a size in the world).
    """

    frame: tuple[int, int] | None = None
    scale: float = 1.0

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) at which a picture of ``width`` x ``height`` is looked at."""
        scale = self.scale if self.frame is None else (self.frame[0] * self.frame[1] / (width * height)) ** 0.5
        return max(1, round(width * scale)), max(1, round(height * scale))


def fit_bands(image: Image, channels: int, pixels: str, source: str) -> Image:
    """Give ``image`` (H, W, C) the bands that a model takes; grey becomes RGB by repeating, nothing else is guessed.

    Float pictures have holes and overflows, and one of them would spread through a whole network: NaN becomes the mean of its band in
    this picture, an infinite pixel the band's largest or smallest finite one (0 where the band has none).

    Raises:
        UsageError: another number of bands, or another number type than ``pixels`` (``"uint8"``, ``"uint16"``, ``"float32"``).
    """
    if image.dtype != np.dtype(pixels):
        raise UsageError(f"{source} holds {image.dtype} pixels, but the others (or the model) have {pixels}; convert it to {pixels} first")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        image = np.stack([_finite(image[..., c]) for c in range(image.shape[2])], axis=-1)
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] != channels:
        raise UsageError(f"{source} has {image.shape[2]} bands, but {channels} are needed; give pictures with {channels}")
    return image


def _finite(band: NDArray[np.float32]) -> NDArray[np.float32]:
    known = band[np.isfinite(band)]
    known = known if known.size else np.zeros(1, np.float32)
    return np.nan_to_num(band, nan=float(known.mean(dtype=np.float64)), posinf=float(known.max()), neginf=float(known.min()))


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
        UsageError: a file that cannot be read, sizes that differ, a value outside the classes, other bands or number types.
    """

    def decode(k: int) -> CachedSample:
        sample = read_sample(pairs[k], dataset)
        image = fit_bands(sample.image, channels, pixels, str(pairs[k].image))
        size = working.of(image.shape[1], image.shape[0])
        return CachedSample(resize_image(image, size), resize_label(sample.label, size), sample.label if native else None)

    def write(file: BinaryIO, most: int | None = None) -> Ledger:
        return write_samples(file, decode, len(pairs), channels, len(dataset.classes), most, progress)

    folder = store.cache_folder()
    if folder is not None:
        try:
            return _kept(folder, dataset, pairs, f"{working} {channels} {pixels} {native}", pixels, decode, write)
        except OSError as error:
            say(f"the cache {folder} cannot be used ({error.strerror or error}): the decoded pictures go to scratch files, for this run alone")
    try:
        with tempfile.TemporaryFile() as file:
            ledger = write(file)
            return Samples(mapped(file), ledger, pixels, decode, lambda: None)
    except OSError as error:
        say(f"scratch files cannot be written in {tempfile.gettempdir()} ({error.strerror or error}): the decoded pictures stay in memory")
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
    write: Callable[[BinaryIO, int], Ledger],
) -> Samples:
    """Find the samples in the cache folder, or put them there.

    Raises:
        OSError: they cannot be put there.
    """
    made_of = mark(folder, dataset, pairs, settings)
    place = store.find(folder, made_of.key)
    samples = place and _opened(place, pixels, decode)
    if samples:
        return samples
    with store.making(folder, made_of.key) as place:
        with open(place / "samples.bin", "wb") as file:
            ledger = write(file, store.most_bytes(folder))
        store.write_arrays(place / "ledger.npz", asdict(ledger))
        made_of.check()
    place = store.find(folder, made_of.key)
    samples = place and _opened(place, pixels, decode)
    if not samples:
        raise OSError("what was written there cannot be read")
    return samples


def _opened(place: Path, pixels: str, decode: Callable[[int], CachedSample]) -> Samples | None:
    """Open what the cache folder keeps; what is damaged is removed."""
    arrays = store.read_arrays(place / "ledger.npz")
    try:
        if arrays:
            with open(place / "samples.bin", "rb") as file:
                return Samples(mapped(file), Ledger(**arrays), pixels, decode, lambda: store.remove(place))
    except (OSError, ValueError):
        pass  # gone, empty, or not as long as it should be
    store.remove(place)
    return None
