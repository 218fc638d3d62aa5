"""Check and measure useg on one NVIDIA GPU; the result is a JSON file.

    scripts/gpu-check [--out gpu.json] [--limit 480] [--only PART ...] [--commit HASH]
    scripts/gpu-check --simulate

Every part runs in a process of its own with a time limit, so that a part that fails, hangs or
crashes does not end the others. The exit status is 0 if every check passed, and 1 if one failed.
``--simulate`` runs tiny forms of all parts on the CPU, where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from useg.machine import describe_machine, tune

tune()
# Must be set before CUDA starts; deterministic runs need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from phases import StackSampler
from PIL import Image
from record import ROOT, commit

from useg.api import train
from useg.classes import ClassTable
from useg.config import Settings, read_provenance, read_settings
from useg.data.layouts import find_dataset
from useg.data.splits import assign_splits
from useg.device import GraphedFunction, compiling_pays
from useg.inference import tiles
from useg.inference.files import predict
from useg.inference.runtimes import describe_model, gpu_function, label_agreement, torch_function
from useg.models import encoders
from useg.models.segmenter import Segmenter
from useg.scoring.losses import make_loss
from useg.training.loop import fit
from useg.training.plan import make_plan
from useg.training.trainer import (
    MIN_LONG_STEPS,
    SilentProgress,
    Trainer,
    compute_logits,
    prepare_trainer,
)

# What a part has found is written so often.
WRITE_SECONDS = 2.0
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

# Functions that are told apart in a training run, and in prediction.
TRAINING_PHASES = (
    "open_dataset",
    "refuse_unsound",
    "make_plan",
    "label_statistics",
    "affordable_pixels",
    "find_fault",
    "prepare_trainer",
    "build_cache",
    "count_steps",
    "_loop",
    "validate",
    "predict_ending",
    "make_optimizer",
    "calibrate",
    "gpu_function",
    "evaluate_dataset",
    "add_causes",
    "publish_report",
)
PREDICTION_PHASES = ("load", "gpu_function", "fastest_runtime", "predict_files")

# Files of tests that compute on the GPU where there is one, the most telling first.
GPU_TESTS = (
    "tests/test_device.py",
    "tests/training/test_augment.py",
    "tests/training/test_batches.py",
    "tests/inference/test_runtimes_gpu.py",
    "tests/inference/test_tiles.py",
    "tests/training/test_devices.py",
    "tests/training/test_trainer.py",
    "tests/inference/test_runtimes.py",
    "tests/models/test_segmenter.py",
    "tests/training/test_loop.py",
    "tests/training/test_checkpoint.py",
    "tests/test_distributed.py",
)


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
    from useg.scenes.scene import make_scene

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
        encoders.load_pretrained(model.network)
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


# Parts.


def data(options: Options, content: dict[str, Any]) -> None:
    """Make the images that the other parts use."""
    for case in options.cases.values():
        make_data(options, case.size, options.choose(40, 6), case.grey)
    make_data(options, *options.choose(*PLAN_DATA))


def machine(options: Options, content: dict[str, Any]) -> None:
    """Describe the GPU, and measure its peaks."""
    if options.simulate:
        content["gpu"] = NO_GPU
        return
    device, properties = options.device, torch.cuda.get_device_properties(0)
    content |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "native_bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "smi": subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip(),
    }
    side, peaks = 8192, {}
    for name, (allow, dtype) in PRECISIONS.items():
        with tf32(allow):
            a, b = torch.randn(2, side, side, device=device, dtype=dtype or torch.float32)
            peaks[name] = 2 * side**3 / seconds_per_call(partial(torch.mm, a, b), device, 0.5)
    layer = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, torch.bfloat16)
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(32, 256, 128, 128, device=device, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        seconds = seconds_per_call(partial(layer, x), device, 0.5)
    peaks["bf16 convolution"] = 2 * layer.weight.numel() * 32 * 128 * 128 / seconds
    content["flops_per_second"] = peaks
    source = torch.empty(2**30, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    seconds = seconds_per_call(partial(target.copy_, source), device, 0.5)
    content["copied_bytes_per_second"] = 2 * 4 * 2**30 / seconds


def computed(
    model: Segmenter, x: torch.Tensor, target: torch.Tensor, precision: torch.dtype | None
) -> dict[str, np.ndarray]:
    """Return logits, loss and all gradients of a training step, as float64."""
    model.zero_grad(set_to_none=True)
    logits = compute_logits(model, x, precision)
    loss = make_loss("ce + dice")(logits, target)
    # As gradient scaling does: small fp16 gradients would become 0.
    scale = 1024.0 if precision is torch.float16 else 1.0
    (scale * loss).backward()
    gradients = [parameter.grad.flatten() / scale for parameter in model.parameters()]
    values = {"logits": logits, "loss": loss[None], "gradients": torch.cat(gradients)}
    return {name: value.detach().double().cpu().numpy() for name, value in values.items()}


# Relative error of logits, loss and gradients against float64 that a device may have. The CPU's
# own gradients in fp32 are off by up to 0.003: normalization and ReLU magnify rounding.
MAX_ERROR = {
    "fp32": {"logits": 1e-4, "loss": 1e-5, "gradients": 1e-2},
    "tf32": {"logits": 1e-2, "loss": 1e-3, "gradients": 0.25},
    "bf16": {"logits": 0.1, "loss": 1e-2, "gradients": 0.6},
    "fp16": {"logits": 2e-2, "loss": 2e-3, "gradients": 0.3},
}


def equality(options: Options, content: dict[str, Any]) -> None:
    """Compare logits, loss and gradients on the device with the CPU's in float64."""
    networks = {
        "lite0": ({"model.encoder": "lite0"}, (64, 96)),
        "course": (COURSE, (64, 96)),
        "paper": ({**PAPER, "model.width": 16}, (188, 188)),
        "resnet18": ({"model.encoder": "resnet18", "model.pretrained": False}, (64, 96)),
    }
    if options.simulate:
        networks = {"tiny": ({**COURSE, "model.width": 2, "model.depth": 2}, (32, 48))}
    errors = content["relative_errors"] = {}
    checks = content["checks"] = []
    for name, (settings, (height, width)) in networks.items():
        no_dropout = {**settings, "model.dropout": 0.0}
        channels = 1 if name == "paper" else 3
        if name == "resnet18":
            torch.manual_seed(options.seed)
            classes = ClassTable(tuple(f"class {k}" for k in range(13)))
            network = {"encoder": "resnet18", "channels": 3, "classes": 13}
            model = Segmenter(network, classes, [120.0] * 3, [60.0] * 3)
        else:
            model = make_model(no_dropout, channels, options.seed)
        rng = np.random.default_rng(options.seed)
        x = torch.from_numpy(rng.uniform(0, 255, (2, channels, height, width)).astype(np.float32))
        inner = height - 2 * model.margin, width - 2 * model.margin
        target = torch.from_numpy(rng.integers(0, 13, (2, *inner)))
        exact = computed(model.double(), x.double(), target, None)
        on_cpu = computed(model.float(), x, target, None)
        found = {"cpu": relative_errors(on_cpu, exact)}
        model.to(options.device)
        x, target = x.to(options.device), target.to(options.device)
        for precision, (allow, dtype) in PRECISIONS.items():
            if options.simulate and precision != "fp32":
                continue
            with tf32(allow):
                found[precision] = relative_errors(computed(model, x, target, dtype), exact)
            passed = all(
                found[precision][what] <= most for what, most in MAX_ERROR[precision].items()
            )
            checks.append(check(f"{name} in {precision} equals the CPU", passed))
        errors[name] = found


def relative_errors(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]))
        for name in exact
    }


class Interrupter(SilentProgress):
    """Presses Ctrl-C at a step: the run saves its state and stops."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, row: Any, steps: int, seconds_left: float) -> None:
        if row["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def repeat(options: Options, content: dict[str, Any]) -> None:
    """Train twice, and once with an interruption: are the results equal to the bit?"""
    checks = content["checks"] = []
    messages: set[str] = set()
    names = ("lite0 256x192, batch 4", "M1: course U-Net 128x96, batch 32"), ("tiny plain U-Net",)
    for name in options.choose(*names):
        if name not in options.cases:
            continue
        case = options.cases[name]
        more = {"train__deterministic": True, "train__steps": 12}
        if case.settings["model.encoder"] != "plain":
            more["train__coarse"] = 0.5
        dataset, settings = open_case(case, options, **more)
        out = options.folder / f"repeat_{len(checks)}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            once = fit(dataset, Path(f"{out}_a"), settings)
            twice = fit(dataset, Path(f"{out}_b"), settings)
            cut = fit(dataset, Path(f"{out}_c"), settings, Interrupter(8))
            stored = read_settings(Path(f"{out}_c") / "run.toml")
            resumed = fit(dataset, Path(f"{out}_c"), stored, resume=True)
        messages |= {str(each.message).splitlines()[0][:200] for each in caught}
        content["warnings"] = sorted(messages)
        content["interrupted_after"] = len(cut.log)
        for what, run in (("repeated", twice), ("resumed", resumed)):
            same_model = weights_of(run.out) == weights_of(once.out)
            same_losses = [row["loss"] for row in run.log] == [row["loss"] for row in once.log]
            checks.append(
                check(
                    f"{name}: {what} run equals the first to the bit",
                    same_model and same_losses and cut.interrupted,
                    same_model=same_model,
                    same_losses=same_losses,
                )
            )


def weights_of(run: Path) -> bytes:
    """Return the tensors of a run's model, without its description."""
    content = (run / "model.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def tiled(options: Options, content: dict[str, Any]) -> None:
    """Compare tiles with one pass over the image, on the GPU."""
    networks = {"lite0": {"model.encoder": "lite0"}, "course": COURSE, "paper": PAPER}
    size = options.choose((1100, 1500), (64, 80))
    if options.simulate:
        networks = {"tiny": {**COURSE, "model.width": 2, "model.depth": 2}}
    rng, checks = np.random.default_rng(options.seed), []
    differences = content["differences"] = {}
    content["checks"] = checks
    for name, settings in networks.items():
        model = make_model(settings, 3, options.seed).eval().to(options.device)
        geometry = describe_model(model).geometry
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        side = options.choose(max(512, 2 * geometry.context + 256), 48)
        functions = {"fp32": torch_function(model)}
        if not options.simulate:
            functions["bf16"] = gpu_function(model)
        for precision, run in functions.items():
            with tf32(False):
                whole = tiles.predict_tiled(image, run, geometry, 0)
                parts = tiles.predict_tiled(image, run, geometry, side)
            error = float(np.abs(parts - whole).max() / np.abs(whole).max())
            agreement = label_agreement(parts[None], whole[None])
            differences[f"{name} {precision}"] = {"error": error, "agreement": agreement}
            most = {"fp32": 1e-4, "bf16": 5e-2}[precision]
            checks.append(check(f"{name} {precision}: tiles equal the whole", error <= most))


class LoopTimer(SilentProgress):
    """Times the steps of a run and samples how busy the GPU is, after the first steps.

    Args:
        warmup: Number of steps that do not count.
        seconds: Time of the others, after which the run is stopped with Ctrl-C.
    """

    def __init__(self, options: Options, warmup: int, seconds: float = math.inf) -> None:
        self.busy, self.warmup, self.seconds = BusyShare(options), warmup, seconds
        self.times: list[float] = []
        self.said: list[str] = []
        self.share: float | str = NO_GPU

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, row: Any, steps: int, seconds_left: float) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == self.warmup:
            self.busy.start()
        counted = self.times[self.warmup :]
        too_long = bool(counted) and counted[-1] - counted[0] > self.seconds
        if self.busy.process and (too_long or row["step"] >= steps - 1):
            self.share = self.busy.stop()
        if too_long:
            self.seconds = math.inf
            os.kill(os.getpid(), signal.SIGINT)

    def steps_per_second(self) -> float:
        times = self.times[max(0, min(self.warmup, len(self.times) - 2)) :]
        return (len(times) - 1) / max(times[-1] - times[0], 1e-9)


def training(options: Options, content: dict[str, Any]) -> None:
    """Measure training: the loop as people run it, and its parts."""
    found, checks = content["cases"], content["checks"] = {}, []
    for name, case in options.cases.items():
        found[name] = {}
        try:
            measure_training(case, options, found[name])
            fault = found[name]["fault"]
            checks.append(check(f"{name} trains on the GPU", not fault, fault=fault))
        except Exception as error:
            traceback.print_exc()
            found[name]["failed"] = f"{type(error).__name__}: {error}"[:500]
            checks.append(check(f"training of {name} runs", False))


def measure_training(case: Case, options: Options, content: dict[str, Any]) -> None:
    dataset, settings = open_case(case, options)
    precision = settings.train.precision or options.choose("bf16", "fp32")
    settings = settings.with_({"train.precision": precision})
    began = time.perf_counter()
    plan = make_plan(settings, dataset)
    trainer = prepare_trainer(dataset, plan, SilentProgress())
    device, seconds = options.device, options.choose(0.4, 0.01)
    content["prepare_seconds"] = time.perf_counter() - began
    content["device"], content["fault"] = str(plan.device), plan.fault
    x, target = trainer.batches.at(0)
    numbers = iter(range(10**6))
    content["cut_seconds"] = seconds_per_call(
        lambda: trainer.batches.at(next(numbers)), device, seconds
    )
    content["device_samples"] = trainer.batches.device_samples is not None
    content["step_images_per_second"] = steps = {}
    step = one_step(trainer, x, target)
    steps[precision] = case.batch / seconds_per_call(step, device, seconds, warmup=5)
    if not options.simulate:
        content["recorded"] = len(trainer.graphed.recordings)
        trainer.graphed.records = False
        eager = case.batch / seconds_per_call(step, device, seconds)
        steps[f"{precision}, not as a graph"] = eager
        content["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    timer = LoopTimer(options, options.choose(20, 2), options.choose(3.0, 0.05))
    # Few enough steps to do without compiled kernels, as those above.
    more = {
        "train__steps": MIN_LONG_STEPS - 1,
        "train__validate_every": 10**6,
        "train__precision": precision,
    }
    _, settings = open_case(case, options, **more)
    run = fit(dataset, Path(tempfile.mkdtemp(dir=options.folder)) / "run", settings, timer)
    content["loop_images_per_second"] = case.batch * timer.steps_per_second()
    content["loop_busy_share"] = timer.share
    content["loop_steps"] = len(run.log)
    content["notices"] = [str(notice) for notice in run.notices]


def one_step(trainer: Trainer, x: torch.Tensor, target: torch.Tensor) -> Callable[[], Any]:
    """Return a training step on one batch again and again."""
    from useg.training.schedule import Schedule

    optimizer, _ = trainer.make_optimizer(Schedule(10**6))
    trainer.model.train()
    return lambda: trainer.train_step(optimizer, x, target)


def precisions(options: Options, content: dict[str, Any]) -> None:
    """Measure the step of one network in every precision, and its kernels in bf16."""
    name = options.choose("lite0 512x512, batch 8", "tiny plain U-Net")
    case = options.choose(CASES, TINY_CASES)[name]
    dataset, settings = open_case(case, options, train__precision="fp32")
    trainer = prepare_trainer(dataset, make_plan(settings, dataset), SilentProgress())
    x, target = trainer.batches.at(0)
    steps = content[f"images_per_second, {name}"] = {}
    for precision in options.choose(("bf16", "fp16", "tf32"), ("fp32",)):
        allow, dtype = PRECISIONS[precision]
        own = replace(trainer, model=copy.deepcopy(trainer.model), precision=dtype)
        step = one_step(own, x, target)
        with tf32(allow):
            taken = seconds_per_call(step, options.device, options.choose(0.4, 0.01), warmup=5)
        steps[precision] = case.batch / taken
        if precision == "bf16":
            content["kernels"] = profile_step(own, step, options.device)


def profile_step(trainer: Trainer, step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Measure the kernels of a training step, each launched by itself."""
    trainer.graphed.records = False
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step()
        synchronize(device)
    times: dict[str, float] = {}
    kernels = [each for each in profile.events() if each.device_type.name == "CUDA"]
    for event in kernels:
        name = event.name[:90]
        times[name] = times.get(name, 0.0) + event.time_range.elapsed_us() / 3e6
    slowest = sorted(times.items(), key=lambda each: -each[1])[:12]
    return {"seconds": sum(times.values()), "number": len(kernels) / 3, "slowest": dict(slowest)}


def inference(options: Options, content: dict[str, Any]) -> None:
    """Measure prediction: numpy in, numpy out through the runtime, and on the device alone."""
    found = content["cases"] = {}
    for name, case in options.cases.items():
        channels = 1 if case.grey else 3
        model = make_model(case.settings, channels, options.seed).eval()
        height, width = (side + 2 * model.margin for side in case.crop[::-1])
        batch = options.choose(max(case.batch, 8), 2)
        rng = np.random.default_rng(options.seed)
        pixels = rng.integers(0, 256, (batch, channels, height, width)).astype(np.uint8)
        device, seconds = options.device, options.choose(0.3, 0.01)
        run = torch_function(model) if options.simulate else gpu_function(model)
        busy = BusyShare(options)
        busy.start()
        through = batch / seconds_per_call(lambda run=run, x=pixels: run(x), device, seconds)
        share = busy.stop()
        single = seconds_per_call(lambda run=run, x=pixels[:1]: run(x), device, seconds)
        model.to(device)
        x, alone = torch.from_numpy(pixels).to(device), {}
        for precision in options.choose(("bf16", "tf32"), ("fp32",)):
            allow, dtype = PRECISIONS[precision]
            with tf32(allow), torch.inference_mode():
                call = partial(compute_logits, model, x, dtype)
                alone[precision] = batch / seconds_per_call(call, device, seconds)
        found[name] = {
            "batch": batch,
            "runtime_images_per_second": through,
            "runtime_busy_share": share,
            "milliseconds_one_image": 1000 * single,
            "device_images_per_second": alone,
        }


def runtimes(options: Options, content: dict[str, Any]) -> None:
    """Which other runtimes for GPUs are installed, and how fast ONNX Runtime is on the GPU."""
    versions = {}
    for package in ("onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "tensorrt"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    content |= {"versions": versions, "providers": NO_GPU}
    if options.simulate:
        return
    try:
        import onnxruntime
    except ImportError:
        content["providers"] = "not installed"
        return
    content["providers"] = onnxruntime.get_available_providers()
    for provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        if provider not in content["providers"]:
            content[provider] = "not installed"
            continue
        from useg.inference.exported import to_onnx

        model = make_model({"model.encoder": "lite0"}, 3, options.seed).eval()
        session = onnxruntime.InferenceSession(to_onnx(model), providers=[provider])
        pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 512, 512)).astype(np.uint8)
        feed = {session.get_inputs()[0].name: pixels}
        seconds = seconds_per_call(partial(session.run, None, feed), options.device, 2.0)
        content[provider] = {"images_per_second": 8 / seconds}


def plan(options: Options, content: dict[str, Any]) -> None:
    """Train as ``useg train`` does in so many minutes, and label the images."""
    folder = make_data(options, *options.choose(*PLAN_DATA))
    changes = {"data.split": "random", "train.seed": options.seed}
    if options.simulate:
        tiny = {"model.encoder": "plain", "model.width": 2, "model.depth": 2, "train.steps": 4}
        changes |= {**tiny, "train.precision": "fp32"}
    timer = LoopTimer(options, options.choose(40, 2))
    began = time.perf_counter()
    with StackSampler(TRAINING_PHASES, quiet=("_loop",)) as sampler:
        # What is known is written even if this takes too long or fails.
        content["phases"], content["lines"] = sampler.seconds, sampler.lines
        run = train(
            folder,
            options.folder / "plan",
            minutes=options.choose(options.minutes, None),
            settings=changes,
            progress=timer,
        )
    seconds = time.perf_counter() - began
    fault = next((text for text in timer.said if "is not used" in text), "")
    planned = read_provenance(run.out / "run.toml")["plan"]
    stored = run.settings.model_dump()
    content |= {
        "fault": fault,
        "plan": {key: str(stored[key.split(".")[0]][key.split(".")[1]]) for key in planned},
        "seconds": seconds,
        "steps": run.log[-1]["step"],
        "mean_iou": run.scores.mean_iou,
        "images_per_second": run.settings.train.batch * timer.steps_per_second(),
        "busy_share": timer.share,
        "notices": [str(notice) for notice in run.notices],
        "course": [
            {key: row[key] for key in ("step", "seconds", "mean_iou")}
            for row in run.log
            if row["mean_iou"] is not None
        ],
        **sampler.found(),
        "checks": [
            check("the timed run trains on the GPU", not fault, fault=fault),
            check("the timed run finishes in time", seconds <= 60 * options.minutes + 5),
            check("the loss falls", run.log[-1]["loss"] < run.log[0]["loss"] or options.simulate),
        ],
    }
    images = sorted((folder / "images").iterdir())
    for name in options.choose(("gpu", "auto"), ("torch",)):
        began = time.perf_counter()
        with StackSampler(PREDICTION_PHASES) as sampler:
            predict(run.out, images, options.folder / name, runtime=name)
        seconds = time.perf_counter() - began
        content[f"predict_images_per_second_{name}"] = len(images) / seconds
        content[f"predict_{name}"] = {"seconds": seconds, **sampler.found()}


def start(variant: str, options: Options, content: dict[str, Any]) -> None:
    """Measure the first step of the default network in this process, and its speed as a graph.

    Depthwise convolutions are computed by cuDNN (``cudnn``), by PyTorch (``native``), by PyTorch
    backward alone (``mixed``), or by PyTorch in a network that is not channels-last
    (``contiguous``).
    """
    with compiling_pays(variant != "native"):
        measure_start(variant, options, content)


def measure_start(variant: str, options: Options, content: dict[str, Any]) -> None:
    case = options.choose(CASES["lite0 256x192, batch 4"], TINY_CASES["tiny plain U-Net"])
    device, precision = options.device, options.choose(torch.bfloat16, None)
    began = time.perf_counter()
    torch.zeros(1, device=device)
    synchronize(device)
    content["seconds_to_start_cuda"] = time.perf_counter() - began
    layout = torch.contiguous_format if variant == "contiguous" else torch.channels_last
    model = make_model(case.settings, 3, options.seed).to(device).to(memory_format=layout).train()
    depthwise = [each for each in model.modules() if getattr(each, "groups", 1) > 1]
    sizes = options.choose([(4, 192, 256), (4, 96, 128), (8, 512, 512)], [(2, 32, 48)])
    for module in depthwise if variant == "mixed" else ():
        module.forward = partial(mixed_depthwise, module)
    measure_first_steps(model, sizes, options, content, layout)
    model.eval()

    @torch.inference_mode()
    def forward(x: torch.Tensor) -> list[torch.Tensor | None]:
        return [compute_logits(model, x, precision)]

    x = torch.rand(1, 3, *options.choose((384, 512), (32, 48)), device=device).mul_(255)
    x = x.to(memory_format=layout)
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(copy_context().run, forward, x).result()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    graphed, seconds = GraphedFunction(forward, device), options.choose(0.3, 0.01)
    with torch.inference_mode():
        per_image = seconds_per_call(partial(graphed, x), device, seconds, warmup=5)
    content["prediction"] = {
        "seconds_of_first_forward_in_another_thread": taken[0],
        "seconds_of_first_forward_in_a_third_thread": taken[1],
        "images_per_second": 1 / per_image,
    }


def measure_first_steps(
    model: Segmenter,
    sizes: list[tuple[int, int, int]],
    options: Options,
    content: dict[str, Any],
    layout: torch.memory_format,
) -> None:
    """Measure the first step and later ones for some (batch, height, width)."""
    device, precision = options.device, options.choose(torch.bfloat16, None)
    loss, parameters = make_loss("ce + dice"), list(model.parameters())
    forwards: list[float] = []

    def gradients(x: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor | None]:
        model.zero_grad(set_to_none=True)
        value = loss(compute_logits(model, x, precision), target)
        if not forwards:
            synchronize(device)
            forwards.append(time.perf_counter())
        value.backward()
        return [value.detach(), *(parameter.grad for parameter in parameters)]

    graphed = GraphedFunction(gradients, device)
    for batch, height, width in sizes:
        x = torch.rand(batch, 3, height, width, device=device).mul_(255).to(memory_format=layout)
        target = torch.randint(13, (batch, height, width), device=device)
        began = time.perf_counter()
        graphed(x, target)
        synchronize(device)
        first = time.perf_counter() - began
        content.setdefault("seconds_of_first_forward", forwards[0] - began)
        seconds = options.choose(0.4, 0.01)
        taken = seconds_per_call(partial(graphed, x, target), device, seconds, warmup=5)
        content[f"{width}x{height}, batch {batch}"] = {
            "seconds_of_first_step": first,
            "images_per_second": batch / taken,
        }
    content["graphs"] = len(graphed.recordings)


class _MixedDepthwise(torch.autograd.Function):
    """A depthwise convolution: forward by cuDNN, backward by PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, form: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.form = form
        return torch.ops.aten.convolution(x, weight, *form)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        weight = weight.flatten(1).view(weight.shape)
        given = gradient.contiguous(), x.contiguous(), weight
        for_x, for_weight, _ = torch.ops.aten.convolution_backward(
            *given, *ctx.form, [True, True, False]
        )
        return for_x.contiguous(memory_format=torch.channels_last), for_weight, None


def mixed_depthwise(module: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a depthwise convolution whose gradients PyTorch computes without cuDNN."""
    form = None, module.stride, module.padding, (1, 1), False, (0, 0), module.groups
    return _MixedDepthwise.apply(x, module.weight.to(x.dtype), form)


def tests(options: Options, content: dict[str, Any]) -> None:
    """Run the tests that compute on the GPU where there is one, as many as there is time for."""
    if options.simulate:
        content["tests"] = NO_GPU
        return
    # Other plugins that are installed may warn, and warnings are errors here.
    plugins = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", *plugins, *GPU_TESTS]
    log = options.folder / "tests.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    ended = False
    while not ended:
        ended = process.poll() is not None
        lines = log.read_text().splitlines()
        failures = [line for line in lines if re.search(r" (FAILED|ERROR) +\[", line)]
        content |= {
            "ended": ended,
            "passed": sum(" PASSED " in line for line in lines),
            "failures": failures,
            "output": "\n".join(lines)[-20000:],
            "checks": [check("the tests pass", not failures and not process.returncode)],
        }
        time.sleep(1)


# Name -> the part, and its time limit in seconds. What is new comes first.
PARTS: dict[str, tuple[Callable[[Options, dict[str, Any]], None], float]] = {
    "data": (data, 60),
    "machine": (machine, 40),
    "start-cudnn": (partial(start, "cudnn"), 90),
    "start-native": (partial(start, "native"), 30),
    "start-mixed": (partial(start, "mixed"), 30),
    "start-contiguous": (partial(start, "contiguous"), 30),
    "plan": (plan, 170),
    "tests": (tests, 120),
    "training": (training, 120),
    "equality": (equality, 60),
    "repeat": (repeat, 60),
    "tiled": (tiled, 40),
    "runtimes": (runtimes, 40),
    "inference": (inference, 60),
    "precisions": (precisions, 50),
}


def run_part(name: str, options: Options, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; a part that fails or hangs says so."""
    began = time.perf_counter()
    result = options.folder / f"{name}.json"
    process = multiprocessing.get_context("fork").Process(
        target=_run_here, args=(name, options, result)
    )
    with warnings.catch_warnings():
        # Nothing was computed in this process: no thread of its own is lost.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join(max(1.0, seconds))
    stopped = process.is_alive()
    if stopped:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    content: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    if stopped:
        content["failed"] = f"stopped after {max(1.0, seconds):.0f} seconds"
    elif process.exitcode:
        content["failed"] = f"the process ended with status {process.exitcode}"
    return {"wall_seconds": round(time.perf_counter() - began, 1), **content}


def _run_here(name: str, options: Options, result: Path) -> None:
    os.setpgid(0, 0)
    content: dict[str, Any] = {}
    threading.Thread(target=write_now_and_then, args=(result, content), daemon=True).start()
    try:
        PARTS[name][0](options, content)
    except BaseException as error:
        traceback.print_exc()
        content["failed"] = f"{type(error).__name__}: {error}"[:1000]
        content["traceback"] = traceback.format_exc()[-3000:]
    write_whole(result, content)


def write_now_and_then(result: Path, content: dict[str, Any]) -> None:
    """Write what a part has found so far, again and again: it may have to be killed."""
    while True:
        time.sleep(WRITE_SECONDS)
        # The part may be changing the content at this moment.
        with suppress(RuntimeError):
            write_whole(result, content)


def write_whole(result: Path, content: dict[str, Any]) -> None:
    draft = result.with_suffix(f".draft{threading.get_ident()}")
    draft.write_text(json.dumps(content, default=str))
    draft.rename(result)


def has_gpu() -> bool:
    """Ask in a process of its own: a process that has asked CUDA cannot fork."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def known_commit() -> str:
    try:
        return commit()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def failed_checks(parts: dict[str, dict[str, Any]]) -> list[str]:
    """Return what did not pass: failed parts, and failed checks of the others."""
    failed = [f"{name}: {part['failed']}" for name, part in parts.items() if "failed" in part]
    return failed + [
        f"{name}: {each['what']}"
        for name, part in parts.items()
        for each in part.get("checks", ())
        if not each["passed"]
    ]


def without_nan(value: Any) -> Any:
    """Return content that every JSON reader reads: NaN and infinity as text."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of the result")
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything")
    parser.add_argument("--minutes", type=float, default=2, help="minutes of the timed run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="NAME",
        help="networks, by the start of their names",
    )
    parser.add_argument("--commit", help="the commit, where there is no git")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--simulate", action="store_true", help="tiny forms on the CPU")
    options = parser.parse_args()
    began = time.perf_counter()
    if not options.simulate and not has_gpu():
        print("PyTorch finds no GPU here; --simulate tries the script without one", file=sys.stderr)
        return 2
    parts: dict[str, dict[str, Any]] = {}
    content = {
        "commit": options.commit or known_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "seed": options.seed,
        "simulated": options.simulate,
        "parts": parts,
    }
    with tempfile.TemporaryDirectory() as folder:
        chosen = Options(
            options.simulate, Path(folder), options.minutes, options.seed, tuple(options.cases)
        )
        for name in ["data", *(name for name in options.only if name != "data")]:
            left = options.limit - (time.perf_counter() - began)
            parts[name] = run_part(name, chosen, min(PARTS[name][1], left))
            state = parts[name].get("failed") or ("tiny form" if options.simulate else "done")
            print(f"{name}: {state} ({parts[name]['wall_seconds']} s)", flush=True)
            content["seconds"] = round(time.perf_counter() - began, 1)
            content["failed"] = failed_checks(parts)
            # After every part: what is known outlives this process.
            options.out.write_text(json.dumps(without_nan(content), indent=2) + "\n")
    print(f"{options.out}: " + ("; ".join(content["failed"]) or "every check passed"))
    return 1 if content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
