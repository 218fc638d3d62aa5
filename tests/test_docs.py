"""The documentation: generated pages are fresh, the site builds, and a dead link is found."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import useg

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def script(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script of the repository that is no part of the package."""
    monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


def test_the_page_of_models_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    models = script("models", "benchmarks", monkeypatch)
    assert (DOCS / "models.md").read_text() == models.table(models.results())


def test_pages_made_from_the_program_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = script("generate_docs", "scripts", monkeypatch)
    assert generate.stale() == [], "run: python scripts/generate_docs.py"


def test_the_tutorial_page_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    render = script("render_tutorial", "scripts", monkeypatch)
    assert render.stale() == [], render.TOLD
    assert (DOCS / "tutorial.md").read_text() == render.page()


def test_the_drawing_and_the_list_of_modules_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = script("draw_architecture", "scripts", monkeypatch)
    assert draw.TARGET.read_text() == draw.drawing(), "run: python scripts/draw_architecture.py"
    assert draw.PAGE.read_text() == draw.page(), "run: python scripts/draw_architecture.py"
    assert "| `models/unet.py` |" in draw.page()


def test_arrows_that_others_imply_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = script("draw_architecture", "scripts", monkeypatch)
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"c"}}
    assert draw.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"c"}}
    assert draw.layers(graph) == {"a": 0, "b": 1, "c": 2, "d": 2}


def test_outputs_of_the_tutorial_are_stale_when_code_changes_but_not_when_an_import_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = script("render_tutorial", "scripts", monkeypatch).digest
    assert digest("import a\nx = a.b  # why") == digest("import c as a\n\nx = a.b")
    assert digest("import a\nx = a.b") != digest("import a\nx = a.c")


def test_committed_pictures_are_small() -> None:
    pictures = [path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg", ".jpg")]
    assert len(pictures) > 20
    assert sum(path.stat().st_size for path in pictures) < 1_500_000


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "api.md").read_text()
    named = re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)
    assert sorted(named) == useg.__all__


def test_every_page_is_in_the_navigation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx")
    conf = script("conf", "docs", monkeypatch)
    listed = [
        re.sub(r".*<(.*)>", r"\1", page) for each in conf.NAVIGATION.values() for page in each
    ]
    assert sorted(listed) == sorted(
        {path.stem for path in DOCS.glob("*.md")} - {"index"} | {"self"}
    )


PLANTED = """
[no such page](nowhere.md) [no such anchor](train.md#nowhere)

{py:func}`useg.nowhere`

<a href="nothing.html">raw HTML</a> <img src="https://example.org/x.png" alt="">
"""


def test_the_site_builds_and_its_strictness_finds_what_is_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package)
    source, site = tmp_path / "docs", tmp_path / "site"
    shutil.copytree(DOCS, source)
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    with (source / "label.md").open("a") as page:
        page.write(PLANTED)
    build = makefile_command("sphinx").replace("docs site", f"{source} {site}").split()
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, cwd=ROOT)
    assert re.findall(r"([^/\n]*):\d+: WARNING: (.*?)(?: \[|$)", done.stderr, re.MULTILINE) == [
        ("label.md", "'myst' cross-reference target not found: 'nowhere.md'"),
        ("label.md", "local id not found in doc 'train': 'nowhere'"),
        ("label.md", "py:func reference target not found: useg.nowhere"),
    ], done.stderr
    assert done.returncode != 0

    found = script("check_links", "scripts", monkeypatch).problems(site)
    assert found == [
        "label.html: fetches https://example.org/x.png",
        "label.html: #nowhere.md has no such anchor",
        "label.html: train.html#nowhere has no such anchor",
        "label.html: nothing.html does not exist",
    ]


def makefile_command(tool: str) -> str:
    """Return the arguments that `make docs` gives to Python for a tool."""
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if f"-m {tool}" in line]
    return line.partition("bin/python ")[2]


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ('<a href="b.html#there">', []),
        ('<a href="https://example.org/">', []),
        ('<a href="mailto:a@example.org">', []),
        ('<a href="b.html#gone">', ["a.html: b.html#gone has no such anchor"]),
        ('<a href="#gone">', ["a.html: #gone has no such anchor"]),
        ('<a href="c.html">', ["a.html: c.html does not exist"]),
        ('<img src="c.png">', ["a.html: c.png does not exist"]),
        (
            '<a href="/b.html">',
            ["a.html: /b.html is absolute, and breaks where the site is not at the root"],
        ),
        ('<a href="file:///etc">', ["a.html: file:///etc has an unknown scheme"]),
        ('<a href="../secret.txt">', ["a.html: ../secret.txt lies outside the site"]),
        ('<script src="//example.org/x.js">', ["a.html: fetches //example.org/x.js"]),
        (
            ('<link rel="stylesheet" href="https://example.org/x.css">'),
            [("a.html: fetches https://example.org/x.css")],
        ),
    ],
)
def test_links_that_lead_nowhere_are_found(
    html: str, expected: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "secret.txt").touch()
    (site / "a.html").write_text(html)
    (site / "b.html").write_text('<h1 id="there">')
    assert script("check_links", "scripts", monkeypatch).problems(site) == expected


def test_a_site_without_pages_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(script("check_links", "scripts", monkeypatch).problems(tmp_path)) == 1
