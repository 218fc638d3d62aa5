"""What holds for every test."""

import os

from hypothesis import HealthCheck, settings

# Nothing is timed in a test: how fast examples are made depends on the machine.
settings.register_profile("useg", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("useg")

os.environ["USEG_CACHE"] = (
    "off"  # no test writes into the user's cache; those of the cache set a folder of their own
)
