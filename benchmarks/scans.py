"""Measure memory and time for images larger than memory: 16,384 and 32,768 pixels a side.

    OMP_NUM_THREADS=1 python benchmarks/scans.py [--sides 16384 32768] [--runtime torch]
        [--folder DIR] [--objects]

The images are tiled, deflated BigTIFFs of synthetic street scenes, shifted from tile to tile; the
larger one takes about 1 GB of disk. Each is labelled in a process of its own by a small untrained
U-Net (width 4, depth 2), because the benchmark measures everything around the network.
``memory_mb`` is the peak above the memory of the process once it has loaded the model and labelled
a small image. ``equal_to_a_crop`` is the share of labels that equal those of one pass over a crop
from the centre.

``--objects`` finds the objects of images of 2,500 and 20,000 pixels a side, the larger one with
200,000 discs, of which every fifth touches the next one. A function takes the place of the network:
the pixels are the depths. So what is measured is how the objects are found, kept apart and written.
The discs are larger than the training objects of that model, so that it computes two scales. The
result is ``scan_objects.json``.
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

from useg.classes import CARLA, ClassTable
from useg.images.large_tiff import open_raster
from useg.inference import runtimes
from useg.inference.large_images import predict_large_image
from useg.inference.predictor import Predictor
from useg.machine import describe_machine
from useg.models.segmenter import Segmenter, describe_model
from useg.objects.table import map_path, read_object_rows, table_path
from useg.scenes.generate import make_scene

TILE, CROP = 512, 1024
OBJECT_SIDES = (2500, 20000)
# Side of a typical training object of the model, in pixels. The discs have 32, so that the image is
# computed at a second scale, too.
TRAINED_SIDE = 22.0
# Distance of neighbouring discs, and their radius, in pixels; 447 x 447 discs on 20,000 pixels.
PITCH, RADIUS = 44.7, 18
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


def write_discs(path: Path, side: int) -> int:
    """Write discs whose pixels are their depths; every fifth touches its right neighbour."""
    per_side = round(side / PITCH)
    y, x = np.indices((2 * RADIUS + 1,) * 2) - RADIUS
    disc = np.clip(250 * (1 - np.hypot(y, x) / (RADIUS + 1)), 0, 250).astype(np.uint8)
    pixels = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.uint8, (side, side))
    for row, column in np.ndindex(per_side, per_side):
        # Touching discs of 37 pixels have their centres 36 pixels apart.
        shift = int(PITCH) - 36 if (row * per_side + column) % 5 == 0 else 0
        shift = 0 if column == per_side - 1 else shift
        top, left = int(row * PITCH), int(column * PITCH) + shift
        place = pixels[top : top + len(disc), left : left + len(disc)]
        np.maximum(place, disc[: place.shape[0], : place.shape[1]], out=place)
    tifffile.imwrite(path, pixels, tile=(TILE, TILE), compression="deflate", bigtiff=True)
    del pixels
    path.with_suffix(".npy").unlink()
    return per_side**2


def depth_reader() -> Predictor:
    """A predictor of objects whose network is a function: pixels are depths, of 250 at most."""
    settings = {**SETTINGS, "channels": 1, "classes": 2, "objects": True}
    table = ClassTable(("background", "disc"), objects=(1,))
    provenance = {"object_side": TRAINED_SIDE}
    description = describe_model(Segmenter(settings, table, [0.0], [1.0], provenance=provenance))

    def run(x: np.ndarray) -> np.ndarray:
        depth = np.clip(x[:, 0].astype(np.float32) / 255, 1e-3, None)
        inside = np.where(depth > 1e-3, np.float32(4), np.float32(-4))
        return np.stack([-inside, inside, np.log(depth / (1 - depth))], axis=1)

    return Predictor(runtimes.Runtime(run, description, "a function", Path("memory")))


def measure_objects(path: Path) -> dict[str, Any]:
    """Find the objects of one image; run this in a process of its own."""
    map_path(path.parent, path.stem).parent.mkdir()
    before, began, worked = peak_mb(), time.perf_counter(), time.process_time()
    predict_large_image(depth_reader(), path, path.with_name("labels.tif"), objects_out=path.parent)
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    count = sum(1 for _ in read_object_rows(table_path(path.parent, path.stem)))
    return {
        "found": count,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "memory_mb": round(peak_mb() - before, 1),
        "peak_mb": round(peak_mb(), 1),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: Path, runtime: str) -> dict[str, Any]:
    """Label one image; run this in a process of its own."""
    predictor, target = model(runtime), path.with_name("labels.tif")
    small = path.with_name("small.tif")
    write_picture(small, TILE)
    predict_large_image(predictor, small, target)
    before, began, worked = peak_mb(), time.perf_counter(), time.process_time()
    predict_large_image(predictor, path, target)
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


def in_own_process(path: Path, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(path), *options]
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+")
    parser.add_argument("--runtime", default="torch")
    parser.add_argument("--folder", default=None, help="folder for the temporary images")
    parser.add_argument("--objects", action="store_true", help="find objects")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        path = Path(given.measure)
        found = measure_objects(path) if given.objects else measure(path, given.runtime)
        print(json.dumps(found))
        return
    rows = []
    for side in given.sides or (OBJECT_SIDES if given.objects else (16384, 32768)):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            path = Path(folder) / "picture.tif"
            row = {"side": side, "objects": write_discs(path, side)} if given.objects else {}
            if not given.objects:
                write_picture(path, side)
            options = ["--objects"] if given.objects else ["--runtime", given.runtime]
            rows.append({**row, **in_own_process(path, options)})
            print(rows[-1], flush=True)
    ratios = {
        key: round(rows[-1][key] / rows[0][key], 3)
        for key in ("peak_mb", "processor_seconds", "seconds")
    }
    content = {"machine": describe_machine(), "threads": torch.get_num_threads()}
    if not given.objects:
        content |= {"runtime": given.runtime, "network": SETTINGS}
    name = "scan_objects" if given.objects else "scans"
    print(record(name, {**content, "scans": rows, "last_to_first": ratios}))


if __name__ == "__main__":
    main()
