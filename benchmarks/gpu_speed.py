"""How fast a GPU trains and predicts, and what its start costs."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cases import (
    CASES,
    NO_GPU,
    PLAN_DATA,
    PRECISIONS,
    TINY_CASES,
    BusyShare,
    Case,
    Options,
    check,
    make_data,
    make_model,
    open_case,
    seconds_per_call,
    synchronize,
    tf32,
)
from phases import StackSampler

from useg.api import train
from useg.config import read_provenance
from useg.device import GraphedFunction, allow_compiling, graph_on_gpu
from useg.inference.predict_files import predict
from useg.inference.runtimes import gpu_function, torch_function
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

# Functions that are told apart in a training run, and in prediction.
TRAINING_PHASES = (
    "open_dataset",
    "refuse_faulty",
    "make_plan",
    "label_statistics",
    "affordable_pixels",
    "find_fault",
    "prepare_trainer",
    "build_cache",
    "count_steps",
    "_loop",
    "validate",
    "update_report_seconds",
    "make_optimizer",
    "calibrate",
    "gpu_function",
    "evaluate_dataset",
    "add_causes",
    "publish_report",
)
PREDICTION_PHASES = ("load", "gpu_function", "fastest_runtime", "_label_all")


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
    from useg.training.schedule import Schedule, make_optimizer

    optimizer, _ = make_optimizer(trainer, Schedule(10**6))
    trainer.set_training_mode()
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
    with allow_compiling(variant != "native"):
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
    graphed, seconds = graph_on_gpu(forward, device), options.choose(0.3, 0.01)
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

    graphed = graph_on_gpu(gradients, device)
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
    content["graphs"] = len(graphed.recordings) if isinstance(graphed, GraphedFunction) else 0


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
