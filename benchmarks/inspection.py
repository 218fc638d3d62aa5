"""Compare the time of `useg inspect` with that of decoding every pair, with the same threads.

    python benchmarks/inspection.py [--pairs 1000] [--size 800x600] [--times 3] [--images png]

The data are made street scenes in CARLA's layout: shifted and brightened copies of a few, since
making a scene takes longer than inspecting it. Both jobs are timed in turn in one process, with the
files in the system's cache: first decoding, which no survey can avoid, then everything but the
page.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
from record import record

from useg.classes import CARLA, write_classes
from useg.config import parse_size
from useg.data.dataset import Dataset
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.doctor.survey import defer_classes, survey_dataset
from useg.images.image_files import read_image, read_mask
from useg.machine import describe_machine, in_parallel
from useg.scenes.generate import make_scene

# The other scenes are copies of these.
NUM_MADE_SCENES = 10


def write_pairs(root: Path, num: int, size: tuple[int, int], suffix: str) -> None:
    rng = np.random.default_rng(0)
    for folder in ("CameraRGB", "CameraSeg"):
        (root / folder).mkdir(parents=True)
    samples = [make_scene(k, size) for k in range(min(NUM_MADE_SCENES, num))]
    for k in range(num):
        sample = samples[k % len(samples)]
        image, label = sample.image.astype(np.int16), sample.label
        shift = int(rng.integers(0, size[0]))
        image, label = np.roll(image, shift, 1), np.roll(label, shift, 1)
        image = np.clip(image + rng.integers(-3, 4, image.shape), 0, 255).astype(np.uint8)
        mask = np.zeros((*label.shape, 3), np.uint8)
        mask[..., 0] = label
        PIL.Image.fromarray(image).save(root / "CameraRGB" / f"scene_{k:05d}.{suffix}")
        PIL.Image.fromarray(mask).save(root / "CameraSeg" / f"scene_{k:05d}.png")
    write_classes(root / "classes.toml", CARLA)


def decode_all(dataset: Dataset) -> None:
    for _ in in_parallel(
        lambda pair: (read_image(pair.image).shape, read_mask(pair.mask).shape), dataset.pairs
    ):
        pass


def inspect_folder(root: Path) -> None:
    survey_dataset(find_dataset(root, strict=False, infer=defer_classes), split=assign_splits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--size", default="800x600")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--images", choices=("png", "jpg"), default="png")
    arguments = parser.parse_args()
    size = parse_size(arguments.size)
    seconds: dict[str, list[float]] = {"decode": [], "inspect": []}
    processor: dict[str, list[float]] = {"decode": [], "inspect": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_pairs(root, arguments.pairs, size, arguments.images)
        dataset = find_dataset(root, strict=False, infer=defer_classes)
        # This brings the files into the system's cache.
        decode_all(dataset)
        for _ in range(arguments.times):
            for name, job in (
                ("decode", lambda: decode_all(dataset)),
                ("inspect", lambda: inspect_folder(root)),
            ):
                began, worked = time.perf_counter(), time.process_time()
                job()
                seconds[name].append(round(time.perf_counter() - began, 3))
                processor[name].append(round(time.process_time() - worked, 3))
    ratio, worked_ratio = (
        round(
            statistics.median(
                b / a for a, b in zip(times["decode"], times["inspect"], strict=True)
            ),
            3,
        )
        for times in (seconds, processor)
    )
    content = {
        "pairs": arguments.pairs,
        "size": arguments.size,
        "images": arguments.images,
        "seconds": seconds,
        "ratio": ratio,
    }
    content |= {"processor_seconds": processor, "processor_ratio": worked_ratio}
    path = record(
        "inspect" if arguments.images == "png" else f"inspect_{arguments.images}",
        {**content, "machine": describe_machine()},
    )
    print(
        f"decode {statistics.median(seconds['decode']):.1f} s, "
        f"inspect {statistics.median(seconds['inspect']):.1f} s, ratio {ratio:.2f}, "
        f"of processor time {worked_ratio:.2f}: {path}"
    )


if __name__ == "__main__":
    main()
