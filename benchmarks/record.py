"""Write results to JSON files with commit and date; run the training that many results need."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def commit() -> str:
    """Return the short hash of the commit that is measured."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def record(name: str, content: Mapping[str, Any]) -> Path:
    """Write ``results/NAME.json``: the commit, the date and ``content``."""
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps(
            {"commit": commit(), "date": datetime.now(UTC).date().isoformat(), **content}, indent=2
        )
        + "\n"
    )
    return path


def train(data: Path, settings: Mapping[str, Any], minutes: float) -> dict[str, Any]:
    """Run ``useg train`` in a process of its own; return scores, speed and the resolved settings.

    Args:
        data: the data set.
        settings: dotted key -> value; ``train.steps`` takes precedence over ``minutes``.
        minutes: limit of the whole command, on this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "useg",
            "train",
            str(data),
            "--out",
            str(out),
            "--minutes",
            str(minutes),
        ]
        subprocess.run(
            command
            + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")],
            check=True,
        )
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        scored = [row for row in log if row["mean_iou"] is not None]
        return {
            **json.loads((out / "scores.json").read_text()),
            "last_mean_iou": scored[-1]["mean_iou"],
            "steps": log[-1]["step"],
            "epochs": log[-1]["epoch"],
            "course": [
                {key: row[key] for key in ("epoch", "seconds", "mean_iou")} for row in scored
            ],
            "images_per_second": sorted(row["images_per_second"] for row in log)[len(log) // 2],
            "resolved": (out / "run.toml").read_text().partition("[provenance]")[0],
        }
