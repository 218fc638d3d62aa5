"""What holds for every test."""

import os

from hypothesis import settings

settings.register_profile("useg", deadline=None)  # nothing is timed in a test
settings.load_profile("useg")

os.environ["USEG_CACHE"] = (
    "off"  # no test writes into the user's cache; those of the cache set a folder of their own
)
