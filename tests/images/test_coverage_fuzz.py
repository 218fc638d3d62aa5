"""Coverage-guided fuzzing of the picture readers: what it found is read again.

``USEG_SOAK=1`` (``make soak``) searches for 30 minutes, if atheris is installed, and starts with
the files in ``corpus``. ``coverage_fuzz.py`` made them out of ``mutations.seeds`` and ``hostile``,
each because it takes a way through the code that no other takes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import seeds

from useg.errors import UsageError
from useg.images import image_files

FUZZER = Path(__file__).parents[1] / "coverage_fuzz.py"
CORPUS = Path(__file__).parent / "corpus"
SECONDS = 1800


def test_what_the_fuzzer_found_is_read_or_refused() -> None:
    found = sorted(CORPUS.iterdir())
    assert len(found) > 50
    readable = 0
    for path in found:
        try:
            readable += image_files.decode_image(path.read_bytes(), path.name, page=0).size > 0
        except UsageError:
            continue
    assert 0 < readable < len(found)


@pytest.mark.skipif(not os.environ.get("USEG_SOAK"), reason="half an hour: make soak")
def test_half_an_hour_of_guided_fuzzing_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="there is no atheris for this Python")
    shutil.copytree(CORPUS, tmp_path / "corpus")
    for name, content in seeds().items():
        (tmp_path / "corpus" / name).write_bytes(content)
    options = [f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"]
    fuzzer = subprocess.run(
        [sys.executable, str(FUZZER), str(tmp_path / "corpus"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FUZZER.parents[1])},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS + 300,
    )
    assert fuzzer.returncode == 0, fuzzer.stderr[-3000:]
