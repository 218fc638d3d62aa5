"""What could make scores wrong is said: leaks, selections, and too little data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_reporting import make_evaluation, make_split_dataset

from useg.data.dataset import Dataset, Pair
from useg.reporting.causes import find_caveats
from useg.reporting.evaluation_result import Evaluation

VIDEO = make_split_dataset(["train"] * 8 + ["val"] * 3)
PROVENANCE = {"dataset": "street", "num_train": 8}


@pytest.mark.parametrize(
    ("held_out", "is_said"), [((4, 5), False), ((5, 7), True)], ids=["whole", "in part"]
)
def test_groups_that_are_held_out_whole_are_not_the_same_recordings(
    held_out: tuple[int, int], is_said: bool
) -> None:
    pairs = tuple(
        Pair(
            Path(f"street/s{k // 2:02}_{'LR'[k % 2]}.png"),
            Path(f"m/{k}.png"),
            "val" if k in held_out else "train",
        )
        for k in range(24)
    )
    dataset = replace(VIDEO, pairs=pairs, splits_by="groups")
    caveats = " ".join(find_caveats(make_evaluation(), dataset, PROVENANCE))
    assert ("come from the same recordings" in caveats) == is_said


@pytest.mark.parametrize(
    ("evaluation", "provenance", "num_duplicates", "expected"),
    [
        (
            make_evaluation(),
            PROVENANCE,
            0,
            ["Training selected the checkpoint", "come from the same recordings"],
        ),
        (
            make_evaluation(),
            {**PROVENANCE, "num_train": 9},
            None,
            ["trained on 9 images of this data set, but this split has 8 training images"],
        ),
        (
            make_evaluation(),
            PROVENANCE,
            3,
            ["3 of these images are near-duplicates of training images"],
        ),
        (
            make_evaluation(),
            PROVENANCE,
            1,
            ["1 of these images is a near-duplicate of a training image"],
        ),
        (
            make_evaluation(split="all"),
            PROVENANCE,
            None,
            ["these images include its training images"],
        ),
        (
            make_evaluation(),
            PROVENANCE,
            None,
            [
                "Not in the ground truth, so not scored",
                "too few images or pixels for a reliable score",
                "Poles (100 pixels in 8 images)",
            ],
        ),
        (make_evaluation(split="test"), {"dataset": "elsewhere"}, None, []),
    ],
)
def test_caveats_name_what_makes_the_scores_wrong(
    evaluation: Evaluation,
    provenance: Mapping[str, Any],
    num_duplicates: int | None,
    expected: list[str],
) -> None:
    text = " ".join(find_caveats(evaluation, VIDEO, provenance, num_duplicates))
    for part in expected:
        assert part in text
    is_validation = evaluation.split == "val" and provenance["dataset"] == "street"
    assert ("selected the checkpoint" in text) == is_validation


def test_shared_recordings_are_recognised_by_names() -> None:
    def has_caveat(dataset: Dataset) -> bool:
        caveats = find_caveats(make_evaluation(), dataset, PROVENANCE)
        return "same recordings" in " ".join(caveats)

    assert has_caveat(replace(VIDEO, splits_by="split.csv"))
    assert not has_caveat(replace(VIDEO, splits_by="random, by a hash of the name"))
    pairs = tuple(
        replace(pair, image=Path(f"street/{pair.split}_{k}.png"))
        for k, pair in enumerate(VIDEO.pairs)
    )
    assert not has_caveat(replace(VIDEO, pairs=pairs))
