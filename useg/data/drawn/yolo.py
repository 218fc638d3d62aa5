"""YOLO's segmentation text files -> drawings: a line per thing, ``class x y x y ...``, in fractions of the picture.

``images/a.jpg`` has its outlines in ``labels/a.txt`` (the last folder of that name counts); a picture without a text file is all background,
as Ultralytics has it. Class names come from ``names:`` in ``data.yaml`` (or any other YAML in DATA), or from ``classes.txt``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from useg.data.drawn.entries import Annotations, Entry, class_name
from useg.data.shapes import Drawing, Shape, ring
from useg.errors import UsageError


def labels_of(image: Path, root: Path) -> Path | None:
    """Return where the outlines of a picture in ``root`` would be, or None when it lies in no ``images`` folder with ``labels`` beside it."""
    parts = image.relative_to(root).parts
    places = [k for k, part in enumerate(parts[:-1]) if part.casefold() == "images"]
    if not places:
        return None
    parent, inside = root.joinpath(*parts[: places[-1]]), parts[places[-1] + 1 :]
    folder = parent / ("Labels" if parts[places[-1]] == "Images" else "labels")
    path = folder.joinpath(*inside).with_suffix(".txt")
    return path if path.parent.is_dir() else None


def read_yolo(pairs: Sequence[tuple[Path, Path]], listed: Iterable[Path]) -> Annotations:
    """Read outlines.

    Args:
        pairs: images and their text files, which need not exist.
        listed: files that may list the classes' names.

    Raises:
        UsageError: a line that is no outline, or a class without name.
    """
    outlines = {path: _read_outlines(path) if path.is_file() else [] for _, path in pairs}
    used = {index for lines in outlines.values() for index, _ in lines}
    names = read_names(listed) or {index: f"class {index}" for index in range(max(used, default=0) + 1)}
    entries = []
    for image, path in pairs:
        for index, _ in outlines[path]:
            if index not in names:
                raise UsageError(f"'{path}' has the class {index}, but names are listed for {_ranges(names)}; add its name, or correct the number")
        shapes = tuple(Shape(names[index], (outline,)) for index, outline in outlines[path])
        entries.append(Entry(path, image.as_posix(), Drawing(shapes)))
    return Annotations("yolo", tuple(entries), tuple(names[index] for index in sorted(names)))


def _ranges(names: Mapping[int, str]) -> str:
    return f"{min(names)} to {max(names)}" if len(names) > 1 else f"{min(names)} alone"


def _read_outlines(path: Path) -> list[tuple[int, bytes]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is no text that can be read ({error}); save or copy it again, or remove it") from error
    return [_read_line(line.split(), f"'{path}' line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _read_line(words: Sequence[str], source: str) -> tuple[int, bytes]:
    if len(words) == 5:
        raise UsageError(f"{source} has five numbers: a box and not an outline; labels for pixels need outlines: export for segmentation")
    if not words[0].isascii() or not words[0].isdigit() or len(words) < 7 or not len(words) % 2:
        raise UsageError(f"{source} is not 'class x y x y x y ...' with a class from 0 and three points or more; correct or remove it")
    return int(words[0]), ring(zip(words[1::2], words[2::2], strict=True), source)


def read_names(listed: Iterable[Path]) -> dict[int, str]:
    """Return the names of the classes by number, from the first file that lists them; none when no file does."""
    for path in listed:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        names = dict(enumerate(text.split("\n"))) if path.suffix == ".txt" else yaml_names(text)
        if names:
            return {index: class_name(name) for index, name in names.items() if name.strip()}
    return {}


def yaml_names(text: str) -> dict[int, str]:
    """Read ``names:`` at the top level of a YAML file, in the four ways in which it is written; every name is text, also ``no`` and ``1e3``.

    That is ``[a, b]`` or ``{0: a, 1: b}``, perhaps over several lines, and below it ``- a`` or ``0: a`` line by line.
    """
    text = "\n".join(text.splitlines())
    begin = re.search(r"^names[ \t]*:", text, re.MULTILINE)
    if not begin:
        return {}
    rest = text[begin.end() :]
    flow = re.match(r"\s*([\[{].*?[\]}])", rest, re.DOTALL)
    if flow:
        inner = re.sub(_COMMENT, "", flow[1], flags=re.MULTILINE)[1:-1]
        items = [item.strip() for item in re.findall(r"""(?:"[^"]*"|'[^']*'|[^,"'])+""", inner) if item.strip()]
    else:
        block = re.match(r"[ \t]*(?:#.*)?\n((?:[ \t]*(?:#.*)?\n|[ \t]+\S.*\n|-.*\n)*)", rest + "\n")
        lines = re.sub(_COMMENT, "", block[1], flags=re.MULTILINE).splitlines() if block else []
        items = [line.strip() for line in lines if line.strip()]
    return dict(_read_item(item, k) for k, item in enumerate(items))


_COMMENT = r"""(?:^|[ \t])#.*$"""


def _read_item(item: str, place: int) -> tuple[int, str]:
    keyed = re.fullmatch(r"([0-9]+)\s*:\s*(.+)", item, re.DOTALL)
    index, name = (int(keyed[1]), keyed[2]) if keyed else (place, re.sub(r"^-\s*", "", item))
    return index, name[1:-1] if re.fullmatch(r""""[^"]*"|'[^']*'""", name) else name
