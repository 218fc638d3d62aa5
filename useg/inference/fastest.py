"""Choose the fastest installed runtime that labels images as the model's own runtime does.

That is the GPU, if there is one. Otherwise the choice is measured once for each model and machine
and kept in the user's cache folder, so that later commands neither measure again nor change their
labels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from useg.errors import UsageError
from useg.files import find_cache_folder, replacing
from useg.inference.runtimes import (
    Runtime,
    StoredModel,
    label_agreement,
    make_probe,
    probe_size,
    read_model,
    start_default,
    start_runtime,
)
from useg.machine import describe_machine, measure_seconds
from useg.models.segmenter import model_file

CANDIDATES = ("torch-bf16", "openvino-bf16", "openvino")

# Share of the probe's labels that must agree for a faster runtime to count as the same.
MIN_LABEL_AGREEMENT = 0.999

# A runtime replaces another one that needs at least this many times as long. Smaller differences
# are noise.
MIN_SPEED_RATIO = 1.05

# A choice takes about this long, most of it for importing PyTorch and OpenVINO and for converting
# the network. For less work it cannot pay. Longer than the other one it never takes.
MIN_SECONDS_OF_WORK = 8.0
MAX_SECONDS = 300.0

# For fewer images, the time of one is not measured: that labels a probe three times, and makes it.
MIN_IMAGES = 4

# Kept choices; the oldest are dropped.
CHOICES_NAME = "runtimes.json"
MAX_CHOICES = 200


def fastest_runtime(stored: StoredModel, num_images: float = math.inf) -> Runtime:
    """Start the fastest runtime for a model: the one that was measured before, or a new choice.

    Args:
        stored: The model.
        num_images: How many images will be labelled. If they take less time than a choice, the
            model's own runtime computes them.
    """
    own = start_default(stored)
    if own.name == "gpu":
        return own
    key = _choice_key(stored)
    if kept := _read_choices().get(key):
        return own if kept == own.name else _try_start(stored, str(kept)) or own
    if not key or num_images < MIN_IMAGES:
        return own
    x = make_probe(stored.description, probe_size(stored.description))
    if num_images * measure_seconds(own.run, x) < MIN_SECONDS_OF_WORK:
        return own
    name = _measure_apart(stored.source)
    if name:
        _keep_choice(key, name)
    return own if name in ("", own.name) else _try_start(stored, name) or own


def _measure_apart(source: Path) -> str:
    """Return the name of the fastest runtime, measured in a process of its own; "" if it fails.

    A process that has used OpenVINO and given it up sometimes crashes when it ends.
    """
    command = [sys.executable, "-m", __spec__.name, str(source)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=MAX_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def measure(stored: StoredModel) -> str:
    """Try all runtimes; return the name of the fastest one with the labels of the model's own."""
    best = start_runtime(stored, stored.native)
    x = make_probe(stored.description, probe_size(stored.description))
    expected, least_seconds = best.class_logits(x), measure_seconds(best.run, x)
    for name in CANDIDATES:
        if name == stored.native:
            continue
        candidate = _try_start(stored, name)
        if (
            not candidate
            or label_agreement(candidate.class_logits(x), expected) < MIN_LABEL_AGREEMENT
        ):
            continue
        seconds = measure_seconds(candidate.run, x)
        if seconds * MIN_SPEED_RATIO < least_seconds:
            best, least_seconds = candidate, seconds
    return best.name


def _try_start(stored: StoredModel, name: str) -> Runtime | None:
    """Start a runtime; None if it is not installed, or cannot compute this model here."""
    with suppress(UsageError):
        return start_runtime(stored, name)
    return None


def _choice_key(stored: StoredModel) -> str:
    """Identify a model file, the machine and the installed runtimes; "" without such a file."""
    try:
        content = model_file(stored.source).read_bytes()
    except OSError:
        return ""
    facts = [
        *describe_machine().values(),
        f"{torch.get_num_threads()} threads",
        *map(_find_version, ("openvino", "nncf")),
    ]
    return hashlib.sha256("\n".join(facts).encode() + content).hexdigest()


def _find_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _choices_path() -> Path | None:
    folder = find_cache_folder()
    return folder and folder / CHOICES_NAME


def _read_choices() -> dict[str, Any]:
    path = _choices_path()
    return (path and _read_own_choices(path)) or {}


def _read_own_choices(path: Path) -> dict[str, Any] | None:
    """Read kept choices; None if there are none in a file."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    choices = content.get("choices") if isinstance(content, dict) else None
    return choices if isinstance(choices, dict) else None


def _keep_choice(key: str, name: str) -> None:
    """Keep a choice; where that is impossible, the next command measures again."""
    path = _choices_path()
    if path is None:
        return
    choices = dict([*_read_choices().items(), (key, name)][-MAX_CHOICES:])
    with suppress(OSError, UsageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, lambda old: _read_own_choices(old) is not None) as draft:
            draft.write_text(json.dumps({"choices": choices}), "utf-8")


if __name__ == "__main__":
    print(measure(read_model(Path(sys.argv[1]))), flush=True)
    # Ending as usual might crash.
    os._exit(0)
