"""What holds for every test."""

from hypothesis import settings

settings.register_profile("useg", deadline=None)  # nothing is timed in a test
settings.load_profile("useg")
