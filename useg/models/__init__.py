"""Networks, their geometry, and the model file."""
