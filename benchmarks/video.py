"""Compare the speed of video prediction with its network and its codecs; measure smoothing.

    python benchmarks/video.py RUN DATA [--frames 300] [--runtime NAME] [--rounds 3]

Run it on a machine that does nothing else. The clip consists of DATA's images, forwards and
backwards. Every round times the network alone (images in memory); decoding, drawing and encoding
alone (labels from memory); and both together. Results are medians of the rounds. Flicker and scores
are those of the images that RUN held out, which should be successive frames.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from useg.machine import describe_machine, tune

tune()

import av
import numpy as np
from record import record

from useg.classes import Label
from useg.data.dataset import Dataset, read_sample
from useg.data.layouts import find_dataset
from useg.images.image_files import Image, read_image
from useg.inference.predictor import Predictor
from useg.inference.video import Frame, label_frames, label_video
from useg.reporting.report import open_evaluation_data
from useg.scoring.metrics import confusion, score

SMOOTH = (0.0, 0.3, 0.5, 0.7, 0.85)


class StoredPredictions(Predictor):
    """Predicts from memory at no cost: only decoding, drawing and encoding remain."""

    def __init__(self, predictor: Predictor, labels: Sequence[Label]) -> None:
        super().__init__(predictor.runtime)
        self.labels = cycle(labels)

    def __call__(self, image: Image, tile: int | None = None) -> Label:
        return next(self.labels)


def write_clip(path: Path, images: Sequence[Image]) -> None:
    """Write 25 frames a second as MPEG-4 Part 2, whose decoder costs about as much as H.264's."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.bit_rate = 4_000_000
        stream.height, stream.width = images[0].shape[:2]
        for k, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def speeds(predictor: Predictor, images: Sequence[Image], rounds: int) -> dict[str, Any]:
    """Return milliseconds per frame of each part and of the whole, with and without smoothing."""
    labels = [predictor(image) for image in images[:32]]
    measured: dict[str, list[float]] = {
        name: [] for name in ("network", "codecs", "together", "together_smooth")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clip(folder / "clip.mp4", images)
        for _ in range(rounds):
            began = time.perf_counter()
            for image in images:
                predictor(image)
            measured["network"].append(time.perf_counter() - began)
            measured["codecs"].append(
                label_video(
                    StoredPredictions(predictor, labels), folder / "clip.mp4", folder / "out"
                ).seconds
            )
            measured["together"].append(
                label_video(predictor, folder / "clip.mp4", folder / "out").seconds
            )
            measured["together_smooth"].append(
                label_video(predictor, folder / "clip.mp4", folder / "out", smooth=0.5).seconds
            )
        sizes = {
            path.stem: path.stat().st_size // len(images)
            for path in (folder / "clip.mp4", *(folder / "out").iterdir())
        }
    milliseconds = {
        name: 1000 * statistics.median(seconds) / len(images) for name, seconds in measured.items()
    }
    ratio = statistics.median(
        both / max(network, codecs)
        for both, network, codecs in zip(
            measured["together"], measured["network"], measured["codecs"], strict=True
        )
    )
    return {
        "milliseconds_per_frame": milliseconds,
        "together_by_slower_part": ratio,
        "bytes_per_frame": sizes,
    }


def smoothing(predictor: Predictor, dataset: Dataset) -> list[dict[str, Any]]:
    """Return flicker and scores on the held-out images for several strengths of smoothing."""
    samples = [read_sample(pair, dataset) for pair in dataset.of("val")]
    frames = [
        Frame(sample.image, Fraction(1), k, 1, Fraction(1, 25), len(samples))
        for k, sample in enumerate(samples)
    ]
    rows = []
    for smooth in SMOOTH:
        labelled = list(label_frames(predictor, iter(frames), smooth))
        counts = sum(
            confusion(each.label, sample.label, len(dataset.classes))
            for each, sample in zip(labelled, samples, strict=True)
        )
        scores = score(np.asarray(counts), dataset.classes.names, len(samples))
        flicker = sum(each.num_flickering for each in labelled) / sum(
            each.num_still for each in labelled
        )
        rows.append(
            {
                "smooth": smooth,
                "flicker": flicker,
                "mean_iou": scores.mean_iou,
                "pixel_accuracy": scores.pixel_accuracy,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtime")
    arguments = parser.parse_args()
    predictor = Predictor.load(arguments.run, arguments.runtime)
    paths = [pair.image for pair in find_dataset(arguments.data).pairs]
    images = [
        read_image(path) for path in islice(cycle([*paths, *reversed(paths)]), arguments.frames)
    ]
    content = {
        "machine": describe_machine(),
        "runtime": predictor.runtime.name,
        "working_size": predictor.runtime.description.working.frame,
        "frame_size": [images[0].shape[1], images[0].shape[0]],
        "frames": len(images),
        "rounds": arguments.rounds,
        "speed": speeds(predictor, images, arguments.rounds),
        "smoothing": smoothing(predictor, open_evaluation_data(predictor, arguments.data)),
    }
    print(content["speed"])
    for row in content["smoothing"]:
        print(row)
    print(record(f"video_{predictor.runtime.name}", content))


if __name__ == "__main__":
    main()
