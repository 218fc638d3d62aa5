"""How good is the demo on scenes of other seeds, and how long does it take? Stores what `make demo` left.

make demo && .venv/bin/python benchmarks/demo.py
"""

from __future__ import annotations

import json

from record import ROOT, record


def main() -> None:
    scores = json.loads((ROOT / "demo" / "scores.json").read_text())
    record("demo", scores)
    print(f"mIoU {scores['mean_iou']:.4f} in {scores['seconds']:.0f} s")


if __name__ == "__main__":
    main()
