"""Annotation files to label maps."""
