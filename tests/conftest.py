"""What holds for every test."""

import os
from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def blank_charts() -> Iterator[None]:
    """For tests of runs to which only matters that their charts are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("useg.pictures._render", render_nothing)
        yield
