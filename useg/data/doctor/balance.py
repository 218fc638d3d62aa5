"""How much there is of each class, and whether both sides of the split show it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from useg.data.doctor.finding import Finding, both
from useg.data.doctor.looks import Case, Look

RARE = 0.005  # share of the counted pixels below which a class is called rare


def total(case: Case, looks: tuple[Look, ...] | list[Look]) -> NDArray[np.int64]:
    """Return the pixels ``(256,)`` of each class id in these pairs."""
    return np.sum([case.counts[look.pair] for look in looks], axis=0, dtype=np.int64) if looks else np.zeros(256, np.int64)


def amounts(case: Case) -> Iterator[Finding]:
    """Classes without pixels, rare classes, and classes that one side of the split lacks."""
    names = case.dataset.classes.names
    everything = total(case, case.whole)[: len(names)]
    if not everything.sum():
        return
    shares = everything / everything.sum()
    absent = [name for name, pixels in zip(names, everything, strict=True) if not pixels]
    if absent:
        message = f"no pixel belongs to {both(absent)}"
        yield Finding("class without pixels", "warning", (), message, "add images that show it, or take it out of classes.toml")
    rare = [f"{name} ({share:.2%})" for name, share in zip(names, shares, strict=True) if 0 < share < RARE]
    if rare:
        message = f"rare: less than {RARE:.1%} of the pixels are {both(rare)}"
        yield Finding("rare class", "warning", (), message, "expect low scores there; add images that show them, and read the scores per class")
    parts = {split: total(case, [look for look in case.whole if look.pair.split == split])[: len(names)] for split in ("train", "val")}
    if not all(part.sum() for part in parts.values()):
        return
    for split, other, remedy in (
        ("val", "train", "their scores cannot be measured; hold out other images with a split.csv"),
        ("train", "val", "they cannot be learnt; move images that show them to train with a split.csv"),
    ):
        missing = [name for name, here, there in zip(names, parts[split], parts[other], strict=True) if there and not here]
        if missing:
            kind = "class missing from validation" if split == "val" else "class missing from training"
            yield Finding(kind, "warning", (), f"the split {split} has no pixel of {both(missing)}", remedy)


def split_shares(case: Case) -> Iterator[Finding]:
    """Classes of which validation pictures show far more, or far less, than training pictures."""
    names = case.dataset.classes.names
    shares = {}
    for split in ("train", "val"):
        counts = np.array([case.counts[look.pair][: len(names)] for look in case.whole if look.pair.split == split])
        if len(counts) < 5:
            return
        shares[split] = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    means = {split: part.mean(0) for split, part in shares.items()}
    error = np.sqrt(sum(part.var(0, ddof=1) / len(part) for part in shares.values()))  # Welch's test, neighbours taken for independent
    apart = np.abs(means["train"] - means["val"])
    low, high = np.minimum(means["train"], means["val"]), np.maximum(means["train"], means["val"])
    found = [k for k in range(len(names)) if apart[k] > 6 * max(error[k], 1e-6) and high[k] > 2 * low[k] and high[k] > 0.03]
    if found:
        said = [f"{names[k]} ({means['train'][k]:.1%} of train, {means['val'][k]:.1%} of val)" for k in found]
        message = f"the splits differ in {both(said)}"
        remedy = "scores on such a split say little about other pictures; hold out blocks of several places, or say it beside the score"
        yield Finding("splits differ", "warning", (), message, remedy)
