"""Measure training steps of the default network, beside those of an older commit, in turns.

    python benchmarks/training_step.py BEFORE [--after COMMIT] [--sizes 256x192 512x384]
        [--batches 4 8 16] [--rounds 5] [--steps 4] [--threads 2] [--smp]

The network is the U-Net on EfficientNet-Lite0 with random weights, for 13 classes; a step is the
forward and backward pass in bf16 with the default loss, and AdamW. Each version runs in a process
of its own, from its own git worktree (without --after, from this one). In every round each takes
``--steps`` steps, or fewer of a large batch, and the order changes from round to round, so that a
machine that slows down favours none. A ratio is the median over the rounds. ``--smp`` adds
segmentation_models.pytorch with the same encoder, as people write it: fp32, its own decoder,
torch's AdamW.

Wall-clock time counts on a quiet machine; the processor time of all threads is stored beside it. A
last call of each version is profiled: the share of the step by kind of layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from before_after import checked_out
from record import ROOT, record

from useg.machine import describe_machine

NUM_CLASSES = 13
WARMUP_STEPS = 3

# A round computes about so many pixels, or one step: of 16 crops of 512x384, it takes seconds.
MAX_ROUND_PIXELS = 1 << 20

WORKER = """
import json, sys, time
from useg.machine import tune
tune()
import torch
from torch.profiler import profile, ProfilerActivity

threads, peer = int(sys.argv[1]), sys.argv[2] == "smp"
torch.set_num_threads(threads)
K = 13


def build():
    torch.manual_seed(0)
    if peer:
        from peers_torch import smp_package
        smp = smp_package()
        model = smp.Unet("timm-tf_efficientnet_lite0", encoder_weights=None, classes=K).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        entropy, dice = torch.nn.CrossEntropyLoss(), smp.losses.DiceLoss("multiclass")
        return model, optimizer, lambda x, t: entropy(x, t) + dice(x, t), False
    from useg.classes import ClassTable
    from useg.models.segmenter import Segmenter
    from useg.scoring.losses import make_loss
    names = tuple(f"class {k}" for k in range(K))
    settings = {"encoder": "lite0", "channels": 3, "classes": K}
    model = Segmenter(settings, ClassTable(names), [127.0] * 3, [128.0] * 3)
    model.to(memory_format=torch.channels_last).train()
    groups = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW([{"params": each} for each in groups], lr=1e-3, fused=True)
    return model, optimizer, make_loss("ce + dice", torch.linspace(0.5, 1.5, K)), True


def step(x, target):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(x)
    value = loss(logits, target)
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def kind(event):
    name, shapes = event.key, [each for each in event.input_shapes if each]
    if "convolution" in name:
        weight = next((each for each in reversed(shapes) if len(each) == 4), [0] * 4)
        layer = "depthwise" if weight[1] == 1 else f"{weight[2]}x{weight[3]}"
        return f"convolution {layer} " + ("backward" if "backward" in name else "forward")
    way = "backward" if "ackward" in name else "forward"
    for part, words in {
        "blocks of the encoder, compiled": ("_Blocks",),
        "expanding path, compiled": ("_Levels", "_NormalizedConvolution", "_RepeatedConvolution"),
        "normalization and activation": ("batch_norm", "_NormActivation", "hardtanh", "threshold",
                                         "clamp"),
        "loss": ("softmax", "nll", "_Loss", "gather", "scatter"),
        "upsampling, concatenation": ("upsample", "aten::cat"),
    }.items():
        if any(word in name for word in words):
            return f"{part} {way}"
    if "adam" in name.lower() or "Optimizer" in name:
        return "optimizer"
    return "copies and casts" if name in ("aten::copy_", "aten::clone") else "rest"


model, optimizer, loss, bf16 = build()
for line in sys.stdin:
    words = json.loads(line)
    batch, (width, height) = words["batch"], words["size"]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, height, width, 3, generator=generator).mul_(255).permute(0, 3, 1, 2)
    coarse = torch.randint(0, K, (batch, height // 8, width // 8), generator=generator)
    target = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    if peer:
        x = (x.contiguous() - 127) / 128
    answer = {}
    if words["job"] == "profile":
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as measured:
            for _ in range(words["steps"]):
                step(x, target)
        shares = {}
        for event in measured.key_averages(group_by_input_shape=True):
            shares[kind(event)] = shares.get(kind(event), 0.0) + event.self_cpu_time_total
        answer = {key: value / sum(shares.values()) for key, value in shares.items()}
    else:
        wall, processor, values = [], [], []
        for _ in range(words["steps"]):
            began = time.perf_counter(), time.process_time()
            values.append(step(x, target).item())
            wall.append(time.perf_counter() - began[0])
            processor.append(time.process_time() - began[1])
        middle = len(wall) // 2
        answer = {"seconds": sorted(wall)[middle], "processor": sorted(processor)[middle]}
        answer["losses"] = values
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """A process that trains one version.

    Args:
        environment: Its environment, with the place of the package.
        threads: Number of threads.
        name: The name of the version.
    """

    def __init__(self, environment: dict[str, str], threads: int, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(threads), name],
            env={**environment, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Python looks for packages where it starts, too.
            cwd=ROOT.parent,
        )

    def ask(self, **words: Any) -> dict[str, Any]:
        """Have something done, and return the answer."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(words), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def measure(
    workers: dict[str, Worker], size: Sequence[int], batch: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Return median seconds of a step of each version, and the ratios to the first of them."""
    steps = max(1, min(steps, MAX_ROUND_PIXELS // (batch * size[0] * size[1])))
    for worker in workers.values():
        worker.ask(job="steps", size=size, batch=batch, steps=min(WARMUP_STEPS, steps + 1))
    rows: list[dict[str, dict[str, Any]]] = []
    for k in range(rounds):
        order = list(workers) if k % 2 else list(reversed(workers))
        rows.append(
            {
                name: workers[name].ask(job="steps", size=size, batch=batch, steps=steps)
                for name in order
            }
        )
    found: dict[str, Any] = {
        "size": "x".join(map(str, size)),
        "batch": batch,
        "steps_per_round": steps,
    }
    first = next(iter(workers))
    for name in workers:
        seconds = [row[name]["seconds"] for row in rows]
        found[name] = {
            "milliseconds": round(1000 * statistics.median(seconds), 1),
            "processor_milliseconds": round(
                1000 * statistics.median(row[name]["processor"] for row in rows), 1
            ),
            "images_per_second": round(batch / statistics.median(seconds), 2),
        }
        for unit, key in (("seconds", "times_as_fast"), ("processor", "times_as_fast_processor")):
            ratios = sorted(row[first][unit] / row[name][unit] for row in rows)
            found[name][key] = [
                round(value, 3) for value in (statistics.median(ratios), ratios[0], ratios[-1])
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before")
    parser.add_argument("--after")
    parser.add_argument("--sizes", nargs="+", default=["256x192", "512x384"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smp", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        environments, commits = {}, {}
        for name, commit in (("before", arguments.before), ("after", arguments.after)):
            if commit:
                place = checked_out(commit, Path(temporary) / name)
                checkout = stack.enter_context(place)
                environments[name], commits[name] = checkout.environment, checkout.commit
        environments.setdefault("after", {**os.environ, "PYTHONPATH": str(ROOT)})
        if arguments.smp:
            after = environments["after"]
            places = [
                after["PYTHONPATH"],
                str(ROOT / "benchmarks"),
                os.environ.get("PYTHONPATH", ""),
            ]
            environments["smp"] = {**after, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        threads = arguments.threads
        workers = {name: Worker(each, threads, name) for name, each in environments.items()}
        rows = []
        for text in arguments.sizes:
            size = [int(side) for side in text.split("x")]
            for batch in arguments.batches:
                rows.append(measure(workers, size, batch, arguments.rounds, arguments.steps))
                print(json.dumps(rows[-1]), flush=True)
        size = [int(side) for side in arguments.sizes[0].split("x")]
        shares = {
            name: worker.ask(job="profile", size=size, batch=arguments.batches[0], steps=4)
            for name, worker in workers.items()
        }
        for worker in workers.values():
            worker.process.communicate()
    content = {
        "commits": commits,
        "machine": describe_machine(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "rows": rows,
        "shares_of_a_step": {
            name: dict(sorted(((key, round(value, 4)) for key, value in each.items())))
            for name, each in shares.items()
        },
    }
    print(record("training_step", content))


if __name__ == "__main__":
    main()
