"""A video comes back frame for frame: times, class ids, rotation; damaged ones are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from made_inference import make_model, make_predictor

from useg.errors import UsageError
from useg.inference.predictor import Predictor
from useg.inference.video import Frame, find_still_pixels, label_frames, label_video, read_frames
from useg.scenes.generate import make_scene
from useg.visualization import overlay

av = pytest.importorskip("av", reason="needs the extra 'video'")

VARYING = [0, 900, 4100, 4500, 9999, 10000, 20000, 21001, 30000, 33333]


def pictures(count: int = 10) -> list[np.ndarray]:
    """A street that moves by two pixels a frame."""
    street = make_scene(3, (96, 48)).image
    return [street[:, 2 * k : 2 * k + 64] for k in range(count)]


def film(
    path: Path,
    images: Sequence[np.ndarray],
    times: Iterable[int] = range(0, 30 * 512, 512),
    base: Fraction = Fraction(1, 15360),
    codec: str = "mpeg4",
    rotation: int = 0,
    sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, options={"qscale": "2"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.time_base = base
        if rotation:
            stream.set_display_rotation(rotation)
        if sound:
            hum = container.add_stream("aac", rate=8000)
            noise = av.AudioFrame.from_ndarray(
                np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
            )
            noise.sample_rate = 8000
        for image, pts in zip(images, times, strict=False):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = pts, base
            container.mux(stream.encode(frame))
        if sound:
            container.mux(hum.encode(noise))
            container.mux(hum.encode())
        container.mux(stream.encode())
    return path


def seconds(path: Path) -> list[Fraction]:
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def decoded(path: Path, kind: str) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format=kind) for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make_predictor(make_model())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_class_ids_are_exact(suffix: str, predictor: Predictor, tmp_path: Path) -> None:
    path = film(tmp_path / f"drive{suffix}", pictures(), base=Fraction(1, 30), times=range(10))
    seen: list[tuple[int, int]] = []
    made = label_video(
        predictor, path, tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    assert (made.masks, made.overlay) == (
        tmp_path / "out/drive_mask.mp4",
        tmp_path / "out/drive_overlay.mp4",
    )
    assert made.frames == 10
    assert made.frames_per_second == 10 / made.seconds
    assert [done for done, _ in seen] == [*range(1, 11), 10]
    assert seen[-1] == (10, 10)
    # Matroska does not declare the number of frames.
    assert suffix == ".mkv" or seen[0] == (1, 10)
    images = [frame.image for frame in read_frames(path)]
    labels = [predictor(image) for image in images]
    assert all(len(np.unique(label)) > 1 for label in labels)
    assert np.array_equal(decoded(made.masks, "gray"), labels)
    # OpenCV reads three channels.
    for frame, label in zip(decoded(made.masks, "bgr24"), labels, strict=True):
        assert (frame == label[..., None]).all()
    with av.open(str(made.masks)) as container:
        # Full range: no program may stretch 16-235 to 0-255.
        assert container.streams.video[0].codec_context.color_range == 2
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "drive_mask.mp4",
        "drive_overlay.mp4",
    ]


def test_overlays_have_the_colours_of_those_of_pictures(
    predictor: Predictor, tmp_path: Path
) -> None:
    image = np.zeros((48, 64, 3), np.uint8) + np.array((200, 30, 60), np.uint8)
    path = film(tmp_path / "a.mkv", [image] * 2, base=Fraction(1, 30), codec="ffv1")
    made = label_video(predictor, path, tmp_path / "out")
    assert made.overlay
    expected = overlay(image, predictor(image), predictor.classes)[8:40, 8:56]
    assert (
        np.abs(
            decoded(made.overlay, "rgb24")[1][8:40, 8:56].mean((0, 1)) - expected.mean((0, 1))
        ).max()
        < 4
    )


@pytest.mark.parametrize(
    ("times", "base"),
    [
        (range(10), Fraction(1, 30)),
        (range(0, 10010, 1001), Fraction(1, 30000)),
        (VARYING, Fraction(1, 30000)),
        ([7000 + pts for pts in VARYING], Fraction(1, 15360)),
    ],
)
def test_every_frame_keeps_its_time(
    times: Sequence[int], base: Fraction, predictor: Predictor, tmp_path: Path
) -> None:
    path = film(
        tmp_path / "a.mp4",
        pictures(),
        times,
        base,
        options={"movie_timescale": str(base.denominator)},
    )
    expected = [pts * base for pts in times]
    assert seconds(path) == expected
    made = label_video(predictor, path, tmp_path / "out")
    assert made.overlay
    assert made.masks
    assert seconds(made.overlay) == expected
    assert seconds(made.masks) == expected


def test_a_mask_video_alone(predictor: Predictor, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", pictures(2))
    assert label_video(predictor, path, tmp_path / "out", overlays=False).overlay is None
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["a_mask.mp4"]


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotated_videos_are_labelled_the_right_way_up(
    rotation: int, predictor: Predictor, tmp_path: Path
) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32, 0] = 255  # red, top left as stored
    path = film(tmp_path / "a.mp4", [image] * 2, rotation=rotation)
    upright = next(iter(read_frames(path))).image
    expected = np.rot90(image, rotation // 90)  # counter-clockwise
    assert upright.shape == expected.shape
    assert np.abs(upright.astype(int) - expected).mean() < 12
    made = label_video(predictor, path, tmp_path / "out")
    assert made.masks
    assert (decoded(made.masks, "gray")[0] == predictor(upright)).all()


def test_oblong_pixels_stay_oblong(predictor: Predictor, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.codec_context.sample_aspect_ratio = (
            64,
            48,
            Fraction(4, 3),
        )
        stream.set_display_rotation(90)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures(1)[0], format="rgb24")))
        container.mux(stream.encode())
    made = label_video(predictor, tmp_path / "a.mp4", tmp_path / "out")
    for path in (made.overlay, made.masks):
        with av.open(str(path)) as container:
            assert container.streams.video[0].sample_aspect_ratio == Fraction(3, 4)


def test_sound_is_not_copied_and_a_colon_in_a_name_is_no_protocol(
    predictor: Predictor, tmp_path: Path
) -> None:
    path = film(tmp_path / "12:30.mp4", pictures(3), sound=True)
    made = label_video(predictor, path, tmp_path / "out")
    assert made.frames == 3
    with av.open(f"file:{made.overlay}") as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_a_list_of_files_is_no_video(tmp_path: Path) -> None:
    film(tmp_path / "secret.mp4", pictures(3))
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile 'secret.mp4'\n")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3, "FFmpeg follows the name"
    with pytest.raises(UsageError, match=r"a\.mp4 cannot be read as a video"):
        list(read_frames(tmp_path / "a.mp4", 3))


def test_a_codec_that_is_not_known_is_named_as_the_reason(tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi", pictures(3))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"FMP4", b"zzzz"))
    with pytest.raises(UsageError, match=r"a\.avi is in a format that FFmpeg does not decode"):
        list(read_frames(path, 3))


def test_a_video_of_just_the_pixels_allowed_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", pictures(3))
    monkeypatch.setenv("USEG_MAX_PIXELS", str(64 * 48))
    assert len(list(read_frames(path, 3))) == 3


def test_a_grey_model_labels_colour_videos(tmp_path: Path) -> None:
    predictor = make_predictor(make_model(channels=1))
    path = film(tmp_path / "a.mp4", pictures(2))
    made = label_video(predictor, path, tmp_path / "out")
    assert made.masks
    frames = list(read_frames(path, bands=1))
    assert frames[0].image.shape == (48, 64, 1)
    assert all(
        (a == predictor(frame.image)).all()
        for a, frame in zip(decoded(made.masks, "gray"), frames, strict=True)
    )


def still_film(count: int) -> list[Frame]:
    rng = np.random.default_rng(0)
    base = make_scene(3, (64, 48)).image.astype(int)
    noisy = [
        np.clip(base + rng.integers(-3, 4, base.shape), 0, 255).astype(np.uint8)
        for _ in range(count)
    ]
    return [
        Frame(image, Fraction(1), k, 1, Fraction(1, 30), count) for k, image in enumerate(noisy)
    ]


def flicker(predictor: Predictor, frames: list[Frame], smooth: float) -> float:
    labelled = list(label_frames(predictor, iter(frames), smooth))
    assert labelled[0].num_still == 0
    return sum(each.num_flickering for each in labelled) / sum(each.num_still for each in labelled)


def test_smoothing_calms_a_noisy_picture_that_stands_still(predictor: Predictor) -> None:
    frames = still_film(8)
    plain, smoothed = flicker(predictor, frames, 0.0), flicker(predictor, frames, 0.8)
    assert 0 < smoothed < plain / 2


def test_smoothing_restarts_where_the_image_changes(predictor: Predictor) -> None:
    frames = still_film(3)
    cut = [*frames[:2], Frame(255 - frames[2].image, Fraction(1), 2, 1, Fraction(1, 30), 3)]
    labelled = list(label_frames(predictor, iter(cut), 0.9))
    moved = ~find_still_pixels(cut[1].image, cut[2].image)
    assert moved.mean() > 0.9
    assert (labelled[2].label == predictor(cut[2].image))[moved].all()


def test_flicker_counts_changed_labels_where_the_image_stands_still() -> None:
    before = np.zeros((1, 4, 3), np.uint8)
    after = before.copy()
    after[0, 1, 2], after[0, 2, 0], after[0, 3] = 8, 9, 200
    assert (
        find_still_pixels(before, after).tolist()
        == find_still_pixels(after, before).tolist()
        == [[True, True, False, False]]
    )


def test_nothing_is_left_after_an_interruption(predictor: Predictor, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", pictures())
    label_video(predictor, path, tmp_path / "out", overlays=False)
    before = (tmp_path / "out/a_mask.mp4").read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_video(predictor, path, tmp_path / "out", progress=interrupt)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["a_mask.mp4"]
    assert (tmp_path / "out/a_mask.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        # The index of this file stands at its end.
        (
            "a.mp4",
            0.6,
            r"a\.mp4 cannot be read as a video \(Invalid data found .*\); give a whole file",
        ),
        (
            "fast.mp4",
            0.85,
            r"fast\.mp4 is damaged after \d\.\d s \(the file is truncated or damaged\); copy it",
        ),
        ("a.avi", 0.9, r"a\.avi is damaged after \d\.\d s"),
        (
            "a.mkv",
            0.75,
            r"a\.mkv is damaged after \d\.\d s \(.* truncated: it declares a duration of 5\.\d s\)",
        ),
        ("a.mkv", 0.0, r"a\.mkv cannot be read as a video"),
        ("a.webm", 0.0, r"a\.webm cannot be read as a video"),
    ],
)
def test_truncated_and_empty_videos_are_refused(
    name: str, share: float, message: str, predictor: Predictor, tmp_path: Path
) -> None:
    fast = {"movflags": "faststart"} if "fast" in name else {}
    step = 1 if "avi" in name else 10  # AVI fills gaps with empty frames
    path = tmp_path / name
    if share:
        film(
            path, pictures(16), times=range(0, 16 * step, step), base=Fraction(1, 30), options=fast
        )
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)] if share else b"")
    with pytest.raises(UsageError, match=message):
        label_video(predictor, path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_frames_of_several_sizes_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    path = film(tmp_path / "a.ts", pictures(4), times=range(4), base=Fraction(1, 30))
    other = film(
        tmp_path / "b.ts",
        [image[:32] for image in pictures(4)],
        times=range(4, 8),
        base=Fraction(1, 30),
    )
    path.write_bytes(path.read_bytes() + other.read_bytes())
    with pytest.raises(UsageError, match=r"the size of its frames changes from 64x48 to 64x32"):
        label_video(predictor, path, tmp_path / "out")


def test_missing_files_sound_only_and_too_large_frames_are_refused(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"there is no video at .*none\.mp4; give a video file"):
        label_video(predictor, tmp_path / "none.mp4", tmp_path)
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        hum = container.add_stream("aac", rate=8000)
        noise = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
        )
        noise.sample_rate = 8000
        container.mux(hum.encode(noise))
        container.mux(hum.encode())
    with pytest.raises(UsageError, match=r"song\.mp4 holds no video, only audio; give a video"):
        label_video(predictor, tmp_path / "song.mp4", tmp_path)
    path = film(tmp_path / "a.mp4", pictures(2))
    monkeypatch.setenv("USEG_MAX_PIXELS", "3000")
    with pytest.raises(
        UsageError,
        match=r"has frames of 64x48 pixels, more than the 3,000 allowed; reduce it, or raise",
    ):
        label_video(predictor, path, tmp_path)


def test_impossible_smoothing_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match="share of the previous frames to blend in, is 1, but it must be at least 0 and less",
    ):
        label_video(predictor, tmp_path / "a.mp4", tmp_path, smooth=1)


def test_without_av_the_install_line_is_given(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", pictures(1))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"pip install 'useg\[video\]'"):
        label_video(predictor, path, tmp_path)
