"""Untrusted text is parsed or refused with a ValueError, in little time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from useg.parsing import (
    from_cell,
    open_file,
    parse_json,
    parse_toml,
    parse_yaml,
    printable,
    read_limited,
    shorten,
    to_cell,
)

pytestmark = pytest.mark.wheel


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_json_is_parsed(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "Infinity", "-Infinity", "1e999", '{"a": [NaN]}', "", "{", b"\xff\xfe\x00", "\0"),
        *("[" * 100_000, '{"a":' * 100_000, "9" * 5000, "-" + "9" * 5000, "9" * 310),
    ],
    ids=lambda text: str(text[:12]),
)
def test_hostile_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of which kind does not matter
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        *("a = " + "[" * 5000, "a = " + "{a=" * 5000, "a = " + "9" * 5000, "a", "a = 1_" * 9),
        *("a" + ".a" * 200 + " = 1", "[" + "a." * 200 + "a]", "#" * (1 << 19)),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_toml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of which kind does not matter
        parse_toml(text)


def test_yaml_is_text_however_it_is_written() -> None:
    text = "0: no\n1: 007\n? ~\n: [1:30, !!int x, 0xff]\nnested: &a {<<: b}\nagain: *a\n"
    assert parse_yaml(text) == {
        "0": "no",
        "1": "007",
        "~": ["1:30", "x", "0xff"],
        "nested": {"<<": "b"},
        "again": {"<<": "b"},
    }


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 10_000, "- " * 10_000, "{a: " * 10_000, "&a [*a]", "a: *b", "{? [a] : b}", "\0"),
        *('"\\UFFFFFFFF"', "caf\udce9", "[a"),
    ],
    ids=lambda text: repr(text[:12]),
)
@pytest.mark.parametrize("has_libyaml", [True, False])
def test_hostile_yaml_is_a_value_error(
    monkeypatch: pytest.MonkeyPatch, text: str, has_libyaml: bool
) -> None:
    if not has_libyaml:
        monkeypatch.delattr(yaml, "CBaseLoader")
    with pytest.raises(ValueError):  # noqa: PT011 - of which kind does not matter
        parse_yaml(text)


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_limited(path, 4)
    with pytest.raises(IsADirectoryError):
        read_limited(tmp_path, 5)
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ValueError, match="a pipe or a device"):
            read_limited(endless, 5)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with open_file(tmp_path / "a") as file:
        assert file.read() == b"12345"
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="a pipe or a device"):
            open_file(endless)
    with pytest.raises(IsADirectoryError):
        open_file(tmp_path)


# What parsers of the standard library do with the same text, and useg must not.
@pytest.mark.parametrize(
    ("parse", "text", "error"),
    [
        (json.loads, "NaN", None),
        (json.loads, "[1e999]", None),
        (json.loads, "[" * 100_000, RecursionError),
        (tomllib.loads, "a = " + "[" * 5000, RecursionError),
        (tomllib.loads, "a = inf", None),
        (tomllib.loads, "a" + ".a" * 200 + " = 1", None),
        (yaml.safe_load, "[no, 0x10]", None),
        (yaml.safe_load, "[" * 10_000, RecursionError),
    ],
    ids=lambda value: str(value)[:12],
)
def test_the_tests_see_parsers_without_limits(
    parse: Callable[[str], object], text: str, error: type[Exception] | None
) -> None:
    with pytest.raises(error) if error else contextlib.nullcontext():
        parse(text)


def test_a_value_in_a_message_is_short_and_printable() -> None:
    for value in ("x" * 10**6, ["\x1b[31m"] * 10**6, "a\nb\u202e\udc80", float("nan"), {"a": 1}):
        assert len(shorten(value)) <= 80
        assert shorten(value).isprintable()


# Any string of bytes is a name; these are the ones that matter.
NAMES = st.text(st.sampled_from("='+-@\\xu0e9a\x1b\x7f\x85\u202e\n\udce9\udcff")) | st.binary().map(
    lambda name: name.decode("utf-8", "surrogateescape")
)


@given(NAMES)
def test_a_cell_gives_the_name_back_and_is_valid_on_one_line_and_no_formula(name: str) -> None:
    cell = to_cell(name)
    assert from_cell(cell) == name
    assert cell.encode().decode() == cell
    assert not set(cell) & set(map(chr, range(32)))
    assert not cell.startswith(("=", "+", "-", "@"))


@given(NAMES)
def test_printable_text_cannot_command_a_terminal(name: str) -> None:
    text = printable(name)
    assert text.encode().decode() == text
    assert not set(text) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
    assert printable(text) == text
