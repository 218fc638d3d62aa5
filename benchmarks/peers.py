"""Compare the training speed of useg with Keras, plain PyTorch and segmentation_models.pytorch.

    python benchmarks/peers.py [--tensorflow PYTHON] [--smp PYTHON]
        [--only M1 M2 resnet34 lite0] [--seconds 30] [--rounds 3]

Run it on a machine that does nothing else. PYTHON is the interpreter of an environment with the
package; without it the package is left out, and the result says why. In every round each package
takes a turn in a process of its own, and the machine's peak is measured before and after. A ratio
is the median over the rounds.

The peers train the same layers, checked by the number of parameters, on images decoded in memory.
`useg train` runs as users run it, from the command line: its images per second are wall time from
step to step, including cropping and augmentation, the log, terminal output and checkpoints.

New rounds are added to the stored ones, each with its commit, because a shared machine is never the
same twice. Remove the file to start again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from useg.machine import describe_machine, tune

# The peers run in the environment as it was before useg tuned it.
AS_SHIPPED = dict(os.environ)
tune()

import torch
from models import PAPER
from recipes import RECIPES
from record import RESULTS, ROOT, commit, record

from useg.config import read_settings
from useg.inference.bench import measure_peaks
from useg.models import segmenter
from useg.models.describe import describe

HERE = Path(__file__).parent
# Steps of useg that do not count.
WARMUP_STEPS = 2
CARLA = {
    "folder": "carla",
    "images": "CameraRGB",
    "masks": "CameraSeg",
    "channels": 3,
    "classes": 13,
    "divide": 1,
}
ISBI = {
    "folder": "isbi2012",
    "images": "image",
    "masks": "label",
    "channels": 1,
    "classes": 2,
    "divide": 255,
}
PLAIN, KERAS, KERAS_BF16, SMP = (
    "PyTorch as people write it",
    "Keras",
    "Keras mixed_bfloat16",
    "segmentation_models.pytorch",
)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        title: a heading for people.
        data: the folders of the images and masks, and what they contain.
        size: (width, height) of the network's input, of which each side loses ``margin`` pixels.
        settings: settings of useg train.
        network: the same network, described for the peers' scripts.
        pictures: number of images in an epoch of the peers.
        peers: the packages to compare with.
        bars: peer or ``peak`` -> the lowest ratio that useg should reach.
    """

    title: str
    data: dict[str, Any]
    size: tuple[int, int]
    batch: int
    settings: dict[str, Any]
    network: dict[str, Any]
    pictures: int
    peers: tuple[str, ...]
    margin: int = 0
    bars: dict[str, float] = field(default_factory=dict)


def pretrained_shape(size: tuple[int, int], encoder: str) -> dict[str, Any]:
    return {
        "data.size": f"{size[0]}x{size[1]}",
        "model.encoder": encoder,
        "model.pretrained": "false",
    }


CASES = {
    "M1": Case(
        "U-Net of the course, width 32, 128x96, batch 32",
        CARLA,
        size=(128, 96),
        batch=32,
        settings={**RECIPES["course"], "train.augment": "true"},
        network={"width": 32, "same": True, "up_kernel": 3, "extra_conv": True, "dropout": 0.3},
        pictures=160,
        peers=(PLAIN, KERAS, KERAS_BF16),
        bars={PLAIN: 3.0, KERAS: 1.8, KERAS_BF16: 1.1, "peak": 0.75},
    ),
    "M2": Case(
        "U-Net of the paper, width 64, unpadded, 572x572, batch 1",
        ISBI,
        size=(572, 572),
        batch=1,
        settings={
            **PAPER,
            "model.encoder": "plain",
            "model.padding": "valid",
            "data.crop": "388x388",
            "train.batch": 1,
            "train.loss": "ce",
            "train.learning_rate": 1e-4,
        },
        network={"width": 64, "same": False, "up_kernel": 2, "extra_conv": False, "dropout": 0.5},
        pictures=4,
        peers=(PLAIN, KERAS, KERAS_BF16),
        margin=92,
        bars={"peak": 0.70},
    ),
    "resnet34": Case(
        "U-Nets on ResNet-34, each package's own, 256x192, batch 8",
        CARLA,
        size=(256, 192),
        batch=8,
        settings={**pretrained_shape((256, 192), "resnet34"), "train.batch": 8},
        network={"encoder": "resnet34"},
        pictures=64,
        peers=(SMP,),
    ),
    "lite0": Case(
        "U-Nets on EfficientNet-Lite0, each package's own, 512x512, batch 4",
        CARLA,
        size=(512, 512),
        batch=4,
        settings={**pretrained_shape((512, 512), "lite0"), "train.batch": 4},
        network={"encoder": "timm-tf_efficientnet_lite0"},
        pictures=64,
        peers=(SMP,),
    ),
}


def rates(ends: list[tuple[float, int]]) -> dict[str, float]:
    """Return images per second in wall time and of the median step, and the number of steps.

    Args:
        ends: when each step ended, in seconds, and how many images it had.
    """
    assert len(ends) > 2, "too few steps; give more --seconds"
    steps = [(images, end - before) for (before, _), (end, images) in itertools.pairwise(ends)]
    whole = sum(images for images, _ in steps) / (ends[-1][0] - ends[0][0])
    return {
        "images_per_second": whole,
        "by_step": statistics.median(images / seconds for images, seconds in steps),
        "steps": len(steps),
    }


def train_by_useg(case: Case, data: Path, seconds: float) -> dict[str, Any]:
    """Train by the command line until the time is up, then interrupt it as a user does."""
    with tempfile.TemporaryDirectory() as temporary:
        out, settings = (
            Path(temporary) / "run",
            {**case.settings, "train.steps": 10**6, "train.validate_every": 10**6},
        )
        command = [
            sys.executable,
            "-m",
            "useg",
            "train",
            str(data / case.data["folder"]),
            "--out",
            str(out),
        ]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as running:
            while not (out / "log.jsonl").exists():
                assert running.poll() is None, (
                    f"{' '.join(command)} ended with {running.returncode}"
                )
                time.sleep(0.1)
            time.sleep(1.25 * seconds)
            running.send_signal(signal.SIGTERM)
        ends = [
            (row["seconds"], case.batch)
            for row in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        ]
        described, precision = (
            describe(segmenter.load_model(out), case.size),
            read_settings(out / "run.toml").train.precision,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        **rates(ends[WARMUP_STEPS - 1 :]),
        "precision": precision,
        "parameters": described.parameters,
        "macs": described.macs,
        "device": device,
    }


def train_by_peer(name: str, python: str, case: Case, data: Path, seconds: float) -> dict[str, Any]:
    """Train by the peer's own script."""
    content, precision = dict(case.data), "bf16" if name == KERAS_BF16 else "fp32"
    folder = data / content.pop("folder")
    content |= {part: str(folder / content[part]) for part in ("images", "masks")}
    content |= {
        "size": case.size,
        "margin": case.margin,
        "batch": case.batch,
        "network": case.network,
        "pictures": case.pictures,
    }
    script = HERE / ("peers_keras.py" if name in (KERAS, KERAS_BF16) else "peers_torch.py")
    command = [
        python,
        str(script),
        json.dumps({**content, "precision": precision, "seconds": seconds}),
    ]
    ran = subprocess.run(command, capture_output=True, env=AS_SHIPPED, text=True)
    assert ran.returncode == 0, f"{name} failed: {ran.stderr}"
    answer = json.loads(ran.stdout.splitlines()[-1])
    return {**rates(answer.pop("ends")), "precision": precision, **answer}


def one_round(
    case: Case, data: Path, seconds: float, pythons: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Let every package train once, and relate it to the processor's peak before and after."""
    rows: dict[str, dict[str, Any]] = {}
    peaks = measure_peaks()
    for name in ("useg", *(peer for peer in case.peers if peer in pythons)):
        row = (
            train_by_useg(case, data, seconds)
            if name == "useg"
            else train_by_peer(name, pythons[name], case, data, seconds)
        )
        before, peaks = peaks, measure_peaks()
        peak = max(each[row["precision"]] for each in (before, peaks))
        same_layers = "encoder" not in case.network
        assert not same_layers or row["parameters"] == rows.get("useg", row)["parameters"], (
            f"{name} trains another network"
        )
        row.setdefault("macs", rows.get("useg", row).get("macs"))
        share = (
            3 * 2 * row["macs"] * row["images_per_second"] / peak
            if row["device"] == "cpu"
            else None
        )
        rows[name] = {**row, "peak": peak, "share_of_peak": share}
        print(
            f"  {name:30} {row['precision']} {row['images_per_second']:7.2f} images/s, "
            f"by step {row['by_step']:7.2f}",
            flush=True,
        )
    return rows


def median_or_first(values: list[Any]) -> Any:
    """Return the median of floats; of anything else, which is the same each time, the first."""
    return statistics.median(values) if isinstance(values[0], float) else values[0]


def summarise(case: Case, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the medians, and how useg compares: in wall time, and by the median step.

    The median step leaves out pauses between steps and epochs.
    """
    rows = [
        {
            "name": name,
            **{key: median_or_first([each[name][key] for each in rounds]) for key in row},
        }
        for name, row in rounds[0].items()
    ]
    ratios = []
    for name in (row["name"] for row in rows[1:]):
        for key in ("images_per_second", "by_step"):
            value = statistics.median(each["useg"][key] / each[name][key] for each in rounds)
            bar = (
                case.bars.get(name)
                if key == ("images_per_second" if name == PLAIN else "by_step")
                else None
            )
            ratios.append({"of": name, "measured": key, "value": value, "bar": bar})
    if rows[0]["share_of_peak"] is not None:
        ratios.append(
            {
                "of": "peak",
                "measured": "images_per_second",
                "value": rows[0]["share_of_peak"],
                "bar": case.bars.get("peak"),
            }
        )
    return {
        "title": case.title,
        "size": case.size,
        "batch": case.batch,
        "settings": case.settings,
        "rows": rows,
        "ratios": ratios,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="folder with carla and isbi2012",
    )
    parser.add_argument("--tensorflow", help="a Python with TensorFlow and Keras")
    parser.add_argument("--smp", help="a Python with segmentation_models_pytorch")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    given = {
        PLAIN: sys.executable,
        KERAS: arguments.tensorflow,
        KERAS_BF16: arguments.tensorflow,
        SMP: arguments.smp,
    }
    pythons = {name: python for name, python in given.items() if python}
    for key in arguments.only:
        case, path = CASES[key], RESULTS / f"peers_{key}.json"
        print(case.title, flush=True)
        stored = json.loads(path.read_text()) if path.exists() else {"rounds": [], "commits": []}
        if stored["rounds"] and stored["rounds"][0].keys() != (
            there := {"useg", *(name for name in case.peers if name in pythons)}
        ):
            parser.error(
                f"{path} has rounds of {', '.join(stored['rounds'][0])}, but this one would be of "
                f"{', '.join(sorted(there))}; remove the file first"
            )
        new = [
            one_round(case, arguments.data, arguments.seconds, pythons)
            for _ in range(arguments.rounds)
        ]
        commits = [*stored["commits"], *[commit()] * arguments.rounds]
        rounds = [*stored["rounds"], *new]
        content = {
            "machine": describe_machine(),
            "threads": torch.get_num_threads(),
            "commits": commits,
            **summarise(case, rounds),
        }
        content["left_out"] = {
            name: "its Python was not given" for name in case.peers if name not in pythons
        }
        for ratio in content["ratios"]:
            goal = f" (goal: at least {ratio['bar']})" if ratio["bar"] else ""
            print(f"  {ratio['value']:.3f} times {ratio['of']}, {ratio['measured']}{goal}")
        print(record(f"peers_{key}", content))


if __name__ == "__main__":
    main()
