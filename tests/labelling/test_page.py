"""The labelling page in a real browser: what is painted there is what the files hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, browsing, violations
from made_labelling import LabelSite, labelling, scene, write_images
from numpy.typing import NDArray
from waiting import eventually

from useg.classes import IGNORE
from useg.labelling.rounds import Suggestion

pytest.importorskip("playwright.sync_api")
if not CHROMIUM:
    pytest.skip("there is no Chromium here", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as started:
        yield started


@pytest.fixture
def site(tmp_path: Path) -> Iterator[LabelSite]:
    with labelling(write_images(tmp_path)) as running:
        yield running


def opened(browser: Any, site: LabelSite, **options: Any) -> Any:
    """A fresh page; ``troubles`` collects its errors and its requests to other hosts."""
    page = browser.new_context(**{"viewport": {"width": 1300, "height": 800}, **options}).new_page()
    page.set_default_timeout(20_000)
    page.troubles = []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on(
        "request",
        lambda request: (
            request.url.startswith((f"http://127.0.0.1:{site.port}/", "blob:"))
            or page.troubles.append(request.url)
        ),
    )
    page.goto(site.url)
    page.wait_for_selector("body[data-ready]")
    return page


@pytest.fixture
def page(browser: Any, site: LabelSite) -> Iterator[Any]:
    shown = opened(browser, site)
    yield shown
    assert shown.troubles == []
    shown.context.close()


def place(page: Any, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image of 64x48 is on the screen, when all of it is on view."""
    box = page.locator("#stage").bounding_box()
    scale = min(box["width"] / 64, box["height"] / 48)
    left = box["x"] + (box["width"] - 64 * scale) / 2
    top = box["y"] + (box["height"] - 48 * scale) / 2
    return left + (x + 0.5) * scale, top + (y + 0.5) * scale


def drag(page: Any, *points: tuple[float, float]) -> None:
    page.mouse.move(*place(page, *points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*place(page, *point), steps=4)
    page.mouse.up()


def saved(page: Any, site: LabelSite, k: int = 0) -> np.ndarray:
    """The mask on disk, after everything is saved."""
    page.wait_for_selector("body[data-saved=true]")
    page.wait_for_selector("#saved:text-is('Saved')")
    return site.session.folder.read(k)[0]


def test_strokes_of_a_brush_are_saved_undone_and_erased(page: Any, site: LabelSite) -> None:
    page.fill("#size", "5")
    page.keyboard.press("2")
    drag(page, (10, 10), (30, 10))
    expected = np.full((48, 64), IGNORE, np.uint8)
    expected[8:13, 10:31] = 1
    first = saved(page, site)
    # Round ends reach a little farther.
    assert (first[8:13, 10:31] == 1).all()
    assert 105 <= (first == 1).sum() <= 105 + 16
    page.keyboard.press("1")
    drag(page, (40, 30), (50, 40))
    second = saved(page, site)
    assert (second == 0).any()
    assert ((second == 1) == (first == 1)).all()
    page.keyboard.press("Control+z")
    np.testing.assert_array_equal(saved(page, site), first)
    page.keyboard.press("Control+y")
    np.testing.assert_array_equal(saved(page, site), second)
    page.keyboard.press("e")
    drag(page, (10, 10), (30, 10))
    assert not (saved(page, site) == 1).any()


def test_polygon_line_fill_and_smart_fill_paint_the_class(page: Any, site: LabelSite) -> None:
    label = scene(0)[1]
    rows, columns = np.nonzero(label)
    middle = (float(columns.mean()), float(rows.mean()))
    page.keyboard.press("2")
    page.keyboard.press("f")
    page.mouse.click(*place(page, *middle))
    np.testing.assert_array_equal(saved(page, site) == 1, label == 1)
    page.keyboard.press("1")
    page.keyboard.press("p")
    for corner in ((50, 2), (62, 2), (62, 14), (50, 14)):
        page.mouse.click(*place(page, *corner))
    page.keyboard.press("Enter")
    found = saved(page, site)
    assert (found[3:13, 51:61] == 0).all()
    page.keyboard.press("l")
    page.fill("#size", "3")
    drag(page, (2, 44), (60, 44))
    assert (saved(page, site)[43:46, 3:60] == 0).all()
    before = saved(page, site).copy()
    page.keyboard.press("s")
    page.mouse.click(*place(page, 30, 38))
    eventually(lambda: (saved(page, site) != before).any())
    after = saved(page, site)
    assert ((after == before) | (after == 0)).all()


@pytest.fixture
def suggested(page: Any, site: LabelSite, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    """Suggest the true classes of the first image, with little confidence in every third row."""
    ids = scene(0)[1]
    confidence = np.full_like(ids, 240)
    confidence[::3] = 200
    suggestion = Suggestion(ids, confidence, np.zeros_like(ids), 1)
    monkeypatch.setattr(type(site.session.rounds), "has_model", True)
    monkeypatch.setattr(site.session.rounds, "suggest", lambda k: suggestion)
    site.session.rounds.number = 1
    page.wait_for_selector("body[data-round='1']")
    return ids


def test_a_suggestion_is_accepted_only_where_nothing_is_painted(
    page: Any, site: LabelSite, suggested: NDArray[np.uint8]
) -> None:
    page.fill("#size", "9")
    page.keyboard.press("2")
    drag(page, (5, 44), (20, 44))
    painted = saved(page, site) != IGNORE
    page.click("#accept-all")
    found = saved(page, site)
    np.testing.assert_array_equal(found, np.where(painted, 1, suggested))
    page.click("#done")
    page.wait_for_selector("#image-name:not(:text-is('p0.png'))")
    assert site.session.folder.images[0].state == "done"


def test_a_class_or_a_region_is_accepted_where_the_model_is_sure(
    page: Any, site: LabelSite, suggested: NDArray[np.uint8]
) -> None:
    sure = np.arange(len(suggested))[:, None] % 3 > 0
    page.keyboard.press("2")
    page.click("#accept-class")
    expected = np.where((suggested == 1) & sure, 1, IGNORE)
    np.testing.assert_array_equal(saved(page, site), expected)
    page.keyboard.press("r")
    page.mouse.click(*place(page, 2, 2))
    assert suggested[2, 2] == 0
    np.testing.assert_array_equal(saved(page, site), np.where(sure, suggested, IGNORE))


def test_the_keyboard_alone_paints_and_moves_on(page: Any, site: LabelSite) -> None:
    page.focus("#stage")
    page.keyboard.press("2")
    for key in ("ArrowLeft", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    assert (saved(page, site) == 1).any()
    # Without a model, images far apart in the list come first.
    page.keyboard.press("j")
    page.wait_for_selector("#image-name:text-is('p2.png')")


def test_next_opens_an_image_without_strokes_and_previous_goes_back(
    page: Any, site: LabelSite
) -> None:
    # Ranked before it was painted, an image would come first again.
    site.session.rounds.gains["p0.png"] = 1.0
    page.wait_for_selector("#images li:first-child button[title='p0.png']")
    drag(page, (10, 10), (30, 10))
    saved(page, site)
    page.wait_for_selector("#images li:first-child button[data-state='scribbled']")
    page.click("#next")
    page.wait_for_selector("#image-name:text-is('p2.png')")
    page.wait_for_selector("#images li:last-child button[title='p0.png']")
    page.wait_for_selector("body[data-state=ready]")
    drag(page, (10, 10), (30, 10))
    saved(page, site, 2)
    page.click("#next")
    page.wait_for_selector("#image-name:text-is('p1.png')")
    for name in ("p2.png", "p0.png"):
        page.click("#previous")
        page.wait_for_selector(f"#image-name:text-is('{name}')")


def test_an_earlier_response_does_not_undo_a_takeover(page: Any, site: LabelSite) -> None:
    held: list[tuple[Any, Any]] = []
    site.session.join("another browser", take=True)
    page.route("**/state", lambda route: held.append((route, route.fetch())))
    eventually(lambda: page.title() and held)
    drag(page, (10, 10), (30, 10))
    page.wait_for_selector("#editor-dialog[open]")
    page.click("#take-over")
    page.wait_for_selector("body[data-saved=true]")
    page.wait_for_selector("#saved:text-is('Saved')")
    route, answer = held.pop()
    assert not answer.json()["editor"]
    route.fulfill(response=answer)
    # The page has taken the answer when it asks again.
    eventually(lambda: page.title() and held)
    assert page.locator("#editor-dialog[open]").count() == 0
    page.unroute("**/state")


def test_a_second_browser_is_told_takes_over_and_sees_the_same(
    browser: Any, page: Any, site: LabelSite
) -> None:
    page.keyboard.press("2")
    drag(page, (10, 10), (30, 10))
    first = saved(page, site).copy()
    second = opened(browser, site)
    second.wait_for_selector("#editor-dialog[open]")
    second.click("#take-over")
    second.wait_for_selector("#saved:text-is('Saved')")
    second.wait_for_selector("body[data-state=ready]")
    drag(second, (10, 30), (30, 30))
    both = saved(second, site).copy()
    assert (both[first == 1] == 1).all()
    assert (both[28:33, 12:29] == 0).all()
    page.wait_for_selector("#editor-dialog[open]")
    page.click("#take-over")
    page.wait_for_selector("body[data-state=ready]")
    page.keyboard.press("2")
    drag(page, (50, 40), (55, 40))
    last = saved(page, site)
    assert (last[both != IGNORE] == both[both != IGNORE]).all()
    assert (last[39:42, 50:55] == 1).all()
    second.context.close()


def test_classes_are_named_at_first(browser: Any, tmp_path: Path) -> None:
    with labelling(write_images(tmp_path), ()) as site:
        page = opened(browser, site)
        page.wait_for_selector("#classes-dialog[open]")
        for k, name in enumerate(("ground", "square")):
            page.locator("#class-rows input[type=text]").nth(k).fill(name)
        page.click("#classes-dialog button.primary")
        page.wait_for_selector("#classes button:nth-child(2)")
        drag(page, (10, 10), (20, 10))
        assert (saved(page, site) == 0).any()
        page.context.close()


def test_axe_has_no_finding(browser: Any, site: LabelSite) -> None:
    page = opened(browser, site, color_scheme="light", bypass_csp=True)
    assert violations(page) == []
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    assert violations(page) == []
    page.context.close()
