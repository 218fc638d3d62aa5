"""A number -> a damaged picture, Zarr folder or video, always the same one: what
``test_decode_fuzz.py`` reads.
"""

from __future__ import annotations

import functools
import gzip
import io
import random
import re
import struct
import zlib
from collections.abc import Callable

import handmade
import hostile
import imagecodecs
import numpy as np
import PIL.Image
import pillow_heif
import tifffile
from handmade import png

INTERESTING = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    16,
    31,
    32,
    64,
    127,
    128,
    255,
    256,
    257,
    1023,
    4096,
    16383,
    16384,
    32767,
    32768,
    65500,
    65535,
    65536,
]
INTERESTING += [
    2**20,
    2**24,
    2**27,
    2**31 - 1,
    2**31,
    2**32 - 2,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
]


@functools.cache
def seeds() -> dict[str, bytes]:
    """Whole files of every kind that useg reads, 24x16 pixels each, in a fixed order."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :24]
    rgb = np.stack([rows * 16, columns * 10, (rows + columns) * 6], -1).astype(np.uint8)
    rgb[4:9, 5:15] = rng.integers(0, 256, (5, 10, 3))
    grey, deep = rgb[..., 0].copy(), rgb.astype(np.uint16) * 257
    indexed = PIL.Image.fromarray((grey // 32).astype(np.uint8))
    indexed.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a note"
    picture, cmyk = PIL.Image.fromarray(rgb), PIL.Image.fromarray(rgb).convert("CMYK")
    rgba = PIL.Image.fromarray(np.dstack([rgb, grey]))
    frames = [PIL.Image.fromarray(np.roll(rgb, k, 0)) for k in range(3)]
    files = {
        "rgb.png": _saved(picture, "PNG"),
        "rgba.png": _saved(rgba, "PNG", exif=exif),
        "grey.png": _saved(PIL.Image.fromarray(grey), "PNG"),
        "one-bit.png": _saved(PIL.Image.fromarray(grey > 99), "PNG"),
        "indexed.png": _saved(indexed, "PNG", bits=4),
        "grey-16.png": _saved(PIL.Image.fromarray(deep[..., 0].copy()), "PNG"),
        "rgb-16.png": png(deep, handmade.RGB, 16),
        "rgba-16.png": png(np.dstack([deep, deep[..., 0]]), handmade.RGBA, 16),
        "interlaced.png": png(rgb, handmade.RGB, interlaced=True),
        "text.png": png(
            rgb,
            handmade.RGB,
            chunks=(
                (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 500)),
                (b"iCCP", b"a\0\0" + zlib.compress(b"y" * 500)),
            ),
        ),
        "animated.png": _saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "rgb.jpg": _saved(picture, "JPEG"),
        "progressive.jpg": _saved(picture, "JPEG", progressive=True, exif=exif),
        "grey.jpg": _saved(PIL.Image.fromarray(grey), "JPEG", optimize=True),
        "cmyk.jpg": _saved(cmyk, "JPEG", subsampling=0),
        "restart.jpg": _saved(picture, "JPEG", restart_marker_blocks=1, exif=exif),
        "lossy.webp": _saved(picture, "WEBP"),
        "lossless.webp": _saved(rgba, "WEBP", lossless=True, exif=exif),
        "animated.webp": _saved(
            frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True
        ),
        "rgb.bmp": _saved(picture, "BMP"),
        "indexed.bmp": _saved(indexed, "BMP"),
        "animated.gif": _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for compression in ("none", "lzw", "deflate", "packbits", "zstd", "lzma", "jpeg"):
        options = {
            "compression": None if compression == "none" else compression,
            "photometric": "rgb",
        }
        predictor = {"predictor": 2} if compression in ("lzw", "zstd", "deflate") else {}
        files[f"{compression}-strips.tif"] = _tiff(
            rgb, **options, **predictor, rowsperstrip=5 if compression != "jpeg" else 8
        )
        files[f"{compression}-tiles.tif"] = _tiff(rgb, **options, tile=(16, 16), byteorder=">")
    # Archives of arrays are refused, whatever they say.
    files |= {"grey.ppm": _saved(PIL.Image.fromarray(grey), "PPM")}
    for name, save in (("pixels.npy", np.save), ("pixels.npz", np.savez)):
        target = io.BytesIO()
        save(target, rgb)
        files[name] = target.getvalue()
    return files | {
        "planar.tif": _tiff(
            np.moveaxis(deep, -1, 0).copy(),
            photometric="minisblack",
            planarconfig="separate",
            compression="deflate",
        ),
        "big.tif": _tiff(
            deep,
            photometric="rgb",
            bigtiff=True,
            compression="lzw",
            extratags=[(0x0112, "H", 1, 6, True)],
        ),
        "float.tif": _tiff(
            rgb.astype(np.float32), photometric="rgb", compression="deflate", predictor=3
        ),
        "half.tif": _tiff(rgb.astype(np.float16), photometric="rgb", byteorder=">"),
        "signed.tif": _tiff(rgb.astype(np.int32), photometric="rgb", compression="zstd"),
        "one-bit.tif": _tiff(grey > 99, photometric="miniswhite"),
        "fax.tif": _saved(PIL.Image.fromarray(grey > 99), "TIFF", compression="group4"),
        "indexed.tif": _saved(indexed, "TIFF", compression="tiff_lzw"),
        "cmyk.tif": _saved(cmyk, "TIFF", compression="tiff_deflate"),
        "alpha.tif": _saved(rgba, "TIFF", compression="packbits"),
        "stack.tif": _tiff(np.moveaxis(deep, -1, 0).copy(), imagej=True, metadata={"axes": "ZYX"}),
        "channels.tif": _tiff(
            np.moveaxis(deep, -1, 0).copy(), imagej=True, metadata={"axes": "CYX"}
        ),
        "ome.tif": _tiff(
            np.moveaxis(deep, -1, 0).copy(), ome=True, metadata={"axes": "ZYX"}, compression="lzw"
        ),
        "pages.tif": _saved(
            frames[0], "TIFF", save_all=True, append_images=frames[1:], compression="tiff_lzw"
        ),
        "rgb.jp2": _saved(picture, "JPEG2000"),
        "rgb.j2k": bytes(imagecodecs.jpeg2k_encode(rgb, level=0, codecformat="j2k")),
        "rgba.avif": _saved(rgba, "AVIF"),
        "animated.avif": _saved(frames[0], "AVIF", save_all=True, append_images=frames[1:]),
        "rgb.heic": _heic(picture),
        "jpeg.dcm": hostile.compressed_dicom(
            _saved(PIL.Image.fromarray(grey[:, :16].copy()), "JPEG"), hostile.JPEG_SYNTAX, 16
        ),
        "text.pgm": b"P2 # made\n24 16 255\n" + b" ".join(b"%d" % each for each in grey.ravel()),
    }


def mutated(number: int) -> tuple[str, bytes]:
    """The damaged file of this number: the whole file's name that it was made from, and its
    content.
    """
    rng = random.Random(number)
    files = seeds()
    if rng.random() < 0.05:
        text = _edit_numbers(rng.choice(DESCRIPTIONS), rng)
        return "ome.tif", hostile.described(text, rng.randint(1, 3))
    name = rng.choice(list(files))
    whole = files[name]
    content = bytearray(whole)
    for k in range(rng.choice((1, 1, 1, 2, 3, 5))):
        if not k and rng.random() < 0.4:
            _edit_field(content, whole, rng)
        else:
            rng.choice(MUTATIONS)(content, rng)
    if name.endswith(".png") and rng.random() < 0.7:
        mend_checksums(content)
    return name, bytes(content)


def mutated_zarr(number: int) -> dict[str, bytes]:
    """The files of a damaged OME-Zarr of this number, by their paths."""
    rng = random.Random(number)
    chunk = np.arange(384, dtype=np.uint8).reshape(16, 24) % 200
    files = _zarr3(chunk, rng) if rng.random() < 0.5 else _zarr2(chunk, rng)
    name = rng.choice(list(files))
    changed = bytearray(files[name])
    if name.endswith(("json", ".zarray", ".zattrs")) and rng.random() < 0.7:
        changed = bytearray(_edit_numbers(files[name].decode(), rng).encode())
    elif "c/" in name and rng.random() < 0.7:
        # The index of a shard.
        place = 16 * rng.randrange(4) + 8 * rng.randrange(2)
        value = rng.choice([*INTERESTING, len(changed), len(changed) - 64])
        struct.pack_into("<Q", changed, len(changed) - 64 + place, value)
    else:
        rng.choice(MUTATIONS)(changed, rng)
    return files | {name: bytes(changed)}


AXES = '[{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]'
MULTISCALES = f'[{{"version": "0.4", "axes": {AXES}, "datasets": [{{"path": "0"}}]}}]'


def _zarr2(chunk: np.ndarray, rng: random.Random) -> dict[str, bytes]:
    codec, packed = rng.choice(
        [
            ('{"id": "zlib", "level": 1}', zlib.compress(chunk.tobytes())),
            ('{"id": "zstd", "level": 1}', imagecodecs.zstd_encode(chunk)),
            ('{"id": "blosc", "cname": "lz4", "clevel": 1}', imagecodecs.blosc_encode(chunk)),
            ("null", chunk.tobytes()),
        ]
    )
    content = {
        ".zgroup": '{"zarr_format": 2}',
        ".zattrs": f'{{"multiscales": {MULTISCALES}}}',
        "0/.zarray": '{"zarr_format": 2, "shape": [16, 24], "chunks": [16, 24], "dtype": "|u1", '
        f'"compressor": {codec}, "fill_value": 0, "order": "C", "filters": null}}',
    }
    return {name: text.encode() for name, text in content.items()} | {"0/0.0": bytes(packed)}


def _zarr3(chunk: np.ndarray, rng: random.Random) -> dict[str, bytes]:
    """An array of one shard, which has four chunks and its index at the end."""
    values = [
        chunk[top : top + 8, left : left + 12].tobytes() for top in (0, 8) for left in (0, 12)
    ]
    if rng.random() < 0.5:
        codec = '{"name": "gzip", "configuration": {"level": 1}}'
        chunks = [gzip.compress(each) for each in values]
    else:
        codec = '{"name": "zstd", "configuration": {"level": 1, "checksum": false}}'
        chunks = [bytes(imagecodecs.zstd_encode(each)) for each in values]
    plain = '{"name": "bytes", "configuration": {"endian": "little"}}'
    places = [sum(map(len, chunks[:k])) for k in range(4)]
    index = b"".join(
        struct.pack("<QQ", place, len(each)) for place, each in zip(places, chunks, strict=True)
    )
    content = {
        "zarr.json": '{"zarr_format": 3, "node_type": "group", "attributes": {"ome": '
        f'{{"version": "0.5", "multiscales": {MULTISCALES}}}}}}}',
        "0/zarr.json": '{"zarr_format": 3, "node_type": "array", "shape": [16, 24], "data_type": '
        '"uint8", "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [16, 24]}}, '
        '"chunk_key_encoding": {"name": "default"}, "fill_value": 0, "attributes": {}, "codecs": '
        '[{"name": "sharding_indexed", "configuration": {"chunk_shape": [8, 12], "codecs": '
        f'[{plain}, {codec}], "index_codecs": [{plain}], "index_location": "end"}}}}]}}',
    }
    shard = b"".join([*chunks, index])
    return {name: text.encode() for name, text in content.items()} | {"0/c/0/0": shard}


DESCRIPTIONS = (
    hostile.ome(2, 1, 2, more='<TiffData IFD="0" FirstZ="1" NumPlanes="1"/>'),
    hostile.ome(3, 3, 1),
    "ImageJ=1.54\nimages=3\nchannels=3\nslices=1\nframes=1\nhyperstack=true\n",
    '{"shape": [3, 8, 8], "axes": "ZYX", "truncated": true}',
    '<?xml version="1.0"?><scn><collection sizeX="8" sizeY="8"><image z="1"/></collection></scn>',
)


def _edit_numbers(text: str, rng: random.Random) -> str:
    """Replace some numbers of an XML, a JSON or another text."""
    values = [*INTERESTING, -1, -(2**63), 10**30, 0.5, 1e308]
    return re.sub(
        r"\d+", lambda found: str(rng.choice(values)) if rng.random() < 0.4 else found[0], text
    )


def _heic(image: PIL.Image.Image) -> bytes:
    target = io.BytesIO()
    pillow_heif.from_pillow(image).save(target)
    return target.getvalue()


def _saved(image: PIL.Image.Image, form: str, **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def _tiff(pixels: np.ndarray, **options: object) -> bytes:
    target = io.BytesIO()
    tifffile.imwrite(target, pixels, **options)
    return target.getvalue()


def _edit_field(content: bytearray, whole: bytes, rng: random.Random) -> None:
    """Write a number that programs trip over into a field that says how long, how many or where."""
    fields = _fields(whole)
    place, form = rng.choice(fields)
    size = struct.calcsize(form)
    (old,) = struct.unpack_from(form, whole, place)
    value = rng.choice(
        [
            *INTERESTING,
            len(whole),
            len(whole) - 1,
            old + 1,
            old - 1,
            old * 2,
            old // 2,
            rng.getrandbits(8 * size),
        ]
    )
    content[place : place + size] = struct.pack(form, value % (1 << 8 * size))


@functools.cache
def _fields(whole: bytes) -> list[tuple[int, str]]:
    """Places of numbers in a whole file, with their form."""
    if whole[:4] == b"\x89PNG":
        fields = [(16, ">I"), (20, ">I"), (24, "B"), (25, "B"), (26, "B"), (27, "B"), (28, "B")]
        place = 8
        while place < len(whole):
            fields += [(place, ">I"), (place + 4, "B")]
            place += 12 + struct.unpack_from(">I", whole, place)[0]
        return fields
    if whole[:2] in (b"II", b"MM"):
        return _tiff_fields(whole)
    if whole[:2] == b"\xff\xd8":
        return [
            (k + j, form)
            for k in range(len(whole) - 12)
            if whole[k] == 0xFF
            for j, form in ((1, "B"), (2, ">H"), (5, ">H"), (7, ">H"), (9, "B"))
        ]
    if whole[4:8] in (b"ftyp", b"jP  ") or whole[:2] == b"\xff\x4f":
        end = max(whole.find(b"mdat"), whole.find(b"\xff\x93"), 100)
        return [(k, form) for k in range(end) for form in ("B", ">H", ">I")]
    if whole[128:132] == b"DICM":
        end = min(len(whole), 500) - 4
        return [(k, form) for k in range(132, end) for form in ("<H", "<I")]
    return [(k, form) for k in range(2, 62) for form in ("B", "<H", "<I")]


def _tiff_fields(whole: bytes) -> list[tuple[int, str]]:
    order, big = "<" if whole[:2] == b"II" else ">", 43 in (whole[2], whole[3])
    wide, entry = order + ("Q" if big else "I"), 20 if big else 12
    start = 8 if big else 4
    fields = [(start, wide)]
    (place,) = struct.unpack_from(wide, whole, start)
    while place:
        (count,) = struct.unpack_from(order + ("Q" if big else "H"), whole, place)
        fields.append((place, order + "H"))
        place += 8 if big else 2
        for k in range(count):
            fields += [(place + entry * k, order + "H"), (place + entry * k + 2, order + "H")]
            fields += [
                (place + entry * k + 4, wide),
                (place + entry * k + (12 if big else 8), wide),
                (place + entry * k + (12 if big else 8), order + "H"),
            ]
        place += entry * count
        fields.append((place, wide))
        (place,) = struct.unpack_from(wide, whole, place)
    return fields


def mend_checksums(content: bytearray) -> None:
    """Give the blocks of a PNG true checksums, in place."""
    place = 8
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))
        place = end + 4


def _flip_bits(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _set_run(content: bytearray, rng: random.Random) -> None:
    start, length = _block(content, rng)
    content[start : start + length] = (
        bytes([rng.choice((0, 255, 127, 128, rng.randrange(256)))]) * length
    )


def _scramble_run(content: bytearray, rng: random.Random) -> None:
    start, length = _block(content, rng)
    content[start : start + length] = rng.randbytes(length)


def _truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randint(0, len(content)) :]


def _remove(content: bytearray, rng: random.Random) -> None:
    start, length = _block(content, rng)
    del content[start : start + length]


def _duplicate(content: bytearray, rng: random.Random) -> None:
    start, length = _block(content, rng)
    place = rng.randint(0, len(content))
    content[place:place] = content[start : start + length] * rng.choice((1, 1, 1, 50))


def _set_number(content: bytearray, rng: random.Random) -> None:
    form = rng.choice(("B", "<H", ">H", "<I", ">I", "<Q"))
    place, size = rng.randint(0, min(len(content), 300)), struct.calcsize(form)
    content[place : place + size] = struct.pack(form, rng.choice(INTERESTING) % (1 << 8 * size))


def _splice(content: bytearray, rng: random.Random) -> None:
    other = rng.choice(list(seeds().values()))
    content[rng.randint(0, len(content)) :] = other[rng.randint(0, len(other)) :]


def _block(content: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randint(0, len(content))
    return start, min(rng.choice((1, 2, 4, 8, 16, 64, 256)), len(content) - start)


Mutation = Callable[[bytearray, random.Random], None]
MUTATIONS: tuple[Mutation, ...] = (
    _flip_bits,
    _set_run,
    _scramble_run,
    _truncate,
    _remove,
    _duplicate,
    _set_number,
    _splice,
)
