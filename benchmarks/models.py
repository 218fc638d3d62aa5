"""Compare the networks: cost, and accuracy after the same training time on the same images.

    taskset -c 0 python benchmarks/models.py train DATA --minutes 3 [--seeds 3] [--only NAME ...]
    python benchmarks/models.py speed
    python benchmarks/models.py table

``train`` trains every model for the same minutes on one thread; seed 0 sets the number of steps,
and the other seeds repeat it. ``speed`` needs a machine that does nothing else. Both add their
results to results/models.json; ``table`` writes docs/models.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, record, train

STEPS = "train.steps"
COURSE = {
    "model.width": 32,
    "model.normalize": "false",
    "model.dropout": 0.3,
    "model.up_kernel": 3,
    "model.extra_conv": "true",
}
PAPER = {"model.width": 64, "model.normalize": "false", "model.dropout": 0.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("plain CNN, coarse logits enlarged", {"model.encoder": "cnn"}),
    "fcn32s": ("FCN-32s", {"model.encoder": "fcn32s"}),
    "fcn8s": ("FCN-8s", {"model.encoder": "fcn8s"}),
    "unet_no_skips": ("U-Net without skip connections", {"model.skips": "false"}),
    "unet": ("useg's plain U-Net (width 16)", {"model.encoder": "plain"}),
    "unet_valid": ("useg's plain U-Net, unpadded", {"model.padding": "valid"}),
    "course": ("U-Net of the course (width 32)", COURSE),
    "paper_same": ("U-Net of the paper (width 64), same padding", PAPER),
    "paper_valid": ("U-Net of the paper (width 64), unpadded", {**PAPER, "model.padding": "valid"}),
    "lite0": (
        "U-Net on EfficientNet-Lite0, pretrained; useg's default for colour images",
        {"model.encoder": "lite0"},
    ),
}
THIN = ("Poles", "RoadLines", "Fences", "TrafficSigns", "Pedestrians")
LARGE = ("None", "Buildings", "Roads", "Sidewalks", "Vegetation")
SIDE = 256


def results() -> dict[str, Any]:
    path = RESULTS / "models.json"
    return json.loads(path.read_text())["models"] if path.exists() else {}


def keep(name: str, part: str, content: Any) -> None:
    models = results()
    models.setdefault(name, {})[part] = content
    record("models", {"models": models})


def train_all(data: Path, minutes: float, seeds: int, names: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for seed in range(seeds):
        for name in names:
            runs = results().get(name, {}).get("runs", [])
            if any(each["seed"] == seed for each in runs):
                continue
            settings = {
                **MODELS[name][1],
                "train.seed": seed,
                **({STEPS: runs[0]["steps"]} if runs else {}),
            }
            ran = train(data, settings, minutes)
            run = {"dataset": data.name, "seed": seed, "minutes": minutes, "threads": 1}
            keep(name, "runs", [*runs, {**run, "settings": settings, **ran}])
            print(
                f"{name}, seed {seed}: mean IoU {ran['mean_iou']:.1%} "
                f"after {ran['epochs']:.1f} epochs",
                flush=True,
            )


def measure(name: str) -> dict[str, Any]:
    """Return geometry, memory and speed of one model at about 256x256 pixels.

    Runs in a process of its own, because it measures the memory of the process.
    """
    from useg.machine import describe_machine, tune

    tune()
    import resource

    import torch

    from useg.classes import CARLA
    from useg.config import Settings, parse_assignments
    from useg.models.describe import describe
    from useg.models.segmenter import Segmenter

    settings = (
        Settings()
        .with_(parse_assignments([f"{key}={value}" for key, value in MODELS[name][1].items()]))
        .model
    )
    width = 16 if settings.width is None else settings.width
    model = Segmenter(
        {**settings.architecture(), "width": width, "channels": 3, "classes": 13},
        CARLA,
        [127.0] * 3,
        [64.0] * 3,
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side = model.valid_size(SIDE)
    described = describe(model, (side, side))
    x = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)

    def megabytes() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    content: dict[str, Any] = {
        "side": side,
        "parameters": described.parameters,
        "macs": described.macs,
        "field": described.field,
    }
    content |= {
        "margin": model.margin,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
    }
    model.eval()
    before = megabytes()
    for precision in (None, torch.bfloat16):
        seconds = []
        with (
            torch.inference_mode(),
            torch.autocast("cpu", precision, enabled=precision is not None),
        ):
            while len(seconds) < 5 or (sum(seconds) < 5 and len(seconds) < 50):
                began = time.perf_counter()
                model(x)
                seconds.append(time.perf_counter() - began)
        content["images_per_second_" + ("bf16" if precision else "fp32")] = 1 / statistics.median(
            seconds[1:]
        )
    content["predict_megabytes"] = megabytes() - before
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x.expand(4, -1, -1, -1)).float().mean().backward()
    content["train_megabytes"] = megabytes() - before
    return content


def speed_all(names: list[str]) -> None:
    for name in names:
        answer = subprocess.run(
            [sys.executable, __file__, "measure", "--only", name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        keep(name, "cost", json.loads(answer.splitlines()[-1]))
        print(name, answer.splitlines()[-1][:150], flush=True)


def table(models: dict[str, Any]) -> str:
    """Return docs/models.md."""
    some = next(iter(models.values()))
    run, cost = some["runs"][0], some["cost"]
    cores = "one core" if cost["threads"] == 1 else f"{cost['threads']} cores"
    rows, thin = [], []
    for name in (name for name in MODELS if name in models):
        cost, runs, title = models[name]["cost"], models[name]["runs"], MODELS[name][0]
        speeds = (f"{cost[f'images_per_second_{each}']:.1f}" for each in ("fp32", "bf16"))
        scores = [run["mean_iou"] for run in runs]
        size = f" (at {cost['side']}x{cost['side']})" if cost["side"] != SIDE else ""
        rows.append(
            f"| {title} | {cost['parameters'] / 1e6:.2f} "
            f"| {cost['macs'] / 1e9:.2f}{size} | {cost['field']} "
            f"| {cost['predict_megabytes']:.0f} / {cost['train_megabytes']:.0f} "
            f"| {' / '.join(speeds)} | {runs[0]['epochs']:.1f} "
            f"| **{statistics.mean(scores):.3f}**"
            + (f" ± {statistics.stdev(scores):.3f} |" if len(scores) > 1 else " |")
        )
        groups: list[tuple[str, ...]] = [*((each,) for each in THIN), THIN, LARGE]
        thin.append(f"| {title} | " + " | ".join(_mean_of(runs, names) for names in groups) + " |")
    return PAGE.format(
        rows="\n".join(rows),
        thin="\n".join(thin),
        thin_names=" | ".join(THIN),
        columns=COLUMNS,
        column_rule="|".join(["---"] * (COLUMNS.count("|") - 1)),
        rule="|".join(["---"] * (len(THIN) + 3)),
        dataset=run["dataset"].upper(),
        minutes=run["minutes"],
        seeds=len(some["runs"]),
        num_images=run["num_images"],
        processor=cost["machine"]["processor"],
        threads=cores,
        torch=cost["machine"]["torch"],
        large=", ".join(LARGE),
    )


def _mean_of(runs: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    values = [
        entry["iou"]
        for run in runs
        for entry in run["classes"]
        if entry["name"] in names and entry["iou"] is not None
    ]
    return f"{statistics.mean(values):.3f}" if values else "-"


COLUMNS = (
    "| model | million parameters | GMACs at 256x256 | receptive field, pixels "
    "| MB to predict / train | images/s fp32 / bf16 | epochs | mean IoU |"
)
PAGE = """# Models compared

Generated by `python benchmarks/models.py table` from `benchmarks/results/models.json`; do not edit.

`useg train` trained every model for the same {minutes:g} minutes on one core, with the same images
of {dataset}. The models are scored at native resolution on the {num_images} held-out images, which
are the end of the street after a gap. Scores are means and standard deviations of {seeds} seeds; a
score without a deviation is from one seed. Seed 0 trained for the given minutes, and the other
seeds repeat its number of steps.

So short a time puts large networks at a disadvantage. The column *epochs* says how often each model
saw the images: a model with less than one epoch has hardly begun to learn.

Parameters, multiply-adds and receptive fields are exact (`useg.describe`). Memory is what one
prediction and one training step of four images add to the process. Images/s is the speed of PyTorch
{torch} on {threads} of {processor}, one image at a time.

{columns}
|{column_rule}|
{rows}

## Thin classes

The columns have the IoU of each thin class, the mean of the thin classes, and the mean of the large
classes ({large}). All values are means over the seeds.

| model | {thin_names} | thin | large |
|{rule}|
{thin}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "speed", "measure", "table"))
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    if arguments.what == "train":
        train_all(arguments.data, arguments.minutes, arguments.seeds, arguments.only)
    elif arguments.what == "speed":
        speed_all(arguments.only)
    elif arguments.what == "measure":
        print(json.dumps(measure(arguments.only[0])))
    else:
        (ROOT / "docs" / "models.md").write_text(table(results()))


if __name__ == "__main__":
    main()
