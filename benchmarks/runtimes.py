"""Measure the speed of every runtime as share of the machine's peak: the network alone, two sizes.

    taskset -c 0 python benchmarks/runtimes.py [--only M1] [--rounds 3]

The network is the course's U-Net at 128x96 (M1) and 512x512 (M3), with random weights, because
speed does not depend on them. Run it on a machine that does nothing else. Every round measures the
peak and then each runtime; the result is the median of the rounds. ``openvino-bf16`` in int8 is the
graph with every layer quantised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import torch
from record import record

from useg.classes import ClassTable
from useg.inference import exported, runtimes
from useg.inference.runtimes import make_probe
from useg.machine import describe_machine
from useg.models.description import description_to_json
from useg.models.geometry import WorkingSize
from useg.models.segmenter import Segmenter, save_model

COURSE = {
    "encoder": "plain",
    "width": 32,
    "depth": 4,
    "padding": "same",
    "normalize": False,
    "up_kernel": 3,
    "extra_conv": True,
}
SIZES = {"M1": (128, 96), "M3": (512, 512)}


def models(folder: Path, size: tuple[int, int]) -> list[Path]:
    """Write the model, and its 8-bit form with every layer quantised."""
    torch.manual_seed(0)
    classes = ClassTable(tuple(f"class {k}" for k in range(23)))
    save_model(
        Segmenter(
            {**COURSE, "channels": 3, "classes": 23},
            classes,
            [110.0] * 3,
            [60.0] * 3,
            WorkingSize(size),
        ),
        folder / "model.safetensors",
    )
    stored = runtimes.read_model(folder / "model.safetensors")
    windows = list(make_probe(stored.description, size, 4)[:, None])
    quantized = nncf.quantize(
        stored.as_openvino,
        nncf.Dataset(windows),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(windows),
    )
    exported.write_openvino(
        folder / "model.xml",
        quantized,
        description_to_json(replace(stored.description, precision="int8")),
    )
    return [folder / "model.safetensors", folder / "model.xml"]


def measured(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "useg",
        "bench",
        str(path),
        "--size",
        f"{size[0]}x{size[1]}",
        "--json",
        "-",
        "--quiet",
    ]
    content: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return content


def measure(size: tuple[int, int], count: int) -> dict[str, Any]:
    """Return the median of every figure over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        paths = models(Path(folder), size)
        rounds = [[measured(path, size) for path in paths] for _ in range(count)]
    first, rows = rounds[0][0], []
    for k, each in enumerate(rounds[0]):
        for row, entry in enumerate(each["runtimes"]):
            numbers = [one[k]["runtimes"][row] for one in rounds]
            rows.append(
                {
                    key: value
                    if isinstance(value, str)
                    else statistics.median(number[key] for number in numbers)
                    for key, value in entry.items()
                }
            )
    peaks = {
        precision: statistics.median(each["peaks"][precision] for one in rounds for each in one)
        for precision in first["peaks"]
    }
    return {
        "size": size,
        "macs": first["macs"],
        "batch": first["batch"],
        "rounds": count,
        "peaks": peaks,
        "runtimes": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    content: dict[str, Any] = {"machine": describe_machine(), "threads": torch.get_num_threads()}
    for name in arguments.only:
        content[name] = measure(SIZES[name], arguments.rounds)
        for entry in content[name]["runtimes"]:
            print(
                f"{name} {entry['name']:14} {entry['precision']} "
                f"{entry['images_per_second']:8.2f} images/s {entry['share_of_peak']:.0%}",
                flush=True,
            )
    print(record(f"runtimes_{torch.get_num_threads()}threads", content))


if __name__ == "__main__":
    main()
