"""Folders of images, here or in an object store -> label maps, computed on many machines by Ray Data: one for each image, whatever dies."""

from __future__ import annotations

import itertools
import logging
import os
import posixpath
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.errors import UsageError, choose, need
from useg.files import make_folder, replacing
from useg.images.decode import IMAGE_SUFFIXES
from useg.images.files import decode_image, encode_label
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.machine import in_parallel, tune
from useg.models.segmenter import MODEL_NAME

OBJECT_STORE_BYTES = 256 << 20  # bytes: only names go through it


MAX_BLOCK_IMAGES = (
    500  # images: what a worker takes at a time, and starts again with when it was killed
)


MIN_BLOCKS_PER_WORKER = 16  # for each worker, at least, so that none waits long for the last


MAX_ATTEMPTS = 3  # of a block whose worker dies


WORKER_THREADS = (
    4  # that read and that write for each worker: an object store answers late, but many at once
)


@dataclass(frozen=True)
class ClusterOutcome:
    """What has become of many images.

    Args:
        num_images: all that were found.
        num_kept: how many of them had a label map before.
        failed: image -> why it has none.
        seconds: that it took, end to end.
    """

    num_images: int
    num_kept: int
    failed: dict[str, str]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """How fast it went, end to end, of those that had no label map."""
        return (self.num_images - self.num_kept) / self.seconds


class StorageFolder:
    """A folder on this machine, or in a store that Arrow knows: ``s3://``, ``gs://``, ``abfs://``, ``hdfs://``.

    Args:
        name: its path or address.
    """

    def __init__(self, name: str) -> None:
        self.is_local = "://" not in name
        self.name = os.path.abspath(name) if self.is_local else name.rstrip("/")

    @cached_property
    def opened(self) -> tuple[Any, str]:
        """Arrow's file system, and the folder's path in it.

        Raises:
            UsageError: no such kind of place, or it does not answer.
        """
        arrow = need("pyarrow.fs", extra="ray")
        if self.is_local:
            return arrow.LocalFileSystem(), self.name
        try:
            file_system, path = arrow.FileSystem.from_uri(self.name)
        except (OSError, ValueError) as error:  # Arrow's errors are of these kinds
            raise UsageError(
                f"{self.name} cannot be opened ({error}); give a folder, or one at s3://, gs://, abfs:// or hdfs://"
            ) from error
        return file_system, path.rstrip("/")

    def join(self, path: str) -> str:
        """Return what a file in it is called, for people."""
        return f"{self.name}/{path}"

    def read(self, path: str) -> bytes:
        """Return the content of a file in it."""
        file_system, base = self.opened
        with file_system.open_input_stream(f"{base}/{path}") as file:
            content: bytes = file.read()
        return content

    def write(self, path: str, content: bytes) -> None:
        """Write a file in it, whole or not at all: a store shows an object when it has all of it; folders of this machine need a hand."""
        file_system, base = self.opened
        if self.is_local:
            target = Path(base, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                temporary.write_bytes(content)
        else:
            with file_system.open_output_stream(f"{base}/{path}") as file:
                file.write(content)

    def has(self, paths: Sequence[str]) -> list[bool]:
        """Say which of these files are there."""
        file_system, base = self.opened
        return [
            each.is_file for each in file_system.get_file_info([f"{base}/{path}" for path in paths])
        ]

    def images(self) -> list[str]:
        """Return the images in it and in the folders below, hidden ones left out, in the order of their names."""
        file_system, base = self.opened
        selector = need("pyarrow.fs", extra="ray").FileSelector(
            base, recursive=True, allow_not_found=True
        )
        found = (
            each.path[len(base) :].lstrip("/")
            for each in file_system.get_file_info(selector)
            if each.is_file
        )
        return sorted(
            path
            for path in found
            if posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES
            and not posixpath.basename(path).startswith(".")
        )


def cluster_label_path(path: str) -> str:
    """Return the path of an image's label map: where the image is below its source.

    >>> label_path("north/frame.1.jpg")
    'north/frame.1.png'
    """
    return posixpath.splitext(path)[0] + ".png"


def list_images(
    sources: Sequence[str], out: StorageFolder
) -> list[tuple[StorageFolder, list[str]]]:
    """List the images of files and folders, the folders below them too: their places and their paths there.

    Raises:
        UsageError: a source without any, two that would become one label map, or an ``out`` inside of a source.
    """
    found: list[tuple[StorageFolder, list[str]]] = []
    for source in sources:
        place = StorageFolder(source)
        file_system, base = place.opened
        if file_system.get_file_info(base).is_file:
            folder, name = posixpath.split(place.name)
            found.append((StorageFolder(folder), [name]))
        elif f"{out.name}/".startswith(f"{place.name}/"):
            raise UsageError(
                f"the label maps in {out.name} would lie among the images in {source}; choose another folder with --out"
            )
        elif images := place.images():
            found.append((place, images))
        else:
            raise UsageError(f"there is no image at {source}; give image files or folders of them")
    targets = sorted(cluster_label_path(path) for _, paths in found for path in paths)
    twice = next((target for target, after in itertools.pairwise(targets) if target == after), None)
    if twice:
        both = [
            place.join(path)
            for place, paths in found
            for path in paths
            if cluster_label_path(path) == twice
        ]
        raise UsageError(
            f"{' and '.join(both[:2])} would both become {twice}; predict them into different folders"
        )
    return found


class Worker:
    """What labels blocks of images, in a process of its own on some machine."""

    def __init__(
        self, model: Any, runtime: str | None, places: list[StorageFolder], out: StorageFolder
    ) -> None:
        tune()
        with tempfile.TemporaryDirectory() as folder:
            self.predictor = Predictor.load(
                write_model_files(need("ray", extra="ray").get(model), Path(folder)), runtime
            )
        self.places, self.out = places, out
        self.alone = threading.Lock()

    def __call__(self, block: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Label a block of images ``{"number", "place", "path"}``; return their numbers, whether each was kept, and why it failed or ``""``."""
        sources = [
            (self.places[place], str(path))
            for place, path in zip(block["place"], block["path"], strict=True)
        ]
        kept = self.out.has([cluster_label_path(path) for _, path in sources])
        todo = [k for k, there in enumerate(kept) if not there]
        reasons = [""] * len(sources)
        for k, reason in zip(
            todo, in_parallel(lambda k: self.label(*sources[k]), todo, WORKER_THREADS), strict=True
        ):
            reasons[k] = reason
        return {"number": block["number"], "kept": np.array(kept), "reason": np.array(reasons)}

    def label(self, place: StorageFolder, path: str) -> str:
        """Label one image; return why not, or ``""``. The network computes one at a time, while others are read and written."""
        try:
            image = decode_image(place.read(path), place.join(path))
            with self.alone:
                prediction = self.predictor(image)
            self.out.write(
                cluster_label_path(path), encode_label(prediction, self.predictor.classes)
            )
        except Exception as error:  # whatever is odd about one picture in a hundred million, the others are labelled
            return (
                str(error)
                if isinstance(error, UsageError)
                else f"{place.join(path)}: {type(error).__name__}: {error}"
            )
        return ""


def read_model_files(model: Path) -> dict[str, bytes]:
    """Read the files of a model, so that workers need no disk in common.

    Raises:
        UsageError: there is no such model, or it is damaged.
    """
    runtimes.read_model(model)
    if model.is_dir():
        model = model / MODEL_NAME
    files = [model, model.with_suffix(".bin")] if model.suffix == ".xml" else [model]
    return {file.name: file.read_bytes() for file in files}


def write_model_files(files: dict[str, bytes], folder: Path) -> Path:
    """Write into a folder what :func:`pack` read, and return the model's path."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder / next(iter(files))


def predict_cluster(
    model: str | Path,
    sources: Sequence[str],
    out: str,
    *,
    address: str | None = None,
    workers: int | None = None,
    gpus: float = 0.0,
    runtime: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ClusterOutcome:
    """Label images on many machines: ``OUT/.../STEM.png`` for each, where the image is below its source.

    Each worker holds one model and has one core, or a share of a GPU. A label map is there whole or not at all, and one that is there is
    kept, whatever made it: the same call again does what is left. What a worker was doing when it died is done by another.

    Args:
        model: a run folder or a model file, on this machine.
        sources: image files and folders, on a disk that all machines see or in an object store (``s3://``, ``gs://``, ``abfs://``, ``hdfs://``).
        out: a folder on such a disk or in a store.
        address: of a Ray cluster on whose machines useg is installed too; by default one is started on this machine alone.
        workers: how many; by default one for each core, or for each share of a GPU.
        gpus: share of a GPU for each worker, such as 0.5; 0: the processor computes.
        runtime: as for :func:`useg.inference.runtimes.load_runtime`.
        progress: called with (images done, images in all).

    Raises:
        UsageError: no images, no model, no such place, nothing to compute on, or the package ``ray`` is missing.
    """
    began = time.perf_counter()
    if runtime not in (None, "auto"):
        choose("runtime", str(runtime), runtimes.RUNTIMES)  # a slip is answered at once
    files, into = read_model_files(Path(model)), StorageFolder(out)
    found = list_images(sources, into)
    if into.is_local:
        make_folder(Path(into.name))
    paths = [path for _, paths in found for path in paths]
    places = np.repeat(np.arange(len(found)), [len(paths) for _, paths in found])
    reported, done, kept, failed = np.zeros(len(paths), bool), 0, 0, {}
    with _connected_ray(address, workers) as ray:
        count = workers or _default_workers(ray, gpus)
        arguments = [
            ray.put(files),
            runtime or ("gpu" if gpus else None),
            [place for place, _ in found],
            into,
        ]
        for largest in (
            MAX_BLOCK_IMAGES,
            1,
        ):  # of a block whose worker died again and again, each image on its own
            left = np.flatnonzero(~reported)
            size = min(largest, -(-len(left) // (count * MIN_BLOCKS_PER_WORKER)))
            blocks = [left[k : k + size] for k in range(0, len(left), size or 1)]
            for row in _label_blocks(ray, blocks, paths, places, arguments, count, gpus):
                reported[row["number"]] = True
                done, kept = done + 1, kept + row["kept"]
                if row["reason"]:
                    failed[found[places[row["number"]]][0].join(paths[row["number"]])] = row[
                        "reason"
                    ]
                progress(done, len(paths))
    for k in np.flatnonzero(~reported):
        failed[found[places[k]][0].join(paths[k])] = (
            f"its worker died {2 * MAX_ATTEMPTS} times; look at its memory and at this image"
        )
    return ClusterOutcome(len(paths), kept, failed, time.perf_counter() - began)


def _label_blocks(
    ray: Any,
    blocks: list[NDArray[Any]],
    paths: list[str],
    places: NDArray[Any],
    arguments: list[Any],
    workers: int,
    gpus: float,
) -> Iterator[dict[str, Any]]:
    """Label blocks of images and yield what is reported of each; of a block whose worker died ``TRIES`` times nothing is."""
    if not blocks:
        return
    table = need("pyarrow", extra="ray").table
    tables = [
        table({"number": block, "place": places[block], "path": [paths[k] for k in block]})
        for block in blocks
    ]
    labelled = ray.data.from_arrow(tables).map_batches(
        Worker,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=None,
        num_cpus=0 if gpus else 1,
        num_gpus=gpus,
        max_task_retries=MAX_ATTEMPTS - 1,
    )
    try:
        yield from labelled.iter_rows()
    except ray.exceptions.RayActorError as error:  # deaths later on are counted as failed blocks
        why = str(error).strip().splitlines()[-1].removeprefix("useg.errors.UsageError: ")
        raise UsageError(
            f"no worker can start ({why}); see that all machines have what the model needs, or choose another --runtime"
        ) from error


def _default_workers(ray: Any, gpus: float) -> int:
    resources = ray.cluster_resources()
    room = int(resources.get("GPU", 0) / gpus) if gpus else int(resources.get("CPU", 0))
    if not room:
        raise UsageError(
            f"Ray sees no {'GPU' if gpus else 'processor'} here; give an --address of machines that have one"
        )
    return room


@contextmanager
def _connected_ray(address: str | None, workers: int | None) -> Iterator[Any]:
    """Start or join Ray, quietly; leave it as it was found."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # it calls what Ray Data does with every worker an error
    ray = need("ray", extra="ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own future
        need("ray.data", extra="ray")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ours = not ray.is_initialized()
        size = (
            {}
            if address
            else {
                "num_cpus": workers,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
            }
        )
        try:
            if ours:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **size,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"there is no Ray cluster at {address} ({error}); start one with 'ray start --head'"
            ) from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, context.max_errored_blocks = False, -1
        try:
            yield ray
        finally:
            if ours:
                ray.shutdown()
