"""Data set -> its content and its problems, found before training.

Every pair is read and measured once. If no file contains a class table, it is derived from all
masks; values that result from smoothing or JPEG compression do not become classes. Then each check
looks for one kind of problem in the measurements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from useg.classes import IGNORE, ClassTable
from useg.console import format_table
from useg.data import cache_folder
from useg.data.classes_from_masks import ClassDecision, decide_classes
from useg.data.dataset import COLOR_FLAG, SPLITS, Dataset, MaskEncoding, Pair
from useg.doctor import (
    alignment,
    appearance,
    balance,
    exchanged_classes,
    faulty_files,
    leaks,
    single_masks,
    stored_values,
)
from useg.doctor.mask_codes import map_codes
from useg.doctor.measure import (
    Finding,
    MeasuredDataset,
    Measurement,
    Severity,
    measure_pair,
    relative_name,
)
from useg.errors import DataError, format_count, join_names
from useg.files import find_cache_folder
from useg.machine import in_parallel

Check = Callable[[MeasuredDataset], Iterator[Finding]]

# More findings of one kind are merged: in JSON and on the page, and in printed lines.
MAX_FINDINGS_OF_A_KIND = 5
MAX_LINES_OF_A_KIND = 2

# Number of files that merged findings name.
_MAX_NAMED_FILES = 3

# The class table of a data set without one, until its masks are measured.
PLACEHOLDER_CLASSES = ClassTable(("not decided",), values=((1 << 16) - 1,))

# Findings of one severity are listed in this order.
CHECKS: tuple[Check, ...] = (
    faulty_files.check_unpaired_files,
    faulty_files.check_unreadable_files,
    faulty_files.check_skipped,
    faulty_files.check_mask_sizes,
    stored_values.check_class_table,
    stored_values.check_mask_values,
    exchanged_classes.check_inverted_masks,
    exchanged_classes.check_exchanged_classes,
    exchanged_classes.check_renumbered_masks,
    alignment.check_common_shift,
    alignment.check_common_placement,
    alignment.check_common_turn,
    alignment.check_exchanged_tiles,
    alignment.check_exchanged_masks,
    single_masks.check_copied_masks,
    single_masks.check_single_masks,
    leaks.check_duplicates,
    leaks.check_hidden_copies,
    faulty_files.check_exposure,
    faulty_files.check_mixed_images,
    faulty_files.check_file_suffixes,
    balance.check_single_class_masks,
    balance.check_class_pixels,
    balance.check_split_shares,
    balance.check_grey_split,
    balance.check_split_sizes,
    balance.check_frames,
    balance.check_bands,
    balance.check_constant_region,
    appearance.check_negative_images,
    appearance.check_exchanged_image_colors,
    appearance.check_undrawn_classes,
    leaks.check_video_sequences,
    stored_values.describe_stored_values,
)

# These compare the edges of masks with those of images, which the noise of some masks hides.
_EDGE_CHECKS = (
    alignment.check_common_shift,
    alignment.check_common_placement,
    alignment.check_common_turn,
    alignment.check_exchanged_tiles,
    alignment.check_exchanged_masks,
    single_masks.check_single_masks,
)

# Training repeats these warnings: with such images or masks, a model would learn something wrong.
_DOUBTS = (
    "negative images",
    "red and blue of images exchanged",
    "colours of splits differ",
    "sizes of splits differ",
    "frame around masks",
    "class not drawn everywhere",
    "outlines too wide or too narrow",
    "masks fit no images",
    exchanged_classes.RENUMBERED_KIND,
    single_masks.NO_FIT_KIND,
)

# The last check sees only the pairs in which the others found no error.
FINAL_CHECK: Check = single_masks.check_suspicious_labels


@dataclass(frozen=True)
class Survey:
    """The content of a data set, and all findings.

    Args:
        dataset: its pairs, with the class table, derived from the masks if no file has one.
        num_pairs: pairs of image and mask, including unreadable ones.
        sizes: ``"WxH"`` of the images -> number of images.
        bands: number of bands -> number of images.
        dtypes: number type -> number of images.
        splits: split -> number of pairs.
        pixels: pixels of each class.
        images: images in which each class occurs.
        ignored: pixels that do not count.
        findings: errors first.
    """

    dataset: Dataset
    num_pairs: int
    sizes: Counter[str]
    bands: Counter[int]
    dtypes: Counter[str]
    splits: dict[str, int]
    pixels: tuple[int, ...]
    images: tuple[int, ...]
    ignored: int
    findings: tuple[Finding, ...]

    @property
    def root(self) -> Path:
        """The data set's folder."""
        return self.dataset.root

    @property
    def layout(self) -> str:
        """The name of its layout."""
        return self.dataset.layout

    @property
    def splits_by(self) -> str:
        """How the splits were made, in words."""
        return self.dataset.splits_by

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in order of their ids."""
        return self.dataset.classes.names

    @property
    def shares(self) -> tuple[float, ...]:
        """Each class's share of the counted pixels, from 0 to 1."""
        total = max(1, sum(self.pixels))
        return tuple(pixels / total for pixels in self.pixels)

    @property
    def ignore_share(self) -> float:
        """Share of all pixels that do not count, from 0 to 1."""
        return self.ignored / max(1, self.ignored + sum(self.pixels))

    def as_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types."""
        colors = self.dataset.classes.colors
        rows = zip(self.classes, self.pixels, self.shares, self.images, colors, strict=True)
        num_skipped = len(self.dataset.skipped)
        return {
            **({"num_passed_over": num_skipped} if num_skipped else {}),
            "root": str(self.root),
            "layout": self.layout,
            "num_pairs": self.num_pairs,
            "sizes": dict(self.sizes),
            "bands": {str(bands): count for bands, count in self.bands.items()},
            "dtypes": dict(self.dtypes),
            "splits": self.splits,
            "splits_by": self.splits_by,
            "ignore_share": self.ignore_share,
            "classes": [
                {
                    "id": k,
                    "name": name,
                    "pixels": pixels,
                    "share": share,
                    "images": images,
                    "color": list(color),
                }
                for k, (name, pixels, share, images, color) in enumerate(rows)
            ],
            "findings": [
                {
                    "kind": finding.kind,
                    "severity": finding.severity,
                    "files": [str(path) for path in finding.files],
                    "message": finding.message,
                    "remedy": finding.remedy,
                }
                for finding in self.findings
            ],
        }

    def lines(self) -> list[str]:
        """Return a summary in plain text; many findings of one kind take one line."""
        return [*self._content_lines(), *self._class_lines(), *self._finding_lines()]

    def _content_lines(self) -> list[str]:
        sizes = ", ".join(
            size if count == self.num_pairs else f"{size} ({count})"
            for size, count in self.sizes.most_common(3)
        )
        more = f" and {len(self.sizes) - 3} more sizes" if len(self.sizes) > 3 else ""
        bands = " and ".join(format_count(bands, "band") for bands in sorted(self.bands))
        dtypes = " and ".join(sorted(self.dtypes))
        images = f"{sizes}{more}; {bands}, {dtypes}" if self.sizes else "none could be read"
        splits = ", ".join(
            f"{count} {split or 'not decided'}" for split, count in self.splits.items()
        )
        splits_by = f" ({self.splits_by})" if self.splits_by else ""
        num_skipped = len(self.dataset.skipped)
        what = "annotation file or part of one" if num_skipped == 1 else "annotation files or parts"
        skipped = f"skipped  {num_skipped} {what}"
        ignored = f"{100 * self.ignore_share:.1f} %"
        return [
            f"{self.root}: {self.num_pairs} pairs, layout {self.layout}",
            f"images   {images}",
            f"splits   {splits}{splits_by}",
            f"classes  {len(self.classes)}; {ignored} of the pixels are ignored",
            *([skipped] if num_skipped else []),
        ]

    def _class_lines(self) -> list[str]:
        rows = [
            (name, str(k), f"{100 * share:.3f} %", f"{images:,}")
            for k, (name, share, images) in enumerate(
                zip(self.classes, self.shares, self.images, strict=True)
            )
        ]
        table = format_table(("class", "id", "share of pixels", "images"), rows)
        return [f"  {line}" for line in table]

    def _finding_lines(self) -> list[str]:
        counts = Counter(finding.severity for finding in self.findings)
        totals = ", ".join(format_count(count, severity) for severity, count in counts.items())
        merged = _merge_findings(self.findings, self.dataset, MAX_LINES_OF_A_KIND)
        return [
            f"findings {totals or 'none'}",
            *(f"  {each.severity}: {each.message}; {each.remedy}" for each in merged),
        ]


def survey_dataset(
    dataset: Dataset,
    split: Callable[[Dataset], Dataset] = lambda decided: decided,
) -> Survey:
    """Read every pair once and describe the data set; damaged pairs become findings.

    Args:
        dataset: from :func:`useg.data.layouts.find_dataset` with ``strict=False``. If its class
            table comes from :func:`defer_classes`, it is derived from the masks.
        split: assigns the splits when the classes are known.
    """
    measure = partial(measure_pair, dataset=dataset, palettes=are_classes_deferred(dataset))
    data = decide_from_measurements(dataset, list(in_parallel(measure, dataset.pairs)))
    decided = split(data.dataset)
    measurements = tuple(
        replace(each, pair=pair)
        for each, pair in zip(data.measurements, decided.pairs, strict=True)
    )
    data = replace(data, dataset=decided, measurements=measurements)
    pixels = balance.sum_class_pixels(data, data.complete)
    images = [each.image for each in measurements if each.image is not None]
    num_classes = len(decided.classes)
    splits = Counter(pair.split for pair in decided.pairs)
    return Survey(
        dataset=decided,
        num_pairs=len(decided.pairs),
        sizes=Counter(f"{image.size[0]}x{image.size[1]}" for image in images),
        bands=Counter(image.bands for image in images),
        dtypes=Counter(image.dtype for image in images),
        splits={name: splits[name] for name in (*SPLITS, "") if splits[name]},
        pixels=tuple(int(count) for count in pixels[:num_classes]),
        images=tuple(
            sum(bool(data.counts[each.pair][k]) for each in data.complete)
            for k in range(num_classes)
        ),
        ignored=int(pixels[IGNORE]),
        findings=run_checks(data),
    )


def refuse_faulty(dataset: Dataset, say: Callable[[str], None]) -> None:
    """Refuse a data set in which ``useg inspect`` finds errors; training calls this first.

    Args:
        dataset: its pairs, with the class table and the splits decided. If nothing has changed
            since it was last found to be sound, no file is decoded.
        say: receives each warning that images or masks may be wrong, as a sentence.

    Raises:
        DataError: there are errors; the message lists them and the remedies.
    """
    for doubt in _find_doubts(dataset):
        say(doubt)


def _find_doubts(dataset: Dataset) -> tuple[str, ...]:
    """Return the warnings of :func:`refuse_faulty`, which are stored in the cache."""
    folder, key = find_cache_folder(), None
    if folder is not None:
        with suppress(OSError):
            splits = " ".join(pair.split for pair in dataset.pairs)
            key = cache_folder.make_cache_key(folder, dataset, dataset.pairs, "doubts", splits)
    if folder is not None and key is not None:
        with suppress(OSError):
            if entry := cache_folder.find_cached(folder, key.key):
                return tuple((entry / "doubts").read_text("utf-8").splitlines())
    findings = survey_dataset(dataset).findings
    errors = [each for each in findings if each.severity == "error"]
    if errors:
        raise DataError(_describe_errors(errors, dataset))
    doubts = tuple(
        " ".join(f"useg inspect warns: {each.message}; {each.remedy}".split())
        for each in findings
        if each.kind in _DOUBTS and each.severity != "note"
    )
    if folder is not None and key is not None:
        with suppress(OSError), cache_folder.create_cached(folder, key.key) as entry:
            (entry / "doubts").write_text("\n".join(doubts), "utf-8")
            key.check()
    return doubts


def _describe_errors(errors: Sequence[Finding], dataset: Dataset) -> str:
    first = errors[0]
    others = sorted({each.kind for each in errors[1:]} - {first.kind})
    more = f"; also found: {', '.join(others)}" if others else ""
    mend = any(each.repairs for each in errors)
    fix = f"run useg inspect {dataset.root} --fix OUT, which writes a repaired copy, or " * mend
    return (
        f"useg inspect finds {format_count(len(errors), 'error')} in '{dataset.root}': "
        f"{first.message} ({first.remedy}){more}; {fix}correct the data, or train as they are with "
        "--force (force=True in Python)"
    )


def run_checks(data: MeasuredDataset) -> tuple[Finding, ...]:
    """Run every check and return what they find, errors first."""
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    found: list[Finding] = []
    plain = data
    for check in CHECKS:
        part = plain if check in _EDGE_CHECKS else data
        found += _merge_findings(list(check(part)), data.dataset, MAX_FINDINGS_OF_A_KIND)
        if check is stored_values.check_mask_values:
            noisy = {
                path
                for each in found
                if each.kind in stored_values.NOISY_KINDS
                for path in each.files
            }
            plain = _without_files(data, noisy)
    wrong = {
        path
        for finding in found
        if finding.severity == "error" or finding.kind == single_masks.NO_FIT_KIND
        for path in finding.files
    }
    found += FINAL_CHECK(_without_files(data, wrong))
    return tuple(sorted(found, key=lambda finding: order[finding.severity]))


def _without_files(data: MeasuredDataset, files: set[Path]) -> MeasuredDataset:
    """Leave out the pairs with one of these files.

    If there are none, it is ``data`` itself, so that nothing it has computed is computed again.
    """
    kept = tuple(
        each for each in data.measurements if not {each.pair.image, each.pair.mask} & files
    )
    return data if len(kept) == len(data.measurements) else replace(data, measurements=kept)


def _merge_findings(
    findings: Sequence[Finding], dataset: Dataset, max_of_a_kind: int
) -> list[Finding]:
    """Merge findings of one kind if there are more than ``max_of_a_kind``; keep the order."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.severity), []).append(finding)
    merged: list[Finding] = []
    for group in groups.values():
        # Findings about no file in particular all say something else.
        if len(group) <= max_of_a_kind or not any(each.files for each in group):
            merged += group
            continue
        # The last file of a finding is the one that is wrong; the others explain it.
        others = [relative_name(each.files[-1], dataset) for each in group[1:] if each.files]
        named = [f"'{name}'" for name in others[:_MAX_NAMED_FILES]]
        rest = len(group) - 1 - len(named)
        names = join_names([*named, format_count(rest, "other")] if rest else named)
        merged.append(
            replace(
                group[0],
                files=tuple(dict.fromkeys(path for each in group for path in each.files)),
                message=f"{group[0].message} (and {len(group) - 1} more: {names})",
                repairs=tuple(repair for each in group for repair in each.repairs),
                evidence={
                    **group[0].evidence,
                    **(
                        {"pairs": tuple(pair for each in group for pair in each.evidence["pairs"])}
                        if "pairs" in group[0].evidence
                        else {}
                    ),
                },
            )
        )
    return merged


def defer_classes(
    pairs: Sequence[Pair],
    encoding: MaskEncoding,
    ignore: Sequence[int] = (),
    *,
    root: Path | None = None,
    skip_unreadable: bool = True,
) -> ClassDecision:
    """Return a placeholder, so that each mask is read only once, by the survey.

    It is the ``infer`` of :func:`useg.data.layouts.find_dataset`.
    """
    return ClassDecision(replace(PLACEHOLDER_CLASSES, ignore=tuple(ignore)))


def are_classes_deferred(dataset: Dataset) -> bool:
    """Return whether a data set still has the placeholder for a class table."""
    return dataset.classes.names == PLACEHOLDER_CLASSES.names


def decide_from_measurements(
    dataset: Dataset, measurements: Sequence[Measurement]
) -> MeasuredDataset:
    """Combine a data set with its measurements, and derive the class table if there is none.

    :func:`useg.data.classes_from_masks.decide_classes` decides, as it does for training.
    """
    measurements = tuple(measurements)
    if not are_classes_deferred(dataset):
        return MeasuredDataset(dataset, measurements)
    masks = (each.mask for each in measurements if each.pair.truth is None)
    contents = [mask.content for mask in masks if mask is not None]
    decision = decide_classes(contents, dataset.classes.ignore, dataset.encoding, dataset.root)
    if decision.table.by_color:
        measurements = tuple(_with_color_codes(each) for each in measurements)
    decided = replace(dataset, classes=decision.table, notes=(*dataset.notes, *decision.notes))
    return MeasuredDataset(
        decided, measurements, classes_derived=True, class_problem=decision.problem
    )


def _with_color_codes(each: Measurement) -> Measurement:
    """Replace values by colours in a mask's measurement."""
    mask = each.mask
    if mask is None or bool((mask.codes >= COLOR_FLAG).all()):
        return each
    colors = {int(code): mask.content.as_color(int(code)) for code in mask.codes}
    codes, place = np.unique(list(colors.values()), return_inverse=True)
    content = replace(
        mask.content,
        codes=codes,
        counts=np.bincount(place, mask.counts).astype(np.int64),
        interior_counts=np.bincount(place, mask.interior_counts).astype(np.int64),
        ramp_counts=np.zeros(len(codes), np.int64),
        between_counts=np.zeros(len(codes), np.int64),
    )
    grid = map_codes(mask.code_grid, colors, COLOR_FLAG)
    return replace(each, mask=replace(mask, content=content, code_grid=grid))
