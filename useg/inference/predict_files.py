"""Label image files: sources (files, folders, globs) in, label maps and other outputs on disk.

Every file is written whole or not at all. A label map stores a mark of the model, the options and
its image, so the same call after an interruption continues where it stopped.

Each page of a stack is labelled like an image of its own.

Each thread takes one image through all stages: decode, compute, encode. The stages of different
images overlap, and only the images in work are in memory. There are two threads more than cores
because every file is flushed to the disk, which takes a few milliseconds of waiting.
"""

from __future__ import annotations

import glob
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch

from useg.errors import DataError, UsageError, format_count
from useg.files import MAX_NAME_BYTES, clear_drafts, natural_key, refuse_same_names
from useg.images.formats import ALL_PAGES, IMAGE_SUFFIXES, STACK_SUFFIXES, clear_errors
from useg.images.image_files import Image, read_image_and_missing, read_size
from useg.images.stacks import Stack, read_stack
from useg.inference.outputs import (
    OutputOptions,
    find_georeference,
    identify_image,
    is_done,
    label_image,
    label_path,
    list_outputs,
    list_summaries,
    make_folders,
    mark_of_version,
    predictor_fingerprint,
    write_outputs,
)
from useg.inference.predictor import Predictor
from useg.inference.summaries import LabelledImage, write_summaries
from useg.machine import CountProgress, in_parallel
from useg.ownership import Recognizer, is_own_label_map, refuse_foreign_files

# Larger images are computed one at a time, with all cores: those with more pixels at the model's
# working size, or with more logits at their native size (50 million take 200 MB).
MAX_CONCURRENT_PIXELS = 400_000
MAX_CONCURRENT_LOGITS = 50_000_000

NOT_KEPT_APART = (
    "the model cannot separate touching objects: each connected region of a class counts as one "
    "object; to separate them, train on instance masks, or on annotations with a shape per object"
)

# Where the outputs besides label maps go.
OUTPUT_FOLDERS = ("overlays", "probabilities", "confidence", "polygons", "labelme", "objects")

# Only files with other suffixes can be larger than memory.
_IN_MEMORY_SUFFIXES = IMAGE_SUFFIXES - {".tif", ".tiff"}

# Names with these texts may be those of masks.
_MASK_WORD = re.compile("mask|label|seg|gt|anno|truth|lbl|target|matte|trimap|manual")

# A folder with one of these files can be an OME-Zarr image.
_ZARR_FILES = (".zattrs", "zarr.json")


@dataclass(frozen=True)
class Failure:
    """An image that could not be processed.

    Args:
        path: The image file; for an image in an object store, its address as text.
        reason: What is wrong, in one sentence.
    """

    path: Path | str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """Result of labelling many images.

    Args:
        label_maps: Label maps that exist now, in the order of their images. A cluster job, which
            may have millions, does not list them.
        kept: Number of images whose label map existed before.
        failed: Images that have no label map.
        num_images: Number of images, failed ones included.
        seconds: Duration of the whole call.
        left_out: Files of folders that are masks of other images there.
        runtime: Names of the runtimes that computed the models; empty for a cluster job.
        unlike: Images labelled now that are unlike the training images, in order
            (``Predictor.training_distance``); those labelled in blocks are not compared.
        notes: What to know about the outputs, in sentences.
    """

    label_maps: list[Path]
    kept: int
    failed: list[Failure]
    num_images: int
    seconds: float
    left_out: Sequence[Path] = ()
    runtime: str = ""
    unlike: Sequence[Path] = ()
    notes: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float:
        """Throughput, counting only images that had no label map before."""
        return (self.num_images - self.kept) / self.seconds


@dataclass(frozen=True)
class FoundImages:
    """The result of :func:`find_sources`, in natural order (``frame2`` before ``frame10``).

    Args:
        images: The images.
        left_out: Files of folders that are evidently masks of other images there.
    """

    images: list[Path]
    left_out: list[Path]


def find_images(sources: Sequence[str]) -> list[Path]:
    """Return the images of files, folders and globs; see :func:`find_sources`."""
    return find_sources(sources).images


def find_sources(sources: Sequence[str]) -> FoundImages:
    """Find the images of files, folders and globs.

    Hidden files of a folder are skipped, and so are files that are evidently masks of other images
    in the folder: names tell which files could be masks, as they do for training; then a few of
    them are examined. A mask that is itself a source is labelled. An OME-Zarr, which is a folder,
    is one image.

    Raises:
        DataError: A source has no images.
    """
    given = {source: _images_at(source) for source in dict.fromkeys(sources)}
    meant = {path for source in given if not os.path.isdir(source) for path in given[source]}
    masks = {path for source in given for path in _masks_in(source, given[source])} - meant
    paths = sorted({path for found in given.values() for path in found}, key=natural_key)
    images = [path for path in paths if path not in masks]
    return FoundImages(images, [path for path in paths if path in masks])


def _masks_in(source: str, paths: Sequence[Path]) -> list[Path]:
    """Return the masks in a folder; files are examined only if names suggest some masks."""
    files = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    stems = sorted(path.stem.casefold() for path in files)
    has_word = [_MASK_WORD.search(stem) is not None for stem in stems]
    is_longer = (
        other.startswith(one) and not other[len(one) : len(one) + 1].isalnum()
        for one, other in pairwise(stems)
    )
    if not os.path.isdir(source) or not (any(is_longer) or any(has_word) > all(has_word)):
        return []
    from useg.data.pairing import find_masks

    return find_masks(files, Path(source))


def _images_at(source: str) -> list[Path]:
    is_folder = os.path.isdir(source) and not _is_zarr(source)
    if is_folder:
        with os.scandir(source) as entries:
            paths = [Path(entry) for entry in entries if _is_image_entry(entry)]
    else:
        names = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
        paths = [Path(name) for name in names if os.path.isfile(name) or _is_zarr(name)]
    if not paths:
        inner = _find_inner_folder(source) if is_folder else ""
        below = f" itself, only in its subfolders, such as {inner}" if inner else ""
        raise DataError(
            f"there is no image at {source}{below}; "
            f"give image files, a folder of them, or a quoted glob such as 'frames/*.png'"
        )
    return paths


def _find_inner_folder(source: str) -> str:
    """Return a folder of images in a folder, or ``""``."""
    with suppress(OSError), os.scandir(source) as entries:
        for folder in sorted(entry.path for entry in entries if entry.is_dir()):
            with suppress(OSError), os.scandir(folder) as inside:
                if any(_is_image_entry(entry) for entry in inside):
                    return folder
    return ""


def _is_image_entry(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    if entry.is_dir():
        return _is_zarr(entry.path)
    return os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file()


def _is_zarr(path: str) -> bool:
    """Whether a path is an OME-Zarr image; the reader is imported only when it can be one."""
    if not os.path.isdir(path):
        return False
    if not path.lower().rstrip("/").endswith(".zarr") and not any(
        os.path.exists(os.path.join(path, name)) for name in _ZARR_FILES
    ):
        return False
    from useg.images.ome_zarr import is_zarr

    return is_zarr(Path(path))


def is_larger_than_memory(path: Path) -> bool:
    """Whether an image is labelled in blocks: an OME-Zarr or a very large TIFF."""
    if path.suffix.lower() in _IN_MEMORY_SUFFIXES:
        return False
    from useg.inference.large_images import is_large_image

    return is_large_image(path)


def predict(
    model: str | os.PathLike[str] | Predictor,
    sources: str | Path | Sequence[str | Path] | FoundImages,
    out: str | Path,
    *,
    wanted: OutputOptions = OutputOptions(),  # noqa: B008 - frozen
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    runtime: str | None = None,
    augment: str = "none",
    progress: CountProgress = lambda done, total: None,
) -> Outcome:
    """Label image files.

    Writes ``out/STEM.png`` (a palette PNG of class ids) and ``out/overlays/STEM.png`` for every
    image, and other outputs on request. The pages of a stack are images of their own: the first
    becomes ``out/STEM_0000.png``. The same call after an interruption continues where it
    stopped: label maps that the same model made of the same image are kept. A model that was made
    in memory has no file to identify it by, so its label maps are never kept.

    Args:
        model: A run folder, a model file, or a loaded predictor.
        sources: Image files, folders, globs; or what :func:`find_sources` found.
        out: Folder to write into.
        wanted: Outputs to write; ``OutputOptions(overlays=False)`` writes label maps only.
        shard: (i, n): label only the i-th of n parts of the images.
        overwrite: Label every image again.
        runtime: What computes the model, as for :func:`useg.load`.
        augment: Test-time augmentation, as for :func:`useg.load`.
        progress: Called with (images done, images in all).

    Returns:
        The label maps, how many of them existed before, and the images that could not be
        labelled, each with its reason.

    Raises:
        UsageError: There is no model or no image, no image could be labelled, or the folder
            cannot be written.
    """
    if not isinstance(sources, FoundImages):
        given = [sources] if isinstance(sources, str | Path) else sources
        sources = find_sources([str(source) for source in given])
    stacks = {path: find_stack(path) for path in sources.images}
    if isinstance(model, Predictor):
        predictor = model
    else:
        num_images = sum(len(stack.find_images(1)) if stack else 1 for stack in stacks.values())
        predictor = Predictor.load(Path(model), runtime, num_images, augment)
    began, out = time.perf_counter(), Path(out)
    images = plan_outputs(stacks, out, wanted, predictor.num_bands)
    make_folders(out, wanted)
    fingerprint = predictor_fingerprint(predictor, wanted)
    job = Job(predictor, out, wanted, overwrite, fingerprint, torch.get_num_threads())
    own = images[shard[0] - 1 :: shard[1]]
    results = _label_all(job, own, progress)
    failed = [result for result in results if isinstance(result, Failure)]
    if failed:
        refuse_only_failures(failed, len(own), "labelled")
    if list_summaries(out, wanted) or wanted.tool:
        write_summaries(out, images, predictor.classes, wanted, done=job.is_done)
    pairs = zip(own, results, strict=True)
    label_maps = [image.label for image, result in pairs if not isinstance(result, Failure)]
    notes = [NOT_KEPT_APART] if wanted.objects and not predictor.has_objects else []
    if any(image.page is not None for image in images):
        notes += _describe_pages(images)
    computed_by = ", ".join(dict.fromkeys(runtime.name for runtime in predictor.runtimes))
    return Outcome(
        label_maps,
        results.count(True),
        failed,
        len(own),
        time.perf_counter() - began,
        sources.left_out,
        computed_by,
        [image.image.with_name(image.name) for image in own if image in job.unlike],
        tuple(notes),
    )


def _label_all(
    job: Job, images: Sequence[LabelledImage], progress: CountProgress
) -> list[bool | Failure]:
    """Label images on all cores; each result is that of :meth:`Job.label`."""
    out = job.out
    for folder in (out, *(child for child in out.iterdir() if child.name in OUTPUT_FOLDERS)):
        clear_drafts(folder)
    results: list[bool | Failure] = []
    with _torch_threads(1):
        for result in in_parallel(job.label, images, job.threads + 2):
            results.append(result)
            progress(len(results), len(images))
    return results


def find_stack(path: Path) -> Stack | None:
    """Return which images a file holds; None for a file of one image, which may be damaged."""
    with suppress(UsageError):
        if path.suffix.lower() in STACK_SUFFIXES and not is_larger_than_memory(path):
            return read_stack(path)
    return None


def plan_outputs(
    stacks: Mapping[Path, Stack | None], out: Path, wanted: OutputOptions, num_bands: int = 1
) -> list[LabelledImage]:
    """List the images of files (:func:`find_stack`), and their label maps, for a model's bands.

    Raises:
        DataError: Two images would have one label map, or the job would replace its own images or
            files that useg did not write.
    """
    images: list[LabelledImage] = []
    for path, stack in stacks.items():
        target = label_map_path(path, out, wanted)
        whole = LabelledImage(len(images) + 1, path, target, path.name)
        images += _list_pages(whole, stack.find_images(num_bands)) if stack else [whole]
    stems: dict[str, Path] = {}
    for image in images:
        if (other := stems.setdefault(image.label.stem, image.image)) != image.image:
            raise DataError(
                f"{other} and {image.image} would both become {image.label.name}; "
                f"predict them into different folders"
            )
    refuse_same_names(image.label for image in images)
    if out.is_dir():
        _refuse_overwriting_images(images, out)
        folders = out, *map(out.joinpath, OUTPUT_FOLDERS)
        existing = {folder: set(os.listdir(folder)) for folder in folders if folder.is_dir()}
        outputs = (output for image in images for output in _list_outputs(image, out, wanted))
        refuse_foreign_files(
            (path, is_own)
            for path, is_own in (*list_summaries(out, wanted), *outputs)
            if path.name in existing.get(path.parent, ())
        )
    return images


def _list_pages(whole: LabelledImage, pages: Sequence[int | None]) -> list[LabelledImage]:
    """List the pages of a file as images of their own, or the file if it is one image."""
    path, target = whole.image, whole.label
    if pages[0] in (None, ALL_PAGES):
        return [replace(whole, page=pages[0])]
    images = []
    for page in range(len(pages)):
        stem = f"{target.stem}_{page:04d}"
        label = target.with_name(stem + target.suffix)
        images.append(LabelledImage(whole.number + page, path, label, stem + path.suffix, page))
    return images


def _describe_pages(images: Sequence[LabelledImage]) -> list[str]:
    """Say how stacks were read, as images or as bands."""
    bands = [image.image for image in images if image.page == ALL_PAGES]
    pages = [image for image in images if image.page not in (None, ALL_PAGES)]
    stacks = Counter(image.image for image in pages)
    notes = []
    if stacks:
        path, count = next(iter(stacks.items()))
        width, height = read_size(path, 0)
        size = f"{count} pages of {width}x{height} pixels"
        are = f"'{path}' is a stack of {size}"
        if len(stacks) > 1:
            are = f"{len(stacks)} files are stacks, such as '{path}' of {size}"
        notes.append(
            f"{are}; each page has a label map of its own, {pages[0].label.name} to "
            f"{pages[count - 1].label.name}"
        )
    if bands:
        others = f"{format_count(len(bands), 'file')}, such as " if len(bands) > 1 else ""
        notes.append(
            f"the pages of {others}'{bands[0]}' are the bands of one image, because the model "
            "takes that many bands"
        )
    return notes


def _list_outputs(
    image: LabelledImage, out: Path, wanted: OutputOptions
) -> list[tuple[Path, Recognizer]]:
    """List the files of an image with what recognises them."""
    target = image.label
    if target == label_path(out, target.stem, wanted):
        return list_outputs(out, target.stem, wanted)
    from useg.inference.large_images import is_own_zarr

    return [(target, is_own_zarr if target.suffix == ".zarr" else is_own_label_map)]


def refuse_only_failures(failed: Sequence[Failure], num_images: int, action: str) -> None:
    """Raise an error if no image could be processed.

    Raises:
        DataError: All images failed; the message contains the first reason.
    """
    if not failed or len(failed) < num_images:
        return
    if len(failed) == 1:
        raise DataError(failed[0].reason)
    raise DataError(
        f"none of {len(failed)} images could be {action}; the first error: {failed[0].reason}"
    )


def _refuse_overwriting_images(images: Sequence[LabelledImage], out: Path) -> None:
    """Refuse a job whose label maps would replace its own images."""
    existing = set(os.listdir(out))
    for image in images:
        target = image.label
        if target.name in existing and target.exists() and target.samefile(image.image):
            raise DataError(
                f"the label map of {image.image} would overwrite the image itself; "
                f"choose another folder for the output"
            )


@dataclass(frozen=True)
class Job:
    """Options and model that all images of a job share.

    Args:
        predictor: The model.
        out: Folder to write into.
        wanted: Outputs to write.
        overwrite: Label every image again.
        fingerprint: Identifies model and options; empty if the model was made in memory.
        threads: Number of threads that all cores together run.
        all_cores: Held while one large image is computed with all threads.
        unlike: Images that are unlike the training images, so far.
        versions: What identifies the content of stacks, which their pages share.
    """

    predictor: Predictor
    out: Path
    wanted: OutputOptions
    overwrite: bool
    fingerprint: str
    threads: int
    all_cores: threading.Lock = field(default_factory=threading.Lock)
    unlike: set[LabelledImage] = field(default_factory=set)
    versions: dict[Path, str] = field(default_factory=dict)

    def label(self, image: LabelledImage) -> bool | Failure:
        """Label one image.

        Returns:
            Whether its label map existed before, or why there is none.
        """
        path, stem = image.image, image.label.stem
        names = [output.name for output, _ in list_outputs(self.out, stem, self.wanted)]
        if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in names):
            reason = "the names of its output files would be too long; shorten its name"
            return Failure(path, f"'{path}': {reason}")
        try:
            with clear_errors(str(path)):
                mark = self._mark(image)
            if not self.overwrite and is_done(image.label, mark):
                return True
            if image.page is None and is_larger_than_memory(path):
                return _label_in_blocks(self, path, image.label, mark)
            pixels, missing = read_image_and_missing(path, page=image.page)
            place = find_georeference(path)
        except UsageError as error:
            return _failure(image, str(error))
        try:
            with self._share_cores(pixels):
                predicted = label_image(self.predictor, pixels, self.wanted, missing)
            if (self.predictor.training_distance(pixels) or 0.0) > 1:
                self.unlike.add(image)
        except UsageError as error:
            return _failure(image, f"'{path}': {error}")
        predicted = replace(predicted, place=place, name=image.name)
        write_outputs(self.out, stem, predicted, self.predictor.classes, self.wanted, mark=mark)
        return False

    def is_done(self, image: LabelledImage) -> bool:
        """Whether the label map of an image exists, whichever process wrote it."""
        if self.fingerprint and image.image.exists():
            return is_done(image.label, self._mark(image))
        return image.label.exists()

    def _mark(self, image: LabelledImage) -> str:
        """Return the text that the label map of an image stores; see :func:`mark_of_version`."""
        if not self.fingerprint:
            return ""
        version = self.versions.get(image.image) or identify_image(image.image)
        if image.page is not None:
            self.versions[image.image] = version
        return mark_of_version(self.fingerprint, image.name, version)

    @contextmanager
    def _share_cores(self, image: Image) -> Iterator[None]:
        """Compute small images side by side, and a large one alone with all threads.

        This bounds the memory and keeps all cores busy.
        """
        height, width = image.shape[:2]
        working_pixels = max(
            math.prod(runtime.description.working.of(width, height))
            for runtime in self.predictor.runtimes
        )
        copies = 3 if self.wanted.needs_probabilities or self.wanted.objects else 1
        logits = height * width * len(self.predictor.classes) * copies
        if working_pixels <= MAX_CONCURRENT_PIXELS and logits <= MAX_CONCURRENT_LOGITS:
            yield
        else:
            with self.all_cores, _torch_threads(self.threads):
                yield


def _failure(image: LabelledImage, reason: str) -> Failure:
    page = "" if image.page in (None, ALL_PAGES) else f"page {image.page} of "
    return Failure(image.image, page + reason)


def _label_in_blocks(job: Job, path: Path, target: Path, mark: str) -> bool | Failure:
    if not job.wanted.only_labels:
        return Failure(
            path,
            f"'{path}' is labelled in blocks, which writes only a label map and objects; "
            f"omit the other outputs",
        )
    from useg.inference.large_images import predict_large_image

    with job.all_cores, _torch_threads(job.threads):
        objects_out = job.out if job.wanted.objects else None
        predict_large_image(job.predictor, path, target, mark=mark, objects_out=objects_out)
    return False


def label_map_path(path: Path, out: Path, wanted: OutputOptions) -> Path:
    """Return where the label map of an image goes.

    An image larger than memory gets a TIFF, and an OME-Zarr an OME-Zarr, regardless of ``wanted``.
    """
    if is_larger_than_memory(path):
        from useg.inference.large_images import large_label_path

        return large_label_path(out, path)
    return label_path(out, path.stem, wanted)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Set the number of threads of PyTorch (and OpenVINO) in this thread and those it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
