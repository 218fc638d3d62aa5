"""Picture files that cost a decoder much more than they seem to: name -> content.

Each is small, or of the size that is asked for, and declares, repeats or packs more than it holds.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import imagecodecs
import numpy as np
import PIL.Image
import tifffile
from handmade import GREY, chunk, declaring, grey_tiff, png, tiff

OME = (
    '<?xml version="1.0"?>{start}<OME><Image>{before}<Pixels DimensionOrder="XYZCT" Type="uint8" '
    'SizeX="8" SizeY="8" SizeC="{c}" SizeZ="{z}" SizeT="1"><TiffData IFD="0" '
    'PlaneCount="{count}"/></Pixels>{more}</Image></OME>'
)


def ome(count: int = 1, c: int = 1, z: int = 1, **texts: str) -> str:
    none = {"start": "", "before": "", "more": ""}
    return OME.format_map(none | texts | {"count": count, "c": c, "z": z})


def described(text: str, pages: int = 2) -> bytes:
    """A TIFF of small pages, the first of which has a description."""
    target = io.BytesIO()
    with tifffile.TiffWriter(target) as writer:
        for k in range(pages):
            writer.write(
                np.full((8, 8), k, np.uint8),
                description=text if k == 0 else None,
                metadata=None,
                contiguous=False,
            )
    return target.getvalue()


def entities() -> str:
    steps = "".join(f'<!ENTITY e{k + 1} "{f"&e{k};" * 10}">' for k in range(9))
    return ome(start=f'<!DOCTYPE a [<!ENTITY e0 "0123456789">{steps}]>', more="&e9;")


def big_tiff(**tags: tuple[int, int, int]) -> bytes:
    """A BigTIFF of one page whose tags have values of 64 bits."""
    entries = {int(name[1:]): value for name, value in tags.items()}
    content = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(entries))
    for code, (kind, count, value) in sorted(entries.items()):
        content += struct.pack("<HHQQ", code, kind, count, value)
    return content + bytes(8 + 64)


def packed_tiff(content: bytes, compression: int, side: int = 16, tile: int = 0) -> bytes:
    tags = grey_tiff(side, side, len(content), t259=(3, 1, compression))
    if tile:
        tags = {code: value for code, value in tags.items() if code not in (273, 278, 279)}
        tags |= {322: (4, 1, tile), 323: (4, 1, tile)}
        tags |= {324: (4, 1, -1), 325: (4, 1, len(content))}
    return tiff(tags, behind=content)


def zeros(num_bytes: int) -> bytes:
    """Deflate of very many zeros."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(num_bytes >> 20)]
    return b"".join(parts) + packer.flush()


def png_of_zeros(num_bytes: int) -> bytes:
    """A small PNG with so many zeros as pixels."""
    return SMALL_PNG[:PIXELS_CHUNK] + chunk(b"IDAT", zeros(num_bytes)) + chunk(b"IEND", b"")


def saved(form: str, side: int = 8, **options: object) -> bytes:
    target = io.BytesIO()
    PIL.Image.new("RGB" if form == "WEBP" else "L", (side, side)).save(target, form, **options)
    return target.getvalue()


def patched(content: bytes, place: int, form: str, *values: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, place, *values)
    return bytes(changed)


def bmp(width: int, height: int, compression: int, content: bytes, bits: int = 8) -> bytes:
    start = 54 + 1024
    head = struct.pack("<2sIHHI", b"BM", start + len(content), 0, 0, start)
    fields = (40, width, height, 1, bits, compression, len(content), 0, 0, 256, 0)
    return head + struct.pack("<IiiHHIIiiII", *fields) + bytes(1024) + content


def of_dictionary(content: bytes) -> bytes:
    """LZMA that asks for a dictionary of 4 GB: a byte of the first block's header."""
    end = 12 + 4 * (content[12] + 1) - 4
    place = content.index(b"\x21\x01", 12) + 2
    header = content[12:place] + b"\x28" + content[place + 1 : end]
    return content[:12] + header + struct.pack("<I", zlib.crc32(header)) + content[end + 4 :]


def attributes(num_bytes: int) -> str:
    return " ".join(f"a{k}='1'" for k in range(num_bytes // 12))


def jpeg_of_scans(num_bytes: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    whole = saved("JPEG", 1600, progressive=True, quality=5)
    last = whole.rindex(b"\xff\xda")
    scan = whole[last:-2]
    return whole[:-2] + scan * (num_bytes // len(scan)) + b"\xff\xd9"


def jpeg_of_hidden_scans(num_bytes: int, side: int = 1600) -> bytes:
    """A JPEG of repeated scans, before which a comment holds a marker of the end."""
    whole = saved("JPEG", side, progressive=True, quality=5)
    last = whole.rindex(b"\xff\xda")
    scan = whole[last:-2]
    scans = scan * (num_bytes // len(scan))
    return whole[:last] + b"\xff\xfe\0\4\xff\xd9" + scans + b"\xff\xd9"


def jpeg_of_two_sizes() -> bytes:
    """A JPEG of 30,000x30,000 pixels; who takes the bare marker for a segment reads 16x16."""
    whole = saved("JPEG", 16)
    place = whole.index(b"\xff\xc0")
    size = whole[place : place + 13]
    large = patched(size, 5, ">HH", 30_000, 30_000)
    # The bytes behind the bare marker, FF C0, are read as its length.
    comment = bytes(0xFFC0 + 4 - (4 + len(large) + 4)) + size
    head = b"\xff\xd8\xff\x01" + large
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment
    return head + comment + whole[2:place] + whole[place + 13 :]


def gif_of(block: bytes, num_bytes: int) -> bytes:
    whole = saved("GIF")
    place = whole.index(b",\0\0\0\0")
    return whole[:place] + block * (num_bytes // len(block)) + whole[place:]


def npy(shape: str) -> bytes:
    """A .npy file that says that it has this shape."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(64)


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        for name, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def wide(value: int) -> bytes:
    return (value - 1).to_bytes(3, "little")


TEXT = 15_000_000
SMALL_PNG = png(np.zeros((8, 8, 1), np.uint8), GREY)
PIXELS_CHUNK = SMALL_PNG.index(b"IDAT") - 4
PICTURE_CHUNK = saved("WEBP", lossless=True)[12:]
DIRECTORY = struct.pack("<H", 0)


# Each takes the number of bytes that a file of many blocks may have.
def jpeg2000(
    side: int, bands: int = 1, body: int = 8000, layers: int = 1, style: bytes = b"\5\4\4\0\1"
) -> bytes:
    """A codestream of one tile; its style: levels, code blocks, transform, precincts."""
    numbers = (0, side, side, 0, 0, side, side, 0, 0)
    size = struct.pack(">H8I", *numbers) + struct.pack(">H", bands) + bands * b"\7\1\1"
    has_precincts = len(style) > 5
    parts = {
        0xFF51: size,
        0xFF52: struct.pack(">BBHB", has_precincts, 0, layers, 0) + style,
        0xFF5C: b"\x40" * (2 + 3 * style[0]),
        0xFF90: struct.pack(">HIBB", 0, 14 + body, 0, 1),
    }
    head = b"".join(struct.pack(">HH", key, 2 + len(part)) + part for key, part in parts.items())
    return b"\xff\x4f" + head + b"\xff\x93" + bytes(body) + b"\xff\xd9"


PRECINCTS = b"\5\4\4\0\1" + 6 * b"\x11"


def palette_jpeg2000(side: int, bands: int) -> bytes:
    """A JP2 of one band whose palette makes many."""

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    header = struct.pack(">IIHBBBB", side, side, 1, 7, 7, 0, 0)
    palette = struct.pack(">HB", 2, bands) + bands * b"\7" + 2 * bands * b"\1"
    mapping = b"".join(struct.pack(">HBB", 0, 1, band) for band in range(bands))
    inner = box(b"ihdr", header) + box(b"colr", b"\1\0\0\0\0\0\x11")
    inner += box(b"pclr", palette) + box(b"cmap", mapping)
    start = b"\0\0\0\x0cjP  \r\n\x87\n" + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", inner) + box(b"jp2c", jpeg2000(side))


def compressed_dicom(frame: bytes, syntax: str, side: int = 8) -> bytes:
    """A DICOM of one grey frame that is compressed."""

    def element(tag: int, kind: bytes, content: bytes) -> bytes:
        content += b"\0" * (len(content) % 2)
        length = struct.pack(
            "<H" if kind in (b"US", b"UI", b"CS") else "<HI",
            *((len(content),) if kind in (b"US", b"UI", b"CS") else (0, len(content))),
        )
        return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind + length + content

    def short(tag: int, value: int) -> bytes:
        return element(tag, b"US", struct.pack("<H", value))

    meta = element(0x00020010, b"UI", syntax.encode())
    group = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    image = short(0x00280002, 1) + element(0x00280004, b"CS", b"MONOCHROME2")
    image += short(0x00280010, side) + short(0x00280011, side)
    image += b"".join(short(0x00280100 + k, value) for k, value in enumerate((8, 8, 7, 0)))
    frame += b"\0" * (len(frame) % 2)
    items = b"\xfe\xff\0\xe0" + bytes(4) + b"\xfe\xff\0\xe0" + struct.pack("<I", len(frame)) + frame
    pixels = b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + items + b"\xfe\xff\xdd\xe0" + bytes(4)
    return bytes(128) + b"DICM" + group + meta + image + pixels


JPEG_2000_SYNTAX, JPEG_SYNTAX = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.50"


def small_tiles(num_bytes: int) -> bytes:
    """A TIFF whose tiles all have the same 256 bytes."""
    side = int((num_bytes // 8) ** 0.5)
    place = 8 + 2 + 12 * 10 + 4
    count, last = side * side, place + 8 * side * side
    entries = [(256, 4, 1, 16 * side), (257, 4, 1, 16 * side), (258, 3, 1, 8), (259, 3, 1, 1)]
    entries += [(262, 3, 1, 1), (277, 3, 1, 1), (322, 4, 1, 16), (323, 4, 1, 16)]
    entries += [(324, 4, count, place), (325, 4, count, place + 4 * count)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return head + count * struct.pack("<I", last) + count * struct.pack("<I", 256) + bytes(256)


ATTACKS: dict[str, Callable[[int], bytes]] = {
    "ome plane count": lambda n: described(ome(7 * 10**7)),
    "ome plane count of one page": lambda n: described(ome(7 * 10**7), 1),
    "ome planes": lambda n: described(ome(z=10**9)),
    "ome channels": lambda n: described(ome(c=10**9)),
    "ome entities": lambda n: described(entities()),
    "ome elements": lambda n: described(ome(before="<a/>" * (min(n, TEXT) // 4))),
    "ome attributes": lambda n: described(ome(before=f"<a {attributes(min(n, TEXT))}/>")),
    "ome many mappings": lambda n: described(
        ome().replace(
            "</Pixels>", '<TiffData IFD="0" PlaneCount="20000"/>' * (n // 40) + "</Pixels>"
        )
    ),
    "imagej images": lambda n: described("ImageJ=1\nimages=900000000\nslices=900000000\n", 1),
    "tifffile shape": lambda n: described('{"shape": [900000000, 8, 8], "axes": "ZYX"}', 1),
    "tifffile nested": lambda n: described('{"shape":' + "[" * min(n, 4_000_000), 2),
    "scn": lambda n: described('<?xml version="1.0"?><scn sizeZ="99999999"><collection/></scn>'),
    "metamorph planes": lambda n: tiff(
        grey_tiff(8, 8, 64, t33628=(4, 1 << 31, 8), t33629=(5, 1 << 31, 8)), behind=bytes(64)
    ),
    "zeiss": lambda n: tiff(grey_tiff(8, 8, 64, t34412=(1, 1 << 30, 8)), behind=bytes(64)),
    "micro-manager": lambda n: tiff(grey_tiff(8, 8, 64, t51123=(2, 1 << 30, 8)), behind=bytes(64)),
    "directories": lambda n: (
        b"II*\0"
        + b"".join(struct.pack("<I", 8 + 6 * k) + DIRECTORY for k in range(n // 6))
        + bytes(4)
    ),
    "directories one in another": lambda n: b"II*\0\x0a\0\0\0" + (b"\0\x10" * (n // 2)),
    "directories of many tags": lambda n: tiff(
        *[{60000 + k: (3, 1, 0) for k in range(4000)}] * (n // 48_000 + 1)
    ),
    "sub-directories": lambda n: tiff(grey_tiff(8, 8, 64, t330=(4, 1, 8)), behind=bytes(64)),
    "strips": lambda n: tiff(
        grey_tiff(1, 1 << 30, 64, t273=(4, 1 << 30, 8), t278=(4, 1, 1), t279=(4, 1 << 30, 8)),
        behind=bytes(64),
    ),
    "a strip of every row": lambda n: tiff(
        grey_tiff(1, n // 8, 64)
        | {
            273: (4, min(n // 8, 1 << 20), 200),
            278: (4, 1, 1),
            279: (4, min(n // 8, 1 << 20), 200),
        },
        behind=b"\1\0\0\0" * (n // 4),
    ),
    "size of 64 bits": lambda n: big_tiff(
        t256=(16, 1, 1 << 63), t257=(16, 1, 8), t258=(3, 1, 8), t273=(16, 1, 8), t279=(16, 1, 64)
    ),
    "offset of 64 bits": lambda n: big_tiff(
        t256=(4, 1, 8), t257=(4, 1, 8), t258=(3, 1, 8), t273=(16, 1, (1 << 63) + 9), t279=(4, 1, 64)
    ),
    "count of 64 bits": lambda n: big_tiff(
        t256=(4, 1, 8), t257=(4, 1, 8), t258=(3, 1, 8), t273=(16, 1 << 61, 8), t279=(4, 1, 64)
    ),
    "a tile of deflate": lambda n: packed_tiff(zeros(min(n, 1 << 20) * 1000), 8, 16, 65_536),
    "a strip of deflate": lambda n: packed_tiff(zeros(min(n, 1 << 20) * 1000), 8),
    "lzma with a dictionary of 4 GB": lambda n: packed_tiff(
        of_dictionary(imagecodecs.lzma_encode(bytes(256))), 34925
    ),
    "zstd of one byte": lambda n: packed_tiff(
        b"\x28\xb5\x2f\xfd\0\x88" + (((131_072 << 3) | 2).to_bytes(3, "little") + b"\7") * (n // 4),
        50000,
    ),
    "packbits": lambda n: packed_tiff(b"\x81\0" * (n // 2), 32773),
    "fax": lambda n: packed_tiff(b"\xff" * n, 4, 2000),
    "jpeg of scans in a tile": lambda n: packed_tiff(jpeg_of_scans(n), 7, 1600),
    "jpeg of scans behind an end in a tile": lambda n: packed_tiff(
        jpeg_of_hidden_scans(n), 7, 1600
    ),
    "jpeg of two sizes in a tile": lambda n: packed_tiff(jpeg_of_two_sizes(), 7, 16),
    "png chunks": lambda n: (
        SMALL_PNG[:PIXELS_CHUNK] + chunk(b"prVt", b"") * (n // 12) + SMALL_PNG[PIXELS_CHUNK:]
    ),
    "png pixels in empty chunks": lambda n: (
        SMALL_PNG[:PIXELS_CHUNK] + chunk(b"IDAT", b"") * (n // 12) + SMALL_PNG[PIXELS_CHUNK:]
    ),
    "png texts": lambda n: (
        SMALL_PNG[:PIXELS_CHUNK]
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * (n // 1100)
        + SMALL_PNG[PIXELS_CHUNK:]
    ),
    "png old exif": lambda n: (
        SMALL_PNG[:PIXELS_CHUNK]
        + chunk(b"zTXt", b"Raw profile type exif\0\0" + zeros(min(n, 1 << 20) * 1000))
        + SMALL_PNG[PIXELS_CHUNK:]
    ),
    "png more pixels": lambda n: (
        SMALL_PNG[:PIXELS_CHUNK] + chunk(b"IDAT", zeros(n * 1000)) if n < 1 << 22 else SMALL_PNG
    ),
    "png of one column": lambda n: declaring(png_of_zeros(200 << 20), 1, 100_000_000),
    "png size": lambda n: declaring(SMALL_PNG, 17_000, 17_000),
    "jpeg comments": lambda n: saved("JPEG")[:2] + b"\xff\xfe\0\2" * (n // 4) + saved("JPEG")[2:],
    "jpeg tables": lambda n: saved("JPEG")[:2] + b"\xff\xdb\0\2" * (n // 4) + saved("JPEG")[2:],
    "jpeg fill": lambda n: saved("JPEG")[:2] + b"\xff" * n + saved("JPEG")[2:],
    "jpeg photoshop": lambda n: (
        saved("JPEG")[:2]
        + (b"\xff\xed\xff\xfe" + (b"Photoshop 3.0\0" + b"8BIM\0\0\0\0\0\0\0\0" * 5500)[:65_532])
        * (n // 65_536)
        + saved("JPEG")[2:]
    ),
    "jpeg scans": jpeg_of_scans,
    "jpeg scans behind an end": jpeg_of_hidden_scans,
    "jpeg size": lambda n: patched(
        saved("JPEG"), saved("JPEG").index(b"\xff\xc0") + 5, ">HH", 14_000, 14_000
    ),
    "gif canvas": lambda n: patched(saved("GIF"), 6, "<HH", 17_000, 17_000),
    "gif frame": lambda n: patched(
        saved("GIF"), saved("GIF").index(b",\0\0\0\0") + 5, "<HH", 17_000, 17_000
    ),
    "gif of one colour": lambda n: saved("GIF", 9000),
    "gif comment": lambda n: gif_of(b"!\xfe" + (b"\xff" + bytes(255)) * 4 + b"\0", n),
    "gif short blocks": lambda n: gif_of(b"!\xfe" + b"\1a" * 500 + b"\0", n),
    "gif extensions": lambda n: gif_of(b"!\xf9\0", n),
    "gif pixels in short blocks": lambda n: saved("GIF")[:-2] + b"\1\0" * (n // 2) + b"\0;",
    "webp canvas": lambda n: webp(
        (b"VP8X", b"\2\0\0\0" + wide(9000) + wide(9000)),
        (b"ANIM", bytes(6)),
        (b"ANMF", bytes(6) + wide(8) + wide(8) + bytes(4) + PICTURE_CHUNK),
    ),
    "webp canvas of 24 bits": lambda n: webp(
        (b"VP8X", bytes(4) + b"\xff" * 6), (PICTURE_CHUNK[:4], PICTURE_CHUNK[8:])
    ),
    "webp of one colour": lambda n: saved("WEBP", 8000, lossless=True, quality=0, method=0),
    "webp chunks": lambda n: webp(
        (b"VP8X", bytes(4) + wide(8) + wide(8)), *[(b"abcd", b"")] * (n // 8)
    ),
    "text of line breaks": lambda n: b"P5" + b"\n" * 1000 + b"x",
    "text of comments": lambda n: b"P6" + b"\n#\n # \r" * 600 + b"x",
    "text of numbers": lambda n: b"P2 8 8 255\n" + b"1 " * (n // 2),
    "text of another size": lambda n: b"P5 17000 17000 255\n" + bytes(64),
    "array of another size": lambda n: npy("(17000, 17000)"),
    "array of a negative size": lambda n: npy("(-8, -8)"),
    "array of 64 bits": lambda n: npy("(9223372036854775807, 2)"),
    "array with a long header": lambda n: npy("(8, 8" + ")" * min(n, 60_000)),
    "jpeg 2000 of another size": lambda n: patched(
        imagecodecs.jpeg2k_encode(np.zeros((8, 8), np.uint8), codecformat="j2k"),
        8,
        ">8I",
        *(17_000, 17_000, 0, 0, 17_000, 17_000, 0, 0),
    ),
    "jpeg 2000 boxes": lambda n: b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * (n // 8),
    "jpeg 2000 precincts": lambda n: jpeg2000(1300, style=PRECINCTS),
    "jpeg 2000 small blocks": lambda n: jpeg2000(4500, style=b"\5\0\0\0\1"),
    "jpeg 2000 layers": lambda n: jpeg2000(
        1000, 3, layers=65535, style=b"\5\4\4\0\1" + 6 * b"\x55"
    ),
    "jpeg 2000 bands": lambda n: jpeg2000(64, 16384, 20_000),
    "jpeg 2000 palette": lambda n: palette_jpeg2000(1500, 100),
    "jpeg 2000 style of a tile": lambda n: jpeg2000(1300).replace(
        b"\xff\x93", jpeg2000(8, style=PRECINCTS)[45:65] + b"\xff\x93", 1
    ),
    "dicom of precincts": lambda n: compressed_dicom(
        jpeg2000(1300, style=PRECINCTS), JPEG_2000_SYNTAX, 1300
    ),
    "dicom of another size": lambda n: compressed_dicom(
        jpeg2000(9000, body=30_000), JPEG_2000_SYNTAX
    ),
    "dicom of scans": lambda n: compressed_dicom(ATTACKS["jpeg scans"](n), JPEG_SYNTAX, 1600),
    "dicom of png chunks": lambda n: compressed_dicom(ATTACKS["png chunks"](n), JPEG_SYNTAX),
    "dicom of short runs": lambda n: compressed_dicom(
        struct.pack("<16I", 1, 64, *bytes(14)) + b"\x81\1" * (n // 2), "1.2.840.10008.1.2.5"
    ),
    "small tiles": small_tiles,
    "dicom elements": lambda n: bytes(128) + b"DICM" + b"\x09\0\x10\0LO\0\0" * (n // 8),
    "avif boxes": lambda n: b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + b"\0\0\0\x08free" * (n // 8),
    "bmp size": lambda n: bmp(17_000, 17_000, 0, bytes(64)),
    "bmp negative size": lambda n: bmp(-5, -(1 << 31), 0, bytes(64)),
    "bmp runs": lambda n: bmp(17_000, 17_000, 1, b"\0\1"),
    "bmp short runs": lambda n: bmp(2000, 2000, 1, b"\1\7" * (n // 2)),
    "bmp jumps": lambda n: bmp(1_000_000, 3, 1, b"\0\2\xff\xff" * 2 + b"\0\1"),
    "bmp ends of lines": lambda n: bmp(100_000, 40, 1, (b"\1\7\0\0" * (n // 4))[:490_000]),
    "bmp ends of lines of few bits": lambda n: bmp(
        2000, 2000, 2, (b"\xff\x12" * (n // 2))[:490_000], 4
    ),
    "bmp long header": lambda n: patched(bmp(8, 8, 0, bytes(64)), 14, "<I", 1 << 31),
}
