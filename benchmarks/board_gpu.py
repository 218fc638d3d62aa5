"""Tables of what a GPU trains and predicts, and of how it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from board_format import Results, cite, format_table, judge, names_with, percent, three_digits

GPU = """\
Images per second in bf16, with decoded images, on one NVIDIA GPU. The checks compare logits, loss
and gradients with those of the CPU, the bits of a repeated and of a resumed run with those of the
first run, and tiles with a single pass."""
START_VARIANTS = {
    "start-cudnn": "by cuDNN",
    "start-parallel": "by cuDNN, after many threads",
    "start-mixed": "forward by cuDNN, backward by PyTorch",
    "start-native": "by PyTorch",
    "start-contiguous": "by PyTorch, not channels-last",
}


def gpu(found: Results) -> str:
    tables = [
        _gpu_table(found[name]) + f"\n\n{cite(name, found[name])}"
        for name in names_with(found, "gpu_")
    ]
    return "\n\n".join([GPU, *tables]) if tables else ""


def _gpu_table(content: Mapping[str, Any]) -> str:
    """Return a row per network: training and prediction, before CUDA graphs and with them."""
    parts = content["parts"]
    rows = []
    for what, part, key, busy in (
        ("training", "training", "loop_images_per_second", "loop_busy_share"),
        ("training, steps alone", "training", "step_images_per_second", ""),
        ("prediction", "inference", "runtime_images_per_second", ""),
        ("prediction, ms for one", "inference", "milliseconds_one_image", ""),
    ):
        before = parts.get(f"{part}_before", {}).get("cases", {})
        for name, case in parts.get(part, {}).get("cases", {}).items():
            speeds = [before.get(name, {}).get(key), case.get(key)]
            if isinstance(speeds[1], dict):
                speeds[0] = speeds[0] or {"bf16": speeds[1].get("bf16, not as a graph")}
            speeds = [each["bf16"] if isinstance(each, dict) else each for each in speeds]
            cells = ["not run" if each is None else three_digits(each) for each in speeds]
            share = case.get(busy)
            rows.append((f"{name}: {what}", *cells, "" if share is None else percent(share)))
    gpu_name = parts["machine"]["gpu"]
    passed = [each["passed"] for part in parts.values() for each in part.get("checks", ())]
    head = (gpu_name, "kernel by kernel", "as CUDA graphs", "GPU busy")
    verdict = judge(f"{sum(passed)} of {len(passed)} checks pass", all(passed), "all")
    missing: dict[str, list[str]] = {}
    for name, part in parts.items():
        if "not_run" in part:
            missing.setdefault(part["not_run"], []).append(name)
    left = [f"Not run: {', '.join(names)} ({reason})." for reason, names in missing.items()]
    tables = [format_table(head, rows) if rows else "", _start_table(parts), _timed_run(parts)]
    return "\n\n".join([*filter(None, tables), " ".join([verdict, *left])])


def _start_table(parts: Mapping[str, Any]) -> str:
    """Return a row per way to compute depthwise convolutions: the first step, and later ones."""
    found = {label: parts[name] for name, label in START_VARIANTS.items() if name in parts}
    sizes = list(dict.fromkeys(key for part in found.values() for key in part if "batch" in key))
    if not sizes:
        return ""
    speed, first = "images_per_second", "seconds_of_first_step"
    rows = []
    for label, part in found.items():
        predicted = part.get("prediction", {})
        values = [
            *(part.get(size, {}).get(key) for key in (first, speed) for size in sizes),
            predicted.get(speed),
            predicted.get("seconds_of_first_forward_in_another_thread"),
        ]
        rows.append(
            (label, *("not run" if each is None else three_digits(each) for each in values))
        )
    columns = [f"{what}, {size}" for what in ("first step, s", "images/s") for size in sizes]
    last = "prediction, images/s", "first call of another thread, s"
    return format_table(("lite0: depthwise convolutions", *columns, *last), rows)


def _timed_run(parts: Mapping[str, Any]) -> str:
    """Return what a timed run and its prediction spent their time on."""
    plan = parts.get("plan", {})
    if "phases" not in plan or "seconds" not in plan:
        return ""
    phases = [f"{name} {taken:.0f}" for name, taken in plan["phases"].items() if taken >= 1]
    sentences = [f"A timed run took {plan['seconds']:.0f} s (in seconds: {', '.join(phases)})."]
    for key, name in (("predict_gpu", "first"), ("predict_auto", "second")):
        if key in plan:
            sentences.append(f"The {name} prediction took {plan[key]['seconds']:.1f} s.")
    return " ".join(sentences)
