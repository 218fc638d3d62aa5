"""Pixels -> the content of a PNG file, in a quarter of the time that Pillow takes and in fewer bytes; a mark in it says what it was made from."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MARK_AT = 33  # the signature, and the one chunk that has to come first
_GREY, _RGB, _PALETTE = 0, 2, 3
_AS_IT_IS, _DIFFERENCE = 0, 1  # filters: a row itself, or each pixel less the one to its left


def encode_png(pixels: NDArray[np.uint8], colors: NDArray[np.uint8] | None = None, mark: str = "") -> bytes:
    """Return a picture as the content of a PNG file.

    One filter for all rows and libdeflate, where others try five filters on each row: measured on overlays of 800x600, 9 ms instead of 49.

    Args:
        pixels: ``(H, W, 3)`` uint8, or ``(H, W)`` uint8: grey, or indices when there are ``colors``.
        colors: ``(N, 3)`` uint8, the palette.
        mark: ASCII text for :func:`has_mark`.
    """
    import imagecodecs

    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 2 or pixels.shape[2] == 3, pixels.shape
    kind = _RGB if pixels.ndim == 3 else _GREY if colors is None else _PALETTE
    H, W = pixels.shape[:2]
    bands, flat = (3 if kind == _RGB else 1), pixels.reshape(H, -1)
    rows = np.empty((H, 1 + flat.shape[1]), np.uint8)
    if kind == _PALETTE:
        rows[:, 0], rows[:, 1:] = _AS_IT_IS, flat
    else:
        rows[:, 0], rows[:, 1 : 1 + bands] = _DIFFERENCE, flat[:, :bands]
        np.subtract(flat[:, bands:], flat[:, :-bands], out=rows[:, 1 + bands :])
    header = W.to_bytes(4, "big") + H.to_bytes(4, "big") + bytes((8, kind, 0, 0, 0))
    palette = _chunk(b"PLTE", colors.tobytes()) if colors is not None else b""
    content = imagecodecs.deflate_encode(rows, level=6 if kind == _PALETTE else 1)  # type: ignore[arg-type]  # any buffer will do
    return _SIGNATURE + _chunk(b"IHDR", header) + _mark(mark) + palette + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def has_mark(path: Path, mark: str) -> bool:
    """Say whether a file is a PNG that :func:`encode_png` made with this mark; its pixels are not read."""
    expected = _mark(mark)
    try:
        with path.open("rb") as file:
            return bool(expected) and file.read(_MARK_AT + len(expected))[_MARK_AT:] == expected
    except OSError:
        return False


def _mark(text: str) -> bytes:
    return _chunk(b"tEXt", b"useg\0" + text.encode("ascii")) if text else b""


def _chunk(name: bytes, content: bytes | bytearray) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
