"""Two browsers on one folder: whoever paints last has seen everything that was painted before."""

from __future__ import annotations

import random

import numpy as np
import pytest
from made_labelling import LabelSite

from useg.classes import IGNORE
from useg.labelling import folder

STROKES = 40


class Browser:
    """Paints as the page does: on its own copy of the mask, of which it sends whole rectangles."""

    def __init__(self, site: LabelSite) -> None:
        self.site = site
        self.key = ""
        self.refusals: list[int] = []
        self.reload()

    def reload(self) -> None:
        read = self.site.ask("/images/0/mask")
        self.ids = np.frombuffer(read.content, np.uint8).reshape(48, 64).copy()
        self.revision = read.headers["x-revision"]

    def join(self, take: bool) -> bool:
        may_paint = self.site.join(take)
        self.key = self.site.key
        return may_paint

    def stroke(self, x: int, y: int, value: int) -> None:
        """Paint a dot and send a rectangle around it, until it is accepted."""
        while True:
            self.ids[y, x] = value
            part = self.ids[: y + 1, : x + 1]
            self.site.key = self.key
            answer = self.site.paint(0, part, revision=self.revision)
            if answer.status == 200:
                self.revision = answer.json["revision"]
                return
            self.refusals.append(answer.status)
            if answer.status == 423:
                assert self.join(take=True)
            else:
                assert answer.status == 409
                self.reload()


def paint_in_turns(site: LabelSite) -> list[Browser]:
    """Let two browsers paint in any order; compare the mask with the strokes in their order."""
    chance = random.Random(0)
    browsers = [Browser(site), Browser(site)]
    assert not browsers[1].join(take=False)
    expected = np.full((48, 64), IGNORE, np.uint8)
    for _ in range(STROKES):
        x, y, value = chance.randrange(64), chance.randrange(48), chance.randrange(2)
        chance.choice(browsers).stroke(x, y, value)
        expected[y, x] = value
    np.testing.assert_array_equal(site.session.folder.read(0)[0], expected)
    return browsers


def test_no_stroke_is_lost_when_two_browsers_take_over_from_each_other(site: LabelSite) -> None:
    browsers = paint_in_turns(site)
    for browser in browsers:
        # Each was told that the other one paints, and that the mask is a newer one.
        assert {423, 409} <= set(browser.refusals)


def test_without_revisions_an_older_mask_overwrites_a_newer_one(
    site: LabelSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "file_revision", lambda path: "1" if path.exists() else "0")
    with pytest.raises(AssertionError):
        paint_in_turns(site)
