"""Objects are kept apart, and tiles give what one pass gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from useg.objects import separation
from useg.objects.separation import choose_cuts, find_levels, grow, measure_depth, separate
from useg.scoring.metrics import regions


def number(
    levels: NDArray[np.uint8],
    tile: int | None = None,
    *,
    by_class: bool = False,
    side: float = 0.0,
    are_larger: bool = False,
):
    room, cuts = np.zeros((2, *levels.shape), np.uint32), choose_cuts(are_larger)
    count = separate(levels, room, by_class=by_class, side=side, cuts=cuts, tile=tile)
    return room[0], count


def discs(shape: tuple[int, int], centres: list[tuple[int, int]], radius: int):
    """Number discs; where they overlap, the nearer centre has the pixel."""
    y, x = np.indices(shape)
    distance = np.stack([np.hypot(y - a, x - b) for a, b in centres])
    return np.where(distance.min(0) <= radius, distance.argmin(0) + 1, 0)


def levels_of(objects: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the levels of a network that knows the depths exactly."""
    depth = measure_depth(objects) / 255
    logits = np.log((depth + 1e-6) / (1 - depth + 1e-6)).astype(np.float32)
    return find_levels((objects > 0).astype(np.uint8), logits, [1])


def made_levels(seed: int, shape: tuple[int, int], are_larger: bool = False) -> NDArray[np.uint8]:
    """Return smooth random levels with touching, torn and tiny regions."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random(shape), rng.choice([1.0, 2.0, 4.0]))
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    inside, depth = (smooth > 0.45).astype(np.uint8), 8 * (smooth - 0.6).astype(np.float32)
    return find_levels(inside, depth, [1], choose_cuts(are_larger))


def test_touching_discs_are_separated() -> None:
    objects = discs((40, 60), [(18, 15), (18, 33), (25, 50)], 9)
    found, count = number(levels_of(objects))
    assert count == 3
    np.testing.assert_array_equal(found > 0, objects > 0)
    # The line between two discs may be off by a pixel.
    assert (found != objects).sum() < 0.02 * (objects > 0).sum()


def test_without_a_valley_a_region_is_one_object() -> None:
    levels = find_levels(np.ones((8, 30), np.uint8), np.full((8, 30), 5, np.float32), [1])
    assert number(levels)[1] == 1


@pytest.mark.parametrize(("are_larger", "expected"), [(False, 2), (True, 1)])
def test_shallow_valleys_do_not_split_objects_larger_than_in_training(
    are_larger: bool, expected: int
) -> None:
    for valley, top, wanted in ((0.55, 0.65, expected), (0.45, 0.65, 2), (0.75, 0.88, expected)):
        share = np.full((12, 40), top)
        share[:, 18:22] = valley
        logits = np.log(share / (1 - share)).astype(np.float32)
        levels = find_levels(np.ones(share.shape, np.uint8), logits, [1], choose_cuts(are_larger))
        assert number(levels, are_larger=are_larger)[1] == wanted


def test_parts_that_are_tiny_do_not_split_an_object() -> None:
    levels = np.ones((20, 40), np.uint8)
    levels[5:15, 5:15] = 8
    levels[5, 30:35] = 8
    assert number(levels)[1] == 1
    levels[6, 30:39] = 8
    assert number(levels)[1] == 2


@pytest.mark.parametrize(("side", "expected"), [(0, 2), (22, 2), (23, 1)])
def test_parts_of_objects_below_a_fifth_of_the_typical_area_do_not_split(
    side: float, expected: int
) -> None:
    levels = np.ones((40, 60), np.uint8)
    # Deeper than 0.2 lies a part of 64 pixels. It belongs to an object of 64 / 0.8 ** 2 = 100.
    levels[2:10, 48:56] = 6
    levels[5:35, 5:35] = 6
    assert number(levels, side=side)[1] == expected


@pytest.mark.parametrize(
    ("usual", "last", "expected"),
    [(0.95, 0.82, 3), (0.95, 0.88, 4), (0.999, 0.95, 4), (0.8, 0.5, 4)],
)
@pytest.mark.parametrize("tile", [None, 7])
def test_objects_that_are_much_less_certain_than_the_others_get_no_number(
    usual: float, last: float, expected: int, tile: int | None
) -> None:
    levels, confidences = np.zeros((12, 40), np.uint8), np.full((12, 40), 0.3, np.float32)
    for left, confidence in ((1, usual), (11, last), (21, usual), (31, usual)):
        levels[2:10, left : left + 8] = 5
        confidences[2:10, left : left + 8] = confidence
    room = np.zeros((2, *levels.shape), np.uint32)
    assert separate(levels, room, confidences=confidences, tile=tile) == expected
    assert room[0].max() == expected
    assert (room[0][5, 15] > 0) == (expected == 4)


def test_a_tiny_region_of_its_own_is_an_object() -> None:
    levels = np.zeros((9, 9), np.uint8)
    levels[4, 4] = 1
    assert number(levels)[1] == 1


def test_what_no_seed_reaches_is_an_object_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separation, "MAX_GROWTH_PIXELS", 3)
    levels = np.ones((4, 40), np.uint8)
    levels[:, :6] = levels[:, 34:] = 8
    found, count = number(levels)
    assert (count, found[0, 8], found[0, 9], found[0, 30]) == (3, 1, 2, 2)


def test_an_empty_image_has_no_object() -> None:
    found, count = number(np.zeros((5, 7), np.uint8))
    assert (count, found.max()) == (0, 0)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(3, 70), st.integers(3, 70)),
    st.integers(4, 30),
    st.sampled_from([0.0, 12.0, 25.0]),
    st.booleans(),
)
def test_tiles_give_what_one_pass_gives(
    seed: int, shape: tuple[int, int], tile: int, side: float, are_larger: bool
) -> None:
    levels = made_levels(seed, shape, are_larger)
    whole, tiled = (number(levels, each, side=side, are_larger=are_larger) for each in (None, tile))
    assert whole[1] == tiled[1]
    np.testing.assert_array_equal(whole[0], tiled[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 30), st.integers(1, 60))
def test_specks_get_no_number_whatever_the_tiles(seed: int, tile: int, least: int) -> None:
    levels = made_levels(seed, (45, 52))
    room = np.zeros((2, *levels.shape), np.uint32)
    count = separate(levels, room, min_pixels=least, tile=tile)
    every, _ = number(levels)
    is_kept = np.bincount(every.ravel()) >= least
    is_kept[0] = False
    np.testing.assert_array_equal(room[0], np.where(is_kept, np.cumsum(is_kept), 0)[every])
    assert count == is_kept.sum()


class WatchedArray:
    """An array on disk, as it were: it notes the largest part that is in memory at a time."""

    def __init__(self, content: NDArray[np.generic]) -> None:
        self.content, self.shape, self.size, self.largest = content, content.shape, content.size, 0

    def __getitem__(self, place: tuple[slice, slice]) -> NDArray[np.generic]:
        self.largest = max(self.largest, self.content[place].size)
        return self.content[place].copy()

    def __setitem__(self, place: tuple[slice, slice], values: NDArray[np.generic]) -> None:
        self.largest = max(self.largest, self.content[place].size)
        self.content[place] = values


def test_a_tile_and_what_grows_into_it_is_in_memory_at_a_time() -> None:
    tile = levels_of(discs((100, 120), [(30, 30), (30, 46), (70, 90)], 9))
    levels = np.tile(tile, (6, 5))
    arrays = [WatchedArray(levels), *map(WatchedArray, np.zeros((2, *levels.shape), np.uint32))]
    assert separate(arrays[0], arrays[1:], tile=40) == 3 * 30
    most = (40 + 2 * separation.MAX_GROWTH_PIXELS) ** 2
    assert all(array.largest <= most < levels.size / 4 for array in arrays)


@pytest.mark.parametrize("tile", [128, 256, 512])
def test_large_tiles_give_what_one_pass_gives(tile: int) -> None:
    levels = made_levels(tile, (700, 600))
    np.testing.assert_array_equal(number(levels)[0], number(levels, tile)[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 20))
def test_without_depth_objects_are_the_connected_regions_of_a_class(seed: int, tile: int) -> None:
    label = np.random.default_rng(seed).integers(0, 4, (23, 31)).astype(np.uint8)
    levels = find_levels(label, None, [1, 3])
    expected = regions(label) + 1
    expected[(label != 1) & (label != 3)] = 0
    for found, count in (number(levels, by_class=True), number(levels, tile, by_class=True)):
        pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert count == len(np.unique(expected)) - 1


def number_by_hand(
    inside: NDArray[np.bool_], depth: NDArray[np.float32], side: float, are_larger: bool
) -> NDArray[np.int64]:
    """The few lines of docs/objects.md, without tables and tiles."""
    deep, seeds = inside, ndimage.label(inside)[0].astype(np.int64)
    cuts, rise = (np.arange(10, 75, 4) / 100, 0.12) if are_larger else (np.arange(2, 9) / 10, 0)
    for cut in cuts:
        parts, count = ndimage.label(deep & (depth > np.log(cut / (1 - cut))))
        owner = np.zeros(count + 1, int)
        owner[parts] = seeds
        least = max(6, 0.2 * (side * (1 - cut)) ** 2)
        owner[np.bincount(parts.ravel(), minlength=count + 1) < least] = owner[0] = 0
        high = parts[depth > np.log((cut + rise) / (1 - cut - rise))]
        owner[np.bincount(high, minlength=count + 1) == 0] = 0
        deep = owner[parts] > 0
        is_split = np.bincount(owner, minlength=seeds.max() + 1) > 1
        is_split[0] = False
        fresh = np.where(is_split[owner], seeds.max() + np.arange(count + 1), 0)
        seeds = np.where(fresh[parts] > 0, fresh[parts], np.where(is_split[seeds], 0, seeds))
    for _ in range(separation.MAX_GROWTH_PIXELS):
        padded, grown = np.pad(seeds, 1), seeds
        for near in (padded[:-2, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], padded[2:, 1:-1]):
            grown = np.where((grown == 0) & inside, near, grown)
        seeds = grown
    return seeds


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 12.0, 25.0]), st.booleans())
def test_the_few_lines_of_the_documentation_give_the_same_objects(
    seed: int, side: float, are_larger: bool
) -> None:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((40, 50)), 2.0)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    inside, depth = smooth > 0.4, (12 * (smooth - 0.6)).astype(np.float32)
    levels = find_levels(inside.astype(np.uint8), depth, [1], choose_cuts(are_larger))
    found, count = number(levels, side=side, are_larger=are_larger)
    expected = number_by_hand(inside, depth, side, are_larger)
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert count == len(np.unique(expected[expected > 0]))


def test_seeds_grow_at_equal_speed() -> None:
    seeds = np.zeros((1, 9), np.uint32)
    seeds[0, [0, 8]] = 1, 2
    inside = np.ones((1, 9), bool)
    inside[0, 7] = False
    assert grow(seeds, inside).tolist() == [[1, 1, 1, 1, 1, 1, 1, 0, 2]]


def test_numbers_follow_the_order_of_first_pixels() -> None:
    found, count = number(made_levels(5, (60, 80)), 16)
    first = np.unique(found, return_index=True)[1]
    values = found.ravel()[np.sort(first)]
    assert values[values > 0].tolist() == list(range(1, count + 1))
