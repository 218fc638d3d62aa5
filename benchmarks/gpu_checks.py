"""What must be equal on a GPU: steps to the CPU, repeated and resumed runs, tiles to one pass."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cases import COURSE, PAPER, PRECISIONS, Options, check, make_model, open_case, tf32

from useg.classes import ClassTable
from useg.config import read_settings
from useg.inference import tiles
from useg.inference.runtimes import describe_model, gpu_function, label_agreement, torch_function
from useg.models.segmenter import Segmenter
from useg.scoring.losses import make_loss
from useg.training.loop import fit
from useg.training.trainer import (
    SilentProgress,
    compute_logits,
)


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
