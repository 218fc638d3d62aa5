"""Store the scores and the time of the demo that `make demo` has just run.

make demo && .venv/bin/python benchmarks/demo.py
"""

from __future__ import annotations

import json

from record import ROOT, record


def main() -> None:
    scores = json.loads((ROOT / "demo" / "scores.json").read_text())
    record("demo", scores)
    print(f"mean IoU {scores['mean_iou']:.1%} in {scores['seconds']:.0f} s")


if __name__ == "__main__":
    main()
