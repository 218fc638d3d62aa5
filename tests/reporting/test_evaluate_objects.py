"""Evaluations score the objects that the truth tells apart, and name touching ones as a cause."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from useg.classes import ClassTable
from useg.data.layouts import find_dataset
from useg.inference.predictor import Predictor
from useg.inference.runtimes import Runtime
from useg.models.description import ModelDescription
from useg.models.geometry import WorkingSize
from useg.objects.scores import score_tallies, tally_objects
from useg.reporting.cause_rules import check_touching_objects
from useg.reporting.evaluate import Extras, evaluate_dataset
from useg.reporting.evaluation_result import Evaluation
from useg.reporting.text import evaluation_lines, object_sentences

CLASSES = ClassTable(("background", "foreground"), objects=(1,))


def write_dataset(folder: Path) -> Path:
    """Write images with two touching squares and a single one, whose grey shows the object."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for k in range(7):
        objects = np.zeros((32, 48), np.uint16)
        objects[4:16, 4 + k : 16 + k], objects[4:16, 16 + k : 28 + k] = 1, 2
        objects[20:28, 30:40] = 3
        if k % 2:
            objects[20:28, 4:12] = 4
        image = np.where(objects > 0, 100 + 40 * objects, 0).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{k}.png")
        Image.fromarray(objects).save(folder / "masks" / f"{k}.png")
    # So few objects could be classes.
    (folder / "dataset.toml").write_text(
        'images = "images/*.png"\nmasks = "masks/*.png"\nobjects = true\n'
    )
    return folder


def make_predictor(*, has_objects: bool) -> Predictor:
    """A model that sees the objects, and knows the depth if it has an output for it."""
    network = {"encoder": "plain", "channels": 1, "classes": 2, "objects": has_objects}

    def run(x: np.ndarray) -> np.ndarray:
        from useg.objects.separation import measure_depth

        inside = (x[:, 0] > 0).astype(np.float32)
        planes = [1 - inside, inside]
        if has_objects:
            depth = np.stack([measure_depth(each.astype(int)) for each in x[:, 0]]) / 255
            planes.append(np.log((depth + 1e-3) / (1.001 - depth)))
        return np.stack(planes, 1).astype(np.float32)

    description = ModelDescription(
        network, CLASSES, WorkingSize(), 1, "uint8", (0.0,), (1.0,), 0, 1, 0, 1
    )
    return Predictor(Runtime(run, description, "torch", Path("memory")))


def evaluate(folder: Path, *, has_objects: bool, extras: Extras | None = None) -> Evaluation:
    dataset, extras = find_dataset(write_dataset(folder)), extras or Extras()
    return evaluate_dataset(make_predictor(has_objects=has_objects), dataset, "all", extras=extras)


def test_objects_that_are_kept_apart_are_scored(tmp_path: Path) -> None:
    evaluation = evaluate(tmp_path, has_objects=True)
    scores = evaluation.object_scores[""]
    assert (scores.ap50, scores.f1, scores.count_error) == (1, 1, 0)
    assert scores.num_true == scores.num_predicted == 24
    assert list(evaluation.object_scores) == ["", "foreground"]
    content = json.loads(json.dumps(evaluation.as_dict()))["object_scores"]
    assert content["ap"]["0.5"] == content["classes"]["foreground"]["ap50"] == 1
    assert {"ap50", "mean_ap", "f1", "panoptic_quality", "count_error"} < set(content["intervals"])
    assert check_touching_objects(evaluation, True) == ()
    text = "\n".join(evaluation_lines(evaluation))
    assert "24 objects predicted, 24 true; the number per image differs by +0.00 on average" in text


def test_joined_objects_are_a_cause_with_a_remedy(tmp_path: Path) -> None:
    evaluation = evaluate(tmp_path, has_objects=False, extras=Extras(objects="foreground"))
    scores = evaluation.object_scores[""]
    assert (scores.merged, scores.num_predicted, scores.count_bias) == (7, 17, -1)
    (cause,) = check_touching_objects(evaluation, False)
    assert (cause.class_name, cause.kind) == ("foreground", "touching objects")
    assert cause.evidence == "7 predictions join several, of 24 true objects"
    assert "model.objects = true" in cause.remedy
    (with_output,) = check_touching_objects(evaluation, True)
    assert "data.scale" in with_output.remedy
    assert "7 predictions join several true objects" in object_sentences(evaluation)[0]


def test_plain_models_are_not_scored_by_objects_unless_asked(tmp_path: Path) -> None:
    evaluation = evaluate(tmp_path, has_objects=False)
    assert not evaluation.object_scores
    assert "object_scores" not in evaluation.as_dict()


def test_scores_of_all_images_are_those_of_their_rows(tmp_path: Path) -> None:
    evaluation = evaluate(tmp_path, has_objects=True)
    rows = []
    for pair in evaluation.images:
        true = np.asarray(Image.open(pair.pair.mask)).astype(int)
        image = np.asarray(Image.open(pair.pair.image))
        rows.append(tally_objects(make_predictor(has_objects=True).objects(image).numbers, true))
    expected = score_tallies(np.stack(rows), evaluation.blocks)
    assert evaluation.object_scores[""] == expected
