"""Compare the speed of `useg predict` with the sum of its parts and with a simple prediction loop.

    python benchmarks/predict.py MODEL [--export MODEL.xml] [--jpeg] [--pictures 440] [--times 3]

Run it on a machine that does nothing else. The images are CARLA's of 800x600, or synthetic scenes
if those are missing, in the system's cache; links bring them to the wanted number. They are PNG
files, or JPEG files of quality 90.

Each part is measured as ``useg predict`` computes it: one thread per image, all cores busy. The
bound is the speed of all parts together if nothing waited. The loop opens an image with Pillow,
resizes it, standardises it if the model needs that, runs PyTorch in fp32 with all cores, enlarges
the logits, takes the largest and saves a PNG; it takes a quarter of the images. Both start with the
model loaded. useg chooses its runtime as the command does, with an empty cache. The time of that,
of the whole command and of the command for one image are stored too; Python finds useg's modules
compiled, as after an installation.
``--export`` names an exported form of the model, for example in 8 bits, with which useg predicts;
the loop always runs the model itself.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from useg.machine import describe_machine, tune

tune()

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from record import ROOT, record
from torch.nn import functional as F

from useg.classes import most_probable
from useg.images.image_files import (
    encode_label,
    encode_picture,
    read_image,
    read_mask,
    resize_image,
    write_picture,
)
from useg.inference import tiles
from useg.inference.outputs import OutputOptions
from useg.inference.predict_files import predict
from useg.inference.predictor import Predictor, resize_logits
from useg.inference.resampling import label_compiled, resize_compiled
from useg.machine import in_parallel
from useg.models import segmenter
from useg.models.geometry import Image, standardize
from useg.scenes.generate import make_scene
from useg.visualization import add_legend, overlay

FRAMES = ROOT.parent / "shared" / "data" / "carla_800x600" / "CameraRGB"
# The parts are measured on so many images, for at least so many seconds each.
NUM_MEASURED = 8
SECONDS = 2.0
# Parts of a label map; the others are those of its overlay.
NUM_PARTS = 5
# Whole commands for one image, and for help.
NUM_COMMANDS = 5


def collect(folder: Path, count: int, *, jpeg: bool) -> str:
    """Fill ``folder / "in"`` with ``count`` images; returns what they are."""
    frames, kind = sorted(FRAMES.glob("*.png")), "CARLA"
    if not frames:
        frames, kind = [folder / f"scene{k}.png" for k in range(20)], "made scenes"
        for k, path in enumerate(frames):
            write_picture(path, make_scene(k, (800, 600)).image)
    if jpeg:
        pictures = [PIL.Image.open(path).convert("RGB") for path in frames]
        frames = [folder / f"{path.stem}.jpg" for path in frames]
        for picture, path in zip(pictures, frames, strict=True):
            picture.save(path, quality=90)
    (folder / "in").mkdir()
    for k, path in zip(range(count), itertools.cycle(frames), strict=False):
        os.symlink(path, folder / "in" / f"{k:05d}{path.suffix}")
    return kind


def seconds_of(part: Callable[[Any], Any], things: Iterable[Any]) -> tuple[float, list[Any]]:
    """Return the seconds per image of a part with all cores busy, and its results."""
    things, cores = list(things), torch.get_num_threads()
    torch.set_num_threads(1)
    results, times = list(in_parallel(part, things, cores)), []
    while sum(times) < SECONDS:
        began = time.perf_counter()
        for _ in in_parallel(part, things, cores):
            pass
        times.append(time.perf_counter() - began)
    torch.set_num_threads(cores)
    return statistics.median(times) / len(things), results


def resize_in_c(image: Image, size: tuple[int, int]) -> Image:
    """Resize an image as ``useg predict`` does where there is a C compiler."""
    return resize_compiled(image, size, resize_image)


def label_uncompiled(logits: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """Enlarge logits and choose the classes where there is no C compiler."""
    return most_probable(resize_logits(torch.from_numpy(logits)[None], height, width)[0].numpy())


def parts(predictor: Predictor, paths: list[Path]) -> dict[str, float]:
    """Return the seconds per image of every part, in order; the last three make the overlay."""
    description, table, seconds = predictor.runtime.description, predictor.classes, {}
    seconds["decode"], images = seconds_of(read_image, paths[:NUM_MEASURED])
    height, width = images[0].shape[:2]
    size = description.working.of(width, height)
    seconds["resize"], reduced = seconds_of(
        lambda image: description.working.prepare(image, size, resize_in_c), images
    )
    seconds["network"], logits = seconds_of(
        lambda pixels: tiles.predict_tiled(pixels, predictor.runtime.run, description.geometry, 0),
        reduced,
    )
    seconds["label"], labels = seconds_of(
        lambda logits: label_compiled(logits, height, width, label_uncompiled), logits
    )
    seconds["encode"], _ = seconds_of(lambda label: encode_label(label, table), labels)
    pairs = list(zip(images, labels, strict=True))
    seconds["overlay"], drawn = seconds_of(lambda pair: overlay(pair[0], pair[1], table), pairs)
    seconds["legend"], finished = seconds_of(
        lambda k: add_legend(drawn[k], labels[k], table), range(len(pairs))
    )
    seconds["encode overlay"], _ = seconds_of(encode_picture, finished)
    return seconds


def simple_loop(model: segmenter.Segmenter, paths: list[Path], out: Path) -> None:
    out.mkdir()
    for path in paths:
        image = PIL.Image.open(path).convert("RGB")
        small = image.resize(model.working.of(*image.size), PIL.Image.Resampling.BILINEAR)
        pixels = standardize(np.array(small)) if model.working.standardize else np.array(small)
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits = F.interpolate(
                model(x), (image.height, image.width), mode="bilinear", align_corners=False
            )
        label = logits.argmax(1)[0].to(torch.uint8).numpy()
        PIL.Image.fromarray(label).save(out / f"{path.stem}.png")


def timed(job: Callable[[], Any]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def seconds_of_command(*words: str | Path) -> float:
    """Return how long ``useg WORDS`` takes."""
    command = [sys.executable, "-m", "useg", *map(str, words)]
    # An installer compiles the modules. A checkout does at the first command, if this is not set.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    return timed(lambda: subprocess.run(command, check=True, capture_output=True, env=environment))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--jpeg", action="store_true")
    parser.add_argument("--pictures", type=int, default=440)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["USEG_CACHE"] = str(root / "cache")
        kind = collect(root, arguments.pictures, jpeg=arguments.jpeg)
        paths = sorted((root / "in").iterdir())
        began = time.perf_counter()
        ours = arguments.export or arguments.model
        predictor = Predictor.load(ours, "auto")
        loading = time.perf_counter() - began
        model = segmenter.load_model(arguments.model)
        some = paths[: -(-len(paths) // 4)]
        label_all = partial(predict, predictor, [str(root / "in")])
        jobs: dict[str, tuple[Callable[..., object], list[Path]]] = {
            "predict": (partial(label_all, wanted=OutputOptions(overlays=False)), paths),
            "predict with overlays": (partial(label_all, wanted=OutputOptions()), paths),
            "loop": (partial(simple_loop, model, some), some),
        }
        rates: dict[str, list[float]] = {name: [] for name in jobs}
        measured: list[dict[str, float]] = []
        for k in range(arguments.times):
            measured.append(parts(predictor, paths))
            for name, (job, images) in jobs.items():
                seconds = timed(partial(job, out=root / f"{name}{k}"))
                rates[name].append(len(images) / seconds)
        agreement = statistics.mean(
            float(
                (
                    read_mask(root / "predict0" / f"{path.stem}.png")
                    == read_mask(root / "loop0" / f"{path.stem}.png")
                ).mean()
            )
            for path in some[:22]
        )
        whole = seconds_of_command(
            "predict", ours, root / "in", "--out", root / "command", "--no-overlays"
        )
        one = [
            seconds_of_command("predict", ours, paths[0], "--out", root / f"one{k}")
            for k in range(NUM_COMMANDS)
        ]
        helping = [seconds_of_command("--help") for _ in range(NUM_COMMANDS)]
    part_seconds = {
        part: statistics.median(each[part] for each in measured) for part in measured[0]
    }
    bounds = {
        "predict": 1 / sum(list(part_seconds.values())[:NUM_PARTS]),
        "predict with overlays": 1 / sum(part_seconds.values()),
    }
    speed = {name: statistics.median(each) for name, each in rates.items()}
    # The parts and jobs of a round were measured right after each other. On a busy machine their
    # ratio is more reliable than a ratio of medians.
    shares = [
        rate * sum(list(each.values())[:NUM_PARTS])
        for rate, each in zip(rates["predict"], measured, strict=True)
    ]
    times = [rate / loop for rate, loop in zip(rates["predict"], rates["loop"], strict=True)]
    content = {
        "runtime": predictor.runtime.name,
        "network": predictor.runtime.description.network,
        "working_size": str(predictor.runtime.description.working),
        "precision_of_the_file": predictor.runtime.description.precision,
        "pictures": f"{len(paths)} of 800x600, {kind}, {paths[0].suffix[1:]}",
        "threads": torch.get_num_threads(),
        "seconds_per_picture_of_parts": part_seconds,
        "bound": bounds,
        "images_per_second": speed,
        "share_of_bound": statistics.median(shares),
        "times_the_loop": statistics.median(times),
        "agreement_with_the_loop": agreement,
        "seconds_to_load": loading,
        "seconds_of_the_whole_command": whole,
        "seconds_of_one_picture": statistics.median(one),
        "seconds_of_help": statistics.median(helping),
        "rounds": rates,
        "machine": describe_machine(),
    }
    for part, value in part_seconds.items():
        print(f"{part:16} {1000 * value:7.2f} ms")
    print(
        ", ".join(f"{name} {rate:.1f}/s" for name, rate in speed.items())
        + f"; bound {bounds['predict']:.1f}/s"
    )
    print(
        f"{content['share_of_bound']:.0%} of the bound, {content['times_the_loop']:.1f} times as "
        f"fast as the loop, {agreement:.2%} of its labels are equal; {content['runtime']}; one "
        f"picture {content['seconds_of_one_picture']:.2f} s, help {content['seconds_of_help']:.2f}"
    )
    name = f"{predictor.runtime.description.network['encoder']}{paths[0].suffix.replace('.', '_')}"
    print(record(f"predict_{name}{'_export' if arguments.export else ''}", content))


if __name__ == "__main__":
    main()
