"""Files to arrays: formats, limits, and images larger than memory."""
