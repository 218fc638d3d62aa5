"""Take the images of docs/labelling.md from the page of today, with made street scenes.

    python benchmarks/labelling_screenshots.py [--out FOLDER] [--all]

It does what a newcomer does: names classes, paints, waits for rounds, accepts, trains. With --all
it also takes each step on a phone, a laptop and a 4K screen, light and dark, as PNG.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from labelling import train_round
from labelling_annotator import Annotator
from PIL import Image
from record import ROOT

from useg.scenes.generate import make_scene

sys.path.append(str(ROOT / "tests"))
from chromium import browsing
from made_labelling import LabelSite, labelling

CLASSES = ("background", "building", "road", "sidewalk", "car")
# CARLA's ids of the scenes -> those classes.
IDS = np.array([0, 1, 0, 0, 0, 0, 2, 2, 3, 0, 4, 0, 0], np.uint8)
NUM_IMAGES, SIZE = 12, (480, 360)
SCREENS = {"phone": (390, 844), "laptop": (1366, 768), "4k": (3840, 2160)}


class Camera:
    """Takes images of the page; with ``on_all`` on every screen, light and dark."""

    def __init__(self, page: Any, out: Path, *, on_all: bool) -> None:
        self.page, self.out, self.on_all = page, out, on_all

    def show(self, screen: str, scheme: str) -> None:
        width, height = SCREENS[screen]
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)
        self.page.wait_for_timeout(300)

    def take(self, name: str) -> None:
        self.page.mouse.move(5, 5)
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=self.out / f"{name}.jpg", type="jpeg", quality=44)
        for screen in SCREENS if self.on_all else ():
            for scheme in ("light", "dark"):
                self.show(screen, scheme)
                self.page.screenshot(path=self.out / f"{name}-{screen}-{scheme}.png")
        self.show("laptop", "light")


def walk(site: LabelSite, truths: dict[str, np.ndarray], camera: Camera) -> None:
    """Go the way of somebody who sees the page for the first time."""
    page = camera.page
    camera.show("laptop", "light")
    page.goto(site.url)
    page.wait_for_selector("#classes-dialog[open]")
    for k, name in enumerate(CLASSES):
        if k > 1:
            page.click("#add-class")
        page.locator("#class-rows input[type=text]").nth(k).fill(name)
    camera.take("1")
    page.click("#classes-dialog button.primary")
    page.wait_for_selector("body[data-ready]")
    annotator = Annotator(page)
    for number in range(1, 7):
        page.wait_for_selector("body[data-state=ready]")
        name = page.inner_text("#image-name")
        annotator.scribble(truths[name])
        page.wait_for_selector("body[data-saved=true]")
        if number == 1:
            camera.take("2")
        if number in (3, 6):
            train_round(site.session)
        if number > 3:
            page.keyboard.press("a")
            page.wait_for_selector("body[data-saved=true]")
            page.click("#done")
        else:
            page.click("#next")
        page.wait_for_selector(f"#image-name:not(:text-is('{name}'))")
    page.wait_for_selector(f"body[data-suggestion='{site.session.rounds.number}']")
    camera.take("3")
    page.keyboard.press("a")
    page.wait_for_selector("body[data-saved=true]")
    camera.take("4")
    page.fill("#minutes", "1")
    page.click("#train")
    page.wait_for_selector("#training:not([hidden])")
    page.wait_for_timeout(3000)
    camera.take("5")
    page.click("#train")
    camera.show("phone", "dark")
    page.screenshot(path=camera.out / "phone.jpg", type="jpeg", quality=44)


def main() -> None:
    """Make the images, open the page, and go the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "labelling")
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place, browsing() as browser:
        images = Path(place, "street", "images")
        images.mkdir(parents=True)
        truths = {}
        for k in range(NUM_IMAGES):
            scene = make_scene(k, SIZE)
            Image.fromarray(scene.image).save(images / f"street_{k:02d}.png")
            truths[f"street_{k:02d}.png"] = IDS[scene.label]
        with labelling(images, ()) as site:
            page = browser.new_page()
            page.set_default_timeout(600_000)
            walk(site, truths, Camera(page, arguments.out, on_all=arguments.all))


if __name__ == "__main__":
    main()
