"""Find what is wrong with a data set, and write a fixed copy."""
