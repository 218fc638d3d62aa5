"""A model and images to label maps on disk."""
