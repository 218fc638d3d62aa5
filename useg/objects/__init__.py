"""Separate touching objects: what a network learns for it, the predicted objects, their scores."""
