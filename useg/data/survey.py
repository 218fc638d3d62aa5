"""A data set -> what is in it and what is wrong with it, before an hour of training shows it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.data.dataset import Dataset, Pair, read_label
from useg.data.images import read_image, read_mask
from useg.data.splits import SPLITS, looks_filmed, sequences
from useg.errors import UsageError

Severity = Literal["error", "warning", "note"]
RARE = 0.005  # share of the counted pixels below which a class is called rare
_APART = 5


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing: ``message`` says what, ``remedy`` what to do; ``error`` means that training would stop or mislead."""

    kind: str
    severity: Severity
    files: tuple[Path, ...]
    message: str
    remedy: str


@dataclass(frozen=True)
class Survey:
    """What is in a data set.

    Args:
        root: its folder.
        layout: as recognised.
        num_pairs: pairs of image and mask, unreadable ones included.
        sizes: ``"WxH"`` of the images -> count; ``bands`` and ``dtypes`` likewise.
        splits: split -> number of pairs; ``splits_by`` says how they were made.
        classes: class names, in order of their ids.
        pixels: pixels of each class; ``images``: images in which it occurs.
        ignored: pixels that do not count.
        findings: errors first.
    """

    root: Path
    layout: str
    num_pairs: int
    sizes: Counter[str]
    bands: Counter[int]
    dtypes: Counter[str]
    splits: dict[str, int]
    splits_by: str
    classes: tuple[str, ...]
    pixels: tuple[int, ...]
    images: tuple[int, ...]
    ignored: int
    findings: tuple[Finding, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Each class's share of the counted pixels, 0..1."""
        total = max(1, sum(self.pixels))
        return tuple(pixels / total for pixels in self.pixels)

    @property
    def ignore_share(self) -> float:
        """Share of all pixels that do not count, 0..1."""
        return self.ignored / max(1, self.ignored + sum(self.pixels))

    def as_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types."""
        rows = zip(self.classes, self.pixels, self.shares, self.images, strict=True)
        return {
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
                {"id": k, "name": name, "pixels": pixels, "share": share, "images": images} for k, (name, pixels, share, images) in enumerate(rows)
            ],
            "findings": [
                {"kind": f.kind, "severity": f.severity, "files": [str(path) for path in f.files], "message": f.message, "remedy": f.remedy}
                for f in self.findings
            ],
        }

    def lines(self) -> list[str]:
        """Return a summary in plain text, one line each."""
        width = max(len(name) for name in self.classes)
        sizes = ", ".join(f"{size}" if count == self.num_pairs else f"{size} ({count})" for size, count in self.sizes.most_common(3))
        more = f" and {len(self.sizes) - 3} more sizes" if len(self.sizes) > 3 else ""
        kinds = " and ".join(f"{bands} band{'s' * (bands != 1)}" for bands in sorted(self.bands)) + ", " + " and ".join(sorted(self.dtypes))
        splits = ", ".join(f"{count} {split or 'not decided'}" for split, count in self.splits.items())
        text = [
            f"{self.root}: {self.num_pairs} pairs, layout {self.layout}",
            f"images   {sizes}{more}; {kinds}" if self.sizes else "images   none could be read",
            f"splits   {splits}" + (f" ({self.splits_by})" if self.splits_by else ""),
            f"classes  {len(self.classes)}; {self.ignore_share:.1%} of the pixels are ignored",
        ]
        for k, (name, share, images) in enumerate(zip(self.classes, self.shares, self.images, strict=True)):
            text.append(f"  {k:3}  {name:{width}}  {share:8.3%} of the pixels, in {images} image{'s' * (images != 1)}")
        counts = Counter(finding.severity for finding in self.findings)
        text.append("findings " + (", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items()) or "none"))
        text += [f"  {finding.severity}: {finding.message}; {finding.remedy}" for finding in self.findings]
        return text


@dataclass(frozen=True)
class _Look:
    """What one pair showed; ``counts`` ``(256,)`` are the pixels of each class id, or ``trouble`` says why there are none."""

    pair: Pair
    size: str = ""
    bands: int = 0
    dtype: str = ""
    counts: NDArray[np.int64] | None = None
    trouble: Finding | None = None


def survey(dataset: Dataset, progress: Callable[[], None] = lambda: None) -> Survey:
    """Read every pair and report what is there; damaged pairs become findings and stop nothing.

    Args:
        dataset: from :func:`useg.data.layouts.find` with ``strict=False``, best with its splits assigned.
        progress: called once per pair.
    """

    def look(pair: Pair) -> _Look:
        seen = _look(pair, dataset)
        progress()
        return seen

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks = list(pool.map(look, dataset.pairs))
    counts = _count(looks)
    num_classes = len(dataset.classes)
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    splits = Counter(pair.split for pair in dataset.pairs)
    return Survey(
        root=dataset.root,
        layout=dataset.layout,
        num_pairs=len(dataset.pairs),
        sizes=Counter(look.size for look in looks if look.size),
        bands=Counter(look.bands for look in looks if look.bands),
        dtypes=Counter(look.dtype for look in looks if look.dtype),
        splits={split: splits[split] for split in (*SPLITS, "") if splits[split]},
        splits_by=dataset.splits_by,
        classes=dataset.classes.names,
        pixels=tuple(int(n) for n in counts[:num_classes]),
        images=tuple(sum(look.counts is not None and bool(look.counts[k]) for look in looks) for k in range(num_classes)),
        ignored=int(counts[IGNORE]),
        findings=tuple(sorted(_findings(dataset, looks), key=lambda finding: order[finding.severity])),
    )


def _look(pair: Pair, dataset: Dataset) -> _Look:
    try:
        image = read_image(pair.image)
    except UsageError as error:
        return _Look(pair, trouble=_trouble("unreadable file", pair.image, error))
    seen = _Look(pair, f"{image.shape[1]}x{image.shape[0]}", image.shape[2], str(image.dtype))
    try:
        read_mask(pair.mask)
    except UsageError as error:
        return replace(seen, trouble=_trouble("unreadable file", pair.mask, error))
    try:
        label = read_label(pair, dataset)
    except UsageError as error:
        return replace(seen, trouble=_trouble("unknown value", pair.mask, error))
    if label.shape != image.shape[:2]:
        message = f"image '{pair.image}' is {seen.size} pixels, but its mask '{pair.mask}' is {label.shape[1]}x{label.shape[0]}"
        remedy = "check that they belong together, or resize the mask (nearest neighbour)"
        return replace(seen, trouble=Finding("size mismatch", "error", (pair.image, pair.mask), message, remedy))
    return replace(seen, counts=np.bincount(label.ravel(), minlength=256))


def _trouble(kind: str, path: Path, error: UsageError) -> Finding:
    """Our errors end with what to do, after the last semicolon."""
    message, _, remedy = str(error).rpartition("; ")
    return Finding(kind, "error", (path,), message, remedy)


def _findings(dataset: Dataset, looks: Sequence[_Look]) -> Iterator[Finding]:
    for alone, what, other in ((dataset.images, "image", "mask"), (dataset.masks, "mask", "image")):
        if alone:
            message = f"{len(alone)} {what}s have no {other}, such as '{alone[0]}'" if len(alone) > 1 else f"'{alone[0]}' has no {other}"
            yield Finding(f"{what} without {other}", "error", alone, message, f"add the {other} under the same name or remove the {what}")
    for kind in ("unreadable file", "size mismatch", "unknown value"):
        yield from _grouped([look.trouble for look in looks if look.trouble is not None and look.trouble.kind == kind])
    yield from _mixtures(looks)
    yield from _class_findings(dataset, looks)
    yield from _split_findings(dataset)


def _grouped(findings: list[Finding]) -> list[Finding]:
    """Keep a few findings of one kind apart; join many."""
    if len(findings) <= _APART:
        return findings
    first = findings[0]
    files = tuple(path for finding in findings for path in finding.files)
    return [replace(first, files=files, message=f"{first.message} (and {len(findings) - 1} more pairs with the same kind of error)")]


def _mixtures(looks: Sequence[_Look]) -> Iterator[Finding]:
    sizes, bands, dtypes = ({getattr(look, name) for look in looks if look.size} for name in ("size", "bands", "dtype"))
    if len(sizes) > 1:
        message = f"the images have {len(sizes)} different sizes, from {min(sizes, key=_area)} to {max(sizes, key=_area)}"
        yield Finding("mixed sizes", "note", (), message, "nothing needs doing: each is brought to the working size")
    if len(bands) > 1:
        grey = bands == {1, 3}
        odd = Counter(look.bands for look in looks if look.size).most_common()[-1][0]
        files = tuple(look.pair.image for look in looks if look.bands == odd)
        remedy = "grey ones are repeated to three bands; check that this is meant" if grey else "give pictures with the same bands"
        yield Finding("mixed bands", "warning" if grey else "error", files, f"the images have {_and(sorted(bands))} bands", remedy)
    if len(dtypes) > 1:
        odd_dtype = Counter(look.dtype for look in looks if look.size).most_common()[-1][0]
        files = tuple(look.pair.image for look in looks if look.dtype == odd_dtype)
        yield Finding("mixed number types", "error", files, f"the images hold {_and(sorted(dtypes))} pixels", "convert them to one number type")


def _class_findings(dataset: Dataset, looks: Sequence[_Look]) -> Iterator[Finding]:
    names = dataset.classes.names
    total = _count(looks)[: len(names)]
    if not total.sum():
        return
    shares = total / total.sum()
    absent = [name for name, pixels in zip(names, total, strict=True) if not pixels]
    if absent:
        message = f"no pixel belongs to {_and(absent)}"
        yield Finding("class without pixels", "warning", (), message, "add images that show it, or take it out of classes.toml")
    rare = [f"{name} ({share:.2%})" for name, share in zip(names, shares, strict=True) if 0 < share < RARE]
    if rare:
        message = f"rare: less than {RARE:.1%} of the pixels are {_and(rare)}"
        yield Finding("rare class", "warning", (), message, "expect low scores there; add images that show them, and read the scores per class")
    parts = {split: _count([look for look in looks if look.pair.split == split])[: len(names)] for split in ("train", "val")}
    if not all(part.sum() for part in parts.values()):
        return
    for split, other, remedy in (
        ("val", "train", "their scores cannot be measured; hold out other images with a split.csv"),
        ("train", "val", "they cannot be learnt; move images that show them to train with a split.csv"),
    ):
        missing = [name for name, here, there in zip(names, parts[split], parts[other], strict=True) if there and not here]
        if missing:
            kind = "class missing from validation" if split == "val" else "class missing from training"
            yield Finding(kind, "warning", (), f"the split {split} has no pixel of {_and(missing)}", remedy)


def _split_findings(dataset: Dataset) -> Iterator[Finding]:
    if looks_filmed(dataset.pairs):
        message = "the names carry running numbers, as frames of a film or slices of a stack do; neighbours may be nearly the same picture"
        made = f"the splits were made so: {dataset.splits_by}" if dataset.splits_by else "the splits are not decided yet"
        yield Finding("looks like a film", "note", (), message, f"split by blocks or recordings, never at random ({made})")
    touching = [
        b if b.split == "val" else a for group in sequences(dataset.pairs) for a, b in pairwise(group) if {a.split, b.split} == {"train", "val"}
    ]
    if touching:
        files = tuple(dict.fromkeys(pair.image for pair in touching))
        message = f"{len(files)} validation image{'s' * (len(files) != 1)} stand next to a training image of the same sequence, such as '{files[0]}'"
        remedy = "the score may measure memory; choose the split blocks, or leave a gap with a split.csv"
        yield Finding("validation beside training", "warning", files, message, remedy)


def _count(looks: Sequence[_Look]) -> NDArray[np.int64]:
    counts = np.zeros(256, np.int64)
    for look in looks:
        if look.counts is not None:
            counts += look.counts
    return counts


def _area(size: str) -> int:
    width, height = size.split("x")
    return int(width) * int(height)


def _and(items: Sequence[object]) -> str:
    return " and ".join(filter(None, (", ".join(str(item) for item in items[:-1]), str(items[-1]))))
