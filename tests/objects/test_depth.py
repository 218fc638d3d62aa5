"""Numbered objects become depths, and go with the labels through cache, crops and flips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_training import dotted
from PIL import Image
from scipy import ndimage

from useg.config import Settings
from useg.data.cache import CachedSample, build_cache, label_of, pack_target
from useg.data.dataset import object_classes, read_objects
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.errors import SettingsError
from useg.inference.predictor import load
from useg.models.geometry import WorkingSize
from useg.objects.separation import ObjectStatistics, measure_depth, share_touching
from useg.scoring.losses import chance_depth_loss, depth_loss, make_loss, with_objects
from useg.training import plan
from useg.training.batches import Crop, cut_crop
from useg.training.loop import fit
from useg.training.plan import make_plan


def touching_squares() -> np.ndarray:
    objects = np.zeros((24, 40), np.int32)
    objects[4:14, 5:15] = 3
    objects[4:14, 15:25] = 9
    objects[0:6, 30:36] = 7
    return objects


def test_depth_is_the_distance_to_the_outline_as_a_share_of_the_largest() -> None:
    objects = touching_squares()
    depth = measure_depth(objects)
    for number in (3, 9):
        own = np.pad(objects == number, 1)
        distance = ndimage.distance_transform_edt(own)[1:-1, 1:-1]
        expected = np.rint(255 * distance / distance.max())
        np.testing.assert_array_equal(depth[objects == number], expected[objects == number])
    assert not depth[objects == 0].any()


def test_the_edge_of_the_image_is_no_outline() -> None:
    depth = measure_depth(touching_squares())
    # The object that the upper edge cuts is deepest there.
    assert depth[0, 32] == depth[:, 32].max() == 255


def test_an_object_that_fills_the_image_is_deep_everywhere() -> None:
    assert measure_depth(np.full((5, 4), 2)).min() == 255


def test_an_object_of_several_parts_has_one_largest_depth() -> None:
    objects = np.zeros((9, 30), np.int32)
    objects[1:8, 1:8] = objects[3:6, 20:23] = 5
    depth = measure_depth(objects)
    assert depth[:, :10].max() == 255
    assert depth[:, 15:].max() == 128


@pytest.mark.parametrize(("gap", "expected"), [(0, 1.0), (1, 1.0), (2, 0.0)])
def test_objects_with_a_gap_of_at_most_a_pixel_count_as_touching(gap: int, expected: float) -> None:
    objects = np.zeros((6, 12), np.int32)
    objects[1:5, 1:4], objects[1:5, 4 + gap : 8] = 1, 2
    assert share_touching(objects) == share_touching(objects.T) == expected


def test_specks_are_smaller_than_a_fifth_of_a_typical_object_and_than_most_small_ones() -> None:
    first, second = np.zeros((2, 40, 60), np.uint16)
    # 60 objects of 20 to 60 pixels.
    for k in range(60):
        place = (first, second)[k % 2]
        place[k // 2, : 20 + k] = k + 1
        place[30, 0] = 0
    first, second = (each[:, :60] for each in (first, second))
    areas = np.concatenate([np.bincount(each.ravel())[1:] for each in (first, second)])
    areas = areas[areas > 0]
    found = ObjectStatistics.of([first, second])
    assert found.min_pixels == int(np.median(areas) / 5) == 9
    tiny = np.zeros_like(first)
    tiny[::2, ::6] = np.arange(200).reshape(20, 10) + 1
    assert ObjectStatistics.of([first, second, tiny]).min_pixels == 0
    tiny[1::2, ::6] = tiny[::2, ::6]
    assert ObjectStatistics.of([first, first, second, second, tiny[:, :7]]).min_pixels == 2
    # The typical side is the middle one of the images.
    sides = [
        np.median(np.unique(each[each > 0], return_counts=True)[1]) ** 0.5
        for each in (first, second)
    ]
    assert found.side == pytest.approx(np.mean(sides))
    assert ObjectStatistics.of([np.zeros((3, 3), np.uint8)]) == ObjectStatistics()


def numbered_dataset(folder: Path, *, touching: bool = True, enlarged: int = 1) -> Path:
    """Write images whose masks number their objects, of 10 x 11 pixels on average."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k in range(6):
        objects, number = np.zeros((64, 80), np.uint16), 0
        for top in range(2, 50, 14):
            for left in range(2, 60, 26):
                if rng.random() < 0.8:
                    objects[top : top + 10, left : left + 12] = (number := number + 1)
                    gap = 0 if touching else 3
                    objects[top : top + 10, left + 12 + gap : left + 22] = (number := number + 1)
        objects = objects.repeat(enlarged, 0).repeat(enlarged, 1)
        image = np.where(objects > 0, 180, 40) + rng.integers(0, 20, objects.shape)
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{k}.png")
        Image.fromarray(objects).save(folder / "masks" / f"{k}.png")
    return folder


def test_the_cache_holds_labels_and_depths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USEG_CACHE", str(tmp_path / "cache"))
    dataset = find_dataset(numbered_dataset(tmp_path / "data"))
    plain = build_cache(dataset, dataset.pairs, WorkingSize(), 1, "uint8")
    for _ in range(2):
        # The second time they are found in the cache folder.
        samples = build_cache(dataset, dataset.pairs, WorkingSize(), 1, "uint8", objects=True)
        for pair, sample, other in zip(dataset.pairs, samples, plain, strict=True):
            np.testing.assert_array_equal(label_of(sample.label), other.label)
            np.testing.assert_array_equal(sample.image, other.image)
            depth = measure_depth(read_objects(pair, dataset))
            np.testing.assert_array_equal(sample.label >> 8, depth)
        np.testing.assert_array_equal(samples.table.counts, plain.table.counts)


def test_depths_are_cut_flipped_and_zoomed_like_labels() -> None:
    objects = touching_squares()
    label, depth = (objects > 0).astype(np.uint8), measure_depth(objects)
    image = np.zeros((*objects.shape, 1), np.uint8)
    crop = Crop(-3.5, 4.0, 0.7, flip_left_right=True, flip_top_bottom=True)
    parts = [
        cut_crop(CachedSample(image, each, None), crop, (30, 22), 0)[1]
        for each in (label, depth, pack_target(label, depth))
    ]
    np.testing.assert_array_equal(parts[2], pack_target(parts[0], parts[1]))


def test_the_plan_learns_objects_where_some_touch(tmp_path: Path) -> None:
    for touching in (True, False):
        data = numbered_dataset(tmp_path / str(touching), touching=touching)
        plan = make_plan(Settings(), assign_splits(find_dataset(data), "random", 0.3))
        assert plan.settings.model.objects is touching
        assert "model.objects" in plan.reasons


def test_small_objects_are_learned_from_many_small_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crops(enlarged: int = 3, **changes: object) -> tuple[object, object]:
        data = tmp_path / str(enlarged)
        if not data.exists():
            numbered_dataset(data, enlarged=enlarged)
        settings = Settings().with_(dotted({"data__scale": 1.0, **changes}))
        chosen = make_plan(settings, assign_splits(find_dataset(data), "random", 0.3)).settings
        return chosen.data.crop, chosen.train.batch

    # The sides of the objects are 31 pixels, those of the images 240 and 192.
    assert crops() == ((128, 128), 16)
    # Larger objects, no objects, and images that are as small have other crops.
    usual = (256, 192), 4
    assert crops(data__scale=2.0) == usual
    assert crops(model__objects=False) == usual
    assert crops(data__scale=None, data__size=(256, 192)) == usual
    assert crops(data__crop=(256, 192)) == usual
    assert crops(1)[1] == 8
    monkeypatch.setattr(plan, "MAX_SMALL_OBJECT_SIDE", 31)
    assert crops() == usual


def test_a_trained_model_knows_how_large_an_object_is(tmp_path: Path) -> None:
    dataset = assign_splits(find_dataset(numbered_dataset(tmp_path / "data")))
    changes = {"train.steps": 1, "data.crop": (32, 32), "model.width": 2, "model.depth": 1}
    changes |= {"data.scale": 1.0, "train.class_weights": "sqrt"}
    fit(dataset, tmp_path / "run", Settings().with_(changes))
    # A fifth of the typical ones, of 10 x 11 pixels.
    trained = load(tmp_path / "run")
    assert trained.min_object_pixels == 22
    # Twice the side of the objects, twice the limit; smaller objects have the same.
    assert [trained.min_pixels_at(scale) for scale in (0.5, 2.0)] == [44, 22]
    # Models of earlier versions keep theirs.
    del trained.runtime.description.provenance["specks_grow"]
    assert trained.min_pixels_at(0.5) == 22
    assert load(tmp_path / "run").object_side == pytest.approx(110**0.5, abs=1e-3)
    # All images have objects of one size. Only larger ones are kept from shallow valleys.
    sizes = [(scale, trained.are_objects_larger(scale)) for scale in (1.0, 0.8, 0.7, 0.5)]
    assert sizes == [(1.0, False), (0.8, False), (0.7, True), (0.5, True)]
    description = trained.runtime.description
    description.provenance["largest_object_side"] *= 1.5
    assert [description.are_objects_larger(scale) for scale in (0.7, 0.6)] == [False, True]
    del description.provenance["largest_object_side"]
    assert not description.are_objects_larger(0.5)
    # The rarer class loses a part of its weight.
    assert trained.enlarged_biases.max() == 0 > trained.enlarged_biases.min() > -1
    plain = {**changes, "model.objects": False}
    fit(dataset, tmp_path / "plain", Settings().with_(plain))
    predictor = load(tmp_path / "plain")
    assert predictor.min_object_pixels == 0
    assert "min_object_pixels" not in predictor.runtime.description.provenance


def test_learning_objects_is_refused_where_masks_do_not_distinguish_them(tmp_path: Path) -> None:
    data = numbered_dataset(tmp_path)
    for path in (data / "masks").iterdir():
        mask = np.asarray(Image.open(path)) > 0
        Image.fromarray((255 * mask).astype(np.uint8)).save(path)
    dataset = assign_splits(find_dataset(data), "random", 0.3)
    assert object_classes(dataset) == ()
    assert make_plan(Settings(), dataset).settings.model.objects is None
    with pytest.raises(SettingsError, match="the masks do not distinguish objects"):
        make_plan(Settings().with_({"model.objects": True}), dataset)


def test_the_classes_of_objects_stand_in_classes_toml(tmp_path: Path) -> None:
    data = numbered_dataset(tmp_path)
    for path in (data / "masks").iterdir():
        mask = np.asarray(Image.open(path)) > 0
        Image.fromarray(mask.astype(np.uint8)).save(path)
    (data / "classes.toml").write_text(
        '[[class]]\nname = "soil"\n[[class]]\nname = "grain"\nobjects = true\n'
    )
    dataset = find_dataset(data)
    assert object_classes(dataset) == (1,)
    objects = read_objects(dataset.pairs[0], dataset)
    mask = np.asarray(Image.open(dataset.pairs[0].mask))
    assert objects.max() > 1
    np.testing.assert_array_equal(objects > 0, mask > 0)
    assert len(np.unique(objects)) - 1 == ndimage.label(mask)[1]


def test_the_loss_is_least_for_the_true_depths() -> None:
    objects = touching_squares()
    label, depth = (objects > 0).astype(np.uint8), measure_depth(objects)
    label[20:] = 255
    target = torch.from_numpy(pack_target(label, depth).astype(np.int64))[None]
    share = torch.from_numpy(depth / 255).float().clamp(1e-4, 1 - 1e-4)[None, None]
    exact = (share / (1 - share)).log()
    assert depth_loss(exact, target) < depth_loss(exact + 0.3, target)
    assert depth_loss(exact, target) < chance_depth_loss(target)
    wrong = exact.clone()
    wrong[..., 20:, :] = 9
    assert depth_loss(wrong, target) == depth_loss(exact, target)
    # Nothing is learned outside of objects.
    assert depth_loss(torch.where(share > 1e-3, exact, 5), target) == depth_loss(exact, target)


def test_the_loss_of_the_classes_is_the_same_with_objects() -> None:
    logits = torch.randn(2, 4, 6, 5)
    label = torch.randint(3, (2, 6, 5))
    depth = torch.randint(256, (2, 6, 5))
    loss = make_loss("ce + dice")
    whole = with_objects(loss, 3)(logits, label + 256 * depth)
    part = depth_loss(logits[:, 3:], label + 256 * depth)
    assert torch.allclose(whole - part, loss(logits[:, :3], label))
