"""Parse JSON and TOML that a stranger may have written: a value, or a ``ValueError`` that says why.

The parsers of the standard library accept NaN and infinity in JSON, raise ``RecursionError`` for
deep nesting, and take gigabytes for some short TOML.
"""

from __future__ import annotations

import json
import math
import stat
import tomllib
from pathlib import Path
from typing import Any

# A class table of 255 classes needs 30 kB, a run.toml 10 kB.
MAX_TOML_BYTES = 1 << 18
# A key with n dots takes memory and time in proportion to n * n.
MAX_DOTS_PER_LINE = 100


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Read a whole file that has at most ``max_bytes`` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or a pipe or device, which may never end.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("it is a pipe or a device, not a file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has NaN, infinity, a number beyond the
            range of a float or an integer of thousands of digits.

    >>> parse_json('{"scale": 0.5}')
    {'scale': 0.5}
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shorten(text)} is not finite")
    return number


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


def shorten(value: object, length: int = 80) -> str:
    """Return a value for an error message: printable, on one line, and not too long.

    >>> shorten("x" * 1000, 12)
    "'xxxxxxxx..."
    """
    # The text of a long value is not made first.
    text = repr(value[:length] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= length else text[: length - 3] + "..."
