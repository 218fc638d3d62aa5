"""Label images in Chromium as a person would who knows the true masks, and judge the model.

    python benchmarks/labelling_annotator.py FOLDER FOLD --work DIR [--minutes 10]
        [--starter COMMAND] [--parts PART ...]

FOLDER and FOLD are those of `generalise.py`: the annotator labels images of the part for
training, and models are judged on the block that is held out ("home" there).

The annotator paints five strokes per class in each image, with the mouse, accepts those regions
of the suggestion that look right, and paints strokes in the largest errors that are left. An image
that is nearly covered is done; the page chooses the next one. After some images a round trains,
and its model is judged. After the last one the annotator goes through the images once more,
because the first had no suggestion or a poor one: accepts, and paints in the largest errors. For
comparison, the same rounds train on whole true masks of images in random order. At the end,
the final training on the strokes is compared with as many minutes on all labels.

Rounds and trainings have the steps that their minutes give on two idle cores
(`labelling_training.py`), so a busy machine gives the same results. What is stored in
``results/labelling_FOLD.json`` is not computed again.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from generalise import FOLDS, Fold, run, split
from labelling import opened, to_screen, train_round
from labelling_training import judge
from PIL import Image
from record import RESULTS, commit, record
from scipy import ndimage

from useg.classes import IGNORE, ClassTable, write_classes
from useg.data.dataset import Dataset, Pair, read_label, read_pair_image
from useg.labelling import rounds
from useg.labelling.rounds import Suggestion
from useg.labelling.session import LabelSession
from useg.machine import describe_machine
from useg.scoring.metrics import regions

STROKES_PER_CLASS = 5
# Strokes in wrong regions, and regions to accept, each time that an image is looked at.
CORRECTIONS = 24
ACCEPTED = 24
# Least confidence, of 255, with which the page accepts a part of a region.
SURE = 230
# Share of what a click paints that has to be right; otherwise a person would undo it.
LOOKS_RIGHT = 0.95
# Share of an image that has to be painted for it to be done.
NEARLY_COVERED = 0.9
# A round trains after so many images.
ROUNDS_AT = (3, 5, 8, 11, 14, 17, 20)
TRAINING = [sys.executable, str(Path(__file__).with_name("labelling_training.py"))]


class Annotator:
    """Works on the page with the mouse, as a person would who knows the true masks."""

    def __init__(self, page: Any, seed: int = 0) -> None:
        self.page = page
        self.rng = np.random.default_rng(seed)
        self.num_strokes = 0
        self.num_accepted = 0

    def stroke(self, truth: np.ndarray, inside: np.ndarray, value: int) -> None:
        """Paint a short stroke within a region of the truth, along it, through ``inside``."""
        rows, columns = np.nonzero(inside)
        middle = self.rng.integers(len(rows))
        y, x = int(rows[middle]), int(columns[middle])
        across, reach = find_stroke(truth, x, y, value)
        down, reach_down = find_stroke(truth.T, y, x, value)
        start, end = (across[0], y), (across[1], y)
        if down[1] - down[0] > across[1] - across[0]:
            start, end, reach = (x, down[0]), (x, down[1]), reach_down
        self.page.evaluate(
            "([size, id]) => { const s = document.getElementById('size'); s.value = size;"
            "s.dispatchEvent(new Event('input'));"
            "document.querySelectorAll('#classes button')[id].click(); }",
            [2 * reach + 1, value],
        )
        self.page.keyboard.press("b")
        height, width = truth.shape
        self.page.mouse.move(*to_screen(self.page, width, height, *start))
        self.page.mouse.down()
        self.page.mouse.move(*to_screen(self.page, width, height, *end), steps=3)
        self.page.mouse.up()
        self.num_strokes += 1

    def scribble(self, truth: np.ndarray) -> None:
        """Paint five strokes per class."""
        for value in np.unique(truth[truth != IGNORE]):
            for _ in range(STROKES_PER_CLASS):
                self.stroke(truth, truth == value, int(value))

    def accept(self, truth: np.ndarray, painted: np.ndarray, shown: Suggestion) -> None:
        """Accept regions of the suggestion by a click into each, where what it paints looks right.

        Args:
            truth: True class ids ``(H, W)``.
            painted: What is painted, ``(H, W)``.
            shown: The suggestion.
        """
        height, width = truth.shape
        ids = enlarge(shown.ids, truth.shape)
        sure = enlarge(shown.confidence, truth.shape) >= SURE
        self.page.keyboard.press("r")
        for inside in largest_regions(ids, ACCEPTED):
            new = inside & sure & (painted == IGNORE)
            if is_right(truth[new], ids[new]):
                deep = np.pad(inside, 1)
                deep = ndimage.distance_transform_edt(deep)[1:-1, 1:-1]
                y, x = np.unravel_index(deep.argmax(), deep.shape)
                self.page.mouse.click(*to_screen(self.page, width, height, int(x), int(y)))
                self.num_accepted += 1

    def correct(self, truth: np.ndarray, painted: np.ndarray, shown: Suggestion) -> None:
        """Paint in the largest regions that are wrong, in what is painted or in the suggestion."""
        ids = np.where(painted != IGNORE, painted, enlarge(shown.ids, truth.shape))
        wrong = np.where((ids != truth) & (truth != IGNORE), truth, IGNORE)
        for inside in largest_regions(wrong, CORRECTIONS):
            self.stroke(truth, inside, int(truth[inside][0]))

    def paint_whole(self, k: int, truth: np.ndarray) -> None:
        """Send the whole true mask, through the page's own requests."""
        height, width = truth.shape
        self.page.evaluate(
            """async ([k, width, height, ids]) => {
                const server = await import('./server.js');
                const { revision } = await server.readMask(k);
                const body = Uint8Array.from(atob(ids), (each) => each.charCodeAt(0));
                await server.paintMask(k, { x: 0, y: 0, width, height }, body, revision);
            }""",
            [k, width, height, base64.b64encode(truth.tobytes()).decode()],
        )

    def open(self, name: str) -> None:
        self.page.evaluate(
            "(name) => [...document.querySelectorAll('#images button')]"
            ".find((each) => each.querySelector('.name').textContent === name).click()",
            name,
        )
        self.page.wait_for_selector(f"#image-name:text-is('{name}')")
        self.page.wait_for_selector("body[data-state=ready]")

    def leave(self, name: str, covered: float) -> None:
        """Go on to the next image; one that is nearly covered is done."""
        self.page.wait_for_selector("body[data-saved=true]")
        is_new = self.page.inner_text("#done") == "Done"
        self.page.click("#done" if is_new and covered >= NEARLY_COVERED else "#next")
        self.page.wait_for_selector(f"#image-name:not(:text-is('{name}'))")
        self.page.wait_for_selector("body[data-state=ready]")


def find_stroke(truth: np.ndarray, x: int, y: int, value: int) -> tuple[list[int], int]:
    """Return the columns between which a stroke along row ``y`` stays in its class.

    Also the number of pixels by which it is wider than one, on each side.
    """
    height, width = truth.shape
    ends = [x, x]
    for side, step in ((0, -1), (1, 1)):
        while (
            0 <= ends[side] + step < width
            and abs(ends[side] - x) < max(height, width) // 8
            and truth[y, ends[side] + step] == value
        ):
            ends[side] += step
    reach = 0
    span = slice(ends[0], ends[1] + 1)
    while (
        reach < min(min(height, width) // 40, (ends[1] - ends[0]) // 2)
        and y - reach - 1 >= 0
        and y + reach + 1 < height
        and (truth[y - reach - 1, span] == value).all()
        and (truth[y + reach + 1, span] == value).all()
    ):
        reach += 1
    return [ends[0] + reach, ends[1] - reach], reach


def largest_regions(ids: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yield the largest connected regions of equal ids, except ``IGNORE``."""
    numbers = regions(ids)
    sizes = np.bincount(numbers[ids != IGNORE], minlength=int(numbers.max()) + 1)
    for number in np.argsort(-sizes)[:count]:
        if sizes[number]:
            yield numbers == number


def is_right(truth: np.ndarray, ids: np.ndarray) -> bool:
    """Whether a suggested region looks right to somebody who knows the truth."""
    known = truth != IGNORE
    return bool(known.any() and (truth == ids)[known].mean() >= LOOKS_RIGHT)


def enlarge(ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows = np.arange(shape[0]) * ids.shape[0] // shape[0]
    return ids[rows][:, np.arange(shape[1]) * ids.shape[1] // shape[1]]


class Folder:
    """The pool of a data set as a folder of images without masks, and the true masks."""

    def __init__(self, place: Path, dataset: Dataset, pool: list[Pair]) -> None:
        self.images = place / "images"
        self.images.mkdir(parents=True)
        self.truths: dict[str, np.ndarray] = {}
        for pair in pool:
            name = f"{pair.image.stem}.png"
            image = read_pair_image(pair)
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(
                self.images / name
            )
            self.truths[name] = read_label(pair, dataset)
        table = ClassTable(dataset.classes.names, dataset.classes.colors, ignore=(IGNORE,))
        write_classes(place / "classes.toml", table)

    def covered(self, session: LabelSession, name: str) -> float:
        """Return the share of the pixels with a true class that are painted."""
        k = [each.name for each in session.folder.images].index(name)
        painted = session.folder.read(k)[0] != IGNORE
        return float(painted[self.truths[name] != IGNORE].mean())


def look(annotator: Annotator, session: LabelSession, folder: Folder, *, again: bool) -> None:
    """Label the image that the page shows, and leave it.

    Args:
        annotator: Paints.
        session: The session of the page.
        folder: The images, with their true masks.
        again: The image has its strokes already; only errors are left.
    """
    page = annotator.page
    name = page.inner_text("#image-name")
    k = [each.name for each in session.folder.images].index(name)
    suggestion = session.rounds.suggest(k)
    if suggestion:
        page.wait_for_selector(f"body[data-suggestion='{suggestion.round}']")
    truth = folder.truths[name]
    if not again:
        annotator.scribble(truth)
    if suggestion:
        for step in (annotator.accept, annotator.correct):
            page.wait_for_selector("body[data-saved=true]")
            step(truth, session.folder.read(k)[0], suggestion)
    annotator.leave(name, folder.covered(session, name))


def measure(
    annotator: Annotator,
    session: LabelSession,
    folder: Folder,
    judged: list[Pair],
    dataset: Dataset,
) -> dict[str, Any]:
    """Train a round on everything that is painted; return what was painted, its cost and score."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    train_round(session)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    newest = max(session.rounds.work.glob("round-*"), key=os.path.getmtime)
    touched = [each for each in session.folder.images if each.state != "empty"]
    painted = [folder.covered(session, each.name) for each in touched]
    return {
        "pictures": len(touched),
        "done": sum(each.state == "done" for each in touched),
        "strokes": annotator.num_strokes,
        "accepted_regions": annotator.num_accepted,
        "painted": round(float(np.mean(painted)), 3),
        "mean_iou": round(judge(newest, judged, dataset), 4),
        "steps": session.rounds.status.steps,
        "round_cpu_seconds": round(seconds, 1),
    }


def annotate(
    dataset: Dataset,
    judged: list[Pair],
    place: Path,
    store: Callable[[dict[str, Any]], None],
    *,
    whole: bool,
) -> None:
    """Label images of a data set in the page, and judge the model after each round.

    Args:
        dataset: The data set, with the images to label as its part for training.
        judged: The held-out images.
        place: An empty folder for the images and their masks.
        store: Takes a row of the curve.
        whole: Paint whole masks in random order instead of strokes in the page's order.
    """
    folder = Folder(place, dataset, list(dataset.of("train")))
    order = np.random.default_rng(0).permutation(sorted(folder.truths))
    with opened(folder.images, []) as (page, session):
        session.rounds.minutes = rounds.ROUND_MINUTES
        annotator = Annotator(page)
        for done in range(1, max(ROUNDS_AT) + 1):
            if whole:
                name = str(order[done - 1])
                k = [each.name for each in session.folder.images].index(name)
                annotator.paint_whole(k, folder.truths[name])
                session.set_done(k, done=True)
            else:
                look(annotator, session, folder, again=False)
            if done in ROUNDS_AT:
                store({"looks": 1, **measure(annotator, session, folder, judged, dataset)})
        if not whole:
            touched = [each.name for each in session.folder.images if each.state != "empty"]
            for name in touched:
                annotator.open(name)
                look(annotator, session, folder, again=True)
            store({"looks": 2, **measure(annotator, session, folder, judged, dataset)})


def train_properly(images: Path, out: Path, minutes: float) -> Any:
    """Train on a folder, in a process of its own."""
    command = [*TRAINING, "train", str(images), str(out), "--minutes", str(minutes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def train_on_all(folder: Path, fold: Fold, minutes: float) -> dict[str, Any]:
    """Train on all labels, as `generalise.py` does."""
    row = run(folder, fold, {}, minutes, 0, "")
    score = row["scores"]["home"]["mean_iou"]
    return {"mean_iou": round(score, 4), "steps": row["steps"], "cpu_seconds": row["cpu_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("fold", choices=FOLDS)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is painted")
    parser.add_argument("--minutes", type=float, default=10, help="of the final training")
    parser.add_argument("--round-minutes", type=float, default=rounds.ROUND_MINUTES)
    parser.add_argument("--parts", nargs="*", help="only these keys of the result")
    parser.add_argument("--starter", default="", help="command that starts each training")
    arguments = parser.parse_args()
    TRAINING[:0] = shlex.split(arguments.starter)
    rounds.ROUND_COMMAND = [*TRAINING, "round"]
    rounds.ROUND_MINUTES = arguments.round_minutes
    rounds.MIN_ROUND_STEPS = 1
    fold = FOLDS[arguments.fold]
    name = f"labelling_{arguments.fold.replace(' ', '_')}"
    path = RESULTS / f"{name}.json"
    dataset, scored = split(arguments.folder, fold)
    judged = [pair for pair in dataset.pairs if scored.get(pair.image) == "home"]
    about = {
        "fold": arguments.fold,
        "pool": len(dataset.of("train")),
        "judged": len(judged),
        "round_minutes": arguments.round_minutes,
        "machine": describe_machine(),
    }

    def stored() -> dict[str, Any]:
        """Return what is stored, without its commit and date: those of the newest part count."""
        content = json.loads(path.read_text()) if path.exists() else {}
        return {key: value for key, value in content.items() if key not in ("commit", "date")}

    def store(key: str, content: Any) -> None:
        """Add to what other processes have stored meanwhile."""
        measured = stored() | about
        if "pictures" in content:
            content = [*measured.get(key, []), content]
        print(key, json.dumps(content), flush=True)
        record(name, measured | {key: content})

    def annotate_once(key: str) -> None:
        whole = key == "whole_masks"
        if len(stored().get(key, [])) < len(ROUNDS_AT) + (not whole):
            assert key not in stored(), f"{key} is half measured; remove it from {path}"
            place = arguments.work / key
            annotate(dataset, judged, place, lambda row: store(key, row), whole=whole)

    def train_once(key: str, train: Callable[[], dict[str, Any]]) -> None:
        if key not in stored():
            store(key, {"minutes": arguments.minutes, "commit": commit(), **train()})

    def train_on_strokes() -> dict[str, Any]:
        out = arguments.work / "trained"
        trained = train_properly(arguments.work / "strokes" / "images", out, arguments.minutes)
        return {"mean_iou": round(judge(out, judged, dataset), 4), **trained}

    parts: dict[str, Callable[[], None]] = {
        "strokes": lambda: annotate_once("strokes"),
        "trained_on_all_labels": lambda: train_once(
            "trained_on_all_labels", lambda: train_on_all(arguments.folder, fold, arguments.minutes)
        ),
        "trained_on_strokes": lambda: train_once("trained_on_strokes", train_on_strokes),
        "whole_masks": lambda: annotate_once("whole_masks"),
    }
    for part in arguments.parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
