"""Coverage-guided fuzzing of the picture readers: ``python coverage_fuzz.py CORPUS... [options]``.

The options are libFuzzer's, such as ``-max_total_time=1800``. Finds go into the first corpus. A
reader gives pixels or one clear error, within five seconds and two gigabytes.
"""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

import atheris

with atheris.instrument_imports(include=["useg.images", "tifffile", "PIL"]):
    importlib.import_module("tifffile")
    from useg.images import decode, formats, image_files

from mutations import mend_checksums

from useg.errors import UsageError


def _decoded(content: bytes) -> Any:
    return image_files.decode_image(content, page=0)


def _size(content: bytes) -> Any:
    with formats.clear_errors("a"):
        return decode.stored_size(io.BytesIO(content), 0)


def _palette(content: bytes) -> Any:
    with formats.clear_errors("a"):
        return decode.stored_palette(io.BytesIO(content))


READERS: tuple[Callable[[bytes], Any], ...] = (_decoded, _size, _palette)


def read(content: bytes) -> None:
    """Read a file in all ways; anything but a result or a UsageError is an exception."""
    for reader in READERS:
        try:
            reader(content)
        except UsageError:
            continue


def mutate(content: bytes, most: int, seed: int) -> bytes:
    """Let libFuzzer change a file; a PNG gets true checksums again, or no change would matter."""
    changed = bytearray(atheris.Mutate(content, most))
    if changed[:4] == b"\x89PNG" and seed % 4:
        mend_checksums(changed)
    return bytes(changed[:most])


def main() -> None:
    warnings.simplefilter("ignore")
    options = ["-timeout=5", "-rss_limit_mb=2048", "-max_len=4096", *sys.argv[1:]]
    atheris.Setup([sys.argv[0], *options], read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
