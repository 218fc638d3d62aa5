"""Globs: the files that one matches, with the text for its wildcards; and a glob for given files.

They stand in ``dataset.toml``, in messages, and in the lines of settings that a message proposes.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence, Set
from fnmatch import fnmatchcase
from pathlib import Path

from useg.data.file_names import split_folder, split_name
from useg.errors import DataError
from useg.files import natural_key
from useg.parsing import shorten

# Most stars in one name of a glob: each multiplies the time to match.
MAX_STARS = 3
# Most ** in a glob: each multiplies the time to match.
MAX_FOLDER_STARS = 2
MAX_GLOB_LENGTH = 1000
# Files and folders in all folders that a glob looks through.
MAX_GLOB_FILES = 400_000
# Folders that its wildcards reach: a folder with ten links to itself is a million in six steps.
MAX_GLOB_FOLDERS = 100_000
# Most characters of a text that tells names from others.
_MAX_OWN_TEXT = 12


def glob_files(folder: Path, pattern: str) -> dict[Path, str]:
    """Return the matching files in natural order, with the text for their wildcards.

    ``a/*_x.png`` gives ``{a/1_x.png: "1"}``.
    """
    while pattern.startswith("../"):
        folder, pattern = folder.resolve().parent, pattern[3:]
    if Path(pattern).is_absolute():
        folder, pattern = (
            Path(Path(pattern).anchor),
            Path(pattern).relative_to(Path(pattern).anchor).as_posix(),
        )
    _check_extent(folder, pattern)
    try:
        paths = sorted((path for path in folder.glob(pattern) if path.is_file()), key=natural_key)
    except OSError as error:
        raise DataError(
            f"the folders of the glob {shorten(pattern)} cannot be read ({error}); choose a more "
            "specific glob"
        ) from error
    regex = _compile_glob(re.sub(r"\.[^./]*$", "", pattern))
    names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in paths}
    fits = {path: regex.fullmatch(name) for path, name in names.items()}
    return {
        path: "/".join(part.strip("/") for part in fit.groups() if part) if fit else names[path]
        for path, fit in fits.items()
    }


def _check_extent(folder: Path, pattern: str) -> None:
    """Refuse a glob that would search very many files, such as those of a whole disk.

    Raises:
        DataError: It is such a glob.
    """
    folders = pattern.split("/")[:-1]
    fixed = list(itertools.takewhile(lambda part: not set(part) & set("*?["), folders))
    if fixed == folders:
        return
    base, num_files = folder.joinpath(*fixed), 0
    for _, inner, names in os.walk(base):
        num_files += len(inner) + len(names)
        if num_files > MAX_GLOB_FILES:
            raise DataError(
                f"the glob {shorten(pattern)} would search more than {MAX_GLOB_FILES:,} "
                f"files in '{base}'; name a more specific folder"
            )
    reached = [base]
    for part in folders[len(fixed) :]:
        below = (inner for place in reached for inner in place.glob(part) if inner.is_dir())
        reached = list(itertools.islice(below, MAX_GLOB_FOLDERS + 1))
        if len(reached) > MAX_GLOB_FOLDERS:
            raise DataError(
                f"the glob {shorten(pattern)} reaches more than {MAX_GLOB_FOLDERS:,} folders in "
                f"'{base}', some perhaps through links; choose a more specific glob"
            )


def check_glob(file: Path, pattern: str) -> None:
    """Refuse a glob that no file can match, or that would take very long to match.

    Raises:
        DataError: It is such a glob.
    """
    parts = pattern.split("/")
    problem = ""
    if len(pattern) > MAX_GLOB_LENGTH:
        problem = f"has more than {MAX_GLOB_LENGTH:,} characters"
    elif not pattern.isprintable():
        problem = "has a character that cannot be printed"
    elif any("**" in part and part != "**" for part in parts):
        problem = "has ** beside other characters; write **/ for any folders, or a single *"
    elif any(part != "**" and part.count("*") > MAX_STARS for part in parts):
        problem = f"has more than {MAX_STARS} stars in one name; a star matches any text"
    elif parts.count("**") > MAX_FOLDER_STARS:
        problem = f"has ** more than {MAX_FOLDER_STARS} times; ** matches any number of folders"
    else:
        try:
            _compile_glob(pattern)
        except re.error as error:
            problem = f"has brackets that do not form a set of characters ({error})"
    if problem:
        raise DataError(f"{file}: the glob {shorten(pattern)} {problem}; correct it")


def _compile_glob(pattern: str) -> re.Pattern[str]:
    """Return a regular expression with a group for each ``**/`` and run of ``*``, ``?``, ``[]``."""
    inner = {"*": "[^/]*", "?": "[^/]"}
    text = name = ""
    for part in re.split(r"(\*\*/|(?:\*|\?|\[[^]]+\])+|/)", pattern):
        if part == "**/":
            text += "(.*/)?"
        elif part == "/":
            # How a name matches does not depend on the other names of the path.
            text, name = f"{text}(?>{name}/)", ""
        elif re.match(r"[*?]|\[[^]]+\]", part):
            tokens = re.findall(r"\*|\?|\[[^]]+\]", part)
            name += f"({''.join(inner.get(token) or _compile_set(token) for token in tokens)})"
        else:
            name += re.escape(part)
    return re.compile(text + name, re.DOTALL)


def _compile_set(token: str) -> str:
    """Return a set of characters such as ``[!a-c]`` as part of a regular expression."""
    negation, characters = ("^", token[2:-1]) if token[1] == "!" else ("", token[1:-1])
    literal = re.sub(r"([\\\[&~|^])", r"\\\1", characters)
    return f"[{negation}{literal}]"


def common_glob(files: Sequence[Path], root: Path, known: Iterable[Path] = ()) -> str:
    """Return a glob for files: what their paths below ``root`` have in common, with stars.

    Args:
        files: The files, at least one.
        root: The folder that the glob begins in.
        known: All files. The glob matches no other file in the folders of ``files``, if possible.

    >>> files = [Path("d/a/x1_m.png"), Path("d/b/x2_m.png")]
    >>> common_glob(files, Path("d")), common_glob(files, Path("d"), [*files, Path("d/a/x1.png")])
    ('*/*.png', '*/*_m.png')
    """
    inside = [path.relative_to(root) if path.is_relative_to(root) else path for path in files]
    folders = [path.parts[:-1] for path in inside]
    fewest = min(map(len, folders))
    shared = [_common_folder([parts[k] for parts in folders]) for k in range(fewest)]
    if len(set(map(len, folders))) > 1:
        constant = next((k for k, text in enumerate(shared) if text == "*"), fewest)
        ends = [_common_folder([parts[-k] for parts in folders]) for k in range(1, fewest + 1)]
        last = [*itertools.dropwhile("*".__eq__, reversed(ends[: fewest - constant]))]
        shared = [*shared[:constant], "**", *last]
    known, places, own = list(known), {path.parent for path in files}, set(files)
    if "**" not in shared:
        shared = _leave_out_folders(shared, places, {path.parent for path in known}, root)
    others = [path.name for path in known if path.parent in places and path not in own]
    name = ""
    for name in _globs_of_names(inside):
        if not any(fnmatchcase(other, name) for other in others):
            break
    else:
        own_text = _find_own_text([path.stem for path in files], others)
        name = f"*{glob.escape(own_text)}*{_common_suffix(files)}" if own_text else name
    return "/".join((*shared, name))


def _find_own_text(stems: Sequence[str], others: Sequence[str]) -> str:
    """Return a short text that all of some names have, and no others, such as ``_w1``; or ``""``.

    One that begins with a separator is preferred.
    """
    first = min(stems, key=len)
    texts = {
        first[k : k + length]
        for k in range(len(first))
        for length in range(2, min(_MAX_OWN_TEXT, len(first) - k) + 1)
    }
    for text in sorted(texts, key=lambda text: (text[0].isalnum(), len(text), text)):
        if all(text in stem for stem in stems) and not any(text in other for other in others):
            return text
    return ""


def _common_suffix(files: Iterable[Path]) -> str:
    suffixes = {path.suffix for path in files}
    return suffixes.pop() if len(suffixes) == 1 else ".*"


def _globs_of_names(files: Sequence[Path]) -> list[str]:
    """Return globs for the names of files, the shortest one first and the most exact one last."""
    suffix = _common_suffix(files)
    if len({path.name for path in files}) == 1:
        whole = glob.escape(files[0].name)
        return [whole] if len(files) == 1 else [f"*{suffix}", whole]
    start, end = _common_ends([path.stem for path in files])
    inner = _common_parts([path.stem for path in files])
    names = ["*", f"*{end}", f"{start}*", f"{start}*{end}", *([inner] if inner else [])]
    if all(re.search("[0-9]$", path.stem.removesuffix(end)) for path in files):
        # a1_mask beside a1_color_mask.
        names += [f"*[0-9]{end}", f"{start}*[0-9]{end}", names[-1]]
    return [f"{name}{suffix}" for name in names]


def _common_parts(texts: Sequence[str]) -> str:
    """Return what texts of equally many parts have in common, with a few stars, or ``""``."""
    rows = [split_name(text) for text in texts]
    if len(set(map(len, rows))) > 1:
        return ""
    columns = list(zip(*rows, strict=True))
    parts = [glob.escape(each[0]) if len(set(each)) == 1 else "*" for each in columns]
    text = re.sub(r"\*+", "*", "".join(parts))
    return text if text.count("*") <= MAX_STARS else ""


def _common_folder(names: Sequence[str]) -> str:
    """Return what the names of folders have in common, with a star; digits do not count."""
    if len(set(names)) == 1:
        return glob.escape(names[0])
    start, end = _common_ends(names)
    return "*".join(text if re.search(r"[^\W\d_]", text) else "" for text in (start, end))


def _leave_out_folders(
    globs: Sequence[str], places: Set[Path], known: Set[Path], root: Path
) -> list[str]:
    """Return globs for the parts of folders that fit no others, if a set of characters does that.

    ``label*`` for ``label1`` and ``label2`` becomes ``label[12]`` beside ``label``.
    """
    rows, others = (
        [path.relative_to(root).parts for path in paths if path.is_relative_to(root)]
        for paths in (places, known - places)
    )
    fitting = [
        parts
        for parts in others
        if len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))
    ]
    exact = list(globs)
    for k, pattern in enumerate(globs):
        names = {parts[k] for parts in rows}
        if "*" in pattern and any(parts[k] not in names for parts in fitting):
            exact[k] = _set_of_characters(sorted(names)) or pattern
    return exact


def _set_of_characters(names: Sequence[str]) -> str:
    """Return a glob for names that differ in one letter or digit, or ``""``."""
    same = itertools.takewhile(lambda row: len(set(row)) == 1, zip(*names, strict=False))
    start = "".join(row[0] for row in same)
    middles = {name[len(start) : len(start) + 1] for name in names}
    ends = {name[len(start) + 1 :] for name in names}
    if len(ends) > 1 or not all(map(str.isalnum, middles)):
        return ""
    return f"{glob.escape(start)}[{''.join(sorted(middles))}]{glob.escape(ends.pop())}"


def _common_ends(texts: Sequence[str]) -> tuple[str, str]:
    """Return the parts with which all texts begin and end; at least one part lies between."""
    rows = [split_folder(text) for text in texts]
    width = min(map(len, rows)) - 1
    start = next((k for k in range(width) if len({row[k] for row in rows}) > 1), width)
    end = next(
        (k for k in range(width - start) if len({row[-1 - k] for row in rows}) > 1), width - start
    )
    first = rows[0]
    return glob.escape("".join(first[:start])), glob.escape("".join(first[len(first) - end :]))
