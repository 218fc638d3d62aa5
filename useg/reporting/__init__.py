"""Evaluations and data sets to reports."""
