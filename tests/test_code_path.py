"""The code path of an image stays short enough to be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "measure_code_path.py"


# Most modules and lines.
BOUNDS = {"train": (36, 7141), "predict": (15, 2997)}


def test_an_image_passes_through_few_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from measure_code_path import FOUNDATIONS, CodePath

    out, environment = tmp_path / "code_paths.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, out], check=True, env=environment)
    code_paths = {job: CodePath(lines) for job, lines in json.loads(out.read_text()).items()}
    for job, (most_modules, most_lines) in BOUNDS.items():
        code_path = code_paths[job]
        assert len(code_path.modules) <= most_modules, (job, code_path.modules)
        assert code_path.num_lines <= most_lines, job
        # What every job needs, or the measurement missed something.
        assert set(FOUNDATIONS) & set(code_path.lines) >= {"errors.py", "files.py"}
        assert {"models/geometry.py", "models/encoders.py"} <= set(code_path.modules)
