"""Recognise the files that useg wrote, by their marks: only these are ever replaced or removed.

Every format has a place for a mark that other programs ignore: a comment, a tag, a member. A mark
with a digest also shows whether somebody has edited the file since. Recognising a file reads a few
kilobytes of it, never follows a link, and never waits for a pipe.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from useg.errors import DataError, MachineError

# Whether useg wrote a file of the kind that is to replace it.
Recognizer = Callable[[Path], bool]

PNG_MARK = b"tEXtuseg\0"
# Where the name of the chunk stands that follows the first one.
PNG_MARK_AT = 37
# Texts of marks. That of a label map stands before a digest; version 0.1 had the digest alone.
LABEL_MARK, MASK_MARK, PICTURE_MARK, SCENE_MARK = "label map ", "mask", "picture", "scene"
# The model has no file that could be compared, so the label map is made again next time.
UNKEPT_LABEL_MARK = f"{LABEL_MARK}of a model in memory"

JPEG_COMMENT = b"useg"
_JPEG_MARK = b"\xff\xfe" + struct.pack(">H", 2 + len(JPEG_COMMENT)) + JPEG_COMMENT
GEOJSON_START = b'{"type":"FeatureCollection","generator":"useg"'
LABELME_START = b'{"generator": "useg", '
CVAT_START = b'<?xml version="1.0" encoding="utf-8"?>\n<!-- label maps of useg -->'
LABEL_STUDIO_START = b'[{"meta": {"generator": "useg"}, '
COCO_START = b'{"info": {"description": "label maps of useg"}'
VIDEO_COMMENT = "label video of useg"
AREAS_HEADER = ("image", "class", "pixels", "share")
OBJECTS_HEADER = (
    *("image", "id", "class", "pixels", "x", "y", "left", "top", "width", "height"),
    *("confidence", "at_edge", "area"),
)
RANKING_HEADER = ("rank", "image", "gain", "uncertainty")
# In run.toml: the other files of the run have marks. They had none up to version 0.1.
MARKED_RUN = "marked_files"

_NAMES_IN_MESSAGE = 3
# Nothing there, a link, a socket, a folder.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR)
_MAX_JSON_BYTES = 1 << 28
_STAMP = "<!-- Written by useg, SHA-256 {} -->\n"
_OLD_MARK = re.compile(rb"[0-9a-f]{64}")

# Keys of the JSON files that the commands write.
_JSON_KEYS = (
    {"mean_iou", "pixel_accuracy", "mean_dice", "num_images", "classes"},
    {"root", "layout", "num_pairs", "splits", "findings"},
    {"num_images", "kept", "label_maps", "videos", "failed"},
    {"num_images", "kept", "seconds", "failed"},
    {"num_images", "ranking", "failed"},
    {"files", "difference", "agreement"},
    {"runtimes", "peaks", "macs", "threads"},
    {"num_folds", "split_by", "images"},
    {"share", "tried", "num_pictures", "reason"},
)


def refuse_foreign_files(
    targets: Iterable[tuple[Path, Recognizer]], advice: str = "choose another folder for the output"
) -> None:
    """Refuse a job before it begins if it would replace files that useg did not write.

    Args:
        targets: What the job will write, each with what recognises useg's files of this kind.
        advice: What to do, besides moving the files.

    Raises:
        DataError: There are such files; the message names the first of them.
        MachineError: One of them cannot be read.
    """
    try:
        foreign = [path for path, is_own in targets if os.path.lexists(path) and not is_own(path)]
    except OSError as error:
        raise MachineError(
            f"{error.filename} cannot be written ({error.strerror}); change its permissions, or "
            f"{advice}"
        ) from error
    if not foreign:
        return
    names = ", ".join(str(path) for path in foreign[:_NAMES_IN_MESSAGE])
    more = len(foreign) - _NAMES_IN_MESSAGE
    is_one = len(foreign) == 1
    raise DataError(
        f"this job would replace {'a file' if is_one else f'{len(foreign):,} files'} that useg did "
        f"not write, or that {'was' if is_one else 'were'} changed since: {names}"
        f"{f' and {more:,} more' if more > 0 else ''}; {advice}, or move "
        f"{'it' if is_one else 'them'} away first"
    )


def mark_png(content: bytes) -> bytes:
    """Insert the mark of a picture into an encoded PNG; other formats stay as they are."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    chunk = PNG_MARK + PICTURE_MARK.encode()
    # The length counts neither the name of the chunk nor its checksum.
    encoded = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[: PNG_MARK_AT - 4] + encoded + content[PNG_MARK_AT - 4 :]


def recognize_none(path: Path) -> bool:
    """Recognise nothing: what exists here is never replaced."""
    return False


def read_ends(path: Path, first: int = 0, last: int = 0) -> bytes:
    """Read the first and the last bytes of a file; ``b""`` for links, pipes, devices, folders.

    Raises:
        OSError: There is a file that cannot be read.
    """
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return b""
            start = file.read(first)
            file.seek(max(len(start), status.st_size - last))
            return start + (file.read(last) if last else b"")
    except OSError as error:
        if error.errno in _NO_FILE:
            return b""
        raise


def png_mark(path: Path) -> bytes | None:
    """Return the text of the mark of a PNG, or None."""
    return find_png_mark(read_ends(path, PNG_MARK_AT + len(PNG_MARK) + 400))


def find_png_mark(start: bytes) -> bytes | None:
    """Return the text of the mark in the first bytes of a PNG, or None."""
    if not start.startswith(PNG_MARK, PNG_MARK_AT):
        return None
    (length,) = struct.unpack_from(">I", start, PNG_MARK_AT - 4)
    return start[PNG_MARK_AT + len(PNG_MARK) :][: length + 4 - len(PNG_MARK)]


def is_own_label_map(path: Path) -> bool:
    """Recognise a predicted label map in PNG or TIFF; a mask of a data set is not one."""
    if path.suffix.lower() == ".png":
        mark = png_mark(path) or b""
    else:
        mark = tiff_software(path).rstrip(b"\0").removeprefix(b"useg ")
    return is_label_mark(mark)


def is_label_mark(mark: bytes) -> bool:
    """Whether a mark is that of a predicted label map."""
    return mark.startswith(LABEL_MARK.encode()) or bool(_OLD_MARK.fullmatch(mark))


def is_own_mask(path: Path) -> bool:
    """Recognise a mask of a clean copy."""
    return png_mark(path) == MASK_MARK.encode()


def is_own_picture(path: Path) -> bool:
    """Recognise a picture for people in PNG or JPEG: an overlay, an error map, a chart."""
    if path.suffix.lower() == ".png":
        is_marked = png_mark(path) == PICTURE_MARK.encode()
    else:
        is_marked = _JPEG_MARK in read_ends(path, 64)
    return is_marked or bool(read_ends(path, 1) and _belongs_to_version_0_1(path))


def is_own_tiff(path: Path) -> bool:
    """Recognise probabilities or confidences in TIFF by the tag Software."""
    is_marked = tiff_software(path).rstrip(b"\0") == b"useg"
    return is_marked or bool(read_ends(path, 1) and _belongs_to_version_0_1(path))


def tiff_software(path: Path) -> bytes:
    """Return the text of the tag Software in the first directory of a TIFF, or ``b""``."""
    head = read_ends(path, 16)
    layout = {
        b"II*\0": ("<", "I", "H", "HHI4s"),
        b"MM\0*": (">", "I", "H", "HHI4s"),
        b"II+\0": ("<", "Q", "Q", "HHQ8s"),
        b"MM\0+": (">", "Q", "Q", "HHQ8s"),
    }.get(head[:4])
    if layout is None:
        return b""
    order, offset_type, count_type, entry_type = layout
    offset = struct.Struct(order + offset_type)
    count, entry = struct.Struct(order + count_type), struct.Struct(order + entry_type)
    try:
        with open(path, "rb") as file:
            file.seek(offset.unpack_from(head, 8 if offset_type == "Q" else 4)[0])
            (number,) = count.unpack(file.read(count.size))
            directory = file.read(min(number, 4096) * entry.size)
            for code, kind, length, value in entry.iter_unpack(directory):
                if code == 305 and kind == 2 and length > len(value):
                    file.seek(offset.unpack(value)[0])
                    return file.read(min(length, 200))
                if code == 305 and kind == 2:
                    return bytes(value[:length])
    except (OSError, ValueError, struct.error, OverflowError):
        pass
    return b""


def stamp(text: str) -> str:
    """Append a comment that contains the digest of a text, for :func:`is_own_text`."""
    return text + _STAMP.format(hashlib.sha256(text.encode()).hexdigest())


def is_own_text(path: Path) -> bool:
    """Recognise a text with a :func:`stamp` that nobody has edited since."""
    content = read_ends(path, _MAX_JSON_BYTES)
    body = content[: -len(_STAMP.format("0" * 64))]
    return bool(body) and content == body + _STAMP.format(hashlib.sha256(body).hexdigest()).encode()


def is_own_page(path: Path) -> bool:
    """Recognise an HTML report; those of version 0.1 have no stamp."""
    return is_own_text(path) or _is_page_without_stamp(path)


def is_own_markdown(path: Path) -> bool:
    """Recognise the Markdown of a report; that of version 0.1 stands beside its page."""
    beside = path.with_suffix(".html")
    return is_own_text(path) or bool(read_ends(path, 2) == b"# " and _is_page_without_stamp(beside))


def _is_page_without_stamp(path: Path) -> bool:
    content = read_ends(path, 1000, 200)
    return (
        b'<meta name="generator" content="useg">' in content and _STAMP[:20].encode() not in content
    )


def is_own_json(path: Path) -> bool:
    """Recognise the result of a command by its keys."""
    try:
        content = json.loads(read_ends(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and any(keys <= content.keys() for keys in _JSON_KEYS)


def is_own_geojson(path: Path) -> bool:
    """Recognise the polygons of an image."""
    start = read_ends(path, len(GEOJSON_START))
    return start == GEOJSON_START or bool(start and _belongs_to_version_0_1(path))


def is_own_annotation(path: Path) -> bool:
    """Recognise a file for an annotation tool: LabelMe, CVAT or Label Studio."""
    starts = (LABELME_START, CVAT_START, LABEL_STUDIO_START)
    return read_ends(path, max(map(len, starts))).startswith(starts)


def is_own_coco(path: Path) -> bool:
    """Recognise ``coco.json``; that of version 0.1 by its lines."""
    start, end = read_ends(path, len(COCO_START)), read_ends(path, last=3)
    if start == COCO_START:
        return True
    lines = b'],\n"categories": [{"id": 0, "name": "', b'}],\n"annotations": ['
    is_old = start.startswith(b'{"images": [{"id": ') and end == b"]}\n"
    return is_old and all(line in read_ends(path, _MAX_JSON_BYTES) for line in lines)


def is_own_csv(*header: str) -> Recognizer:
    """Return what recognises a table of useg by its first columns."""
    start = ",".join(header).encode()

    def recognize(path: Path) -> bool:
        return read_ends(path, len(start) + 1)[: len(start) + 1].rstrip(b",\n\r") == start

    return recognize


def is_own_video(path: Path) -> bool:
    """Recognise a video of useg by its comment; those of version 0.1 by their codec."""
    moov = _read_moov(path)
    if VIDEO_COMMENT.encode() in moov:
        return True
    mask = path.with_name(re.sub(r"_overlay(\.mp4)$", r"_mask\1", path.name))
    old_mask = moov if mask == path else _read_moov(mask)
    # Nobody else stores FFV1 in MP4.
    return bool(moov) and b"FFV1" in old_mask and VIDEO_COMMENT.encode() not in old_mask


def _read_moov(path: Path) -> bytes:
    """Return the box ``moov`` of an MP4 file, or ``b""``."""
    size_left = len(read_ends(path, 1)) and os.path.getsize(path)
    try:
        with open(path if size_left else os.devnull, "rb") as file:
            for _ in range(16):
                head = file.read(8)
                size, name = struct.unpack(">I4s", head)
                if name == b"moov":
                    return file.read(min(size, 1 << 26))
                if size == 1:
                    (size,) = struct.unpack(">Q", file.read(8))
                    size -= 8
                file.seek(max(8, size) - 8, os.SEEK_CUR)
    except (OSError, ValueError, struct.error):
        pass
    return b""


def is_own_model(path: Path) -> bool:
    """Recognise ``model.safetensors``."""
    return b'"__metadata__":{"useg":"' in read_ends(path, 64)


def is_own_onnx(path: Path) -> bool:
    """Recognise an ONNX file that useg exported."""
    end = read_ends(path, last=1 << 20)
    return b"\n\x04useg\x12" in end and b"\n\x06sha256\x12@" in end[-90:]


def is_own_openvino(path: Path) -> bool:
    """Recognise the ``.xml`` of an OpenVINO model that useg exported."""
    end = read_ends(path, last=1 << 20)
    return b"<useg>" in end and b"<sha256 value=" in end


def is_own_run_toml(path: Path) -> bool:
    """Recognise the ``run.toml`` of a run."""
    content = read_ends(path, 1 << 20)
    return b"\n[provenance]\n" in content and b'\nuseg = "' in content


def is_own_log(path: Path) -> bool:
    """Recognise ``log.jsonl``; one without rows yet if its run is beside it."""
    start = read_ends(path, 1000)
    if not start:
        is_empty = os.path.isfile(path) and not os.path.islink(path) and not os.path.getsize(path)
        return is_empty and is_own_run_toml(path.with_name("run.toml"))
    return start.startswith(b'{"step": ') and b'"learning_rate": ' in start


def is_own_checkpoint(path: Path) -> bool:
    """Recognise ``state.pt``."""
    start = read_ends(path, 1024)
    return start.startswith(b"PK") and b"format" in start and b"about" in start


def is_own_split(path: Path) -> bool:
    """Recognise the ``split.csv`` of a run by the run beside it."""
    return is_own_csv("image", "split")(path) and is_own_run_toml(path.with_name("run.toml"))


def _belongs_to_version_0_1(path: Path) -> bool:
    """Whether the label map or the run to which a file belongs was written by version 0.1.

    That version marked label maps, models and ``run.toml``, and no pictures.
    """
    for folder in (path.parent, path.parent.parent):
        run = folder / "run.toml"
        if is_own_run_toml(run) and MARKED_RUN.encode() not in read_ends(run, 1 << 20):
            return True
    if path.parent.name not in ("overlays", "probabilities", "confidence", "polygons"):
        return False
    label = path.parent.parent / path.stem
    label_maps = (label.with_name(f"{label.name}{suffix}") for suffix in (".png", ".tif"))
    marks = (png_mark(next(label_maps)), tiff_software(next(label_maps)).rstrip(b"\0")[5:])
    return any(_OLD_MARK.fullmatch(mark or b"") for mark in marks)
