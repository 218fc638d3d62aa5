"""Pictures without truth -> in which order to label them: where the model doubts most first, and
never near twins one after the other.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from useg.classes import softmax
from useg.data.duplicates import compute_signature
from useg.errors import UsageError
from useg.files import make_folder, replacing
from useg.images.files import Image, natural_key, read_image
from useg.inference.files import Failure, find_images
from useg.machine import in_parallel

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor

RANKING_NAME = "ranking.csv"


MAX_GRID_CELLS = (6, 8)  # rows and columns of fields in which a picture's answer is summed up


# share of the fields, those doubted most, that count: a large sky that is easy says nothing of the
# rest
COUNTED_SHARE = 0.25


_MAX_SAMPLED_PIXELS = 40_000  # of an answer that are looked at: enough for a mean over a field


_MAX_GREEDY_STEPS = (
    1000  # pictures that are chosen one by one, each compared with all chosen before
)


RankingProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class RankedImage:
    """A picture in the order.

    Args:
        path: its file.
        gain: what labelling it promises once those before it are labelled, 0 to 1: ``uncertainty``
            less what they show already.
        uncertainty: mean doubt in the fields of the picture that are doubted most, 0 to 1; a
            pixel's doubt is 1 less the distance between the probabilities of the two likeliest
            classes.
    """

    path: Path
    gain: float
    uncertainty: float


@dataclass(frozen=True)
class _Summary:
    """A picture's uncertainty, its signature ``(S,)`` of length 1 and the mean probability of each
    class in each field ``(fields * K,)``.
    """

    uncertainty: float
    look: NDArray[np.float32]
    layout: NDArray[np.float32]


@dataclass(frozen=True)
class Ranking:
    """Pictures in the order in which to label them, and those that could not be looked at."""

    order: list[RankedImage]
    failed: list[Failure]


def rank_images(
    predictor: Predictor,
    paths: Iterable[Path],
    count: int | None = None,
    progress: RankingProgress = lambda done, total: None,
) -> Ranking:
    """Say which pictures to label next.

    The first is the most uncertain one. Each further one has the most uncertainty left when that is
    reduced by its likeness to the likest picture before it, so that copies and neighbours in a film
    fall behind. The order of ``paths`` does not matter.

    Args:
        predictor: the model that is to get better.
        paths: picture files.
        count: how many to return; None for all.
        progress: called with (pictures looked at, pictures in all).

    Returns:
        The pictures, the most promising first, gains never rising; those that cannot be read or do
        not fit the model stop nothing.

    Raises:
        UsageError: no picture could be looked at.

    >>> rank(useg.load("run"), find_images(["frames"]), count=20).order  # doctest: +SKIP
    """
    files = sorted(set(paths), key=natural_key)
    there, glances, failed = [], [], []
    for done, (path, read) in enumerate(zip(files, in_parallel(_read, files), strict=True), 1):
        glance = read if isinstance(read, Failure) else _summarize(predictor, path, read)
        if isinstance(glance, Failure):
            failed.append(glance)
        else:
            there.append(path)
            glances.append(glance)
        progress(done, len(files))
    if files and not there:
        raise UsageError(
            failed[0].reason
            if len(failed) == 1
            else f"none of {len(failed)} pictures could be ranked; the first: {failed[0].reason}"
        )
    chosen = _choose(glances, len(there) if count is None else count)
    return Ranking(
        [RankedImage(there[k], gain, glances[k].uncertainty) for k, gain in chosen], failed
    )


def write_ranking(
    predictor: Predictor,
    sources: Sequence[str],
    out: Path,
    *,
    count: int | None = None,
    progress: RankingProgress = lambda done, total: None,
) -> Ranking:
    """Rank pictures on disk, and write ``out/ranking.csv``: rank, image, gain, uncertainty.

    Args:
        predictor: the model.
        sources: image files, folders, globs.
        out: the folder for the file; made when missing.
        count: how many to list; None for all.
        progress: called with (pictures looked at, pictures in all).

    Returns:
        What was written.

    Raises:
        UsageError: no images, none that could be looked at, or a folder that cannot be written.
    """
    paths = find_images(sources)
    target = make_folder(out) / RANKING_NAME
    ranking = rank_images(predictor, paths, count, progress)
    with replacing(target) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["rank", "image", "gain", "uncertainty"])
        rows.writerows(
            [k, one.path.as_posix(), f"{one.gain:.4f}", f"{one.uncertainty:.4f}"]
            for k, one in enumerate(ranking.order, 1)
        )
    return ranking


def _read(path: Path) -> Image | Failure:
    try:
        return read_image(path)
    except UsageError as error:
        return Failure(path, str(error))


def _summarize(predictor: Predictor, path: Path, image: Image) -> _Summary | Failure:
    try:
        logits = predictor.logits(image)
    except UsageError as error:
        return Failure(path, f"'{path}': {error}")
    step = max(1, math.isqrt(logits[0].size // _MAX_SAMPLED_PIXELS))
    probabilities = softmax(logits[:, ::step, ::step], predictor.temperature)
    doubt = _cell_means(margin_uncertainty(probabilities)[None])[0]
    most = np.sort(doubt, axis=None)[-max(1, round(COUNTED_SHARE * doubt.size)) :]
    look = compute_signature(image).astype(np.float32) - 128
    return _Summary(
        float(most.mean()),
        look / max(1.0, float(np.linalg.norm(look))),
        _cell_means(probabilities).ravel(),
    )


def margin_uncertainty(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 1 less the distance between the probabilities of the two likeliest classes at each
    pixel, ``(H, W)`` from ``(K, H, W)``.
    """
    if len(probabilities) < 2:
        return np.zeros(probabilities.shape[1:], np.float32)
    second, first = np.partition(probabilities, len(probabilities) - 2, axis=0)[-2:]
    doubt: NDArray[np.float32] = 1 - (first - second)
    return doubt


def _cell_means(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average ``(C, H, W)`` over the fields of a grid, at most ``GRID`` of them: ``(C, rows,
    columns)``.
    """
    for axis, most in zip((1, 2), MAX_GRID_CELLS, strict=True):
        length = values.shape[axis]
        edges = np.arange(min(most, length)) * length // min(most, length)
        sizes = np.diff([*edges, length]).astype(np.float32)
        sums: NDArray[np.float32] = np.add.reduceat(values, edges, axis=axis)
        values = sums / (sizes[:, None] if axis == 1 else sizes)
    return values


def _choose(glances: Sequence[_Summary], count: int) -> list[tuple[int, float]]:
    """Choose pictures one by one: ``(place, gain)`` of each; of equals the first. After
    ``_COMPARED`` the rest follow by what they have left.
    """
    uncertainty = np.array([glance.uncertainty for glance in glances])
    likeness = np.zeros(len(glances))
    left = np.ones(len(glances), bool)
    chosen: list[tuple[int, float]] = []
    for _ in range(min(count, len(glances), _MAX_GREEDY_STEPS)):
        gains = np.where(left, uncertainty * (1 - likeness), -1)
        best = int(gains.argmax())
        chosen.append((best, float(gains[best])))
        left[best] = False
        likeness = np.maximum(
            likeness,
            [
                _similarity(glances[best], other) if left[k] else 0
                for k, other in enumerate(glances)
            ],
        )
    gains = uncertainty * (1 - likeness)
    rest = sorted(np.flatnonzero(left).tolist(), key=lambda place: -gains[place])
    return chosen + [(place, float(gains[place])) for place in rest[: max(0, count - len(chosen))]]


def _similarity(one: _Summary, other: _Summary) -> float:
    """Return how alike two pictures are, 0 to 1: as they look from afar, times the share of their
    layout that they have in common.
    """
    if one.layout.shape != other.layout.shape:
        return 0.0
    common = float(np.minimum(one.layout, other.layout).sum() / one.layout.sum())
    return max(0.0, float(one.look @ other.look)) * common
