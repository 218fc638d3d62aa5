"""A video -> the same film as label maps and as overlay, frame for frame at the same times; decode
| compute | draw | encode overlap.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import Label, most_probable
from useg.errors import UsageError, need
from useg.files import make_folder, replacing
from useg.images.files import Image
from useg.images.limits import pixel_limit
from useg.inference.predictor import Predictor, load
from useg.machine import CountProgress, in_parallel
from useg.pictures import overlay

if TYPE_CHECKING:
    from av import VideoFrame

VIDEO_SUFFIXES = frozenset(
    {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"}
)


# of 255: where no band of a pixel changes by more between two frames, the image hardly changes
MAX_STILL_DIFFERENCE = 8


MAX_QUEUED_FRAMES = (
    4  # frames decoded before they are computed, and computed before they are encoded
)


@dataclass(frozen=True)
class Frame:
    """One frame of a video, the right way up.

    Args:
        image: ``(H, W, 3)`` uint8, or ``(H, W, 1)``.
        aspect: width of a pixel by its height.
        pts: when it is shown, in units of ``time_base``; greater than that of the frame before it.
        duration: how long, in the same units; 0 where the file does not say.
        time_base: in seconds.
        total: how many frames the file declares to have, about; 0 where it does not say.
    """

    image: Image
    aspect: Fraction
    pts: int
    duration: int
    time_base: Fraction
    total: int


@dataclass(frozen=True)
class LabelledFrame:
    """A frame with its label map ``(H, W)``; of the pixels that are ``still`` since the frame
    before it, ``flickering`` changed their class.
    """

    frame: Frame
    label: Label
    still: int
    flickering: int


@dataclass(frozen=True)
class LabelledVideo:
    """What was made of a video.

    Args:
        frames: how many, as many as in the video.
        seconds: that it took, end to end.
        flicker: share (0 to 1) of the pixels that change their class between consecutive frames
            where the image hardly changes.
        overlay: the overlays as a video that browsers play (VP9), if they were asked for.
        masks: the label maps as a lossless video (FFV1), if they were asked for: the grey value is
            the class id.
    """

    frames: int
    seconds: float
    flicker: float
    overlay: Path | None
    masks: Path | None

    @property
    def frames_per_second(self) -> float:
        """How fast it went, end to end."""
        return self.frames / self.seconds


@dataclass(frozen=True)
class Codec:
    """How frames are encoded: name and options as FFmpeg calls them, what is stored of a pixel, and
    whether it uses the full range 0-255.
    """

    name: str
    pixels: str
    full_range: bool
    options: dict[str, str]


# MP4 keeps every time exactly (Matroska and WebM round to milliseconds), and holds both. For
# 400x300 VP9 in its fast mode takes 5 ms of a core, as
# long as AV1, and half the space of MPEG-4 Part 2, which no browser plays and whose clock knows no
# 1/90000 s; x264 is faster, but GPL.
CODECS = {
    "overlay": Codec(
        "libvpx-vp9",
        "yuv420p",
        False,
        {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "row-mt": "1"},
    ),
    "mask": Codec("ffv1", "gray", True, {"level": "3", "coder": "1", "slicecrc": "1", "g": "1"}),
}


def label_video(
    predictor: Predictor,
    path: Path,
    out: Path,
    *,
    overlays: bool = True,
    masks: bool = True,
    smooth: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelledVideo:
    """Label every frame of a video: ``OUT/STEM_overlay.mp4`` to look at, ``OUT/STEM_mask.mp4`` with
    the exact class ids.

    Both have a frame for each of the video's at exactly its time, constant rate or not, turned the
    right way up. Sound is not copied. The files are there whole or not at all.

    Args:
        predictor: the model.
        path: the video, in any format that FFmpeg decodes.
        out: the folder to write; made when missing.
        overlays: write the overlay video.
        masks: write the mask video.
        smooth: 0 to below 1, see :func:`label_frames`.
        progress: called with (frames done, frames in all as the file declares).

    Raises:
        UsageError: no such file, no video, damaged, cut off, frames of several sizes or too large,
            or the package ``av`` is missing.
    """
    if not 0 <= smooth < 1:
        raise UsageError(
            f"the share of the past in each frame is {smooth}, but it is 0 or more and less than "
            "1; 0.5 is a good start"
        )
    if not (overlays or masks):
        raise UsageError(
            "neither overlays nor masks of the video are asked for; ask for one of them"
        )
    names = [name for name, wanted in {"overlay": overlays, "mask": masks}.items() if wanted]
    began, still, flickering, done = time.perf_counter(), 0, 0, 0
    with ExitStack() as stack:
        frames = stack.enter_context(
            closing(read_frames(path, 1 if predictor.runtime.description.channels == 1 else 3))
        )
        first = next(frames)
        make_folder(out)
        targets = {name: out / f"{path.stem}_{name}.mp4" for name in names}
        encode = [
            stack.enter_context(_encoder(target, CODECS[name], first))
            for name, target in targets.items()
        ]
        reader, writer = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))

        def draw(labelled: LabelledFrame) -> tuple[LabelledFrame, list[VideoFrame]]:
            return labelled, [_DRAW[name](labelled, predictor) for name in names]

        def write(drawn: list[VideoFrame]) -> None:
            for into, each in zip(encode, drawn, strict=True):
                into(each)

        behind: deque[Future[None]] = deque()
        for labelled, drawn in in_parallel(
            draw, label_frames(predictor, _prefetch(chain([first], frames), reader), smooth)
        ):
            behind.append(writer.submit(write, drawn))
            if len(behind) > MAX_QUEUED_FRAMES:
                behind.popleft().result()
            still, flickering, done = (
                still + labelled.still,
                flickering + labelled.flickering,
                done + 1,
            )
            progress(done, max(done, first.total))
        for each in behind:
            each.result()
    progress(done, done)
    return LabelledVideo(
        done,
        time.perf_counter() - began,
        flickering / max(1, still),
        targets.get("overlay"),
        targets.get("mask"),
    )


def read_frames(path: Path, bands: int = 3) -> Generator[Frame, None, None]:
    """Decode a video frame by frame, at least one.

    Args:
        path: the video.
        bands: 3 for colour, 1 for grey.

    Raises:
        UsageError: no such file, no video, damaged, cut off, frames of several sizes or too large,
            or the package ``av`` is missing.
    """
    av = need("av", extra="video")
    if not path.is_file():
        raise UsageError(f"there is no video at {path}; give a video file")
    shape: tuple[int, ...] | None = None
    pts, reached = None, 0.0
    try:  # "file:": without it FFmpeg takes what stands before a colon in a name for a protocol
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            stream = _video_stream(container, path)
            declared = (container.duration or 0) / av.time_base
            total = stream.frames or round(declared * (stream.average_rate or 0))
            for (
                packet
            ) in container.demux():  # sound too: where it ends shows whether the file is cut off
                if (
                    packet.is_corrupt and container.format.name != "mpegts"
                ):  # there a joint between two recordings counts as corrupt
                    raise ValueError("the file is cut off or damaged")
                if packet.pts is not None:
                    reached = max(
                        reached, float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    )
                for decoded in packet.decode() if packet.stream is stream else ():
                    frame = Frame(
                        *_upright(decoded, stream, bands),
                        _frame_time(decoded, pts),
                        decoded.duration or 0,
                        stream.time_base,
                        total,
                    )
                    if shape not in (None, frame.image.shape):
                        raise ValueError(
                            f"the size of its frames changes from {_size_text(shape)} to "
                            f"{_size_text(frame.image.shape)}"
                        )
                    shape, pts = frame.image.shape, frame.pts
                    yield frame
            if (
                "matroska" in container.format.name and reached < 0.95 * declared - 0.5
            ):  # the one format whose packets do not tell
                raise ValueError(f"the file is cut off: it declares to last {declared:.1f} s")
    except (av.FFmpegError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if not reached:
            raise UsageError(
                f"{path} cannot be read as a video ({why}); give a whole file in a format that "
                "FFmpeg decodes"
            ) from error
        raise UsageError(
            f"{path} is damaged after {reached:.1f} s ({why}); copy it again from its source, or "
            "cut it before that"
        ) from error
    if pts is None:
        raise UsageError(f"{path} holds no frame that can be decoded; give a whole video file")


def _video_stream(container: Any, path: Path) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        raise UsageError(
            f"{path} holds no pictures, only "
            f"{', '.join(sorted({each.type for each in container.streams})) or 'nothing'}; give "
            "a video"
        )
    width, height, most = stream.codec_context.width, stream.codec_context.height, pixel_limit(None)
    if width * height > most:
        raise UsageError(
            f"{path} has frames of {width}x{height} pixels, more than the {most:,} allowed; "
            "reduce it, or raise USEG_MAX_PIXELS"
        )
    stream.thread_type = "AUTO"
    return stream


def _upright(frame: VideoFrame, stream: Any, bands: int) -> tuple[Image, Fraction]:
    """Return the pixels and their aspect, turned as the file says to show them: ``frame.rotation``
    is counter-clockwise, as ``rot90``.
    """
    turns = round(frame.rotation / 90) % 4
    image = np.ascontiguousarray(
        np.rot90(frame.to_ndarray(format="gray" if bands == 1 else "rgb24"), turns)
    )
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return image.reshape(*image.shape[:2], bands), 1 / aspect if turns % 2 else aspect


def _frame_time(frame: VideoFrame, last: int | None) -> int:
    """Return when a frame is shown; time that stands still or goes back is damage, and players go
    on a tick later too.
    """
    pts = frame.pts if frame.pts is not None else frame.dts  # some AVI know only the order
    if last is None:
        return pts or 0
    return last + 1 if pts is None else max(pts, last + 1)


def _size_text(shape: tuple[int, ...] | None) -> str:
    assert shape
    return f"{shape[1]}x{shape[0]}"


def _prefetch(frames: Iterator[Frame], pool: ThreadPoolExecutor) -> Iterator[Frame]:
    """Yield what an iterator does, which runs in another thread, a few ahead."""
    waiting = deque(pool.submit(next, frames, None) for _ in range(MAX_QUEUED_FRAMES))
    while (frame := waiting.popleft().result()) is not None:
        waiting.append(pool.submit(next, frames, None))
        yield frame


def label_frames(
    predictor: Predictor, frames: Iterator[Frame], smooth: float = 0.0
) -> Iterator[LabelledFrame]:
    """Label the frames of one video in their order.

    Where the image hardly changes (``STILL``), the probabilities are averaged over time: each
    frame's are ``smooth`` times the average so far and ``1 - smooth`` times its own. Where it
    changes they are the frame's own, so that nothing drags behind what moves, and a cut starts
    anew.
    """
    image: Image | None = None
    label: Label | None = None
    average: NDArray[np.float32] | None = None
    for frame in frames:
        still = (
            np.zeros(frame.image.shape[:2], bool)
            if image is None
            else find_still_pixels(image, frame.image)
        )
        if smooth:
            probabilities = predictor.probabilities(frame.image)
            if average is not None:
                probabilities += (average - probabilities) * (np.float32(smooth) * still)
            average, new = probabilities, most_probable(probabilities)
        else:
            new = predictor(frame.image)
        flickering = 0 if label is None else int(np.count_nonzero((new != label) & still))
        yield LabelledFrame(frame, new, int(np.count_nonzero(still)), flickering)
        image, label = frame.image, new


def find_still_pixels(before: Image, after: Image) -> NDArray[np.bool_]:
    """Mark the pixels ``(H, W)`` at which no band of two uint8 images differs by more than
    ``STILL``.
    """
    moved = np.maximum(before, after) - np.minimum(before, after) > MAX_STILL_DIFFERENCE
    still: NDArray[np.bool_] = ~moved[..., 0]
    for band in range(1, moved.shape[2]):  # all(axis=2) takes five times as long
        still &= ~moved[..., band]
    return still


def _draw_overlay(labelled: LabelledFrame, predictor: Predictor) -> VideoFrame:
    picture = overlay(labelled.frame.image, labelled.label, predictor.classes)
    return _video_frame(picture, "rgb24", labelled.frame).reformat(
        format=CODECS["overlay"].pixels, dst_colorspace="ITU709"
    )


def _draw_mask(labelled: LabelledFrame, predictor: Predictor) -> VideoFrame:
    return _video_frame(labelled.label, CODECS["mask"].pixels, labelled.frame)


_DRAW: dict[str, Callable[[LabelledFrame, Predictor], VideoFrame]] = {
    "overlay": _draw_overlay,
    "mask": _draw_mask,
}


def _video_frame(pixels: NDArray[np.uint8], kind: str, frame: Frame) -> VideoFrame:
    made: VideoFrame = need("av", extra="video").VideoFrame.from_ndarray(pixels, format=kind)
    made.pts, made.time_base, made.duration = frame.pts, frame.time_base, frame.duration
    return made


@contextmanager
def _encoder(path: Path, codec: Codec, like: Frame) -> Iterator[Callable[[VideoFrame], None]]:
    """Yield what encodes one frame after the other into an MP4 file, which is there, whole, when
    the block ends well.
    """
    av = need("av", extra="video")
    options = {
        "movflags": "faststart",
        "movie_timescale": str(like.time_base.denominator),
    }  # in which the time of the first frame is stored
    with (
        replacing(path) as temporary,
        av.open(f"file:{temporary}", "w", format="mp4", options=options) as container,
    ):
        stream = container.add_stream(codec.name, options=codec.options)
        context = stream.codec_context
        context.height, context.width = like.image.shape[:2]
        context.pix_fmt, context.sample_aspect_ratio = codec.pixels, like.aspect
        context.time_base = like.time_base
        context.colorspace = context.color_primaries = context.color_trc = 1  # ITU-R BT.709
        context.color_range = 2 if codec.full_range else 1
        yield lambda frame: container.mux(stream.encode(frame))
        container.mux(stream.encode())


def predict_video(
    model: str | Path | Predictor,
    path: str | Path,
    out: str | Path,
    *,
    overlays: bool = True,
    smooth: float = 0.0,
    runtime: str | None = None,
    augment: str = "none",
    progress: CountProgress = lambda done, total: None,
) -> LabelledVideo:
    """Label every frame of a video: ``out/STEM_overlay.mp4`` to look at, ``out/STEM_mask.mp4`` with
    the exact class ids.

    Arguments and errors as for :func:`useg.inference.video.label_video` and :func:`load`.
    """
    predictor = model if isinstance(model, Predictor) else load(model, runtime, augment)
    return label_video(
        predictor, Path(path), Path(out), overlays=overlays, smooth=smooth, progress=progress
    )
