"""A service in a process of its own, whose memory and time nothing else disturbs.

``python tests/serving_child.py`` serves a tiny model, prints its port, and reads commands on
standard input, a line each: ``plant NAME`` breaks a promise on purpose, ``mend`` ends that,
``memory`` prints the resident bytes after all free memory went back to the system.
"""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import numpy as np
import pytest
from served import tiny

from useg.machine import return_free_memory
from useg.serving import app, run
from useg.serving.middleware import Limits, resident_bytes
from useg.serving.service import make_service
from useg.serving.shared_network import LoadPlan

LEAKED_BYTES = 60_000
WASTED_BYTES = 400_000_000

KEPT: list[Any] = []


def leak(upload: Any, limit: int) -> tuple[int, int]:
    """Keep 60 kB of every request."""
    KEPT.append(np.ones(LEAKED_BYTES, np.uint8))
    return GENUINE(upload, limit)


def waste(upload: Any, limit: int) -> tuple[int, int]:
    """Believe what a file declares, before it is checked."""
    np.ones(WASTED_BYTES, np.uint8)
    return GENUINE(upload, limit)


GENUINE = app.declared_size
PLANTS = {"leak": leak, "waste": waste}


def obey() -> None:
    patch = pytest.MonkeyPatch()
    for line in sys.stdin:
        match line.split():
            case ["plant", name]:
                patch.setattr(app, "declared_size", PLANTS[name])
            case ["mend"]:
                patch.undo()
                KEPT.clear()
        gc.collect()
        return_free_memory()
        print(resident_bytes(), flush=True)
    server.should_exit = True


if __name__ == "__main__":
    listener = run.listen("127.0.0.1", 0)
    limits = Limits(upload_bytes=2_000_000, pixels=1_000_000, work_bytes=600_000_000)
    server = run.make_server(make_service(tiny(), limits, LoadPlan(2)), lambda entry: None)
    threading.Thread(target=obey, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    server.run(sockets=[listener])
