"""The plan, the loop and all that a run keeps."""
