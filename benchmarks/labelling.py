"""Measure the frames of the labelling page in Chromium while somebody paints.

    python benchmarks/labelling.py [--megapixels 20]

It paints over a large made image and stores the times between frames and those of the page's own
work. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
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

from useg.classes import IGNORE
from useg.labelling.session import LabelSession
from useg.machine import describe_machine

sys.path.append(str(ROOT / "tests"))
from chromium import browsing
from made_labelling import labelling

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
def opened(
    images: Path, classes: list[str], script: str = ""
) -> Iterator[tuple[Any, LabelSession]]:
    """Serve a folder whose rounds wait, and open its page."""
    with labelling(images, tuple(classes)) as site, browsing() as browser:
        context = browser.new_context(viewport={"width": 1366, "height": 768}, bypass_csp=True)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.add_init_script(script)
        page.goto(site.url)
        page.wait_for_selector("body[data-ready]")
        yield page, site.session


def train_round(session: LabelSession) -> None:
    """Let a round train on everything that is painted."""
    rounds = session.rounds
    before = rounds.number
    rounds.paused = False
    rounds.train_now()
    while rounds.number == before or rounds.status.phase != "waiting":
        assert not rounds.status.error, rounds.status.error
        time.sleep(0.2)
    rounds.paused = True


def to_screen(page: Any, width: int, height: int, x: float, y: float) -> tuple[float, float]:
    """Return where a pixel of the image is on the screen, when all of it is on view."""
    box = page.locator("#stage").bounding_box()
    scale = min(box["width"] / width, box["height"] / height)
    left = box["x"] + (box["width"] - width * scale) / 2
    top = box["y"] + (box["height"] - height * scale) / 2
    return left + (x + 0.5) * scale, top + (y + 0.5) * scale


def measure_frames(megapixels: float) -> dict[str, Any]:
    """Paint over a large image."""
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    width = round(1.5 * height)
    with tempfile.TemporaryDirectory() as place:
        images = Path(place, "images")
        images.mkdir()
        coarse = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(images / "large.jpg", quality=90)
        with opened(images, ["ground", "thing"], COUNT_FRAMES) as (page, session):
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megapixels", type=float, default=20)
    measured = measure_frames(parser.parse_args().megapixels)
    load = os.getloadavg()[0]
    print(record("labelling_frames", {"machine": describe_machine(), "load": load, **measured}))


if __name__ == "__main__":
    main()
