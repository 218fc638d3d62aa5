"""The page of an evaluation in a real browser: it fetches nothing, and its controls work."""

import numpy as np
import pytest
from chromium import CHROMIUM, browsing, violations
from made_reporting import make_report, make_survey
from waiting import eventually

from useg.classes import IGNORE
from useg.reporting.inspection import write_survey_page
from useg.reporting.page import write_report

# The page opens with the median image.
SHOWN = make_report().gallery[1]
# Row and column of a wrong pixel in it.
PLACE = tuple(
    int(part[0]) for part in np.nonzero((SHOWN.label != SHOWN.prediction) & (SHOWN.label != IGNORE))
)
# Waits for the image that the viewer opens.
DECODED = """
  const one = (name) => document.querySelector(name);
  const decoded = async () => {
    const ends = Date.now() + 60_000;
    while (one(".stage").ariaBusy !== "false") {
      if (Date.now() > ends) throw Error("the image is never decoded");
      await new Promise(requestAnimationFrame);
    }
  };
"""

# Uses the controls of the page one after the other, and returns what it found.
ACT = """
async ([row, column]) => {
  DECODED
  const all = (name) => [...document.querySelectorAll(name)];
  const names = () => all(".classes-table tbody td.name").map((cell) => cell.dataset.value);
  const found = {};
  await decoded();
  const heads = all(".classes-table th button"), iou = heads[1];
  iou.focus();
  found.focused = document.activeElement === iou;
  iou.click();
  found.ascending = names();
  found.sorted = iou.parentElement.getAttribute("aria-sort");
  iou.click();
  found.descending = names();
  found.resorted = iou.parentElement.getAttribute("aria-sort");
  heads[7].click();
  found.thin = all(".classes-table tbody tr").map((row) => row.cells[7].dataset.value);
  const copyCanvas = (width, height, left, top) => {
    const sheet = Object.assign(document.createElement("canvas"), { width, height });
    const brush = sheet.getContext("2d", { willReadFrequently: true });
    brush.drawImage(one("canvas"), -left, -top);
    return [...brush.getImageData(0, 0, width, height).data];
  };
  const pixel = () => copyCanvas(1, 1, column, row);
  const colors = () => {
    const bytes = copyCanvas(one("canvas").width, one("canvas").height, 0, 0);
    const distinct = new Set();
    for (let k = 0; k < bytes.length; k += 4) distinct.add(String(bytes.slice(k, k + 4)));
    return [...distinct].map((color) => color.split(",").map(Number));
  };
  const title = () => one(".panel h3").textContent;
  found.first = title();
  found.size = [one("canvas").width, one("canvas").height];
  found.prediction = pixel();
  one("[value=truth]").click();
  found.truth = pixel();
  one("[value=errors]").click();
  found.errors = pixel();
  const table = one(".scroll"), hint = table.previousElementSibling;
  found.hint = [hint.textContent, hint.hidden, table.classList.contains("more")];
  found.masked = getComputedStyle(table).maskImage !== "none";
  table.scrollLeft = table.scrollWidth;
  table.dispatchEvent(new Event("scroll"));
  found.end = [hint.hidden, table.classList.contains("more")];
  const divider = one(".stage input");
  divider.value = 20;
  divider.dispatchEvent(new Event("input"));
  found.divider = one(".stage").style.getPropertyValue("--divider");
  const focus = one(".tools select");
  const focusOn = async (value) => { focus.value = value; focus.onchange(); await decoded(); };
  await focusOn("1");
  one("[value=truth]").click();
  await focusOn("0");
  found.focused_on_black = colors();
  one("[name=mixed]").click();
  await focusOn("-1");
  found.translucent = colors();
  one("[name=mixed]").click();
  one("[value=errors]").click();
  await focusOn("1");
  found.shown = all(".filmstrip label").filter((label) => !label.hidden).length;
  found.key = one(".readout").textContent;
  all(".filmstrip input")[0].click();
  await decoded();
  found.second = title();
  const order = one(".order select");
  const listed = () => all(".album li").filter((item) => !item.hidden).map((item) => item.title);
  order.value = "best";
  order.onchange();
  found.best = listed();
  order.value = "2";
  order.onchange();
  found.poles = listed();
  const fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  found.fetched = fetched.filter((name) => !name.startsWith("data:"));
  found.wide = document.documentElement.scrollWidth <= innerWidth;
  return found;
}""".replace("DECODED", DECODED)


# Opens an image, chooses a layer before the image is decoded and again after it.
CHOOSE_WHILE_DECODING = """
async () => {
  DECODED
  await decoded();
  document.querySelectorAll(".filmstrip input")[0].click();
  one("[value=truth]").click();
  const early = one(".stage").ariaBusy;
  await decoded();
  const shown = one("canvas").toDataURL();
  one("[value=errors]").click();
  one("[value=truth]").click();
  return [early + shown, "true" + one("canvas").toDataURL()];
}""".replace("DECODED", DECODED)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium or Chrome is installed")
    with browsing() as started:
        yield started


@pytest.fixture(scope="module")
def used_page(browser, tmp_path_factory):
    """What the controls did, and what the browser complained of."""
    path = tmp_path_factory.mktemp("browser") / "report.html"
    write_report(path, make_report())
    page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    found = page.evaluate(ACT, list(PLACE))
    page.context.close()
    return found, complaints


def test_page_fetches_nothing_and_has_no_errors(used_page):
    assert used_page[0]["fetched"] == []
    assert used_page[1] == []


def test_layer_chosen_while_an_image_is_decoded_is_shown_then(browser, pages):
    page = browser.new_page()
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((pages / "report.html").as_uri())
    colors = page.evaluate(CHOOSE_WHILE_DECODING)
    assert complaints == []
    assert colors[0] == colors[1]
    page.close()


def test_page_fits_a_phone(used_page):
    assert used_page[0]["wide"]


def test_table_that_is_cut_off_has_a_hint(used_page):
    text, hidden, faded = used_page[0]["hint"]
    assert text.startswith("Scroll sideways for more columns")
    assert not hidden
    assert faded
    assert used_page[0]["masked"]
    assert used_page[0]["end"] == [False, False], (
        "at the last column nothing fades, and nothing moves"
    )


def test_dark_class_stands_out_from_dimmed_ones(used_page):
    """CARLA's Buildings (dark grey) must not look like what is not Buildings."""
    shown = used_page[0]["focused_on_black"]
    assert [0, 0, 0, 255] in shown
    others = [color for color in shown if color[3] < 255]
    assert len(others) == 2, "what is ignored, and what is dimmed"
    assert min(sum(color[:3]) / 3 for color in others) > 120


def test_translucent_layer_omits_black(used_page):
    shown = used_page[0]["translucent"]
    assert [0, 0, 0, 255] not in shown
    assert [0, 0, 0, 0] in shown


def test_heading_sorts_the_table_and_announces_it(used_page):
    found = used_page[0]
    assert found["focused"], "a heading can be reached by the keyboard"
    assert found["ascending"] == found["descending"][::-1]
    assert found["ascending"][0] == "Poles"
    assert (found["sorted"], found["resorted"]) == ("ascending", "descending")
    known = [value for value in found["thin"] if value != "nan"]
    assert found["thin"] == [
        *sorted(known, key=float),
        *["nan"] * (len(found["thin"]) - len(known)),
    ], "what has no value comes last"


def test_viewer_shows_truth_prediction_and_errors(used_page):
    found, table = used_page[0], make_report().classes
    true, predicted = int(SHOWN.label[PLACE]), int(SHOWN.prediction[PLACE])
    assert found["first"] == SHOWN.name
    assert found["size"] == [32, 24]
    assert found["truth"] == [*table.colors[true], 255]
    assert found["prediction"] == [*table.colors[predicted], 255]
    assert found["errors"] == [255, 176, 0, 255]
    assert found["divider"] == "20%"


def test_images_can_be_filtered_and_ordered_by_class(used_page):
    found = used_page[0]
    assert found["shown"] == 3, "one picture has none of it"
    assert "wrongly predicted as Buildings" in found["key"]
    assert found["second"] == "best.png"
    assert found["best"][0] == "8.png"
    assert "void.png" not in found["poles"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_report(folder / "report.html", make_report())
    write_survey_page(
        folder / "survey.html", make_survey(), [("a.png", np.zeros((20, 30, 3), np.uint8))]
    )
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_are_accessible(browser, pages, scheme, width):
    size = {"width": width, "height": 800}
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    for name in ("report.html", "survey.html"):
        page.goto((pages / name).as_uri())
        eventually(lambda: page.evaluate("document.getAnimations().length") == 0)
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()
