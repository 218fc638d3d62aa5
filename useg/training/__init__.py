"""Training: the plan, the loop, and the files of a run."""
