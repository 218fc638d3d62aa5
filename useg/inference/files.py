"""Sources (files, folders, globs) -> what is wanted of each picture, on disk, whole or not at all; a job that was stopped goes on.

Each thread takes a picture through all of its stages, with a core for itself: decode, compute and encode overlap, no stage waits for another,
and only the pictures in work are in memory. There are two threads more than cores, for every file is flushed to the disk, which takes a few
milliseconds of waiting.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from useg.errors import UsageError
from useg.files import clear_leftovers
from useg.images.decode import IMAGE_SUFFIXES
from useg.images.files import Image, natural_key, read_image
from useg.images.limits import clear_errors
from useg.images.ome_zarr import is_zarr, size_and_time
from useg.images.tiff import read_place
from useg.inference.outputs import (
    OutputOptions,
    is_done,
    label_image,
    label_path,
    make_folders,
    write_outputs,
    write_summaries,
)
from useg.inference.predictor import Predictor
from useg.inference.scans import is_scan, predict_scan, scan_path
from useg.machine import CountProgress, in_parallel
from useg.models.segmenter import MODEL_NAME

MAX_CONCURRENT_PIXELS = 400_000  # a picture that is looked at in more of them,


MAX_CONCURRENT_LOGITS = (
    50_000_000  # or that is enlarged to more of these (200 MB), is computed alone, on all cores
)


@dataclass(frozen=True)
class Failure:
    """A picture that could not be labelled, and why, in one sentence."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What has become of many pictures.

    Args:
        label_maps: all that are there now, in the order of their pictures.
        kept: how many of them were there before.
        failed: pictures that have none.
    """

    label_maps: list[Path]
    kept: int
    failed: list[Failure]


def find_images(sources: Sequence[str]) -> list[Path]:
    """Turn files, folders and globs into images, in natural order; hidden files of a folder are left out. An OME-Zarr, a folder, is one image.

    Raises:
        UsageError: a source that is nothing, or two images of one stem, whose label maps would overwrite each other.
    """
    paths: list[Path] = []
    for source in sources:
        if os.path.isdir(source) and not is_zarr(Path(source)):
            with os.scandir(source) as entries:
                found = [Path(entry) for entry in entries if _is_picture(entry)]
        else:
            items = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
            found = [Path(item) for item in items if os.path.isfile(item) or is_zarr(Path(item))]
        if not found:
            raise UsageError(
                f"there is no image at {source}; give image files, a folder of them, or a quoted glob such as 'frames/*.png'"
            )
        paths += found
    paths = sorted(dict.fromkeys(paths), key=natural_key)
    twice = [stem for stem, count in Counter(path.stem for path in paths).items() if count > 1]
    if twice:
        both = [str(path) for path in paths if path.stem == twice[0]]
        raise UsageError(
            f"{' and '.join(both[:2])} would both become {twice[0]}.png; predict them into different folders"
        )
    return paths


def _is_picture(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    return (
        is_zarr(Path(entry))
        if entry.is_dir()
        else os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file()
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``"2/3"``, the second of three parts.

    Raises:
        UsageError: it is nothing of the kind.
    """
    given = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    shard = (int(given[1]), int(given[2])) if given else (0, 0)
    if not 1 <= shard[0] <= shard[1]:
        raise UsageError(
            f"{text!r} is no part of a job; give i/n with i from 1 to n, such as 2/3 for the second of three"
        )
    return shard


def predict_files(
    predictor: Predictor,
    sources: Sequence[str],
    out: Path,
    *,
    wanted: OutputOptions = OutputOptions(),  # noqa: B008 - frozen
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Label images on disk, on all cores.

    A label map says inside what it was made from: the model's file, what was wanted, and the picture's name, size and time of change. One
    that says the same is kept, so that a job that was killed goes on, and any number of machines can share the work.

    Args:
        predictor: the model.
        sources: image files, folders, globs.
        out: the folder to write into; made when missing.
        wanted: what to write of each image, and of all together.
        shard: (i, n): every n-th picture only, from the i-th on.
        overwrite: keep nothing. A model that has no file is never known again, and nothing of it is kept either.
        progress: called with (images done, images in all).

    Returns:
        What has become of the pictures; those that cannot be read stop nothing.

    Raises:
        UsageError: no images, none that could be labelled, or a folder that cannot be written.
    """
    everything = find_images(sources)
    make_folders(out, wanted)
    job = Job(
        predictor,
        out,
        wanted,
        overwrite,
        job_fingerprint(predictor, wanted),
        torch.get_num_threads(),
    )
    pairs = [(path, label_map_path(path, out, wanted)) for path in everything]
    _check_apart(pairs, out)
    own = pairs[shard[0] - 1 :: shard[1]]
    stems = {path.stem for path, _ in own} | {"coco", "areas"}
    clear_leftovers(out, stems)
    for folder in [child for child in out.iterdir() if child.is_dir()]:
        clear_leftovers(folder, stems)
    outcomes: list[bool | Failure] = []
    with _torch_threads(1):
        for outcome in in_parallel(lambda pair: job.label(*pair), own, job.threads + 2):
            outcomes.append(outcome)
            progress(len(outcomes), len(own))
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failed and len(failed) == len(own):
        raise UsageError(
            failed[0].reason
            if len(failed) == 1
            else f"none of {len(failed)} pictures could be labelled; the first: {failed[0].reason}"
        )
    if wanted.coco or wanted.areas:
        write_summaries(out, pairs, predictor.classes, wanted, done=job.is_done)
    label_maps = [
        target
        for (_, target), outcome in zip(own, outcomes, strict=True)
        if not isinstance(outcome, Failure)
    ]
    return Outcome(label_maps, outcomes.count(True), failed)


def _check_apart(pairs: Sequence[tuple[Path, Path]], out: Path) -> None:
    """Refuse to overwrite a picture with its label map."""
    there = set(os.listdir(out))
    for path, target in pairs:
        if target.name in there and target.exists() and target.samefile(path):
            raise UsageError(
                f"the label map of {path} would overwrite the image itself; choose another folder with --out"
            )


@dataclass(frozen=True)
class Job:
    """What is the same for all pictures of a job.

    Args:
        predictor: the model.
        out: the folder to write into.
        wanted: what to write.
        overwrite: keep nothing that is there.
        recipe: what label maps are made from, but for the picture; empty: it will not be known again.
        threads: of all cores together.
        alone: held while a large picture is computed.
    """

    predictor: Predictor
    out: Path
    wanted: OutputOptions
    overwrite: bool
    recipe: str
    threads: int
    alone: threading.Lock = field(default_factory=threading.Lock)

    def label(self, path: Path, target: Path) -> bool | Failure:
        """Label one picture, into ``target``; say whether its label map was there before, or what is wrong."""
        try:
            with clear_errors(str(path)):
                mark = image_fingerprint(self.recipe, path)
            if not self.overwrite and is_done(target, mark):
                return True
            if is_scan(path):
                return self._label_scan(path, target, mark)
            image, place = read_image(path), read_place(path)
        except UsageError as error:
            return Failure(path, str(error))
        try:
            with self._room(image):
                prediction, probabilities = label_image(self.predictor, image, self.wanted)
        except UsageError as error:
            return Failure(path, f"'{path}': {error}")
        write_outputs(
            self.out,
            path.stem,
            image,
            prediction,
            probabilities,
            self.predictor.classes,
            self.wanted,
            place=place,
            mark=mark,
        )
        return False

    def _label_scan(self, path: Path, target: Path, mark: str) -> bool | Failure:
        """Label an OME-Zarr or a picture larger than memory, in blocks, alone."""
        if not self.wanted.only_labels:
            return Failure(
                path,
                f"'{path}' is labelled in blocks, which gives a label map alone; leave other outputs out",
            )
        with self.alone, _torch_threads(self.threads):
            predict_scan(self.predictor, path, target, mark=mark)
        return False

    def is_done(self, path: Path, target: Path) -> bool:
        """Say whether a picture's label map is there, whichever process made it."""
        return (
            is_done(target, image_fingerprint(self.recipe, path))
            if self.recipe and path.exists()
            else target.exists()
        )

    @contextmanager
    def _room(self, image: Image) -> Iterator[None]:
        """Let a small picture be computed beside others, a large one alone with all threads: so memory is bounded, and all cores are busy."""
        height, width = image.shape[:2]
        working = max(
            math.prod(runtime.description.working.of(width, height))
            for runtime in self.predictor.runtimes
        )
        logits = (
            height
            * width
            * len(self.predictor.classes)
            * (3 if self.wanted.needs_probabilities else 1)
        )
        if working <= MAX_CONCURRENT_PIXELS and logits <= MAX_CONCURRENT_LOGITS:
            yield
        else:
            with self.alone, _torch_threads(self.threads):
                yield


def label_map_path(path: Path, out: Path, wanted: OutputOptions) -> Path:
    """Return where the label map of a picture goes; that of one larger than memory is a TIFF in any case, that of an OME-Zarr an OME-Zarr."""
    return scan_path(out, path) if is_scan(path) else label_path(out, path.stem, wanted)


def job_fingerprint(predictor: Predictor, wanted: OutputOptions) -> str:
    """Return what decides a label map besides the picture, as a text; empty for a model that was made in memory."""
    digests = []
    for runtime in predictor.runtimes:
        path = (
            runtime.source / MODEL_NAME if runtime.source.is_dir() else runtime.source
        )  # an .xml holds a digest of the .bin beside it
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            digests.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {runtime.name}")
    return f"{' '.join(digests)} {predictor.augment} {wanted.of_each}"


def image_fingerprint(recipe: str, path: Path) -> str:
    """Return the mark of a label map: the same for the same recipe and the same picture, as far as its name, size and time of change tell."""
    if not recipe:
        return ""
    size, changed = size_and_time(path)
    return hashlib.sha256(
        f"{recipe} {size} {changed} ".encode() + os.fsencode(path.name)
    ).hexdigest()


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let torch (and OpenVINO) compute with so many threads, in this thread and in those that it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def predict(
    model: str | Path | Predictor,
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    wanted: OutputOptions = OutputOptions(),  # noqa: B008 - frozen
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    runtime: str | None = None,
    augment: str = "none",
    progress: CountProgress = lambda done, total: None,
) -> Outcome:
    """Label image files: ``out/STEM.png`` (palette PNG of class ids), ``out/overlays/STEM.png``, and more when it is wanted.

    The same call again goes on where it was stopped: what the same model made of the same picture is kept.

    Args:
        model: a run folder, a model file, or a loaded predictor.
        sources: image files, folders, globs.
        out: where to write.
        wanted: what to write of each image, and of all together: ``Wanted(overlays=False)`` label maps alone.
        shard: (i, n): the i-th of n parts of the pictures, for n processes or machines that share the work.
        overwrite: keep nothing that is there.
        runtime: what computes the model, as for :func:`load`.
        augment: the ways to look at each image, as for :func:`load`.
        progress: called with (images done, images in all).

    Returns:
        The label maps, how many of them were there before, and the images that could not be labelled, with the reason.

    Raises:
        UsageError: no model, no images, none that could be labelled, or a folder that cannot be written.
    """
    names = (
        [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]
    )
    if not isinstance(model, Predictor):
        model = Predictor.load(
            model, runtime, len(find_images(names)) if runtime == "auto" else 1, augment
        )
    return predict_files(
        model, names, Path(out), wanted=wanted, shard=shard, overwrite=overwrite, progress=progress
    )
