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
from useg.doctor.measure import Finding, MeasuredDataset, Measurement, Severity, measure_pair
from useg.doctor.stored_values import PLACEHOLDER_CLASSES, decide_classes
from useg.machine import in_parallel

Check = Callable[[MeasuredDataset], Iterator[Finding]]


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


def survey_dataset(
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
    palettes = dataset.classes.names == PLACEHOLDER_CLASSES.names

    def look(pair: Pair) -> Measurement:
        seen = measure_pair(pair, dataset, palettes=palettes)
        progress()
        return seen

    case = decide_classes(dataset, list(in_parallel(look, dataset.pairs)))
    whole = split(case.dataset)
    case = replace(
        case,
        dataset=whole,
        looks=tuple(
            replace(look, pair=pair) for look, pair in zip(case.looks, whole.pairs, strict=True)
        ),
    )
    counts = leaks.sum_class_pixels(case, case.whole)
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
        findings=run_checks(case),
    )


def run_checks(case: MeasuredDataset) -> tuple[Finding, ...]:
    """Ask every detector; errors come first."""
    order: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}
    found = [finding for detector in CHECKS for finding in _grouped(list(detector(case)))]
    wrong = {
        path
        for finding in found
        if finding.severity == "error" or finding.kind == alignment.NO_FIT_KIND
        for path in finding.files
    }
    sound = replace(
        case,
        looks=tuple(look for look in case.looks if not {look.pair.image, look.pair.mask} & wrong),
    )
    found += FINAL_CHECK(sound)
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
CHECKS: tuple[Check, ...] = (
    damage.check_unpaired_files,
    damage.check_unreadable_files,
    damage.check_mask_sizes,
    stored_values.check_mask_values,
    stored_values.check_inverted_masks,
    alignment.check_common_shift,
    alignment.check_single_masks,
    leaks.check_duplicates,
    leaks.check_exposure,
    damage.check_mixed_images,
    damage.check_file_suffixes,
    stored_values.check_single_class_masks,
    leaks.check_class_pixels,
    leaks.check_split_shares,
    leaks.check_constant_region,
    leaks.check_video_sequences,
    stored_values.describe_stored_values,
)


FINAL_CHECK: Check = alignment.check_suspicious_labels  # looks at what no detector called wrong
