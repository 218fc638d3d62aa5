"""Label videos: a video in, the label maps and the overlays as videos out, frame for frame.

Every frame keeps its exact time. Decoding, prediction, drawing and encoding overlap.
"""

from __future__ import annotations

import os
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
from useg.errors import DataError, SettingsError, need
from useg.files import clear_drafts, make_folder, replacing
from useg.images.formats import pixel_limit
from useg.images.image_files import Image
from useg.inference.predictor import Predictor, load
from useg.machine import CountProgress, in_parallel
from useg.ownership import VIDEO_COMMENT, is_own_video, refuse_foreign_files
from useg.visualization import overlay

if TYPE_CHECKING:
    from av import VideoFrame

VIDEO_SUFFIXES = frozenset(
    {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"}
)

# FFmpeg's names of the formats that are read. It also reads lists that name other files.
_FORMATS = (
    *("mov", "mp4", "matroska", "webm", "avi", "asf"),
    *("mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc"),
)

# A pixel is still if no band changes by more than this (of 255) from one frame to the next.
MAX_STILL_DIFFERENCE = 8

# Frames that are decoded in advance, and frames that wait to be encoded.
MAX_QUEUED_FRAMES = 4


@dataclass(frozen=True)
class Frame:
    """One frame of a video, the right way up.

    Args:
        image: ``(H, W, 3)`` or ``(H, W, 1)`` uint8.
        aspect: Width of a pixel divided by its height.
        pts: Presentation time in units of ``time_base``; greater than that of the frame before.
        duration: Duration in the same units; 0 if the file does not give it.
        time_base: Seconds per unit.
        total: Number of frames that the file declares, roughly; 0 if it does not.
    """

    image: Image
    aspect: Fraction
    pts: int
    duration: int
    time_base: Fraction
    total: int


@dataclass(frozen=True)
class LabelledFrame:
    """A frame with its label map.

    Args:
        frame: The frame.
        label: Class ids ``(H, W)``.
        num_still: Number of pixels that are still since the frame before.
        num_flickering: How many of them changed their class.
    """

    frame: Frame
    label: Label
    num_still: int
    num_flickering: int


@dataclass(frozen=True)
class LabelledVideo:
    """Result of labelling a video.

    Args:
        frames: Number of frames, as many as in the video.
        seconds: Duration of the whole call.
        flicker: Share (0 to 1) of the still pixels that change their class between two frames.
        overlay: The overlays as a video that browsers play (VP9), if they were requested.
        masks: The label maps as a lossless video (FFV1) whose grey values are class ids.
    """

    frames: int
    seconds: float
    flicker: float
    overlay: Path | None
    masks: Path

    @property
    def frames_per_second(self) -> float:
        """Throughput of the whole call."""
        return self.frames / self.seconds


@dataclass(frozen=True)
class Codec:
    """How frames are encoded.

    Args:
        name: Name of the codec in FFmpeg.
        pixels: Pixel format in FFmpeg.
        full_range: Whether pixels use the full range 0-255.
        options: Options of the codec in FFmpeg.
    """

    name: str
    pixels: str
    full_range: bool
    options: dict[str, str]


# MP4 stores every time exactly (Matroska and WebM round to milliseconds) and holds both codecs.
# For 400x300, VP9 in its fast mode takes 5 ms of a core, as long as AV1, and half the space of
# MPEG-4 Part 2, which no browser plays and whose clock cannot express 1/90000 s. x264 is faster,
# but GPL.
CODECS = {
    "overlay": Codec(
        "libvpx-vp9",
        "yuv420p",
        False,
        {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "row-mt": "1"},
    ),
    "mask": Codec("ffv1", "gray", True, {"level": "3", "coder": "1", "slicecrc": "1", "g": "1"}),
}


def predict_video(
    model: str | os.PathLike[str] | Predictor,
    path: str | Path,
    out: str | Path,
    *,
    overlays: bool = True,
    smooth: float = 0.0,
    runtime: str | None = None,
    augment: str = "none",
    progress: CountProgress = lambda done, total: None,
) -> LabelledVideo:
    """Label every frame of a video.

    Writes ``out/STEM_mask.mp4``, a lossless video whose grey values are class ids, and
    ``out/STEM_overlay.mp4`` for viewing.

    Args:
        model: A run folder, a model file, or a loaded predictor.
        path: The video, in any format that FFmpeg decodes.
        out: Folder to write into; created if missing.
        overlays: Whether to write the overlay video.
        smooth: Reduces flicker: share of the previous frames to blend in, 0 to below 1.
        runtime: What computes the model, as for :func:`useg.load`.
        augment: Test-time augmentation, as for :func:`useg.load`.
        progress: Called with (frames done, frames in all as the file declares).

    Returns:
        The files, the number of frames, and how much the labels flicker.

    Raises:
        DataError: There is no such file, it is not a video, it is damaged or truncated, or its
            frames have several sizes or are too large.
        SettingsError: ``smooth`` is out of range.
        MissingPackageError: The package ``av`` is missing.
        UsageError: As for :func:`useg.load`.
    """
    predictor = model if isinstance(model, Predictor) else load(model, runtime, augment)
    return label_video(
        predictor, Path(path), Path(out), overlays=overlays, smooth=smooth, progress=progress
    )


def label_video(
    predictor: Predictor,
    path: Path,
    out: Path,
    *,
    overlays: bool = True,
    smooth: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelledVideo:
    """Label every frame of a video with a loaded model.

    Writes ``OUT/STEM_mask.mp4`` and ``OUT/STEM_overlay.mp4``, each whole or not at all. Both have
    every frame of the video at exactly its time, whether the frame rate is constant or not, the
    right way up. Sound is not copied.

    Args:
        predictor: The model.
        path: The video, in any format that FFmpeg decodes.
        out: Folder to write into; created if missing.
        overlays: Write the overlay video.
        smooth: Less flicker: share of the previous frames to blend in, 0 to below 1; see
            :func:`label_frames`.
        progress: Called with (frames done, frames in all as the file declares).

    Raises:
        DataError: There is no such file, or it is not a video, damaged or truncated, or its frames
            have several sizes or are too large.
        SettingsError: ``smooth`` is out of range.
        MissingPackageError: The package ``av`` is missing.
    """
    if not 0 <= smooth < 1:
        raise SettingsError(
            f"smooth, the share of the previous frames to blend in, is {smooth}, "
            f"but it must be at least 0 and less than 1; 0.5 is a good start"
        )
    began = time.perf_counter()
    names = [*(["overlay"] if overlays else []), "mask"]
    targets = {name: video_target(out, path, name) for name in names}
    refuse_foreign_files((target, is_own_video) for target in targets.values())
    num_frames = num_still = num_flickering = 0
    with ExitStack() as stack:
        bands = 1 if predictor.runtime.description.channels == 1 else 3
        frames = stack.enter_context(closing(read_frames(path, bands)))
        first = next(frames)
        clear_drafts(make_folder(out))
        encode = stack.enter_context(_background_encoder(targets, first))
        reader = stack.enter_context(ThreadPoolExecutor(1))

        def draw(labelled: LabelledFrame) -> tuple[LabelledFrame, list[VideoFrame]]:
            return labelled, [_DRAW[name](labelled, predictor) for name in names]

        decoded = _prefetch(chain([first], frames), reader)
        for labelled, drawn in in_parallel(draw, label_frames(predictor, decoded, smooth)):
            encode(drawn)
            num_frames += 1
            num_still += labelled.num_still
            num_flickering += labelled.num_flickering
            progress(num_frames, max(num_frames, first.total))
    progress(num_frames, num_frames)
    return LabelledVideo(
        num_frames,
        time.perf_counter() - began,
        num_flickering / max(1, num_still),
        targets.get("overlay"),
        targets["mask"],
    )


def video_target(out: Path, path: Path, name: str) -> Path:
    """Return where the ``overlay`` or the ``mask`` of a video goes."""
    return out / f"{path.stem}_{name}.mp4"


def label_frames(
    predictor: Predictor, frames: Iterator[Frame], smooth: float = 0.0
) -> Iterator[LabelledFrame]:
    """Label the frames of one video in their order.

    Args:
        predictor: The model.
        frames: The frames.
        smooth: Where the image is still (``MAX_STILL_DIFFERENCE``), the probabilities of a frame
            are ``smooth`` times the average so far and ``1 - smooth`` times its own. Where it
            changes they are its own, so nothing trails behind moving objects, and nothing
            is blended across a cut.
    """
    image: Image | None = None
    label: Label | None = None
    average: NDArray[np.float32] | None = None
    for frame in frames:
        still = np.zeros(frame.image.shape[:2], bool)
        if image is not None:
            still = find_still_pixels(image, frame.image)
        if smooth:
            probabilities = predictor.probabilities(frame.image)
            if average is not None:
                probabilities += (average - probabilities) * (np.float32(smooth) * still)
            average, new = probabilities, most_probable(probabilities)
        else:
            new = predictor(frame.image)
        num_flickering = 0 if label is None else int(np.count_nonzero((new != label) & still))
        yield LabelledFrame(frame, new, int(np.count_nonzero(still)), num_flickering)
        image, label = frame.image, new


def find_still_pixels(before: Image, after: Image) -> NDArray[np.bool_]:
    """Return where ``(H, W)`` no band of two uint8 images differs by more than the limit."""
    changed = np.maximum(before, after) - np.minimum(before, after) > MAX_STILL_DIFFERENCE
    still: NDArray[np.bool_] = ~changed[..., 0]
    # all(axis=2) takes five times as long.
    for band in range(1, changed.shape[2]):
        still &= ~changed[..., band]
    return still


def read_frames(path: Path, bands: int = 3) -> Generator[Frame, None, None]:
    """Decode a video frame by frame, at least one.

    Args:
        path: The video.
        bands: 3 for colour, 1 for grey.

    Raises:
        DataError: There is no such file, or it is not a video, damaged or truncated, or its frames
            have several sizes or are too large.
        MissingPackageError: The package ``av`` is missing.
    """
    av = need("av", extra="video")
    if not path.is_file():
        raise DataError(f"there is no video at {path}; give a video file")
    pts = None
    position = _Position()
    try:
        # Without "file:", FFmpeg takes what stands before a colon in a name for a protocol.
        options = {"protocol_whitelist": "file", "format_whitelist": ",".join(_FORMATS)}
        with av.open(f"file:{path}", options=options) as container:
            for frame in _decode(container, path, bands, position):
                pts = frame.pts
                yield frame
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if not position.seconds:
            raise DataError(
                f"{path} cannot be read as a video ({reason}); "
                f"give a whole file in a format that FFmpeg decodes"
            ) from error
        raise DataError(
            f"{path} is damaged after {position.seconds:.1f} s ({reason}); "
            f"copy it again from its source, or cut it before that"
        ) from error
    if pts is None:
        raise DataError(f"{path} holds no frame that can be decoded; give a whole video file")


@dataclass
class _Position:
    """How far a video was read, in seconds; sound counts, too."""

    seconds: float = 0.0


def _decode(container: Any, path: Path, bands: int, position: _Position) -> Iterator[Frame]:
    """Decode the frames of an open video.

    All packets are read, those of the sound too: where it ends shows whether the file is truncated.

    Raises:
        ValueError: The file is truncated or damaged, or the size of its frames changes.
    """
    stream = _video_stream(container, path)
    # Durations of a container are in microseconds.
    declared = (container.duration or 0) / 1_000_000
    total = stream.frames or round(declared * (stream.average_rate or 0))
    shape: tuple[int, ...] | None = None
    pts = None
    for packet in container.demux():
        # In MPEG-TS a joint between two recordings counts as corrupt.
        if packet.is_corrupt and container.format.name != "mpegts":
            raise ValueError("the file is truncated or damaged")
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            position.seconds = max(position.seconds, end)
        for decoded in packet.decode() if packet.stream is stream else ():
            image, aspect = _upright(decoded, stream, bands)
            if shape not in (None, image.shape):
                raise ValueError(
                    f"the size of its frames changes from {_size_text(shape)} "
                    f"to {_size_text(image.shape)}"
                )
            shape, pts = image.shape, _frame_time(decoded, pts)
            yield Frame(image, aspect, pts, decoded.duration or 0, stream.time_base, total)
    # Matroska is the one format whose packets do not show that the file is truncated.
    if "matroska" in container.format.name and position.seconds < 0.95 * declared - 0.5:
        raise ValueError(f"the file is truncated: it declares a duration of {declared:.1f} s")


def _video_stream(container: Any, path: Path) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        kinds = ", ".join(sorted({each.type for each in container.streams})) or "nothing"
        raise DataError(f"{path} holds no video, only {kinds}; give a video")
    if stream.codec_context is None:
        raise DataError(f"{path} is in a format that FFmpeg does not decode; convert it to MP4")
    width, height = stream.codec_context.width, stream.codec_context.height
    max_pixels = pixel_limit(None)
    if width * height > max_pixels:
        raise DataError(
            f"{path} has frames of {width}x{height} pixels, more than the {max_pixels:,} allowed; "
            f"reduce it, or raise USEG_MAX_PIXELS"
        )
    # FFmpeg refuses frames that are larger than the file declares. It counts its own margins.
    most = min(2 * max_pixels + (1 << 20), (1 << 31) - 1)
    stream.codec_context.options = {"max_pixels": str(most)}
    stream.thread_type = "AUTO"
    return stream


def _upright(frame: VideoFrame, stream: Any, bands: int) -> tuple[Image, Fraction]:
    """Return the pixels and their aspect ratio, after the rotation that the file asks for.

    ``frame.rotation`` is counter-clockwise, as ``rot90``.
    """
    turns = round(frame.rotation / 90) % 4
    pixels = frame.to_ndarray(format="gray" if bands == 1 else "rgb24")
    image = np.ascontiguousarray(np.rot90(pixels, turns))
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return image.reshape(*image.shape[:2], bands), 1 / aspect if turns % 2 else aspect


def _frame_time(frame: VideoFrame, last: int | None) -> int:
    """Return the presentation time of a frame.

    Times that stand still or go back are damage; as in players, the frame comes one unit later.
    """
    # Some AVI files give only the order.
    pts = frame.pts if frame.pts is not None else frame.dts
    if last is None:
        return pts or 0
    return last + 1 if pts is None else max(pts, last + 1)


def _size_text(shape: tuple[int, ...] | None) -> str:
    assert shape
    return f"{shape[1]}x{shape[0]}"


def _prefetch(frames: Iterator[Frame], pool: ThreadPoolExecutor) -> Iterator[Frame]:
    """Yield the items of an iterator that runs in another thread, a few ahead."""
    pending = deque(pool.submit(next, frames, None) for _ in range(MAX_QUEUED_FRAMES))
    while (frame := pending.popleft().result()) is not None:
        pending.append(pool.submit(next, frames, None))
        yield frame


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


def _video_frame(pixels: NDArray[np.uint8], pixel_format: str, frame: Frame) -> VideoFrame:
    av = need("av", extra="video")
    video_frame: VideoFrame = av.VideoFrame.from_ndarray(pixels, format=pixel_format)
    video_frame.pts, video_frame.time_base = frame.pts, frame.time_base
    video_frame.duration = frame.duration
    return video_frame


@contextmanager
def _background_encoder(
    targets: dict[str, Path], like: Frame
) -> Iterator[Callable[[list[VideoFrame]], None]]:
    """Yield a function that encodes one frame of each video, in another thread.

    The files exist, whole, when the block ends without error.

    Args:
        targets: Name of the codec -> MP4 file.
        like: The first frame.
    """
    with ExitStack() as stack:
        encoders = [
            stack.enter_context(_encoder(target, CODECS[name], like))
            for name, target in targets.items()
        ]
        writer = stack.enter_context(ThreadPoolExecutor(1))
        pending: deque[Future[None]] = deque()

        def write(frames: list[VideoFrame]) -> None:
            for encode, frame in zip(encoders, frames, strict=True):
                encode(frame)

        def submit(frames: list[VideoFrame]) -> None:
            pending.append(writer.submit(write, frames))
            if len(pending) > MAX_QUEUED_FRAMES:
                pending.popleft().result()

        yield submit
        for future in pending:
            future.result()


@contextmanager
def _encoder(path: Path, codec: Codec, like: Frame) -> Iterator[Callable[[VideoFrame], None]]:
    """Yield a function that encodes one frame after another into an MP4 file."""
    av = need("av", extra="video")
    # The time of the first frame is stored in units of the movie's timescale.
    options = {"movflags": "faststart", "movie_timescale": str(like.time_base.denominator)}
    with (
        replacing(path, is_own_video) as draft,
        av.open(f"file:{draft}", "w", format="mp4", options=options) as container,
    ):
        container.metadata["comment"] = VIDEO_COMMENT
        stream = container.add_stream(codec.name, options=codec.options)
        context = stream.codec_context
        context.height, context.width = like.image.shape[:2]
        context.pix_fmt, context.sample_aspect_ratio = codec.pixels, like.aspect
        context.time_base = like.time_base
        # ITU-R BT.709.
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 2 if codec.full_range else 1
        yield lambda frame: container.mux(stream.encode(frame))
        container.mux(stream.encode())
