"""Find problems in a data set, and write a repaired copy."""
