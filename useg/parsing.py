r"""Untrusted text: parse JSON, TOML and YAML safely, and escape names for display.

The parsers of the standard library accept NaN and infinity in JSON, raise ``RecursionError`` for
deep nesting, and take gigabytes for some short TOML. PyYAML reads the name ``no`` as ``False``.
Here the result is a value, or a ``ValueError`` that says why.

On Linux a file name is a string of bytes. Those that are not UTF-8 reach Python as lone surrogates,
which no file in UTF-8 can store. Control characters would command the terminal, and a table cell
that starts with ``=`` is a formula.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import re
import stat
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any

# A class table of 255 classes needs 30 kB, a run.toml 10 kB.
MAX_TOML_BYTES = 1 << 18
# A key with n dots takes memory and time in proportion to n * n.
MAX_DOTS_PER_LINE = 100

_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ESCAPED = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4}))")
_FORMULA = re.compile(r"'*[=+\-@]")


def open_file(path: Path) -> BufferedReader:
    """Open a file to read it, but not a pipe, which would wait forever for a writer.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
    """
    # With O_NONBLOCK, opening a pipe does not wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            code = errno.EISDIR if is_folder else errno.EINVAL
            reason = os.strerror(code) if is_folder else "it is a pipe or a device, not a file"
            raise OSError(code, reason, str(path))
        return open(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a whole file that has at most ``max_bytes`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or a pipe or device, which may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a pipe or a device, not a file")
    with path.open("rb") as file:
        # Python takes memory for as many bytes as may be read.
        content = file.read(min(status.st_size, max_bytes) + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    if len(content) > status.st_size:
        raise ValueError("it grows while useg reads it")
    return content


def decode_text(content: bytes, errors: str = "surrogateescape") -> str:
    """Decode UTF-8, or UTF-16 if the content begins with its mark, as spreadsheets write it."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_utf16 else "utf-8-sig", errors)


def find_separator(line: str) -> str:
    """Return what separates the cells in a line of a table, or ``""``.

    >>> find_separator("image;split")
    ';'
    """
    return next((each for each in "\t;,|" if each in line), "")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has NaN or a number beyond any float.

    >>> parse_json('{"scale": 0.5}')
    {'scale': 0.5}
    """
    try:
        return json.loads(text, parse_float=_finite, parse_int=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shorten(text)} is not finite")
    # An integer of thousands of digits would take far longer.
    return int(text) if text.lstrip("-").isdecimal() else number


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; errors are those of :func:`read_limited` and :func:`parse_toml`."""
    return parse_toml(read_limited(path, MAX_TOML_BYTES).decode("utf-8"))


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: it is not TOML, too long, nested too deeply, or has keys of very many parts.

    >>> parse_toml("[data]\\nscale = 0.5")
    {'data': {'scale': 0.5}}
    """
    if len(text) > MAX_TOML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, and {MAX_TOML_BYTES:,} are allowed")
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > MAX_DOTS_PER_LINE:
            raise ValueError(f"line {number} has more than {MAX_DOTS_PER_LINE} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML into dictionaries, lists and texts.

    Every value is text: ``no``, ``007`` and ``1:30`` may be names. Tags such as ``!!int`` and merge
    keys have no effect. What an alias refers to is built once, so nested aliases take no memory.

    libyaml parses a megabyte in a second; without it, PyYAML takes ten.

    Raises:
        ValueError: It is not YAML, or is nested too deeply.

    >>> parse_yaml("names: {0: no, 1: 007}")
    {'names': {'0': 'no', '1': '007'}}
    """
    # Few commands read YAML, and help should not wait for the import.
    import yaml

    try:
        return yaml.load(text, getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def shorten(value: object, length: int = 80) -> str:
    """Return a value for an error message: printable, on one line, and not too long.

    >>> shorten("x" * 1000, 12)
    "'xxxxxxxx..."
    """
    # The text of a long value is not made first.
    text = repr(value[:length] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= length else text[: length - 3] + "..."


def printable(text: str) -> str:
    r"""Escape what a terminal or a page cannot show; line breaks and tabs stay.

    >>> printable("caf\udce9\x1b[2J.png")
    'caf\\xe9\\x1b[2J.png'
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match[0]), text)


def to_cell(name: str) -> str:
    r"""Return a name as the cell of a table: valid UTF-8, on one line, and no formula.

    >>> to_cell("=cmd.png"), to_cell("caf\udce9.png"), to_cell("plain.png")
    ("'=cmd.png", 'caf\\xe9.png', 'plain.png')
    """
    if _UNSAFE.search(name) or "\\" in name:
        name = _UNSAFE.sub(lambda match: _escape(match[0]), name.replace("\\", r"\\"))
    return f"'{name}" if _FORMULA.match(name) else name


def from_cell(cell: str) -> str:
    """Return the name from which :func:`to_cell` made a cell: its inverse."""
    if _FORMULA.match(cell.removeprefix("'")):
        cell = cell.removeprefix("'")
    return _ESCAPED.sub(_unescape, cell)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    # Bytes from 128 on are those of a name that is not UTF-8.
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def _unescape(match: re.Match[str]) -> str:
    if match[2]:
        return chr(int(match[2], 16))
    if not match[1]:
        return "\\"
    code = int(match[1], 16)
    return chr(code if code < 0x80 else 0xDC00 + code)
