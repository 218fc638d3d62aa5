"""Label images on many machines with Ray Data: folders or object stores in, label maps out.

Every image gets its label map even if workers die. A label map stores the same fingerprint as
those of :mod:`useg.inference.predict_files`: model, runtime, and name and content of the image. If
it matches, the label map is kept, so the same call again continues the job. If another model made
it, it is computed again.
"""

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

from useg.errors import DataError, MachineError, UsageError, choose, format_count, need
from useg.files import clear_drafts, make_folder, replacing
from useg.images.formats import IMAGE_SUFFIXES
from useg.images.image_files import (
    MARKED_BYTES,
    decode_image_and_missing,
    encode_label,
    starts_with_mark,
)
from useg.inference import runtimes
from useg.inference.outputs import (
    OutputOptions,
    identify_image,
    label_image,
    mark_of_version,
    model_fingerprint,
)
from useg.inference.predict_files import Failure, Outcome
from useg.inference.predictor import Predictor
from useg.machine import in_parallel, tune
from useg.models.segmenter import model_file
from useg.ownership import find_png_mark, is_label_mark, is_own_label_map

# Only file names pass through Ray's object store.
OBJECT_STORE_BYTES = 256 << 20

# Images that a worker takes at a time, and repeats if it was killed. Each worker gets at least
# this number of blocks, so that none waits long for the last one.
MAX_IMAGES_PER_BLOCK = 500
MIN_BLOCKS_PER_WORKER = 16

# Label maps in a store that are checked before a job begins.
MAX_CHECKED_OBJECTS = 1000

# Attempts to label a block whose worker dies.
MAX_ATTEMPTS = 3

# Threads of a worker that read and write: an object store answers late, but many at once.
WORKER_THREADS = 4


class StorageFolder:
    """A folder on this machine, or in a store that Arrow can open.

    Args:
        name: Its path, or its address: ``s3://``, ``gs://``, ``abfs://`` or ``hdfs://``.
    """

    def __init__(self, name: str) -> None:
        self.is_local = "://" not in name
        self.name = os.path.abspath(name) if self.is_local else name.rstrip("/")

    @cached_property
    def opened(self) -> tuple[Any, str]:
        """Arrow's file system, and the path of the folder in it.

        Raises:
            MachineError: Arrow does not know this kind of store, or the store does not answer.
        """
        arrow = need("pyarrow.fs", extra="ray")
        if self.is_local:
            return arrow.LocalFileSystem(), self.name
        try:
            file_system, path = arrow.FileSystem.from_uri(self.name)
        except (OSError, ValueError) as error:  # Arrow's errors are of these kinds
            raise MachineError(
                f"{self.name} cannot be opened ({error}); "
                f"give a folder, or one at s3://, gs://, abfs:// or hdfs://"
            ) from error
        return file_system, path.rstrip("/")

    def join(self, path: str) -> str:
        """Return the full name of a file in the folder, for messages."""
        return f"{self.name}/{path}"

    def read(self, path: str) -> bytes:
        """Read a file in the folder."""
        file_system, base = self.opened
        with file_system.open_input_stream(f"{base}/{path}") as file:
            content: bytes = file.read()
        return content

    def write(self, path: str, content: bytes) -> None:
        """Write a file in the folder, whole or not at all.

        A store shows an object only when it is complete. On a local disk the file is renamed.
        """
        file_system, base = self.opened
        if self.is_local:
            target = Path(base, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target, is_own_label_map) as draft:
                draft.write_bytes(content)
        else:
            with file_system.open_output_stream(f"{base}/{path}") as file:
                file.write(content)

    def has_mark(self, path: str, mark: str) -> bool:
        """Whether a file in the folder is a label map with this mark; reads its first bytes."""
        return starts_with_mark(self._start(path) or b"", mark)

    def is_foreign(self, path: str) -> bool:
        """Whether there is a file in the folder that useg did not write."""
        if self.is_local:
            place = Path(self.name, path)
            return os.path.lexists(place) and not is_own_label_map(place)
        start = self._start(path)
        return start is not None and not is_label_mark(find_png_mark(start) or b"")

    def _start(self, path: str) -> bytes | None:
        """Return the first bytes of a file in the folder; None if there is no such file."""
        file_system, base = self.opened
        try:
            with file_system.open_input_file(f"{base}/{path}") as file:
                start: bytes = file.read(MARKED_BYTES)
        except OSError:
            return None
        return start

    def version(self, path: str) -> str:
        """Identify the content of an image, see :func:`useg.inference.outputs.identify_image`.

        In a store, that is its address, size and time: users cannot set the time of an object.
        """
        file_system, base = self.opened
        if self.is_local:
            return identify_image(Path(base, path))
        status = file_system.get_file_info(f"{base}/{path}")
        return f"{self.join(path)} {status.size} {status.mtime_ns}"

    def images(self) -> list[str]:
        """List the images in the folder and its subfolders, sorted; hidden files are skipped."""
        file_system, base = self.opened
        selector = need("pyarrow.fs", extra="ray").FileSelector(
            base, recursive=True, allow_not_found=True
        )
        paths = (
            entry.path[len(base) :].lstrip("/")
            for entry in file_system.get_file_info(selector)
            if entry.is_file
        )
        return sorted(path for path in paths if _is_image_path(path))


def _is_image_path(path: str) -> bool:
    name = posixpath.basename(path)
    return not name.startswith(".") and posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def cluster_label_path(path: str) -> str:
    """Return the path of an image's label map in the output folder.

    It is the path of the image in its source folder, with another suffix.

    >>> cluster_label_path("north/frame.1.jpg")
    'north/frame.1.png'
    """
    return posixpath.splitext(path)[0] + ".png"


def list_images(
    sources: Sequence[str], out: StorageFolder
) -> list[tuple[StorageFolder, list[str]]]:
    """List the images of files and folders, subfolders included.

    Returns:
        Folders, each with the paths of its images.

    Raises:
        DataError: A source has no images, two images would get the same label map, or ``out``
            lies inside a source.
    """
    listed: list[tuple[StorageFolder, list[str]]] = []
    for source in sources:
        folder = StorageFolder(source)
        file_system, base = folder.opened
        if file_system.get_file_info(base).is_file:
            parent, name = posixpath.split(folder.name)
            listed.append((StorageFolder(parent), [name]))
        elif f"{out.name}/".startswith(f"{folder.name}/"):
            raise DataError(
                f"the label maps in {out.name} would lie among the images in {source}; "
                f"choose another folder for the output"
            )
        elif images := folder.images():
            listed.append((folder, images))
        else:
            raise DataError(f"there is no image at {source}; give image files or folders of them")
    _refuse_same_targets(listed)
    return listed


def _refuse_same_targets(listed: Sequence[tuple[StorageFolder, list[str]]]) -> None:
    targets = sorted(cluster_label_path(path) for _, paths in listed for path in paths)
    for target, following in itertools.pairwise(targets):
        if target == following:
            same = [
                folder.join(path)
                for folder, paths in listed
                for path in paths
                if cluster_label_path(path) == target
            ]
            raise DataError(
                f"{' and '.join(same[:2])} would both become {target}; "
                f"predict them into different folders"
            )


@dataclass(frozen=True)
class ClusterJob:
    """Options that all workers of a job share.

    Args:
        folders: Folders of the images.
        out: Folder of the label maps.
        fingerprint: Identifies the model, for the mark in the label maps.
        runtime: What computes the model, as for :func:`useg.inference.runtimes.load_runtime`.
    """

    folders: list[StorageFolder]
    out: StorageFolder
    fingerprint: str
    runtime: str | None


class Worker:
    """Labels blocks of images in a process of its own, on some machine.

    Args:
        model: Ray's reference to the files that :func:`read_model_files` returned.
        job: What it shares with the other workers.
    """

    def __init__(self, model: Any, job: ClusterJob) -> None:
        tune()
        with tempfile.TemporaryDirectory() as folder:
            path = write_model_files(need("ray", extra="ray").get(model), Path(folder))
            self.predictor = Predictor.load(path, job.runtime)
        self.job = job
        self.network_lock = threading.Lock()

    def __call__(self, block: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Label a block of images.

        Args:
            block: Columns ``number``, ``folder`` (an index) and ``path``, one row per image.

        Returns:
            Columns ``number``, ``kept`` and ``reason``: whether the label map existed before, and
            why an image failed, or ``""``.
        """
        images = [
            (self.job.folders[folder], str(path))
            for folder, path in zip(block["folder"], block["path"], strict=True)
        ]
        results = list(in_parallel(lambda image: self.label(*image), images, WORKER_THREADS))
        return {
            "number": block["number"],
            "kept": np.array([kept for kept, _ in results], bool),
            "reason": np.array([reason for _, reason in results]),
        }

    def label(self, folder: StorageFolder, path: str) -> tuple[bool, str]:
        """Label one image. The network computes one at a time while others are read and written.

        Returns:
            Whether the label map existed before, and why the image failed, or ``""``.
        """
        target = cluster_label_path(path)
        try:
            name = posixpath.basename(path)
            mark = mark_of_version(self.job.fingerprint, name, folder.version(path))
            if self.job.out.has_mark(target, mark):
                return True, ""
            if self.job.out.is_foreign(target):
                raise _foreign_files(self.job.out, [target])
            image, missing = decode_image_and_missing(folder.read(path), folder.join(path))
            with self.network_lock:
                label = label_image(self.predictor, image, OutputOptions(), missing).label
            self.job.out.write(target, encode_label(label, self.predictor.classes, mark))
        except UsageError as error:
            return False, str(error)
        except Exception as error:  # one odd image in a hundred million must not stop the others
            return False, f"{folder.join(path)}: {type(error).__name__}: {error}"
        return False, ""


def read_model_files(model: Path) -> dict[str, bytes]:
    """Read the files of a model, so that workers need no common disk.

    Returns:
        File name -> content; the model file comes first.

    Raises:
        ModelError: There is no such model, or it is damaged.
    """
    runtimes.read_model(model)
    path = model_file(model)
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return {file.name: file.read_bytes() for file in files}


def write_model_files(files: dict[str, bytes], folder: Path) -> Path:
    """Write what :func:`read_model_files` returned into a folder, and return the model file."""
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
    runtime: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Label images on many machines.

    Writes ``OUT/.../STEM.png`` for each image, where ``...`` is its place in its source folder.
    Each worker holds one model and uses one core. Label maps are written whole or not at all.
    Another worker repeats the block of a worker that died.

    Args:
        model: A run folder or a model file, on this machine.
        sources: Image files and folders, on a disk that all machines share or in an object store
            (``s3://``, ``gs://``, ``abfs://``, ``hdfs://``).
        out: A folder on such a disk or in a store.
        address: Address of a Ray cluster on whose machines useg is installed; None starts one on
            this machine only.
        workers: Number of workers; by default one per core.
        runtime: As for :func:`useg.inference.runtimes.load_runtime`.
        progress: Called with (images done, images in all).

    Returns:
        Counts and failures; label maps are not listed.

    Raises:
        UsageError: There are no images, no model, no such store or nothing to compute on, or the
            package ``ray`` is missing.
    """
    began = time.perf_counter()
    if runtime not in (None, "auto"):
        choose("runtime", str(runtime), runtimes.RUNTIMES)
    files, target = read_model_files(Path(model)), StorageFolder(out)
    listed = list_images(sources, target)
    _refuse_foreign_files(target, listed)
    if target.is_local:
        _clear_drafts(make_folder(Path(target.name)))
    fingerprint = _cluster_fingerprint(Path(model), runtime)
    job = ClusterJob([folder for folder, _ in listed], target, fingerprint, runtime)
    images = _ImageTable(
        [path for _, paths in listed for path in paths],
        np.repeat(np.arange(len(listed)), [len(paths) for _, paths in listed]),
    )
    kept, failed = 0, []
    with _connected_ray(address, workers) as ray:
        count = workers or _default_workers(ray)
        pool = _WorkerPool(ray, [ray.put(files), job], count)
        for done, row in enumerate(_label_images(pool, images), 1):
            kept += int(row["kept"])
            if row["reason"]:
                failed.append(Failure(_address(job, images, row["number"]), str(row["reason"])))
            progress(done, len(images.paths))
    return Outcome([], kept, failed, len(images.paths), time.perf_counter() - began)


def _refuse_foreign_files(
    out: StorageFolder, listed: Sequence[tuple[StorageFolder, list[str]]]
) -> None:
    """Refuse a job that would replace files that useg did not write.

    In a store, only the first label maps are checked here, and each one again before it is
    written.
    """
    targets = {cluster_label_path(path) for _, paths in listed for path in paths}
    existing = sorted(targets.intersection(out.images()))
    checked = existing if out.is_local else existing[:MAX_CHECKED_OBJECTS]
    if foreign := [path for path in checked if out.is_foreign(path)]:
        raise _foreign_files(out, foreign)


def _foreign_files(out: StorageFolder, paths: Sequence[str]) -> DataError:
    return DataError(
        f"this job would replace {format_count(len(paths), 'file')} that useg did not write, such "
        f"as {out.join(paths[0])}; choose another folder for the output"
    )


def _clear_drafts(out: Path) -> None:
    """Remove the drafts that killed workers left in a local folder."""
    for folder, _, _ in os.walk(out):
        clear_drafts(Path(folder))


def _cluster_fingerprint(model: Path, runtime: str | None) -> str:
    """Return what :func:`useg.inference.predict_files.predict` computes as the fingerprint."""
    name = runtime or runtimes.read_model(model).native
    return model_fingerprint([(model_file(model), name)], "none", OutputOptions(overlays=False))


@dataclass(frozen=True)
class _ImageTable:
    """All images of a job: their paths, and the index ``(N,)`` of the folder of each."""

    paths: list[str]
    folders: NDArray[np.intp]


@dataclass(frozen=True)
class _WorkerPool:
    """Workers in Ray: the arguments of each, and their number."""

    ray: Any
    arguments: list[Any]
    count: int


def _address(job: ClusterJob, images: _ImageTable, number: int) -> Path | str:
    folder = job.folders[images.folders[number]]
    address = folder.join(images.paths[number])
    return Path(address) if folder.is_local else address


def _label_images(pool: _WorkerPool, images: _ImageTable) -> Iterator[dict[str, Any]]:
    """Label all images and yield a row for each, as :meth:`Worker.__call__` returns it.

    The images of a block whose workers died ``MAX_ATTEMPTS`` times are tried again one by one.
    """
    reported = np.zeros(len(images.paths), bool)
    for max_images in (MAX_IMAGES_PER_BLOCK, 1):
        left = np.flatnonzero(~reported)
        size = min(max_images, -(-len(left) // (pool.count * MIN_BLOCKS_PER_WORKER)))
        blocks = [left[k : k + size] for k in range(0, len(left), size or 1)]
        for row in _label_blocks(pool, images, blocks):
            reported[row["number"]] = True
            yield row
    reason = (
        f"its worker died {2 * MAX_ATTEMPTS} times; check the memory of the machines and this image"
    )
    for number in np.flatnonzero(~reported):
        yield {"number": number, "kept": False, "reason": reason}


def _label_blocks(
    pool: _WorkerPool, images: _ImageTable, blocks: list[NDArray[Any]]
) -> Iterator[dict[str, Any]]:
    """Label blocks of images; a block whose workers died ``MAX_ATTEMPTS`` times yields no rows."""
    if not blocks:
        return
    table = need("pyarrow", extra="ray").table
    tables = [
        table(
            {
                "number": block,
                "folder": images.folders[block],
                "path": [images.paths[k] for k in block],
            }
        )
        for block in blocks
    ]
    ray = pool.ray
    labelled = ray.data.from_arrow(tables).map_batches(
        Worker,
        fn_constructor_args=pool.arguments,
        compute=ray.data.ActorPoolStrategy(size=pool.count),
        batch_size=None,
        num_cpus=1,
        max_task_retries=MAX_ATTEMPTS - 1,
    )
    try:
        yield from labelled.iter_rows()
    except ray.exceptions.RayActorError as error:  # later deaths count as failed blocks
        last_line = str(error).strip().splitlines()[-1]
        cause = last_line.partition("useg.errors.")[2].partition(": ")[2] or last_line
        raise MachineError(
            f"no worker can start ({cause}); "
            f"check that all machines have what the model needs, or choose another runtime"
        ) from error


def _default_workers(ray: Any) -> int:
    count = int(ray.cluster_resources().get("CPU", 0))
    if not count:
        raise MachineError("Ray finds no CPU here; give the address of machines that have one")
    return count


@contextmanager
def _connected_ray(address: str | None, workers: int | None) -> Iterator[Any]:
    """Start or join Ray, quietly; Ray is shut down again only if it was started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray logs as an error what Ray Data does with every worker.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = need("ray", extra="ray")
    with warnings.catch_warnings():
        # Ray warns of changes in its future versions.
        warnings.simplefilter("ignore")
        need("ray.data", extra="ray")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        starts_here = not ray.is_initialized()
        if starts_here:
            _start_ray(ray, address, workers)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, context.max_errored_blocks = False, -1
        try:
            yield ray
        finally:
            if starts_here:
                ray.shutdown()


def _start_ray(ray: Any, address: str | None, workers: int | None) -> None:
    local_options = {
        "num_cpus": workers,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else local_options),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"there is no Ray cluster at {address} ({error}); start one with 'ray start --head'"
        ) from error
