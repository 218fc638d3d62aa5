"""Annotation files -> pairs of picture and drawing."""
