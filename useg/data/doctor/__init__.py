"""Looks at the pairs of a data set -> what is wrong with them, and how it is mended."""
