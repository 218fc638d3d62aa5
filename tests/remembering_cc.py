"""A C compiler that compiles each file of useg once for all processes of a test run.

    python remembering_cc.py FOLDER COMPILER -O3 -c useg/models/SOURCE.c -o OBJECT.o

``FOLDER`` keeps the objects. Everything else goes straight to the compiler.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "useg" / "models"


def compile_once(folder: Path, compiler: str, words: list[str]) -> int:
    """Compile, or copy what was compiled before; return the exit status."""
    target = Path(words[words.index("-o") + 1])
    digest = hashlib.sha256(" ".join(word for word in words if word != str(target)).encode())
    for path in sorted(KERNELS.glob("*.[ch]")):
        digest.update(path.read_bytes())
    kept = folder / f"{digest.hexdigest()}.o"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            shutil.copyfile(kept, target)
            return 0
        status = subprocess.call([compiler, *words])
        if status == 0:
            shutil.copyfile(target, kept)
        return status


if __name__ == "__main__":
    folder, compiler, *words = sys.argv[1:]
    is_ours = "-c" in words and Path(words[words.index("-c") + 1]).parent == KERNELS
    if is_ours and "-o" in words:
        sys.exit(compile_once(Path(folder), compiler, words))
    sys.exit(subprocess.call([compiler, *words]))
