"""The networks, made images and clocks of the check of a GPU (gpu.py)."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from useg.machine import tune

tune()
# Must be set before CUDA starts; deterministic runs need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


import torch
from PIL import Image

from useg.classes import ClassTable
from useg.config import Settings
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.models import encoders
from useg.models.pretrained import load_pretrained
from useg.models.segmenter import Segmenter

NO_GPU = "not run: no GPU"
COURSE = {
    "model.encoder": "plain",
    "model.width": 32,
    "model.normalize": False,
    "model.dropout": 0.3,
    "model.up_kernel": 3,
    "model.extra_conv": True,
    "train.loss": "ce",
    "train.class_weights": "none",
    "train.learning_rate": 1e-3,
}
PAPER = {
    "model.encoder": "plain",
    "model.padding": "valid",
    "model.width": 64,
    "model.normalize": False,
    "model.dropout": 0.5,
    "train.learning_rate": 1e-4,
}
# (width, height) and number of the images of the timed run, on a GPU and in a simulation.
PLAN_DATA = ((800, 600), 120), ((64, 48), 8)


@dataclass(frozen=True)
class Case:
    """A network, its input and its batch.

    Args:
        size: (width, height) of the images of the data set.
        crop: (width, height) of the output of a training crop.
        batch: Crops per step.
        settings: Further settings.
        grey: Whether the images have one band.
    """

    size: tuple[int, int]
    crop: tuple[int, int]
    batch: int
    settings: dict[str, Any]
    grey: bool = False


CASES = {
    "lite0 256x192, batch 4": Case((256, 192), (256, 192), 4, {"model.encoder": "lite0"}),
    "lite0 512x512, batch 8": Case((512, 512), (512, 512), 8, {"model.encoder": "lite0"}),
    "M1: course U-Net 128x96, batch 32": Case((128, 96), (128, 96), 32, COURSE),
    "M2: paper U-Net 572x572 to 388x388, batch 4": Case((512, 512), (388, 388), 4, PAPER, True),
}
TINY_CASES = {
    "tiny plain U-Net": Case((48, 32), (48, 32), 2, {**COURSE, "model.width": 2, "model.depth": 2}),
}


@dataclass(frozen=True)
class Options:
    """What the parts need.

    Args:
        simulate: Whether to run tiny forms on the CPU.
        folder: For data and runs.
        minutes: Length of the timed run.
        seed: Of all randomness.
        case_names: Beginnings of the names of the networks to measure; none for all.
    """

    simulate: bool
    folder: Path
    minutes: float
    seed: int
    case_names: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.simulate else "cuda")

    @property
    def cases(self) -> dict[str, Case]:
        cases = TINY_CASES if self.simulate else CASES
        wanted = self.case_names or ("",)
        return {name: case for name, case in cases.items() if name.startswith(wanted)}

    def choose(self, full: Any, tiny: Any) -> Any:
        """Return the first value on a GPU, the second in a simulation."""
        return tiny if self.simulate else full


def check(what: str, passed: bool, **values: Any) -> dict[str, Any]:
    """Return a check for the list ``checks`` of a part."""
    return {"what": what, "passed": bool(passed), **values}


# Data.


def make_data(options: Options, size: tuple[int, int], count: int, grey: bool = False) -> Path:
    """Write a data set of made scenes, all cores at once; return its folder."""
    folder = options.folder / f"scenes_{size[0]}x{size[1]}{'_grey' if grey else ''}"
    if folder.exists():
        return folder
    # Before CUDA starts in this process: it does not survive a fork.
    draft = Path(tempfile.mkdtemp(dir=options.folder))
    for name in ("images", "masks"):
        (draft / name).mkdir()
    write = partial(write_scene, draft, size, grey)
    if options.simulate:
        list(map(write, range(count)))
    else:
        with multiprocessing.get_context("fork").Pool() as pool:
            pool.map(write, range(count))
    draft.rename(folder)
    return folder


def write_scene(folder: Path, size: tuple[int, int], grey: bool, seed: int) -> None:
    from useg.scenes.generate import make_scene

    sample = make_scene(seed, size)
    image = Image.fromarray(sample.image)
    (image.convert("L") if grey else image).save(folder / "images" / f"{seed:04d}.png")
    Image.fromarray(sample.label).save(folder / "masks" / f"{seed:04d}.png")


def case_settings(case: Case, options: Options, **more: Any) -> Settings:
    changes = {
        "data.size": case.size,
        "data.crop": case.crop,
        "data.split": "random",
        "train.batch": case.batch,
        "train.steps": 10,
        "train.seed": options.seed,
        **case.settings,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return Settings().with_(changes)


def open_case(case: Case, options: Options, **more: Any) -> tuple[Any, Settings]:
    folder = make_data(options, case.size, options.choose(40, 6), case.grey)
    settings = case_settings(case, options, **more)
    return assign_splits(find_dataset(folder), "random", 0.2), settings


def make_model(settings: dict[str, Any], channels: int, seed: int) -> Segmenter:
    """Build a network with 13 classes; lite0 has its ImageNet weights."""
    torch.manual_seed(seed)
    classes = ClassTable(tuple(f"class {k}" for k in range(13)))
    architecture = Settings().with_(settings).model.architecture()
    network = {**architecture, "channels": channels, "classes": 13}
    model = Segmenter(network, classes, [120.0] * channels, [60.0] * channels)
    if isinstance(model.network, encoders.EncoderUNet):
        load_pretrained(model.network)
    return model.to(memory_format=torch.channels_last)


# Timing.


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(
    call: Callable[[], Any], device: torch.device, seconds: float, warmup: int = 3
) -> float:
    """Return the mean time of a call in about so many seconds; the device runs without pauses."""
    for _ in range(warmup):
        call()
    synchronize(device)
    began, count = time.perf_counter(), 0
    while True:
        call()
        count += 1
        if count % 5 == 0 or count < 5:
            synchronize(device)
            taken = time.perf_counter() - began
            if taken > seconds:
                return taken / count


class BusyShare:
    """Samples how busy the GPU is, ten times a second, through nvidia-smi."""

    def __init__(self, options: Options) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.simulate = options.simulate

    def start(self) -> None:
        if self.simulate:
            return
        query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        self.process = subprocess.Popen(
            ["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def stop(self) -> float | str:
        """Return the mean share, 0 to 1."""
        if self.process is None:
            return NO_GPU
        self.process.terminate()
        text, _ = self.process.communicate()
        self.process = None
        values = [float(line) for line in text.split() if line.strip().isdigit()]
        return statistics.fmean(values) / 100 if values else "no samples"


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Compute fp32 convolutions and products in TF32, or not."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


PRECISIONS: dict[str, tuple[bool, torch.dtype | None]] = {
    "fp32": (False, None),
    "tf32": (True, None),
    "bf16": (True, torch.bfloat16),
    "fp16": (True, torch.float16),
}
