"""Objects that touch: what training learns to keep them apart, the objects found, their scores."""
