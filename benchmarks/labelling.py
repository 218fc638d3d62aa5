"""Measure the labelling page in Chromium: frames while painting, and a scripted annotator.

    python benchmarks/labelling.py frames [--megapixels 20]
    python benchmarks/labelling.py annotate DATA [--pictures 20] [--minutes 10]

`frames` paints over a large made picture and stores the times between frames and those of the
page's own work. `annotate` labels pictures of DATA as a person would, with strokes from the true
masks: five strokes per class in each picture, then corrections of the largest errors of the
suggestion. It stores the score of the model in the loop on a held-out block after each picture, the
seconds of each round, and, for comparison, the score of a model that was trained with all labels.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import ROOT, record

from useg.classes import IGNORE, ClassTable, write_classes
from useg.data.dataset import Dataset, Pair, read_label, read_pair_image
from useg.data.layouts import find_dataset
from useg.inference.predictor import load
from useg.labelling.session import LabelSession
from useg.machine import describe_machine
from useg.scoring.metrics import confusion, mean_iou, tally
from useg.scoring.regions import regions

sys.path.append(str(ROOT / "tests"))
from chromium import browsing
from made_labelling import labelling

STROKES_PER_CLASS = 5
CORRECTIONS = 12
# Times between frames, and the milliseconds of the page's own work in each.
COUNT_FRAMES = """
self.frames = []; self.work = [];
const original = self.requestAnimationFrame.bind(self);
self.requestAnimationFrame = (task) => original((now) => {
    const began = performance.now(); task(now); work.push(performance.now() - began);
});
const tick = (now) => { frames.push(now); original(tick); };
original(tick);
"""


@contextlib.contextmanager
def opened(images: Path, classes: list[str]) -> Iterator[tuple[Any, LabelSession]]:
    """Serve a folder whose strokes start rounds, and open its page."""
    with labelling(images, tuple(classes)) as site:
        site.session.rounds.paused = False
        with browsing() as browser:
            context = browser.new_context(viewport={"width": 1366, "height": 768}, bypass_csp=True)
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.add_init_script(COUNT_FRAMES)
            page.goto(site.url)
            page.wait_for_selector("body[data-ready]")
            yield page, site.session


def to_screen(page: Any, width: int, height: int, x: float, y: float) -> tuple[float, float]:
    """Return where a pixel of the picture is on the screen, when all of it is on view."""
    box = page.locator("#stage").bounding_box()
    scale = min(box["width"] / width, box["height"] / height)
    left = box["x"] + (box["width"] - width * scale) / 2
    top = box["y"] + (box["height"] - height * scale) / 2
    return left + (x + 0.5) * scale, top + (y + 0.5) * scale


def measure_frames(megapixels: float) -> dict[str, Any]:
    """Paint over a large picture."""
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    width = round(1.5 * height)
    with tempfile.TemporaryDirectory() as place:
        images = Path(place, "images")
        images.mkdir()
        coarse = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(images / "large.jpg", quality=90)
        with opened(images, ["ground", "thing"]) as (page, session):
            page.fill("#size", "200")
            page.wait_for_timeout(2000)
            results = {}
            for name, key in (("whole_picture", "0"), ("zoomed_in", "+")):
                for _ in range(1 if key == "0" else 5):
                    page.keyboard.press(key)
                page.wait_for_timeout(1000)
                page.evaluate("frames.length = work.length = 0")
                page.mouse.move(400, 200)
                page.mouse.down()
                for k in range(40):
                    page.mouse.move(400 + 14 * k, 200 + 150 * (1 + np.sin(k / 3)), steps=4)
                page.mouse.up()
                between, work = page.evaluate(
                    "[frames.slice(1).map((at, k) => at - frames[k]), work]"
                )
                results[name] = {
                    "frames": len(between),
                    "median_between_ms": float(np.median(between)),
                    "p95_between_ms": float(np.percentile(between, 95)),
                    "median_work_ms": float(np.median(work)),
                    "p95_work_ms": float(np.percentile(work, 95)),
                }
                page.wait_for_selector("body[data-saved=true]")
                assert (session.folder.read(0)[0] != IGNORE).any(), "nothing was painted"
    return {"picture": [width, height], **results}


class Annotator:
    """Paints strokes from true masks with the mouse."""

    def __init__(self, page: Any, seed: int = 0) -> None:
        self.page = page
        self.rng = np.random.default_rng(seed)
        self.num_strokes = 0

    def stroke(self, truth: np.ndarray, inside: np.ndarray, value: int) -> None:
        """Paint a short stroke within a region of the truth, which holds its middle."""
        height, width = truth.shape
        rows, columns = np.nonzero(inside)
        middle = self.rng.integers(len(rows))
        y, x = int(rows[middle]), int(columns[middle])
        ends = [x, x]
        for side, step in ((0, -1), (1, 1)):
            while (
                0 <= ends[side] + step < width
                and abs(ends[side] - x) < width // 8
                and truth[y, ends[side] + step] == value
            ):
                ends[side] += step
        reach = 0
        span = slice(ends[0], ends[1] + 1)
        while (
            reach < height // 40
            and y - reach - 1 >= 0
            and y + reach + 1 < height
            and (truth[y - reach - 1, span] == value).all()
            and (truth[y + reach + 1, span] == value).all()
        ):
            reach += 1
        self.page.evaluate(
            "([size, id]) => { const s = document.getElementById('size'); s.value = size;"
            "s.dispatchEvent(new Event('input'));"
            "document.querySelectorAll('#classes button')[id].click(); }",
            [2 * reach + 1, value],
        )
        start = to_screen(self.page, width, height, min(ends[0] + reach, x), y)
        end = to_screen(self.page, width, height, max(ends[1] - reach, x), y)
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*end, steps=3)
        self.page.mouse.up()
        self.num_strokes += 1

    def scribble(self, truth: np.ndarray) -> None:
        """Paint five strokes per class."""
        for value in np.unique(truth[truth != IGNORE]):
            for _ in range(STROKES_PER_CLASS):
                self.stroke(truth, truth == value, int(value))

    def correct(self, truth: np.ndarray, ids: np.ndarray) -> None:
        """Paint in the largest regions in which the suggestion is wrong, then accept the rest."""
        wrong = np.where((ids != truth) & (truth != IGNORE), truth, IGNORE)
        numbers = regions(wrong)
        sizes = np.bincount(numbers[wrong != IGNORE], minlength=int(numbers.max()) + 1)
        for number in np.argsort(-sizes)[:CORRECTIONS]:
            if sizes[number]:
                inside = numbers == number
                self.stroke(truth, inside, int(truth[inside][0]))
        self.page.click("#accept-all")

    def wait_saved(self) -> None:
        self.page.wait_for_selector("body[data-saved=true]")


def held_out(dataset: Dataset) -> tuple[list[Pair], list[Pair]]:
    """Divide the pairs into those to label and a block that is held out, with a gap."""
    pairs = list(dataset.pairs)
    end = round(0.75 * len(pairs))
    return pairs[: end - len(pairs) // 20], pairs[end:]


def judge(run: Path, pairs: list[Pair], dataset: Dataset) -> float:
    """Return the mean IoU of a model on pairs."""
    predictor = load(run)
    count = len(dataset.classes)
    total = np.zeros((count, count), np.int64)
    for pair in pairs:
        image, label = read_pair_image(pair), read_label(pair, dataset)
        total += confusion(predictor(image), label, count)
    return float(mean_iou(tally(total)))


def annotate(data: Path, count: int, wait_minutes: float) -> dict[str, Any]:
    """Label pictures of a data set, and judge the model after each of them."""
    dataset = find_dataset(data)
    pool, judged = held_out(dataset)
    judged = judged[:: max(1, len(judged) // 24)]
    chosen = pool[:: max(1, len(pool) // count)][:count]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        images = Path(place, "images")
        images.mkdir()
        truths = {}
        for pair in chosen:
            name = f"{pair.image.stem}.png"
            image = read_pair_image(pair)
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(images / name)
            truths[name] = read_label(pair, dataset)
        write_classes(
            Path(place, "classes.toml"),
            ClassTable(dataset.classes.names, dataset.classes.colors, ignore=(IGNORE,)),
        )
        began = time.monotonic()
        with opened(images, []) as (page, session):
            annotator = Annotator(page)
            for done in range(1, count + 1):
                name = page.inner_text("#picture-name")
                k = [each.name for each in session.folder.pictures].index(name)
                truth = truths[name]
                suggestion = session.rounds.suggest(k)
                if suggestion is None:
                    annotator.scribble(truth)
                else:
                    page.wait_for_function(f"document.body.dataset.round >= {suggestion.round}")
                    annotator.correct(truth, enlarge(suggestion.ids, truth.shape))
                annotator.wait_saved()
                if done < count:
                    page.click("#done")
                    page.wait_for_selector(f"#picture-name:not(:text-is('{name}'))")
                if done >= 3:
                    wait_for_round(session, wait_minutes, forced=done == 3)
                    newest = max(
                        session.rounds.work.glob("round-*/model.safetensors"),
                        key=os.path.getmtime,
                    ).parent
                    rows.append(
                        {
                            "pictures": done,
                            "strokes": annotator.num_strokes,
                            "minutes": (time.monotonic() - began) / 60,
                            "mean_iou": judge(newest, judged, dataset),
                            "round_seconds": session.rounds.status.seconds[-1:],
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
    return {"data": data.name, "judged": len(judged), "curve": rows}


def enlarge(ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows = np.arange(shape[0]) * ids.shape[0] // shape[0]
    return ids[rows][:, np.arange(shape[1]) * ids.shape[1] // shape[1]]


def wait_for_round(session: LabelSession, minutes: float, *, forced: bool) -> None:
    """Wait until a round has trained on everything that is painted."""
    if forced and session.rounds.waits_for():
        session.rounds.train_now()
    before, ends = session.rounds.number, time.monotonic() + 60 * minutes
    while session.rounds.number == before and time.monotonic() < ends:
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    frames = jobs.add_parser("frames")
    frames.add_argument("--megapixels", type=float, default=20)
    annotating = jobs.add_parser("annotate")
    annotating.add_argument("data", type=Path)
    annotating.add_argument("--pictures", type=int, default=20)
    annotating.add_argument("--wait", type=float, default=5, help="most minutes for a round")
    arguments = parser.parse_args()
    if arguments.job == "frames":
        name, measured = "labelling_frames", measure_frames(arguments.megapixels)
    else:
        name = f"labelling_{arguments.data.name}"
        measured = annotate(arguments.data, arguments.pictures, arguments.wait)
    load = os.getloadavg()[0]
    print(record(name, {"machine": describe_machine(), "load": load, **measured}))


if __name__ == "__main__":
    main()
