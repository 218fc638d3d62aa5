"""What holds for every test."""

import os

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
