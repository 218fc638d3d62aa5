"""A survey -> a clean copy of its data set, with a log of every change; the original is never touched."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from useg.classes import IGNORE, ClassTable, Label, write_classes
from useg.data.dataset import Dataset, Pair, pair_name, read_pair_image, write_split_csv
from useg.doctor.damage import FORMAT_SUFFIX, detect_file_format
from useg.doctor.measure import Repair, class_ids_by_code, map_codes, pluralize, read_codes
from useg.doctor.survey import Survey
from useg.errors import UsageError
from useg.images.files import Image, write_label, write_picture
from useg.machine import in_parallel


@dataclass(frozen=True)
class Change:
    """What was done to ``file`` (a pair's name, or a file's), and the kind of the finding ``because`` of which."""

    file: str
    does: str
    because: str


@dataclass(frozen=True)
class CleanCopy:
    """The clean copy: its folder, its number of pairs, and the log."""

    out: Path
    num_pairs: int
    changes: tuple[Change, ...]


def check_output_folder(out: Path, data: Path) -> None:
    """Refuse a folder for the clean copy before anything is read.

    Raises:
        UsageError: it has something in it, or lies inside the data.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise UsageError(
            f"{out} {what}, but the clean copy goes into a new or empty folder; give another one or remove it"
        )
    folder = data if data.is_dir() else data.parent
    if out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"{out} lies inside {folder}, which is never changed; give a folder beside it"
        )


def write_clean_copy(report: Survey, out: Path) -> CleanCopy:
    """Write a clean copy: ``images/``, ``masks/`` (palette PNGs of class ids), ``classes.toml``, ``split.csv``, ``changes.json``, ``changes.txt``.

    Pairs that cannot be mended are left out; images are copied as they are. Everything is written beside ``out`` and renamed at the end: a
    failure leaves nothing.

    Args:
        report: from :func:`useg.doctor.survey.survey_dataset`.
        out: a folder that does not exist yet or is empty.

    Raises:
        UsageError: something else than that was given, fewer than two pairs remain, or the folder cannot be written.
    """
    check_output_folder(out, report.root)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            draft = (
                Path(folder) / "draft"
            )  # inside, because the temporary folder itself is private to its owner
            mended = replace(_fill(draft, report), out=out)
            if out.exists():
                out.rmdir()
            draft.rename(out)
    except OSError as error:
        raise UsageError(
            f"{out} cannot be written ({error.strerror}); choose another place or free it"
        ) from error
    return mended


def _fill(draft: Path, report: Survey) -> CleanCopy:
    (draft / "images").mkdir(parents=True)
    (draft / "masks").mkdir()
    dataset = report.dataset
    cures: dict[Pair, list[Repair]] = {pair: [] for pair in dataset.pairs}
    for cure in (cure for finding in report.findings for cure in finding.cures):
        if cure.pair is not None:
            cures[cure.pair].append(cure)
    kept = [pair for pair in dataset.pairs if not any(cure.leave_out for cure in cures[pair])]
    gone = set(dataset.pairs) - set(kept)
    changes = [
        Change(pair_name(cure.pair, dataset.root) if cure.pair else "", cure.does, finding.kind)
        for finding in report.findings
        for cure in finding.cures
        if cure.leave_out or cure.pair not in gone
    ]
    names = dict(zip(kept, _names(kept, dataset), strict=True))
    table = ClassTable(dataset.classes.names, dataset.classes.colors, ignore=(IGNORE,))
    written = list(
        in_parallel(
            lambda pair: _write_pair(draft, pair, names[pair], cures[pair], dataset, table), kept
        )
    )
    changes += [
        Change(pair_name(pair, dataset.root), found, "unfit pair")
        for pair, found in zip(kept, written, strict=True)
        if isinstance(found, str)
    ]
    pairs = tuple(pair for pair in written if isinstance(pair, Pair))
    if len(pairs) < 2:
        raise UsageError(
            f"only {pluralize(len(pairs), 'pair')} of {len(dataset.pairs)} could be mended, which is no data set; see useg inspect {dataset.root}"
        )
    write_classes(draft / "classes.toml", table)
    if all(pair.split for pair in pairs):
        write_split_csv(draft / "split.csv", Dataset(draft, "folders", pairs, table))
    _write_log(draft, report, changes, len(pairs))
    return CleanCopy(draft, len(pairs), tuple(changes))


def _write_pair(
    draft: Path, pair: Pair, name: str, cures: Sequence[Repair], dataset: Dataset, table: ClassTable
) -> Pair | str:
    """Write an image and its mended mask; returns the new pair, or why there is none."""
    label = read_repaired_label(pair, cures, dataset)
    image = read_pair_image(pair)
    if label is None or label.shape != image.shape[:2]:
        return "left out: its mask could not be brought to the image's size and the classes' values"
    split = next((cure.split for cure in cures if cure.split), pair.split)
    mask = draft / "masks" / f"{name}.png"
    write_label(mask, label, table)
    return Pair(_write_image(draft / "images" / name, pair, image), mask, split)


def read_repaired_label(pair: Pair, cures: Sequence[Repair], dataset: Dataset) -> Label | None:
    """Read a pair's label map ``(H, W)`` as its cures make it; None where it still has codes that no class has."""
    source = next((cure.source for cure in cures if cure.source), pair)
    codes = read_codes(source, dataset)
    ids = map_codes(
        codes,
        class_ids_by_code(dataset) | {code: k for cure in cures for code, k in cure.ids.items()},
        -1,
    )
    if (ids < 0).any():
        return None
    label = ids.astype(np.uint8)
    for cure in cures:
        label = cure.change(label) if cure.change else label
    return label


def _write_image(path: Path, pair: Pair, image: Image) -> Path:
    """Copy the file as it is, under the suffix of its content; a page of a stack becomes a file of its own."""
    if pair.page is None:
        kind = detect_file_format(pair.image)
        suffix = (
            pair.image.suffix
            if FORMAT_SUFFIX.get(kind, "") == _usual(pair.image.suffix)
            else FORMAT_SUFFIX.get(kind, pair.image.suffix)
        )
        target = path.with_name(path.name + suffix)
        shutil.copyfile(pair.image, target)
        return target
    if image.dtype == np.uint8 and image.shape[2] == 3:
        target = path.with_name(path.name + ".png")
        write_picture(target, image)
    else:
        target = path.with_name(path.name + ".tif")
        tifffile.imwrite(
            target, image[..., 0] if image.shape[2] == 1 else image, photometric="minisblack"
        )
    return target


def _usual(suffix: str) -> str:
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix.lower(), suffix.lower())


def _names(pairs: Sequence[Pair], dataset: Dataset) -> list[str]:
    """Name each pair by its image's stem; where two share it, by the folders above too."""
    stems = [
        pair.image.stem if pair.page is None else f"{pair.image.stem}_{pair.page:04d}"
        for pair in pairs
    ]
    shared = Counter(stem.casefold() for stem in stems)
    return [
        stem
        if shared[stem.casefold()] == 1
        else "_".join((*Path(pair_name(pair, dataset.root)).parent.parts, stem)).strip("_/")
        for pair, stem in zip(pairs, stems, strict=True)
    ]


def _write_log(draft: Path, report: Survey, changes: Sequence[Change], num_pairs: int) -> None:
    left = [
        finding for finding in report.findings if not finding.cures and finding.severity != "note"
    ]
    content: dict[str, Any] = {
        "source": str(report.root),
        "num_pairs": {"before": report.num_pairs, "after": num_pairs},
        "changes": [
            {"file": change.file, "change": change.does, "because": change.because}
            for change in changes
        ],
        "not_mended": [
            {"kind": finding.kind, "message": finding.message, "remedy": finding.remedy}
            for finding in left
        ],
    }
    (draft / "changes.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    lines = [
        f"A clean copy of {report.root}: {pluralize(num_pairs, 'pair')} of {report.num_pairs}, {pluralize(len(changes), 'change')}",
        "",
    ]
    lines += [
        f"{change.file + ': ' if change.file else ''}{change.does} ({change.because})"
        for change in changes
    ]
    lines += ["", "Not mended, because only you can know what is right:"] * bool(left)
    lines += [f"{finding.kind}: {finding.message}; {finding.remedy}" for finding in left]
    (draft / "changes.txt").write_text("\n".join(lines) + "\n", "utf-8")
