"""Measure memory and time for images larger than memory: 16,384 and 32,768 pixels a side.

    OMP_NUM_THREADS=1 python benchmarks/scans.py [--sides 16384 32768] [--runtime torch]
        [--folder DIR]

The images are tiled, deflated BigTIFFs of synthetic street scenes, shifted from tile to tile; the
larger one takes about 1 GB of disk. Each is labelled in a process of its own by a small untrained
U-Net (width 4, depth 2), because the benchmark measures everything around the network.
``memory_mb`` is the peak above the memory of the process once it has loaded the model and labelled
a small image. ``equal_to_a_crop`` is the share of labels that equal those of one pass over a crop
from the centre.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from record import record

from useg.classes import CARLA
from useg.images.large_tiff import open_raster
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.inference.scans import predict_scan
from useg.machine import describe_machine
from useg.models.segmenter import Segmenter, describe_model
from useg.scenes.scene import make_scene

TILE, CROP = 512, 1024
# As useg.machine.tune sets it.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
SETTINGS = {
    "encoder": "plain",
    "channels": 3,
    "classes": 13,
    "width": 4,
    "depth": 2,
    "padding": "same",
    "normalize": False,
}


def write_picture(path: Path, side: int) -> None:
    scene = make_scene(0, (TILE, TILE)).image
    shifted = (np.roll(scene, (37 * k, 101 * k), (0, 1)) for k in range((side // TILE) ** 2))
    options: dict[str, Any] = {
        "compression": "deflate",
        "compressionargs": {"level": 1},
        "maxworkers": 1,
        "photometric": "rgb",
        "bigtiff": True,
    }
    tifffile.imwrite(
        path, shifted, shape=(side, side, 3), dtype=np.uint8, tile=(TILE, TILE), **options
    )


def model(runtime: str) -> Predictor:
    torch.manual_seed(0)
    made = (
        Segmenter(SETTINGS, CARLA, [110.0] * 3, [60.0] * 3)
        .eval()
        .to(memory_format=torch.channels_last)
    )  # type: ignore[call-overload]
    return Predictor(
        runtimes.start_runtime(
            runtimes.StoredModel(describe_model(made), Path("memory"), made), runtime
        )
    )


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: Path, runtime: str) -> dict[str, Any]:
    """Label one image; run this in a process of its own."""
    predictor, target = model(runtime), path.with_name("labels.tif")
    small = path.with_name("small.tif")
    write_picture(small, TILE)
    predict_scan(predictor, small, target)
    before, began, worked = peak_mb(), time.perf_counter(), time.process_time()
    predict_scan(predictor, path, target)
    seconds, processor, peak = time.perf_counter() - began, time.process_time() - worked, peak_mb()
    with open_raster(path, 3) as picture, open_raster(target, 3) as labels:
        edge = (picture.shape[0] - CROP) // 2 // 64 * 64
        around, inside = slice(edge - 64, edge + CROP + 64), slice(edge, edge + CROP)
        label = predictor(picture[around, around], tile=0)[64:-64, 64:-64]
        equal = float((np.array(CARLA.colors)[label] == labels[inside, inside]).all(2).mean())
        side = picture.shape[0]
    return {
        "side": side,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "megapixels_per_second": round(side**2 / seconds / 1e6, 2),
        "memory_mb": round(peak - before, 1),
        "peak_mb": round(peak, 1),
        "label_map_mb": round(target.stat().st_size / 1e6, 1),
        "equal_to_a_crop": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--folder", default=None, help="folder for the temporary images")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.runtime)))
        return
    rows = []
    for side in arguments.sides:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "picture.tif"
            write_picture(path, side)
            command = [
                sys.executable,
                __file__,
                "--measure",
                str(path),
                "--runtime",
                arguments.runtime,
            ]
            rows.append(
                json.loads(
                    subprocess.run(
                        command,
                        env={**os.environ, **ALLOCATOR},
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                    ).stdout
                )
            )
            print(rows[-1], flush=True)
    ratios = {
        key: round(rows[-1][key] / rows[0][key], 3)
        for key in ("peak_mb", "processor_seconds", "seconds")
    }
    content = {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "runtime": arguments.runtime,
        "network": SETTINGS,
    }
    print(record("scans", {**content, "scans": rows, "last_to_first": ratios}))


if __name__ == "__main__":
    main()
