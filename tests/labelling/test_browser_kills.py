"""A killed browser loses no stroke that its page has saved, and a new one shows the same.

With ``USEG_SOAK`` it is killed 50 times, and no stroke may be lost that is older than a second.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, FLAGS
from made_labelling import LabelSite, labelling, write_images
from PIL import Image
from waiting import eventually

from useg.classes import IGNORE
from useg.labelling.folder import LabelFolder
from useg.labelling.mask_files import find_paths

playwright = pytest.importorskip("playwright.sync_api")
if not CHROMIUM:
    pytest.skip("there is no Chromium here", allow_module_level=True)

SOAK = os.environ.get("USEG_SOAK") == "1"
KILLS = 50 if SOAK else 1
# A kill comes at most so many seconds after the first stroke.
LATEST_KILL = 2.0
SIZE = (1280, 960)
# Each stroke has a square of its own, of so many pixels a side.
CELL = 20
# A stroke reaches so far to the left and right of the middle of its cell.
REACH = 4
# A page that calls strokes saved which it has not sent.
FORGETFUL = """
const send = self.fetch.bind(self);
self.fetch = (path, options = {}) => options.method === "PATCH"
    ? Promise.resolve(Response.json({ revision: "1", state: "scribbled" }))
    : send(path, options);
"""


@contextlib.contextmanager
def killable(address: str, script: str = "") -> Iterator[tuple[Any, int]]:
    """The page in a browser that is a process group of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, *options, "--window-size=1300,900", "about:blank"],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        listens = Path(profile, "DevToolsActivePort")
        try:
            eventually(lambda: listens.exists() and "\n" in listens.read_text())
            port = listens.read_text().split()[0]
            with playwright.sync_playwright() as running:
                browser = running.chromium.connect_over_cdp(f"http://127.0.0.1:{port}")
                page = browser.contexts[0].pages[0]
                page.set_default_timeout(60_000)
                page.add_init_script(script)
                page.goto(address)
                page.wait_for_selector("body[data-ready]")
                # The server has not noticed yet that the browser before it is dead.
                if page.locator("#editor-dialog[open]").count():
                    page.click("#take-over")
                    page.wait_for_selector("#saved:text-is('Saved')")
                page.wait_for_selector("body[data-state=ready]")
                yield page, process.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def middle_of(number: int) -> tuple[int, int]:
    """Column and row of the middle of a cell; they are used from left to right, from the top."""
    columns = SIZE[0] // CELL
    return number % columns * CELL + CELL // 2, number // columns * CELL + CELL // 2


@dataclass(frozen=True)
class Stage:
    """Where the whole image is: its scale, its corner on the stage, and the stage's own."""

    scale: float
    left: float
    top: float
    x: float
    y: float

    @classmethod
    def of(cls, page: Any) -> Stage:
        box = page.locator("#stage").bounding_box()
        scale = min(box["width"] / SIZE[0], box["height"] / SIZE[1])
        left, top = (box["width"] - SIZE[0] * scale) / 2, (box["height"] - SIZE[1] * scale) / 2
        return cls(scale, left, top, box["x"], box["y"])

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the image is on the stage."""
        return self.left + (x + 0.5) * self.scale, self.top + (y + 0.5) * self.scale

    def on_screen(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the image is on the screen."""
        along, down = self.place(x, y)
        return self.x + along, self.y + down


def shown_at(page: Any, places: list[tuple[int, int]]) -> list[int]:
    """The classes that the page shows at pixels of the image; the first one is dark."""
    stage = Stage.of(page)
    colors = page.evaluate(
        "(places) => places.map(([x, y]) => [...document.getElementById('mask').getContext('2d')"
        ".getImageData(x, y, 1, 1).data])",
        [[int(at) for at in stage.place(x, y)] for x, y in places],
    )
    return [int(red > 128) if opacity else IGNORE for red, _, _, opacity in colors]


@dataclass
class Stroke:
    """A stroke in its cell: column and row of its middle, class, when it ended."""

    x: int
    y: int
    value: int
    ended: float = float("inf")

    @property
    def line(self) -> tuple[int, slice]:
        return self.y, slice(self.x - REACH, self.x + REACH + 1)

    @property
    def cell(self) -> tuple[slice, slice]:
        half = CELL // 2
        return slice(self.y - half, self.y + half), slice(self.x - half, self.x + half)


class Painter:
    """Paints strokes side by side until the browser is killed, and knows which must be there."""

    def __init__(self, site: LabelSite, images: Path, script: str = "") -> None:
        self.site, self.images, self.script = site, images, script
        self.strokes: list[Stroke] = []
        self.num_cells = 0
        # The first strokes are those that the page called saved.
        self.num_saved = 0
        # How many seconds before a kill the lost strokes had ended.
        self.lost: list[float] = []
        self.parts: list[Stroke] = []

    def paint_until_killed(self) -> float:
        """Paint until a thread kills the browser, at any moment; return when."""
        killed = []
        with killable(self.site.url, self.script) as (page, group):
            self.check_page(page)
            page.fill("#size", "5")
            stage = Stage.of(page)

            def kill() -> None:
                time.sleep(random.uniform(0, LATEST_KILL))
                killed.append(time.monotonic())
                os.killpg(group, signal.SIGKILL)

            killer = threading.Thread(target=kill)
            self.paint(page, stage)
            page.wait_for_selector("body[data-saved=true]")
            self.num_saved = len(self.strokes)
            killer.start()
            with contextlib.suppress(playwright.Error):
                while True:
                    self.paint(page, stage)
            killer.join(60)
        return killed[0]

    def paint(self, page: Any, stage: Stage) -> None:
        """Paint a short line, and look whether the page says that all are saved."""
        x, y = middle_of(self.num_cells)
        stroke = Stroke(x, y, random.randrange(2))
        self.num_cells += 1
        page.keyboard.press(str(stroke.value + 1))
        self.strokes.append(stroke)
        page.mouse.move(*stage.on_screen(x - REACH, y))
        page.mouse.down()
        page.mouse.move(*stage.on_screen(x + REACH, y), steps=3)
        page.mouse.up()
        stroke.ended = time.monotonic()
        if page.evaluate("document.body.dataset.saved === 'true'"):
            self.num_saved = len(self.strokes)

    def check_files(self, killed: float) -> None:
        """Check that the mask is whole, and has the strokes that were saved and nothing else."""
        with Image.open(self.images.parent / "masks" / "p0.png") as whole:
            whole.load()
        label = LabelFolder(find_paths(self.images)).read(0)[0]
        kept = []
        rest = label.copy()
        for number, stroke in enumerate(self.strokes):
            rest[stroke.cell] = IGNORE
            if (label[stroke.line] == stroke.value).all():
                kept.append(stroke)
                continue
            assert number >= self.num_saved, (stroke, label[stroke.line])
            assert np.isin(label[stroke.cell], [stroke.value, IGNORE]).all()
            self.lost.append(killed - stroke.ended)
            assert not SOAK or self.lost[-1] < 1
        # What was cut off may be there in part, this time and later.
        self.parts = [*self.parts, *(each for each in self.strokes if each not in kept)]
        for stroke in self.parts:
            rest[stroke.cell] = IGNORE
        assert (rest == IGNORE).all()
        self.strokes, self.num_saved = kept, len(kept)

    def check_page(self, page: Any) -> None:
        """Check that a page shows what the mask has in each cell, and in some that are empty."""
        label = self.site.session.folder.read(0)[0]
        # Of a stroke that was cut off, the middle may be the last pixel.
        cut_off = {(each.x, each.y) for each in self.parts}
        places = [middle_of(number) for number in range(self.num_cells + 3)]
        places = [place for place in places if place not in cut_off]
        expected = [int(label[y, x]) for x, y in places]
        eventually(lambda: shown_at(page, places) == expected)


def test_a_killed_browser_loses_no_saved_stroke(tmp_path: Path) -> None:
    random.seed(0)
    images = write_images(tmp_path, 1, SIZE)
    with labelling(images) as site:
        painter = Painter(site, images)
        for _ in range(KILLS):
            painter.check_files(painter.paint_until_killed())
        with killable(site.url) as (page, _):
            painter.check_page(page)
    print(f"{KILLS} kills, {painter.num_cells} strokes, lost after", painter.lost)


def test_a_page_that_says_saved_too_early_is_found(tmp_path: Path) -> None:
    random.seed(0)
    images = write_images(tmp_path, 1, SIZE)
    with labelling(images) as site:
        painter = Painter(site, images, FORGETFUL)
        killed = painter.paint_until_killed()
        with pytest.raises((AssertionError, FileNotFoundError)):
            painter.check_files(killed)
