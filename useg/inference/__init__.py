"""A model and pictures to label maps on disk."""
