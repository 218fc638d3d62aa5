"""Compare the forms of a model: accuracy, equal labels, and the speed of the network.

    python benchmarks/exports.py MODEL DATA [--rounds 3]

The forms are the model in PyTorch, and its exports for OpenVINO in fp32, in bf16 and in 8 bits. The
8 bits are calibrated on the data's training images; accuracy is that on its held-out images, at
their own size. Run it on a machine that does nothing else. In each round useg computes the network
alone, in the threads of ``useg predict``. Then OpenVINO's ``benchmark_app`` computes the same file
in the same precision, tuned for throughput.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from useg.machine import describe_machine, tune

tune()

import numpy as np
import torch
from numpy.typing import NDArray
from record import record
from serving import rate

from useg.data.dataset import Dataset, read_sample
from useg.inference.predictor import Predictor, load
from useg.inference.runtimes import Runtime, make_probe, probe_size
from useg.reporting.report import open_evaluation_data
from useg.scoring.metrics import confusion, score
from useg.serving.export import export

BENCHMARK_SECONDS = 4


def predict_held_out(
    predictor: Predictor, dataset: Dataset
) -> tuple[float, list[NDArray[np.uint8]]]:
    """Return the mean IoU on the held-out images, and their label maps."""
    names = predictor.classes.names
    samples = [read_sample(pair, dataset) for pair in dataset.of("val")]
    labels = [predictor(sample.image) for sample in samples]
    counts = [
        confusion(label, sample.label, len(names))
        for label, sample in zip(labels, samples, strict=True)
    ]
    return score(np.sum(counts, axis=0), names, len(counts)).mean_iou, labels


def images_per_second(runtime: Runtime) -> float:
    """Return the speed of the network alone, as ``useg predict`` computes it."""
    x = make_probe(runtime.description, probe_size(runtime.description))
    return rate(runtime.run, [x] * 8, BENCHMARK_SECONDS)


def images_per_second_of_openvino(path: Path, runtime: Runtime) -> float:
    """Return the speed that ``benchmark_app`` measures for an exported file."""
    width, height = probe_size(runtime.description)
    precision = "bf16" if runtime.name.endswith("bf16") else "f32"
    command = [
        "benchmark_app",
        *("-m", str(path), "-d", "CPU", "-hint", "throughput", "-t", str(BENCHMARK_SECONDS)),
        *("-shape", f"[1,{runtime.description.channels},{height},{width}]"),
        *("-infer_precision", precision),
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Throughput: +([0-9.]+) FPS", printed)
    assert found, printed
    return float(found[1])


def measure(
    path: Path, name: str, dataset: Dataset, expected: list[NDArray[np.uint8]], count: int
) -> dict[str, Any]:
    """Return the accuracy of a form, and the medians of its speeds over the rounds."""
    predictor = load(path, name)
    mean_iou, labels = predict_held_out(predictor, dataset)
    row = {
        "runtime": name,
        "mean_iou": mean_iou,
        "equal_labels": fmean((a == b).mean() for a, b in zip(labels, expected, strict=True)),
    }
    rounds = []
    for _ in range(count):
        rounds.append({"useg": images_per_second(predictor.runtime)})
        if path.suffix == ".xml":
            speed = images_per_second_of_openvino(path, predictor.runtime)
            rounds[-1] |= {"benchmark_app": speed, "share": rounds[-1]["useg"] / speed}
    medians = {key: median(each[key] for each in rounds) for key in rounds[0]}
    return {**row, "images_per_second": medians, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    original = load(arguments.model)
    description = original.runtime.description
    dataset = open_evaluation_data(original, arguments.data)
    expected = predict_held_out(original, dataset)[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain, small = (Path(folder) / name for name in ("plain.xml", "small.xml"))
        export(arguments.model, plain)
        quantized = export(arguments.model, small, arguments.data).int8
        assert quantized
        for path, name, precision in (
            (arguments.model, "torch", "fp32"),
            (arguments.model, "torch-bf16", "bf16"),
            (plain, "openvino", "fp32"),
            (plain, "openvino-bf16", "bf16"),
            (small, "openvino-bf16", "int8"),
        ):
            row = measure(path, name, dataset, expected, arguments.rounds)
            rows.append({"precision": precision, **row})
            print({key: value for key, value in rows[-1].items() if key != "rounds"}, flush=True)
    content = {
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "network": description.network,
        "size": probe_size(description),
        "num_images": len(expected),
        "int8": asdict(quantized),
        "forms": rows,
    }
    print(record(f"exports_{description.network['encoder']}", content))


if __name__ == "__main__":
    main()
