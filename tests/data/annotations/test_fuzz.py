"""Damaged annotation files of every tool end in label maps or in one sentence, soon and small."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]
COUNT = 20_000 if os.environ.get("USEG_SOAK") else 140


def run_child(folder: Path, count: int, *more: str) -> list[str]:
    """The lines that a child prints while it reads damaged files."""
    command = [sys.executable, TESTS / "annotation_fuzz_child.py", folder, str(count), "0", *more]
    path = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=100 + COUNT,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def test_damaged_annotations_are_read_or_refused(tmp_path):
    assert run_child(tmp_path, COUNT) == [f"read {COUNT}"]


def test_the_measure_sees_memory_that_is_taken(tmp_path):
    lines = run_child(tmp_path, 2, "plant")
    assert lines[0].startswith("seed 0 (coco): ")
    assert lines[0].endswith(" MB")
