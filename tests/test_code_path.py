"""The way of an image through the code stays short enough to be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "measure_way.py"


# Most modules and lines.
BOUNDS = {"train": (39, 7115), "predict": (15, 2992)}


def test_an_image_passes_through_few_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from measure_way import FOUNDATIONS, Way

    out, environment = tmp_path / "ways.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, out], check=True, env=environment)
    ways = {job: Way(lines) for job, lines in json.loads(out.read_text()).items()}
    for job, (most_modules, most_lines) in BOUNDS.items():
        way = ways[job]
        assert len(way.modules) <= most_modules, (job, way.modules)
        assert way.num_lines <= most_lines, job
        # What every job needs, or the measurement missed something.
        assert set(FOUNDATIONS) & set(way.lines) >= {"errors.py", "files.py"}
        assert {"models/geometry.py", "models/encoders.py"} <= set(way.modules)


def test_prediction_imports_nothing_of_training() -> None:
    code = "import sys, useg.inference.files; print([m for m in sys.modules if m[:5] == 'useg.'])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "useg.inference.tiles" in loaded.stdout
    assert "useg.training" not in loaded.stdout
    assert "useg.data.cache" not in loaded.stdout
