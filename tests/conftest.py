"""What holds for every test."""

import atexit
import gc
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from blank_charts import render_nothing
from hypothesis import HealthCheck, settings

# Nothing is timed in a test: how fast examples are made depends on the machine.
# The suite tries the same examples every time, so that it fails only for a change; the soak tries
# new ones.
settings.register_profile(
    "useg",
    deadline=None,
    derandomize="USEG_SOAK" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("useg")

os.environ["USEG_CACHE"] = (
    "off"  # no test writes into the user's cache; those of the cache set a folder of their own
)

# Compiling the layers of training takes seconds in each process that trains in bf16. The workers of
# pytest-xdist, and the processes that tests start, inherit the compiler.
if "CC" not in os.environ and (compiler := shutil.which("cc")):
    objects = tempfile.mkdtemp(prefix="useg-objects-")
    atexit.register(shutil.rmtree, objects, ignore_errors=True)
    program = str(Path(__file__).with_name("remembering_cc.py"))
    os.environ["CC"] = shlex.join([sys.executable, program, objects, compiler])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let no garbage collection visit what exists before the first test, which lasts to the end.

    That is half a million objects of packages and tests; to visit them takes a tenth of all time.
    """
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected


@pytest.fixture(scope="module")
def blank_charts() -> Iterator[None]:
    """For tests of runs to which only matters that their charts are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("useg.visualization._render", render_nothing)
        yield
