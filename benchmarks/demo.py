"""How good is the demo on scenes of other seeds, and how long does it take? Stores what `make demo` left.

make demo && .venv/bin/python benchmarks/demo.py
"""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    scores = json.loads((ROOT / "demo" / "scores.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    result = {"commit": commit, "date": datetime.now(UTC).date().isoformat(), **scores}
    (ROOT / "benchmarks" / "results" / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"mIoU {scores['mean_iou']:.4f} in {scores['seconds']:.0f} s")


if __name__ == "__main__":
    main()
