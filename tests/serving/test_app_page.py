"""The served page in a real browser: label maps equal the offline ones; it is accessible."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, browsing, clip, pick, saved, shown, violations
from PIL import Image
from served import SMALL, Site, encoded, labels, picture, served, tiny
from waiting import eventually

from useg.inference.polygons import to_geojson, to_polygons

pytest.importorskip("playwright.sync_api")
if not CHROMIUM:
    pytest.skip("there is no Chromium here", allow_module_level=True)

IMAGE = picture(90, 60, 1)
COLORS = "[...document.getElementById('colors').getContext('2d').getImageData(0, 0, 90, 60).data]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as started:
        yield started


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with served() as running:
        yield running


def opened(browser: Any, site: Site, **options: Any) -> Any:
    """A fresh page; ``troubles`` collects its errors and its requests to other hosts."""
    page = browser.new_context(
        **{"viewport": {"width": 1200, "height": 800}, "accept_downloads": True, **options}
    ).new_page()
    page.set_default_timeout(60_000)
    page.troubles = []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on(
        "console",
        lambda message: page.troubles.append(message.text) if message.type == "error" else None,
    )
    page.on(
        "request",
        lambda request: (
            request.url.startswith((site.url, "blob:")) or page.troubles.append(request.url)
        ),
    )
    page.goto(site.url)
    page.wait_for_selector("body[data-ready]")
    return page


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    shown = opened(browser, site)
    yield shown
    assert shown.troubles == []
    shown.context.close()


def test_a_chosen_image_has_the_offline_label_map_and_can_be_saved(page: Any) -> None:
    assert page.inner_text("#model") == "street, 4 classes"
    pick(page, encoded(IMAGE))
    expected = tiny()(IMAGE)
    name, mask = saved(page, "#save-mask")
    assert name == "street.png"
    assert (labels(mask) == expected).all()
    with Image.open(io.BytesIO(mask)) as image:
        assert tuple(image.getpalette()[:12]) == tuple(np.array(tiny().classes.colors).ravel())
    name, polygons = saved(page, "#save-polygons")
    assert name == "street.geojson"
    assert json.loads(polygons) == json.loads(
        json.dumps(to_geojson(to_polygons(expected), tiny().classes))
    )
    name, overlay = saved(page, "#save-overlay")
    colors = np.array(tiny().classes.colors)[expected]
    blended = np.where(colors.any(-1, keepdims=True), 0.4 * IMAGE + 0.6 * colors, IMAGE)
    found = np.array(Image.open(io.BytesIO(overlay)).convert("RGB"))
    np.testing.assert_allclose(found, blended, atol=2)


def test_polygons_of_regions_that_touch_at_corners(page: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 3, (23, 17), np.uint8)
    script = """async ([ids, classes]) => {
        const label = {width: 17, height: 23, ids: Uint8Array.from(ids)};
        return (await import('/polygons.js')).toGeojson(label, classes);
    }"""
    found = page.evaluate(
        script, [ids.ravel().tolist(), [{"id": k, "name": name} for k, name in enumerate("abcd")]]
    )
    assert found == json.loads(json.dumps(to_geojson(to_polygons(ids), tiny().classes)))


def test_a_click_on_an_object_shows_its_row_and_its_outline(browser: Any) -> None:
    row = tiny().objects(IMAGE).table.rows(tiny().classes)[0]
    numbers = tiny().objects(IMAGE).numbers
    inside = np.pad(numbers == 1, 1)
    near = [inside[:-2, 1:-1], inside[2:, 1:-1], inside[1:-1, :-2], inside[1:-1, 2:]]
    outline = inside[1:-1, 1:-1] & ~np.all(near, 0)
    with served() as site:
        page = opened(browser, site)
        pick(page, encoded(IMAGE))
        box = page.locator("#frame").bounding_box()
        y, x = np.argwhere(numbers == 1)[0]
        place = box["x"] + box["width"] * (x + 0.5) / 90, box["y"] + box["height"] * (y + 0.5) / 60
        page.mouse.click(*place)
        page.locator("#object", has_text="Object 1: ").wait_for()
        told = page.inner_text("#object")
        assert f"{row['class']}, {row['pixels']} pixels, {row['bbox'][2]} x" in told
        drawn = np.array(page.evaluate(COLORS.replace("colors", "outline")), np.uint8)
        np.testing.assert_array_equal(drawn.reshape(60, 90, 4)[..., 3] > 0, outline)
        # With the keyboard, too.
        page.focus("#frame")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        middle = int(numbers[30, 43])
        page.locator("#object", has_text=f"Object {middle}: " if middle else "No object").wait_for()
        assert page.troubles == violations(page) == []
        page.context.close()


def test_the_legend_counts_hides_and_isolates(page: Any) -> None:
    pick(page, encoded(IMAGE))
    ids = tiny()(IMAGE)
    counts = np.bincount(ids.ravel(), minlength=4)
    order = [k for k in np.argsort(-counts, kind="stable") if counts[k]]
    rows = page.locator("#legend li")
    assert rows.count() == len(order) > 2
    first = rows.nth(0)
    assert first.locator(".name").inner_text() == tiny().classes.names[order[0]]
    assert first.locator(".share").inner_text() == f"{100 * counts[order[0]] / ids.size:.1f} %"

    def shown() -> np.ndarray:
        return np.array(page.evaluate(COLORS), np.uint8).reshape(60, 90, 4)

    # All but the black class.
    painted = np.array(tiny().classes.colors).any(1)
    assert (shown()[..., :3] == np.array(tiny().classes.colors)[ids]).all()
    first.locator(".toggle").click()
    assert first.locator(".toggle").get_attribute("aria-pressed") == "false"
    assert ((shown()[..., 3] == 0) == ((ids == order[0]) | ~painted[ids])).all()
    page.get_by_role("button", name=f"Show only {tiny().classes.names[order[1]]}").click()
    assert ((shown()[..., 3] > 0) == ((ids == order[1]) & painted[ids])).all()
    page.click("#show-all")
    assert ((shown()[..., 3] == 255) == painted[ids]).all()
    assert page.locator("#show-all").is_hidden()


def test_the_pixel_at_pointer_or_cursor_shows_class_and_confidence(page: Any) -> None:
    pick(page, encoded(IMAGE))
    sure, ids = tiny().probabilities(IMAGE).max(0), tiny()(IMAGE)

    def expected(x: int, y: int) -> tuple[str, float]:
        return tiny().classes.names[ids[y, x]], 100 * float(sure[y, x])

    def read(text: str, mark: str) -> tuple[str, float]:
        name, _, share = text.removesuffix(" %").partition(mark)
        return name, float(share)

    box = page.locator("#colors").bounding_box()
    for x, y in ((0, 0), (45, 30), (89, 59)):
        page.mouse.move(
            box["x"] + (x + 0.5) / 90 * box["width"], box["y"] + (y + 0.5) / 60 * box["height"]
        )
        name, share = read(page.inner_text("#tip"), " · ")
        assert (name, share) == (expected(x, y)[0], pytest.approx(expected(x, y)[1], abs=0.3))
    page.focus("#frame")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    name, share = read(page.inner_text("#status"), ", ")
    assert (name, share) == (expected(46, 31)[0], pytest.approx(expected(46, 31)[1], abs=0.3))
    assert page.locator("#crosshair").is_visible()


def test_views_and_opacity_change_the_display(page: Any) -> None:
    pick(page, encoded(IMAGE))

    def style(name: str) -> str:
        return str(page.evaluate(f"getComputedStyle(document.getElementById('colors')).{name}"))

    page.locator("#opacity").fill("25")
    assert page.inner_text("#opacity-value") == "25 %"
    # The opacity changes gradually.
    eventually(lambda: style("opacity") == "0.25")
    page.check("[value=compare]")
    page.locator("#divider").fill("30")
    assert style("clipPath") == "inset(0px 0px 0px 30%)"
    page.check("[value=side]")
    first, second = (page.locator(name).bounding_box() for name in ("#image", "#colors"))
    assert (first["y"], first["width"], style("clipPath")) == (second["y"], second["width"], "none")
    assert first["x"] + first["width"] < second["x"]


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_images_can_be_dropped_and_pasted(page: Any, how: str) -> None:
    script = """([bytes, how]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(bytes)], "dropped.png", {type: "image/png"}));
        const event = how === "drop"
            ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
        document.body.dispatchEvent(event);
    }"""
    page.evaluate(script, [list(encoded(IMAGE)), how])
    page.wait_for_selector("body[data-state=done]")
    assert (labels(saved(page, "#save-mask")[1]) == tiny()(IMAGE)).all()


def test_an_image_that_the_browser_cannot_display_is_still_labelled(page: Any) -> None:
    pick(page, encoded(IMAGE, "TIFF"), "street.tif")
    assert (labels(saved(page, "#save-mask")[1]) == tiny()(IMAGE)).all()
    assert "This browser cannot display the file, only its label map." in page.inner_text("#status")


def test_errors_are_shown(browser: Any, site: Site) -> None:
    page = opened(browser, site)
    page.set_input_files(
        "#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    )
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error-text").startswith("notes.txt: 'the image' is not ")
    pick(page, encoded(IMAGE))
    assert page.locator("#error").is_hidden()
    page.context.close()


def test_a_failed_upload_keeps_the_result_on_view(page: Any) -> None:
    pick(page, encoded(IMAGE))
    before = shown(page, "image"), page.evaluate(COLORS), page.inner_text("#legend")
    # Undecodable; too many pixels.
    for content in (b"no image", encoded(picture(1001, 1000, 1))):
        page.troubles.clear()
        file = {"name": "broken.png", "mimeType": "image/png", "buffer": content}
        page.set_input_files("#file", file)
        page.wait_for_selector("#error:not([hidden])")
        assert page.inner_text("#error-text").startswith("broken.png: ")
        assert page.get_attribute("body", "data-state") == "done"
        assert page.locator("#image").is_visible()
        assert (shown(page, "image") == before[0]).all()
        assert page.evaluate(COLORS) == before[1]
        assert page.inner_text("#legend") == before[2]
        assert saved(page, "#save-mask")[0] == "street.png"
        page.get_by_role("button", name="Dismiss").click()
        assert page.locator("#error").is_hidden()
    # The browser logs each refused request.
    page.troubles.clear()


def test_a_black_class_is_painted_beside_the_image_but_not_over_it(page: Any) -> None:
    pick(page, encoded(IMAGE))
    ids = tiny()(IMAGE)
    black = ids == tiny().classes.colors.index((0, 0, 0))

    def alpha() -> np.ndarray:
        return np.array(page.evaluate(COLORS), np.uint8).reshape(60, 90, 4)[..., 3]

    assert black.any()
    assert ((alpha() == 0) == black).all()
    page.check("[value=side]")
    assert (alpha() == 255).all()
    page.check("[value=compare]")
    assert ((alpha() == 0) == black).all()
    row = page.locator("#legend li", has_text=tiny().classes.names[0])
    assert row.locator(".swatch.black").count() == 1


def test_the_camera_can_be_paused_resumed_and_stopped(browser: Any) -> None:
    with served(limits=replace(SMALL, upload_bytes=2_000_000, pixels=1_000_000)) as site:
        page = opened(browser, site)
        page.click("#camera")
        page.wait_for_selector("body[data-state=live]")
        assert page.locator("#seek").is_hidden(), "a camera has no position"
        page.get_by_role("button", name="Pause").click()
        page.wait_for_selector("body[data-state=done]")
        page.get_by_role("button", name="Play").click()
        page.wait_for_selector("body[data-state=live]")
        page.get_by_role("button", name="Stop camera").click()
        page.wait_for_selector("body[data-state=done]")
        assert page.inner_text("#camera") == "Camera"
        assert page.locator("#player").is_hidden()
        assert page.troubles == []
        page.context.close()


def test_a_stopped_camera_is_labelled_at_full_size(browser: Any) -> None:
    with served(limits=replace(SMALL, upload_bytes=2_000_000, pixels=1_000_000)) as site:
        page = opened(browser, site)
        page.click("#camera")
        page.wait_for_selector("body[data-state=live]")
        while len(site.log) < 20 and sum(entry["path"] == "/predict" for entry in site.log) < 3:
            page.wait_for_timeout(50)
        row = page.locator("#legend .toggle").first
        row.click()
        name = row.locator(".name").inner_text()
        page.get_by_role("button", name="Stop camera").click()
        page.wait_for_selector("body[data-state=done]")
        assert page.inner_text("#camera") == "Camera"
        assert page.locator("#legend .toggle", has_text=name).get_attribute("aria-pressed") in (
            "false",
            None,
        ), "a hidden class stays hidden"
        file, mask = saved(page, "#save-mask")
        assert file == "camera.png"
        assert labels(mask).shape == shown(page, "image").shape[:2] > (400, 600)
        assert page.troubles == []
        page.context.close()


def test_a_video_can_be_played_paused_and_sought(page: Any, tmp_path: Path) -> None:
    page.set_input_files(
        "#file",
        {
            "name": "drive.webm",
            "mimeType": "video/webm",
            "buffer": clip(tmp_path / "drive.webm", 3),
        },
    )
    page.wait_for_selector("body[data-state=live]")
    assert page.inner_text("#play") == "Pause"
    # Saving pauses the video.
    name, mask = saved(page, "#save-mask")
    assert (name, page.inner_text("#play")) == ("drive.png", "Play")
    held = shown(page, "image")
    assert (labels(mask) == tiny()(held)).all()
    page.evaluate("document.body.dataset.state = 'busy'")
    page.locator("#seek").fill("1.5")
    page.wait_for_selector("body[data-state=done]")
    assert page.inner_text("#time") == "0:01 / 0:03"
    assert np.abs(shown(page, "image").astype(int) - held).mean() > 5
    page.click("#play")
    page.wait_for_selector("body[data-state=live]")
    page.wait_for_selector("body[data-state=done]")
    assert page.inner_text("#time") == "0:03 / 0:03"
    pick(page, encoded(IMAGE))
    assert page.locator("#player").is_hidden()


def test_a_video_that_the_browser_cannot_play_is_refused(page: Any) -> None:
    page.set_input_files(
        "#file", {"name": "drive.mkv", "mimeType": "video/x-matroska", "buffer": b"no video"}
    )
    page.wait_for_selector("#error:not([hidden])")
    assert (
        page.inner_text("#error-text")
        == "drive.mkv: This browser cannot play this video. Try MP4 or WebM, or run useg predict."
    )


def test_the_page_asks_for_the_token_and_remembers_it(browser: Any) -> None:
    with served(token="secret") as site:
        page = browser.new_page()
        page.goto(site.url)
        page.fill("#token-value", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        pick(page, encoded(IMAGE))
        page.reload()
        page.wait_for_selector("body[data-ready]")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "viewport", [{"width": 1280, "height": 800}, {"width": 360, "height": 740}]
)
def test_the_page_is_accessible(
    browser: Any, site: Site, scheme: str, viewport: dict[str, int]
) -> None:
    page = opened(browser, site, color_scheme=scheme, viewport=viewport)
    assert violations(page) == []
    pick(page, encoded(IMAGE))
    page.locator("#legend .toggle").first.click()
    assert violations(page) == []
    page.check("[value=compare]")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.troubles == []
    page.context.close()


@pytest.mark.parametrize("width", [1280, 360])
def test_the_documentation_is_accessible_and_needs_no_other_host(
    browser: Any, site: Site, width: int
) -> None:
    page = browser.new_context(viewport={"width": width, "height": 740}).new_page()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url.removeprefix(site.url)))
    page.goto(f"{site.url}/docs")
    assert {"/docs", "/docs.css"} <= set(requested) <= {"/docs", "/docs.css", "/icon.svg"}
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()
