"""Compare prediction in windows with one pass, and find the margin that a pretrained U-Net needs.

    OMP_NUM_THREADS=1 python benchmarks/tiles.py MODEL=PICTURES... [--deep MODEL=PICTURES]
        [--pictures 4]

MODEL is a run folder, PICTURES a folder of images that suit it; both fp32 and bf16 are measured.
``equal`` is the share of labels on which windows and one pass agree, ``difference`` the largest
between their logits, whose standard deviation is stored too. For the model of ``--deep``, blocks of
128 pixels are compared with growing margins: the worst case, because all of their pixels are near
an edge. The margin that predict_large_image would choose is stored beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import record

from useg.images.image_files import read_image
from useg.inference import runtimes, tiles
from useg.inference.predict_files import find_images
from useg.inference.runtimes import bytes_per_pixel
from useg.inference.tiles import find_sufficient_overlap, measure_overlaps
from useg.machine import describe_machine

CONTEXTS = [0, 32, 64, 96, 128, 160, 192, 256, 320]


def read_images(folder: str, count: int) -> list[NDArray[Any]]:
    """Read some images, spread over the folder, at their native size.

    That gives more windows than the model's working size would.
    """
    paths = find_images([folder])
    return [read_image(path) for path in paths[:: max(1, len(paths) // count)][:count]]


def compare_windows(model: Path, folder: str, count: int) -> dict[str, Any]:
    exact = runtimes.load_runtime(model, "torch")
    geometry = exact.description.geometry
    images = read_images(folder, count)
    smallest = tiles.window_size(1, geometry)
    result: dict[str, Any] = {
        "size": images[0].shape[1::-1],
        "pictures": len(images),
        "windows": {},
    }
    whole = {
        name: [
            tiles.predict_tiled(image, runtimes.load_runtime(model, name).run, geometry, 0)
            for image in images
        ]
        for name in ("torch", "torch-bf16")
    }
    result["spread_of_logits"] = float(np.std(whole["torch"][0]))
    result["bytes_per_pixel_estimated"] = bytes_per_pixel(exact.description)
    for tile in (smallest + 2 * geometry.stride, smallest + 8 * geometry.stride):
        row: dict[str, Any] = {}
        for name, answers in whole.items():
            tiled = [
                tiles.predict_tiled(image, runtimes.load_runtime(model, name).run, geometry, tile)
                for image in images
            ]
            pairs = list(zip(tiled, answers, strict=True))
            row[name] = {
                "equal": float(np.mean([one.argmax(0) == other.argmax(0) for one, other in pairs])),
                "unequal_pixels": int(
                    sum((one.argmax(0) != other.argmax(0)).sum() for one, other in pairs)
                ),
                "difference": float(max(np.abs(one - other).max() for one, other in pairs)),
            }
        row["windows_per_picture"] = len(tiles.tile_windows(images[0], geometry, tile))
        result["windows"][str(tiles.window_size(tile, geometry))] = row
    return result


def measure_margins(model: Path, folder: str, count: int) -> dict[str, Any]:
    runtime = runtimes.load_runtime(model, "torch")
    images = read_images(folder, count)
    curves = [
        [
            vars(margin)
            for margin in measure_overlaps(
                runtime.run, image, runtime.description.geometry, CONTEXTS
            )
        ]
        for image in images
    ]
    chosen = vars(find_sufficient_overlap(runtime.run, images[0], runtime.description.geometry))
    return {
        "size": images[0].shape[1::-1],
        "exact_context": runtime.description.context,
        "curves": curves,
        "sufficient_for_0.999": chosen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", metavar="MODEL=PICTURES")
    parser.add_argument("--deep", metavar="MODEL=PICTURES")
    parser.add_argument("--pictures", type=int, default=4)
    arguments = parser.parse_args()
    content: dict[str, Any] = {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "tiled_against_whole": {},
    }
    for pair in arguments.pairs:
        model, _, folder = pair.partition("=")
        content["tiled_against_whole"][Path(model).name] = compare_windows(
            Path(model), folder, arguments.pictures
        )
        print(Path(model).name, content["tiled_against_whole"][Path(model).name], flush=True)
    if arguments.deep:
        model, _, folder = arguments.deep.partition("=")
        content["margins"] = {Path(model).name: measure_margins(Path(model), folder, 2)}
        print(content["margins"], flush=True)
    print(record("tiles", content))


if __name__ == "__main__":
    main()
