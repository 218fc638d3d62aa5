"""A data set -> what is in it and what is wrong with it, before an hour of training shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from useg.classes import IGNORE
from useg.data.dataset import SPLITS, Dataset, Pair
from useg.doctor import alignment, damage, leaks, stored_values
from useg.doctor.measure import Examined, Finding, Measurement, Severity, measure_pair
from useg.doctor.stored_values import UNDECIDED, decide
from useg.machine import in_parallel

Detector = Callable[[Examined], Iterator[Finding]]


_APART = 5  # findings of one kind that are told apart; more become one


@dataclass(frozen=True)
class Survey:
    """What is in a data set.

    Args:
        dataset: its pairs; with the class table that was derived from the masks, where nobody wrote one.
        num_pairs: pairs of image and mask, unreadable ones included.
        sizes: ``"WxH"`` of the images -> count; ``bands`` and ``dtypes`` likewise.
        splits: split -> number of pairs.
        pixels: pixels of each class; ``images``: images in which it occurs.
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
        """Its layout, as recognised."""
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
        """Each class's share of the counted pixels, 0..1."""
        total = max(1, sum(self.pixels))
        return tuple(pixels / total for pixels in self.pixels)

    @property
    def ignore_share(self) -> float:
        """Share of all pixels that do not count, 0..1."""
        return self.ignored / max(1, self.ignored + sum(self.pixels))

    def as_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types."""
        rows = zip(
            self.classes,
            self.pixels,
            self.shares,
            self.images,
            self.dataset.classes.colors,
            strict=True,
        )
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
                    "kind": f.kind,
                    "severity": f.severity,
                    "files": [str(path) for path in f.files],
                    "message": f.message,
                    "remedy": f.remedy,
                }
                for f in self.findings
            ],
        }

    def lines(self) -> list[str]:
        """Return a summary in plain text, one line each."""
        width = max(len(name) for name in self.classes)
        sizes = ", ".join(
            f"{size}" if count == self.num_pairs else f"{size} ({count})"
            for size, count in self.sizes.most_common(3)
        )
        more = f" and {len(self.sizes) - 3} more sizes" if len(self.sizes) > 3 else ""
        kinds = (
            " and ".join(f"{bands} band{'s' * (bands != 1)}" for bands in sorted(self.bands))
            + ", "
            + " and ".join(sorted(self.dtypes))
        )
        splits = ", ".join(
            f"{count} {split or 'not decided'}" for split, count in self.splits.items()
        )
        text = [
            f"{self.root}: {self.num_pairs} pairs, layout {self.layout}",
            f"images   {sizes}{more}; {kinds}" if self.sizes else "images   none could be read",
            f"splits   {splits}" + (f" ({self.splits_by})" if self.splits_by else ""),
            f"classes  {len(self.classes)}; {self.ignore_share:.1%} of the pixels are ignored",
        ]
        for k, (name, share, images) in enumerate(
            zip(self.classes, self.shares, self.images, strict=True)
        ):
            text.append(
                f"  {k:3}  {name:{width}}  {share:8.3%} of the pixels, in {images} image{'s' * (images != 1)}"
            )
        counts = Counter(finding.severity for finding in self.findings)
        text.append(
            "findings "
            + (
                ", ".join(
                    f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items()
                )
                or "none"
            )
        )
        text += [
            f"  {finding.severity}: {finding.message}; {finding.remedy}"
            for finding in self.findings
        ]
        return text


def survey(
    dataset: Dataset,
    progress: Callable[[], None] = lambda: None,
    split: Callable[[Dataset], Dataset] = lambda decided: decided,
) -> Survey:
    """Read every pair once and report what is there; damaged pairs become findings and stop nothing.

    Args:
        dataset: from :func:`useg.data.layouts.find_dataset` with ``strict=False``; with :func:`undecided` classes, these are derived from the masks.
        progress: called once per pair.
        split: decides the splits, when the classes are known.
    """
    palettes = dataset.classes.names == UNDECIDED.names

    def look(pair: Pair) -> Measurement:
        seen = measure_pair(pair, dataset, palettes=palettes)
        progress()
        return seen

    case = decide(dataset, list(in_parallel(look, dataset.pairs)))
    whole = split(case.dataset)
    case = replace(
        case,
        dataset=whole,
        looks=tuple(
            replace(look, pair=pair) for look, pair in zip(case.looks, whole.pairs, strict=True)
        ),
    )
    counts = leaks.total(case, case.whole)
    images = [look.image for look in case.looks if look.image is not None]
    num_classes = len(whole.classes)
    splits = Counter(pair.split for pair in whole.pairs)
    return Survey(
        dataset=whole,
        num_pairs=len(whole.pairs),
        sizes=Counter(f"{image.size[0]}x{image.size[1]}" for image in images),
        bands=Counter(image.bands for image in images),
        dtypes=Counter(image.dtype for image in images),
        splits={split: splits[split] for split in (*SPLITS, "") if splits[split]},
        pixels=tuple(int(n) for n in counts[:num_classes]),
        images=tuple(
            sum(bool(case.counts[look.pair][k]) for look in case.whole) for k in range(num_classes)
        ),
        ignored=int(counts[IGNORE]),
        findings=diagnose(case),
    )


def diagnose(case: Examined) -> tuple[Finding, ...]:
    """Ask every detector; errors come first."""
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    found = [finding for detector in DETECTORS for finding in _grouped(list(detector(case)))]
    wrong = {
        path
        for finding in found
        if finding.severity == "error" or finding.kind == alignment.UNFIT
        for path in finding.files
    }
    sound = replace(
        case,
        looks=tuple(look for look in case.looks if not {look.pair.image, look.pair.mask} & wrong),
    )
    found += REVIEW(sound)
    return tuple(sorted(found, key=lambda finding: order[finding.severity]))


def _grouped(findings: Sequence[Finding]) -> list[Finding]:
    """Keep a few findings of one kind apart; join many."""
    result: list[Finding] = []
    for kind in dict.fromkeys(finding.kind for finding in findings):
        same = [finding for finding in findings if finding.kind == kind]
        if len(same) <= _APART:
            result += same
            continue
        files = tuple(dict.fromkeys(path for finding in same for path in finding.files))
        cures = tuple(cure for finding in same for cure in finding.cures)
        message = f"{same[0].message} (and {len(same) - 1} more pairs with the same kind of {same[0].severity})"
        result.append(replace(same[0], files=files, message=message, cures=cures))
    return result


# In this order findings of one severity are told: what stops a reader first.
DETECTORS: tuple[Detector, ...] = (
    damage.unpaired,
    damage.unreadable,
    damage.sizes,
    stored_values.values,
    stored_values.inverted,
    alignment.shifted,
    alignment.misplaced,
    leaks.twins,
    leaks.exposure,
    damage.mixtures,
    damage.mislabelled,
    stored_values.empty,
    leaks.amounts,
    leaks.split_shares,
    leaks.constant_region,
    leaks.film,
    stored_values.customs,
)


REVIEW: Detector = alignment.review  # looks at what no detector called wrong
