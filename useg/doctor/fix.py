"""Survey -> what ``useg inspect`` writes: a clean copy (--fix), or a description (--init).

The clean copy contains ``images/``, ``masks/`` (palette PNGs of class ids), ``classes.toml``,
``split.csv``, and a log of all changes in ``changes.json`` and ``changes.txt``. The original data
do not change.

The description consists of ``classes.toml``, ``split.csv`` and ``dataset.toml`` in the data folder.
They contain what useg recognised, so the user only needs to change what is wrong.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from useg.classes import IGNORE, ClassTable, Label, classes_to_toml, write_classes
from useg.data.dataset import Dataset, Pair, pair_name, read_pair_image
from useg.data.layouts import find_dataset
from useg.data.split_files import write_split_csv
from useg.doctor.faulty_files import FORMAT_SUFFIX, detect_file_format
from useg.doctor.mask_codes import class_ids_by_code, read_ids
from useg.doctor.measure import Repair
from useg.doctor.survey import Survey
from useg.errors import DataError, MachineError, UsageError, format_count
from useg.files import comparable_name, make_folder, replacing, replacing_folder
from useg.images.formats import ALL_PAGES
from useg.images.image_files import Image, write_label, write_picture
from useg.machine import in_parallel
from useg.ownership import recognize_none
from useg.parsing import printable

_UNREPAIRED = "left out: after all repairs, its mask has another size or unknown values"

# Files of the description. The last one refers to the others, so it is written last.
DESCRIPTION_FILES = ("classes.toml", "split.csv", "dataset.toml")


@dataclass(frozen=True)
class Change:
    """One change in the clean copy.

    Args:
        file: the name of the pair or file; empty if the description names it.
        description: what was done.
        finding_kind: the kind of the finding that it repairs.
    """

    file: str
    description: str
    finding_kind: str


@dataclass(frozen=True)
class CleanCopy:
    """The clean copy: its folder, its number of pairs, and the log."""

    out: Path
    num_pairs: int
    changes: tuple[Change, ...]


def check_output_folder(out: Path, data: Path) -> None:
    """Check the output folder before reading any data.

    Raises:
        UsageError: it is not empty, or lies inside the data.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        state = "is not empty" if out.is_dir() else "is a file"
        raise UsageError(
            f"{out} {state}, but the clean copy needs a new or empty folder; "
            "choose another one or remove it"
        )
    folder = data if data.is_dir() else data.parent
    # Unlike Path.resolve, this accepts a cycle of links.
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UsageError(
            f"{out} lies inside {folder}, and useg never changes the data; "
            "choose a folder outside it"
        )


def write_clean_copy(survey: Survey, out: Path, *, drop_doubtful: bool = False) -> CleanCopy:
    """Write a clean copy of a data set.

    It omits pairs that cannot be repaired and exact duplicates. Images are copied byte by byte. The
    copy is written next to ``out`` and renamed at the end, so a failure leaves no files.

    Args:
        survey: from :func:`useg.doctor.survey.survey_dataset`.
        out: a folder that does not exist or is empty.
        drop_doubtful: also omit doubtful pairs, such as near duplicates; otherwise
            the log lists them as kept.

    Raises:
        UsageError: ``out`` is not such a folder or cannot be written, or fewer than two pairs
            remain.
    """
    check_output_folder(out, survey.root)
    make_folder(out.absolute().parent)
    with replacing_folder(out, recognize_none) as draft:
        return replace(_write_draft(draft, survey, drop_doubtful), out=out)


def _write_draft(draft: Path, survey: Survey, drop_doubtful: bool) -> CleanCopy:
    (draft / "images").mkdir()
    (draft / "masks").mkdir()
    dataset = survey.dataset
    repairs: dict[Pair, list[Repair]] = {pair: [] for pair in dataset.pairs}
    for repair in (repair for finding in survey.findings for repair in finding.repairs):
        if repair.pair is not None:
            repairs[repair.pair].append(repair)
    dropped = {
        pair
        for pair in dataset.pairs
        for each in repairs[pair]
        if each.leave_out and (drop_doubtful or not each.is_doubtful)
    }
    kept = [pair for pair in dataset.pairs if pair not in dropped]
    names = dict(zip(kept, _unique_names(kept, dataset), strict=True))
    table = ClassTable(dataset.classes.names, dataset.classes.colors, ignore=(IGNORE,))

    def write(pair: Pair) -> Pair | None:
        return _write_pair(draft, names[pair], pair, repairs[pair], dataset, table)

    written = list(in_parallel(write, kept))
    pairs = tuple(pair for pair in written if pair is not None)
    if len(pairs) < 2:
        raise UsageError(
            f"only {format_count(len(pairs), 'pair')} of {len(dataset.pairs)} can be repaired, but "
            f"a data set needs two; see useg inspect {dataset.root}"
        )
    changes = _list_changes(survey, set(kept))
    changes += [
        Change(pair_name(pair, dataset.root), _UNREPAIRED, "unfit pair")
        for pair, copy in zip(kept, written, strict=True)
        if copy is None
    ]
    write_classes(draft / "classes.toml", table)
    if all(pair.split for pair in pairs):
        write_split_csv(draft / "split.csv", Dataset(draft, "folders", pairs, table))
    _write_log(draft, survey, changes, len(pairs))
    return CleanCopy(draft, len(pairs), tuple(changes))


def _list_changes(survey: Survey, kept: set[Pair]) -> list[Change]:
    """List the repairs of the findings; for omitted pairs, only the reason."""
    root = survey.root
    return [
        Change(
            pair_name(repair.pair, root) if repair.pair else "",
            _describe(repair, is_kept=repair.pair in kept),
            finding.kind,
        )
        for finding in survey.findings
        for repair in finding.repairs
        if repair.leave_out or repair.pair is None or repair.pair in kept
    ]


def _describe(repair: Repair, *, is_kept: bool) -> str:
    """Describe the repair; for a pair that is kept unchanged, the possible repair."""
    if repair.leave_out and repair.pair and is_kept:
        reason = repair.description.removeprefix("left out: ")
        how = "--drop-doubtful, in Python drop_doubtful=True, leaves it out"
        return f"kept, but check it: {reason} ({how})"
    return repair.description


def _write_pair(
    draft: Path,
    name: str,
    pair: Pair,
    repairs: Sequence[Repair],
    dataset: Dataset,
    table: ClassTable,
) -> Pair | None:
    """Write an image and its repaired mask; return the new pair, or None if it is unfit."""
    label = read_repaired_label(pair, repairs, dataset)
    image = read_pair_image(pair)
    if label is None or label.shape != image.shape[:2]:
        return None
    mask = draft / "masks" / f"{name}.png"
    write_label(mask, label, table)
    split = next((repair.split for repair in repairs if repair.split), pair.split)
    return Pair(_write_image(draft / "images" / name, pair, image), mask, split)


def read_repaired_label(pair: Pair, repairs: Sequence[Repair], dataset: Dataset) -> Label | None:
    """Read a pair's label map ``(H, W)`` and repair it; None if codes without a class remain."""
    source = next((repair.mask_source for repair in repairs if repair.mask_source), pair)
    class_ids = class_ids_by_code(dataset)
    for repair in repairs:
        class_ids |= repair.class_ids
    ids = read_ids(source, dataset, class_ids)
    if (ids < 0).any():
        return None
    label = ids.astype(np.uint8)
    for repair in repairs:
        label = repair.transform(label) if repair.transform else label
    return label


def _write_image(path: Path, pair: Pair, image: Image) -> Path:
    """Copy the file, with the suffix of its content; write a page of a stack as a new file."""
    if pair.page is None:
        suffix = FORMAT_SUFFIX.get(detect_file_format(pair.image), "")
        own_suffix = pair.image.suffix
        if suffix in ("", _common_suffix(own_suffix)):
            suffix = own_suffix
        target = path.with_name(path.name + suffix)
        shutil.copyfile(pair.image, target)
    elif image.dtype == np.uint8 and image.shape[2] == 3:
        target = path.with_name(path.name + ".png")
        write_picture(target, image)
    else:
        target = path.with_name(path.name + ".tif")
        bands = image[..., 0] if image.shape[2] == 1 else image
        tifffile.imwrite(target, bands, photometric="minisblack")
    return target


def _common_suffix(suffix: str) -> str:
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix.lower(), suffix.lower())


def _unique_names(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Name each pair by the stem of its image; duplicates get the names of folders or a number.

    Names are also unique on file systems that ignore case.
    """
    stems = [
        pair.image.stem if pair.page in (None, ALL_PAGES) else f"{pair.image.stem}_{pair.page:04d}"
        for pair in pairs
    ]
    occurrences = Counter(map(comparable_name, stems))
    names: dict[str, str] = {}
    for pair, stem in zip(pairs, stems, strict=True):
        if occurrences[comparable_name(stem)] > 1:
            folders = Path(pair_name(pair, dataset.root)).parent.parts
            stem = "_".join((*folders, stem)).strip("_/")
        numbered = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        name = next(name for name in numbered if comparable_name(name) not in names)
        names[comparable_name(name)] = name
    return list(names.values())


def _write_log(draft: Path, survey: Survey, changes: Sequence[Change], num_pairs: int) -> None:
    unrepaired = [
        finding for finding in survey.findings if not finding.repairs and finding.severity != "note"
    ]
    content: dict[str, Any] = {
        "source": str(survey.root),
        "num_pairs": {"before": survey.num_pairs, "after": num_pairs},
        "changes": [
            {"file": change.file, "change": change.description, "because": change.finding_kind}
            for change in changes
        ],
        "not_mended": [
            {"kind": finding.kind, "message": finding.message, "remedy": finding.remedy}
            for finding in unrepaired
        ],
    }
    (draft / "changes.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    lines = [
        f"A clean copy of {survey.root}: {format_count(num_pairs, 'pair')} of {survey.num_pairs}, "
        f"{format_count(len(changes), 'change')}",
        "",
    ]
    for change in changes:
        file = f"{change.file}: " if change.file else ""
        lines.append(f"{file}{change.description} ({change.finding_kind})")
    if unrepaired:
        lines += ["", "Not repaired, because only you can decide:"]
    lines += [f"{finding.kind}: {finding.message}; {finding.remedy}" for finding in unrepaired]
    (draft / "changes.txt").write_text(printable("\n".join(lines)) + "\n", "utf-8")


def check_no_description(data: Path) -> None:
    """Refuse to overwrite an existing description.

    Raises:
        DataError: one of the files exists.
    """
    folder = data if data.is_dir() else data.parent
    there = [folder / name for name in DESCRIPTION_FILES if os.path.lexists(folder / name)]
    if there:
        raise DataError(
            f"'{there[0]}' already exists and is not replaced, because it may have been edited; "
            "edit it, or move it away first"
        )


def write_description(survey: Survey) -> tuple[Path, ...]:
    """Write ``classes.toml``, ``split.csv`` and ``dataset.toml`` into the data's folder.

    They are read back, and removed if the data set would change.

    Returns:
        The files.

    Raises:
        DataError: one of the files exists, or the data cannot be described so.
        MachineError: the folder cannot be written.
    """
    dataset = survey.dataset
    check_no_description(dataset.root)
    written: list[Path] = []
    try:
        for name in DESCRIPTION_FILES:
            path = dataset.root / name
            if name == "split.csv":
                if not all(pair.split for pair in dataset.pairs):
                    continue
                write_split_csv(path, dataset)
            else:
                text = classes_to_toml(dataset.classes)
                text = text if name == "classes.toml" else _dataset_toml(dataset, written)
                # Nothing is replaced.
                with replacing(path, lambda _: False) as draft:
                    draft.write_text(text, "utf-8")
            written.append(path)
        _check_equal(find_dataset(dataset.root, strict=False), dataset)
    except (DataError, MachineError):
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return tuple(written)


def _check_equal(again: Dataset, dataset: Dataset) -> None:
    if (again.pairs, again.classes) != (dataset.pairs, dataset.classes):
        raise DataError(
            f"useg inspect --init cannot describe '{dataset.root}' in a dataset.toml; write one "
            "by hand"
        )


def _dataset_toml(dataset: Dataset, written: Sequence[Path]) -> str:
    names = [path.name for path in written]
    lines = [
        f"# What useg recognised here: {len(dataset.pairs)} pairs, layout {dataset.layout}.",
        "# Edit this file where it is wrong; useg inspect shows the effect.",
        "",
        "# Names, values and colours of the classes:",
        'classes = "classes.toml"',
    ]
    if "split.csv" in names:
        lines += ["# Which images are for training (train), validation (val) and testing (test):"]
        lines += ['splits = "split.csv"']
    encoding = dataset.encoding
    lines += [
        "",
        "# Whether each value other than 0 in a mask is the number of one object:",
        f"objects = {str(encoding.objects).lower()}",
        "# Whether the classes are in the transparency of the masks:",
        f"alpha = {str(encoding.alpha).lower()}",
        '# What an image without annotations is: "background", or "ignore" if it is unfinished:',
        f'empty = "{"ignore" if encoding.ignore_empty else "background"}"',
        "",
        "# Further values or class names to ignore:",
        "# ignore = [255]",
        "# The images and their masks, if useg pairs them wrongly:",
        '# images = "photos/*.jpg"',
        '# masks = "truth/*_mask.png"',
    ]
    return "\n".join(lines) + "\n"
