"""The report in a real browser: nothing is fetched, nothing goes wrong, and its controls do what they say."""

import json
import re
import subprocess

import numpy as np
import pytest
from chromium import CHROMIUM
from test_report import full_report

from useg.classes import IGNORE
from useg.reporting.report import write_report

SHOWN = full_report().cases[1]  # the median, with which the page begins
PLACE = tuple(int(part[0]) for part in np.nonzero((SHOWN.label != SHOWN.prediction) & (SHOWN.label != IGNORE)))
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom",
)  # fmt: skip

ACT = """
<script>setTimeout(async () => {
  const all = name => [...document.querySelectorAll(name)], one = name => document.querySelector(name);
  const wait = () => new Promise(done => setTimeout(done, 200));
  const names = () => all(".classes-table tbody td.name").map(cell => cell.dataset.value);
  const found = {};
  const heads = all(".classes-table th button"), iou = heads[1];
  iou.focus();
  found.focused = document.activeElement === iou;
  iou.click(); found.ascending = names(); found.sorted = iou.parentElement.getAttribute("aria-sort");
  iou.click(); found.descending = names(); found.resorted = iou.parentElement.getAttribute("aria-sort");
  heads[7].click(); found.thin = all(".classes-table tbody tr").map(row => row.cells[7].dataset.value);
  const pixel = () => {
    const sheet = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const brush = sheet.getContext("2d", { willReadFrequently: true });
    brush.drawImage(one("canvas"), -COLUMN, -ROW);
    return [...brush.getImageData(0, 0, 1, 1).data];
  };
  const title = () => one(".panel h3").textContent;
  found.first = title(); found.size = [one("canvas").width, one("canvas").height];
  found.prediction = pixel();
  one("[value=truth]").click(); found.truth = pixel();
  one("[value=errors]").click(); found.errors = pixel();
  const wipe = one(".stage input"); wipe.value = 20; wipe.dispatchEvent(new Event("input"));
  found.wipe = one(".stage").style.getPropertyValue("--wipe");
  const focus = one(".tools select"); focus.value = "1"; focus.onchange(); await wait();
  found.shown = all(".film label").filter(label => !label.hidden).length; found.key = one(".readout").textContent;
  all(".film input")[0].click(); await wait(); found.second = title();
  const order = one(".order select"), listed = () => all(".album li").filter(item => !item.hidden).map(item => item.title);
  order.value = "best"; order.onchange(); found.best = listed();
  order.value = "2"; order.onchange(); found.poles = listed();
  found.fetched = performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"));
  found.wide = document.documentElement.scrollWidth <= innerWidth;
  document.title = "RESULT" + JSON.stringify(found) + "END";
}, 500)</script></body>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the page's controls did, and what the browser complained about."""
    if not CHROMIUM:
        pytest.skip("no Chromium or Chrome is installed")
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    write_report(path, full_report())
    path.write_text(path.read_text("utf-8").replace("</body>", ACT.replace("ROW", str(PLACE[0])).replace("COLUMN", str(PLACE[1]))), "utf-8")
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=390,800", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
    )
    result = re.search("RESULT(.*)END", done.stdout)
    assert result, done.stderr
    return json.loads(result[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")), done.stderr


def test_nothing_is_fetched_and_nothing_complains(seen):
    assert seen[0]["fetched"] == []
    assert "CONSOLE" not in seen[1]


def test_a_phone_need_not_scroll_sideways(seen):
    assert seen[0]["wide"]


def test_a_click_on_a_heading_sorts_and_says_so(seen):
    found = seen[0]
    assert found["focused"], "a heading can be reached by the keyboard"
    assert found["ascending"] == found["descending"][::-1]
    assert found["ascending"][0] == "Poles"
    assert (found["sorted"], found["resorted"]) == ("ascending", "descending")
    known = [value for value in found["thin"] if value != "nan"]
    assert found["thin"] == [*sorted(known, key=float), *["nan"] * (len(found["thin"]) - len(known))], "what has no value comes last"


def test_the_viewer_lays_truth_prediction_and_errors_over_the_image(seen):
    found, table = seen[0], full_report().table
    true, predicted = int(SHOWN.label[PLACE]), int(SHOWN.prediction[PLACE])
    assert found["first"] == SHOWN.name
    assert found["size"] == [32, 24]
    assert found["truth"] == [*table.colors[true], 255]
    assert found["prediction"] == [*table.colors[predicted], 255]
    assert found["errors"] == [255, 176, 0, 255]
    assert found["wipe"] == "20%"


def test_a_class_can_be_looked_for(seen):
    found = seen[0]
    assert found["shown"] == 3, "one picture has none of it"
    assert "wrongly called Buildings" in found["key"]
    assert found["second"] == "best.png"
    assert found["best"][0] == "8.png"
    assert "void.png" not in found["poles"]
