"""Each rule reports its cause in plain words, with evidence and a remedy."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_causes import CAUSES, SceneFiles, cause_of_kind, causes_of, plant

from useg.reporting.cause_rules import (
    EvaluationContext,
    WeakClass,
    check_label_noise,
    larger_size_setting,
)
from useg.reporting.causes import find_causes
from useg.reporting.error_analysis import ClassErrors
from useg.reporting.evaluate import evaluate_dataset


def test_causes_name_evidence_and_remedy(scenes: list[SceneFiles], tmp_path: Path) -> None:
    causes = {
        name: cause_of_kind(
            causes_of(*plant(tmp_path / name, scenes, 1, **planted.plan)), planted.kind
        )
        for name, planted in CAUSES.items()
    }
    few = causes["few examples"]
    assert few.message == "the training set has few examples of Vehicles"
    assert re.fullmatch(
        r"about \d of 24 training images contain the class, which has [0-9.]+ % of the training "
        r"pixels",
        few.evidence,
    )
    assert few.remedy.startswith("add training images that contain Vehicles")
    assert causes["border"].message == (
        "nearly all of RoadLines is at the border with Roads, which is misplaced by a few pixels"
    )
    regions = causes["regions"]
    assert regions.message == "Vegetation is confused with Buildings in whole regions"
    assert re.match(
        r"9\d % of the wrong pixels: [\d,]+ Vegetation pixels are predicted as Buildings, and "
        r"\d+ Buildings pixels as Vegetation",
        regions.evidence,
    )
    narrow = causes["narrow"]
    assert narrow.message.startswith("regions of Poles are too narrow for the network at 32x24")
    assert narrow.evidence.startswith("at 32x24, half of the Poles pixels are in regions up to ")
    assert narrow.remedy == "train at a larger size: data.size=128x96"
    assert re.match(
        r"check the masks of \S*\d+\.png and \S*\d+\.png first", causes["scattered labels"].remedy
    )
    shifted = causes["shifted masks"]
    assert shifted.evidence.startswith("moved 5 pixels left and 4 pixels up, the masks fit")
    assert "useg inspect DATA --fix CLEAN" in shifted.remedy
    assert causes["dark"].message == (
        "the held-out images differ from the training images: they are darker and lower in contrast"
    )
    assert causes["class share"].message == (
        "the share of Sidewalks is much larger in the held-out images than in the training images"
    )


@pytest.mark.parametrize(
    ("confidence", "edges", "is_noise"), [(180, 650, True), (120, 650, False), (180, 520, False)]
)
def test_label_noise_needs_a_confident_model_and_edges_that_agree_with_it(
    confidence: float, edges: float, is_noise: bool
) -> None:
    errors = ClassErrors(
        confusions=np.zeros(3),
        confidences=np.array([[200, confidence], [1000, 950]], np.float64),
        outlines=np.array([[500, edges], [0, 0], [900, 1080]], np.float64),
        best_overlap=np.zeros(3, np.int64),
        regions=np.zeros((0, 3)),
    )
    # The rule does not use the context.
    context = EvaluationContext(*[None] * 6)  # type: ignore[arg-type]
    weak = WeakClass(1, "b", 0, errors, ("a.png", "b.png"))
    assert (check_label_noise(context, weak) is not None) == is_noise


@pytest.mark.parametrize("factor", [0.9, 1.05, 1.5, 9.0])
def test_a_larger_size_is_larger(factor: float) -> None:
    working = SimpleNamespace(frame=(256, 192), scale=0.5)
    context: Any = SimpleNamespace(
        size=(480, 360),
        working=(256, 192),
        description=SimpleNamespace(working=working, stride=32),
    )
    width, height = larger_size_setting(context, factor).removeprefix("data.size=").split("x")
    assert int(width) > 256
    assert int(height) > 192
    working.frame = None
    assert float(larger_size_setting(context, factor).removeprefix("data.scale=")) > 0.5


def test_pretrained_weights_are_advised_only_to_models_without_them(
    scenes: list[SceneFiles], tmp_path: Path
) -> None:
    planted = CAUSES["regions"]
    dataset, predictor = plant(tmp_path / "a", scenes, 0, **planted.plan)
    evaluation = evaluate_dataset(predictor, dataset)

    def remedy() -> str:
        return cause_of_kind(find_causes(evaluation, dataset, predictor), planted.kind).remedy

    assert "model.encoder=lite0" in remedy()
    predictor.runtime.description.network["encoder"] = "lite0"
    assert "model.encoder" not in remedy()
