"""Made street scenes: pure, with all classes, and a label that is exactly what is painted."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from useg.classes import CARLA, read_classes
from useg.errors import UsageError
from useg.scenes import generate
from useg.scenes.generate import make_scene, write_scenes
from useg.scenes.layout import lay_out
from useg.scenes.render import Camera, Lighting, light, majority_label, paint_faces, project
from useg.scenes.scenery import GLOW, PEDESTRIAN, POLE, ROAD, SKY, TRAFFIC, RandomSource, Scenery

pytestmark = pytest.mark.wheel

EYE = Camera(width=128, height=96, focal=100, horizon=48, x=0, y=1.5)
DARK = Lighting(
    "dark",
    (0.0, 1.0, 0.0),
    (0, 0, 0),
    (0, 0, 0),
    (0, 0, 0),
    (0, 0, 0),
    clouds=-10,
    mist=0,
    shadow=0,
    lit=0.5,
)


def label_of(scenery: Scenery, camera: Camera = EYE) -> NDArray[np.uint8]:
    faces = project(scenery, camera)
    return majority_label(paint_faces(faces, camera), faces.labels)


@pytest.mark.parametrize("size", [(128, 96), (33, 47)])
def test_a_scene_is_a_pure_function_of_its_seed_and_size(size: tuple[int, int]) -> None:
    one, other, two = make_scene(3, size), make_scene(4, size), make_scene(3, size)
    assert np.array_equal(one.image, two.image)
    assert np.array_equal(one.label, two.label)
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.label, other.label)


def test_another_process_makes_the_same_scene() -> None:
    code = (
        "import zlib; from useg.scenes.generate import make_scene as m; s = m(5, (64, 48)); "
        "print(zlib.crc32(s.image), zlib.crc32(s.label))"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    }
    assert len(prints) == 1


@pytest.mark.parametrize("size", [(128, 96), (32, 32), (200, 40), (35, 121)])
def test_shapes_types_and_ids(size: tuple[int, int]) -> None:
    for seed in range(4):
        sample = make_scene(seed, size)
        assert sample.image.shape == (size[1], size[0], 3)
        assert sample.label.shape == (size[1], size[0])
        assert sample.image.dtype == sample.label.dtype == np.uint8
        assert sample.label.max() < len(CARLA)


def test_every_class_is_in_most_scenes_and_large_enough_to_score() -> None:
    shares = np.array(
        [np.bincount(make_scene(seed, (128, 96)).label.ravel(), minlength=13) for seed in range(30)]
    ) / (128 * 96)
    assert shares.mean(0).min() >= 0.003
    assert (shares > 0).mean(0).min() >= 0.8


def test_the_same_seed_is_the_same_street_at_every_size() -> None:
    for seed in range(2):
        small, large = make_scene(seed, (128, 96)).label, make_scene(seed, (256, 192)).label
        assert (small == large[::2, ::2]).mean() > 0.92
    for seed in range(10):
        far, near = (
            set(lay_out(RandomSource(np.random.default_rng(seed)), focal)[0].frames)
            for focal in (90.0, 360.0)
        )
        assert len(far & near) > 0.9 * len(
            far
        )  # what is too small is left out, and nothing else is moved by that


def test_weather_changes_the_picture_but_never_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = []
    for k in range(4):
        monkeypatch.setattr(
            generate, "_LIGHTING_PROBABILITIES", tuple(float(k == other) for other in range(4))
        )
        samples.append(make_scene(8, (128, 96)))
    for one, two in itertools.pairwise(samples):
        assert np.array_equal(one.label, two.label)
        assert np.abs(one.image.astype(int) - two.image).mean() > 4


@pytest.mark.parametrize("seed", range(4))
def test_painted_in_the_classes_colors_the_picture_is_the_label(seed: int) -> None:
    scenery, x = lay_out(RandomSource(np.random.default_rng(seed)), 100.0)
    scenery.attributes = [
        (look_[0], GLOW, look_[2], *CARLA.colors[int(look_[0])], *look_[6:])
        for look_ in scenery.attributes
    ]
    camera = Camera(128, 96, 100, 45, x, 1.5, yaw=0.05, roll=0.02, curve=0.001, slope=0.0004)
    faces = project(scenery, camera)
    canvas = paint_faces(faces, camera)
    label, picture = (
        majority_label(canvas, faces.labels),
        light(canvas, faces, np.zeros(canvas.shape, np.uint8), camera, DARK),
    )
    distance = np.abs(picture[:, :, None] - np.array(CARLA.colors, np.float32)).max(-1)
    pure = distance.min(-1) < 0.01  # all four places that make the pixel show one class
    assert pure.mean() > 0.75
    assert np.array_equal(distance.argmin(-1)[pure], label[pure])
    own = np.take_along_axis(distance, label[..., None].astype(int), -1)
    assert own.max() <= 0.75 * 255  # the pixel's class is in each mixed pixel, too


def test_a_pole_stands_where_the_pinhole_puts_it() -> None:
    scenery = Scenery(EYE.focal)
    scenery.move_to(TRAFFIC, x=1.0, z=10.0)
    scenery.billboard(0, 0, 2.0, 3.0, POLE, (200, 0, 0))
    expected = np.zeros((96, 128), np.uint8)
    expected[33:63, 64:84] = (
        # 100 px * (3 - 1.5) m / 10 m above the horizon's row 48, 100 px * 1.5 m / 10 m below it
        POLE
    )
    wrong = np.argwhere(label_of(scenery) != expected)
    assert len(wrong) <= 2 * (30 + 20)  # at most the border, which may be a pixel wider
    assert all(32 <= row <= 63 and 63 <= column <= 84 for row, column in wrong)


def test_what_is_nearer_hides_what_is_behind_and_what_is_behind_the_camera_is_not_seen() -> None:
    scenery = Scenery(EYE.focal)
    for z, label in ((10.0, POLE), (20.0, PEDESTRIAN), (-5.0, PEDESTRIAN)):
        scenery.move_to(TRAFFIC, z=z)
        scenery.billboard(0, 0, 2.0, 3.0, label, (200, 0, 0))
    label_map = label_of(scenery)
    assert label_map[50, 64] == POLE
    assert PEDESTRIAN not in label_map


def test_what_reaches_behind_the_camera_is_cut_off_there() -> None:
    scenery = Scenery(EYE.focal)
    scenery.move_to(TRAFFIC)
    scenery.face((-500, 0, -5), (1000, 0, 0), (0, 0, 400), ROAD, (90, 90, 90))
    label = label_of(scenery)
    assert (label[50:] == ROAD).all()
    assert (label[:48] == SKY).all()


def test_written_scenes_are_carlas_layout(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scenes"
    write_scenes(out, 2, (64, 48), seed=1)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == [
        "CameraRGB/scene_00000.png",
        "CameraRGB/scene_00001.png",
        "CameraSeg/scene_00000.png",
        "CameraSeg/scene_00001.png",
        "classes.toml",
    ]
    assert read_classes(out / "classes.toml") == CARLA
    sample = make_scene(1_000_003 + 1, (64, 48))
    image, mask = (
        np.asarray(PIL.Image.open(out / kind / "scene_00001.png"))
        for kind in ("CameraRGB", "CameraSeg")
    )
    assert np.array_equal(image, sample.image)
    assert np.array_equal(mask[..., 0], sample.label)
    assert not mask[..., 1:].any()
    assert [path.name for path in out.parent.iterdir()] == ["scenes"]


def test_an_empty_folder_is_filled_and_another_seed_makes_other_scenes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        write_scenes(tmp_path / name, 1, (32, 32), seed)
    one, two = ((tmp_path / name / "CameraRGB" / "scene_00000.png").read_bytes() for name in "ab")
    assert one != two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "0 scenes cannot be made; give a count of 1 to 1000003"),
        (
            {"size": (31, 64)},
            "scenes of 31x64 pixels cannot be made; give a width and a height of 32 to 4096, "
            "such as 256x192",
        ),
        (
            {"size": (64, 4097)},
            "scenes of 64x4097 pixels cannot be made; give a width and a height of 32 to 4096, "
            "such as 256x192",
        ),
        ({"seed": -1}, "the seed is -1, but it must not be negative; give a whole number from 0"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    given: dict[str, Any] = {"out": tmp_path / "scenes", "count": 1, "size": (32, 32)}
    with pytest.raises(UsageError) as caught:
        write_scenes(**{**given, **arguments})
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        UsageError,
        match="is a file, but scenes need a new or empty folder; choose another one or remove it",
    ):
        write_scenes(tmp_path / "file", 1, (32, 32))
    with pytest.raises(UsageError, match="is not empty, but scenes need a new or empty folder"):
        write_scenes(tmp_path, 1, (32, 32))
    with pytest.raises(UsageError, match=r"cannot be written \(.+\); choose another folder"):
        write_scenes(tmp_path / "file" / "scenes", 1, (32, 32))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(seed: int, size: tuple[int, int]) -> object:
        if seed == 2:
            raise error
        return make_scene(seed, size)

    monkeypatch.setattr(generate, "make_scene", stop)
    with pytest.raises(error):
        write_scenes(tmp_path / "scenes", 5, (32, 32))
    assert list(tmp_path.iterdir()) == []
