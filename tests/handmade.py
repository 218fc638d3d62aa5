"""PNG and TIFF files put together by hand: kinds that no writer makes, and files that lie."""

from __future__ import annotations

import struct
import zlib

import numpy as np

ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]
GREY, RGB, INDEXED, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


def png(
    pixels: np.ndarray,
    kind: int,
    bits: int = 8,
    chunks: tuple[tuple[bytes, bytes], ...] = (),
    interlaced: bool = False,
) -> bytes:
    """A PNG of ``(H, W, C)`` uint8 or uint16, or of ``(H, bytes)`` rows of fewer bits; ``chunks``
    come before the pixels.
    """
    height, width = pixels.shape[0], pixels.shape[1] if bits >= 8 else pixels.shape[1] * 8 // bits
    stored = pixels.astype(">u2") if bits == 16 else pixels
    passes = (
        [(top, left, down, right) for top, left, down, right in ADAM7 if left < width]
        if interlaced
        else [(0, 0, 1, 1)]
    )
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, right in passes
        for row in stored[top::down, left::right]
    )
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    blocks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*block) for block in blocks)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One block of a PNG."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def declaring(content: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says another size, with a true checksum."""
    header = content[12:16] + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def tiff(
    *directories: dict[int, tuple[int, int, int]],
    following: tuple[int, ...] = (),
    behind: bytes = b"",
) -> bytes:
    """A little-endian TIFF of directories ``tag -> (type, count, value)``, each followed by the
    next, the last by 0, or as ``following`` says.

    ``behind`` lies at the file's end; a tag's value of -1 is its place.
    """
    places = [8]
    for directory in directories:
        places.append(places[-1] + 6 + 12 * len(directory))
    end = places.pop()
    content = bytearray(b"II*\0" + struct.pack("<I", 8))
    for k, directory in enumerate(directories):
        content += struct.pack("<H", len(directory))
        for tag, (kind, count, value) in sorted(directory.items()):
            content += struct.pack("<HHII", tag, kind, count, end if value == -1 else value)
        after = places[k + 1] if k + 1 < len(places) else 0
        content += struct.pack("<I", following[k] if k < len(following) else after)
    return bytes(content) + behind


def grey_tiff(
    width: int, height: int, held: int, **tags: tuple[int, int, int]
) -> dict[int, tuple[int, int, int]]:
    """The tags of an 8-bit grey picture in one strip of ``held`` bytes at the file's end; further
    ones as ``t259=(3, 1, 5)``.
    """
    plain = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, -1),
        278: (4, 1, height),
        279: (4, 1, held),
    }
    return plain | {int(name[1:]): value for name, value in tags.items()}
