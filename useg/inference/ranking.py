"""Rank unlabelled images for annotation: the most uncertain first, near duplicates far apart.

This is active learning by margin sampling (Scheffer et al., 2001) with a penalty for
images similar to those already chosen. It keeps copies and neighbouring frames of a video from
filling the top of the list.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from useg.classes import softmax
from useg.data.duplicates import compute_signature
from useg.errors import UsageError
from useg.files import make_folder, natural_key, replacing
from useg.images.image_files import Image, read_image_and_missing
from useg.inference.predict_files import Failure, find_images, refuse_only_failures
from useg.machine import in_parallel
from useg.ownership import RANKING_HEADER, is_own_csv, refuse_foreign_files
from useg.parsing import to_cell

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor

RANKING_NAME = "ranking.csv"

# Predictions are averaged over the cells of a grid of at most this number of rows and columns.
MAX_GRID_CELLS = (6, 8)

# Share of the cells, the most uncertain ones, that count: a large easy sky should hide nothing.
COUNTED_SHARE = 0.25

# Pixels of a prediction that are sampled, enough for a mean over a cell.
_MAX_SAMPLED_PIXELS = 40_000

# Images that are chosen one by one, each compared with all chosen before.
_MAX_GREEDY_STEPS = 1000

RankingProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class RankedImage:
    """An image in the ranking.

    Args:
        path: The image file.
        gain: Expected benefit of labelling it once the images before it are labelled, 0 to 1:
            ``uncertainty`` reduced by the similarity to them.
        uncertainty: Mean uncertainty of the most uncertain cells, 0 to 1, see
            :func:`margin_uncertainty`.
    """

    path: Path
    gain: float
    uncertainty: float


@dataclass(frozen=True)
class Ranking:
    """Images in the order in which to label them, and those that could not be ranked."""

    order: list[RankedImage]
    failed: list[Failure]


@dataclass(frozen=True)
class _Summary:
    """A description of what an image shows, to compare it with others.

    Args:
        signature: Thumbnail as a vector ``(S,)`` of length 1.
        layout: Mean probability of each class in each cell, ``(K * cells,)``.
    """

    signature: NDArray[np.float32]
    layout: NDArray[np.float32]


def write_ranking(
    predictor: Predictor,
    sources: Sequence[str],
    out: Path,
    *,
    count: int | None = None,
    progress: RankingProgress = lambda done, total: None,
) -> Ranking:
    """Rank image files, and write ``out/ranking.csv``: rank, image, gain, uncertainty.

    Args:
        predictor: The model.
        sources: Image files, folders, globs.
        out: Folder of the CSV file; created if missing.
        count: Number of images to list; None: all.
        progress: Called with (images done, images in all).

    Returns:
        What was written.

    Raises:
        UsageError: There are no images, none could be ranked, or the folder cannot be written.
    """
    paths = find_images(sources)
    target = out / RANKING_NAME
    refuse_foreign_files([(target, is_own_csv(*RANKING_HEADER))])
    make_folder(out)
    ranking = rank_images(predictor, paths, count, progress)
    is_own = is_own_csv(*RANKING_HEADER)
    with replacing(target, is_own) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(RANKING_HEADER)
        for rank, image in enumerate(ranking.order, 1):
            gain, uncertainty = f"{image.gain:.4f}", f"{image.uncertainty:.4f}"
            rows.writerow([rank, to_cell(image.path.as_posix()), gain, uncertainty])
    return ranking


def rank_images(
    predictor: Predictor,
    paths: Iterable[Path],
    count: int | None = None,
    progress: RankingProgress = lambda done, total: None,
    *,
    labelled: Iterable[Path] = (),
) -> Ranking:
    """Rank images by the expected benefit of labelling them.

    Each next image has the highest uncertainty after a reduction by its similarity to the most
    similar image that is labelled or comes before it. The order of ``paths`` does not matter.

    Args:
        predictor: The model to improve.
        paths: Image files.
        count: Number of images to return; None: all.
        progress: Called with (images done, images in all).
        labelled: Image files that are labelled already; one that cannot be read does not count.

    Returns:
        The images, with falling gain, and those that cannot be read or do not fit the model.

    Raises:
        DataError: No image could be ranked.

    >>> rank_images(useg.load("run"), find_images(["frames"]), count=20).order  # doctest: +SKIP
    """
    files = sorted(set(paths), key=natural_key)
    known = [
        _summarize(*each)
        for each in _predict_all(predictor, list(labelled))
        if not isinstance(each, Failure)
    ]
    ranked, summaries, uncertainties, failed = [], [], [], []
    for done, (path, each) in enumerate(zip(files, _predict_all(predictor, files), strict=True), 1):
        if isinstance(each, Failure):
            failed.append(each)
        else:
            ranked.append(path)
            summaries.append(_summarize(*each))
            uncertainties.append(_measure_uncertainty(each[1]))
        progress(done, len(files))
    refuse_only_failures(failed, len(files), "ranked")
    num_chosen = len(ranked) if count is None else count
    chosen = _choose(summaries, np.array(uncertainties), known, num_chosen)
    order = [RankedImage(ranked[k], gain, uncertainties[k]) for k, gain in chosen]
    return Ranking(order, failed)


def _predict_all(
    predictor: Predictor, files: Sequence[Path]
) -> Iterator[tuple[Image, NDArray[np.float32]] | Failure]:
    """Yield each image and some of its probabilities ``(K, h, w)``, or why there are none."""
    for path, image in zip(files, in_parallel(_read, files), strict=True):
        yield image if isinstance(image, Failure) else _predict(predictor, path, image)


def _read(path: Path) -> Image | Failure:
    try:
        return read_image_and_missing(path)[0]
    except UsageError as error:
        return Failure(path, str(error))


def _predict(
    predictor: Predictor, path: Path, image: Image
) -> tuple[Image, NDArray[np.float32]] | Failure:
    try:
        logits = predictor.logits(image)
    except UsageError as error:
        return Failure(path, f"'{path}': {error}")
    step = max(1, math.isqrt(logits[0].size // _MAX_SAMPLED_PIXELS))
    return image, softmax(logits[:, ::step, ::step], predictor.temperature)


def _summarize(image: Image, probabilities: NDArray[np.float32]) -> _Summary:
    thumbnail = compute_signature(image).astype(np.float32) - 128
    return _Summary(
        thumbnail / max(1.0, float(np.linalg.norm(thumbnail))), _cell_means(probabilities).ravel()
    )


def _measure_uncertainty(probabilities: NDArray[np.float32]) -> float:
    """Return the mean uncertainty of the most uncertain cells."""
    uncertainty = np.sort(_cell_means(margin_uncertainty(probabilities)[None]), axis=None)
    counted = uncertainty[-max(1, round(COUNTED_SHARE * uncertainty.size)) :]
    return float(counted.mean())


def margin_uncertainty(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the uncertainty ``(H, W)``, 0 to 1, of class probabilities ``(K, H, W)``.

    It is 1 minus the difference between the two highest probabilities, as in margin sampling.
    """
    if len(probabilities) < 2:
        return np.zeros(probabilities.shape[1:], np.float32)
    second, first = np.partition(probabilities, len(probabilities) - 2, axis=0)[-2:]
    uncertainty: NDArray[np.float32] = 1 - (first - second)
    return uncertainty


def _cell_means(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average ``(C, H, W)`` over the cells of a grid: ``(C, rows, columns)``."""
    for axis, max_cells in zip((1, 2), MAX_GRID_CELLS, strict=True):
        length = values.shape[axis]
        num_cells = min(max_cells, length)
        edges = np.arange(num_cells) * length // num_cells
        sizes = np.diff([*edges, length]).astype(np.float32)
        sums: NDArray[np.float32] = np.add.reduceat(values, edges, axis=axis)
        values = sums / (sizes[:, None] if axis == 1 else sizes)
    return values


def _choose(
    summaries: Sequence[_Summary],
    uncertainty: NDArray[np.float64],
    known: Sequence[_Summary],
    count: int,
) -> list[tuple[int, float]]:
    """Choose images greedily, the first of equals, unlike those that are known.

    After ``_MAX_GREEDY_STEPS`` the rest follow by their remaining gain.

    Returns:
        (index, gain) of each.
    """
    similarity = np.array(
        [max((_similarity(each, other) for other in known), default=0.0) for each in summaries]
    )
    left = np.ones(len(summaries), bool)
    chosen: list[tuple[int, float]] = []
    for _ in range(min(count, len(summaries), _MAX_GREEDY_STEPS)):
        gains = np.where(left, uncertainty * (1 - similarity), -1)
        best = int(gains.argmax())
        chosen.append((best, float(gains[best])))
        left[best] = False
        to_best = [
            _similarity(summaries[best], other) if left[k] else 0
            for k, other in enumerate(summaries)
        ]
        similarity = np.maximum(similarity, to_best)
    gains = uncertainty * (1 - similarity)
    rest = sorted(np.flatnonzero(left).tolist(), key=lambda k: -gains[k])
    return chosen + [(k, float(gains[k])) for k in rest[: max(0, count - len(chosen))]]


def _similarity(one: _Summary, other: _Summary) -> float:
    """Return the similarity of two images, 0 to 1.

    It is the correlation of their thumbnails times the share of their class layout in common.
    """
    if one.layout.shape != other.layout.shape:
        return 0.0
    common = float(np.minimum(one.layout, other.layout).sum() / one.layout.sum())
    return max(0.0, float(one.signature @ other.signature)) * common
