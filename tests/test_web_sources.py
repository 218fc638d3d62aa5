"""House rules for the pages' own JavaScript, CSS and HTML."""

from __future__ import annotations

from pathlib import Path

import pytest

import useg

PACKAGE = Path(useg.__file__).parent
SOURCES = sorted(path for kind in ("js", "css", "html") for path in PACKAGE.rglob(f"*.{kind}"))
SCRIPTS = [path for path in SOURCES if path.suffix == ".js"]
LONGEST_LINE = 100


def test_there_are_sources() -> None:
    assert len(SCRIPTS) > 10


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_line_is_too_long(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert [k for k, line in enumerate(lines, 1) if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_opens_with_one_line_on_what_it_does(path: Path) -> None:
    first, second = path.read_text("utf-8").splitlines()[:2]
    assert first.startswith("// ")
    assert first.endswith(".")
    assert second in ("", "//")
