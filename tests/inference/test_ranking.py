"""Uncertain images come first and similar ones late, whatever the order of the files."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inference import make_model, make_predictor
from PIL import Image

from useg.classes import CARLA, softmax
from useg.errors import UsageError
from useg.images.image_files import write_picture
from useg.inference import ranking
from useg.inference.predictor import Predictor
from useg.inference.ranking import Ranking, margin_uncertainty, rank_images, write_ranking
from useg.inference.runtimes import Runtime
from useg.scenes.generate import make_scene

SIZE = (64, 48)


class KnownScenes(Predictor):
    """A stand-in for a model: sure of the truth except where two classes are equally likely."""

    def __init__(self) -> None:
        runtime = make_predictor(make_model()).runtime
        super().__init__(
            Runtime(
                runtime.run, replace(runtime.description, classes=CARLA), "stand-in", Path("memory")
            )
        )
        self.known: dict[bytes, np.ndarray] = {}

    def logits(self, image: Any, tile: int | None = None) -> np.ndarray:
        logits: np.ndarray = self.known[image.tobytes()]
        return logits

    def learn(self, image: np.ndarray, label: np.ndarray, strange: np.ndarray) -> None:
        logits = np.zeros((len(CARLA), *label.shape), np.float32)
        np.put_along_axis(logits, label[None].astype(np.intp), np.float32(7), 0)
        logits[:, strange] = 0
        logits[1:3, strange] = 5
        self.known[image.tobytes()] = logits


@pytest.fixture
def folder(tmp_path: Path) -> tuple[KnownScenes, Path]:
    """Ten ordinary scenes, three strange ones, two copies and a shifted half of the strangest."""
    model, rng = KnownScenes(), np.random.default_rng(0)
    for k in range(10):
        scene = make_scene(k, SIZE)
        # Uncertain everywhere a little, as at borders.
        model.learn(scene.image, scene.label, rng.random(scene.label.shape) < 0.1)
        write_picture(tmp_path / f"ordinary_{k}.png", scene.image)
    for k, side in enumerate((20, 24, 28)):
        scene = make_scene(100 + k, SIZE)
        image, strange = scene.image.copy(), np.zeros(scene.label.shape, bool)
        strange[10 : 10 + side, 5 : 5 + side] = True
        image[strange] = rng.integers(0, 256, (strange.sum(), 3))
        names = ["strange_2.png", "copy_a.png", "copy_b.png"] if k == 2 else [f"strange_{k}.png"]
        for j, name in enumerate(names):
            seen = np.clip(image.astype(int) + j, 0, 255).astype(np.uint8)
            model.learn(seen, scene.label, strange)
            write_picture(tmp_path / name, seen)
    return model, tmp_path


def names(done: Ranking) -> list[str]:
    return [one.path.name for one in done.order]


def test_uncertain_images_come_first_and_copies_fall_behind(
    folder: tuple[KnownScenes, Path],
) -> None:
    model, pictures = folder
    order = names(rank_images(model, pictures.glob("*.png")))
    assert {order[0]} < {"strange_2.png", "copy_a.png", "copy_b.png"}
    assert set(order[1:3]) == {"strange_0.png", "strange_1.png"}
    assert set(order[-2:]) < {"strange_2.png", "copy_a.png", "copy_b.png"}
    ranked = rank_images(model, pictures.glob("*.png"))
    gains = [one.gain for one in ranked.order]
    assert gains == sorted(gains, reverse=True)
    assert all(0 <= one.gain <= one.uncertainty <= 1 for one in ranked.order)
    assert ranked.order[0].gain == ranked.order[0].uncertainty
    # A copy is as uncertain.
    assert ranked.order[-1].uncertainty == pytest.approx(ranked.order[0].uncertainty, abs=0.01)


def test_what_looks_like_a_labelled_image_comes_last(folder: tuple[KnownScenes, Path]) -> None:
    model, pictures = folder
    copies = {"strange_2.png", "copy_a.png", "copy_b.png"}
    labelled = [pictures / "copy_a.png"]
    others = [path for path in pictures.glob("*.png") if path not in labelled]
    order = names(rank_images(model, others, labelled=labelled))
    assert set(order[:2]) == {"strange_0.png", "strange_1.png"}
    assert set(order[-2:]) == copies - {"copy_a.png"}


def test_an_easy_sky_does_not_hide_uncertain_cells() -> None:
    predictor = KnownScenes()
    image = np.zeros((48, 64, 3), np.uint8)
    label, strange = np.zeros((48, 64), np.uint8), np.zeros((48, 64), bool)
    strange[32:] = True
    predictor.learn(image, label, strange)
    predicted = ranking._predict(predictor, Path("a"), image)
    assert isinstance(predicted, tuple)
    # A third of the image is wholly uncertain.
    assert ranking._measure_uncertainty(predicted[1]) > 0.95


def test_count_takes_the_first(folder: tuple[KnownScenes, Path]) -> None:
    model, pictures = folder
    paths = list(pictures.glob("*.png"))
    assert rank_images(model, paths, 4).order == rank_images(model, paths).order[:4]
    assert rank_images(model, paths, 0).order == []
    assert len(rank_images(model, paths, 1000).order) == len(paths)
    assert rank_images(model, []).order == []


def test_beyond_those_that_are_compared_the_rest_follow(
    folder: tuple[KnownScenes, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pictures = folder
    paths = list(pictures.glob("*.png"))
    whole = rank_images(model, paths).order
    monkeypatch.setattr(ranking, "_MAX_GREEDY_STEPS", 3)
    some = rank_images(model, paths).order
    assert some[:3] == whole[:3]
    assert {one.path for one in some} == {one.path for one in whole}
    assert [one.gain for one in some] == sorted((one.gain for one in some), reverse=True)
    assert rank_images(model, paths, 5).order == some[:5]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_pictures_does_not_matter(
    folder: tuple[KnownScenes, Path], seed: int
) -> None:
    model, pictures = folder
    paths = sorted(pictures.glob("*.png"))
    shuffled = random.Random(seed).sample(paths, len(paths))
    assert rank_images(model, [*shuffled, shuffled[0]]).order == rank_images(model, paths).order


@settings(max_examples=20)
@given(st.lists(st.floats(-5, 5, width=32), min_size=12, max_size=12))
def test_uncertainty_is_the_margin_of_the_two_highest_probabilities(values: list[float]) -> None:
    probabilities = softmax(np.float32(values).reshape(4, 1, 3))
    expected = [1 - (column[-1] - column[-2]) for column in np.sort(probabilities[:, 0], axis=0).T]
    np.testing.assert_allclose(margin_uncertainty(probabilities)[0], expected, rtol=1e-6)


def test_a_model_of_one_class_is_never_uncertain() -> None:
    assert margin_uncertainty(np.ones((1, 2, 3), np.float32)).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (300, 500)])
def test_pictures_of_any_size(shape: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k, size in enumerate((shape, (20, 30))):
        write_picture(tmp_path / f"{k}.png", rng.integers(0, 256, (*size, 3), np.uint8))
    assert len(rank_images(make_predictor(make_model()), tmp_path.glob("*.png")).order) == 2


def test_the_csv_file_lists_the_ranking(folder: tuple[KnownScenes, Path], tmp_path: Path) -> None:
    model, pictures = folder
    seen = []
    written = write_ranking(
        model,
        [str(pictures)],
        tmp_path / "out",
        count=5,
        progress=lambda done, total: seen.append((done, total)),
    )
    with (tmp_path / "out/ranking.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["rank", "image", "gain", "uncertainty"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3", "4", "5"]
    assert [Path(row[1]) for row in rows[1:]] == [one.path for one in written.order]
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(
        [one.gain for one in written.order], abs=1e-4
    )
    assert seen[-1] == (15, 15)


def test_a_broken_image_is_reported_and_the_others_are_ranked(tmp_path: Path) -> None:
    predictor = make_predictor(make_model())
    for k in range(2):
        write_picture(
            tmp_path / f"{k}.png", np.random.default_rng(k).integers(0, 256, (20, 30, 3), np.uint8)
        )
    (tmp_path / "broken.png").write_bytes(b"broken")
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(tmp_path / "deep.png")
    done = rank_images(predictor, tmp_path.glob("*.png"))
    assert sorted(names(done)) == ["0.png", "1.png"]
    assert [failure.path.name for failure in done.failed] == ["broken.png", "deep.png"]
    assert all(failure.path.name in failure.reason for failure in done.failed)
    with pytest.raises(
        UsageError, match=r"none of 2 images could be ranked; the first error: .*broken\.png"
    ):
        rank_images(predictor, [tmp_path / "broken.png", tmp_path / "deep.png"])
    with pytest.raises(UsageError, match=r"broken\.png"):
        rank_images(predictor, [tmp_path / "broken.png"])
