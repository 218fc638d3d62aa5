"""Check single masks: find those that are shifted, turned, exchanged or not supported by edges.

Masks that align much worse than is usual (:mod:`useg.doctor.alignment`) are read again, and each
explanation is tried: a shift, a rotation or mirroring, the mask of another image. The best one
becomes a finding if with it the mask aligns as well as the other masks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.data.dataset import CodeMap
from useg.data.duplicates import ORIENTATIONS
from useg.doctor.alignment import (
    MAX_SUSPECTS,
    MIN_Z_SCORE,
    Suspect,
    UsualAlignment,
    find_common_placement,
    find_usual_alignment,
    orientation_change,
    reread_pair,
    shift_change,
)
from useg.doctor.edges import (
    MAX_SHIFT_PIXELS,
    EdgeAlignment,
    describe_shift,
    find_strongest_shift,
    measure_edge_alignment,
    shift_label,
    shift_z_score,
    strength_at,
)
from useg.doctor.measure import Finding, MeasuredDataset, Measurement, Repair
from useg.errors import format_count

NO_FIT_KIND = "mask does not fit its image"

# Fewer equal masks may be those of images without contrast.
_MIN_COPIES = 3

# Pairs are listed for review from this many standard deviations on, and at most this many.
_MIN_SUSPICION = 5.0
_MAX_REVIEWED_PAIRS = 12

# Images are reduced by this factor to find large shifts.
_COARSE_FACTOR = 4


def check_single_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find single masks that are shifted, rotated or mirrored, or belong to another image."""
    usual = data.once(find_usual_alignment)
    if usual is None or usual.z_score < MIN_Z_SCORE or data.once(find_common_placement):
        return
    candidates = [
        (each, alignment)
        for each, alignment in zip(usual.measurements, usual.alignments, strict=True)
        if _is_suspicious(alignment, usual)
    ]
    suspects = [
        Suspect(each, alignment, *pixels)
        for each, alignment in candidates[:MAX_SUSPECTS]
        if (pixels := reread_pair(data, each)) is not None
    ]
    best_images = [_find_best_image(suspects, k) for k in range(len(suspects))]
    for k in range(len(suspects)):
        finding = _diagnose(data, suspects, best_images, k, usual)
        if finding:
            yield finding


def _is_suspicious(alignment: EdgeAlignment, usual: UsualAlignment) -> bool:
    """Whether a mask aligns much weaker than usual, or better elsewhere."""
    expected, own_shift = strength_at(alignment, usual.shift), find_strongest_shift(alignment)
    is_weak = (
        expected - 1 < 0.5 * (usual.strength - 1)
        and shift_z_score(alignment, usual.shift) < 0.5 * usual.z_score
    )
    right, down = usual.shift
    exact = float(alignment[down + MAX_SHIFT_PIXELS, right + MAX_SHIFT_PIXELS])
    is_elsewhere = (
        _distance(own_shift, usual.shift) >= 2
        and float(alignment.max()) - 1 > 1.3 * (exact - 1)
        and shift_z_score(alignment, own_shift) >= MIN_Z_SCORE
    )
    return is_weak or is_elsewhere


def _distance(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(abs(one[0] - other[0]), abs(one[1] - other[1]))


def _find_best_image(suspects: Sequence[Suspect], k: int) -> tuple[int, float]:
    """Return which suspect's image the mask of suspect ``k`` fits best, and how well."""
    best = (k, 0.0)
    codes = suspects[k].codes
    for j, other in enumerate(suspects):
        if other.image.shape[:2] != codes.shape:
            continue
        alignment = measure_edge_alignment(other.image, codes)
        if alignment is not None and shift_z_score(alignment) > 3:
            best = max(best, (j, strength_at(alignment)), key=lambda found: found[1])
    return best


def _find_best_shift(image: NDArray[Any], codes: CodeMap) -> tuple[tuple[int, int], float]:
    """Return the shift of the mask, up to 32 pixels, with the strongest edges, and how strong."""
    starts = {(0, 0)}
    coarse = measure_edge_alignment(
        image[::_COARSE_FACTOR, ::_COARSE_FACTOR], codes[::_COARSE_FACTOR, ::_COARSE_FACTOR]
    )
    if coarse is not None:
        right, down = find_strongest_shift(coarse)
        starts.add((right * _COARSE_FACTOR, down * _COARSE_FACTOR))
    best = ((0, 0), 0.0)
    H, W = codes.shape
    for right, down in starts:
        inside = (
            slice(abs(down), H - abs(down) or None),
            slice(abs(right), W - abs(right) or None),
        )
        shifted = shift_label(codes, (right, down), 0)
        alignment = measure_edge_alignment(image[inside], shifted[inside])
        if alignment is None:
            continue
        more = find_strongest_shift(alignment)
        strength = strength_at(alignment, more)
        if strength > best[1] and shift_z_score(alignment, more) > 3:
            best = ((right + more[0], down + more[1]), strength)
    return best


def _find_best_turn(image: NDArray[Any], codes: CodeMap) -> tuple[str, float]:
    """Return the orientation of the same size that aligns best, and how well; ``""`` for none."""
    best = ("", 0.0)
    for name, change in ORIENTATIONS.items():
        if change(codes).shape != codes.shape:
            continue
        alignment = measure_edge_alignment(image, change(codes))
        if alignment is not None and shift_z_score(alignment) > MIN_Z_SCORE:
            best = max(best, (name, strength_at(alignment)), key=lambda found: found[1])
    return best


def _diagnose(
    data: MeasuredDataset,
    suspects: Sequence[Suspect],
    best_images: Sequence[tuple[int, float]],
    k: int,
    usual: UsualAlignment,
) -> Finding | None:
    """Return the explanation that makes suspect ``k`` align as masks usually do, if any does."""
    suspect = suspects[k]
    own = strength_at(suspect.alignment, usual.shift)
    required = max(1 + 0.6 * (usual.strength - 1), 1 + 1.25 * (own - 1), 1.08)
    shift, by_shift = _find_best_shift(suspect.image, suspect.codes)
    turn, by_turn = _find_best_turn(suspect.image, suspect.codes)
    j, by_image = best_images[k]
    if j == k:
        by_image = 0.0
    best = max(by_shift, by_image, by_turn)
    if best < required:
        is_lost = shift_z_score(suspect.alignment, usual.shift) < 2
        if own - 1 < 0.3 * (usual.strength - 1) and is_lost:
            return _no_fit(data, suspect)
    elif best == by_image:
        return _mask_of_another_image(data, suspects, best_images, k)
    elif best == by_turn:
        return _turned(data, suspect, turn)
    elif _distance(shift, usual.shift) >= 2:
        return _shifted(data, suspect, shift, usual.shift)
    return None


def _no_fit(data: MeasuredDataset, suspect: Suspect) -> Finding:
    pair = suspect.measurement.pair
    return Finding(
        NO_FIT_KIND,
        "warning",
        (pair.image, pair.mask),
        f"the class boundaries of mask '{data.name(pair.mask)}' are nowhere near edges of its "
        "image, unlike those of the other masks",
        "check that the mask belongs to this image",
    )


def _turned(data: MeasuredDataset, suspect: Suspect, turn: str) -> Finding:
    pair = suspect.measurement.pair
    return Finding(
        "turned mask",
        "error",
        (pair.image, pair.mask),
        f"mask '{data.name(pair.mask)}' fits its image when it is {turn}",
        "save the mask in the image's orientation",
        (Repair(pair, f"mask {turn}", transform=orientation_change(turn)),),
        {"turn": turn},
    )


def _shifted(
    data: MeasuredDataset, suspect: Suspect, shift: tuple[int, int], usual: tuple[int, int]
) -> Finding:
    """Describe the whole shift; the repair leaves the usual one to :func:`check_common_shift`."""
    pair = suspect.measurement.pair
    rest = (shift[0] - usual[0], shift[1] - usual[1])
    return Finding(
        "shifted mask",
        "error",
        (pair.image, pair.mask),
        f"mask '{data.name(pair.mask)}' is shifted relative to its image: it fits when moved "
        f"{describe_shift(shift)}",
        "correct the mask's position",
        (Repair(pair, f"mask moved {describe_shift(rest)}", transform=shift_change(rest)),),
        {"shift": shift},
    )


def _mask_of_another_image(
    data: MeasuredDataset,
    suspects: Sequence[Suspect],
    best_images: Sequence[tuple[int, float]],
    k: int,
) -> Finding:
    pair, other = suspects[k].measurement.pair, suspects[best_images[k][0]].measurement
    owners = [j for j, (image, _) in enumerate(best_images) if image == k]
    if len(owners) == 1 and owners[0] != k:
        owner = suspects[owners[0]].measurement
        description = f"mask taken from '{data.pair_name(owner)}', whose mask fits this image"
        repair = Repair(pair, description, mask_source=owner.pair)
    else:
        description = "left out: its mask belongs to another image"
        repair = Repair(pair, description, leave_out=True, is_doubtful=True)
    return Finding(
        "mask of another image",
        "error",
        (pair.image, pair.mask),
        f"mask '{data.name(pair.mask)}' fits the image '{data.pair_name(other)}' and not its own",
        "give each image its own mask",
        (repair,),
        {"fits": other.pair.image},
    )


def check_copied_masks(data: MeasuredDataset) -> Iterator[Finding]:
    """Find masks that equal those of other images, which they fit, but not their own."""
    groups: dict[Any, list[tuple[float, Measurement]]] = defaultdict(list)
    for each in data.complete:
        if each.mask is None or each.alignment is None:
            continue
        mask = each.mask
        key = (mask.size, mask.codes.tobytes(), mask.counts.tobytes(), mask.code_grid.tobytes())
        groups[key].append((shift_z_score(each.alignment), each))
    equal = [sorted(group, key=lambda scored: -scored[0]) for group in groups.values()]
    equal = [group for group in equal if len(group) > 1]
    copies = [scored for group in equal for scored in group[1:]]
    if len(copies) < _MIN_COPIES:
        return
    best = float(np.median([group[0][0] for group in equal]))
    if best < MIN_Z_SCORE or float(np.median([score for score, _ in copies])) >= best / 2:
        return
    first, copy = equal[0][0][1].pair, equal[0][1][1].pair
    yield Finding(
        "copied masks",
        "error",
        tuple(each.pair.mask for _, each in copies),
        f"{len(copies)} masks equal those of other images, whose edges they fit better: "
        f"'{data.name(copy.mask)}' equals '{data.name(first.mask)}'",
        "check the export that made the masks, and give each image its own",
        tuple(
            Repair(each.pair, "left out: its mask is a copy of another", leave_out=True)
            for _, each in copies
        ),
    )


def check_suspicious_labels(data: MeasuredDataset) -> Iterator[Finding]:
    """List pairs whose labels deserve a review, the most suspicious first.

    Their class boundaries do not match edges of the image, or they have many specks.
    """
    usual = data.once(find_usual_alignment)
    if usual is None:
        return
    pairs = [
        (each, each.mask)
        for each in data.complete
        if each.alignment is not None and each.mask is not None
    ]
    specks = np.array([mask.specks.number for _, mask in pairs])
    # The numbers of specks differ too much between masks for standard deviations.
    speck_excess = specks / (10 + 4 * np.quantile(specks, 0.9))
    suspicion = _MIN_SUSPICION * speck_excess
    if usual.z_score >= MIN_Z_SCORE and usual.shift == (0, 0):
        support = [np.log(max(0.1, strength_at(one, usual.shift))) for one in usual.alignments]
        suspicion = np.maximum(suspicion, _robust_z_scores(-np.array(support), 0.03))
    order = [k for k in np.argsort(-suspicion, kind="stable") if suspicion[k] > _MIN_SUSPICION]
    order = order[:_MAX_REVIEWED_PAIRS]
    if not order:
        return
    has_specks = speck_excess > 1
    reasons = [
        f"'{data.name(pairs[k][0].pair.mask)}' ("
        + (
            format_count(int(specks[k]), "tiny spot")
            if has_specks[k]
            else "boundaries without edges"
        )
        + ")"
        for k in order
    ]
    more = f" and {len(order) - 3} more" if len(order) > 3 else ""
    positions = {pairs[k][0].pair.mask: pairs[k][1].specks.first for k in order if has_specks[k]}
    yield Finding(
        "labels to review",
        "warning",
        tuple(pairs[k][0].pair.mask for k in order),
        f"review these labels first: {', '.join(reasons[:3])}{more}",
        "open them and correct what is wrong",
        evidence={"specks": positions},
    )


def _robust_z_scores(values: NDArray[np.float64], min_deviation: float) -> NDArray[np.float64]:
    """Return the robust z-score of each value: its distance above the median in deviations."""
    median = np.median(values)
    deviation = 1.48 * float(np.median(np.abs(values - median)))
    return (values - median) / max(deviation, min_deviation)
